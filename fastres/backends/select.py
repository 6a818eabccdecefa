"""What computes the steps on a device: aten, oneDNN, cuDNN or fastres' own Triton kernels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

from ..errors import BackendError
from .aten import AtenOps, CudnnOps, OneDNNOps, conv_precision, matmul_precision
from .fused import EXPERIMENTAL
from .kernel_choice import FORCE_VARIABLE, KernelSelector, architecture_of, forced, tuning_seconds
from .kernel_table import family
from .onednn_int8 import Int8Ops, OneDNNInt8Ops, int8_products
from .triton import FAILED, TritonOps
from .triton_int8 import TritonInt8Ops

__all__ = [
    "BACKENDS",
    "AtenOps",
    "CudnnOps",
    "OneDNNOps",
    "TritonOps",
    "check_backend",
    "conv_precision",
    "matmul_precision",
    "select_ops",
    "triton_ops",
]

BACKENDS = ("auto", "triton", "torch")
Ops = TypeVar("Ops", bound=AtenOps)
GPUS = {"cuda"}
"""Types of devices on which auto may take our kernels."""


def check_backend(backend: str) -> str:
    """``backend`` itself, or ValueError when it is none of :data:`BACKENDS`."""
    if backend not in BACKENDS:
        known = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"backend must be one of {known}, got {backend!r}")
    return backend


def select_ops(backend: str, device: torch.device, dtype: torch.dtype) -> AtenOps:
    """What computes the steps on this device in this dtype.

    Raises:
        BackendError: ``backend="triton"`` where Triton cannot run.
    """
    check_backend(backend)
    if backend == "triton":
        _check_triton(device)
        return triton_ops()
    if device.type in GPUS:
        return _triton_or_cudnn() if _takes_ours(backend, device, dtype) else CudnnOps()
    if device.type != "cpu" or dtype is torch.float64:
        return AtenOps()
    ops = OneDNNOps() if _onednn_takes(dtype) else AtenOps()
    if dtype is not torch.float32 and not _native(dtype):
        _warn_of_emulation(dtype)
        ops.emulated = True
    return ops


def select_int8_ops(backend: str, device: torch.device, dtype: torch.dtype) -> Int8Ops:
    """What computes the steps of a plan with 8-bit convolutions on this device.

    Raises:
        BackendError: ``backend="triton"`` where Triton cannot run.
    """
    if check_backend(backend) == "triton" and dtype is not torch.float64:
        _check_triton(device)
        return TritonInt8Ops(dtype)
    if device.type in GPUS and _takes_ours(backend, device, dtype):
        return _ours_or(Int8Ops(dtype), lambda: TritonInt8Ops(dtype, cudnn=True))
    onednn = device.type == "cpu" and dtype is not torch.float64 and _onednn_takes(dtype)
    return OneDNNInt8Ops(dtype) if onednn and int8_products() else Int8Ops(dtype)


def _check_triton(device: torch.device) -> None:
    if device.type == "cpu" and not _interpreting():
        raise BackendError(
            "backend='triton' needs a CUDA device, got a CPU tensor "
            "(or set TRITON_INTERPRET=1 before triton is imported)"
        )


def _takes_ours(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU is to run our kernels."""
    halves_or_single = dtype in (torch.float16, torch.bfloat16, torch.float32)
    return backend == "auto" and halves_or_single and _suits_triton(device)


def _native(dtype: torch.dtype) -> bool:
    """Whether this processor, as far as oneDNN may use it, multiplies in this half precision."""
    if not _onednn_takes(dtype):
        return False
    if dtype is not torch.bfloat16 or not torch.cpu._is_avx2_supported():  # other processors
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@cache
def _warn_of_emulation(dtype: torch.dtype) -> None:
    warnings.warn(
        f"{dtype} is emulated on this processor, which takes longer than float32",
        stacklevel=2,
    )


def triton_ops(*, cudnn: bool = False, selector: KernelSelector | None = None) -> TritonOps:
    """The Triton backend; that of the experimental kernels where one of them is asked for.

    Args:
        cudnn: whether a convolution may go to cuDNN where that was measured to be faster.
        selector: what decides between kernels; by default what is in force on the device.

    Raises:
        BackendError: there is no Triton.
        ValueError: FASTRES_KERNELS names what does not exist.
    """
    wanted = selector.forced if selector else forced(os.environ.get(FORCE_VARIABLE, ""))
    if any(wanted.get(name) for name in EXPERIMENTAL):
        from .fused_experimental import HwncOps

        return HwncOps(cudnn=cudnn, selector=selector)
    return TritonOps(cudnn=cudnn, selector=selector)


def _suits_triton(device: torch.device) -> bool:
    """Whether there is a Triton, and matrix instructions that it uses on this GPU.

    Before compute capability 8.0 it has none, and a GPU that no table knows may end the process.
    """
    if not _has_triton() or device in FAILED:
        return False
    return bool(family(architecture_of(device)))


def _triton_or_cudnn() -> AtenOps:
    plainer: AtenOps = CudnnOps()
    return _ours_or(plainer, lambda: triton_ops(cudnn=True))


def _ours_or(plainer: Ops, make: Callable[[], Ops]) -> Ops:
    """The Triton backend, or PyTorch's operators where the package is broken, with one warning."""
    try:
        ops = make()
        ops.falls_back = True
        ops.tuning_seconds = tuning_seconds()
        return ops
    except ValueError:  # of FASTRES_KERNELS or FASTRES_TUNE
        raise
    except Exception as error:
        _warn_of_triton(f"{type(error).__name__}: {error}")
        return plainer


@cache
def _warn_of_triton(reason: str) -> None:
    warnings.warn(
        f"fastres goes on without its Triton kernels, for triton cannot be imported: {reason}",
        stacklevel=2,
    )


def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None


def _interpreting() -> bool:
    if not _has_triton():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _onednn_takes(dtype: torch.dtype) -> bool:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype is torch.float32
