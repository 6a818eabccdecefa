"""The static gate: every shipped configuration compiles for GPUs that are not here.

It runs in a process of its own, because Triton's interpreter and its compiler cannot share one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

from named_gpu import TARGETS

from fastres.kernels import elementwise, global_pool, pool
from fastres.kernels.conv import CONFIGS

GATE = Path(__file__).parents[1] / "tools" / "compile_gate.py"
FUSED = GATE.with_name("compile_gate_fused.py")
IMAGE_KERNELS = {
    "add_relu": elementwise.CONFIGS,
    "relu": elementwise.CONFIGS,
    "to_bytes": elementwise.CONFIGS,
    "max_pool2d": pool.CONFIGS,
    "avg_pool2d": pool.CONFIGS,
    "global_avg_pool": global_pool.CONFIGS,
}
FUSED_KERNELS = ("gemm", "head", "b2b_gemm", "stem")
EXPERIMENTAL = ("bottleneck_hwnc", "conv2d_hwnc", "conv3x3_hwnc")


def gate(*arguments: str, script: Path = GATE) -> tuple[int, list[dict]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), "--json", "--jobs", "1", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.stdout.startswith("["), done.stderr
    return done.returncode, json.loads(done.stdout)


def passed(*arguments: str, script: Path = GATE) -> list[dict]:
    """The verdicts on these cases, none of which has a problem."""
    status, verdicts = gate(*arguments, script=script)
    failed = [v for v in verdicts if v["problems"]]
    assert not failed, json.dumps(failed, indent=1)
    assert status == 0
    return verdicts


@pytest.mark.fault(19)
@pytest.mark.sweep
@pytest.mark.parametrize("target", TARGETS)
def test_every_convolution_compiles(target):
    verdicts = passed("--target", target, "--kernel", "conv2d")
    assert {v["target"] for v in verdicts} == {target}
    compiled = {v["config"] for v in verdicts}
    rows = [row for rows in CONFIGS.values() for row in rows]
    if target == "sm_90":  # elsewhere the launcher makes a row fit, or passes it by
        assert {
            f"{row.block_m}x{row.block_n}x{row.block_k} w{row.num_warps} s{row.num_stages}"
            for row in rows
        } <= compiled
    assert len([v for v in verdicts if "pdl" not in v["what"]]) >= 0.6 * len(rows)
    if target.startswith("sm_"):
        counted_rightly(v for v in verdicts if v["what"].startswith("3x3"))


def counted_rightly(verdicts):
    """Shared memory is what was counted, but for a few barriers."""
    found = {(v["target"], v["what"], v["config"]): v["counted"] - v["shared"] for v in verdicts}
    assert found
    assert {key: spare for key, spare in found.items() if not 0 <= spare <= 64} == {}


@pytest.mark.fault(19)
@pytest.mark.sweep
def test_every_kernel_of_images_compiles():
    verdicts = passed(*(word for kernel in IMAGE_KERNELS for word in ("--kernel", kernel)))
    assert {v["target"] for v in verdicts} == set(TARGETS)
    plain = Counter(v["kernel"] for v in verdicts if "pdl" not in v["what"])
    assert plain == {name: len(rows) * len(TARGETS) for name, rows in IMAGE_KERNELS.items()}


@pytest.mark.fault(19)
@pytest.mark.sweep
@pytest.mark.parametrize("kernel", FUSED_KERNELS + EXPERIMENTAL)
def test_every_fused_kernel_compiles(kernel):
    verdicts = passed("--kernel", kernel, script=FUSED)
    assert {v["kernel"] for v in verdicts} == {kernel}
    assert any("pdl" in v["what"] for v in verdicts)
    assert any("pdl" not in v["what"] for v in verdicts)
    if kernel == "gemm":
        counted_rightly(v for v in verdicts if v["what"].startswith("single"))
    if kernel in ("head", "stem"):
        assert {v["target"] for v in verdicts} == set(TARGETS)


@pytest.mark.fault(19)
def test_no_fused_kernel_is_left_out():
    found = import_gate("sorted({c.kernel for c in compile_gate_fused.all_cases(False) if c})")
    assert found == repr(sorted(FUSED_KERNELS + EXPERIMENTAL))


def import_gate(expression: str) -> str:
    """The value of an expression where the gate was imported, as a string."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", f"import compile_gate_fused, os; print({expression})"],
        cwd=GATE.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_the_gate_sees_no_gpu_even_where_there_is_one():
    """PyTorch would start a context on it for the fake tensors of each of hundreds of processes."""
    assert import_gate("repr(os.environ['CUDA_VISIBLE_DEVICES'])") == "''"


def rows(*rows: str) -> list[str]:
    return [word for row in rows for word in ("--row", *row.split())]


@pytest.mark.slow
def test_rows_that_do_not_fit_fail():
    """One has too much shared memory, the other too many registers."""
    given = rows("half 128 256 64 8 6", "half 256 256 32 4 2")
    status, (large, spilling) = gate("--target", "sm_90", *given)
    assert status == 1
    assert "bytes of shared memory: never as written" in " ".join(large["problems"])
    assert "spills" in " ".join(spilling["problems"])


@pytest.mark.slow
def test_rows_that_fit_pass_and_their_shared_memory_is_counted_as_laid_out():
    given = rows("half 64 64 64 4 3", "tf32 64 64 32 4 2")
    verdicts = passed("--target", "sm_89", "--target", "sm_90", *given)
    counted_rightly(verdicts)
    assert len({v["shared"] for v in verdicts}) == 4, "two targets, two kinds"
    hopper = next(v for v in verdicts if v["target"] == "sm_90" and v["what"] == "3x3 float16")
    assert hopper["wgmma"] > hopper["waits"] > 0
    assert 0 < hopper["shared"] <= hopper["shared_limit"]
    assert 0 < hopper["registers"] <= 255
