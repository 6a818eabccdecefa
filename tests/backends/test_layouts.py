"""Steps left to PyTorch get their operands in the memory order that the source would give them."""

import pytest
import torch
import torch.nn.functional as F
from helpers import adversarial_
from torch import nn

import fastres
from fastres.graph import memory_order
from fastres.graph.ir import Call

X = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """conv, norm, ReLU, and what a case does with the result."""

    def __init__(self, tail, layer=None):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.next = nn.Conv2d(8, 8, 1)
        self.tail, self.layer = tail, layer

    def forward(self, x):
        return self.tail(self, F.relu(self.norm(self.conv(x))))


class Reader(nn.Module):
    """A user's layer that reads memory, and cannot be traced."""

    def forward(self, x):
        return x if not x.is_contiguous() else torch.as_strided(x, (4,), (x.stride(1) // 2,)) + 1


@torch.library.custom_op("fastres_tests::in_memory", mutates_args=())
def in_memory(x: torch.Tensor) -> torch.Tensor:
    return torch.as_strided(x, (x.numel(),), (1,)).clone()


@in_memory.register_fake
def _(x):
    return x.new_empty(x.numel())


@torch.fx.wrap
def wrapped(x):
    return torch.as_strided(x, (x.numel(),), (1,)).clone()


def both(pair, function):
    return function(pair[0], pair[1])


CASES = {
    "max_pool3d over channels": lambda m, y: F.max_pool3d(y, (4, 1, 1)),
    "avg_pool3d over channels": lambda m, y: F.avg_pool3d(y, (2, 1, 1)),
    "aten.view": lambda m, y: torch.ops.aten.view(y, [2, 4, -1]),
    "aten.view.default": lambda m, y: torch.ops.aten.view.default(y, [2, 4, -1]),
    "as_strided": lambda m, y: torch.as_strided(y, (2, 5), (512, 1)),
    "method as_strided": lambda m, y: y.as_strided((2, 5), (512, 1), 3),
    "stride": lambda m, y: y * y.stride(1),
    "strides": lambda m, y: y * y.stride()[3],
    "is_contiguous": lambda m, y: y * y.is_contiguous(),
    "view_as_complex": lambda m, y: torch.view_as_real(
        torch.view_as_complex(y.view(2, 8, 8, 4, 2)) * 1j
    ),
    "view_as": lambda m, y: y.view_as(torch.zeros(2, 16, 32)),
    "custom operator": lambda m, y: torch.ops.fastres_tests.in_memory(y),
    "wrapped function": lambda m, y: wrapped(y),
    "flatten, then view": lambda m, y: y.flatten(2).view(2, 4, 2, -1),
    "flatten, ReLU, then view": lambda m, y: F.silu(y.flatten(2)).view(2, 4, 2, -1),
    "chunk, then view": lambda m, y: y.chunk(2, 1)[1].view(2, 2, 2, -1),
    "slice, then stride": lambda m, y: y[:, 2:] * y[:, 2:].stride(1),
    "sum over rows, then view": lambda m, y: y.sum(2).view(2, 4, -1),
    "permute, then view": lambda m, y: y.permute(1, 0, 2, 3).contiguous().view(4, -1),
    "unsqueeze, then view": lambda m, y: y.unsqueeze(1).view(2, 4, 2, -1),
    "split, sum, then view": lambda m, y: both(torch.split(y, 4, 1), torch.add).view(2, 2, 2, -1),
    "a given view": lambda m, y: y.flatten(2),
    "a given transpose": lambda m, y: (y.transpose(1, 2), y.flatten(2).transpose(1, 2)),
    "a given slice": lambda m, y: y[:, ::2],
    "a given mean": lambda m, y: y.mean(2),
    "view between convolutions": lambda m, y: m.next(
        y.view(2, 2, 4, 8, 8).transpose(1, 2).flatten(1, 2)
    ),
    "in place through a view": lambda m, y: m.next(y) + (y.view(2, 8, -1).mul_(2).sum() + y),
}


@pytest.mark.fault(87)
@pytest.mark.filterwarnings("ignore:nothing of")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CASES)
def test_the_order_that_a_step_reads_is_the_sources(name, layout):
    source = adversarial_(Net(CASES[name])).eval()
    x = X.contiguous(memory_format=layout)
    try:
        with torch.no_grad():
            want = source(x.clone())
    except RuntimeError:  # eager itself refuses to view an image in channels_last memory
        assert layout is torch.channels_last
        return
    fast = fastres.optimize(source, example_input=x.clone())
    got = fast(x.clone())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    pairs = zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (got, want)), strict=True)
    same = all(ours.stride() == theirs.stride() for ours, theirs in pairs)
    assert same or layout is torch.channels_last


