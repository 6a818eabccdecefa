"""What the engine's tests share: a small network; did the engine run, and was it right?"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from helpers import adversarial_, real_images
from tolerance import allowed_error
from torch import Tensor, nn

import fastres
from fastres import BasicBlock, ResNet
from fastres.graph.plan import Plan
from fastres.runtime.executor import Executor


def small(cls: type[ResNet] = ResNet, *, seed: int = 0, **kwargs) -> ResNet:
    """(N, 3, H, W) -> (N, 5): two stages of one block, one downsampling; adversarial weights."""
    arguments = {"num_classes": 5, "stem": "cifar", "planes": 8, **kwargs}
    return adversarial_(cls(BasicBlock, [1, 1], **arguments), seed)


def shallow(name: str, blocks: int, **kwargs) -> ResNet:
    """A network with so many blocks a stage: the others are of the same kinds."""
    model = fastres.create_model(name, **kwargs)
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        setattr(model, stage, getattr(model, stage)[:blocks])
    return adversarial_(model)


def images(n: int = 2, size: int = 16) -> Tensor:
    return real_images(n, size)


@contextmanager
def executions() -> Iterator[list[Plan]]:
    """The plans that executors ran meanwhile, one entry for each run."""
    ran: list[Plan] = []
    run = Executor.run

    def recording(self: Executor, *args, **kwargs):
        ran.append(self.plan)
        return run(self, *args, **kwargs)

    with mock.patch.object(Executor, "run", recording):
        yield ran


@torch.no_grad()
def plain(model: nn.Module, x: Tensor) -> Tensor:
    """The model's answer by ordinary PyTorch."""
    return getattr(model, "_forward_impl", model)(x)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def strides(x: Tensor) -> list[int]:
    """Those of dimensions with more than one entry; the others say nothing."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def assert_close(out: Tensor, model: nn.Module, x: Tensor) -> None:
    """No more than twice the error of ordinary PyTorch in the same dtype, against float64."""
    expected = plain(model, x)
    exact = plain(copy.deepcopy(model).double(), x.double())
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    assert strides(out) == strides(expected)
    own = rms(expected - exact)
    assert rms(out - exact) <= allowed_error(own, rms(exact), out.dtype)


def assert_fused(model: nn.Module, x: Tensor) -> None:
    """The engine runs, once, and is right."""
    with executions() as ran, torch.no_grad():
        out = model(x)
    assert len(ran) == 1, "the engine did not run"
    assert_close(out, model, x)


def assert_plain(model: nn.Module, x: Tensor) -> None:
    """Ordinary PyTorch runs: the same bits and no engine."""
    with executions() as ran, torch.no_grad():
        out = model(x)
    assert not ran, "the engine ran"
    torch.testing.assert_close(out, plain(model, x), rtol=0, atol=0, equal_nan=True)
