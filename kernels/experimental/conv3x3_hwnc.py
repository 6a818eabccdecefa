"""3x3 convolution of 64 channels in the layout [H, W, N, C], whose sums slide along the rows.

    y[p, q, n, k] = relu(sum_{r, s, c} x[p + r - 1, q + s - 1, n, c] * w[k, r, s, c]
                         + b[k] + residual[p, q, n, k])

A program keeps the weights in shared memory and walks with a tile of images along one row of
outputs. A column of three input pixels is loaded once and multiplied into the sums of the three
outputs that it belongs to; the sum that is then complete is written while the products of the other
two run, and a new one takes its place. So an input pixel comes from L2 three times instead of nine,
and from shared memory once for three products. Pixels outside the image are read as zero, and
outputs outside of it are not written: both by TMA.

float16 or bfloat16, summed in float32, rounded once. It is written in Gluon, because Triton waits
for each product where several sums take turns; it needs the warpgroup products of sm_90, and
``conv2d_hwnc`` is its launcher and its checks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .._common import await_producers, capability, host, launch, relu_keeping_nan
from .._gpu import Gpu

# Triton 3.7 and later have other names for the same.
copy_in: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_out: Any = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

CHANNELS = 64  # read, and written by one program
_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@dataclass(frozen=True, slots=True)
class Conv3x3Config:
    """Images of a tile, warps (four for every 64 images), columns of pixels loaded ahead."""

    images: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        if self.images not in (64, 128) or self.num_warps != self.images // 16:
            raise ValueError(
                f"images must be 64 or 128 and num_warps a sixteenth of it, "
                f"got {self.images} and {self.num_warps}"
            )
        if not 1 <= self.num_stages <= 3:  # no row has fewer columns to visit
            raise ValueError(f"num_stages must be 1 to 3, got {self.num_stages}")

    def shared_bytes(self) -> int:
        """Shared memory of a block with a residual: weights, columns, two outputs, barriers."""
        pixels = 3 * self.num_stages + 2
        return 2 * CHANNELS * (9 * CHANNELS + pixels * self.images) + 8 * (self.num_stages + 2)


CONFIGS: tuple[Conv3x3Config, ...] = (
    Conv3x3Config(64, 4, 1),
    Conv3x3Config(128, 8, 2),
)
"""The first leaves room for two blocks on an SM, which hide each other's waiting."""

_START = 4000  # cycles to bring the weights
_TURN = 600  # cycles between the last product of a column and the first of the next


