"""Max and average pooling.

    max:      y[n, p, q, c] = max   of x[n, p*u + r*d - h, q*v + s*e - g, c] over the window (r, s)
    average:  y[n, p, q, c] = sum over the window / its size

Memory is dense NHWC (``channels_last``); float32, float16 or bfloat16, for the max pool uint8 as
well; sums in float32, rounded once. As in torch the max pool pads with -inf (bytes with 0) and any
NaN in a window wins, and a ``ceil_mode`` window starts inside the image or its left padding.
Rejected: other layouts and dtypes, padding above half a window, images smaller than a window, an
``out`` that overlaps x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    FLOATS,
    IntPair,
    Operator,
    await_producers,
    check_activation,
    check_channels_last,
    check_device,
    check_out_memory,
    check_tensor,
    int_pair,
    launch,
    needs_int64,
    register,
    store_rounded,
    window_count,
)


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """A program makes ``block_m`` pixels of ``block_c`` channels."""

    block_m: int
    block_c: int
    num_warps: int


CONFIGS: tuple[PoolConfig, ...] = (
    PoolConfig(16, 64, 4),
    PoolConfig(32, 32, 4),
    PoolConfig(64, 16, 4),
)


def select_config(channels: int) -> PoolConfig:
    """The widest row that does not reach beyond the channels, or the narrowest."""
    return next((config for config in CONFIGS if config.block_c <= channels), CONFIGS[-1])


BYTES_TOO = (*FLOATS, torch.uint8)


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q"])
def pool2d_kernel(
    x_ptr,  # [N, H, W, C]
    y_ptr,  # [M, C]
    M,  # N * P * Q
    H,
    W,
    P,
    Q,
    C,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    MAX: tl.constexpr,  # maximum, else average
    COUNT_PAD: tl.constexpr,  # an average counts padding as elements of value 0
    DIVISOR: tl.constexpr,  # of an average in place of its count, 0 for none
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    await_producers(PDL)
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    m_tile = pid // tiles_c
    if INT64:
        m_tile, W, Q = m_tile.to(tl.int64), W.to(tl.int64), Q.to(tl.int64)
    m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = (m < M)[:, None] & (c < C)[None, :]  # [BM, BC]
    h0 = m // Q % P * STRIDE_H - PAD_H  # [BM] top left of the window
    w0 = m % Q * STRIDE_W - PAD_W
    image = m // (P * Q) * H
    # Masked addresses stay inside too; a remainder, unlike a choice, keeps neighbours adjacent.
    c_in = (c % C)[None, :]

    LOWEST: tl.constexpr = 0.0 if x_ptr.dtype.element_ty == tl.uint8 else float("-inf")
    acc = tl.full((BLOCK_M, BLOCK_C), LOWEST if MAX else 0.0, tl.float32)
    for tap in range(R * S):
        h = h0 + tap // S * DILATION_H
        w = w0 + tap % S * DILATION_W
        inside = (m < M) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        pixel = tl.where(inside, (image + h) * W + w, 0)
        offset = pixel[:, None] * C + c_in
        read = ok & inside[:, None]
        if MAX:
            x = tl.load(x_ptr + offset, mask=read, other=LOWEST).to(tl.float32)
            acc = tl.where((x > acc) | (x != x), x, acc)  # tl.maximum would drop NaN
        else:
            acc += tl.load(x_ptr + offset, mask=read, other=0.0).to(tl.float32)

    if not MAX:
        if DIVISOR != 0:
            acc = tl.div_rn(acc, tl.full(acc.shape, DIVISOR, tl.float32))
        else:
            # Padding counts where asked for, but what ceil_mode adds beyond it never does.
            EDGE_H: tl.constexpr = PAD_H if COUNT_PAD else 0
            EDGE_W: tl.constexpr = PAD_W if COUNT_PAD else 0
            rows = tl.minimum(h0 + R, H + EDGE_H) - tl.maximum(h0, -EDGE_H)
            columns = tl.minimum(w0 + S, W + EDGE_W) - tl.maximum(w0, -EDGE_W)
            acc = tl.div_rn(
                acc, tl.broadcast_to((rows * columns).to(tl.float32)[:, None], acc.shape)
            )
    y_offset = m[:, None] * C + c[None, :]
    store_rounded(y_ptr + y_offset, acc, ok)


def max_pool2d_ref(
    x: Tensor,
    kernel_size: IntPair,
    *,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    ceil_mode: bool = False,
    upcast: bool = False,
) -> Tensor:
    """The same in plain PyTorch; in float64 with ``upcast``."""
    x = x.double() if upcast else x
    window: Any = {
        "kernel_size": kernel_size,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
    }
    y = F.max_pool2d(x, ceil_mode=ceil_mode, **window)
    return y.contiguous(memory_format=torch.channels_last)


def avg_pool2d_ref(
    x: Tensor,
    kernel_size: IntPair,
    *,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    upcast: bool = False,
) -> Tensor:
    """The same in plain PyTorch; in float64 with ``upcast``."""
    x = x.double() if upcast else x
    window: Any = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    y = F.avg_pool2d(
        x,
        **window,
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        divisor_override=divisor_override,
    )
    return y.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, slots=True)
class _Geometry:
    """Checked sizes of one pooling."""

    window: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    shape: tuple[int, int, int, int]  # of the output


def _output_size(
    size: int, window: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> int:
    """torch's rule: with ``ceil_mode`` a last, partial window that does not start in the padding
    to the right."""
    if not ceil_mode:
        return window_count(size, window, stride, padding, dilation)
    count = window_count(size + stride - 1, window, stride, padding, dilation)
    return count - 1 if (count - 1) * stride >= size + padding else count


def _check(
    x: Tensor,
    kernel_size: IntPair,
    stride: IntPair | None,
    padding: IntPair,
    dilation: IntPair,
    ceil_mode: bool,
    dtypes: Sequence[torch.dtype] = FLOATS,
) -> _Geometry:
    """Refuse what the kernel does not take; otherwise the sizes of the pooling."""
    check_image(x, dtypes)
    window = int_pair("kernel_size", kernel_size, 1)
    stride = window if stride is None else int_pair("stride", stride, 1)
    padding = int_pair("padding", padding, 0)
    dilation = int_pair("dilation", dilation, 1)
    reach = tuple(d * (k - 1) + 1 for k, d in zip(window, dilation, strict=True))
    if any(2 * p > k for p, k in zip(padding, reach, strict=True)):
        raise ValueError(f"padding must be at most half of the window {reach}, got {padding}")
    sizes = zip(x.shape[2:], window, stride, padding, dilation, strict=True)
    p, q = (_output_size(*size, ceil_mode) for size in sizes)
    if p < 1 or q < 1:
        raise ValueError(
            f"x of {x.shape[2]}x{x.shape[3]} with padding {padding} is smaller than the "
            f"{window[0]}x{window[1]} window with dilation {dilation}"
        )
    return _Geometry(window, stride, padding, dilation, (x.shape[0], x.shape[1], p, q))


def check_image(x: Tensor, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """A dense NHWC tensor with something to pool in each image."""
    check_tensor("x", x, 4, dtypes)
    check_channels_last("x", x)
    if not (x.shape[1] and x.shape[2] and x.shape[3]):
        raise ValueError(f"x must have channels and pixels, got shape {tuple(x.shape)}")


def pooled_output(x: Tensor, shape: Sequence[int], out: Tensor | None) -> Tensor:
    """``out`` where it is fit to take the result, or new memory."""
    check_device(x)
    if out is None:
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    check_activation("out", out, shape, x)
    check_out_memory(out, apart={"x": x}, same={})
    return out


def _pool2d(
    x: Tensor,
    geometry: _Geometry,
    out: Tensor | None,
    config: PoolConfig | None,
    *,
    maximum: bool,
    count_pad: bool = False,
    divisor: int = 0,
) -> Tensor:
    out = pooled_output(x, geometry.shape, out)
    if not out.numel():
        return out
    batch, channels, p, q = geometry.shape
    config = config or select_config(channels)
    pixels = batch * p * q
    launch(
        pool2d_kernel,
        triton.cdiv(pixels, config.block_m) * triton.cdiv(channels, config.block_c),
        x.device,
        x,
        out,
        pixels,
        x.shape[2],
        x.shape[3],
        p,
        q,
        channels,
        R=geometry.window[0],
        S=geometry.window[1],
        STRIDE_H=geometry.stride[0],
        STRIDE_W=geometry.stride[1],
        PAD_H=geometry.padding[0],
        PAD_W=geometry.padding[1],
        DILATION_H=geometry.dilation[0],
        DILATION_W=geometry.dilation[1],
        MAX=maximum,
        COUNT_PAD=count_pad,
        DIVISOR=divisor,
        INT64=needs_int64(x, out),
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
    )
    return out


def max_pool2d(
    x: Tensor,
    kernel_size: IntPair,
    *,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    ceil_mode: bool = False,
    out: Tensor | None = None,
    config: PoolConfig | None = None,
) -> Tensor:
    """Largest element of each window, as ``torch.nn.functional.max_pool2d``.

    Args:
        x: (N, C, H, W), channels_last, float32, float16, bfloat16 or uint8.
        stride: the window's size by default.
        out: where to write; must not overlap x.

    Returns:
        (N, C, P, Q), channels_last, of x's dtype. A batch of 0 launches nothing.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not what is wanted (named in the text).
    """
    geometry = _check(x, kernel_size, stride, padding, dilation, ceil_mode, BYTES_TOO)
    return _pool2d(x, geometry, out, config, maximum=True)


def avg_pool2d(
    x: Tensor,
    kernel_size: IntPair,
    *,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    out: Tensor | None = None,
    config: PoolConfig | None = None,
) -> Tensor:
    """Mean of each window, as ``torch.nn.functional.avg_pool2d``; otherwise as
    :func:`max_pool2d`."""
    if divisor_override == 0:
        raise ValueError("divisor_override must not be 0")
    geometry = _check(x, kernel_size, stride, padding, 1, ceil_mode)
    return _pool2d(
        x,
        geometry,
        out,
        config,
        maximum=False,
        count_pad=count_include_pad,
        divisor=divisor_override or 0,
    )


def _fake(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _max_pool2d_ours(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """:func:`max_pool2d` as a functional operator."""
    return max_pool2d(
        x, kernel_size, stride=stride, padding=padding, dilation=dilation, ceil_mode=ceil_mode
    )


def _max_pool2d_fake(x, kernel_size, stride, padding, dilation, ceil_mode):
    return _fake(x, _check(x, kernel_size, stride, padding, dilation, ceil_mode).shape)


def _max_pool2d_plain(x, kernel_size, stride, padding, dilation, ceil_mode):
    g = _check(x, kernel_size, stride, padding, dilation, ceil_mode)
    return max_pool2d_ref(
        x,
        g.window,
        stride=g.stride,
        padding=g.padding,
        dilation=g.dilation,
        ceil_mode=ceil_mode,
    )


max_pool2d_op = register(
    "max_pool2d", Operator(_max_pool2d_ours, _max_pool2d_plain, _max_pool2d_fake)
)


def _avg_pool2d_ours(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """:func:`avg_pool2d` as a functional operator."""
    return avg_pool2d(
        x,
        kernel_size,
        stride=stride,
        padding=padding,
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        divisor_override=divisor_override,
    )


def _avg_pool2d_fake(
    x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
):
    return _fake(x, _check(x, kernel_size, stride, padding, 1, ceil_mode).shape)


def _avg_pool2d_plain(
    x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
):
    g = _check(x, kernel_size, stride, padding, 1, ceil_mode)
    return avg_pool2d_ref(
        x,
        g.window,
        stride=g.stride,
        padding=g.padding,
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        divisor_override=divisor_override,
    )


avg_pool2d_op = register(
    "avg_pool2d", Operator(_avg_pool2d_ours, _avg_pool2d_plain, _avg_pool2d_fake)
)
