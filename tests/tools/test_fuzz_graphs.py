"""Row 11 for whole plans: the first cases of the fuzzing that ``make fuzz`` goes on with."""

import pytest

pytest.importorskip("hypothesis")

from collections import Counter

from fuzz_graphs import PROPERTIES, network
from hypothesis import HealthCheck, given, settings

import fastres
from fastres.graph.ir import Conv2d


def fuzz(name, examples, observe=lambda case: None):
    cases, check = PROPERTIES[name]

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(cases)
    def run(case):
        observe(case)
        check(case)

    run()


@pytest.mark.slow
@pytest.mark.fault(11)
def test_random_networks_are_the_same_function():
    met = Counter()

    def observe(case):
        for step in fastres.optimize(network(case), verify=False).plan().steps:
            if isinstance(step.op, Conv2d):
                met["norm"] += step.op.norm is not None
                met["residual"] += step.op.residual
                met["relu"] += step.op.relu

    fuzz("graph", 150, observe)
    assert min(met["norm"], met["residual"], met["relu"]) >= 10, "the cases have become too plain"


@pytest.mark.fault(11)
@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["graph_triton", "resnet_triton"])
def test_random_networks_through_the_kernels(name):
    pytest.importorskip("triton")
    fuzz(name, 8)


@pytest.mark.fault(11)
def test_random_resnets_keep_the_rule_of_two():
    fuzz("resnet", 60)
