"""8 bits in a benchmark: who is timed, by which rule an answer is right, and what is refused."""

import json

import pytest
import torch
import torch.nn.functional as F

from fastres import cli
from fastres.bench import baselines, eight_bits, run
from fastres.bench.accuracy import AccuracyCheck, random_images
from fastres.bench.baselines import BASELINES, Baseline
from fastres.bench.eight_bits import calibration_images, fake_quantize_
from fastres.bench.run import calibrate_, compare
from fastres.models.registry import create_model
from fastres.perf.roofline import Ceilings
from fastres.perf.timing import Method
from tests.support.eight_bit import MOST

BRIEF = Method(rounds=1, budget=0, sample=0, warmup=0)
INT8 = [torch.float32, torch.int8]


@pytest.fixture(scope="module")
def model():
    built = create_model("resnet20", num_classes=10).eval()
    calibrate_(built)
    return built


@pytest.fixture(scope="module")
def images():
    return random_images(2, 3, 32)


def test_all_calibrate_on_the_same_images_which_are_not_those_that_are_timed():
    for batch, count in ((1, 32), (3, 33), (32, 32), (40, 40)):
        example = torch.zeros(batch, 3, 8, 8)
        found = calibration_images(example)
        assert found.shape == (count, 3, 8, 8)
        assert torch.equal(found, calibration_images(example))
        timed = torch.cat(random_images(batch, 3, 8))
        assert not any(torch.equal(a, b) for a in found for b in timed)


def test_the_rounding_that_outputs_are_judged_by():
    """A convolution of a step of scale s on each side: the noise of both is s^2 / 12 a product."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(16, 32, 3, bias=False)
    x = torch.randn(8, 16, 20, 20)
    step = (x.max() - x.min()) / 255
    exact = conv(x)
    weight = conv.weight.detach().clone()
    found = fake_quantize_(conv, x)(x)
    by_channel = (weight.abs().amax((1, 2, 3)) / MOST).view(-1, 1, 1, 1)
    whole = conv.weight / by_channel
    assert torch.allclose(whole, whole.round(), atol=1e-3)
    assert whole.abs().amax((1, 2, 3)).round().tolist() == [MOST] * 32
    of_weights = by_channel.square().expand_as(weight) / 12
    noise = F.conv2d(x.square(), of_weights) + weight.square().sum((1, 2, 3)).view(-1, 1, 1) * (
        step**2 / 12
    )
    power = (found - exact).square().mean() / noise.mean()
    assert 0.8 < power < 1.25


def too_coarse(model, dtype, example):
    """Every weight to 4 bits."""
    copied = baselines._copied(model, torch.float32, torch.contiguous_format)
    for module in copied.modules():
        if isinstance(module, torch.nn.Conv2d):
            eight_bits._round_weights_(module.weight, 7)
    return copied


def saturating(model, dtype, example):
    """As 16 bits do that hold the sum of two products: half of the largest is lost."""
    fast = run.ours_in_8_bits(model, example)
    built = fast.build()
    conv = built.executor().ops.conv
    built.executor().ops.conv = lambda *args, **others: conv(*args, **others).clamp_max(60)
    return built


@pytest.mark.parametrize("fault", [too_coarse, saturating])
def test_a_wrong_quantiser_gets_no_time_and_the_right_one_does(model, images, monkeypatch, fault):
    faulty = Baseline("faulty", "a bug", ("cpu",), fault, int8=True)
    floats = Baseline("floats", "no form in 8 bits", ("cpu",), fault)
    monkeypatch.setattr(baselines, "BASELINES", {"faulty": faulty, "floats": floats})
    case = compare(
        "rn20", model, images, [torch.int8], "random", BRIEF, None, tuple(baselines.BASELINES)
    )
    assert [t.name for t in case.comparison.timings] == [
        "eager fp32",
        "fastres int8",
        "faulty int8",
    ]
    assert "wrong output: RMS error" in case.comparison.failures.pop("faulty int8")
    assert list(case.comparison.failures) == ["faulty int8"]
    ours = case.errors["fastres int8"]
    assert 1e-3 * ours.reference_rms < ours.rms < ours.allowed_rms


def test_float_outputs_are_not_judged_by_8_bits(model, images):
    judge = AccuracyCheck(model, {}, images, int8=True)
    exact = judge.reference[0].float()
    noisy = exact + torch.randn_like(exact) * judge.rounding[torch.int8]
    assert judge("fastres int8", 0, noisy) is None
    assert "wrong output" in judge("fastres fp32", 0, noisy)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnxruntime", "OpenVINO"])
def test_other_runtimes_are_right_in_8_bits(model, images, name, capsys):
    for package in {"onnxruntime": ("onnxruntime", "onnxscript"), "OpenVINO": ("openvino", "nncf")}[
        name
    ]:
        pytest.importorskip(package)
    case = compare("rn20", model, images, INT8, "random", BRIEF, None, (name,))
    assert case.comparison.failures == {}
    error = case.errors[f"{name} int8"]
    assert error.rms > 3 * case.errors[f"{name} fp32"].allowed_rms  # it is in 8 bits indeed
    assert capsys.readouterr().out == ""


def test_missing_quantisers_are_listed(model, images, monkeypatch):
    monkeypatch.setattr(baselines, "find_spec", lambda name: None if name == "nncf" else object())
    with pytest.raises(baselines.Unavailable, match="nncf is not installed"):
        BASELINES["OpenVINO"].build(model, torch.int8, images[0])


def test_8_bits_are_for_a_cpu():
    with pytest.raises(ValueError, match="dtype 'int8' is timed on a CPU alone, got 'cuda'"):
        run._check_spec(run.Spec("resnet20", 1, dtypes=("int8",)), torch.device("cuda"))


def test_the_command_times_8_bits(capsys):
    arguments = ["bench", "resnet20", "--batch", "2", "--size", "32", "--dtype", "float32,int8"]
    code = cli.run([*arguments, "--rounds", "1", "--seconds", "0", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0
    (case,) = found["cases"]
    names = [timing["name"] for timing in case["timings"]]
    assert names == ["eager fp32", "eager fp32 channels_last", "fastres fp32", "fastres int8"]
    assert all(timing["cpu_seconds"]["median"] > 0 for timing in case["timings"])


def test_8_bits_are_probed_and_have_no_floor(monkeypatch):
    ceilings = Ceilings("slow on purpose", 1e6, 1e6)
    monkeypatch.setattr(run, "measured_ceilings", lambda device, dtype: ceilings)
    spec = run.Spec("resnet18", 2, 32, ("float32", "int8"), probes=0.01, layers=True)
    (case,) = run.run([spec], method=BRIEF).cases
    assert case.probes["fastres int8"].calls > 0
    assert set(case.floors) == {"fp32"}
    assert set(case.layers) == {"fastres fp32"}
