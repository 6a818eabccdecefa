"""The script that measures everything on a GPU in one call: its plan, its checks, its book-keeping.

Times are not looked at here; a section's contenders run on tiny shapes in the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu_contest, gpu_exact, gpu_kernels, gpu_verdict, kernels_gpu
from benchmarks.gpu_contest import Case, Section, Setting
from fastres.kernels import conv2d, conv2d_ref
from fastres.kernels.gemm import GemmConfig

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script itself runs")
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
COMPILED_FOR = os.environ.get("FASTRES_PTX")
TINY = Setting(CPU, tiny=True)
CHEAP = ("ceilings", "gemm", "b2b_gemm", "split", "launches", "head", "repeats")


@pytest.mark.sweep
@pytest.mark.slow
def test_the_dry_run_prints_the_plan_and_checks_tiny_shapes():
    script = Path(kernels_gpu.__file__)
    done = subprocess.run(
        [sys.executable, str(script), "--dry", "--sections", *CHEAP],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines if line[0] != " "][:-1] == list(CHEAP)
    assert "    stage 4 expand batch 256 bare" in lines
    assert lines[-1].startswith("0 failed")


def test_every_section_plans_cases_of_distinct_names():
    planned = {s.name: [c.name for c in s.cases(Setting(CPU))] for s in _sections()}
    assert tuple(planned) == kernels_gpu.NAMES
    assert all(planned.values())
    assert all(len(set(names)) == len(names) for names in planned.values())
    rows = len(planned["exact"]) - 1  # the first case compiles
    assert rows == len(list(gpu_exact.trials()))


def sliding():
    return [
        c for c in gpu_exact.cases(Setting(CPU)) if "sliding" in c.name or "bottleneck" in c.name
    ]


def test_the_sliding_rows_are_not_offered_to_the_interpreter():
    assert len(sliding()) == 16
    assert COMPILED_FOR or all(c.run()["exact"] is None for c in sliding())


@pytest.mark.slow
def test_the_sliding_rows_are_tried_as_on_a_gpu(hopper, monkeypatch):
    """Each launch that the script would make of them, compared by the script itself."""
    found = [c.run()["exact"] for c in sliding()]
    assert found.count(None) == 2, "two columns do not fit beside the weights of 128 reductions"
    for module in (gpu_exact.conv3x3_hwnc, gpu_exact.bottleneck_hwnc):
        monkeypatch.setattr(module, "launch", lambda *args, **meta: None)
    for case, exact in zip(sliding(), found, strict=True):
        if exact:
            with pytest.raises(gpu_exact.NotExact):
                case.run()


def test_the_sections_fit_nine_minutes():
    limits = [limit for name, _, limit, *_ in kernels_gpu.PLAN if name not in kernels_gpu.LAST]
    assert sum(limits) <= 540
    assert kernels_gpu.BUDGET <= 530


def _sections():
    return list(kernels_gpu.sections(kernels_gpu.NAMES))


def test_a_wrong_kernel_fails_the_dry_run(monkeypatch, capsys):
    def wrong(setting):
        contenders = {"right": conv2d, "wrong": lambda x, w: conv2d(x, w) * 1.01}

        def make():
            x, w = gpu_contest.normal(setting, 1, 8, 4, 4), gpu_contest.normal(setting, 8, 8, 1, 1)
            return x, w

        yield Case("1x1", lambda: gpu_contest.contest(setting, contenders, make, conv2d_ref))
        yield Case("broken", lambda: 1 / 0)

    section = Section("gemm", "wrong", 1.0, wrong)
    monkeypatch.setattr(kernels_gpu, "sections", lambda names: [section])
    assert kernels_gpu.dry(["gemm"]) == 1
    printed = capsys.readouterr().out
    assert "failed: 1x1: wrong: wrong output: RMS error" in printed
    assert "right: wrong output" not in printed
    assert "failed: broken: broken: ZeroDivisionError" in printed


def test_an_inexact_row_is_named():
    want = torch.arange(6.0)
    gpu_exact.agree(want.half(), want)
    with pytest.raises(gpu_exact.NotExact, match="1 of 6 elements differ"):
        gpu_exact.agree(want + (want == 3), want)
    with pytest.raises(gpu_exact.NotExact, match="6 of 6"):
        gpu_exact.agree(gpu_exact.poison(want), want)  # nothing was written


def test_what_compiles_ahead_reaches_every_launch_of_a_trial(monkeypatch):
    """Nothing is computed then, so each launch gives the poison that it was given."""
    for name in ("gemm", "dual_gemm"):
        monkeypatch.setattr(gpu_exact.gemm, name, lambda *operands, out, **given: out)
    trial = gpu_exact.gemm_trial("half", GemmConfig(16, 16, 16, 4, 2))
    pairs = list(trial(TINY))
    assert len(pairs) == 3  # bare, and the pair with two strides
    for got, want in pairs:
        with pytest.raises(gpu_exact.NotExact):
            gpu_exact.agree(got, want)


def test_rows_are_written_as_the_tables_take_them():
    rows = [GemmConfig(128, 64, 64, 4, 4), GemmConfig(128, 64, 64, 4, 4, persistent=True)]
    texts = [gpu_contest.row_text(row) for row in rows]
    assert texts[0] == "GemmConfig(128, 64, 64, 4, 4)"
    assert [eval(text, {"GemmConfig": GemmConfig}) for text in texts] == rows


def test_stages_are_those_of_a_resnet50():
    shapes = [(s.channels, s.size) for s in gpu_kernels.STAGES]
    assert shapes == [(64, 56), (128, 28), (256, 14), (512, 7)]


@pytest.fixture
def log(tmp_path):
    return kernels_gpu.Log(tmp_path / "raw.jsonl")


def test_a_line_cut_short_loses_only_itself(log):
    log.add("gemm", "a", "began")
    log.add("gemm", "a", "done", data={"seconds": 1}, seconds=2.5)
    with log.path.open("a") as file:
        file.write('{"section": "gemm", "case": "b", "sta')
    assert log.states() == {("gemm", "a"): "done"}
    assert log.done() == {("gemm", "a"): {"seconds": 1}}
    assert log.spent("gemm", since=0.0) == 2.5
    assert log.spent("gemm", since=time.time() + 1) == 0
    again = kernels_gpu.Log(log.path)
    again.add("gemm", "c", "began")
    assert again.states() == log.states() == {("gemm", "a"): "done", ("gemm", "c"): "began"}


def test_a_case_that_raises_keeps_its_reason(log, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert kernels_gpu.attempt(log, ("gemm", "a"), lambda: 1 / 0)
    assert log.states() == {("gemm", "a"): "failed"}
    assert log.read()[-1]["reason"] == "ZeroDivisionError: division by zero"


def test_a_lost_device_ends_the_worker(log, monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert not kernels_gpu.attempt(log, ("gemm", "a"), dict)


def test_what_cannot_be_cleared_away_ends_the_worker_and_not_the_run(log, monkeypatch):
    def broken():
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    assert not kernels_gpu.attempt(log, ("gemm", "a"), dict)
    assert log.states() == {("gemm", "a"): "done"}


WORKER = """
import json, os, sys, time
path = sys.argv[sys.argv.index("--output") + 1] + "/raw.jsonl"
lines = [json.loads(x) for x in open(path)] if os.path.exists(path) else []
seen = {r["case"] for r in lines}
def add(case, state, **data):
    with open(path, "a") as f:
        record = {"section": "gemm", "case": case, "state": state, "at": time.time(), **data}
        f.write(json.dumps(record) + "\\n")
