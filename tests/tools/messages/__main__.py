"""Write the snapshot anew."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[2]
sys.path[:0] = [str(TESTS.parent), *(str(TESTS / name) for name in ("", "support", "tools"))]

import conftest  # noqa: E402, F401  as in the tests: Triton's interpreter is on

from messages import batching, eight_bit, files, keras, models, serving, tools, training  # noqa: E402, F401
from messages.provoke import SNAPSHOT, as_text, provoke_all  # noqa: E402

SNAPSHOT.write_text(as_text(provoke_all()))
