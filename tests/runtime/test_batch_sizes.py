"""Fifty batch sizes: the variants of kernels that they would compile, counted without compiling."""

import random
from importlib import import_module

import pytest
import torch

import fastres
from fastres.backends.kernel_choice import KernelSelector, only
from fastres.backends.select import triton_ops
from fastres.graph.plan import of_module
from fastres.runtime.executor import Executor

kernels = pytest.importorskip("fastres.kernels")
pytestmark = pytest.mark.interpreter
MODULES = (
    "conv",
    "gemm",
    "b2b_gemm",
    "head",
    "experimental.hwnc",
    "stem",
    "pool",
    "global_pool",
    "elementwise",
)


def variant(kernel, args, meta):
    """All that Triton compiles anew for: constants; of arguments the type, 1, multiples of 16."""
    runtime = kernel.kwargs["do_not_specialize"] or ()
    return (kernel.__name__, *sorted(meta.items())) + tuple(
        kind(a, name not in runtime) for name, a in zip(kernel.arg_names, args, strict=False)
    )


def kind(value, specialized):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        width = value.bit_length() > 31
        return (width, value == 1, value % 16 == 0) if specialized else width
    return tuple(value.block_shape) if hasattr(value, "block_shape") else value


@pytest.fixture
def launched(monkeypatch):
    """The variants launched; nothing runs, and tiles are chosen for the 132 SMs of an H200."""
    found = set()
    hopper = import_module("fastres.kernels._gpu").HOPPER
    modules = [import_module(f"fastres.kernels.{name}") for name in MODULES]
    for module in modules:
        monkeypatch.setattr(
            module, "launch", lambda kernel, grid, device, *a, **m: found.add(variant(kernel, a, m))
        )
        monkeypatch.setattr(module, "gpu_of", lambda device: hopper, raising=False)
    chosen = [module._select for module in modules if hasattr(module, "_select")]
    for select in chosen:
        select.cache_clear()
    yield found
    for select in chosen:
        select.cache_clear()


CHOICES = {
    "as shipped": KernelSelector("sm_90"),
    "hwnc": only("stem", "head", "gemm", "dual_gemm", "b2b_gemm", "conv2d_hwnc"),
    "without TMA": KernelSelector("sm_80"),
}


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="looks at kernels as the interpreter has them"
)
@pytest.mark.parametrize("selector", CHOICES.values(), ids=CHOICES)
def test_fifty_batch_sizes_compile_little_and_after_the_first_dozen_almost_nothing(
    launched, selector
):
    """A ResNet-50 of 53 convolutions; 80 variants are one and a half for each of its kernels.

    The first dozen are spread over all; a size between may still be the first to want some tile.
    """
    model = fastres.resnet50().half()
    made = Executor(of_module(model.eval()), model, triton_ops(selector=selector), torch.float16)
    first = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 50]
    others = random.Random(0).sample(sorted(set(range(1, 51)) - set(first)), 38)
    counts = []
    for batch in first + others:
        with torch.no_grad():
            made.run([torch.empty(batch, 3, 224, 224, dtype=torch.float16)])
        counts.append(len(launched))
    assert 10 < counts[0] < counts[-1] <= 80
    assert counts[-1] - counts[11] <= 8
    assert len(made._schedules) <= 51
