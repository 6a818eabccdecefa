"""The demonstration: right answers are timed and shown, wrong ones are neither."""

import json
import subprocess

import numpy as np
import pytest
import torch

import fastres
from fastres import cli
from fastres.bench import demo
from fastres.bench.results import Check
from fastres.perf.timing import Method

pytest.importorskip("sklearn")
CPU = torch.device("cpu")
BRIEF = Method(rounds=1, budget=0, sample=0, warmup=0)


@pytest.fixture
def without_interpreter(monkeypatch):
    """Skips the interpreter's process, as if it had found right answers."""
    monkeypatch.setattr(demo, "interpreter_check", lambda: Check("interpreter", True, "right"))


@pytest.fixture
def wrong_answers(monkeypatch):
    """fastres takes every digit for its successor."""
    honest = demo.ours

    def rolled(*arguments):
        fast = honest(*arguments)
        return lambda x: fast(x).roll(1, 1)

    monkeypatch.setattr(demo, "ours", rolled)


@pytest.mark.slow
def test_right_answers_are_shown_and_timed(without_interpreter, monkeypatch):
    """A ResNet-18 stands for the ResNet-50 that is timed on photographs, which takes 2 GB."""
    monkeypatch.setattr(demo, "create_model", {"resnet50": fastres.resnet18()}.__getitem__)
    found = demo.demo(device=CPU, method=BRIEF)
    assert found.ok
    assert [check.name for check in found.checks] == [
        "PyTorch reads the digits",
        "fastres reads the digits",
        "fastres agrees with PyTorch",
        "interpreter",
    ]
    assert "get the same answer by onednn" in found.checks[2].detail
    assert [case.shape for case in found.cases] == [(64, 1, 8, 8), (4, 3, 224, 224)]
    for case in found.cases:
        names = [timing.name for timing in case.comparison.timings]
        assert {"eager fp32", "eager fp32 channels_last", "fastres fp32"} <= set(names)
        assert not case.comparison.failures
        assert set(case.errors) == set(names)
    assert len(found.pictures) == demo.PICTURES
    assert "the CPU" in found.notes[0]


def test_wrong_answers_end_with_exit_code_1_and_no_speed(
    wrong_answers, without_interpreter, tmp_path, capsys
):
    path = tmp_path / "report.html"
    assert cli.run(["demo", "--device", "cpu", "--report", str(path)]) == 1
    out = capsys.readouterr().out
    assert "WRONG fastres reads the digits" in out
    assert "WRONG fastres agrees with PyTorch: wrong output: RMS error" in " ".join(out.split())
    assert "Nothing was timed" in out
    html = path.read_text()
    assert "Some answers are wrong" in html
    for text in (out, html):
        assert "images/s" not in text
        assert "speed-up" not in text


def test_wrong_answers_of_the_kernels_stop_the_timing_too(monkeypatch):
    wrong = Check("interpreter", False, "3 of 32 right")
    monkeypatch.setattr(demo, "interpreter_check", lambda: wrong)
    found = demo.demo(device=CPU, method=BRIEF)
    assert not found.ok
    assert found.cases == ()


def test_a_fastres_that_does_not_run_is_a_failed_check(monkeypatch, without_interpreter):
    def refuses(*arguments):
        def call(x):
            raise RuntimeError("no kernel\nand more")

        return call

    monkeypatch.setattr(demo, "ours", refuses)
    found = demo.demo(device=CPU, method=BRIEF)
    assert found.checks[0] == Check("fastres runs", False, "RuntimeError: no kernel")
    assert found.cases == ()


@pytest.mark.sweep
@pytest.mark.slow
@pytest.mark.interpreter
def test_the_kernels_read_digits_in_a_process_of_their_own():
    if demo.interpreter_obstacle():
        pytest.skip(demo.interpreter_obstacle())
    check = demo.interpreter_check()
    assert check.ok, check.detail
    assert "32 of 32 right through 21 kernels" in check.detail  # 19 convolutions, pool, linear


@pytest.mark.interpreter
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for CPU tensors")
@pytest.mark.parametrize("broken", [False, True])
def test_a_kernel_that_forgets_the_bias_is_noticed(broken, monkeypatch):
    if demo.interpreter_obstacle():
        pytest.skip(demo.interpreter_obstacle())
    from fastres import kernels

    honest = kernels.conv2d

    def forgets(x, weight, bias, **options):
        return honest(x, weight, None, **options)

    if broken:
        monkeypatch.setattr(kernels, "conv2d", forgets)
    monkeypatch.setattr(demo, "INTERPRETED", 2)
    assert demo.interpret()["ok"] is not broken


def test_a_crash_of_the_interpreter_is_a_failed_check(monkeypatch):
    def crash(*args, **kwargs):
        return subprocess.CompletedProcess(args, 1, "", "Traceback\nTypeError: not an int\n")

    monkeypatch.setattr(subprocess, "run", crash)
    check = demo.interpreter_check()
    assert (check.ok, check.detail) == (False, "TypeError: not an int")


def test_the_interpreters_process_answers_in_its_last_line(monkeypatch):
    def answer(command, env, **kwargs):
        assert env["TRITON_INTERPRET"] == "1"
        text = "chatter\n" + json.dumps({"ok": True, "detail": "fine"}) + "\n"
        return subprocess.CompletedProcess(command, 0, text, "")

    monkeypatch.setattr(subprocess, "run", answer)
    check = demo.interpreter_check()
    assert (check.ok, check.detail) == (True, "fine")


def test_what_keeps_the_interpreter_from_running(monkeypatch):
    triton = pytest.importorskip("triton")
    for version, numpy, runs in (("3.6.0", "2.4.1", False), ("3.6.0", "2.3.5", True)):
        monkeypatch.setattr(triton, "__version__", version)
        monkeypatch.setattr(np, "__version__", numpy)
        assert (demo.interpreter_obstacle() is None) is runs
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert demo.interpreter_obstacle() == "Triton is not installed"


def test_pictures_begin_with_the_mistakes():
    images = torch.rand(20, 1, 8, 8)
    labels = torch.arange(20) % 10
    logits = torch.nn.functional.one_hot(labels, 10).float() * 5
    logits[7] = logits[7].roll(1)
    pictures = demo.some_pictures(images, labels, logits)
    assert len(pictures) == demo.PICTURES
    assert (pictures[0].label, pictures[0].predicted) == ("7", "8")
    assert torch.equal(torch.tensor(pictures[0].pixels), images[7, 0])
    assert all(picture.correct for picture in pictures[1:])


def test_photographs_are_crops_normalised_as_torchvision_does():
    presets = pytest.importorskip("torchvision.transforms._presets")
    from sklearn.datasets import load_sample_images

    batch = demo.photographs(2, seed=3)
    assert batch.shape == (2, 3, 224, 224)
    preset = presets.ImageClassification(crop_size=224)
    mean, std = (torch.tensor(v)[:, None, None] for v in (preset.mean, preset.std))
    for crop, photo in zip(batch, load_sample_images().images, strict=True):
        pixels = ((crop * std + mean) * 255).round().to(torch.uint8)
        rows = (
            torch.from_numpy(np.array(photo)).permute(2, 0, 1).unfold(1, 224, 1).unfold(2, 224, 1)
        )
        assert any(torch.equal(pixels, rows[:, i, j]) for i in range(204) for j in range(417))
    assert not torch.equal(batch, demo.photographs(2, seed=4))
