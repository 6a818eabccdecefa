"""Single operations as the engine runs them: ``pytest benchmarks/ --benchmark-json out.json``.

The rows are the convolutions of a ResNet-50 by stage, its pools and its classifier, in the dtype
that the engine would use: Triton kernels and cuDNN on a GPU, oneDNN and aten on a CPU. Each output
is checked against float64 before its time is taken, and a call ends when the device is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.backends.select import AtenOps, CudnnOps, OneDNNOps, TritonOps
from fastres.bench.run import fast_dtypes
from fastres.graph.ir import Conv2d, GlobalAvgPool, Linear, MaxPool2d

pytest.importorskip("pytest_benchmark")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BATCH = 32 if CUDA else 1
BACKENDS: dict[str, type[AtenOps]] = (
    {"triton": TritonOps, "cudnn": CudnnOps} if CUDA else {"onednn": OneDNNOps, "aten": AtenOps}
)
DTYPES = fast_dtypes(DEVICE)


@dataclass(frozen=True)
class Row:
    """A square convolution of ``size`` pixels."""

    name: str
    size: int
    channels: int
    out: int
    kernel: int
    stride: int = 1
    residual: bool = False


ROWS = (
    Row("stem 7x7/2", 224, 3, 64, 7, 2),
    Row("stage 1 reduce", 56, 256, 64, 1),
    Row("stage 1 3x3", 56, 64, 64, 3),
    Row("stage 1 expand", 56, 64, 256, 1, residual=True),
    Row("stage 2 3x3/2", 56, 128, 128, 3, 2),
    Row("stage 2 3x3", 28, 128, 128, 3),
    Row("stage 2 expand", 28, 128, 512, 1, residual=True),
    Row("stage 3 3x3", 14, 256, 256, 3),
    Row("stage 3 expand", 14, 256, 1024, 1, residual=True),
    Row("stage 4 3x3", 7, 512, 512, 3),
    Row("stage 4 expand", 7, 512, 2048, 1, residual=True),
)


@pytest.fixture(params=BACKENDS)
def ops(request):
    return BACKENDS[request.param]()


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def image(channels: int, size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, channels, size, size, generator=generator)
    return x.to(DEVICE, dtype, memory_format=torch.channels_last)


def timed(benchmark, call: Callable[[], Tensor], right: Tensor) -> None:
    """Checks, then times until the device is done.

    A sum of random products in half precision keeps two to three digits: an eighth of the scale
    would be a wrong sum, and rounding stays a good way below a fiftieth.
    """
    got = call().double()
    error = (got - right).square().mean().sqrt() / right.square().mean().sqrt()
    assert float(error) < 0.02

    def synchronised() -> None:
        call()
        if CUDA:
            torch.cuda.synchronize()

    benchmark(synchronised)


@torch.inference_mode()
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_convolution(benchmark, ops, dtype, row):
    padding = row.kernel // 2
    op = Conv2d(
        weight="w",
        bias="b",
        in_channels=row.channels,
        out_channels=row.out,
        kernel=(row.kernel, row.kernel),
        stride=(row.stride, row.stride),
        padding=(padding, padding),
        dilation=(1, 1),
        groups=1,
        relu=True,
        residual=row.residual,
    )
    x = image(row.channels, row.size, dtype)
    fan_in = row.channels * row.kernel**2
    w = torch.randn(row.out, row.channels, row.kernel, row.kernel, device=DEVICE) / fan_in**0.5
    w = w.to(dtype, memory_format=torch.channels_last)
    b = torch.randn(row.out, device=DEVICE)
    residual = image(row.out, row.size // row.stride, dtype, 1) if row.residual else None
    right = F.conv2d(x.double(), w.double(), b.double(), row.stride, padding)
    right = (right if residual is None else right + residual.double()).relu()
    prepared = ops.prepare(op, (w, b))
    timed(benchmark, lambda: ops.conv(op, prepared, x, residual, False), right)


@torch.inference_mode()
def test_max_pool(benchmark, ops, dtype):
    op = MaxPool2d((3, 3), (2, 2), (1, 1), (1, 1), False)
    x = image(64, 112, dtype)
    right = F.max_pool2d(x.double(), 3, 2, 1)
    timed(benchmark, lambda: ops.max_pool(op, x), right)


@torch.inference_mode()
def test_global_average_pool(benchmark, ops, dtype):
    x = image(2048, 7, dtype)
    right = x.double().mean((2, 3), keepdim=True)
    timed(benchmark, lambda: ops.global_avg_pool(GlobalAvgPool(), x), right)


@torch.inference_mode()
def test_classifier(benchmark, ops, dtype):
    op = Linear("w", "b", 2048, 1000, False)
    x = image(2048, 1, dtype).flatten(1)
    w, b = torch.randn(1000, 2048, device=DEVICE).to(dtype), torch.randn(1000, device=DEVICE)
    prepared = ops.prepare(op, (w, b))
    right = F.linear(x.double(), w.double(), b.double())
    timed(benchmark, lambda: ops.linear(op, prepared, x), right)
