"""Row 11: the first cases of the fuzzing that ``make fuzz`` goes on with."""

import pytest

pytest.importorskip("triton")
pytest.importorskip("hypothesis")

from fuzz_kernels import PROPERTIES
from hypothesis import HealthCheck, given, settings

pytestmark = pytest.mark.interpreter


@pytest.mark.fault(11)
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", PROPERTIES)
def test_kernels_are_exact_on_integers(name):
    cases, check = PROPERTIES[name]

    @settings(max_examples=15 if name == "conv2d" else 25, suppress_health_check=list(HealthCheck))
    @given(cases)
    def fuzz(case):
        check(case)

    fuzz()
