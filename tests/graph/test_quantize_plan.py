"""Which values an 8-bit plan holds as bytes, and that each reader gets what it takes."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastres.backends.onednn_int8 import Int8Ops, OneDNNInt8Ops, int8_products
from fastres.graph import plan as planning
from fastres.graph.ir import Conv2d, Dequantize, GlobalAvgPool, Grid, Quantize, Ref
from fastres.graph.quantize import quantize, quantized_weight, value_grids
from tests.support.eight_bit import eight_bit_plan, engine, observed, rough_grids
from tests.support.helpers import adversarial_


def conv(ins, outs, kernel=3, **more):
    return nn.Conv2d(ins, outs, kernel, padding=kernel // 2, **more)


class Net(nn.Module):
    """Convolutions a to d, and what a test does between them."""

    def __init__(self, between, relu=True):
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 8)
        self.wide = conv(16, 8)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU() if relu else nn.Identity()
        self.between = between

    def forward(self, x):
        return self.between(self, self.act(self.norm(self.a(x))))


def residual_used_again(m, x):
    y = F.relu(m.b(x) + x)
    return m.c(y) + x, m.d(y).relu()


def reused(m, x):
    return m.b(F.relu(m.b(F.relu(m.b(x)))))


def concatenated(m, x):
    return m.wide(torch.cat([F.relu(m.b(x)), m.c(x)], 1))


def padded_shortcut(m, x):
    shortcut = F.pad(x[:, :4, ::2, ::2], [0, 0, 0, 0, 2, 2])
    y = F.max_pool2d(m.b(x), 2)
    return m.c(F.relu(m.d(y) + shortcut))


def pooled(m, x):
    y = F.max_pool2d(x, 3, 2, 1)
    return m.c(F.relu(m.b(y) + y))


def signed(m, x):
    return m.c(m.b(x) + x)


def written_in_place(m, x):
    y = F.relu(m.b(x))
    z = m.c(y)
    y.mul_(0.5)
    return m.d(y) + z


def written_through_a_view(m, x):
    y = F.relu(m.b(x))
    y[:, :2].mul_(0.5)
    return m.d(y)


def broadcast(m, x):
    return m.c(F.relu(m.b(x) + m.d(x).mean((2, 3), keepdim=True)))


def averaged(m, x):
    y = F.relu(m.b(x) + x)
    return y.mean((2, 3)), m.c(y).mean((2, 3), keepdim=True)


def by_torch(m, x):
    return m.c(F.avg_pool2d(F.gelu(m.b(x)), 2))


CASES = [
    residual_used_again,
    reused,
    concatenated,
    padded_shortcut,
    pooled,
    signed,
    written_in_place,
    written_through_a_view,
    broadcast,
    averaged,
    by_torch,
]


def network(between, relu=True):
    return adversarial_(Net(between, relu))


def leaves(output):
    return torch.utils._pytree.tree_leaves(output)


def reference(plan, model, x):
    """By the definition in float64, nothing in place: what every engine must give."""
    wide, dtype = copy.deepcopy(model).double(), torch.float64
    return leaves(engine(plan, wide, Int8Ops(dtype), dtype).run([x.double()], lambda *_: None))


@pytest.mark.parametrize("relu", [True, False], ids=["from 0", "signed"])
@pytest.mark.parametrize("between", CASES, ids=lambda f: f.__name__)
def test_each_engine_computes_the_plan_as_it_is_defined(between, relu):
    """Steps that overwrite their residual, and those that see whether one is read again."""
    model = network(between, relu)
    x = (torch.randn(2, 3, 12, 10) * 64).round() / 64
    plan = eight_bit_plan(model, x)
    value_grids(plan)
    assert plan.eight_bit[0] == plan.eight_bit[1] > 1
    expected = reference(plan, model, x)
    kinds = [Int8Ops] + [OneDNNInt8Ops] * bool(int8_products())
    for kind in kinds:
        executor = engine(plan, model, kind())
        for images in (x, x.contiguous(memory_format=torch.channels_last)):
            found = leaves(executor.run([images]))
            for one, other in zip(found, expected, strict=True):
                assert torch.allclose(one.double(), other, rtol=1e-5, atol=1e-6)
    source = leaves(model(x))
    for one, other in zip(expected, source, strict=True):
        error = (one - other).double().square().mean().sqrt() / other.double().std()
        assert error < 0.06, error


@pytest.mark.parametrize("between", CASES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kept", ["a", "b", "c"])
def test_a_layer_may_stay_in_floats(between, kept):
    model = network(between)
    x = torch.randn(1, 3, 12, 10)
    plan = planning.of_module(model)
    names = {step.name for step in plan.steps if step.where == kept}
    eight = eight_bit_plan(model, x, names)
    value_grids(eight)
    if names:
        assert eight.eight_bit[0] == eight.eight_bit[1] - len(names)
    error = leaves(engine(eight, model, Int8Ops()).run([x]))[0] - leaves(model(x))[0]
    assert error.square().mean().sqrt() / leaves(model(x))[0].std() < 0.06


def kinds(plan):
    return [type(step.op).__name__ for step in plan.steps]


def test_a_residual_network_stays_in_bytes_from_end_to_end():
    def block(m, x):
        x = F.max_pool2d(x, 3, 2, 1)
        x = F.relu(m.c(F.relu(m.b(x))) + x)
        return x.mean((2, 3))

    plan = eight_bit_plan(network(block), torch.randn(1, 3, 16, 16))
    assert kinds(plan) == ["Quantize", "Conv2d", "MaxPool2d", "Conv2d", "Conv2d", "GlobalAvgPool"]
    assert plan.steps[4].in_place
    first, last = (step.op for step in (plan.steps[1], plan.steps[4]))
    assert first.y_grid.zero == last.y_grid.zero == last.residual_grid.zero == 0
    assert last.residual_grid == first.y_grid
    assert plan.steps[5].op == GlobalAvgPool(False, (2, 3), last.y_grid)
    assert "3 of 3 convolutions in 8 bits" in str(plan)
    assert "conv 3x3 8->8 + bias + residual + ReLU, 8 bits" in str(plan)


def test_values_that_only_move_share_a_grid_and_those_that_do_not_have_their_own():
    model = network(concatenated)
    x = torch.randn(1, 3, 12, 10)
    plan = planning.of_module(model)
    values = observed(plan, model, x)
    grids = rough_grids(plan, values)
    joined = [s for s in plan.steps if getattr(s.op, "target", "") is torch.cat]
    names = {joined[0].name, *joined[0].inputs}
    assert len({grids[name] for name in names}) == 1 < len(set(grids.values()))
    eight = quantize(plan, grids, {s.name for s in plan.steps if isinstance(s.op, Conv2d)})
    assert kinds(eight).count("Quantize") == 1  # of the image


def test_zeros_around_bytes_that_stand_for_negative_values_too_are_put_in_floats():
    model = network(padded_shortcut, relu=False)
    plan = eight_bit_plan(model, torch.randn(1, 3, 12, 12))
    (pad,) = [s for s in plan.steps if getattr(s.op, "target", "") is F.pad]
    assert pad.inputs[0].endswith(".float") or pad.inputs[0] not in value_grids(plan)
    model = network(padded_shortcut)
    plan = eight_bit_plan(model, torch.randn(1, 3, 12, 12))
    (pad,) = [s for s in plan.steps if getattr(s.op, "target", "") is F.pad]
    assert value_grids(plan)[pad.name].zero == 0


def test_plans_whose_grids_do_not_fit_are_told():
    plan = eight_bit_plan(network(pooled), torch.randn(1, 3, 12, 12))
    other = Grid(0.5, 6)

    def broken(index, **changes):
        steps = list(plan.steps)
        steps[index] = replace(steps[index], op=replace(steps[index].op, **changes))
        return replace(plan, steps=tuple(steps))

    names = kinds(plan)
    convolutions = [i for i, name in enumerate(names) if name == "Conv2d"]
    pool, last = names.index("MaxPool2d"), convolutions[-1]
    wrong = [
        broken(names.index("Quantize"), grid=other),
        broken(convolutions[0], x_grid=None),
        broken(convolutions[0], y_grid=other),
        broken(convolutions[1], residual_grid=other),
        broken(convolutions[1], y_grid=None),
        broken(last, residual_grid=other),
        replace(plan, output=Ref(plan.steps[pool].name)),
    ]
    for one in wrong:
        with pytest.raises(ValueError, match=r"reads other bytes than|the output are bytes"):
            value_grids(one)
    assert not any(isinstance(step.op, Dequantize) for step in plan.steps)
    assert sum(isinstance(step.op, Quantize) for step in plan.steps) == 1


def test_weights_are_rounded_by_channel():
    weight = torch.randn(6, 3, 3, 3) * torch.logspace(-3, 3, 6).view(-1, 1, 1, 1)
    weight[2] = 0
    weight[3] = 1e-38
    for most in (127, 64):
        least = torch.tensor([0, 0, 0.25, 0, 0, 0])
        whole, scale = quantized_weight(weight, most, least)
        assert whole.dtype is torch.int8
        assert scale.dtype is torch.float32
        assert whole.abs().amax((1, 2, 3)).tolist() == [most, most, 0, 0, most, most]
        assert scale[2] == 0.25
        assert quantized_weight(torch.zeros(1, 1, 1, 1), most, torch.zeros(1))[1] == 1
        assert scale[3] == 2.0**-100
        live = [0, 1, 4, 5]
        error = (whole * scale.view(-1, 1, 1, 1) - weight)[live].abs().amax((1, 2, 3))
        assert (error <= scale[live] * 0.500001).all()
