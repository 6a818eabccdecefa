"""A random life of a network beside its torchvision twin; the rules are in stateful.py."""

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("torchvision")

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from stateful import SEEN, Pair


@pytest.mark.slow
@pytest.mark.fault(35)
def test_a_network_and_its_twin_lead_the_same_life():
    SEEN.clear()
    run_state_machine_as_test(
        Pair,
        settings=settings(
            max_examples=12,
            stateful_step_count=15,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
    assert SEEN["engine"] > 30, "too few lives met the engine"
    assert SEEN["PyTorch"] > 30, "too few lives met its guards"
