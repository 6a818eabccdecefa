"""Run the kernels' PTX on the CPU: see docs/ptx.md.

    python tests/ptx [--target sm_90] [--kernel conv2d] [--sample] [--seeds 3] [--json]
    python tests/ptx --bad | --mutants 3 | --networks | --counters | --gpu

Exit status 1 when a case fails.
"""

import os
import sys
from pathlib import Path

if os.environ.pop("TRITON_INTERPRET", "0") == "1" and "triton" in sys.modules:
    raise RuntimeError("triton was imported with TRITON_INTERPRET=1: nothing can be compiled")
TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "support")]

from ptx.sweep import main  # noqa: E402

sys.exit(main())
