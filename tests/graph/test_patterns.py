"""Groups of steps: which are joined, and that a group's meaning is its steps in order."""

import pytest
from torch import nn

import fastres
from fastres.graph import fold, patterns, plan, trace
from fastres.graph.patterns import candidates, group_steps


def plan_of(module):
    return plan.build(fold.fold(trace.trace(module.eval())))


PATTERNS = {
    pattern.__name__: pattern
    for pattern in (
        patterns.stem_pool,
        patterns.pool_linear,
        patterns.expand_project,
        patterns.expand_reduce,
        patterns.bottleneck_tail,
        patterns.flat,
        patterns.convolution,
    )
}


JOINING = tuple(name for name in PATTERNS if name not in ("flat", "convolution"))
"""The patterns that find several steps."""


def named(*names):
    return {name: PATTERNS[name] for name in names}


def kernels(groups):
    return [group.kernel for group in groups if group.kernel]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (("stem_pool",), {"stem_pool": 1}),
        (("pool_linear",), {"pool_linear": 1}),
        (("expand_project",), {"expand_project": 4}),
        (("expand_reduce", "expand_project"), {"expand_reduce": 15}),
        (("bottleneck_tail",), {"bottleneck_tail": 16}),
    ],
)
def test_groups_of_resnet50(rules, expected):
    groups = group_steps(plan_of(fastres.resnet50()), named(*rules)).groups
    found = kernels(groups)
    assert {name: found.count(name) for name in set(found)} == expected


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "resnet20"])
@pytest.mark.parametrize("rules", [(), tuple(PATTERNS), tuple(reversed(PATTERNS))])
def test_groups_keep_every_step_in_order(name, rules):
    whole = plan_of(fastres.create_model(name))
    groups = group_steps(whole, named(*rules)).groups
    assert [s for g in groups for s in g.steps] == list(whole.steps)
    available = {p.name for p in whole.parameters}
    for group in groups:
        assert set(group.inputs) <= available, "a group reads only what was handed out before it"
        available.update(group.outputs)
    assert {"fc"} <= available


def test_a_value_with_another_reader_is_handed_out():
    groups = group_steps(plan_of(fastres.resnet50()), named("expand_reduce")).groups
    inner = [g for g in groups if g.kernel == "expand_reduce" and "layer1" in g.steps[0].where]
    assert all(len(group.outputs) == 2 for group in inner), "the residual is needed by the next"


class TwiceRead(nn.Module):
    """The stem's convolution is read by the pool and by somebody else."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x):
        x = self.relu(self.conv(x))
        return self.pool(x), x


def test_a_stem_read_twice_is_not_joined():
    assert kernels(group_steps(plan_of(TwiceRead()), named(*JOINING)).groups) == []


def test_grouped_and_strided_convolutions_do_not_end_a_bottleneck():
    net = fastres.resnext50_32x4d()
    assert kernels(group_steps(plan_of(net), named("bottleneck_tail")).groups) == []
    v1 = fastres.resnet50(stride_on="1x1")
    # In v1 the next stage's first 1x1 is strided, so 3 of the 15 pairs are not flat.
    found = kernels(group_steps(plan_of(v1), named("expand_reduce")).groups)
    assert found.count("expand_reduce") == 12


def test_a_refused_group_stays_single_steps():
    whole = plan_of(fastres.resnet50())
    chosen = {"pool_linear": "because"}
    found = group_steps(whole, PATTERNS, lambda group: chosen.get(group.kernel))
    groups = found.groups
    assert set(found.why) == {"", "because"}
    assert kernels(groups) == ["pool_linear"]
    assert len(groups) == len(whole.steps) - 2


def test_flat_convolutions_are_those_that_keep_all_pixels():
    groups = group_steps(plan_of(fastres.resnet50()), {"gemm": PATTERNS["flat"]}).groups
    flat = [group.steps[0].op for group in groups if group.kernel == "gemm"]
    assert len(flat) == 33, "two for each of 16 blocks, and the unstrided projection"
    assert {op.kernel for op in flat} == {(1, 1)}
    assert {op.stride for op in flat} == {(1, 1)}


def test_candidates_overlap():
    """Each place where a kernel could serve, whatever is chosen in the end."""
    whole = plan_of(fastres.resnet50())
    found = candidates(
        whole, {"b2b_gemm": PATTERNS["expand_reduce"], "gemm": PATTERNS["flat"]}, lambda group: True
    )
    starts = [group.steps[0].name for group in found]
    assert len(starts) == len(set(starts)) + sum(g.kernel == "b2b_gemm" for g in found)
    assert {g.kernel for g in candidates(whole, PATTERNS, lambda g: g.kernel == "flat")} == {"flat"}
