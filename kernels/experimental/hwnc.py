"""2-D convolution in the layout [H, W, N, C]: a pixel's images lie side by side.

    y[p, q, n, k] = relu(sum_{r, s, c} x[p*u + r - h, q*u + s - h, n, c] * w[k, r, s, c]
                         + b[k] + residual[p, q, n, k])

A tile of images at one pixel is a block of rows whatever the stride, so no patch matrix is formed
and taps outside the image are skipped. x (H, W, N, C), residual and y (P, Q, N, K) are contiguous;
w (K, C, R, S) is channels_last. float32 (``ieee`` or ``tf32`` products), float16 or bfloat16, b may
be float32; sums are float32, rounded once. Rejected: GPUs before sm_90, channels of no multiple of
the tile's ``block_k``, rows of no multiple of 16 bytes, ``out`` over an input (except exactly over
the residual). Method: the batch inside the image, as cuda-convnet's CHWN, but channels innermost.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil
from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import (
    await_producers,
    check_channels_last,
    check_like,
    check_out_memory,
    check_precision,
    check_shape,
    check_tensor,
    check_vector,
    describe,
    dot,
    launch,
    needs_int64,
    product_precision,
    relu_keeping_nan,
    rounded,
    window_count,
)
from .._config import ProblemSize, estimated_cycles, gpu_of, select_config
from .._gpu import Gpu
from .._tma import check_aligned, check_tma, descriptor, fits_descriptor
from ..conv import conv2d_ref, math_mode_of
from ..gemm import GemmConfig

try:
    from . import conv3x3_hwnc
except ImportError:  # a Triton whose Gluon, which is experimental, has another form
    conv3x3_hwnc = None  # type: ignore[assignment]

CONFIGS: dict[str, tuple[GemmConfig, ...]] = {
    "half": (
        GemmConfig(128, 256, 64, 8, 3),
        GemmConfig(256, 128, 64, 8, 3),
        GemmConfig(128, 128, 64, 8, 4),
        GemmConfig(256, 64, 64, 8, 4),
        GemmConfig(128, 64, 64, 4, 4),
        GemmConfig(64, 256, 64, 4, 4),
        GemmConfig(64, 128, 64, 4, 4),
        GemmConfig(64, 64, 64, 4, 4),
    ),
    "tf32": (GemmConfig(128, 128, 32, 8, 4), GemmConfig(64, 64, 32, 4, 4)),
    "ieee": (GemmConfig(64, 32, 16, 4, 3),),
}
"""Tiles by arithmetic: float16 and bfloat16, float32 as TF32, float32 in full."""

Config: TypeAlias = "GemmConfig | conv3x3_hwnc.Conv3x3Config"


@triton.jit
def _write(
    acc,  # [BM, BN]
    b_ptr,
    residual,
    y,
    p,
    row0,
    k0,
    K,
    RELU: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """As gemm.py's write_tile, of tiles that end with their row of pixels."""
    if PARTS > 1:
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(acc.reshape(acc.shape[0], 2, HALF).permute(0, 2, 1))
        _write(left, b_ptr, residual, y, p, row0, k0, K, RELU, PARTS // 2)
        _write(right, b_ptr, residual, y, p, row0, k0 + HALF, K, RELU, PARTS // 2)
    else:
        if b_ptr is not None:
            k = k0 + tl.arange(0, acc.shape[1])
            acc += tl.load(b_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        if residual is not None:
            tile = residual.load([p, row0, k0]).reshape(acc.shape[0], acc.shape[1])
            acc += tile.to(tl.float32)
        if RELU:
            acc = relu_keeping_nan(acc)
        y.store([p, row0, k0], rounded(acc, y.dtype).reshape(1, acc.shape[0], acc.shape[1]))


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q"])
def conv2d_hwnc_kernel(
    x,  # by MODE: descriptor of [H * W * N, C] or of [H, W * N, C], or a pointer
    w,  # descriptor of [K, R * S * C], tiles [BLOCK_N, BLOCK_K]
    b_ptr,  # [K] or None
    residual,  # descriptor of [P, Q * N, K], tiles [1, BLOCK_M, BLOCK_N / PARTS], or None
    y,  # likewise
    N,
    H,
    W,
    P,
    Q,
    C,
    K,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    MODE: tl.constexpr,  # a tile is images of one "pixel", part of a "row" of pixels, or "gathered"
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    await_producers(PDL)
    # Output channels run fastest, then pixels, then images: what neighbours share is in cache.
    tiles_n = tl.cdiv(K, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    k0 = tl.program_id(0) % tiles_n * BLOCK_N
    if MODE == "pixel":
        q = tile % Q
        p = tile // Q % P
        n0 = tile // (P * Q) * BLOCK_M
        row0 = q * N + n0
        s0 = tl.maximum(0, PAD - q * STRIDE)
        s1 = tl.minimum(S, W + PAD - q * STRIDE)
    else:
        tiles_row = tl.cdiv(Q * N, BLOCK_M)
        p = tile // tiles_row
        row0 = tile % tiles_row * BLOCK_M
        q = 0
        n0 = 0
        s0 = 0
        s1 = S
    h0 = p * STRIDE - PAD
    w0 = q * STRIDE - PAD
    r0 = tl.maximum(0, -h0)
    r1 = tl.minimum(R, H - h0)
    steps_c = C // BLOCK_K
    steps_s = (s1 - s0) * steps_c
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    row = row0 + tl.arange(0, BLOCK_M)  # for "gathered", whose rows past the end repeat the first
    row = tl.where(row < Q * N, row, 0)
    image = row % N
    column = row // N * STRIDE - PAD
    if INT64:
        image, W = image.to(tl.int64), W.to(tl.int64)
    tl.assume((r1 - r0) * steps_s > 0)  # a loop that may not run serialises the products
    for step in tl.range(0, (r1 - r0) * steps_s):
        r = r0 + step // steps_s
        s = s0 + step % steps_s // steps_c
        c = step % steps_s % steps_c * BLOCK_K
        if MODE == "pixel":
            a = x.load([((h0 + r) * W + w0 + s) * N + n0, c])
        elif MODE == "row":
            a = x.load([h0 + r, row0 + (s - PAD) * N, c]).reshape(BLOCK_M, BLOCK_K)
        else:
            inside = (column + s >= 0) & (column + s < W)
            # Clamped as well as masked: a pipelined load may touch masked addresses.
            source = tl.where(inside, ((h0 + r) * W + column + s) * N + image, 0)
            offset = source[:, None] * C + (c + tl.arange(0, BLOCK_K))[None, :]
            a = tl.load(x + offset, mask=inside[:, None], other=0.0)
        acc = dot(a, w.load([k0, (r * S + s) * C + c]).T, acc, PRECISION)
    _write(acc, b_ptr, residual, y, p, row0, k0, K, RELU, PARTS)


def to_hwnc(x: Tensor) -> Tensor:
    """(N, C, H, W) in any memory order as contiguous (H, W, N, C)."""
    return x.permute(2, 3, 0, 1).contiguous()


def from_hwnc(x: Tensor) -> Tensor:
    """Contiguous (H, W, N, C) as (N, C, H, W) in channels_last memory."""
    return x.permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)


def conv2d_hwnc_ref(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    residual: Tensor | None = None,
    relu: bool = False,
    upcast: bool = False,
) -> Tensor:
    """The same in plain PyTorch, rounded after each step; in float64 throughout with ``upcast``."""
    shortcut = None if residual is None else residual.permute(2, 3, 0, 1)
    y = conv2d_ref(
        x.permute(2, 3, 0, 1),
        w,
        b,
        stride=stride,
        padding=padding,
        residual=shortcut,
        relu=relu,
        upcast=upcast,
    )
    return to_hwnc(y)


def check_hwnc(name: str, t: Tensor, shape: Sequence[int] | None, x: Tensor) -> None:
    """Dense (H, W, N, C), of ``shape`` if one is given, of the dtype and on the device of ``x``."""
    check_tensor(name, t, 4)
    check_like(name, t, x)
    if shape is not None:
        check_shape(name, t, shape)
    if not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous (H, W, N, C), got {describe(t)}")


def supports(channels: int, outputs: int, dtype: torch.dtype) -> bool:
    """Whether every tile takes so many channels and outputs (on a GPU with TMA)."""
    return channels > 0 and channels % 64 == 0 and fits_descriptor(outputs, dtype)


def _check(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: int,
    precision: str,
) -> tuple[int, int, int, int]:
    """Refuse what the kernel does not take; otherwise the shape of the output."""
    check_hwnc("x", x, None, x)
    check_tensor("w", w, 4)
    check_like("w", w, x)
    height, width, batch, channels = x.shape
    if w.shape[1] != channels or not channels:
        raise ValueError(
            f"w of shape {tuple(w.shape)} wants {w.shape[1]} input channels (at least 1), "
            f"got x of shape {tuple(x.shape)}"
        )
    check_channels_last("w", w)
    for name, columns in (("x", channels), ("w", w.shape[0])):
        if not fits_descriptor(columns, x.dtype):
            raise ValueError(
                f"{name} must have or make rows of a multiple of 16 bytes, got {columns} elements"
            )
    if b is not None:
        check_vector("b", b, w.shape[0], x)
    if stride < 1 or padding < 0:
        raise ValueError(f"stride must be at least 1 and padding 0, got {stride} and {padding}")
    if padding >= min(w.shape[2:]):
        raise ValueError(f"padding must be less than the window, got {padding}")
    check_precision(precision)
    p = window_count(height, w.shape[2], stride, padding, 1)
    q = window_count(width, w.shape[3], stride, padding, 1)
    if p < 1 or q < 1:
        raise ValueError(
            f"x of {height}x{width} with padding {padding} is smaller than the "
            f"{w.shape[2]}x{w.shape[3]} window"
        )
    shape = (p, q, batch, w.shape[0])
    if residual is not None:
        check_hwnc("residual", residual, shape, x)
    return shape


@lru_cache(maxsize=4096)
def select(
    problem: ProblemSize, math_mode: str, gpu: Gpu, slides: tuple[int, int, int, int] | None
) -> Config:
    """The row of least estimated cycles, also of the sliding kernel for outputs of size ``slides``
    (P, Q, N, K) where it can serve them."""
    rows = [config for config in CONFIGS[math_mode] if problem.channels % config.block_k == 0]
    config = select_config(rows, problem, math_mode, gpu)
    assert isinstance(config, GemmConfig)
    if slides is None:
        return config
    other = conv3x3_hwnc.select_config(conv3x3_hwnc.CONFIGS, slides, gpu)
    faster = conv3x3_hwnc.estimated_cycles(other, slides, gpu) < estimated_cycles(
        config, problem, math_mode, gpu
    )
    return other if faster else config


def _slides(x: Tensor, w: Tensor, stride: int, padding: int) -> bool:
    """Whether the sliding kernel can serve the convolution on x's GPU."""
    return (
        conv3x3_hwnc is not None
        and conv3x3_hwnc.runs_on(x.device)
        and conv3x3_hwnc.supports(w.shape[1], w.shape[2:], stride, padding, x.dtype)
    )


def conv2d_hwnc(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    residual: Tensor | None = None,
    relu: bool = False,
    precision: str = "ieee",
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """``relu(conv2d(x, w) + b + residual)`` in one kernel, in the layout [H, W, N, C].

    Args:
        x: (H, W, N, C), contiguous, float32, float16 or bfloat16; see :func:`to_hwnc`.
        w: (K, C, R, S), channels_last, of x's dtype.
        b: (K,), float32 or x's dtype.
        residual: (P, Q, N, K), contiguous, of x's dtype; added before the ReLU.
        precision: products of float32: ``"ieee"`` in full, ``"tf32"`` on tensor cores.
        out: where to write; may be ``residual`` itself, since each program reads its tile of the
            residual before it writes that tile, and no other program touches it.
        config: the tile to use instead of the selected one. Its ``block_k`` divides C; a
            ``Conv3x3Config`` is for 3x3 convolutions of 64 channels in half precision with stride
            and padding 1 on sm_90.

    Returns:
        (P, Q, N, K), contiguous, of x's dtype. A batch of 0 launches nothing.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not what is wanted (named in the text).
    """
    shape = _check(x, w, b, residual, stride, padding, precision)
    check_tma(x)
    if out is None:
        out = x.new_empty(shape)
    else:
        check_hwnc("out", out, shape, x)
        check_out_memory(out, apart={"x": x, "w": w, "b": b}, same={"residual": residual})
    if not out.numel():
        return out
    check_aligned(x=x, w=w, residual=residual, out=out)

    p, q, batch, outputs = shape
    height, width, _, channels = x.shape
    problem = ProblemSize(
        p * q * batch, outputs, channels, w.shape[2] * w.shape[3], 1, x.element_size()
    )
    slides = _slides(x, w, stride, padding)
    if config is None:
        math_mode = math_mode_of(x.dtype, precision)
        config = select(problem, math_mode, gpu_of(x.device), shape if slides else None)
    if not isinstance(config, GemmConfig):
        if not slides:
            raise ValueError(f"config must be a GemmConfig for this convolution, got {config}")
        conv3x3_hwnc.run(x, w, b, residual, out, relu, config)
        return out
    if channels % config.block_k or config.persistent:
        raise ValueError(f"config must not be persistent and divide {channels} channels: {config}")
    bm, bn, bk, parts = config.block_m, config.block_n, config.block_k, config.parts
    if batch % bm == 0:
        mode, tiles = "pixel", p * q * (batch // bm)
        source = descriptor(x.view(-1, channels), bm, bk)
    elif stride == 1:
        mode, tiles = "row", p * ceil(q * batch / bm)
        source = descriptor(x.view(height, -1, channels), 1, bm, bk)
    else:
        mode, tiles = "gathered", p * ceil(q * batch / bm)
        source = x
    rows = None if residual is None else residual.view(p, -1, outputs)
    launch(
        conv2d_hwnc_kernel,
        tiles * ceil(outputs / bn),
        x.device,
        source,
        descriptor(w.permute(0, 2, 3, 1).reshape(outputs, -1), bn, bk),
        b,
        None if rows is None else descriptor(rows, 1, bm, bn // parts),
        descriptor(out.view(p, -1, outputs), 1, bm, bn // parts),
        batch,
        height,
        width,
        p,
        q,
        channels,
        outputs,
        R=w.shape[2],
        S=w.shape[3],
        STRIDE=stride,
        PAD=padding,
        MODE=mode,
        RELU=relu,
        PRECISION=product_precision(x.dtype, precision),
        INT64=mode == "gathered" and needs_int64(x),
        BLOCK_M=bm,
        BLOCK_N=bn,
        BLOCK_K=bk,
        PARTS=parts,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
