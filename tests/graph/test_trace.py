"""Module to graph: every spelling of every operation, compared with PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
from fused import executions
from helpers import adversarial_
from torch import nn
from torch.utils._pytree import tree_flatten

import fastres
from fastres.graph.ir import (
    Add,
    AvgPool2d,
    Call,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    ReLU,
)
from fastres.graph.trace import TraceError, trace


class Base(nn.Module):
    """Layers for the cases below; images (N, 3, H, W) -> (N, 8, H, W) by ``conv``."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.next = nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.drop, self.fc = nn.ReLU(inplace=True), nn.Dropout(0.9), nn.Linear(8, 4)
        self.weight = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.bias = nn.Parameter(torch.randn(6))
        self.matrix = nn.Parameter(torch.randn(4, 8))
        self.shift = nn.Parameter(torch.randn(8, 1, 1))
        self.register_buffer("map", torch.randn(8, 1, 6))


def module(forward) -> nn.Module:
    """A adversarial float64 module with this forward."""
    return adversarial_(type("Case", (Base,), {"forward": forward})()).double()


def image(n=2):
    return torch.randn(n, 3, 6, 6, dtype=torch.float64)


def compare(source, *args, **kwargs):
    """The fused copy's plan, once its answers equal the source's."""
    fast = fastres.optimize(source, verify=False)
    with torch.no_grad():
        expected, form = tree_flatten(source(*args, **kwargs))
    with executions() as ran:
        actual, actual_form = tree_flatten(fast(*args, **kwargs))
    assert len(ran) == 1
    assert actual_form == form
    for got, wanted in zip(actual, expected, strict=True):
        if isinstance(wanted, torch.Tensor) and wanted.is_floating_point():
            assert got.dtype == wanted.dtype
            # A dozen roundings; a forgotten step changes adversarial answers by 1e-2 and more.
            tolerance = 5e3 * torch.finfo(wanted.dtype).eps
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(torch.as_tensor(got), torch.as_tensor(wanted))
    return fast.plan()


def kinds(plan):
    return [type(step.op) for step in plan.steps]


POOL = {"kernel_size": 3, "stride": 2, "padding": 1}
SPELLINGS = {
    "ReLU": lambda self, x: self.relu(self.conv(x)),
    "F.relu": lambda self, x: F.relu(x),
    "F.relu in place": lambda self, x: F.relu(self.conv(x), inplace=True),
    "F.relu_": lambda self, x: F.relu_(self.conv(x)),
    "torch.relu": lambda self, x: torch.relu(x),
    "torch.relu_": lambda self, x: torch.relu_(self.conv(x)),
    "relu method": lambda self, x: x.relu(),
    "relu_ method": lambda self, x: self.conv(x).relu_(),
    "operator +": lambda self, x: x + x.flip(3),
    "torch.add": lambda self, x: torch.add(x, x.flip(3)),
    "torch.add with other=": lambda self, x: torch.add(x, other=x.flip(3)),
    "add method": lambda self, x: x.add(x.flip(3)),
    "add_ method": lambda self, x: self.conv(x).add_(self.conv(x.flip(3))),
    "max_pool2d": lambda self, x: F.max_pool2d(x, 3, 2, 1),
    "max_pool2d by name": lambda self, x: F.max_pool2d(x, **POOL, ceil_mode=True),
    "torch.max_pool2d": lambda self, x: torch.max_pool2d(x, 2, dilation=2),
    "avg_pool2d": lambda self, x: F.avg_pool2d(x, 2),
    "avg_pool2d by name": lambda self, x: F.avg_pool2d(x, **POOL, count_include_pad=False),
    "avg_pool2d, divisor": lambda self, x: F.avg_pool2d(x, 2, divisor_override=3),
    "adaptive_avg_pool2d": lambda self, x: F.adaptive_avg_pool2d(x, (1, 1)),
    "adaptive_avg_pool2d, 1": lambda self, x: F.adaptive_avg_pool2d(x, output_size=1),
    "mean([2, 3])": lambda self, x: x.mean([2, 3]),
    "mean((3, 2), True)": lambda self, x: x.mean((3, 2), True),
    "mean(dim, keepdim)": lambda self, x: x.mean(dim=(-2, -1), keepdim=True),
    "torch.mean": lambda self, x: torch.mean(x, [2, 3]),
    "flatten": lambda self, x: torch.flatten(self.conv(x), 1),
    "flatten by name": lambda self, x: torch.flatten(self.conv(x), start_dim=1, end_dim=-1),
    "flatten method": lambda self, x: self.conv(x).flatten(1),
    "view(size(0), -1)": lambda self, x: x.view(x.size(0), -1),
    "view(shape[0], -1)": lambda self, x: x.view(x.shape[0], -1),
    "view((size()[0], -1))": lambda self, x: x.view((x.size()[0], -1)),
    "reshape(size(0), -1)": lambda self, x: x.reshape(x.size(0), -1),
    "torch.reshape": lambda self, x: torch.reshape(x, (x.shape[0], -1)),
    "F.conv2d": lambda self, x: F.conv2d(x, self.weight, self.bias, 2, 1, 1, 1),
    "F.conv2d by name": lambda self, x: F.conv2d(x, weight=self.weight, padding=(1, 0)),
    "torch.conv2d": lambda self, x: torch.conv2d(x, self.weight, self.bias, stride=(1, 2)),
    "F.linear": lambda self, x: F.linear(self.conv(x).mean([2, 3]), self.matrix),
    "Linear on a map": lambda self, x: self.fc(self.conv(x).permute(0, 2, 3, 1)),
}
TYPES = {
    "relu": ReLU,
    "add": Add,
    "operator": Add,
    "max": MaxPool2d,
    "torch.max": MaxPool2d,
    "avg": AvgPool2d,
    "adaptive": GlobalAvgPool,
    "mean": GlobalAvgPool,
    "flatten": Flatten,
    "view": Flatten,
    "conv2d": Conv2d,
    "linear": Linear,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name):
    """Each is recognised, and nothing but views and sizes around it stays a PyTorch call."""
    plan = compare(module(SPELLINGS[name]), image())
    ours = [kind for kind in kinds(plan) if kind is not Call]
    word = name.lower().removeprefix("f.").removeprefix("torch.").split("(")[0].split("_")[0]
    wanted = {"reshape": Flatten, "torch.reshape": Flatten}.get(word)
    wanted = wanted or next(kind for key, kind in TYPES.items() if word.split()[0].startswith(key))
    fused_away = [s.op for s in plan.steps if getattr(s.op, "relu", False) or _residual(s.op)]
    assert wanted in ours or fused_away
    allowed = {"flip", "size", "getattr", "getitem", "permute"}
    assert {
        str(getattr(s.op.target, "__name__", s.op.target)) for s, _ in plan.fallbacks
    } <= allowed


