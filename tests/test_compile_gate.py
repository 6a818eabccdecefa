"""The static gate: every shipped configuration compiles for GPUs that are not here.

It runs in a process of its own, because Triton's interpreter and its compiler cannot share one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fastres.kernels import elementwise, global_pool, pool
from fastres.kernels.conv import CONFIGS

GATE = Path(__file__).with_name("compile_gate.py")
TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942"}


def gate(*arguments: str, script: Path = GATE) -> tuple[int, list[dict]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), "--json", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.stdout.startswith("["), done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow
def test_row19_every_shipped_config_compiles():
    status, verdicts = gate()
    failed = [v for v in verdicts if v["problems"]]
    assert not failed, json.dumps(failed, indent=1)
    assert status == 0
    assert {v["target"] for v in verdicts} == TARGETS
    matrix = {v["config"] for v in verdicts if v["kernel"] == "conv2d" and v["target"] == "sm_90"}
    for row in (row for rows in CONFIGS.values() for row in rows):
        tile = f"{row.block_m}x{row.block_n}x{row.block_k} w{row.num_warps} s{row.num_stages}"
        assert tile in matrix
    for kernel, rows in {
        "add_relu": elementwise.CONFIGS,
        "relu": elementwise.CONFIGS,
        "max_pool2d": pool.CONFIGS,
        "avg_pool2d": pool.CONFIGS,
        "global_avg_pool": global_pool.CONFIGS,
    }.items():
        plain = [v for v in verdicts if v["kernel"] == kernel and "pdl" not in v["what"]]
        assert len(plain) == len(rows) * len(TARGETS)


@pytest.mark.slow
def test_row19_every_fused_kernel_compiles_for_hopper():
    fused = GATE.with_name("compile_gate_fused.py")
    status, verdicts = gate("--target", "sm_90", script=fused)
    failed = [v for v in verdicts if v["problems"]]
    assert not failed, json.dumps(failed, indent=1)
    assert status == 0
    kernels = {v["kernel"] for v in verdicts}
    assert kernels == {"conv2d_hwnc", "gemm", "head", "rot2", "conv3x3_hwnc", "bottleneck_hwnc"} | {
        "stem",
    }
    assert {v["kernel"] for v in verdicts if "pdl" in v["what"]} == kernels


def test_the_gate_sees_no_gpu_even_where_there_is_one():
    """PyTorch would start a context on it for the fake tensors of each of hundreds of processes."""
    script = "import compile_gate, os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=GATE.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "''\n"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("half 128 256 64 8 6", "bytes of shared memory: never as written"),
        ("half 256 256 32 4 2", "spills"),
    ],
    ids=["too much shared memory", "too many registers"],
)
def test_a_row_that_does_not_fit_fails(row, problem):
    status, verdicts = gate("--target", "sm_90", "--row", *row.split())
    assert status == 1
    assert [problem in " ".join(v["problems"]) for v in verdicts] == [True]


def test_a_row_that_fits_passes():
    status, verdicts = gate("--target", "sm_90", "--row", *["half", "64", "64", "64", "4", "3"])
    assert (status, verdicts[0]["problems"]) == (0, [])
    assert verdicts[0]["wgmma"] > verdicts[0]["waits"] > 0
    assert 0 < verdicts[0]["shared"] <= verdicts[0]["shared_limit"]
    assert 0 < verdicts[0]["registers"] <= 255
