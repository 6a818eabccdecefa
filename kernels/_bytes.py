"""Bytes that stand for numbers: what they are multiplied as, what sums become, and checks."""

from __future__ import annotations

import triton
import triton.language as tl

Grid = tuple[float, int]
"""Scale and zero point: the byte q stands for (q - zero) * scale."""


@triton.jit
def signed(q):
    """Bytes q as int8 numbers q - 128: matrix units multiply signed by signed."""
    return (q ^ 0x80).to(tl.int8, bitcast=True)


@triton.jit
def scaled(acc, scale_ptr, shift_ptr, ok):
    """int32 sums [BM, BN] in float32: a shift and a scale for each column."""
    acc += tl.load(shift_ptr, mask=ok, other=0)[None, :]
    return acc.to(tl.float32) * tl.load(scale_ptr, mask=ok, other=0.0)[None, :]


@triton.jit
def requantized(x, inverse, zero):
    """float32 ``x`` as bytes: rounded, halves to even, and clamped to 0 to 255.

    Added to 1.5 * 2^23, a number below 2^22 is rounded to a whole one and stands in the low bits.
    """
    x = tl.minimum(tl.maximum(x * inverse, -zero), 255.0 - zero)
    return (x + 12582912.0 + zero).to(tl.int32, bitcast=True).to(tl.uint8)


def check_grid(name: str, grid: Grid) -> None:
    scale, zero = grid
    if not 0 < scale < float("inf"):
        raise ValueError(f"the scale of {name} must be positive and finite, got {scale}")
    check_zero(f"the zero point of {name}", zero)


def check_zero(name: str, zero: int) -> None:
    if not isinstance(zero, int) or not 0 <= zero <= 255:
        raise ValueError(f"{name} must be a whole number from 0 to 255, got {zero!r}")
