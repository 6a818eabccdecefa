"""Cases that fuzzing once found wrong stay right."""

import json
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")

from fuzz import REGRESSIONS, properties

NEED_TRITON = {"conv2d", "linear", "pool", "global_pool", "elementwise"}
NEED_TRITON |= {"graph_triton", "resnet_triton"}
CASES = [
    (path.stem, index, case)
    for path in sorted(Path(REGRESSIONS).glob("*.json"))
    for index, case in enumerate(json.loads(path.read_text()))
]


@pytest.mark.fault(11)
@pytest.mark.parametrize(
    ("name", "index", "case"), CASES, ids=[f"{name}-{index}" for name, index, _ in CASES]
)
def test_found_before(name, index, case):
    found = properties()
    if name not in found:
        pytest.skip(f"{name} needs Triton")
    found[name][1](case)


@pytest.mark.fault(11)
def test_every_kept_case_names_a_property():
    assert CASES
    assert {name for name, _, _ in CASES} <= {*properties(), *NEED_TRITON}
