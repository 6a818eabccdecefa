"""2-D convolution as an implicit GEMM, with bias, residual and ReLU in its epilogue.

    y[n, p, q, k] = relu(sum_{r, s, c} x[n, p*u + r*d - h, q*v + s*e - g, c] * w[k, r, s, c]
                         + b[k] + residual[n, p, q, k])

Memory is dense NHWC (``channels_last``): x (N, C, H, W), w (K, C/groups, R, S), residual and y
(N, K, P, Q). float32 (``ieee`` or ``tf32`` products), float16, bfloat16; b may be float32. Sums
are float32, rounded once. Rejected: other layouts and dtypes, images smaller than the window,
``out`` over an input (except exactly over the residual). Method: cuDNN's implicit GEMM
(Chetlur et al., arXiv:1410.0759), the patch matrix formed tile by tile in shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._bytes import requantized, scaled, signed
from ._common import (
    IntPair,
    Operator,
    await_producers,
    check_activation,
    check_channels_last,
    check_device,
    check_like,
    check_out_memory,
    check_precision,
    check_tensor,
    check_vector,
    dot,
    int_pair,
    launch,
    needs_int64,
    product_precision,
    register,
    relu_keeping_nan,
    store_rounded,
    window_count,
)
from ._config import Gpu, ProblemSize, TileConfig, gpu_of, select_config
from ._split_k import split_workspace, sum_split_k

CONFIGS: dict[str, tuple[TileConfig, ...]] = {
    "half": (
        TileConfig(128, 256, 64, 8, 3),
        TileConfig(256, 128, 64, 8, 3),
        TileConfig(128, 128, 64, 8, 3),
        TileConfig(256, 64, 64, 8, 4),
        TileConfig(128, 64, 64, 4, 4),
        TileConfig(64, 128, 64, 4, 4),
        TileConfig(64, 64, 64, 4, 4),
        TileConfig(128, 64, 32, 4, 4),
        TileConfig(128, 32, 32, 4, 4),
        TileConfig(128, 16, 16, 4, 4),
        TileConfig(64, 32, 64, 4, 5),
        TileConfig(64, 16, 64, 4, 5),
        TileConfig(32, 64, 64, 4, 5),
        TileConfig(16, 64, 128, 4, 4),
        TileConfig(16, 32, 128, 4, 4),
    ),
    "tf32": (
        TileConfig(128, 128, 32, 8, 3),
        TileConfig(128, 64, 32, 4, 4),
        TileConfig(64, 128, 32, 4, 4),
        TileConfig(64, 64, 32, 4, 4),
        TileConfig(64, 32, 32, 4, 4),
        TileConfig(128, 16, 16, 4, 4),
        TileConfig(16, 32, 64, 4, 4),
    ),
    "ieee": (
        TileConfig(128, 64, 16, 8, 3),
        TileConfig(64, 64, 32, 4, 3),
        TileConfig(64, 32, 16, 4, 3),
        TileConfig(32, 32, 32, 4, 3),
        TileConfig(16, 32, 64, 4, 3),
        TileConfig(64, 16, 16, 4, 3),
    ),
}
"""Tiles by arithmetic: float16 and bfloat16, float32 as TF32, float32 in full."""


@triton.jit
def _write(
    acc,  # [BM, BN]
    b_ptr,
    residual_ptr,
    y_ptr,
    y_row,  # [BM] offsets of the rows in residual and y
    m_ok,  # [BM]
    n0,  # first column of acc
    K,
    grids,  # None, or what an int32 acc, a residual of bytes and y on bytes stand for
    RELU: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Bias, residual, ReLU and the store, in ``PARTS`` of the columns: the addresses and the
    residual of a whole tile at once would spill."""
    if PARTS > 1:
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(acc.reshape(acc.shape[0], 2, HALF).permute(0, 2, 1))
        _write(left, b_ptr, residual_ptr, y_ptr, y_row, m_ok, n0, K, grids, RELU, PARTS // 2)
        n0 += HALF
        _write(right, b_ptr, residual_ptr, y_ptr, y_row, m_ok, n0, K, grids, RELU, PARTS // 2)
    else:
        n = n0 + tl.arange(0, acc.shape[1])
        ok = m_ok[:, None] & (n < K)[None, :]
        offset = y_row[:, None] + n[None, :]
        if grids is not None:
            scale_ptr, shift_ptr, residual_scale, residual_zero, y_inverse, y_zero = grids
            acc = scaled(acc, scale_ptr + n, shift_ptr + n, n < K)
        if b_ptr is not None:
            acc += tl.load(b_ptr + n, mask=n < K, other=0.0).to(tl.float32)[None, :]
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + offset, mask=ok, other=0.0).to(tl.float32)
            if grids is not None:
                residual = (residual - residual_zero) * residual_scale
            acc += residual
        if RELU:
            acc = relu_keeping_nan(acc)
        if y_ptr.dtype.element_ty == tl.uint8:
            tl.store(y_ptr + offset, requantized(acc, y_inverse, y_zero), mask=ok)
        else:
            store_rounded(y_ptr + offset, acc, ok)


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "SPLIT_K", "x_zero"])
def conv2d_kernel(
    x_ptr,  # [N, H, W, GROUPS * C], bytes where scale_ptr is given
    w_ptr,  # [GROUPS * K, R, S, C], then int8
    b_ptr,  # [GROUPS * K] or None
    residual_ptr,  # [M, GROUPS * K] or None
    y_ptr,  # [M, GROUPS * K]
    workspace_ptr,  # [WORKSPACE_COUNTS + programs * BLOCK_M * BLOCK_N], None without splits
    M,  # N * P * Q
    H,
    W,
    P,
    Q,
    C,
    K,
    SPLIT_K,  # programs that share the reduction of a tile
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    GATHER_C: tl.constexpr,  # C where one tap cannot fill a step, else 0
    EVEN_C: tl.constexpr,  # C is a multiple of BLOCK_K
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr = False,
    scale_ptr=None,  # [GROUPS * K] of the sums of bytes; y are bytes or floating point
    shift_ptr=None,  # [GROUPS * K] int32, to be added to them
    x_zero=None,  # byte that stands for 0, with which x is padded; None for 0
    residual_scale=None,
    residual_zero=None,
    y_inverse=None,  # of y's scale
    y_zero=None,
) -> None:
    await_producers(PDL)
    # Neighbouring programs share rows of x: output channels run fastest, then groups.
    tiles_n = tl.cdiv(K, BLOCK_N)
    tile = tl.program_id(0)
    split = 0
    if workspace_ptr is not None:
        split = tile % SPLIT_K
        tile = tile // SPLIT_K
    group = tile // tiles_n % GROUPS
    m_tile = tile // (tiles_n * GROUPS)
    if INT64:
        m_tile, group = m_tile.to(tl.int64), group.to(tl.int64)
        W, Q = W.to(tl.int64), Q.to(tl.int64)
    if GATHER_C > 0:
        C = GATHER_C  # a constant, so that small multiples of it are known to be aligned
    m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n_tile = tile % tiles_n
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_ok = m < M
    # Clamped, not masked: rows and columns past the end repeat the first and are not stored.
    m = tl.where(m_ok, m, 0)
    n = group * K + tl.where(n < K, n, 0)  # [BN]

    h0 = m // Q % P * STRIDE_H - PAD_H  # [BM] top left of the window
    w0 = m % Q * STRIDE_W - PAD_W
    if R * S * STRIDE_H * STRIDE_W == 1 and PAD_H + PAD_W == 0:
        pixel = m
    else:
        pixel = (m // (P * Q) * H + h0) * W + w0
    w_row = n * (R * S * C)  # [BN]
    k = tl.arange(0, BLOCK_K)

    WINDOW: tl.constexpr = R * S * GATHER_C
    steps = tl.cdiv(WINDOW, BLOCK_K) if GATHER_C > 0 else R * S * tl.cdiv(C, BLOCK_K)
    begin = 0
    if workspace_ptr is not None:
        begin = split * steps // SPLIT_K
        steps = (split + 1) * steps // SPLIT_K
    ACC: tl.constexpr = tl.float32 if scale_ptr is None else tl.int32
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    pad = 0.0 if x_zero is None else x_zero
    if GATHER_C > 0:
        for step in range(begin, steps):
            kk = step * BLOCK_K + k  # [BK] flat (r, s, c)
            r = kk // (S * GATHER_C) * DILATION_H
            s = kk // GATHER_C % S * DILATION_W
            c = kk % GATHER_C
            x_ok = (kk < WINDOW)[None, :]  # [BM or 1, BK]
            if PAD_H + PAD_W > 0:
                h = h0[:, None] + r[None, :]
                w = w0[:, None] + s[None, :]
                x_ok = x_ok & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            # Masked offsets stay inside too: a pipelined load may touch them.
            x_pixel = tl.where(x_ok, pixel[:, None] + (r * W + s)[None, :], 0)
            x_offset = x_pixel * (C * GROUPS) + (group * C + c)[None, :]
            a = tl.load(x_ptr + x_offset, mask=x_ok, other=pad)  # [BM, BK]
            if scale_ptr is not None:
                a = signed(a)
            w_offset = w_row[None, :] + (kk % WINDOW)[:, None]
            b = tl.load(w_ptr + w_offset, mask=(kk < WINDOW)[:, None], other=0.0)  # [BK, BN]
            acc = dot(a, b, acc, PRECISION)
    else:
        for step in range(begin, steps):
            # Taps run fastest: their neighbours in x are still in cache, and only constants divide.
            tap = step % (R * S)
            r = tap // S * DILATION_H
            s = tap % S * DILATION_W
            c0 = step // (R * S) * BLOCK_K
            c = c0 + k  # [BK]
            c_ok = tl.full((BLOCK_K,), True, tl.int1)
            if not EVEN_C:  # the last step starts early and skips what is already summed
                c = tl.minimum(c0, C - BLOCK_K) + k
                c_ok = c >= c0
            x_pixel = pixel + (r * W + s)  # [BM]
            x_ok = tl.full((BLOCK_M,), True, tl.int1)
            if PAD_H + PAD_W > 0:
                h = h0 + r
                w = w0 + s
                x_ok = (h >= 0) & (h < H) & (w >= 0) & (w < W)
                x_pixel = tl.where(x_ok, x_pixel, 0)  # masked offsets stay inside here too
            x_offset = (x_pixel * (C * GROUPS) + group * C)[:, None] + c[None, :]
            x_mask = x_ok[:, None] & c_ok[None, :]
            a = tl.load(x_ptr + x_offset, mask=x_mask, other=pad)  # [BM, BK]
            if scale_ptr is not None:
                a = signed(a)
            w_offset = w_row[None, :] + (tap * C + c)[:, None]
            b = tl.load(w_ptr + w_offset, mask=c_ok[:, None], other=0.0)  # [BK, BN]
            acc = dot(a, b, acc, PRECISION)

    y_row = m * (K * GROUPS) + group * K
    if b_ptr is not None:
        b_ptr += group * K
    grids = None
    if scale_ptr is not None:
        scale_ptr += group * K
        shift_ptr += group * K
        grids = (scale_ptr, shift_ptr, residual_scale, residual_zero, y_inverse, y_zero)
    n0 = n_tile * BLOCK_N
    if workspace_ptr is None:
        _write(acc, b_ptr, residual_ptr, y_ptr, y_row, m_ok, n0, K, grids, RELU, PARTS)
    else:
        acc, last = sum_split_k(acc, workspace_ptr, tile, split, SPLIT_K)
        if last:
            _write(acc, b_ptr, residual_ptr, y_ptr, y_row, m_ok, n0, K, grids, RELU, PARTS)


def conv2d_ref(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    relu: bool = False,
    upcast: bool = False,
) -> Tensor:
    """The same in plain PyTorch, rounded after each step; in float64 throughout with ``upcast``."""
    dtype = torch.float64 if upcast else x.dtype
    bias = None if b is None else b.to(dtype)
    y = F.conv2d(x.to(dtype), w.to(dtype), bias, stride, padding, dilation, groups)
    if residual is not None:
        y = y + residual.to(dtype)
    y = y.relu() if relu else y
    return y.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Checked sizes of one convolution."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    shape: tuple[int, int, int, int]  # of the output

    def problem(self, x: Tensor, w: Tensor) -> ProblemSize:
        """What the choice of a tile looks at."""
        (batch, k, p, q), (c, r, s) = self.shape, w.shape[1:]
        size = x.element_size()
        return ProblemSize(batch * p * q, k // self.groups, c, r * s, self.groups, size)


def _check(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    residual: Tensor | None,
    stride: IntPair,
    padding: IntPair,
    dilation: IntPair,
    groups: int,
    precision: str,
) -> Geometry:
    """Refuse what the kernel does not take; otherwise the sizes of the convolution."""
    check_tensor("x", x, 4)
    check_tensor("w", w, 4)
    check_like("w", w, x)
    if b is not None:
        check_vector("b", b, w.shape[0], x)
    check_precision(precision)
    geometry = geometry_of(x, w, stride, padding, dilation, groups)
    if residual is not None:
        check_activation("residual", residual, geometry.shape, x)
    return geometry


def geometry_of(
    x: Tensor, w: Tensor, stride: IntPair, padding: IntPair, dilation: IntPair, groups: int
) -> Geometry:
    """The sizes of a convolution of 4-D tensors, which must be right."""
    if groups < 1 or w.shape[0] % groups:
        raise ValueError(f"groups must divide w's {w.shape[0]} output channels, got {groups}")
    if x.shape[1] != w.shape[1] * groups or not x.shape[1]:
        raise ValueError(
            f"w of shape {tuple(w.shape)} with groups={groups} wants "
            f"{w.shape[1] * groups} input channels (at least 1), got x of shape {tuple(x.shape)}"
        )
    check_channels_last("x", x)
    check_channels_last("w", w)
    stride = int_pair("stride", stride, 1)
    padding = int_pair("padding", padding, 0)
    dilation = int_pair("dilation", dilation, 1)
    sizes = zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True)
    p, q = (window_count(*size) for size in sizes)
    if p < 1 or q < 1:
        raise ValueError(
            f"x of {x.shape[2]}x{x.shape[3]} with padding {padding} is smaller than the "
            f"{w.shape[2]}x{w.shape[3]} window with dilation {dilation}"
        )
    return Geometry(stride, padding, dilation, groups, (x.shape[0], w.shape[0], p, q))


def math_mode_of(dtype: torch.dtype, precision: str) -> str:
    """The key of ``CONFIGS`` for tensors of ``dtype``."""
    return precision if dtype == torch.float32 else "half"


@lru_cache(maxsize=4096)
def _select(problem: ProblemSize, math_mode: str, gpu: Gpu) -> TileConfig:
    return select_config(CONFIGS[math_mode], problem, math_mode, gpu)


def conv2d(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    relu: bool = False,
    precision: str = "ieee",
    out: Tensor | None = None,
    config: TileConfig | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """``relu(conv2d(x, w) + b + residual)`` in one kernel.

    Args:
        x: (N, C, H, W), channels_last, float32, float16 or bfloat16.
        w: (K, C / groups, R, S), channels_last, of x's dtype.
        b: (K,), float32 or x's dtype.
        residual: (N, K, P, Q), channels_last, of x's dtype; added before the ReLU.
        precision: products of float32: ``"ieee"`` in full, ``"tf32"`` on tensor cores.
        out: where to write; may be ``residual`` itself, since each program reads its tile of the
            residual before it writes that tile, and no other program touches it.
        config: the tile to use instead of the selected one.
        workspace: float32 memory for a split reduction, :func:`workspace_size` elements at least,
            zero at first and left fit for the next call; never for two calls at a time. Without
            it each split call takes and clears its own.

    Returns:
        (N, K, P, Q), channels_last, of x's dtype. A batch of 0 launches nothing.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not what is wanted (named in the text).
    """
    geometry = _check(x, w, b, residual, stride, padding, dilation, groups, precision)
    check_device(x)
    if out is None:
        out = torch.empty(
            geometry.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )
    else:
        check_activation("out", out, geometry.shape, x)
        check_out_memory(out, apart={"x": x, "w": w, "b": b}, same={"residual": residual})
    if not out.numel():
        return out

    problem = geometry.problem(x, w)
    if config is None:
        config = _select(problem, math_mode_of(x.dtype, precision), gpu_of(x.device))
    how = {"RELU": relu, "PRECISION": product_precision(x.dtype, precision)}
    launch_conv2d((x, w, b, residual, out), geometry, problem, config, workspace, how)
    return out


def launch_conv2d(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor],
    geometry: Geometry,
    problem: ProblemSize,
    config: TileConfig,
    workspace: Tensor | None,
    how: dict[str, Any],
) -> None:
    """Launch the kernel on x, w, b, residual and out, with ``how`` for its other arguments."""
    x, w, _, _, out = tensors
    tiles, block = problem.tiles(config), config.block_m * config.block_n
    launch(
        conv2d_kernel,
        tiles * config.split_k,
        x.device,
        *tensors,
        split_workspace(workspace, tiles, config.split_k, block, x.device),
        problem.m,
        *x.shape[2:],
        *geometry.shape[2:],
        problem.channels,
        problem.n,
        config.split_k,
        GROUPS=geometry.groups,
        R=w.shape[2],
        S=w.shape[3],
        STRIDE_H=geometry.stride[0],
        STRIDE_W=geometry.stride[1],
        PAD_H=geometry.padding[0],
        PAD_W=geometry.padding[1],
        DILATION_H=geometry.dilation[0],
        DILATION_W=geometry.dilation[1],
        GATHER_C=problem.channels if problem.gathers(config.block_k) else 0,
        EVEN_C=problem.channels % config.block_k == 0,
        INT64=needs_int64(x, w, out),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PARTS=config.parts,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **how,
    )


def _conv2d_ours(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    precision: str,
) -> Tensor:
    """:func:`conv2d` as a functional operator."""
    return conv2d(
        x,
        w,
        b,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        residual=residual,
        relu=relu,
        precision=precision,
    )


def _conv2d_fake(x, w, b, residual, stride, padding, dilation, groups, relu, precision):
    geometry = _check(x, w, b, residual, stride, padding, dilation, groups, precision)
    return torch.empty(
        geometry.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )


def _conv2d_plain(x, w, b, residual, stride, padding, dilation, groups, relu, precision):
    g = _check(x, w, b, residual, stride, padding, dilation, groups, precision)
    return conv2d_ref(
        x,
        w,
        b,
        stride=g.stride,
        padding=g.padding,
        dilation=g.dilation,
        groups=groups,
        residual=residual,
        relu=relu,
    )


conv2d_op = register("conv2d", Operator(_conv2d_ours, _conv2d_plain, _conv2d_fake))
