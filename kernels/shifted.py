"""The shifted block in one kernel: 3x3 convolution, expansion with residual, next reduction.

    mid = relu(conv3x3(t, w2) + b2)                    x_next = relu(mid @ w3^T + b3 + x)
    t_next = relu(x_next @ w1^T + b1)                  (left out without w1)

t (N, C, H, W), w2 (C', C, 3, 3), x and x_next (N, E, P, Q) and t_next (N, R, P, Q) are dense NHWC
(``channels_last``), w3 (E, C') and w1 (R, E) row-major; padding 1, stride 1 or 2. float32 (``ieee``
or ``tf32`` products), float16 or bfloat16; b2, b3 and b1 may be float32. Sums are float32; mid and
x_next are rounded once and those rounded values are multiplied. Rejected: C, C' and R other than
powers of two from 16 to 512 (C' to 256), E of no multiple of the tile, an output over an input
(except x_next exactly over x). Method: the boundary between kernels lies on the narrow tensor, so
the halo of the 3x3 is narrow and nothing is computed twice; rot2.py's back-to-back products follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    await_producers,
    check_activation,
    check_channels_last,
    check_device,
    check_like,
    check_matrix,
    check_out_memory,
    check_precision,
    check_shape,
    check_tensor,
    check_vector,
    dot,
    launch,
    needs_int64,
    relu_keeping_nan,
    rounded,
    window_count,
)
from ._config import MULTIPLY_ADDS, Machine, machine_of
from .conv import arithmetic, conv2d_ref


@dataclass(frozen=True, slots=True)
class ShiftedConfig:
    """``block_m`` pixels a program; ``block_k`` channels of a tap and ``block_n`` channels of the
    wide activation at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, channels: int, middle: int, reduced: int, itemsize: int) -> int:
        """Upper bound of a block's shared memory: that of the taps or that of the products."""
        taps = (self.block_m + middle) * min(self.block_k, channels) * self.num_stages
        weights = self.block_n * (middle + reduced) * self.num_stages
        kept = self.block_m * (middle + self.block_n)
        return itemsize * max(taps, weights + kept)

    def registers(self, middle: int, reduced: int) -> int:
        """Accumulators of a thread, in the larger of the two phases."""
        return self.block_m * max(middle, self.block_n + reduced) // (32 * self.num_warps)


CONFIGS: dict[str, tuple[ShiftedConfig, ...]] = {
    "half": (
        ShiftedConfig(128, 64, 32, 8, 3),
        ShiftedConfig(128, 64, 64, 8, 2),
        ShiftedConfig(128, 32, 64, 8, 3),
        ShiftedConfig(128, 32, 64, 8, 2),
        ShiftedConfig(64, 64, 64, 4, 3),
        ShiftedConfig(64, 32, 64, 4, 2),
        ShiftedConfig(64, 32, 32, 8, 2),
    ),
    "tf32": (
        ShiftedConfig(64, 32, 32, 8, 2),
        ShiftedConfig(64, 32, 32, 4, 2),
    ),
    "ieee": (ShiftedConfig(16, 16, 32, 4, 2),),
}
"""Tiles by arithmetic. Not every row suits all widths: see :func:`fits`."""