def _residual(op):
    return getattr(op, "residual", False)


LEFT = {
    "torch.add with alpha": (lambda self, x: torch.add(x, x.flip(3), alpha=2), "add is not fused"),
    "a number": (lambda self, x: self.conv(x) + 1, "add is not fused"),
    "another pool size": (
        lambda self, x: F.adaptive_avg_pool2d(x, 2),
        "adaptive_avg_pool2d is not",
    ),
    "max with indices": (
        lambda self, x: F.max_pool2d(x, 2, return_indices=True)[0],
        "max_pool2d",
    ),
    "mean of channels": (lambda self, x: x.mean(1), "mean is not fused"),
    "mean of rows": (lambda self, x: x.mean([2]), "mean is not fused"),
    "mean of all": (lambda self, x: x.mean(), "mean is not fused"),
    "mean in another dtype": (lambda self, x: x.mean([2, 3], dtype=torch.float32), "mean is not"),
    "flatten all": (lambda self, x: torch.flatten(x), "flatten is not fused"),
    "flatten(2)": (lambda self, x: x.flatten(2), "flatten is not fused"),
    "view(-1, 9)": (lambda self, x: self.conv(x).view(-1, 9), "view is not fused"),
    "view of another's size": (
        lambda self, x: self.conv(x).view(x.size(1) * 0 + x.size(2) // 3, -1),
        "view is not fused",
    ),
    "reflecting padding": (lambda self, x: F.pad(self.conv(x), (1, 1, 1, 1), "reflect"), "pad is"),
    "a computed weight": (lambda self, x: F.conv2d(x, self.weight * 2), "conv2d is not fused"),
    "clamp": (lambda self, x: self.conv(x).clamp(min=0), "clamp is not fused"),
    "silu": (lambda self, x: F.silu(self.conv(x), inplace=True), "silu is not fused"),
    "subtraction": (lambda self, x: self.conv(x) - x.sum(1, True), "sub is not fused"),
    "group norm": (lambda self, x: F.group_norm(self.conv(x), 4), "group_norm is not fused"),
    "batch statistics": (
        lambda self, x: F.batch_norm(self.conv(x), None, None, training=True),
        "batch_norm is not fused",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_understood_is_left_and_listed(name):
    forward, reason = LEFT[name]
    plan = compare(module(forward), image())
    reasons = [why for _, why in plan.fallbacks]
    assert any(why.startswith(reason) for why in reasons), reasons
    assert reason.split()[0] in str(plan)


CONVOLUTIONS = {
    "same": nn.Conv2d(3, 4, 3, padding="same", dilation=2),
    "valid": nn.Conv2d(3, 4, 3, padding="valid"),
    "rectangle": nn.Conv2d(3, 4, (1, 3), (2, 1), (0, 2), (1, 2)),
    "groups": nn.Conv2d(3, 6, 3, groups=3, bias=False),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    plan = compare(nn.Sequential(CONVOLUTIONS[name]).double().eval(), image())
    assert kinds(plan) == [Conv2d]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), "Conv2d is not fused"),
        (nn.Conv2d(3, 4, 2, padding="same"), "Conv2d is not fused"),
        (nn.ConvTranspose2d(3, 4, 3), "ConvTranspose2d is not fused"),
        (nn.MaxPool2d(2, return_indices=True), "MaxPool2d is not fused"),
        (nn.AdaptiveAvgPool2d((2, 2)), "AdaptiveAvgPool2d is not fused"),
        (nn.AdaptiveAvgPool2d((1, None)), "AdaptiveAvgPool2d is not fused"),
        (nn.Flatten(0), "Flatten is not fused"),
        (nn.LeakyReLU(inplace=True), "LeakyReLU is not fused"),
        (nn.PixelUnshuffle(2), "PixelUnshuffle is not fused"),
        (nn.Upsample(scale_factor=2), "Upsample is not fused"),
        (nn.ZeroPad2d(1), "ZeroPad2d is not fused"),
    ],
    ids=lambda v: None if isinstance(v, str) else type(v).__name__,
)
def test_layers_that_are_left(layer, reason):
    source = nn.Sequential(nn.Conv2d(3, 3, 1), layer).double().eval()
    plan = compare(source, image())
    assert [why for _, why in plan.fallbacks] == [reason]


