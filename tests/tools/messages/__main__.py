"""Write the snapshot anew."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import conftest  # noqa: E402, F401  as in the tests: Triton's interpreter is on

from messages import files, keras, models, tools  # noqa: E402, F401
from messages.provoke import SNAPSHOT, as_text, provoke_all  # noqa: E402

SNAPSHOT.write_text(as_text(provoke_all()))
