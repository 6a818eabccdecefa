"""Writing in place: made functional where nobody can tell, left in place and right elsewhere."""

import operator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers import adversarial_
from test_trace import Base, kinds
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastres
from fastres import ResNet
from fastres.graph.fold import fold
from fastres.graph.ir import Call, Conv2d
from fastres.graph.plan import build
from fastres.graph.trace import trace


def module(forward) -> nn.Module:
    """A adversarial module with this forward."""
    return adversarial_(type("Case", (Base,), {"forward": forward})())


def check(source, size=6):
    """Answers and what became of the caller's image are the source's, in every layout.

    float64 for the logic of aliases; float32 for oneDNN's own in-place sum. A dispatch mode makes
    the copy run as the program that compilers see.
    """
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 3, size, size).to(dtype, memory_format=layout)
            theirs = x.clone()
            source = source.to(dtype)
            with torch.no_grad():
                expected = source(theirs)
            fast = fastres.optimize(source, verify=False)
            for mode in (nullcontext(), FlopCounterMode(display=False)):
                ours = x.clone()
                with mode:
                    out = fast(ours)
                torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
                assert ours.stride() == theirs.stride()
    return fast.plan()


def body(self, x):
    """(N, 3, H, W) -> (N, 8, H, W), a value that the network owns."""
    return self.norm(self.conv(x))


def ends(self, *values):
    return self.next(sum(v.reshape(2, 8, 6, 6) for v in values))


def relu_keeps_the_name(self, x):
    """``identity`` is the same tensor: it is rectified too."""
    identity = y = body(self, x)
    F.relu_(y)
    return self.next(y) + identity


def module_relu_on_an_alias(self, x):
    identity = y = body(self, x)
    out = self.next(self.relu(y))
    out += identity
    return self.relu(out)


def preactivation(self, x):
    """The usual case: nobody reads the value before ReLU again."""
    return self.next(self.relu(body(self, x)))


def plus_equals_on_an_alias(self, x):
    identity = y = body(self, x)
    y += self.next(y)
    return self.next(y) + identity


def plus_equals_with_a_number(self, x):
    identity = y = body(self, x)
    y *= 2
    y -= 1
    return y + self.next(identity)


def plus_equals_of_a_sum(self, x):
    out = body(self, x)
    identity = self.next(out)
    identity += out
    identity += out
    return self.relu(identity) + identity


def relu_as_a_keyword(self, x):
    y = body(self, x)
    z = self.next(y)
    self.relu(input=y)
    return z + y


def hooked_relu(self, x):
    y = body(self, x)
    z = self.hooked(y)
    return self.next(z) + y


def view_then_in_place(self, x):
    y = body(self, x)
    v = y.view(y.size(0), 8, -1)
    v.mul_(2)
    return self.next(y)


def reshape_then_in_place(self, x):
    y = body(self, x)
    y.reshape(2, -1).add_(1)
    return self.next(y)


def flatten_then_relu(self, x):
    y = body(self, x)
    flat = torch.flatten(y, 1)
    flat.relu_()
    return self.next(y) + flat.view(2, 8, 6, 6)


def contiguous_then_in_place(self, x):
    y = body(self, x)
    y.contiguous().add_(1)
    return self.next(y)


def slice_then_in_place(self, x):
    y = body(self, x)
    y[:, 2:4].mul_(3)
    y[:, 0].relu_()
    return self.next(y)


def item_assignment(self, x):
    y = body(self, x)
    y[:, 1] = 0.5
    y[:, :, 0] += 1
    return self.next(y)


def chunks_in_place(self, x):
    a, b = body(self, x).chunk(2, dim=1)
    a += b
    b.relu_()
    return self.next(torch.cat([a, b], 1))


def view_after_the_write(self, x):
    y = body(self, x)
    y.mul_(2)
    return self.next(y) + y.view(2, 8, 6, 6)


def transposed_in_place(self, x):
    y = body(self, x)
    y.permute(0, 2, 3, 1).add_(torch.arange(8.0, dtype=y.dtype))
    return self.next(y)


def as_strided(self, x):
    y = body(self, x)
    return torch.as_strided(y, (8, 4), (4, 1), 3) + y.as_strided((8, 4), (4, 1), 3)


def strides_and_addresses(self, x):
    y = self.conv(x)
    return y * y.stride(1) + y.is_contiguous() * 0.5


def functional_silu_in_place(self, x):
    identity = y = body(self, x)
    F.silu(y, inplace=True)
    return self.next(y) + identity


def out_argument(self, x):
    y, z = body(self, x), self.next(body(self, x))
    torch.add(y, z, out=z)
    return self.next(z) + z


def delayed_convolution(self, x):
    """The sum would take the convolution behind the write to its input."""
    y = body(self, x)
    z = self.next(y)
    w = y.sigmoid()
    y.zero_()
    return z + w


def input_in_place(self, x):
    x.mul_(2)
    return self.conv(x)


def input_plus_equals(self, x):
    x += 1
    return self.conv(x) + self.conv(x.relu_())


def input_view_in_place(self, x):
    x[:, 0].zero_()
    return self.next(self.relu(self.conv(x)))


CASES = [
    value
    for value in list(globals().values())
    if getattr(value, "__module__", "") == __name__
    and getattr(value, "__code__", None)
    and value.__code__.co_varnames[:2] == ("self", "x")
    and value not in (body,)
]


@pytest.mark.fault(34)
@pytest.mark.parametrize("forward", CASES, ids=lambda f: f.__name__)
def test_writes_in_place(forward):
    source = module(forward)
    if forward is hooked_relu:
        source.hooked = nn.ReLU(inplace=True).eval()
        source.hooked.register_forward_hook(lambda module, args, out: None)
    check(source)


@pytest.mark.fault(34)
@pytest.mark.parametrize(
    "forward", [relu_keeps_the_name, module_relu_on_an_alias, preactivation, plus_equals_of_a_sum]
)
def test_made_functional_where_nobody_can_tell(forward):
    plan = check(module(forward))
    assert not plan.fallbacks
    assert not plan.source_layout


@pytest.mark.fault(34)
@pytest.mark.parametrize("forward", [view_then_in_place, item_assignment, functional_silu_in_place])
def test_left_in_place_elsewhere(forward):
    assert any(step.op.mutates for step, _ in check(module(forward)).fallbacks)


def test_only_writes_that_a_layout_could_hide_cost_the_layout():
    assert check(module(view_then_in_place)).source_layout
    assert check(module(input_in_place)).source_layout
    assert not check(module(slice_then_in_place)).source_layout
    assert not check(module(functional_silu_in_place)).source_layout


def test_assignments_are_recorded():
    def forward(self, x):
        y = self.conv(x)
        y += 1
        y[0] = 2
        y /= 2
        return y

    targets = [node.op.target for node in trace(module(forward)).nodes if isinstance(node.op, Call)]
    assert targets == [operator.iadd, operator.setitem, operator.itruediv]


def test_torchvision_style_blocks_lose_nothing():
    """``out += identity`` and in-place ReLU everywhere, and every sum is fused."""
    graph = trace(ResNet(fastres.BasicBlock, [1, 1], stem="cifar").eval(), "_forward_impl")
    plan = build(fold(graph))
    assert not plan.fallbacks
    assert kinds(plan).count(Conv2d) == 6
    assert sum(getattr(step.op, "residual", False) for step in plan.steps) == 2
