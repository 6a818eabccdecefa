"""The kernels in Gluon, which Triton's interpreter does not know: their own tests, run here.

In a process of its own, whose kernels are compiled for sm_90 and run by the machine.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).parents[1]
ALL = (
    "kernels/experimental/test_conv3x3_hwnc.py",
    "kernels/experimental/test_bottleneck_hwnc.py",
    "kernels/test_gpu_script.py::test_the_sliding_rows_are_tried_as_on_a_gpu",
    "backends/test_triton_groups.py::test_a_network_through_the_sliding_kernels",
)


def passed(*tests: str, only: str = "") -> int:
    """How many passed; none may fail."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--sweep",
            "-p",
            "no:cacheprovider",
            "-k",
            only,
            *tests,
        ],
        env=environment | {"FASTRES_PTX": "sm_90", "CUDA_VISIBLE_DEVICES": ""},
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return int(re.search(r"(\d+) passed", done.stdout)[1])


SAMPLE = "conv3x3 and (nan_stays or stores) or tail-torch.float16-bias"


@pytest.mark.slow
@pytest.mark.fault(14)
def test_each_is_exact_and_a_broken_one_is_noticed():
    assert passed(*ALL[:2], only=SAMPLE) == 3


@pytest.mark.sweep
def test_all_are_exact_and_all_broken_are_noticed():
    assert passed(*ALL) >= 150