@triton.jit
def _taps(
    t_ptr,
    w_ptr,
    h0,  # [BM] top left of the window
    w0,
    pixel,  # [BM] offset of that pixel
    H,
    W,
    C: tl.constexpr,
    MIDDLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The 3x3 convolution of the tile's pixels, [BM, MIDDLE]."""
    n = tl.arange(0, MIDDLE)
    acc = tl.zeros((h0.shape[0], MIDDLE), tl.float32)
    for step in tl.range(0, 9 * (C // BLOCK_K), num_stages=STAGES):
        # Taps run fastest: their neighbours in t are still in cache.
        tap = step % 9
        r = tap // 3
        s = tap % 3
        c = step // 9 * BLOCK_K + tl.arange(0, BLOCK_K)
        ok = (h0 + r >= 0) & (h0 + r < H) & (w0 + s >= 0) & (w0 + s < W)
        # Clamped as well as masked: a pipelined load may touch masked addresses.
        source = tl.where(ok, pixel + (r * W + s), 0)
        a = tl.load(t_ptr + source[:, None] * C + c[None, :], mask=ok[:, None], other=0.0)
        b = tl.load(w_ptr + n[None, :] * (9 * C) + (tap * C + c)[:, None])  # [BK, MIDDLE]
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q"])
def shifted_block_kernel(
    t_ptr,  # [N, H, W, C]
    w2_ptr,  # [MIDDLE, 3, 3, C]
    b2_ptr,  # [MIDDLE] or None
    w3_ptr,  # [E, MIDDLE]
    b3_ptr,  # [E] or None
    x_ptr,  # [M, E]
    w1_ptr,  # [R, E] or None
    b1_ptr,  # [R] or None
    x_next_ptr,  # [M, E]
    t_next_ptr,  # [M, R] or None
    M,  # N * P * Q
    H,
    W,
    P,
    Q,
    C: tl.constexpr,
    MIDDLE: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    await_producers(PDL)
    m_tile = tl.program_id(0)
    if INT64:
        m_tile = m_tile.to(tl.int64)
        W = W.to(tl.int64)
    m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = m < M
    m = tl.where(m_ok, m, 0)  # rows past the end repeat the first and are not stored
    h0 = m // Q % P * STRIDE - 1
    w0 = m % Q * STRIDE - 1
    pixel = (m // (P * Q) * H + h0) * W + w0
    middle = _taps(
        t_ptr, w2_ptr, h0, w0, pixel, H, W, C, MIDDLE, PRECISION, BLOCK_K, STAGES
    )  # fmt: skip
    k = tl.arange(0, MIDDLE)
    if b2_ptr is not None:
        middle += tl.load(b2_ptr + k).to(tl.float32)[None, :]
    narrow = rounded(relu_keeping_nan(middle), t_ptr.dtype.element_ty)

    if w1_ptr is not None:
        acc = tl.zeros((BLOCK_M, R), tl.float32)
    for n0 in tl.range(0, E, BLOCK_N, num_stages=STAGES):
        n = n0 + tl.arange(0, BLOCK_N)
        w3 = tl.load(w3_ptr + n[None, :] * MIDDLE + k[:, None])  # [MIDDLE, BN]
        wide = dot(narrow, w3, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        if b3_ptr is not None:
            wide += tl.load(b3_ptr + n).to(tl.float32)[None, :]
        offset = m[:, None] * E + n[None, :]
        wide += tl.load(x_ptr + offset).to(tl.float32)
        wide = rounded(relu_keeping_nan(wide), x_ptr.dtype.element_ty)
        tl.store(x_next_ptr + offset, wide, mask=m_ok[:, None])
        if w1_ptr is not None:
            w1 = tl.load(w1_ptr + tl.arange(0, R)[None, :] * E + n[:, None])  # [BN, R]
            acc = dot(wide, w1, acc, PRECISION)
    if w1_ptr is not None:
        r = tl.arange(0, R)
        if b1_ptr is not None:
            acc += tl.load(b1_ptr + r).to(tl.float32)[None, :]
        acc = rounded(relu_keeping_nan(acc), t_ptr.dtype.element_ty)
        tl.store(t_next_ptr + m[:, None] * R + r[None, :], acc, mask=m_ok[:, None])


def shifted_block_ref(
    t: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    x: Tensor,
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    *,
    stride: int = 1,
    upcast: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The same in plain PyTorch, rounded after each step; with ``upcast`` in float64, but for mid
    and x_next, which are rounded before they are multiplied, as in the kernel."""
    middle = conv2d_ref(t, w2, b2, stride=stride, padding=1, relu=True, upcast=upcast).to(t.dtype)
    x_next = conv2d_ref(middle, w3[:, :, None, None], b3, residual=x, relu=True, upcast=upcast)
    if w1 is None:
        return x_next, None
    t_next = conv2d_ref(x_next.to(t.dtype), w1[:, :, None, None], b1, relu=True, upcast=upcast)
    return x_next, t_next


_WIDTHS = (16, 32, 64, 128, 256)
_MOST_ACCUMULATORS = {"half": 144, "tf32": 64, "ieee": 96}  # of a thread; beyond, addresses spill


def supports(channels: int, middle: int, expanded: int, reduced: int) -> bool:
    """Whether the kernel takes these widths; ``reduced`` is 0 without the next reduction."""
    powers = channels in (*_WIDTHS, 512) and middle in _WIDTHS and reduced in (0, *_WIDTHS, 512)
    return powers and expanded > 0 and expanded % 64 == 0


def fits(
    row: ShiftedConfig,
    channels: int,
    middle: int,
    reduced: int,
    kind: str,
    machine: Machine,
) -> bool:
    """Whether a block of this row fits the registers and the shared memory."""
    itemsize = 2 if kind == "half" else 4
    if row.registers(middle, reduced) > _MOST_ACCUMULATORS[kind]:
        return False
    return row.shared_bytes(channels, middle, reduced, itemsize) <= machine.shared_limit


@dataclass(frozen=True, slots=True)
class _Problem:
    pixels: int
    channels: int
    middle: int
    expanded: int
    reduced: int
    itemsize: int


_L2_BYTES = 28  # an SM's share of L2's bandwidth, bytes per cycle
_PROGRAM_OVERHEAD = 6000  # cycles of latency that a program alone on its SM does not hide


def estimated_cycles(row: ShiftedConfig, problem: _Problem, kind: str, machine: Machine) -> float:
    """Cycles for all pixels: an SM works through its share, bound by arithmetic or by L2, and pays
    the latency of each program that it does not hold together with another."""
    c, middle, e, r = problem.channels, problem.middle, problem.expanded, problem.reduced
    weights = 9 * c * middle + e * (middle + r)
    programs = ceil(problem.pixels / row.block_m)
    moved = problem.itemsize * (weights + row.block_m * (9 * c + 2 * e + r))
    products = row.block_m * weights
    resident = min(
        machine.shared_limit // row.shared_bytes(c, middle, r, problem.itemsize),
        65536 // (32 * row.num_warps * (row.registers(middle, r) + 72)),
    )
    busy = ceil(programs / machine.sms) * max(moved / _L2_BYTES, products / MULTIPLY_ADDS[kind])
    return busy + ceil(programs / (machine.sms * max(1, resident))) * _PROGRAM_OVERHEAD


@lru_cache(maxsize=1024)
def select_config(
    table: Iterable[ShiftedConfig], problem: _Problem, kind: str, machine: Machine
) -> ShiftedConfig:
    """The row of least estimated cycles among those that fit; the first of equals.

    Raises:
        RuntimeError: no row fits the machine.
    """
    widths = problem.channels, problem.middle, problem.reduced
    usable = [row for row in table if fits(row, *widths, kind, machine)]
    if not usable:
        raise RuntimeError(
            f"no tile of {kind} for widths {widths} fits this GPU's registers and "
            f"{machine.shared_limit} bytes of shared memory per block"
        )
    return min(usable, key=lambda row: estimated_cycles(row, problem, kind, machine))


def check_products(
    t: Tensor, middle: int, w3: Tensor, w1: Tensor | None, b1: Tensor | None
) -> tuple[int, int]:
    """Refuse matrices that do not chain from ``middle`` channels on; otherwise E and R."""
    check_tensor("w3", w3, 2)
    expanded = w3.shape[0]
    check_matrix("w3", w3, (expanded, middle), t)
    if w1 is None:
        if b1 is not None:
            raise ValueError("b1 is given without w1")
        return expanded, 0
    check_tensor("w1", w1, 2)
    check_matrix("w1", w1, (w1.shape[0], expanded), t)
    return expanded, w1.shape[0]


def _check(
    t: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    stride: int,
    precision: str,
) -> tuple[_Problem, tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Refuse what the kernel does not take; otherwise the sizes and the shapes of the outputs."""
    check_tensor("t", t, 4)
    check_channels_last("t", t)
    check_tensor("w2", w2, 4)
    check_like("w2", w2, t)
    channels, middle = t.shape[1], w2.shape[0]
    check_shape("w2", w2, (middle, channels, 3, 3))
    check_channels_last("w2", w2)
    expanded, reduced = check_products(t, middle, w3, w1, b1)
    if not supports(channels, middle, expanded, reduced) or (w1 is not None and not reduced):
        raise ValueError(
            "t's, w2's and w1's widths must be powers of two from 16 to 512 (w2's to 256) and "
            f"w3's a multiple of 64, got {channels}, {middle}, {reduced} and {expanded}"
        )
    for name, vector, size in (("b2", b2, middle), ("b3", b3, expanded), ("b1", b1, reduced)):
        if vector is not None:
            check_vector(name, vector, size, t)
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride!r}")
    check_precision(precision)
    p, q = (window_count(size, 3, stride, 1, 1) for size in t.shape[2:])
    if p < 1 or q < 1:
        raise ValueError(f"t of {t.shape[2]}x{t.shape[3]} has no pixels")
    wide = (t.shape[0], expanded, p, q)
    check_activation("x", x, wide, t)
    problem = _Problem(t.shape[0] * p * q, channels, middle, expanded, reduced, t.element_size())
    return problem, wide, (t.shape[0], reduced, p, q)


Outputs = tuple[Tensor, Tensor | None]
Shape = tuple[int, ...]


def _empty(shape: tuple[int, int, int, int], t: Tensor) -> Tensor:
    return torch.empty(shape, dtype=t.dtype, device=t.device, memory_format=torch.channels_last)


def check_outputs(
    out: Outputs,
    inputs: dict[str, Tensor | None],
    x: Tensor,
    t: Tensor,
    narrow: Shape | None,
    check_images: Callable[[str, Tensor, Shape, Tensor], None],
) -> Outputs:
    """The outputs given, if they can take the results: t_next of shape ``narrow``, if any."""
    x_next, t_next = out
    if (t_next is None) != (narrow is None):
        raise ValueError("out[1] must be a Tensor with w1 and None without it")
    check_images("out[0]", x_next, tuple(x.shape), t)
    check_out_memory(x_next, apart=inputs | {"out[1]": t_next}, same={"x": x})
    if t_next is not None and narrow is not None:
        check_images("out[1]", t_next, narrow, t)
        check_out_memory(t_next, apart=inputs | {"x": x}, same={})
    return x_next, t_next


def shifted_block(
    t: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    x: Tensor,
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    *,
    stride: int = 1,
    precision: str = "ieee",
    out: Outputs | None = None,
    config: ShiftedConfig | None = None,
) -> Outputs:
    """A bottleneck from its 3x3 on and the next one's first convolution, in one kernel.

    Args:
        t: (N, C, H, W), channels_last: the output of the block's first convolution.
        w2: (C', C, 3, 3), channels_last, of t's dtype; b2: (C',), float32 or t's dtype.
        w3: (E, C'), contiguous, of t's dtype; b3: (E,), float32 or t's dtype.
        x: (N, E, P, Q), channels_last, of t's dtype: what is added, the block's input.
        w1: (R, E), contiguous, of t's dtype; b1: (R,), float32 or t's dtype. Left out, t_next is.
        stride: of the 3x3, 1 or 2.
        precision: products of float32: ``"ieee"`` in full, ``"tf32"`` on tensor cores.
        out: where to write; ``out[0]`` may be ``x`` itself, since each program reads a tile of x
            before it writes that tile, and no other program touches it.
        config: the tile to use instead of the selected one.

    Returns:
        x_next (N, E, P, Q) and t_next (N, R, P, Q) or None, channels_last, of t's dtype. A batch
        of 0 launches nothing.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not what is wanted (named in the text).
    """
    problem, _, narrow = _check(t, w2, b2, w3, b3, x, w1, b1, stride, precision)
    check_device(t)
    inputs = {"t": t, "w2": w2, "b2": b2, "w3": w3, "b3": b3, "w1": w1, "b1": b1}
    if out is None:
        x_next, t_next = torch.empty_like(x), _empty(narrow, t) if problem.reduced else None
    else:
        wanted = narrow if problem.reduced else None
        x_next, t_next = check_outputs(out, inputs, x, t, wanted, check_activation)
    if not problem.pixels:
        return x_next, t_next
    kind, machine = arithmetic(t.dtype, precision), machine_of(t.device)
    if config is None:
        config = select_config(CONFIGS[kind], problem, kind, machine)
    if problem.expanded % config.block_n:
        raise ValueError(f"config must divide {problem.expanded} channels: {config}")
    launch(
        shifted_block_kernel,
        ceil(problem.pixels / config.block_m),
        t.device,
        t,
        w2,
        b2,
        w3,
        b3,
        x,
        w1,
        b1,
        x_next,
        t_next,
        problem.pixels,
        t.shape[2],
        t.shape[3],
        x.shape[2],
        x.shape[3],
        C=problem.channels,
        MIDDLE=problem.middle,
        E=problem.expanded,
        R=problem.reduced,
        STRIDE=stride,
        PRECISION=precision,
        INT64=needs_int64(t, x),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=min(config.block_k, problem.channels),
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return x_next, t_next


@torch.library.custom_op("fastres::shifted_block", mutates_args=(), device_types="cuda")
def shifted_block_op(
    t: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    stride: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """:func:`shifted_block` as a functional operator for torch.compile and torch.export."""
    x_next, t_next = shifted_block(t, w2, b2, w3, b3, x, w1, b1, stride=stride, precision=precision)
    assert t_next is not None
    return x_next, t_next


@shifted_block_op.register_fake
def _(t, w2, b2, w3, b3, x, w1, b1, stride, precision):
    _, wide, narrow = _check(t, w2, b2, w3, b3, x, w1, b1, stride, precision)
    return _empty(wide, t), _empty(narrow, t)


@shifted_block_op.register_kernel("cpu")
def _(t, w2, b2, w3, b3, x, w1, b1, stride, precision):
    _check(t, w2, b2, w3, b3, x, w1, b1, stride, precision)
    return shifted_block_ref(t, w2, b2, w3, b3, x, w1, b1, stride=stride)


@torch.library.custom_op("fastres::shifted_tail", mutates_args=(), device_types="cuda")
def shifted_tail_op(
    t: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    x: Tensor,
    stride: int,
    precision: str,
) -> Tensor:
    """:func:`shifted_block` without the next reduction, as a functional operator."""
    return shifted_block(t, w2, b2, w3, b3, x, stride=stride, precision=precision)[0]


@shifted_tail_op.register_fake
def _(t, w2, b2, w3, b3, x, stride, precision):
    return _empty(_check(t, w2, b2, w3, b3, x, None, None, stride, precision)[1], t)


@shifted_tail_op.register_kernel("cpu")
def _(t, w2, b2, w3, b3, x, stride, precision):
    _check(t, w2, b2, w3, b3, x, None, None, stride, precision)
    return shifted_block_ref(t, w2, b2, w3, b3, x, stride=stride)[0]