if "dies" not in seen:
    add("dies", "began"); os._exit(139)
if "hangs" not in seen:
    add("hangs", "began"); time.sleep(60)
add("works", "began"); add("works", "done", data={}, seconds=0.1)
"""


def test_a_worker_that_dies_or_hangs_is_replaced(log, tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(kernels_gpu, "__file__", str(script))
    monkeypatch.setattr(kernels_gpu, "PLAN", (("gemm", "", 10, "", 1.0),))
    monkeypatch.setattr(kernels_gpu, "POLL", 0.05)
    kernels_gpu.supervise(log, ["gemm"], budget=30)
    states = {case: state for (_, case), state in log.states().items()}
    assert states == {"dies": "failed", "hangs": "failed", "works": "done"}
    reasons = {r["case"]: r["reason"] for r in log.read() if "reason" in r}
    assert reasons["dies"].endswith("139")
    assert reasons["hangs"].endswith("-9")


def test_a_second_call_goes_on_with_what_was_left_out(log, monkeypatch):
    ran = []
    cases = [Case(name, lambda n=name: ran.append(n) or {}) for name in ("old", "left", "new")]
    section = Section("gemm", "", 10.0, lambda setting: iter(cases))
    monkeypatch.setattr(kernels_gpu, "sections", lambda names: [section])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    now = time.time()
    log.add("gemm", "old", "done", data={}, seconds=11.0)
    assert kernels_gpu.work(log, ["gemm"], now - 1, now + 60) == 0  # the section's time is over
    assert ran == []
    assert log.states()["gemm", "left"] == kernels_gpu.LEFT_OUT
    assert kernels_gpu.work(log, ["gemm"], time.time() + 1, now + 60) == 0
    assert ran == ["left", "new"]


def comparison(**seconds):
    return [{"name": n, "seconds": {"values": list(v)}} for n, v in seconds.items()]


def test_the_tables_hold_what_was_measured_and_say_what_was_not(log, capsys):
    timings = comparison(**{"fastres fp16 triton": (4e-3, 5e-3), "cuDNN fused fp16": (6e-3, 6e-3)})
    log.add("baselines", "resnet50 batch 256", "done", data={"timings": timings}, seconds=1.0)
    contest = {
        "cold": {
            "seconds": {"cuBLAS": 1e-5, "gemm GemmConfig(64, 64, 64, 4, 4)": 8e-6},
            "best_tflops": 100.0,
            "failures": {"gemm GemmConfig(16, 16, 16, 4, 2)": "wrong output"},
        }
    }
    log.add("gemm", "stage 1 reduce batch 256 bare", "done", data=contest, seconds=1.0)
    choice = {"kernel": "b2b_gemm", "over": "two of gemm", "width": 64, "batch": 32}
    seconds = {
        "two of gemm": 3e-5,
        "b2b_gemm B2bGemmConfig(128, 64, 8, 2)": 2e-5,
        "cuDNN fused": 1e-5,
    }
    won = {"cold": {"seconds": seconds}, "choice": choice}
    log.add("b2b_gemm", "stage 1 batch 32", "done", data=won, seconds=1.0)
    lost = won | {"choice": choice | {"over": "cuDNN"}}
    log.add("b2b_gemm", "stage 2 batch 32", "done", data=lost, seconds=1.0)
    gpu = {"gpus": [{"name": "GPU X"}]}
    log.add("environment", "environment", "done", data=gpu, seconds=1.0)
    log.add("b2b_gemm", "stage 1", "failed", reason="RuntimeError: lost", seconds=1.0)
    kernels_gpu.report(log, as_json=True)
    found = json.loads(capsys.readouterr().out)
    figures = {row[0]: row[1:] for row in found["figures"]}
    assert figures["rn50 fp16 b256, images/s"] == ["40,000", "50,000", "56,889", "goal"]
    assert figures["over cuDNN fused, b256"] == ["1.10x", "1.30x", "1.35x", "goal"]
    assert figures["1x1s over cuBLAS, worst shape"][2:] == ["1.25x", "goal"]
    assert figures["rn50 fp16 b1, GPU ms"][2:] == ["not measured", "-"]
    assert found["best"][0][3] == "gemm GemmConfig(64, 64, 64, 4, 4)"
    summary = (log.path.parent / "summary.md").read_text()
    row = 'Row("b2b_gemm", "measured on GPU X: 1.50x", HALF, (64,), batch=(32, 32)),'
    assert [line for line in summary.splitlines() if line.startswith("Row(")] == [row]
    assert "| b2b_gemm | stage 1 | failed | RuntimeError: lost |" in summary
    assert "GemmConfig(16, 16, 16, 4, 2) | wrong output |" in summary


@pytest.mark.parametrize(
    ("got", "met"), [(0.11, "goal"), (0.15, "at least"), (0.25, "no")], ids=str
)
def test_a_figure_of_which_less_is_better(got, met):
    figure = gpu_verdict.Figure("ms", 0.20, 0.12, "{:.2f}", lambda records: got, less=True)
    assert figure.row({})[-1] == met


def test_the_gate_is_started_where_it_lies_with_the_processes_that_we_may_use(monkeypatch):
    commands = []

    def start(command, **options):
        commands.append(command)
        return SimpleNamespace(stdout="[]")

    monkeypatch.setattr(kernels_gpu.subprocess, "run", start)
    monkeypatch.setattr(kernels_gpu.os, "sched_getaffinity", lambda pid: set(range(40)))
    for case in kernels_gpu.gate_cases(SimpleNamespace(tiny=False)):
        assert case.run() == {"verdicts": [], "failures": {}}
    for command in commands:
        assert Path(command[1]).is_file()
        assert command[-2:] == ["--jobs", "16"]
    assert len(commands) == 2


def test_make_gpu_runs_every_test_of_a_gpu_the_kernels_first():
    make = ["make", "--dry-run", "SETUP=0", "gpu-tests"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True)
    named = [word for word in done.stdout.split() if word.startswith("tests/gpu/")]
    assert named[0] == "tests/gpu/test_kernels_gpu.py"
    there = {f"tests/gpu/{path.name}" for path in (ROOT / "tests/gpu").glob("test_*.py")}
    assert len(named) == len(there)
    assert set(named) == there
    assert "--maxfail=25" in done.stdout
