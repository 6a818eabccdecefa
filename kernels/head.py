"""The head of a ResNet in one kernel: global average pooling and the classifier.

    y[n, k] = sum_c mean over pixels of x[n, c, :, :] * w[k, c] + b[k]

x (N, C, H, W) is dense NHWC (``channels_last``), w (K, C) and y (N, K) row-major; float32,
float16 or bfloat16, b may be float32. Sums are float32; a mean is rounded once and that rounded
value is multiplied. Rejected: other layouts and dtypes, images without pixels, ``out`` over an
input. Method: programs share the channels, so that a small batch fills the GPU, and the last to
arrive adds up their partial sums in a fixed order (conv.py's split reduction). Each tile of
outputs pools anew, which large batches pay for: beyond about 32 images pool and multiply apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    await_producers,
    check_contiguous,
    check_device,
    check_like,
    check_out_memory,
    check_precision,
    check_shape,
    check_tensor,
    check_vector,
    dot,
    launch,
    needs_int64,
    product_precision,
    rounded,
    store_rounded,
)
from ._config import gpu_of, split_elements
from ._gpu import Gpu
from ._split_k import WORKSPACE_COUNTS, split_workspace, sum_split_k
from .global_pool import global_avg_pool_ref
from .linear import linear_ref
from .pool import check_image


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """A program makes ``block_n`` outputs of ``block_m`` images from its part, of ``split_k``, of
    the channels; it reads ``block_p`` pixels of ``block_c`` channels at a time."""

    block_m: int
    block_n: int
    block_c: int
    block_p: int
    split_k: int
    num_warps: int


CONFIGS: tuple[HeadConfig, ...] = (
    HeadConfig(1, 128, 64, 32, 16, 8),
    HeadConfig(1, 64, 64, 32, 8, 8),
    HeadConfig(1, 32, 64, 32, 4, 4),
    HeadConfig(16, 64, 64, 8, 8, 8),
    HeadConfig(16, 128, 64, 8, 16, 8),
    HeadConfig(16, 256, 64, 8, 16, 8),
    HeadConfig(16, 256, 64, 8, 4, 8),
    HeadConfig(16, 256, 64, 8, 1, 8),
)


@triton.jit
def _pixel_sums(x_ptr, image, n_ok, c, c_ok, PIXELS, C, BLOCK_P: tl.constexpr):
    """Sums over the pixels of the images [BM] and channels [BC]; threads meet once, at the end."""
    if image.shape[0] == 1:  # a plane of two dimensions, which agrees with the weights' layout
        first = x_ptr + tl.sum(image) * PIXELS * C
        plane = tl.zeros((BLOCK_P, c.shape[0]), tl.float32)
        for p0 in range(0, PIXELS, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            row = tl.where(p < PIXELS, p, 0).to(image.dtype)  # [BP]
            ok = (p < PIXELS)[:, None] & c_ok[None, :]
            x = tl.load(first + (row[:, None] * C + c[None, :]), mask=ok, other=0.0)
            plane += x.to(tl.float32)
        return tl.sum(plane, axis=0)[None, :]
    total = tl.zeros((image.shape[0], BLOCK_P, c.shape[0]), tl.float32)
    for p0 in range(0, PIXELS, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        row = image[:, None] * PIXELS + tl.where(p < PIXELS, p, 0)[None, :]  # [BM, BP]
        ok = n_ok[:, None, None] & (p < PIXELS)[None, :, None] & c_ok[None, None, :]
        x = tl.load(x_ptr + row[:, :, None] * C + c[None, None, :], mask=ok, other=0.0)
        total += x.to(tl.float32)
    return tl.sum(total, axis=1)


@triton.jit(do_not_specialize=["N", "PIXELS", "SPLIT_K"])
def head_kernel(
    x_ptr,  # [N, PIXELS, C]
    w_ptr,  # [K, C]
    b_ptr,  # [K] or None
    y_ptr,  # [N, K]
    workspace_ptr,  # as conv.py's, None without splits
    N,
    PIXELS,
    C,
    K,
    SPLIT_K,  # programs that share the reduction of a tile
    EVEN_C: tl.constexpr,  # C is a multiple of BLOCK_C
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    await_producers(PDL)
    # Programs that read the same images run together: outputs run faster than images.
    tiles_n = tl.cdiv(K, BLOCK_N)
    split = tl.program_id(0) % SPLIT_K
    tile = tl.program_id(0) // SPLIT_K
    n = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < N
    k_ok = k < K
    # Clamped as well as masked, and rows past the end repeat the first.
    image = tl.where(n_ok, n, 0)
    if INT64:
        image = image.to(tl.int64)
    output = tl.where(k_ok, k, 0)

    steps = tl.cdiv(C, BLOCK_C)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(split * steps // SPLIT_K, (split + 1) * steps // SPLIT_K):
        c = step * BLOCK_C + tl.arange(0, BLOCK_C)
        c_ok = tl.full((BLOCK_C,), True, tl.int1)
        if not EVEN_C:
            c_ok = c < C
            c = c % C
        w_offset = output[:, None] * C + c[None, :]
        w = tl.load(w_ptr + w_offset, mask=c_ok[None, :], other=0.0)  # [BN, BC]
        total = _pixel_sums(x_ptr, image, n_ok, c, c_ok, PIXELS, C, BLOCK_P)  # [BM, BC]
        mean = tl.div_rn(total, tl.broadcast_to(PIXELS.to(tl.float32), total.shape))
        mean = rounded(mean, x_ptr.dtype.element_ty)
        if BLOCK_M == 1:  # too few rows for a matrix product
            acc += tl.sum(w.to(tl.float32) * mean.to(tl.float32), axis=1)[None, :]
        else:
            acc = dot(mean, w.T, acc, PRECISION)

    last = True
    if workspace_ptr is not None:
        acc, last = sum_split_k(acc, workspace_ptr, tile, split, SPLIT_K)
    if last:
        if b_ptr is not None:
            acc += tl.load(b_ptr + k, mask=k_ok, other=0.0).to(tl.float32)[None, :]
        y_offset = image[:, None] * K + k[None, :]
        store_rounded(y_ptr + y_offset, acc, n_ok[:, None] & k_ok[None, :])


def head_ref(x: Tensor, w: Tensor, b: Tensor | None = None, *, upcast: bool = False) -> Tensor:
    """The same in plain PyTorch, rounded after each step; with ``upcast`` in float64, but for the
    means, which are rounded before they are multiplied, as in the kernel."""
    mean = global_avg_pool_ref(x, upcast=upcast).flatten(1).to(x.dtype)
    return linear_ref(mean, w, b, upcast=upcast)


@dataclass(frozen=True, slots=True)
class _ProblemSize:
    batch: int
    outputs: int
    channels: int
    pixels: int
    itemsize: int

    def tiles(self, config: HeadConfig) -> int:
        return ceil(self.batch / config.block_m) * ceil(self.outputs / config.block_n)


_LATENCY = 1500  # cycles of a program that are spent waiting
_SPLIT_OVERHEAD = 2500  # cycles to publish partial sums and to find them


def estimated_cycles(config: HeadConfig, problem: _ProblemSize, gpu: Gpu) -> float:
    """Cycles for the whole head: waves of programs that read images and weights from L2."""
    part = problem.channels / config.split_k
    images = min(config.block_m, problem.batch)
    moved = (images * problem.pixels + config.block_n) * part * problem.itemsize
    waves = ceil(problem.tiles(config) * config.split_k / gpu.sms)
    overhead = _LATENCY + (_SPLIT_OVERHEAD if config.split_k > 1 else 0)
    return waves * moved / gpu.l2 + overhead


def _can_split_k(config: HeadConfig, problem: _ProblemSize, gpu: Gpu) -> bool:
    """Whether the partial sums fit the workspace that every launch may share."""
    programs = problem.tiles(config) * config.split_k
    few = problem.tiles(config) <= WORKSPACE_COUNTS.value
    return few and programs * config.block_m * config.block_n <= split_elements(gpu)


@lru_cache(maxsize=256)
def select_config(problem: _ProblemSize, gpu: Gpu) -> HeadConfig:
    """The row of least estimated cycles, the first of equals."""
    usable = [r for r in CONFIGS if r.split_k == 1 or _can_split_k(r, problem, gpu)]
    return min(usable, key=lambda config: estimated_cycles(config, problem, gpu))


def _check(x: Tensor, w: Tensor, b: Tensor | None, precision: str) -> tuple[int, int]:
    """Refuse what the kernel does not take; otherwise the shape of the output."""
    check_image(x)
    check_tensor("w", w, 2)
    check_like("w", w, x)
    check_shape("w", w, (w.shape[0], x.shape[1]))
    check_contiguous("w", w)
    if b is not None:
        check_vector("b", b, w.shape[0], x)
    check_precision(precision)
    return x.shape[0], w.shape[0]


def head(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    precision: str = "ieee",
    out: Tensor | None = None,
    config: HeadConfig | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """``linear(global_avg_pool(x), w, b)`` in one kernel.

    Args:
        x: (N, C, H, W), channels_last, float32, float16 or bfloat16.
        w: (K, C), contiguous, of x's dtype.
        b: (K,), float32 or x's dtype.
        precision: products of float32: ``"ieee"`` in full, ``"tf32"`` on tensor cores.
        out: where to write; must not overlap an input.
        config: the row to use instead of the selected one.
        workspace: as for :func:`conv2d`.

    Returns:
        (N, K) of x's dtype. A batch of 0 launches nothing.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not what is wanted (named in the text).
    """
    shape = _check(x, w, b, precision)
    check_device(x)
    if out is None:
        out = x.new_empty(shape)
    else:
        check_tensor("out", out, 2)
        check_like("out", out, x)
        check_shape("out", out, shape)
        check_contiguous("out", out)
        check_out_memory(out, apart={"x": x, "w": w, "b": b}, same={})
    if not out.numel():
        return out
    batch, channels, height, width = x.shape
    problem = _ProblemSize(batch, shape[1], channels, height * width, x.element_size())
    if config is None:
        config = select_config(problem, gpu_of(x.device))
    launch(
        head_kernel,
        problem.tiles(config) * config.split_k,
        x.device,
        x,
        w,
        b,
        out,
        split_workspace(
            workspace,
            problem.tiles(config),
            config.split_k,
            config.block_m * config.block_n,
            x.device,
        ),
        batch,
        height * width,
        channels,
        shape[1],
        config.split_k,
        EVEN_C=channels % config.block_c == 0,
        PRECISION=product_precision(x.dtype, precision),
        INT64=needs_int64(x),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_C=config.block_c,
        BLOCK_P=config.block_p,
        num_warps=config.num_warps,
    )
    return out
