"""The sliding block in one kernel: 3x3 of 64 channels, expansion with residual, next reduction, in
the layout [H, W, N, C].

    mid = relu(conv3x3(t, w2) + b2)                    x_next = relu(mid @ w3^T + b3 + x)
    t_next = relu(x_next @ w1^T + b1)                  (left out without w1)

t (H, W, N, 64), x and x_next (H, W, N, E), t_next (H, W, N, R) are contiguous; w2 (64, 64, 3, 3) is
channels_last, w3 (E, 64) and w1 (R, E) row-major; stride and padding 1. float16 or bfloat16; b2, b3
and b1 may be float32. Sums are float32; mid and x_next are rounded once and those rounded values
are multiplied. Rejected: E of no multiple of 64, R other than 64 and 128, weights that do not fit a
block's shared memory together (E = 256 does), GPUs other than sm_90.

All weights stay in shared memory while a program walks with 64 images along a row of pixels as in
conv3x3_hwnc.py; mid and x_next go from one product to the next in registers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
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

from .._common import (
    await_producers,
    check_channels_last,
    check_like,
    check_matrix,
    check_out_memory,
    check_shape,
    check_tensor,
    check_vector,
    launch,
    relu_keeping_nan,
)
from .._config import gpu_of
from .._gpu import Gpu
from .._tma import check_aligned
from .conv3x3_hwnc import (
    CHANNELS,
    add_products,
    columns_of,
    copy_in,
    copy_out,
    descriptor,
    load_column,
    runs_on,
    unknown_zero,
)
from .hwnc import check_hwnc, conv2d_hwnc_ref

Outputs = tuple[Tensor, Tensor | None]
Shape = tuple[int, ...]

IMAGES = 64
_TILE = 2 * 64 * 64  # bytes
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class BottleneckConfig:
    """``num_stages`` columns of pixels are loaded ahead."""

    num_stages: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_stages <= 3:  # no row has fewer columns to visit
            raise ValueError(f"num_stages must be 1 to 3, got {self.num_stages}")

    def shared_bytes(self, expanded: int, reduced: int) -> int:
        """Shared memory of a block: weights, columns, two tiles each of x and of the results,
        biases and barriers."""
        wide, narrow = expanded // 64, reduced // 64
        tiles = 9 + wide + wide * narrow + 3 * self.num_stages + 4
        return tiles * _TILE + 256 * (1 + wide + narrow) + 8 * (self.num_stages + 3)


CONFIGS: tuple[BottleneckConfig, ...] = (BottleneckConfig(1), BottleneckConfig(2))
"""The second only where the weights leave room for it."""

_START = 6000  # cycles to bring the weights
_TURN = 600  # cycles between the last product of a column and the first of the next
_PART = 250  # cycles from one expansion's product to the reduction's


def estimated_cycles(
    config: BottleneckConfig,
    size: tuple[int, int, int],
    expanded: int,
    reduced: int,
    gpu: Gpu,
) -> float:
    """Cycles for outputs of size (P, Q, N): an SM holds one block, which seldom overlaps its parts;
    each stage is taken to shorten the wait for a column."""
    p, q, n = size
    programs = p * ceil(n / IMAGES)
    weights = CHANNELS * (9 * CHANNELS + expanded) + expanded * reduced
    waiting = _TURN / config.num_stages + _PART * expanded / 64
    products = IMAGES * weights / gpu.matrix
    moved = 2 * IMAGES * (3 * CHANNELS + 2 * expanded + reduced)
    column = max(products + waiting, moved / gpu.l2_bandwidth(min(programs, gpu.sms)))
    return ceil(programs / gpu.sms) * (columns_of(q) * column + _START)


def fits(config: BottleneckConfig, expanded: int, reduced: int, gpu: Gpu) -> bool:
    """Whether a block of this row has the shared memory that it needs."""
    return config.shared_bytes(expanded, reduced) <= gpu.shared_limit


def supports(
    channels: int, middle: int, expanded: int, reduced: int, dtype: torch.dtype, gpu: Gpu
) -> bool:
    """Whether the kernel takes these widths; ``reduced`` is 0 without the next reduction."""
    widths = channels == middle == CHANNELS and reduced in (0, 64, 128)
    whole = expanded > 0 and expanded % 64 == 0 and dtype in _HALVES
    return widths and whole and any(fits(config, expanded, reduced, gpu) for config in CONFIGS)


def select_config(
    rows: Iterable[BottleneckConfig],
    size: tuple[int, int, int],
    expanded: int,
    reduced: int,
    gpu: Gpu,
) -> BottleneckConfig:
    """The row of least estimated cycles among those that fit; the first of equals."""
    usable = [config for config in rows if fits(config, expanded, reduced, gpu)]
    return min(usable, key=lambda config: estimated_cycles(config, size, expanded, reduced, gpu))


@gluon.jit
def _load_shortcut(x, shortcuts, arrived, p, q, n0, part: gl.constexpr):
    """Ask for 64 channels of what is added to the output at (p, q); two buffers take turns."""
    barrier = arrived.index(part % 2)
    mbarrier.expect(barrier, 64 * 64 * 2)
    copy_in(x, [p, q, n0, part * 64], barrier, shortcuts.index(part % 2))


@gluon.jit
def _store(value, results, turn: gl.constexpr, y, p, q, n0, k0: gl.constexpr):
    """Write 64 channels of an output; two buffers take turns, from the first in every column."""
    tma.store_wait(1 if turn > 0 else 0)
    result = results.index(turn % 2)
    result.store(value.reshape([1, 1, 64, 64]))
    fence_async_shared()
    copy_out(y, [p, q, n0, k0], result)


@gluon.jit
def _keep_bias(b_ptr, biases, first: gl.constexpr, parts: gl.constexpr, SUM: gl.constexpr):
    """Put a vector into shared memory, 64 numbers to a place; zeros where there is none."""
    VECTOR: gl.constexpr = gl.SliceLayout(0, SUM)
    for part in gl.static_range(parts):
        if b_ptr is None:
            bias = gl.zeros((64,), gl.float32, VECTOR)
        else:
            bias = gl.load(b_ptr + part * 64 + gl.arange(0, 64, VECTOR)).to(gl.float32)
        biases.index(first + part).store(bias)


@gluon.jit
def _bias(biases, place: gl.constexpr, SUM: gl.constexpr):
    return biases.index(place).load(gl.SliceLayout(0, SUM))[None, :]


@gluon.jit
def _times(operand, weights, tile, acc, FIRST: gl.constexpr):
    """``acc`` plus the operand times a tile of weights [64 outputs, 64]."""
    w = weights.index(tile).permute((1, 0))
    return warpgroup_mma(operand, w, acc, use_acc=not FIRST, is_async=True)


# fmt: off
@gluon.jit
def _expand(
    middle,  # [64, 64], an operand
    x, biases, y, z, shortcuts, arrived, results, w3, w1, p, q, n0,
    PARTS: gl.constexpr, REDUCED: gl.constexpr, SUM: gl.constexpr,
):
    """The block's output and the next reduction at (p, q - 1), 64 channels after the other."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUM, 2)
    zero = unknown_zero(q)
    none = gl.zeros((64, 64), gl.float32, SUM)
    narrow0 = none
    narrow1 = none
    operand = middle
    wide = _times(middle, w3, zero, none, True)
    for part in gl.static_range(PARTS):
        wide, narrow0, narrow1, middle, operand = warpgroup_mma_wait(
            0, deps=(wide, narrow0, narrow1, middle, operand)
        )
        mbarrier.wait(
            arrived.index(part % 2), (q * ((PARTS + 1 - part % 2) // 2) + part // 2) % 2
        )
        value = wide + _bias(biases, 1 + part, SUM)
        value += shortcuts.index(part % 2).reshape([64, 64]).load(SUM).to(gl.float32)
        if part + 2 < PARTS:
            _load_shortcut(x, shortcuts, arrived, p, q - 1, n0, part + 2)
        value = relu_keeping_nan(value).to(y.dtype)
        if REDUCED > 0:
            operand = gl.convert_layout(value, OPERAND)
            narrow0 = _times(operand, w1, zero + part, narrow0, part == 0)
        if REDUCED > 64:
            narrow1 = _times(operand, w1, zero + PARTS + part, narrow1, part == 0)
        if part + 1 < PARTS:
            wide = _times(middle, w3, zero + part + 1, none, True)
        _store(value, results, part, y, p, q - 1, n0, part * 64)
    narrow0, narrow1, operand = warpgroup_mma_wait(0, deps=(narrow0, narrow1, operand))
    if REDUCED > 0:
        narrow0 = relu_keeping_nan(narrow0 + _bias(biases, 1 + PARTS, SUM))
        _store(narrow0.to(y.dtype), results, PARTS, z, p, q - 1, n0, 0)
    if REDUCED > 64:
        narrow1 = relu_keeping_nan(narrow1 + _bias(biases, 2 + PARTS, SUM))
        _store(narrow1.to(y.dtype), results, PARTS + 1, z, p, q - 1, n0, 64)


@gluon.jit
def _visit(
    t, x, biases, y, z, ring, ready, w2, shortcuts, arrived, results, w3, w1,
    left, middle, right,  # sums of the 3x3 at q - 1, q and q + 1, [64, 64]
    p, q, n0, N, columns,
    PARTS: gl.constexpr, REDUCED: gl.constexpr, STAGES: gl.constexpr, SUM: gl.constexpr,
):
    """Use column ``q`` for the three outputs around it and finish the left one."""
    slot = q % STAGES
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUM, 2)
    _load_shortcut(x, shortcuts, arrived, p, q - 1, n0, 0)
    if PARTS > 1:
        _load_shortcut(x, shortcuts, arrived, p, q - 1, n0, 1)
    mbarrier.wait(ready.index(slot), q // STAGES % 2)
    a0 = ring.index(slot * 3).reshape([64, 64]).load(OPERAND)
    a1 = ring.index(slot * 3 + 1).reshape([64, 64]).load(OPERAND)
    a2 = ring.index(slot * 3 + 2).reshape([64, 64]).load(OPERAND)
    if q + STAGES < columns:
        load_column(t, ring, ready, p, q + STAGES, n0, N, 64, STAGES)

    zero = unknown_zero(q)
    left = add_products(a0, a1, a2, w2, left, zero, 2, False)
    middle = add_products(a0, a1, a2, w2, middle, zero, 1, False)
    right = add_products(a0, a1, a2, w2, right, zero, 0, True)
    left, middle, right, a0, a1, a2 = warpgroup_mma_wait(
        0, deps=(left, middle, right, a0, a1, a2)
    )
    value = relu_keeping_nan(left + _bias(biases, 0, SUM)).to(y.dtype)
    _expand(
        gl.convert_layout(value, OPERAND), x, biases, y, z, shortcuts, arrived, results, w3, w1,
        p, q, n0, PARTS, REDUCED, SUM,
    )
    return left, middle, right
# fmt: on


@gluon.jit(do_not_specialize=["N", "H", "columns"])
def bottleneck_hwnc_kernel(
    t,  # descriptor of [H, W * N, 64], boxes [1, 64, 64]
    w2,  # descriptor of [64, 9 * 64], boxes [64, 64]
    b2_ptr,
    w3,  # descriptor of [E, 64], boxes [64, 64]
    b3_ptr,
    x,  # descriptor of [H, W, N, E], boxes [1, 1, 64, 64]
    w1,  # descriptor of [R, E], boxes [64, 64], or None
    b1_ptr,
    y,  # as x
    z,  # descriptor of [H, W, N, R], boxes [1, 1, 64, 64], or None
    N,
    H,
    columns,
    PARTS: gl.constexpr,
    REDUCED: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr = False,
) -> None:
    await_producers(PDL)
    # Rows of pixels run fastest, so that neighbours in time find each other's inputs in L2.
    p = gl.program_id(0) % H
    n0 = gl.program_id(0) // H * 64
    NARROW: gl.constexpr = REDUCED // 64

    taps = gl.allocate_shared_memory(w2.dtype, [9, 64, 64], w2.layout)
    expand = gl.allocate_shared_memory(w3.dtype, [PARTS, 64, 64], w3.layout)
    reduce = expand  # not read without the next reduction
    if REDUCED > 0:
        reduce = gl.allocate_shared_memory(w1.dtype, [PARTS * NARROW, 64, 64], w1.layout)
    ring = gl.allocate_shared_memory(t.dtype, [3 * STAGES, 1, 64, 64], t.layout)
    shortcuts = gl.allocate_shared_memory(x.dtype, [2, 1, 1, 64, 64], x.layout)
    results = gl.allocate_shared_memory(y.dtype, [2, 1, 1, 64, 64], y.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    arrived = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES + 1):
        mbarrier.init(ready.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(arrived.index(i), count=1)
    fence_async_shared()
    loaded = ready.index(STAGES)
    mbarrier.expect(loaded, (9 + PARTS + PARTS * NARROW) * 64 * 64 * 2)
    for tap in gl.static_range(9):
        copy_in(w2, [0, tap * 64], loaded, taps.index(tap))
    for part in gl.static_range(PARTS):
        copy_in(w3, [part * 64, 0], loaded, expand.index(part))
        for half in gl.static_range(NARROW):
            copy_in(w1, [half * 64, part * 64], loaded, reduce.index(half * PARTS + part))
    for q in gl.static_range(STAGES):
        load_column(t, ring, ready, p, q, n0, N, 64, STAGES)

    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 64, 16])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    biases = gl.allocate_shared_memory(gl.float32, [1 + PARTS + NARROW, 64], PLAIN)
    _keep_bias(b2_ptr, biases, 0, 1, SUM)
    _keep_bias(b3_ptr, biases, 1, PARTS, SUM)
    _keep_bias(b1_ptr, biases, 1 + PARTS, NARROW, SUM)
    a = gl.zeros((64, 64), gl.float32, SUM)
    b = a
    c = a
    mbarrier.wait(loaded, 0)
    # fmt: off
    for q in range(0, columns, 3):  # the three sums change roles, and no register moves
        a, b, c = _visit(
            t, x, biases, y, z, ring, ready, taps, shortcuts, arrived, results, expand, reduce,
            a, b, c, p, q, n0, N, columns, PARTS, REDUCED, STAGES, SUM,
        )
        b, c, a = _visit(
            t, x, biases, y, z, ring, ready, taps, shortcuts, arrived, results, expand, reduce,
            b, c, a, p, q + 1, n0, N, columns, PARTS, REDUCED, STAGES, SUM,
        )
        c, a, b = _visit(
            t, x, biases, y, z, ring, ready, taps, shortcuts, arrived, results, expand, reduce,
            c, a, b, p, q + 2, n0, N, columns, PARTS, REDUCED, STAGES, SUM,
        )
    # fmt: on
    tma.store_wait(0)


def _check_products(
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


def _check_outputs(
    out: Outputs,
    inputs: dict[str, Tensor | None],
    x: Tensor,
    t: Tensor,
    narrow: Shape | None,
) -> Outputs:
    """The outputs given, if they can take the results: t_next of shape ``narrow``, if any."""
    x_next, t_next = out
    if (t_next is None) != (narrow is None):
        raise ValueError("out[1] must be a Tensor with w1 and None without it")
    check_hwnc("out[0]", x_next, tuple(x.shape), t)
    check_out_memory(x_next, apart=inputs | {"out[1]": t_next}, same={"x": x})
    if t_next is not None and narrow is not None:
        check_hwnc("out[1]", t_next, narrow, t)
        check_out_memory(t_next, apart=inputs | {"x": x}, same={})
    return x_next, t_next


def _check(
    t: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
) -> tuple[int, int]:
    """Refuse what the kernel does not take; otherwise E and R."""
    check_hwnc("t", t, None, t)
    check_tensor("w2", w2, 4)
    check_like("w2", w2, t)
    check_shape("w2", w2, (CHANNELS, CHANNELS, 3, 3))
    check_channels_last("w2", w2)
    check_shape("t", t, (*t.shape[:3], CHANNELS))
    expanded, reduced = _check_products(t, CHANNELS, w3, w1, b1)
    for name, vector, size in (("b2", b2, CHANNELS), ("b3", b3, expanded), ("b1", b1, reduced)):
        if vector is not None:
            check_vector(name, vector, size, t)
    if t.dtype not in _HALVES:
        raise TypeError(f"t must be float16 or bfloat16, got {t.dtype}")
    if not t.shape[0] * t.shape[1]:
        raise ValueError(f"t of {t.shape[0]}x{t.shape[1]} has no pixels")
    check_hwnc("x", x, (*t.shape[:3], expanded), t)
    gpu = gpu_of(t.device)
    if (w1 is not None and not reduced) or not supports(
        CHANNELS, CHANNELS, expanded, reduced, t.dtype, gpu
    ):
        raise ValueError(
            "w3 must have a multiple of 64 rows and w1 64 or 128, and all weights must fit "
            f"{gpu.shared_limit} bytes of shared memory, got {expanded} and {reduced} rows"
        )
    return expanded, reduced


def bottleneck_hwnc(
    t: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    x: Tensor,
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    *,
    out: Outputs | None = None,
    config: BottleneckConfig | None = None,
) -> Outputs:
    """A bottleneck from its 3x3 on and the next one's first convolution, in one kernel.

    Args:
        t: (H, W, N, 64), contiguous: the output of the block's first convolution.
        w2: (64, 64, 3, 3), channels_last, of t's dtype; b2: (64,), float32 or t's dtype.
        w3: (E, 64), contiguous, of t's dtype; b3: (E,), float32 or t's dtype.
        x: (H, W, N, E), contiguous, of t's dtype: what is added, the block's input.
        w1: (R, E), contiguous, of t's dtype; b1: (R,), float32 or t's dtype. Left out, t_next is.
        out: where to write; ``out[0]`` may be ``x`` itself, since each program reads a tile of x
            before it writes that tile, and no other program touches it.
        config: instead of the selected one.

    Returns:
        x_next (H, W, N, E) and t_next (H, W, N, R) or None, contiguous, of t's dtype. A batch of 0
        launches nothing.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not what is wanted (named in the text).
    """
    expanded, reduced = _check(t, w2, b2, w3, b3, x, w1, b1)
    if not runs_on(t.device):
        raise RuntimeError(
            f"this kernel needs a GPU of compute capability 9 and Triton 3.6 to 3.8, t is on "
            f"{t.device}; use conv2d_hwnc"
        )
    inputs = {"t": t, "w2": w2, "b2": b2, "w3": w3, "b3": b3, "w1": w1, "b1": b1}
    narrow = (*t.shape[:3], reduced) if reduced else None
    if out is None:
        x_next, t_next = torch.empty_like(x), None if narrow is None else t.new_empty(narrow)
    else:
        x_next, t_next = _check_outputs(out, inputs, x, t, narrow)
    if not t.numel():
        return x_next, t_next
    check_aligned(t=t, w2=w2, w3=w3, x=x, w1=w1, x_next=x_next, t_next=t_next)
    height, width, batch, _ = t.shape
    gpu = gpu_of(t.device)
    if config is None:
        config = select_config(CONFIGS, (height, width, batch), expanded, reduced, gpu)
    elif not fits(config, expanded, reduced, gpu):
        raise ValueError(f"config needs more than {gpu.shared_limit} bytes: {config}")
    launch(
        bottleneck_hwnc_kernel,
        height * ceil(batch / IMAGES),
        t.device,
        descriptor(t.view(height, -1, CHANNELS), 1, IMAGES, 64),
        descriptor(w2.permute(0, 2, 3, 1).reshape(CHANNELS, -1), 64, 64),
        b2,
        descriptor(w3, 64, 64),
        b3,
        descriptor(x, 1, 1, IMAGES, 64),
        None if w1 is None else descriptor(w1, 64, 64),
        b1,
        descriptor(x_next, 1, 1, IMAGES, 64),
        None if t_next is None else descriptor(t_next, 1, 1, IMAGES, 64),
        batch,
        height,
        columns_of(width),
        PARTS=expanded // 64,
        REDUCED=reduced,
        STAGES=config.num_stages,
        num_warps=IMAGES // 16,
    )
    return x_next, t_next


def bottleneck_hwnc_ref(
    t: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    x: Tensor,
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    *,
    upcast: bool = False,
) -> Outputs:
    """The same in plain PyTorch, rounded after each step; with ``upcast`` in float64, but for mid
    and x_next, which are rounded before they are multiplied, as in the kernel."""
    given: dict[str, Any] = {"relu": True, "upcast": upcast}
    middle = conv2d_hwnc_ref(t, w2, b2, padding=1, **given).to(t.dtype)
    x_next = conv2d_hwnc_ref(middle, w3[:, :, None, None], b3, residual=x, **given)
    if w1 is None:
        return x_next, None
    return x_next, conv2d_hwnc_ref(x_next.to(t.dtype), w1[:, :, None, None], b1, **given)
