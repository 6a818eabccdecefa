"""Tensor descriptors: tiles that TMA, of sm_90 and later, moves, clipped at the edges.

A descriptor wants a base on 16 bytes and rows of a multiple of 16 bytes. What lies outside the
tensor is read as zero and not written.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._common import capability, check_contiguous, check_like, check_tensor, describe

_UNIT = 16  # bytes


def has_tma(device: torch.device) -> bool:
    """Whether the GPU has TMA, the Tensor Memory Accelerator; the interpreter plays it."""
    return capability(device) >= (9, 0)


def fits_descriptor(columns: int, dtype: torch.dtype) -> bool:
    """Whether rows of ``columns`` elements can be moved by descriptors."""
    return columns * dtype.itemsize % _UNIT == 0


def check_tma(x: Tensor) -> None:
    if not has_tma(x.device):
        raise RuntimeError(
            f"this kernel needs a GPU of compute capability 9.0 or newer, x is on {x.device}; "
            "use conv2d"
        )


def check_rows(name: str, t: Tensor, x: Tensor) -> None:
    """A matrix of x's dtype and device that a descriptor can describe."""
    check_tensor(name, t, 2)
    check_like(name, t, x)
    check_contiguous(name, t)
    if not fits_descriptor(t.shape[1], t.dtype):
        raise ValueError(f"{name} must have rows of a multiple of 16 bytes, got {describe(t)}")


def check_aligned(**tensors: Tensor | None) -> None:
    """Each tensor's memory starts on 16 bytes."""
    for name, t in tensors.items():
        if t is not None and t.data_ptr() % _UNIT:
            raise ValueError(
                f"{name} must start on {_UNIT} bytes, its storage offset is {t.storage_offset()}"
            )


def descriptor(t: Tensor, *block: int) -> TensorDescriptor:
    """A descriptor of a dense tensor that moves tiles of shape ``block``."""
    return TensorDescriptor.from_tensor(t, list(block))
