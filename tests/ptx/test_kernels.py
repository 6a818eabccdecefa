"""Our kernels, compiled for GPUs that are not here, run by the machine and compared.

The command runs in a process of its own: Triton's interpreter and its compiler cannot share one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
COMMON = {"conv2d", "add_relu", "relu", "max_pool2d", "avg_pool2d", "global_avg_pool", "head"}
EVERYWHERE = COMMON | {"stem"}
COPIED = {"gemm", "dual_gemm", "b2b_gemm", "conv2d_hwnc"}


def command(*arguments: str) -> list[dict]:
    """The results that the command prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE), "--json", *arguments],
        env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.stdout.startswith("["), done.stderr
    return json.loads(done.stdout)


def passed(*arguments: str) -> set[str]:
    """The kernels that came out right, and none did not."""
    results = command(*arguments)
    failed = [result for result in results if result["problem"]]
    assert not failed, json.dumps(failed, indent=1)
    return {result["kernel"] for result in results}


def only(kernels: set[str]) -> list[str]:
    return [word for kernel in sorted(kernels) for word in ("--kernel", kernel)]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_case_of_each_kernel(target):
    assert passed("--sample", "--target", target, *only(EVERYWHERE)) == EVERYWHERE


@pytest.mark.slow
def test_kernels_that_are_wrong_on_purpose_are_refused():
    """A race, a late wait, a misaligned vector, ... each beside the form that is right."""
    assert len(passed("--bad")) == 20


@pytest.mark.slow
def test_a_case_of_each_kernel_with_tma():
    assert passed("--sample", "--target", "sm_90", "--pdl", *only(COPIED)) == COPIED


@pytest.mark.sweep
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_case(target):
    due = EVERYWHERE | COPIED if target == "sm_90" else EVERYWHERE
    assert passed("--target", target) == due


@pytest.mark.sweep
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_mutants_of_real_kernels_are_noticed(target):
    """Each kind in at least one place; where one passes, mutants.HARMLESS says why."""
    kinds = passed("--mutants", "2", "--target", target)
    assert {kind for kind in kinds if not kind.endswith("(harmless)")} >= {
        kind.removesuffix(" (harmless)") for kind in kinds
    }


@pytest.mark.sweep
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_whole_networks_by_the_rule_of_two(target):
    assert passed("--networks", "--target", target) == {"resnet18", "resnet50"}


@pytest.mark.slow
def test_a_whole_network_by_the_rule_of_two():
    arguments = ("--networks", "--target", "sm_90", "--network", "resnet18", "--dtype", "float16")
    assert passed(*arguments) == {"resnet18"}
