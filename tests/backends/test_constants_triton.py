"""Learned constants outside of convolutions, and what else reads no tensor, on fastres' kernels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import adversarial_
from torch import nn

import fastres
from fastres.graph import patterns

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter


class Scaled(nn.Module):
    """As layer scale in ConvNeXt and ECA's cousins: a product with a parameter."""

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(8, 8, 1)
        self.scale = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5)

    def forward(self, x):
        return self.c(x) * self.scale


class Shifted(Scaled):
    """The constant is an operand of a fused sum."""

    def forward(self, x):
        return F.relu(self.c(x) + self.scale)


class First(Scaled):
    """The constant is read before anything else."""

    def forward(self, x):
        return self.c(x * (self.scale * 2))


class Buffered(nn.Module):
    """A position code, as botnet's: a buffer added to the map."""

    def __init__(self):
        super().__init__()
        self.c = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.register_buffer("code", torch.randn(1, 8, 6, 6))

    def forward(self, x):
        return self.c(x) + self.code


class Standardised(nn.Conv2d):
    """As BiT's: the weights are computed in each call."""

    def forward(self, x):
        w = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv2d(x, w.reshape_as(self.weight), self.bias, padding=self.padding)


class Token(nn.Module):
    """A learned query that only the classifier reads."""

    def __init__(self):
        super().__init__()
        self.c, self.fc = nn.Conv2d(8, 4, 3), nn.Linear(4, 3)
        self.query = nn.Parameter(torch.randn(1, 4))

    def forward(self, x):
        return self.fc(self.c(x).mean((2, 3)) + self.query), self.query * 2


class Alone(nn.Module):
    """A constant is handed out as it is."""

    def __init__(self):
        super().__init__()
        self.c, self.anchors = nn.Conv2d(8, 4, 3), nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        return {"maps": self.c(x), "anchors": self.anchors}


MODELS = {
    "product": Scaled,
    "sum": Shifted,
    "first": First,
    "buffer": Buffered,
    "standardised": lambda: nn.Sequential(Standardised(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)),
    "group norm": lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.ReLU()),
    "token": Token,
    "alone": Alone,
}


@pytest.mark.fault(66)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_learned_constants(make, rule_of_two):
    model, x = adversarial_(make()), torch.randn(2, 8, 6, 6)
    fast = fastres.optimize(model, example_input=x, backend="triton")
    with torch.no_grad():
        found, same = fast(x), model(x)
        exact = copy.deepcopy(model).double()(x.double())
    leaves = torch.utils._pytree.tree_leaves
    assert "triton conv2d" in fast.plan().kernels
    for out, pt, ref in zip(leaves(found), leaves(same), leaves(exact), strict=True):
        rule_of_two(out, pt, ref)


@pytest.mark.fault(66)
def test_a_live_network_with_a_constant(rule_of_two):
    class Net(fastres.ResNet):
        def __init__(self):
            super().__init__(fastres.BasicBlock, [1], num_classes=3, stem="cifar", planes=4)
            self.scale = nn.Parameter(torch.full((1, 4, 1, 1), 1.5))
            self.backend = "triton"

        def _forward_impl(self, x):
            return self.fc(self.avgpool(self.conv1(x) * self.scale).flatten(1))

    model, x = adversarial_(Net()), torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        out, pt = model(x), model._forward_impl(x)
        assert model._live()._last is not None
        rule_of_two(out, pt, copy.deepcopy(model).double()._forward_impl(x.double()))


@pytest.mark.fault(66)
def test_a_step_without_inputs_is_no_case():
    from fastres.graph import plan

    traced = plan.of_module(Scaled().eval())
    constant = next(step for step in traced.steps if not step.inputs)
    (group,) = patterns.ungrouped([constant])
    shapes = traced.shapes((1, 8, 4, 4))
    assert patterns.workload_of(group, shapes, "half") is None
