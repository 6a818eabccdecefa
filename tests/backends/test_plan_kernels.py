"""The default plan on GPUs that are not here: its launches, compiled, and one that fails."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from named_gpu import TARGETS, walk

import fastres
from fastres.backends import triton
from fastres.bench import run

TOOL = Path(__file__).parents[1] / "tools" / "plan_kernels.py"
SHAPE = (2, 3, 64, 64)


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return fastres.resnet18().eval()


@pytest.fixture(autouse=True)
def _forgets():
    triton.FAILED.clear()
    yield
    triton.FAILED.clear()


@pytest.mark.parametrize("architecture", TARGETS)
def test_auto_launches_our_kernels_where_a_table_knows_the_gpu(model, architecture):
    launches, plan = walk(model, TARGETS[architecture], SHAPE, torch.float16)
    names = {launch.kernel.__name__ for launch in launches}
    known = architecture.startswith("sm_") or architecture == "gfx942"
    assert ("conv2d_kernel" in names) is known
    assert ("aten conv2d" in plan.kernels) is not known
    assert "cuDNN fused conv" not in plan.kernels  # which is not AMD's


def test_a_tile_fits_the_gpu_that_it_is_for(model):
    for architecture, target in TARGETS.items():
        launches, _ = walk(model, target, (256, *SHAPE[1:]), torch.float16, "triton")
        convolutions = [x.meta for x in launches if x.kernel.__name__ == "conv2d_kernel"]
        bytes_of = (
            (m["BLOCK_M"] + m["BLOCK_N"]) * m["BLOCK_K"] * 2 * (m["num_stages"] - 1)
            for m in convolutions
        )
        assert max(bytes_of) <= target.record.shared_limit, architecture


@pytest.mark.parametrize(("architecture", "precision"), [("sm_90", "tf32"), ("gfx90a", "ieee")])
def test_tf32_is_not_asked_of_amd(model, architecture, precision):
    with run.float32_products("tf32"):
        launches, _ = walk(model, TARGETS[architecture], SHAPE, torch.float32, "triton")
    assert {x.meta["PRECISION"] for x in launches if "PRECISION" in x.meta} == {precision}


@pytest.mark.fault(88)
@pytest.mark.parametrize("at", [1, 9])
def test_a_launch_that_fails_on_a_gpu_leaves_the_plan_to_cudnn(model, at):
    launched = []

    def fail(launch):
        launched.append(launch)
        if len(launched) == at:
            raise RuntimeError("Triton Error [CUDA]: invalid device function")

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        _, plan = walk(model, TARGETS["sm_90"], SHAPE, torch.float16, run=fail)
    assert [str(w.message) for w in told if "goes on without" in str(w.message)]
    assert len(launched) == at
    assert not any("triton" in name for name in plan.kernels)
    assert "cuDNN fused conv" in plan.kernels


def compiled(*arguments: str) -> list[dict]:
    """By the tool, in a process without the interpreter; ResNet-18 on two small images."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(TOOL), "--json", "--jobs", "1", "--model", "resnet18"]
    done = subprocess.run(
        [*command, "--batch", "2", "--size", "64", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.stdout.startswith("["), done.stderr
    rows = json.loads(done.stdout)
    assert [row["problems"] for row in rows if row["problems"]] == []
    assert done.returncode == 0
    return rows


@pytest.mark.slow
def test_a_sample_of_the_default_plans_kernels_compiles():
    (row,) = compiled("--target", "sm_90", "--dtype", "float16", "--most", "2")
    assert row["launches"] > row["kernels"] > row["compiled"] == 2
    assert row["seconds"] > 0


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("target", "backend"), [("sm_80", "auto"), ("sm_90", "auto"), ("gfx90a", "triton")]
)
def test_every_kernel_of_the_default_plan_compiles(target, backend):
    chosen = ("--target", target, "--backend", backend, "--dtype", "float16", "float32")
    for row in compiled(*chosen):
        assert row["kernels"] == row["compiled"] > 8