def test_dropout_and_identity_are_removed():
    class Case(Base):
        def forward(self, x):
            x = F.dropout2d(self.drop(self.conv(x)), 0.9, self.training)
            return F.alpha_dropout(nn.functional.dropout(x, training=self.training), 0.5, False)

    layers = nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 3), nn.Dropout2d(0.9), nn.Identity())
    assert kinds(compare(layers.double().eval(), image())) == [Conv2d]
    assert kinds(compare(adversarial_(Case()).double(), image())) == [Conv2d]


def test_dropout_that_is_always_on_is_kept():
    source = module(lambda self, x: F.dropout(self.conv(x), 0.5, True))
    fast = fastres.optimize(source, verify=False)
    assert [why for _, why in fast.plan().fallbacks] == ["dropout is not fused"]
    out = fast(image())
    assert 0.3 < float((out == 0).double().mean()) < 0.7


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "replaced forward", "parametrized"])
def test_opaque_modules_are_called_whole(kind):
    source = module(lambda self, x: self.next(self.relu(self.norm(self.conv(x)))))
    if kind == "hook":
        source.norm.register_forward_hook(lambda module, args, out: 2 * out)
    elif kind == "pre-hook":
        source.norm.register_forward_pre_hook(lambda module, args: 3 * args[0])
    elif kind == "replaced forward":
        forward = source.norm.forward
        source.norm.forward = lambda x: forward(x).flip(1)
    else:
        nn.utils.parametrizations.weight_norm(source.conv)
        source.conv.parametrizations.weight.original0.data.mul_(2)
        source.eval()
    plan = compare(source, image())
    (left,) = [step for step, why in plan.fallbacks if "batch norm" not in why]
    assert left.where == ("conv" if kind == "parametrized" else "norm")
    assert (
        "hooks" in left.op.reason
        or "forward was replaced" in left.op.reason
        or ("parametrized" in left.op.reason)
    )


def test_structures_of_inputs_and_outputs():
    def forward(self, x, scale=2.0, *, flags=(1, 2)):
        y = self.conv(x) * scale
        joined = torch.cat([y, [self.next(y), y][0]], dim=1)
        return {"maps": (joined, [y[:, : flags[1]], x.shape[2]]), "all": torch.stack([y, y])}

    source = module(forward)
    compare(source, image())
    compare(source, image(), 3.0)
    compare(source, x=image(), scale=image()[:, :1])


def test_data_dependent_python_is_an_error():
    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else self.conv(-x)

    with pytest.raises(TraceError, match="Case cannot be traced by torch.fx"):
        trace(module(forward))


def test_the_module_is_left_as_it_is():
    source = module(lambda self, x: self.fc(self.relu(self.norm(self.conv(x))).mean([2, 3])))
    before = {k: v.clone() for k, v in source.state_dict().items()}
    names = [name for name, _ in source.named_modules()]
    first, second = trace(source), trace(source)
    assert first == second
    assert [name for name, _ in source.named_modules()] == names
    assert all(torch.equal(before[k], v) for k, v in source.state_dict().items())