def estimated_cycles(config: Conv3x3Config, size: tuple[int, int, int, int], gpu: Gpu) -> float:
    """Cycles for outputs of size (P, Q, N, K) with this row."""
    p, q, n, k = size
    programs = p * ceil(n / config.images) * ceil(k / CHANNELS)
    resident = max(1, gpu.shared_limit // config.shared_bytes())
    here = min(resident, ceil(programs / gpu.sms))
    products = 9 * CHANNELS * CHANNELS * config.images / gpu.matrix
    traffic = 3 * CHANNELS * 2 * config.images / gpu.l2_bandwidth(min(programs, gpu.sms))
    column = max(here * products, here * traffic, products + _TURN)
    return ceil(programs / (gpu.sms * resident)) * (columns_of(q) * column + _START)


def select_config(
    rows: Iterable[Conv3x3Config], size: tuple[int, int, int, int], gpu: Gpu
) -> Conv3x3Config:
    """The row of least estimated cycles; the first of equals."""
    return min(rows, key=lambda config: estimated_cycles(config, size, gpu))


def supports(
    channels: int, window: Sequence[int], stride: int, padding: int, dtype: torch.dtype
) -> bool:
    """Whether the kernel is for such convolutions."""
    return (channels, tuple(window), stride, padding) == (CHANNELS, (3, 3), 1, 1) and (
        dtype in _DTYPES
    )


def runs_on(device: torch.device) -> bool:
    """Whether the GPU has warpgroup products: sm_90 alone. The interpreter does not know Gluon,
    and with Triton 3.9 each product waits for the one before (ptxas warns C7512)."""
    if (stand_in := host(device)) is not None and not stand_in.gluon:
        return False
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
        return False
    return capability(device)[0] == 9


def columns_of(width: int) -> int:
    """Columns that a program visits: one past the row, rounded up to full turns of three sums."""
    return ceil((width + 1) / 3) * 3


@gluon.jit
def load_column(x, ring, ready, p, q, n0, N, IMAGES: gl.constexpr, STAGES: gl.constexpr) -> None:
    """Ask for the input pixels of column ``q`` in the rows p - 1 to p + 1."""
    slot = q % STAGES
    barrier = ready.index(slot)
    mbarrier.expect(barrier, 3 * IMAGES * 64 * 2)
    for r in gl.static_range(3):
        pixel = ring.index(slot * 3 + r)
        copy_in(x, [p + r - 1, q * N + n0, 0], barrier, pixel)


@gluon.jit
def unknown_zero(q) -> Any:
    """0 for every column, but the compiler cannot tell. In an index of the weights it keeps the
    descriptors of so many fixed tiles, two registers each, from being held through the loop."""
    return q // 1048576


@gluon.jit
def add_products(a0, a1, a2, weights, acc, zero, s: gl.constexpr, FIRST: gl.constexpr) -> Any:
    """``acc`` plus the three rows' pixels times the weights of the window's column ``s``."""
    first = weights.index(zero + s).permute((1, 0))
    acc = warpgroup_mma(a0, first, acc, use_acc=not FIRST, is_async=True)
    acc = warpgroup_mma(a1, weights.index(zero + 3 + s).permute((1, 0)), acc, is_async=True)
    return warpgroup_mma(a2, weights.index(zero + 6 + s).permute((1, 0)), acc, is_async=True)


@gluon.jit
def _visit(
    x,
    residual,
    y,
    ring,
    ready,
    weights,
    shortcut,
    result,
    bias,
    left,  # sums of outputs q - 1, q and q + 1, [IMAGES, 64]
    middle,
    right,
    p,
    q,
    n0,
    k0,
    N,
    columns,
    RELU: gl.constexpr,
    IMAGES: gl.constexpr,
    STAGES: gl.constexpr,
    SUM: gl.constexpr,
):
    """Use column ``q`` for the three outputs around it and write the left one."""
    slot = q % STAGES
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUM, 2)
    mbarrier.wait(ready.index(slot), q // STAGES % 2)
    a0 = ring.index(slot * 3).reshape([IMAGES, 64]).load(OPERAND)
    a1 = ring.index(slot * 3 + 1).reshape([IMAGES, 64]).load(OPERAND)
    a2 = ring.index(slot * 3 + 2).reshape([IMAGES, 64]).load(OPERAND)
    if q + STAGES < columns:
        load_column(x, ring, ready, p, q + STAGES, n0, N, IMAGES, STAGES)

    zero = unknown_zero(q)
    left = add_products(a0, a1, a2, weights, left, zero, 2, False)
    middle = add_products(a0, a1, a2, weights, middle, zero, 1, False)
    right = add_products(a0, a1, a2, weights, right, zero, 0, True)

    left = warpgroup_mma_wait(6, deps=(left,))
    value = left
    if bias is not None:
        value += bias[None, :]
    if residual is not None:
        mbarrier.wait(ready.index(STAGES + 1), q % 2)
        value += shortcut.reshape([IMAGES, 64]).load(SUM).to(gl.float32)
        if q + 1 < columns:
            _load_shortcut(residual, shortcut, ready.index(STAGES + 1), p, q, n0, k0, IMAGES)
    if RELU:
        value = relu_keeping_nan(value)
    tma.store_wait(0)
    result.store(value.to(y.dtype).reshape([1, 1, IMAGES, 64]))
    fence_async_shared()
    copy_out(y, [p, q - 1, n0, k0], result)
    return warpgroup_mma_wait(0, deps=(left, middle, right, a0, a1, a2))


@gluon.jit
def _load_shortcut(residual, shortcut, barrier, p, q, n0, k0, IMAGES: gl.constexpr):
    """Ask for what is added to the output at (p, q)."""
    mbarrier.expect(barrier, IMAGES * 64 * 2)
    copy_in(residual, [p, q, n0, k0], barrier, shortcut)


@gluon.jit(do_not_specialize=["N", "H", "columns"])
def conv3x3_hwnc_kernel(
    x,  # descriptor of [H, W * N, 64], boxes [1, IMAGES, 64]
    w,  # descriptor of [K, 9 * 64], boxes [64, 64]
    b_ptr,  # [K] or None
    residual,  # descriptor of [H, W, N, K], boxes [1, 1, IMAGES, 64], or None
    y,  # likewise
    N,
    H,
    K,
    columns,
    RELU: gl.constexpr,
    IMAGES: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr = False,
) -> None:
    await_producers(PDL)
    # Rows of pixels run fastest, so that neighbours in time find each other's inputs in L2.
    tiles_k = gl.cdiv(K, 64)
    tile = gl.program_id(0) // tiles_k
    k0 = gl.program_id(0) % tiles_k * 64
    p = tile % H
    n0 = tile // H * IMAGES

    weights = gl.allocate_shared_memory(w.dtype, [9, 64, 64], w.layout)
    ring = gl.allocate_shared_memory(x.dtype, [3 * STAGES, 1, IMAGES, 64], x.layout)
    result = gl.allocate_shared_memory(y.dtype, [1, 1, IMAGES, 64], y.layout)
    shortcut = None
    if residual is not None:
        shortcut = gl.allocate_shared_memory(y.dtype, [1, 1, IMAGES, 64], y.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES + 2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES + 2):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    mbarrier.expect(ready.index(STAGES), 9 * 64 * 64 * 2)
    for tap in gl.static_range(9):
        copy_in(w, [k0, tap * 64], ready.index(STAGES), weights.index(tap))
    for q in gl.static_range(STAGES):
        load_column(x, ring, ready, p, q, n0, N, IMAGES, STAGES)
    if residual is not None:
        _load_shortcut(residual, shortcut, ready.index(STAGES + 1), p, -1, n0, k0, IMAGES)

    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 64, 16])
    bias = None
    if b_ptr is not None:
        k = k0 + gl.arange(0, 64, gl.SliceLayout(0, SUM))
        bias = gl.load(b_ptr + k, mask=k < K, other=0.0).to(gl.float32)
    a = gl.zeros((IMAGES, 64), gl.float32, SUM)
    b = a
    c = a
    mbarrier.wait(ready.index(STAGES), 0)
    # fmt: off
    for q in range(0, columns, 3):  # the three sums change roles, and no register moves
        a, b, c, _0, _1, _2 = _visit(
            x, residual, y, ring, ready, weights, shortcut, result, bias, a, b, c,
            p, q, n0, k0, N, columns, RELU, IMAGES, STAGES, SUM,
        )
        b, c, a, _0, _1, _2 = _visit(
            x, residual, y, ring, ready, weights, shortcut, result, bias, b, c, a,
            p, q + 1, n0, k0, N, columns, RELU, IMAGES, STAGES, SUM,
        )
        c, a, b, _0, _1, _2 = _visit(
            x, residual, y, ring, ready, weights, shortcut, result, bias, c, a, b,
            p, q + 2, n0, k0, N, columns, RELU, IMAGES, STAGES, SUM,
        )
    # fmt: on
    tma.store_wait(0)


def run(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    relu: bool,
    config: Conv3x3Config,
) -> None:
    """Launch the kernel on arguments that ``conv2d_hwnc`` has checked."""
    height, width, batch, outputs = out.shape
    launch(
        conv3x3_hwnc_kernel,
        height * ceil(batch / config.images) * ceil(outputs / CHANNELS),
        x.device,
        descriptor(x.view(height, -1, CHANNELS), 1, config.images, CHANNELS),
        descriptor(w.permute(0, 2, 3, 1).reshape(outputs, -1), CHANNELS, CHANNELS),
        b,
        None if residual is None else descriptor(residual, 1, 1, config.images, CHANNELS),
        descriptor(out, 1, 1, config.images, CHANNELS),
        batch,
        height,
        outputs,
        columns_of(width),
        RELU=relu,
        IMAGES=config.images,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )


def descriptor(t: Tensor, *block: int) -> TensorDescriptor:
    """A descriptor of a dense tensor that moves boxes of shape ``block``."""
    layout = gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[t.dtype])
    return TensorDescriptor.from_tensor(t, list(block), layout)
