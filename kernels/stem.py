"""The stem of a ResNet in one kernel: 7x7/2 convolution, bias, ReLU and 3x3/2 max pooling.

    y = max_pool2d(relu(conv2d(x * scale + shift, w, stride=2, padding=3) + b), 3, 2, padding=1)

x (N, C, H, W) is what users have: dense NCHW or NHWC, float32, float16, bfloat16 or uint8; scale
and shift (C,) are optional and leave the padding zero. w (K, C, 7, 7); y (N, K, P, Q) is NHWC in
w's dtype, float32, float16 or bfloat16. Sums are float32, rounded once. Rejected: other strides,
images of 2^31 elements. Method: two adjacent windows share one row of the patch matrix, read in
pieces of four neighbours, and so a NaN may reach one pooled column more than it should; maxima run
down the rows in registers, and but for a strip's first row no convolution is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from ._common import (
    await_producers,
    check_activation,
    check_channels_last,
    check_device,
    check_like,
    check_out_memory,
    check_precision,
    check_same_device,
    check_shape,
    check_tensor,
    check_vector,
    dot,
    launch,
    needs_int64,
    product_precision,
    relu_keeping_nan,
    rounded,
    store_rounded,
    window_count,
)
from ._config import gpu_of
from ._gpu import HOPPER, Gpu

WINDOW, STRIDE, PADDING = 7, 2, 3  # of the convolution


@dataclass(frozen=True, slots=True)
class StemConfig:
    """A program makes ``rows`` rows of ``columns - 1`` pooled pixels of ``block_n`` channels."""

    columns: int
    rows: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


CONFIGS: dict[str, tuple[StemConfig, ...]] = {
    "half": (
        StemConfig(64, 14, 64, 32, 8, 1),
        StemConfig(64, 14, 64, 32, 8, 3),
        StemConfig(64, 14, 64, 64, 4, 1),
        StemConfig(64, 4, 64, 32, 8, 1),
        StemConfig(64, 1, 64, 32, 8, 1),
        StemConfig(32, 2, 64, 32, 4, 1),
        StemConfig(16, 1, 64, 32, 4, 3),
    ),
    "single": (
        StemConfig(64, 14, 32, 32, 8, 1),
        StemConfig(32, 2, 32, 32, 8, 1),
        StemConfig(16, 1, 32, 32, 4, 1),
    ),
}
"""By the dtype of the weights. Small batches take narrow and low strips, to fill more SMs."""


@triton.jit
def _maximum(a, b):
    """As torch's max pooling: NaN wins."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _conv_row(
    x_ptr,  # of the image
    w_ptr,
    scale_ptr,
    shift_ptr,
    line,
    plane,  # elements between the channels of a pixel where each has its own rows, else 0
    row,  # of the convolution's output
    q,  # [BM] pooled columns
    n,  # [2 * BN] rows of w
    H,
    C: tl.constexpr,
    PLANAR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Columns 2 * q and 2 * q + 1 of one row of the convolution, [BM, 2 * BN]."""
    PIXEL: tl.constexpr = 1 if PLANAR else C
    DEPTH: tl.constexpr = (7 * C * 12 + 63) // 64 * 64
    acc = tl.zeros((q.shape[0], n.shape[0]), tl.float32)
    for k0 in range(0, DEPTH, BLOCK_K):
        w = tl.load(w_ptr + n[None, :] * DEPTH + (k0 + tl.arange(0, BLOCK_K))[:, None])
        piece = k0 // 4 + tl.arange(0, BLOCK_K // 4)
        h = row * 2 - 3 + piece // (3 * C)
        if PLANAR:
            c = (piece // 3 % C)[None, :, None]
            base = h * line + piece // 3 % C * plane
            inner = piece % 3 * 4
        else:
            base = h * line
            inner = piece % (3 * C) * 4
            c = (inner[None, :, None] + tl.arange(0, 4)[None, None, :]) % C
        place = ((q * 4 - 4) * PIXEL)[:, None] + inner[None, :]  # in its row, [BM, BK / 4]
        place = place[:, :, None] + tl.arange(0, 4)[None, None, :]
        # A negative number is a huge one without its sign.
        h_ok = (piece < 21 * C) & (h.to(tl.uint32, bitcast=True) < H)
        ok = h_ok[None, :, None] & (place.to(tl.uint32, bitcast=True) < line)
        offset = base[None, :, None] + place
        # Clamped as well as masked: a pipelined load may touch masked addresses.
        offset = tl.where(ok, offset, tl.arange(0, 4)[None, None, :])
        x = tl.load(x_ptr + offset, mask=ok, other=0)
        if scale_ptr is not None:
            x = x.to(tl.float32) * tl.load(scale_ptr + c) + tl.load(shift_ptr + c)
            x = tl.where(ok, x, 0.0)
        if x.dtype != w.dtype:
            x = rounded(x.to(tl.float32), w.dtype)
        x = x.reshape(q.shape[0], BLOCK_K)
        if cuda_capability_geq(10):  # whose compiler fails on a reshape right before a product
            x = tl.where((k0 + tl.arange(0, BLOCK_K) < 84 * C)[None, :], x, 0.0)
        acc = dot(x, w, acc, PRECISION)
    return acc


@triton.jit
def _halves(t):
    """The columns of ``t`` whose bit 3 is clear, and those where it is set. Every matrix unit's
    layout keeps both in one thread; and so for rows."""
    GROUPS: tl.constexpr = t.shape[1] // 16
    left, right = tl.split(t.reshape(t.shape[0], GROUPS, 2, 8).permute(0, 1, 3, 2))
    return left.reshape(t.shape[0], GROUPS * 8), right.reshape(t.shape[0], GROUPS * 8)


@triton.jit
def _row_halves(t):
    GROUPS: tl.constexpr = t.shape[0] // 16
    upper, lower = tl.split(t.reshape(GROUPS, 2, 8, t.shape[1]).permute(0, 2, 3, 1))
    return upper.reshape(GROUPS * 8, t.shape[1]), lower.reshape(GROUPS * 8, t.shape[1])


@triton.jit(do_not_specialize=["H", "P", "Q", "POOLED_P", "POOLED_Q", "STRIPS", "TILES_Q"])
def stem_kernel(
    x_ptr,  # [N, H, W, C], or [N, C, H, W] where PLANAR
    w_ptr,  # [K, DEPTH], packed
    b_ptr,  # [K] or None
    scale_ptr,  # [C] or None
    shift_ptr,  # [C] or None
    y_ptr,  # [N, POOLED_P, POOLED_Q, K]
    H,
    line,  # W, times C unless PLANAR
    P,  # of the convolution's output
    Q,
    POOLED_P,
    POOLED_Q,
    STRIPS,
    TILES_Q,
    K,
    C: tl.constexpr,
    PLANAR: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    await_producers(PDL)
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    n0 = pid % tiles_n * BLOCK_N
    q_tile = pid // tiles_n % TILES_Q
    strip = pid // (tiles_n * TILES_Q) % STRIPS
    image = pid // (tiles_n * TILES_Q * STRIPS)
    if INT64:
        image = image.to(tl.int64)
    plane = H * line
    x_ptr += image * (plane * C if PLANAR else plane)
    y_ptr += image * (POOLED_P * POOLED_Q * K)

    # Row i of a tile is pooled column 2u + v, u running over bits 0 to 2 and 4 up of i and v being
    # bit 3 (see _row_halves). Column 0 of a tile only hands its odd neighbour to column 1.
    i = tl.arange(0, COLUMNS)
    u = i // 16 * 8 + i % 8
    q0 = q_tile * (COLUMNS - 1) - 1
    q = q0 + 2 * u + i // 8 % 2
    n = n0 * 2 + tl.arange(0, BLOCK_N * 2)
    n = tl.where(n < tl.cdiv(K, 8) * 16, n, 0)
    half = tl.arange(0, COLUMNS // 2)
    left = tl.broadcast_to(tl.maximum(half - 1, 0)[:, None], (COLUMNS // 2, BLOCK_N))

    # The rows of the convolution in turn: an odd one ends a window and begins the next.
    p0 = strip * ROWS
    best0 = tl.full((COLUMNS // 2, BLOCK_N), float("-inf"), tl.float32)
    best1 = tl.full((COLUMNS // 2, BLOCK_N), float("-inf"), tl.float32)
    for row in range(p0 * 2 - 1, tl.minimum(p0 + ROWS, POOLED_P) * 2):
        both = _conv_row(
            x_ptr, w_ptr, scale_ptr, shift_ptr, line, plane, row, q, n, H,
            C, PLANAR, PRECISION, BLOCK_K,
        )  # fmt: skip
        even, odd = _halves(both)
        inside = (row >= 0) & (row < P) & (q >= 0)
        even = tl.where((inside & (q * 2 < Q))[:, None], even, float("-inf"))
        odd = tl.where((inside & (q * 2 + 1 < Q))[:, None], odd, float("-inf"))
        odd0, odd1 = _row_halves(odd)
        here0, here1 = _row_halves(_maximum(even, odd))
        here0 = _maximum(here0, tl.gather(odd1, left, 0))
        here1 = _maximum(here1, odd0)
        best0 = _maximum(best0, here0)
        best1 = _maximum(best1, here1)
        if row % 2 != 0:
            if row > p0 * 2:
                column = q0 + 2 * half
                at = row // 2 * POOLED_Q + column
                if INT64:
                    at = at.to(tl.int64)
                at *= K
                c = n0 + tl.arange(0, BLOCK_N)
                c_ok = (c < K)[None, :]
                if b_ptr is not None:
                    bias = tl.load(b_ptr + c, mask=c < K, other=0.0).to(tl.float32)[None, :]
                    best0 += bias
                    best1 += bias
                # Rounding, bias and ReLU keep the order of numbers, so they can follow the maximum.
                ok = (half > 0) & (column < POOLED_Q)
                at0 = y_ptr + at[:, None] + c[None, :]
                store_rounded(at0, relu_keeping_nan(best0), ok[:, None] & c_ok)
                ok = column + 1 < POOLED_Q
                store_rounded(at0 + K, relu_keeping_nan(best1), ok[:, None] & c_ok)
            best0 = here0
            best1 = here1


def stem_ref(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    upcast: bool = False,
) -> Tensor:
    """The same in plain PyTorch, rounded after each step; in float64 throughout with ``upcast``."""
    dtype = torch.float64 if upcast else w.dtype
    if scale is not None and shift is not None:
        x = x.to(torch.float64 if upcast else torch.float32)
        x = x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    bias = None if b is None else b.to(dtype)
    y = F.conv2d(x.to(dtype), w.to(dtype), bias, STRIDE, PADDING).relu()
    y = F.max_pool2d(y, 3, 2, 1)
    return y.contiguous(memory_format=torch.channels_last)


def pack_stem_weight(w: Tensor, *, planar: bool) -> Tensor:
    """Weights as the kernel reads them, for images in NCHW (``planar``) or NHWC memory.

    A row of the patch matrix is, for each row of the window, the twelve neighbours of each channel
    that two adjacent windows see together. Two rows of the packed weights make an output channel,
    one for each window; the pair lies 8 apart (see ``_halves``).
    """
    k, c = w.shape[:2]
    shape = (k, WINDOW, c, 12) if planar else (k, WINDOW, 12, c)
    taps = w.permute(0, 2, 1, 3) if planar else w.permute(0, 2, 3, 1)
    windows = []
    for start in (1, 1 + STRIDE):  # the neighbours begin one pixel before the left window
        wide = w.new_zeros(shape)
        wide.narrow(3 if planar else 2, start, WINDOW).copy_(taps)
        windows.append(wide.flatten(1))
    depth = ceil(windows[0].shape[1] / 64) * 64
    packed = w.new_zeros(ceil(k / 8) * 8, 2, depth)
    packed[:k, :, : windows[0].shape[1]] = torch.stack(windows, 1)
    return packed.view(-1, 8, 2, depth).transpose(1, 2).reshape(-1, depth)


def _check(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    precision: str,
) -> tuple[int, int, int, int]:
    """Refuse what the kernel does not take; otherwise the shape of the output."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    if x.dtype != torch.uint8:
        check_tensor("x", x, 4)
    elif x.ndim != 4:
        raise ValueError(f"x must have 4 dimensions, got shape {tuple(x.shape)}")
    check_tensor("w", w, 4)
    check_same_device("w", w, x)
    if not x.shape[1]:
        raise ValueError(f"x must have channels, got shape {tuple(x.shape)}")
    check_shape("w", w, (w.shape[0], x.shape[1], WINDOW, WINDOW))
    if x.numel() and not x.is_contiguous():
        check_channels_last("x", x)
    if b is not None:
        check_vector("b", b, w.shape[0], w)
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together")
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None:
            check_vector(name, vector, x.shape[1], w)
    check_precision(precision)
    p, q = (window_count(size, WINDOW, STRIDE, PADDING, 1) for size in x.shape[2:])
    if p < 1 or q < 1:
        raise ValueError(f"x of {x.shape[2]}x{x.shape[3]} has no pixels")
    shape = (x.shape[0], w.shape[0], (p - 1) // 2 + 1, (q - 1) // 2 + 1)
    if max(x[:1].numel(), shape[1] * shape[2] * shape[3]) >= 2**31:
        raise ValueError(f"an image must have less than 2^31 elements, got x of {tuple(x.shape)}")
    return shape


@dataclass(frozen=True, slots=True)
class _ProblemSize:
    batch: int
    outputs: int
    rows: int  # pooled
    columns: int

    def programs(self, config: StemConfig) -> int:
        strips, tiles = ceil(self.rows / config.rows), ceil(self.columns / (config.columns - 1))
        return self.batch * strips * tiles * ceil(self.outputs / config.block_n)


_ROW_LATENCY = 2500  # cycles that a program waits in each row of the convolution
_COLUMN_CYCLES = 28  # of an SM of Hopper, for one of ``columns`` in such a row


def estimated_cycles(config: StemConfig, problem: _ProblemSize, gpu: Gpu) -> float:
    """Cycles that the whole stem takes with this row: an SM works through its share, or waits
    where the two programs that it holds at once do not hide the latency."""
    programs = problem.programs(config)
    steps = 2 * min(config.rows, problem.rows) + 1
    work = config.columns * _COLUMN_CYCLES * HOPPER.matrix / gpu.matrix
    busy = ceil(programs / gpu.sms) * work
    waiting = ceil(programs / (2 * gpu.sms)) * (_ROW_LATENCY + work)
    return steps * max(busy, waiting)


@lru_cache(maxsize=256)
def select_config(problem: _ProblemSize, math_mode: str, gpu: Gpu) -> StemConfig:
    """The row of least estimated cycles, the first of equals."""
    return min(CONFIGS[math_mode], key=lambda config: estimated_cycles(config, problem, gpu))


def stem(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    packed: Tensor | None = None,
    precision: str = "ieee",
    out: Tensor | None = None,
    config: StemConfig | None = None,
) -> Tensor:
    """Convolution, bias, ReLU and max pooling of the first layers in one kernel.

    Args:
        x: (N, C, H, W), dense NCHW or NHWC, float32, float16, bfloat16 or uint8.
        w: (K, C, 7, 7) in any memory order, float32, float16 or bfloat16.
        b: (K,), float32 or w's dtype.
        scale, shift: (C,), float32 or w's dtype: ``x * scale + shift`` is convolved. The padding
            stays zero, as where users normalise their images first.
        packed: ``pack_stem_weight(w, planar=x.is_contiguous())``, to save making it.
        precision: products of float32: ``"ieee"`` in full, ``"tf32"`` on tensor cores.
        out: where to write, channels_last; must not overlap an input.
        config: the strip to use instead of the selected one.

    Returns:
        (N, K, P, Q), channels_last, of w's dtype. A batch of 0 launches nothing.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not what is wanted (named in the text).
    """
    shape = _check(x, w, b, scale, shift, precision)
    check_device(x)
    if out is None:
        out = torch.empty(shape, dtype=w.dtype, device=x.device, memory_format=torch.channels_last)
    else:
        check_activation("out", out, shape, w)
        check_out_memory(out, apart={"x": x, "w": w, "b": b}, same={})
    if not out.numel():
        return out
    planar = x.is_contiguous()
    if packed is None:
        packed = pack_stem_weight(w, planar=planar)
    else:
        check_like("packed", packed, w)
        rows, depth = ceil(shape[1] / 8) * 16, ceil(WINDOW * x.shape[1] * 12 / 64) * 64
        check_shape("packed", packed, (rows, depth))

    batch, outputs, pooled_p, pooled_q = shape
    channels, height, width = x.shape[1:]
    problem = _ProblemSize(batch, outputs, pooled_p, pooled_q)
    if config is None:
        math_mode = "single" if w.dtype == torch.float32 else "half"
        config = select_config(problem, math_mode, gpu_of(x.device))
    launch(
        stem_kernel,
        problem.programs(config),
        x.device,
        x,
        packed,
        b,
        scale,
        shift,
        out,
        height,
        width if planar else width * channels,
        window_count(height, WINDOW, STRIDE, PADDING, 1),
        window_count(width, WINDOW, STRIDE, PADDING, 1),
        pooled_p,
        pooled_q,
        ceil(pooled_p / config.rows),
        ceil(pooled_q / (config.columns - 1)),
        outputs,
        C=channels,
        PLANAR=planar,
        PRECISION=product_precision(w.dtype, precision),
        INT64=needs_int64(x, out),
        COLUMNS=config.columns,
        ROWS=config.rows,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
