"""fastres doctor: what it finds, kernels that fail, a GPU by name, the timed network."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fastres import cli
from fastres.bench import baselines
from fastres.bench import doctor as page
from fastres.bench.report import Report
from fastres.bench.results import Check
from fastres.perf import kernel_check

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def ask(capsys, *arguments):
    code = cli.run(["doctor", "--json", *arguments])
    return code, {c["name"]: c for c in json.loads(capsys.readouterr().out)["checks"]}


@pytest.fixture
def brief(monkeypatch):
    """Without the network on the CPU."""
    monkeypatch.setattr(page, "_cpu", lambda: iter(()))
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.interpreter
def test_kernels_are_exact_and_what_was_found_is_listed(brief, capsys, tmp_path):
    file = tmp_path / "doctor.json"
    code, rows = ask(capsys, "--kernel", "relu", "--kernel", "linear", "--output", str(file))
    assert code == 0
    assert rows["relu, float16"]["detail"] == "exact on whole numbers"
    assert {"linear, float32", "versions", "GPU", "C compiler", "libcuda"} <= set(rows)
    assert "gemm, float16" not in rows
    assert json.loads(file.read_text())["checks"] == list(rows.values())


@pytest.mark.interpreter
def test_a_wrong_number_is_counted(brief, capsys, monkeypatch):
    def off_by_one(x):
        y = x.clamp(min=0)
        y[0, 0, 0, :3] += 1
        return y

    monkeypatch.setattr(kernel_check.kernels.elementwise, "relu", off_by_one)
    code, rows = ask(capsys, "--kernel", "relu")
    assert code == 1
    assert (rows["relu, float16"]["ok"], rows["relu, float16"]["detail"]) == (
        False,
        "3 numbers are wrong",
    )


@pytest.mark.interpreter
def test_a_kernel_that_fails_is_a_row_with_cause_and_remedy(brief, capsys, monkeypatch):
    def fails(x):
        error = kernel_check.kernels.KernelError("relu_kernel cannot run: RuntimeError: no", CPU)
        raise error from RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernel_check.kernels.elementwise, "relu", fails)
    code, rows = ask(capsys, "--kernel", "relu", "--kernel", "add_relu")
    assert code == 1
    detail = rows["relu, float32"]["detail"]
    assert "relu_kernel cannot run" in detail
    assert detail.endswith("install gcc or clang and Python's headers")
    assert rows["add_relu, float32"]["ok"], "the others go on"


def test_every_kernel_is_checked_once_for_each_dtype():
    found = [
        case[0]
        for dtype in (torch.float16, torch.float32)
        for case in kernel_check.cases(CPU, dtype, "ieee", tma=True, tiny=True)
    ]
    assert len(found) == len(set(found)) == 25
    assert "b2b_gemm, float32" not in found
    without = kernel_check.cases(CPU, torch.float16, "ieee", tma=False, tiny=True)
    assert not any("gemm" in case[0] for case in without)


@pytest.mark.slow
def test_a_gpu_by_name_is_compiled_for():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = ["doctor", "--target", "sm_120", "--kernel", "relu", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "fastres", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = {c["name"]: c for c in json.loads(done.stdout)["checks"]}
    for name in ("relu, float16", "relu, float32"):
        registers = int(rows[name]["detail"].split()[0])
        assert 8 <= registers <= 64
        assert rows[name]["detail"].endswith("no spills, 0 bytes of shared memory")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "sm_75"), "target must be one of sm_80, sm_86, .*; got 'sm_75'"),
        (("--kernel", "conv5"), "kernel must be one of conv2d, .*; got 'conv5'"),
        (("--model", "resnet5"), "unknown model 'resnet5'; did you mean"),
        (("--output", "doctor.pdf"), r"a report ends in \.json, \.md, \.html; got 'doctor.pdf'"),
        (("--target", "sm_90"), "TRITON_INTERPRET=1 rules out; unset it"),
    ],
)
@pytest.mark.interpreter
def test_mistakes_are_one_line(brief, capsys, arguments, message):
    assert cli.run(["doctor", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert re.search(message, printed), printed


def test_what_a_gpu_would_miss_is_named_with_the_remedy(monkeypatch):
    def broken():
        raise AssertionError("libcuda.so cannot found!")

    monkeypatch.setattr(page, "_gpu", lambda device: "one")
    monkeypatch.setattr(page, "machine", lambda device: "all")
    monkeypatch.setattr(page, "_compiler", lambda: "")
    monkeypatch.setattr(page, "_libcuda", broken)
    monkeypatch.setattr(page, "_cache", lambda: "/somewhere")
    rows = {check.name: check for check in page._machine(torch.device("cuda"))}
    assert not rows["C compiler"].ok
    assert rows["C compiler"].detail == "none; install gcc or clang"
    assert "TRITON_LIBCUDA_PATH" in rows["libcuda"].detail
    assert rows["Triton's cache"] == Check("Triton's cache", True, "/somewhere")
    assert all(check.ok for check in page._machine(CPU)), "a CPU needs none of them"


@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_the_network_is_timed_behind_the_checks(monkeypatch, compiled):
    asked = []

    def timed(specs, *_, **__):
        asked.extend(specs)
        return Report.now("times", checks=(Check("resnet18, batch 32", False, "lost"),))

    monkeypatch.setattr(page, "_machine", lambda device: [Check("GPU", True, "one")])
    monkeypatch.setattr(page, "_outcomes", lambda *_: [Check("relu", True, "exact")])
    monkeypatch.setattr(page, "run", timed)
    report = page.doctor("resnet18", torch.device("cuda"), compiled=compiled)
    assert [check.name for check in report.checks] == ["GPU", "relu", "resnet18, batch 32"]
    assert not report.ok
    assert {(s.model, s.batch, s.dtypes) for s in asked} == {
        ("resnet18", 1, ("float16",)),
        ("resnet18", 32, ("float16",)),
    }
    baselines.check_names(asked[0].baselines)
    assert {"cuDNN fused" in s.baselines for s in asked} == {True}
    assert {page.COMPILED in s.baselines for s in asked} == {compiled}
