"""``make quick``: once through each front door on a network of two blocks, and each kernel once.

Answers are judged against float64; those of the kernels are exact, on whole numbers.
"""

from __future__ import annotations

import copy
import json
from importlib import import_module

import pytest
import torch
from fused import executions, small
from torch import Tensor, nn

import fastres
from fastres.cli import run


class Theirs(nn.Module):
    """An ordinary module, as users bring it: a stem, a residual block, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        model = small()
        self.stem = nn.Sequential(model.conv1, model.bn1, nn.ReLU())
        self.block = model.layer1
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 16, 16)


@pytest.fixture
def right(x, rule_of_two):
    """``right(answer, model)``: the model's own answer to x, within rounding."""

    def check(answer: Tensor, model: nn.Module) -> None:
        with torch.no_grad():
            precise = copy.deepcopy(model).double()
            forward = "_forward_impl" if isinstance(model, fastres.ResNet) else "forward"
            own, reference = getattr(model, forward)(x), getattr(precise, forward)(x.double())
        rule_of_two(answer, own, reference)

    return check


def test_live(x, right):
    model = small()
    with torch.no_grad(), executions() as ran:
        right(model(x), model)
    assert len(ran) == 1


def test_optimize(x, right):
    model = Theirs().eval()
    fast = fastres.optimize(model, example_input=x)
    right(fast(x), model)
    assert fast.verification.ok
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())


def test_compile(x, right):
    model = Theirs().eval()
    with torch.no_grad(), executions() as ran:
        right(torch.compile(model, backend="fastres")(x), model)
    assert ran


def test_save_load_and_export(x, right, tmp_path):
    model = Theirs().eval()
    fast = fastres.optimize(model, example_input=x)
    fastres.save(fast, tmp_path / "fused.safetensors")
    right(fastres.load(tmp_path / "fused.safetensors")(x), model)
    fastres.export(fast, tmp_path / "fused.pt2", x)
    right(torch.export.load(tmp_path / "fused.pt2").module()(x), model)


def test_command_line(capsys):
    assert run(["plan", "resnet18", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert run(["plan", "resnet17"]) == 2


def test_keras(tmp_path):
    keras = pytest.importorskip("keras_models", exc_type=ImportError).keras
    layers, path = keras.layers, tmp_path / "theirs.keras"
    inputs = keras.Input((16, 16, 3))
    y = layers.BatchNormalization()(layers.Conv2D(6, 3, padding="same")(inputs))
    y = layers.GlobalAveragePooling2D()(layers.ReLU()(y))
    theirs = keras.Model(inputs, layers.Dense(4)(y))
    theirs.save(path)
    images = torch.randn(2, 16, 16, 3)
    with torch.no_grad():
        answer = fastres.from_keras(path)(images.permute(0, 3, 1, 2))
        torch.testing.assert_close(answer, theirs(images).cpu(), rtol=1e-4, atol=1e-5)


KERNELS = {
    "conv": ("conv.conv2d", lambda n: (n(2, 16, 6, 6), n(8, 16, 3, 3), n(8))),
    "sum": ("elementwise.add_relu", lambda n: (n(2, 16, 6, 6), n(2, 16, 6, 6))),
    "ReLU": ("elementwise.relu", lambda n: (n(2, 16, 6, 6),)),
    "product": ("gemm.gemm", lambda n: (n(8, 16), n(8, 16), n(8))),
    "two products": ("gemm.dual_gemm", lambda n: (n(8, 16), n(8, 16), n(8, 8), n(8, 8), n(8))),
    "global pool": ("global_pool.global_avg_pool", lambda n: (n(2, 16, 4, 4),)),
    "head": ("head.head", lambda n: (n(2, 16, 2, 2), n(8, 16), n(8))),
    "linear": ("linear.linear", lambda n: (n(8, 16), n(8, 16), n(8))),
    "max pool": ("pool.max_pool2d", lambda n: (n(2, 16, 6, 6), 2)),
    "average pool": ("pool.avg_pool2d", lambda n: (n(2, 16, 6, 6), 2)),
    "stem": ("stem.stem", lambda n: (n(1, 3, 12, 12), n(8, 3, 7, 7), n(8))),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels(kernel, integers, device):
    pytest.importorskip("triton")
    path, operands = KERNELS[kernel]
    file, name = path.split(".")
    module = import_module(f"fastres.kernels.{file}")
    if file == "gemm" and not import_module("fastres.kernels._tma").has_tma(device):
        pytest.skip("no TMA before compute capability 9.0")
    inputs = operands(integers)
    answer = getattr(module, name)(*inputs)
    assert torch.equal(answer, getattr(module, f"{name}_ref")(*inputs, upcast=True).float())
