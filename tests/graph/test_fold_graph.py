"""Which batch norms are folded, and that those which are not are still right and reported."""

import pytest
import torch
from fused import rms
from helpers import adversarial_
from torch import nn

from fastres import resnet18
from fastres.backends.select import AtenOps
from fastres.graph import fold, plan, trace
from fastres.graph.ir import BatchNorm2d, Call, Conv2d
from fastres.runtime.executor import Executor


def run(module: nn.Module, *inputs):
    """The module's folded plan, step by step in its own dtype, and the plan."""
    built = plan.build(fold.fold(trace.trace(module)))
    dtype = next(module.parameters()).dtype
    with torch.no_grad():
        return Executor(built, module, AtenOps(), dtype).run(inputs), built


def operations(built, kind):
    return [step.op for step in built.steps if isinstance(step.op, kind)]


class TwoNorms(nn.Module):
    """One convolution, called twice, under a norm each time."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.second(self.conv(self.first(self.conv(x))))


class OneNormTwice(nn.Module):
    """One norm behind two convolutions."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.two(self.norm(self.one(x))))


class TwoReaders(nn.Module):
    """The convolution's own result is needed as well."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class TwoNormsOfOneResult(nn.Module):
    """Two norms read the same result."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.first(y) - self.second(y)


class Returned(nn.Module):
    """The convolution's own result leaves the module."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return {"before": y, "after": self.norm(y)}


class Between(nn.Module):
    """Something stands between convolution and norm."""

    def __init__(self, between):
        super().__init__()
        self.conv, self.between, self.norm = nn.Conv2d(3, 4, 3), between, nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.between(self.conv(x)))


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    ("module", "inside", "apart"),
    [
        (TwoNorms(), 2, 0),
        (OneNormTwice(), 2, 0),
        (TwoReaders(), 0, 1),
        (TwoNormsOfOneResult(), 0, 2),
        (Returned(), 0, 1),
        (Between(nn.ReLU()), 0, 1),
        (Between(nn.MaxPool2d(2)), 0, 1),
        (Between(nn.Sigmoid()), 0, 1),
        (Between(nn.Identity()), 1, 0),
        (Between(nn.Dropout(0.9)), 1, 0),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), 0, 1),
        (nn.Sequential(nn.Linear(8, 8), nn.BatchNorm2d(3)), 0, 1),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_only_a_convolution_of_its_own_takes_a_norm(module, inside, apart):
    module = adversarial_(module).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    out, built = run(module, x)
    assert sum(op.norm is not None for op in operations(built, Conv2d)) == inside
    assert len(operations(built, BatchNorm2d)) == apart
    assert sum("batch norm" in reason for _, reason in built.fallbacks) == apart
    with torch.no_grad():
        expected = module(x)
    if not isinstance(expected, dict):
        out, expected = {"out": out}, {"out": expected}
    for name in expected:
        torch.testing.assert_close(out[name], expected[name], rtol=1e-12, atol=1e-12)  # float64


@pytest.mark.fault(31)
@pytest.mark.parametrize("kind", ["training", "no statistics", "instance norm", "replaced forward"])
def test_other_norms_are_left_to_pytorch(kind):
    norm = nn.InstanceNorm2d(4) if kind == "instance norm" else nn.BatchNorm2d(4)
    if kind == "no statistics":
        norm = nn.BatchNorm2d(4, track_running_stats=False)
    module = adversarial_(nn.Sequential(nn.Conv2d(3, 4, 3), norm)).double()
    if kind == "training":
        norm.train()
    if kind == "replaced forward":
        forward = norm.forward
        norm.forward = lambda x: 2 * forward(x)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = module(x)
    out, built = run(module, x)
    assert [type(step.op) for step in built.steps] == [Conv2d, Call]
    assert len(built.fallbacks) == 1
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)  # float64


def frozen(channels):
    return pytest.importorskip("torchvision").ops.FrozenBatchNorm2d(channels)


def norm_act(channels):
    return pytest.importorskip("timm.layers").BatchNormAct2d(channels)


def norm_without_act(channels):
    return pytest.importorskip("timm.layers").BatchNormAct2d(channels, apply_act=False)


@pytest.mark.fault(34)
@pytest.mark.parametrize("make", [nn.SyncBatchNorm, frozen, norm_act, norm_without_act])
def test_norms_of_other_libraries(make):
    module = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), make(8))
    adversarial_(module)
    if make is frozen:
        norm = module[1]
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 2)
    module = module.double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = reference_of(module)(x)
    out, built = run(module, x)
    (step,) = built.steps
    assert step.op.norm is not None
    assert step.op.relu == (make is norm_act)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)  # float64


def reference_of(module):
    """SyncBatchNorm's own forward wants a GPU; in eval it is an ordinary norm."""
    norm = module[1]
    if not isinstance(norm, nn.SyncBatchNorm):
        return module
    ordinary = nn.BatchNorm2d(8, eps=norm.eps).double().eval()
    ordinary.load_state_dict(norm.state_dict())
    return nn.Sequential(module[0], ordinary)


@pytest.mark.fault(34)
@pytest.mark.parametrize("act", [nn.SiLU, nn.LeakyReLU])
def test_norm_with_another_activation(act):
    timm = pytest.importorskip("timm.layers")
    module = nn.Sequential(nn.Conv2d(3, 8, 3), timm.BatchNormAct2d(8, act_layer=act))
    module = adversarial_(module).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    out, built = run(module, x)
    assert [type(step.op) for step in built.steps] == [Conv2d, Call]
    torch.testing.assert_close(out, module(x).detach(), rtol=1e-12, atol=1e-12)  # float64


@pytest.mark.fault(30)
def test_a_whole_network_in_float64():
    """Every norm of a ResNet-18 at once, against PyTorch's own fold-free answer."""
    module = adversarial_(resnet18(num_classes=7)).double()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    out, built = run(module, x)
    with torch.no_grad():
        exact = module._forward_impl(x)
    assert not built.fallbacks
    assert rms(out - exact) <= 1e-12 * rms(exact)  # float64 over 20 layers
