"""Products of rows by TMA: 1x1 convolutions, alone or in pairs, with their epilogue.

    y = relu(x @ w^T + b + residual)            y = relu(x @ w^T + x2[rows] @ w2^T + b)

x (M, C), w (K, C), residual and y (M, K) are dense and row-major: pixels of NHWC or HWNC images in
any number. In the pair, rows takes every ``stride``-th pixel of the images x2 (M2, C2): a block's
expansion and projection at once. float32 (``ieee`` or ``tf32`` products), float16 or bfloat16; b
may be float32. Sums are float32, rounded once. Rejected: GPUs before sm_90, rows of no multiple of
16 bytes, other layouts, ``out`` over an input (except exactly over the residual). Method: tiles by
tensor descriptors into shared memory, as in Triton's persistent matmul tutorial.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    await_producers,
    check_out_memory,
    check_precision,
    check_shape,
    check_vector,
    dot,
    launch,
    needs_int64,
    product_precision,
    relu_keeping_nan,
    rounded,
)
from ._config import BARRIER_BYTES, ProblemSize, TileConfig, gpu_of, select_config
from ._gpu import BYTES, Gpu
from ._tma import check_aligned, check_rows, check_tma, descriptor, fits_descriptor
from .conv import math_mode_of


@dataclass(frozen=True, slots=True)
class GemmConfig(TileConfig):
    """A tile; ``persistent`` programs take one after the other, reading ahead."""

    persistent: bool = False

    @property
    def can_split_k(self) -> bool:
        return False

    def shared_bytes(self, math_mode: str, gpu: Gpu) -> int:
        """Upper bound: operand buffers and, where they are in use while a tile is written, the
        part of the output and of the residual that is in transit."""
        operands = self.operand_bytes(math_mode, True, gpu)
        part = self.block_m * self.block_n * BYTES[math_mode] // self.parts
        kept = operands + 2 * part if self.persistent else max(operands, part)
        return kept + BARRIER_BYTES


CONFIGS: dict[str, tuple[GemmConfig, ...]] = {
    "half": (
        GemmConfig(128, 256, 64, 8, 3),
        GemmConfig(128, 256, 64, 8, 3, persistent=True),
        GemmConfig(256, 128, 64, 8, 3),
        GemmConfig(256, 128, 64, 8, 3, persistent=True),
        GemmConfig(128, 128, 64, 8, 4),
        GemmConfig(128, 128, 64, 8, 4, persistent=True),
        GemmConfig(128, 128, 64, 4, 4),
        GemmConfig(256, 64, 64, 8, 4),
        GemmConfig(128, 64, 64, 4, 4),
        GemmConfig(128, 64, 64, 4, 4, persistent=True),
        GemmConfig(64, 256, 64, 4, 4),
        GemmConfig(64, 128, 64, 4, 4),
        GemmConfig(64, 64, 64, 4, 4),
        GemmConfig(64, 32, 64, 4, 5),
    ),
    "tf32": (
        GemmConfig(128, 128, 32, 8, 4),
        GemmConfig(128, 64, 32, 4, 4),
        GemmConfig(64, 64, 32, 4, 4),
    ),
    "ieee": (
        GemmConfig(128, 64, 16, 8, 3),
        GemmConfig(64, 32, 16, 4, 3),
    ),
}
"""Tiles by arithmetic: float16 and bfloat16, float32 as TF32, float32 in full."""


@triton.jit
def write_tile(
    acc,  # [BM, BN]
    b_ptr,
    residual,
    y,
    m0,
    n0,
    K,
    RELU: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Bias, residual, ReLU and the store, in ``PARTS`` of the columns, which share the memory that
    the tile passes through."""
    if PARTS > 1:
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(acc.reshape(acc.shape[0], 2, HALF).permute(0, 2, 1))
        write_tile(left, b_ptr, residual, y, m0, n0, K, RELU, PARTS // 2)
        write_tile(right, b_ptr, residual, y, m0, n0 + HALF, K, RELU, PARTS // 2)
    else:
        if b_ptr is not None:
            n = n0 + tl.arange(0, acc.shape[1])
            acc += tl.load(b_ptr + n, mask=n < K, other=0.0).to(tl.float32)[None, :]
        if residual is not None:
            acc += residual.load([m0, n0]).to(tl.float32)
        if RELU:
            acc = relu_keeping_nan(acc)
        y.store([m0, n0], rounded(acc, y.dtype))


@triton.jit
def _products(
    x,  # descriptor of [M, C], tiles [BM, BK]
    w,  # descriptor of [K, C], tiles [BN, BK]
    x2,  # likewise of [M, C2], or a pointer where STRIDE > 1, or None
    w2,
    m0,
    n0,
    M,
    C,
    C2,
    P,  # of the output images
    Q,
    H,  # of the images x2
    W,
    INNER,  # neighbouring rows that belong to one pixel
    STRIDE: tl.constexpr,
    EVEN_C2: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tl.assume(C > 0)  # a loop that may not run serialises the products
    for k in tl.range(0, C, BLOCK_K):
        acc = dot(x.load([m0, k]), w.load([n0, k]).T, acc, PRECISION)
    if x2 is not None:
        tl.assume(C2 > 0)
        if STRIDE == 1:
            for k in tl.range(0, C2, BLOCK_K):
                acc = dot(x2.load([m0, k]), w2.load([n0, k]).T, acc, PRECISION)
        else:
            m = m0 + tl.arange(0, BLOCK_M)
            m = tl.where(m < M, m, 0)  # rows past the end repeat the first and are not stored
            pixel = m // INNER
            row = pixel // (P * Q) * H + pixel // Q % P * STRIDE
            row = (row * W + pixel % Q * STRIDE) * INNER + m % INNER
            if INT64:
                row = row.to(tl.int64)
            c = tl.arange(0, BLOCK_K)
            for k in tl.range(0, C2, BLOCK_K):
                c_ok = tl.full((BLOCK_K,), True, tl.int1)
                start = k + c
                if not EVEN_C2:
                    c_ok = start < C2
                    start = start % C2  # masked addresses stay inside too
                a = tl.load(x2 + row[:, None] * C2 + start[None, :], mask=c_ok[None, :], other=0.0)
                acc = dot(a, w2.load([n0, k]).T, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["M", "P", "Q", "H", "W", "INNER"])
def gemm_kernel(
    x,  # descriptor of [M, C], tiles [BLOCK_M, BLOCK_K]
    w,  # descriptor of [K, C], tiles [BLOCK_N, BLOCK_K]
    b_ptr,  # [K] or None
    residual,  # descriptor of [M, K], tiles [BLOCK_M, BLOCK_N / PARTS], or None
    y,  # likewise
    x2,  # None, descriptor of [M, C2], or where STRIDE > 1 a pointer to [M2, C2]
    w2,  # None, or descriptor of [K, C2], tiles [BLOCK_N, BLOCK_K]
    M,
    K,
    C,
    C2,
    P,
    Q,
    H,
    W,
    INNER,
    STRIDE: tl.constexpr,
    EVEN_C2: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    await_producers(PDL)
    # Neighbouring programs share rows of x: output channels run fastest.
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    if PERSISTENT:
        tiles = tiles_n * tl.cdiv(M, BLOCK_M)
        for tile in tl.range(pid, tiles, tl.num_programs(0), flatten=True):
            m0 = tile // tiles_n * BLOCK_M
            n0 = tile % tiles_n * BLOCK_N
            acc = _products(
                x, w, x2, w2, m0, n0, M, C, C2, P, Q, H, W, INNER, STRIDE, EVEN_C2, INT64,
                PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            write_tile(acc, b_ptr, residual, y, m0, n0, K, RELU, PARTS)
    else:
        m0 = pid // tiles_n * BLOCK_M
        n0 = pid % tiles_n * BLOCK_N
        acc = _products(
            x, w, x2, w2, m0, n0, M, C, C2, P, Q, H, W, INNER, STRIDE, EVEN_C2, INT64,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        write_tile(acc, b_ptr, residual, y, m0, n0, K, RELU, PARTS)


def rows_of(x: Tensor) -> Tensor:
    """The pixels of channels_last images (N, C, H, W) as rows (N * H * W, C); a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def gemm_ref(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    upcast: bool = False,
) -> Tensor:
    """The same in plain PyTorch, rounded after each step; in float64 throughout with ``upcast``."""
    dtype = torch.float64 if upcast else x.dtype
    y = F.linear(x.to(dtype), w.to(dtype), None if b is None else b.to(dtype))
    if residual is not None:
        y = y + residual.to(dtype)
    return y.relu() if relu else y


def dual_gemm_ref(
    x: Tensor,
    w: Tensor,
    x2: Tensor,
    w2: Tensor,
    b: Tensor | None = None,
    *,
    images: Sequence[int] | None = None,
    stride: int = 1,
    relu: bool = False,
    upcast: bool = False,
) -> Tensor:
    """The same in plain PyTorch, rounded after each step; in float64 throughout with ``upcast``."""
    if images is not None:
        outer, height, width, inner = images
        pixels = x2.view(outer, height, width, inner, -1)[:, ::stride, ::stride]
        x2 = pixels.reshape(-1, x2.shape[1])
    shortcut = gemm_ref(x2, w2, upcast=upcast)
    return gemm_ref(x, w, b, residual=shortcut, relu=relu, upcast=upcast)


def supports(channels: int, outputs: int, dtype: torch.dtype) -> bool:
    """Whether rows of so many channels and outputs can be moved by TMA (of a GPU
    that has it, see ``_tma.has_tma``)."""
    return fits_descriptor(channels, dtype) and fits_descriptor(outputs, dtype)


def _check(
    x: Tensor, w: Tensor, b: Tensor | None, residual: Tensor | None, precision: str
) -> tuple[int, int]:
    """Refuse what the kernel does not take; otherwise the shape of the output."""
    check_rows("x", x, x)
    check_rows("w", w, x)
    if not x.shape[1]:
        raise ValueError(f"x must have channels, got shape {tuple(x.shape)}")
    check_shape("w", w, (w.shape[0], x.shape[1]))
    if not fits_descriptor(w.shape[0], w.dtype):
        raise ValueError(f"w must make rows of a multiple of 16 bytes, got {w.shape[0]} outputs")
    if b is not None:
        check_vector("b", b, w.shape[0], x)
    shape = (x.shape[0], w.shape[0])
    if residual is not None:
        check_rows("residual", residual, x)
        check_shape("residual", residual, shape)
    check_precision(precision)
    return shape


def _check_pair(
    x: Tensor, x2: Tensor, w2: Tensor, outputs: int, images: Sequence[int] | None, stride: int
) -> tuple[int, int, int, int]:
    """Refuse what the second product does not take; otherwise the sizes of its images."""
    check_rows("x2", x2, x)
    check_rows("w2", w2, x)
    if not x2.shape[1]:
        raise ValueError(f"x2 must have channels, got shape {tuple(x2.shape)}")
    check_shape("w2", w2, (outputs, x2.shape[1]))
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if images is None:
        if stride > 1:
            raise ValueError("a stride above 1 needs images=(outer, height, width, inner)")
        images = (1, 1, 1, x2.shape[0])
    if len(images) != 4:
        raise ValueError(f"images must be (outer, height, width, inner), got {images!r}")
    outer, height, width, inner = images
    if x2.shape[0] != outer * height * width * inner:
        raise ValueError(f"x2 has {x2.shape[0]} rows, images of {tuple(images)} have other many")
    rows = outer * triton.cdiv(height, stride) * triton.cdiv(width, stride) * inner
    if x.shape[0] != rows:
        raise ValueError(
            f"x has {x.shape[0]} rows; images of {tuple(images)} and stride {stride} want {rows}"
        )
    return outer, height, width, inner


@lru_cache(maxsize=4096)
def _select(problem: ProblemSize, math_mode: str, persistent: bool, gpu: Gpu) -> GemmConfig:
    rows = [config for config in CONFIGS[math_mode] if persistent or not config.persistent]
    config = select_config(rows, problem, math_mode, gpu)
    assert isinstance(config, GemmConfig)
    return config


def _run(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    residual: Tensor | None,
    x2: Tensor | None,
    w2: Tensor | None,
    images: tuple[int, int, int, int],
    stride: int,
    relu: bool,
    precision: str,
    out: Tensor | None,
    config: GemmConfig | None,
) -> Tensor:
    check_tma(x)
    shape = x.shape[0], w.shape[0]
    if out is None:
        out = x.new_empty(shape)
    else:
        check_rows("out", out, x)
        check_shape("out", out, shape)
        apart = {"x": x, "w": w, "b": b, "x2": x2, "w2": w2}
        check_out_memory(out, apart=apart, same={"residual": residual})
    if not out.numel():
        return out
    check_aligned(x=x, w=w, residual=residual, x2=x2, w2=w2, out=out)

    rows, outputs = shape
    channels2 = 0 if x2 is None else x2.shape[1]
    problem = ProblemSize(rows, outputs, x.shape[1] + channels2, 1, 1, x.element_size())
    if config is None:
        config = _select(problem, math_mode_of(x.dtype, precision), x2 is None, gpu_of(x.device))
    elif config.persistent and x2 is not None:
        raise ValueError("config must not be persistent for a pair of products")
    bm, bn, bk, parts = config.block_m, config.block_n, config.block_k, config.parts
    tiles = problem.tiles(config)
    second = x2
    if x2 is not None and stride == 1:
        second = descriptor(x2, bm, bk)
    launch(
        gemm_kernel,
        min(tiles, gpu_of(x.device).sms) if config.persistent else tiles,
        x.device,
        descriptor(x, bm, bk),
        descriptor(w, bn, bk),
        b,
        None if residual is None else descriptor(residual, bm, bn // parts),
        descriptor(out, bm, bn // parts),
        second,
        None if w2 is None else descriptor(w2, bn, bk),
        rows,
        outputs,
        x.shape[1],
        channels2,
        triton.cdiv(images[1], stride),
        triton.cdiv(images[2], stride),
        images[1],
        images[2],
        images[3],
        STRIDE=stride,
        EVEN_C2=channels2 % bk == 0,
        RELU=relu,
        PRECISION=product_precision(x.dtype, precision),
        INT64=needs_int64(x2),
        PERSISTENT=config.persistent,
        BLOCK_M=bm,
        BLOCK_N=bn,
        BLOCK_K=bk,
        PARTS=parts,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def gemm(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    precision: str = "ieee",
    out: Tensor | None = None,
    config: GemmConfig | None = None,
) -> Tensor:
    """``relu(x @ w.T + b + residual)`` in one kernel.

    Args:
        x: (M, C), contiguous, float32, float16 or bfloat16; images by :func:`rows_of`.
        w: (K, C), contiguous, of x's dtype.
        b: (K,), float32 or x's dtype.
        residual: (M, K), contiguous, of x's dtype; added before the ReLU.
        precision: products of float32: ``"ieee"`` in full, ``"tf32"`` on tensor cores.
        out: where to write; may be ``residual`` itself, since each program reads its tile of the
            residual before it writes that tile, and no other program touches it.
        config: the tile to use instead of the selected one.

    Returns:
        (M, K) of x's dtype. No rows launch nothing.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not what is wanted (named in the text).
    """
    _check(x, w, b, residual, precision)
    images = (1, 1, 1, x.shape[0])
    return _run(x, w, b, residual, None, None, images, 1, relu, precision, out, config)


def dual_gemm(
    x: Tensor,
    w: Tensor,
    x2: Tensor,
    w2: Tensor,
    b: Tensor | None = None,
    *,
    images: Sequence[int] | None = None,
    stride: int = 1,
    relu: bool = False,
    precision: str = "ieee",
    out: Tensor | None = None,
    config: GemmConfig | None = None,
) -> Tensor:
    """``relu(x @ w.T + x2[rows] @ w2.T + b)`` in one kernel: a block's expansion and projection.

    Args:
        x2: (M2, C2), contiguous, of x's dtype: images of which every ``stride``-th pixel counts.
        w2: (K, C2), contiguous, of x's dtype.
        images: (outer, height, width, inner), the sizes of x2's images: (N, H, W, 1) for NHWC
            memory, (1, H, W, N) for HWNC. Only a stride above 1 needs them.
        config: a tile that is not persistent.

    The rest is as for :func:`gemm`.
    """
    shape = _check(x, w, b, None, precision)
    sizes = _check_pair(x, x2, w2, shape[1], images, stride)
    return _run(x, w, b, None, x2, w2, sizes, stride, relu, precision, out, config)
