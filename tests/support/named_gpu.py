"""GPUs by name that are not here: what engine and launchers ask of one, and the compiler for it.

    with fake_gpu(TARGETS["sm_90"]) as launches:  # launches are collected instead of run
        conv2d(torch.empty(..., device="cuda"), ...)
    compiled = launches[0].compiled()  # not in a process with Triton's interpreter

Tensors on ``cuda`` are fake: they have a shape, a layout and an address, and no memory. The engine,
the launchers and the compiler are the real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

from fastres.backends.select import select_ops
from fastres.graph import plan
from fastres.graph.fold import Weights
from fastres.graph.ir import Conv2d, Linear
from fastres.graph.plan import Plan, Step
from fastres.kernels import _common
from fastres.kernels._gpu import GPUS, Gpu
from fastres.perf import kernel_check
from fastres.runtime.executor import Executor

CUDA = torch.device("cuda", 0)


@dataclass(frozen=True)
class Target:
    """One GPU: ``architecture`` such as ``"sm_90"``, and what the launchers know of it."""

    architecture: str
    record: Gpu

    @property
    def gpu(self) -> GPUTarget:
        return kernel_check.gpu_target(self.architecture)

    @property
    def capability(self) -> tuple[int, int]:
        arch = self.gpu.arch
        return divmod(arch, 10) if isinstance(arch, int) else (0, 0)


TARGETS = {name: Target(name, gpu) for name, gpu in GPUS.items()}


def compiling_for(target: Target) -> AbstractContextManager[None]:
    """Inside, Triton compiles for this GPU."""
    return kernel_check.compiling_for(target.gpu)


@dataclass(frozen=True)
class Launch:
    """A launch that did not take place, for ``target``."""

    kernel: Any
    grid: int
    args: tuple[Any, ...]
    meta: dict[str, Any]
    target: Target

    def compiled(self) -> Any:
        """What Triton compiles for it, or has compiled before."""
        with compiling_for(self.target):
            args, meta = self._typed()
            return self.kernel.warmup(*args, grid=(self.grid,), **meta)

    def key(self) -> Hashable:
        """Equal for launches that share one compiled kernel, by Triton's own reckoning."""
        with compiling_for(self.target):
            *_, binder = self.kernel.device_caches[self.target.gpu.arch]
            args, meta = self._typed()
            _, specialization, options = binder(*args, debug=False, **meta)
        return self.kernel.__name__, str(specialization), str(sorted(options.items(), key=str))

    def _typed(self) -> tuple[list[Any], dict[str, Any]]:
        """The arguments, tensors as stand-ins of their dtypes in aligned memory."""

        def typed(value: Any) -> Any:
            return MockTensor(value.dtype) if isinstance(value, Tensor) else value

        return list(map(typed, self.args)), {k: typed(v) for k, v in self.meta.items()}


@contextmanager
def fake_gpu(
    target: Target, run: Callable[[Launch], object] | None = None, *, early: bool = False
) -> Iterator[list[Launch]]:
    """Inside, tensors on ``cuda`` are fake and on this GPU; what is launched is collected.

    Args:
        run: called with each launch; what it raises is the launch's error.
        early: whether kernels are launched before those before them have ended.
    """
    launches: list[Launch] = []

    def collect(kernel: Any, grid: int, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        launches.append(Launch(kernel, grid, args, meta, target))
        if run is not None:
            run(launches[-1])

    host = _common.Host(target.capability, target.record, collect, early=early, device="cuda")
    major, minor = target.capability
    properties = SimpleNamespace(major=major, minor=minor, gcnArchName=target.architecture)
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.cuda, "get_device_name", return_value=target.architecture),
        mock.patch.object(torch.cuda, "current_stream"),
        mock.patch.object(torch.version, "hip", None if major else "6.4"),
        mock.patch.object(FakeTensor, "data_ptr", _address),
        FakeTensorMode(allow_non_fake_inputs=True),
        _common.hosted(host),
    ):
        yield launches


@torch.library.register_fake("aten::cudnn_convolution_relu")
def _(x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any, *rest: Any) -> Tensor:
    """PyTorch has none."""
    return F.conv2d(x, w, b, stride, padding, *rest)


@torch.library.register_fake("aten::cudnn_convolution_add_relu")
def _(x: Tensor, w: Tensor, z: Tensor, alpha: Any, b: Tensor | None, *geometry: Any) -> Tensor:
    return F.conv2d(x, w, b, *geometry)


def _address(t: Tensor) -> int:
    """An address that is aligned and that no other storage's range of 64 GB covers."""
    return (t.untyped_storage()._cdata << 36) + t.storage_offset() * t.element_size()


def executor(model: nn.Module, dtype: torch.dtype, backend: str = "auto") -> Executor:
    """The engine of a module with ``_forward_impl``, with fake weights; inside :func:`fake_gpu`."""

    def weights(step: Step) -> Weights:
        op = step.op
        if isinstance(op, Conv2d):
            shape: tuple[int, ...] = (op.out_channels, op.in_channels // op.groups, *op.kernel)
        else:
            assert isinstance(op, Linear)
            shape = op.out_features, op.in_features
        weight = torch.empty(shape, dtype=dtype, device=CUDA)
        if isinstance(op, Conv2d):
            weight = weight.contiguous(memory_format=torch.channels_last)
        return weight, torch.empty(shape[0], device=CUDA)

    ops = select_ops(backend, CUDA, dtype)
    return Executor(plan.of_module(model, "_forward_impl"), model, ops, dtype, weights)


def walk(
    model: nn.Module,
    target: Target,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    backend: str = "auto",
    run: Callable[[Launch], object] | None = None,
) -> tuple[list[Launch], Plan]:
    """What one call launches on images of this shape, and the plan that it follows."""
    with torch.no_grad(), fake_gpu(target, run) as launches:
        made = executor(model, dtype, backend)
        made.run([torch.empty(shape, dtype=dtype, device=CUDA)])
    return launches, made.plan
