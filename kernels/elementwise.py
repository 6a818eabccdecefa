"""Elementwise ReLU, the sum of two tensors with or without it, and numbers as bytes.

    y = relu(a + b)        y = relu(x)        y = clamp(round(x / scale) + zero, 0, 255)

Any shape of up to 2^63 elements, float32, float16 or bfloat16, dense in row-major or channels_last
order, all operands in the same one. Sums are float32, rounded once. Rejected: broadcasting, mixed
layouts, strided views, an ``out`` that overlaps an input without being that input. Bytes are uint8,
halves are rounded to even.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._bytes import check_grid, requantized
from ._common import (
    await_producers,
    check_device,
    check_like,
    check_out_memory,
    check_same_device,
    check_shape,
    check_tensor,
    describe,
    launch,
    needs_int64,
    relu_keeping_nan,
    store_rounded,
)


@dataclass(frozen=True, slots=True)
class FlatConfig:
    """How many elements a program takes, with how many warps."""

    block: int
    num_warps: int


CONFIGS: tuple[FlatConfig, ...] = (FlatConfig(1024, 4), FlatConfig(4096, 8))
"""Small tensors take the first row, so that they spread over more SMs."""


@triton.jit
def elementwise_kernel(
    a_ptr,  # [SIZE]
    b_ptr,  # [SIZE] or None
    y_ptr,  # [SIZE]
    SIZE,
    RELU: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
    scale=None,  # of bytes, which y are where it is given
    zero=None,
) -> None:
    await_producers(PDL)
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    ok = i < SIZE
    y = tl.load(a_ptr + i, mask=ok, other=0.0).to(tl.float32)
    if b_ptr is not None:
        y += tl.load(b_ptr + i, mask=ok, other=0.0).to(tl.float32)
    if RELU:
        y = relu_keeping_nan(y)
    if scale is not None:
        tl.store(y_ptr + i, requantized(tl.div_rn(y, scale), 1.0, zero), mask=ok)
    else:
        store_rounded(y_ptr + i, y, ok)


def add_relu_ref(a: Tensor, b: Tensor, *, relu: bool = True, upcast: bool = False) -> Tensor:
    """The same in plain PyTorch; in float64 with ``upcast``."""
    y = a.double() + b.double() if upcast else a + b
    return y.relu() if relu else y


def relu_ref(x: Tensor, *, upcast: bool = False) -> Tensor:
    """The same in plain PyTorch; in float64 with ``upcast``."""
    return (x.double() if upcast else x).relu()


def _check_flat(name: str, t: Tensor, like: Tensor) -> None:
    """A dense tensor in the memory order of ``like``, which is dense too."""
    check_tensor(name, t)
    check_like(name, t, like)
    _check_order(name, t, like)


def _check_order(name: str, t: Tensor, like: Tensor) -> None:
    check_shape(name, t, like.shape)
    if not t.numel():
        return
    row_major = t.is_contiguous() and like.is_contiguous()
    if row_major or (_is_channels_last(t) and _is_channels_last(like)):
        return
    raise ValueError(
        f"{name} must be dense and in the memory order of the first operand "
        f"({describe(like)}), got {describe(t)}"
    )


def _is_channels_last(t: Tensor) -> bool:
    return t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last)


def select_config(size: int) -> FlatConfig:
    """The row for ``size`` elements."""
    return CONFIGS[0] if size < 2**22 else CONFIGS[1]


def _run(
    a: Tensor,
    b: Tensor | None,
    out: Tensor | None,
    relu: bool,
    config: FlatConfig | None,
    grid: dict[str, float] | None = None,
) -> Tensor:
    check_device(a)
    if out is None:
        out = torch.empty_like(a, dtype=torch.uint8 if grid else None)
    elif grid:
        check_tensor("out", out, None, (torch.uint8,))
        check_same_device("out", out, a)
        _check_order("out", out, a)
        check_out_memory(out, apart={"x": a}, same={})
    else:
        _check_flat("out", out, a)
        check_out_memory(out, apart={}, same={"the first operand": a, "b": b})
    if not out.numel():
        return out
    config = config or select_config(out.numel())
    launch(
        elementwise_kernel,
        triton.cdiv(out.numel(), config.block),
        a.device,
        a,
        b,
        out,
        out.numel(),
        RELU=relu,
        INT64=needs_int64(out),
        BLOCK=config.block,
        num_warps=config.num_warps,
        **(grid or {}),
    )
    return out


def add_relu(
    a: Tensor,
    b: Tensor,
    *,
    relu: bool = True,
    out: Tensor | None = None,
    config: FlatConfig | None = None,
) -> Tensor:
    """``relu(a + b)``, or ``a + b`` with ``relu=False``.

    Args:
        a, b: equal shape, dtype and dense memory order (row-major or channels_last).
        out: where to write; may be ``a`` or ``b`` itself: each element is read before it is
            written, by the program that writes it.

    Returns:
        A tensor of a's shape, dtype and memory order. An empty one launches nothing.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not what is wanted (named in the text).
    """
    _check_flat("a", a, a)
    _check_flat("b", b, a)
    return _run(a, b, out, relu, config)


def relu(x: Tensor, *, out: Tensor | None = None, config: FlatConfig | None = None) -> Tensor:
    """``max(x, 0)`` that keeps NaN and -0.0; ``out`` may be ``x`` itself. Otherwise as
    :func:`add_relu`."""
    _check_flat("x", x, x)
    return _run(x, None, out, True, config)


def to_bytes(
    x: Tensor,
    scale: float,
    zero: int,
    *,
    out: Tensor | None = None,
    config: FlatConfig | None = None,
) -> Tensor:
    """``x / scale``, rounded, on ``zero``, as uint8: what is outside of 0 to 255 goes to the ends.

    A NaN becomes 0. ``out`` must not overlap x; otherwise as :func:`relu`.
    """
    _check_flat("x", x, x)
    check_grid("x", (scale, zero))
    return _run(x, None, out, False, config, {"scale": float(scale), "zero": float(zero)})
