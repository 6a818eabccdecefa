"""Row 29: compute-sanitizer finds nothing in any kernel, where both it and a GPU are at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, str(Path(__file__).with_name("sanitize.py"))]


@pytest.mark.fault(29)
def test_the_script_is_exact_on_the_device():
    subprocess.run(SCRIPT, cwd=ROOT, check=True)


@pytest.mark.fault(29)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool):
    if not os.environ.get("FASTRES_SANITIZE"):
        pytest.skip("takes minutes: set FASTRES_SANITIZE=1, or run make gpu-sanitize")
    found = shutil.which("compute-sanitizer")
    if found is None:
        pytest.skip("compute-sanitizer, a part of the CUDA toolkit, is not installed")
    # memcheck sees past the end of a tensor only where torch does not pool its memory.
    pooled = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    subprocess.run(
        [found, "--tool", tool, "--error-exitcode", "1", *SCRIPT],
        cwd=ROOT,
        env=os.environ | pooled,
        check=True,
    )