@pytest.mark.fault(87)
@pytest.mark.parametrize("layer", [nn.MaxPool3d((4, 1, 1)), nn.AvgPool3d((2, 1, 1)), Reader()])
def test_modules_that_may_read_the_order(layer):
    parts = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), layer)
    source = adversarial_(nn.Sequential(*parts)).eval()
    with torch.no_grad():
        want = source(X)
    torch.testing.assert_close(
        fastres.optimize(source, example_input=X)(X), want, rtol=1e-5, atol=1e-5
    )


FREE = {
    "sigmoid": lambda m, y: m.next(torch.sigmoid(y)),
    "gate": lambda m, y: m.next(y * y.mean((2, 3), keepdim=True).sigmoid()),
    "cat": lambda m, y: m.next(torch.cat(y.chunk(2, 1), 1)),
    "shuffle": lambda m, y: m.next(F.pad(F.interpolate(y, scale_factor=2), (1, 1, 1, 1))),
    "split": lambda m, y: m.next(both(torch.split(y, 4, 1), lambda a, b: torch.cat([b, a], 1))),
    "module": lambda m, y: m.next(nn.functional.group_norm(y, 2)),
}


@pytest.mark.fault(87)
@pytest.mark.parametrize("name", FREE)
def test_known_steps_are_not_converted_for(name):
    fast = fastres.optimize(adversarial_(Net(FREE[name])).eval(), example_input=X)
    calls = [step.op for step in fast.plan().steps if isinstance(step.op, Call)]
    assert calls
    assert all(op.any_layout for op in calls)


def plain(value):
    return value.is_contiguous() or value.is_contiguous(memory_format=torch.channels_last)


ONE = """add sub mul square neg exp sigmoid tanh relu clamp_min gelu silu softmax abs leaky_relu
hardswish hardsigmoid cumsum sqrt round"""


@pytest.mark.fault(87)
@pytest.mark.parametrize("name", ONE.split())
def test_what_is_said_to_keep_the_order_does(name):
    """For operators of one tensor, or two: same values in both orders, and a plain result."""
    more = {"add": (1.5,), "sub": (2.0,), "mul": (3.0,), "clamp_min": (0.1,), "softmax": (1,)}
    function = getattr(torch, name, None) or getattr(F, name)
    arguments = more.get(name, (1,) if name == "cumsum" else ())
    assert memory_order._FUNCTIONS[name] is memory_order.Order.KEPT
    image = torch.rand(2, 3, 4, 5)
    got = function(image.contiguous(memory_format=torch.channels_last), *arguments)
    torch.testing.assert_close(got, function(image, *arguments))
    assert plain(got)


@pytest.mark.fault(87)
def test_the_tables_name_functions_of_torch():
    places = (torch, torch.Tensor, F, torch._C._nn, __import__("operator"), torch.ops.aten)
    for name in memory_order._FUNCTIONS:
        assert any(hasattr(p, n) for p in places for n in (name, f"{name}_", f"__{name}__"))
    assert all(hasattr(nn, name) for name in memory_order._MODULES)
