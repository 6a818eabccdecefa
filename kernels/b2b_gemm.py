"""The seam of two bottleneck blocks in one kernel: expansion, residual sum, next reduction.

    x_next = relu(t @ w3^T + b3 + x)            t_next = relu(x_next @ w1^T + b1)

t (M, C), w3 (E, C), x and x_next (M, E), w1 (R, E) and t_next (M, R) are dense and row-major:
pixels of NHWC or HWNC images in any number. float16 or bfloat16; b3 and b1 may be float32. Sums
are float32; x_next is rounded once and that rounded value is multiplied. Rejected: GPUs before
sm_90, C and R other than powers of two from 16 to 256, E of no multiple of the tile, an output
over an input (except x_next exactly over x). Method: back-to-back products (CUTLASS example 13)
in chunks of E, so that a wide activation is read once and written once between two 3x3s.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    KernelError,
    await_producers,
    check_out_memory,
    check_shape,
    check_vector,
    dot,
    launch,
    relu_keeping_nan,
    rounded,
)
from ._config import gpu_of
from ._gpu import Gpu
from ._tma import check_aligned, check_rows, check_tma, descriptor
from .gemm import gemm_ref

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class B2bGemmConfig:
    """``block_m`` rows a program, ``block_n`` channels of the wide activation at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, channels: int, reduced: int) -> int:
        """Upper bound of a block's shared memory."""
        step = self.block_n * (channels + reduced + self.block_m)
        kept = self.block_m * max(channels + self.block_n, reduced)
        return 2 * (kept + step * self.num_stages)

    def registers(self, reduced: int) -> int:
        """Accumulators of a thread."""
        return self.block_m * (self.block_n + reduced) // (32 * self.num_warps)


CONFIGS: tuple[B2bGemmConfig, ...] = (
    B2bGemmConfig(128, 64, 8, 2),
    B2bGemmConfig(128, 64, 8, 3),
    B2bGemmConfig(256, 32, 16, 3),
    B2bGemmConfig(128, 32, 8, 2),
    B2bGemmConfig(128, 32, 8, 3),
    B2bGemmConfig(64, 64, 4, 2),
    B2bGemmConfig(64, 64, 8, 2),
    B2bGemmConfig(64, 32, 4, 2),
)
"""Not every row suits all widths: see :func:`fits`."""


@triton.jit
def b2b_gemm_kernel(
    t,  # descriptor of [M, C], tiles [BLOCK_M, C]
    w3,  # descriptor of [E, C], tiles [BLOCK_N, C]
    b3_ptr,  # [E] or None
    x,  # descriptor of [M, E], tiles [BLOCK_M, BLOCK_N]
    w1,  # descriptor of [R, E], tiles [R, BLOCK_N]
    b1_ptr,  # [R] or None
    x_next,  # as x
    t_next,  # descriptor of [M, R], tiles [BLOCK_M, R]
    E: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    await_producers(PDL)
    m0 = tl.program_id(0) * BLOCK_M
    narrow = t.load([m0, 0])  # [BM, C]
    acc = tl.zeros((BLOCK_M, R), tl.float32)
    for n0 in tl.range(0, E, BLOCK_N, num_stages=STAGES):
        wide = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        wide = dot(narrow, w3.load([n0, 0]).T, wide, "ieee")
        if b3_ptr is not None:
            wide += tl.load(b3_ptr + n0 + tl.arange(0, BLOCK_N)).to(tl.float32)[None, :]
        wide += x.load([m0, n0]).to(tl.float32)
        wide = rounded(relu_keeping_nan(wide), x_next.dtype)
        x_next.store([m0, n0], wide)
        acc = dot(wide, w1.load([0, n0]).T, acc, "ieee")
    if b1_ptr is not None:
        acc += tl.load(b1_ptr + tl.arange(0, R)).to(tl.float32)[None, :]
    t_next.store([m0, 0], rounded(relu_keeping_nan(acc), t_next.dtype))


def b2b_gemm_ref(
    t: Tensor,
    w3: Tensor,
    b3: Tensor | None,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    *,
    upcast: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, rounded after each step; with ``upcast`` in float64, but for
    x_next, which is rounded before it is multiplied, as in the kernel."""
    x_next = gemm_ref(t, w3, b3, residual=x, relu=True, upcast=upcast)
    t_next = gemm_ref(x_next.to(t.dtype), w1, b1, relu=True, upcast=upcast)
    return x_next, t_next


_WIDTHS = (16, 32, 64, 128, 256)
_MOST_ACCUMULATORS = 144  # of a thread; beyond, the addresses spill


def supports(channels: int, expanded: int, reduced: int, dtype: torch.dtype) -> bool:
    """Whether the kernel takes these widths (on a GPU with TMA)."""
    narrow = channels in _WIDTHS and reduced in _WIDTHS
    return dtype in HALVES and narrow and expanded > 0 and expanded % 64 == 0


def fits(config: B2bGemmConfig, channels: int, reduced: int, gpu: Gpu) -> bool:
    """Whether a block of this row fits the registers and the shared memory."""
    if config.registers(reduced) > _MOST_ACCUMULATORS:
        return False
    return config.shared_bytes(channels, reduced) <= gpu.shared_limit


_PROGRAM_OVERHEAD = 4000  # cycles of latency that a program alone on its SM does not hide


def estimated_cycles(
    config: B2bGemmConfig, rows: int, channels: int, expanded: int, reduced: int, gpu: Gpu
) -> float:
    """Cycles for all rows: an SM works through its share, bound by arithmetic or by L2, and pays
    the latency of each program that it does not hold together with another."""
    programs = ceil(rows / config.block_m)
    moved = 2 * (
        expanded * (channels + reduced) + config.block_m * (channels + 2 * expanded + reduced)
    )
    products = config.block_m * expanded * (channels + reduced)
    resident = min(
        gpu.shared_limit // config.shared_bytes(channels, reduced),
        65536 // (32 * config.num_warps * (config.registers(reduced) + 56)),
    )
    full, rest = divmod(programs, gpu.sms)
    arithmetic = products / gpu.multiply_adds("half", config.block_m)
    busy = full * max(moved / gpu.l2, arithmetic)
    if rest:  # the last wave has L2 for itself
        busy += max(moved / gpu.l2_bandwidth(rest), arithmetic)
    return busy + ceil(programs / (gpu.sms * max(1, resident))) * _PROGRAM_OVERHEAD


@lru_cache(maxsize=1024)
def select_config(
    table: Iterable[B2bGemmConfig],
    rows: int,
    channels: int,
    expanded: int,
    reduced: int,
    gpu: Gpu,
) -> B2bGemmConfig:
    """The row of least estimated cycles among those that fit; the first of equals.

    Raises:
        KernelError: no row fits the GPU.
    """
    usable = [config for config in table if fits(config, channels, reduced, gpu)]
    if not usable:
        raise KernelError(f"no tile fits {gpu.shared_limit} bytes of shared memory per block")
    return min(
        usable, key=lambda config: estimated_cycles(config, rows, channels, expanded, reduced, gpu)
    )


def _check(
    t: Tensor, w3: Tensor, b3: Tensor | None, x: Tensor, w1: Tensor, b1: Tensor | None
) -> None:
    """Refuse what the kernel does not take."""
    for name, tensor in (("t", t), ("w3", w3), ("x", x), ("w1", w1)):
        check_rows(name, tensor, t)
    if t.dtype not in HALVES:
        raise TypeError(f"t must be float16 or bfloat16, got {t.dtype}")
    channels, expanded, reduced = t.shape[1], w3.shape[0], w1.shape[0]
    check_shape("w3", w3, (expanded, channels))
    check_shape("x", x, (t.shape[0], expanded))
    check_shape("w1", w1, (reduced, expanded))
    if not supports(channels, expanded, reduced, t.dtype):
        raise ValueError(
            f"t's and w1's widths must be powers of two from 16 to 256 and w3's a multiple of 64, "
            f"got {channels}, {reduced} and {expanded}"
        )
    for name, vector, size in (("b3", b3, expanded), ("b1", b1, reduced)):
        if vector is not None:
            check_vector(name, vector, size, t)


def _outputs(
    out: tuple[Tensor, Tensor] | None,
    inputs: dict[str, Tensor | None],
    x: Tensor,
    t: Tensor,
    reduced: int,
) -> tuple[Tensor, Tensor]:
    """The outputs given, where they are fit to take the results, or new memory."""
    if out is None:
        return torch.empty_like(x), x.new_empty(x.shape[0], reduced)
    x_next, t_next = out
    for name, tensor, shape in (
        ("out[0]", x_next, tuple(x.shape)),
        ("out[1]", t_next, (x.shape[0], reduced)),
    ):
        check_rows(name, tensor, t)
        check_shape(name, tensor, shape)
    check_out_memory(x_next, apart=inputs | {"out[1]": t_next}, same={"x": x})
    check_out_memory(t_next, apart=inputs | {"x": x}, same={})
    return x_next, t_next


def b2b_gemm(
    t: Tensor,
    w3: Tensor,
    b3: Tensor | None,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    config: B2bGemmConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``x_next = relu(t @ w3.T + b3 + x)`` and ``t_next = relu(x_next @ w1.T + b1)``.

    Args:
        t: (M, C), contiguous, float16 or bfloat16: the rows of a block's 3x3 convolution.
        w3: (E, C), contiguous, of t's dtype; b3: (E,), float32 or t's dtype.
        x: (M, E), contiguous, of t's dtype: the block's input.
        w1: (R, E), contiguous, of t's dtype; b1: (R,), float32 or t's dtype.
        out: where to write; ``out[0]`` may be ``x`` itself, since each program reads a tile of x
            before it writes that tile, and no other program touches it.
        config: the tile to use instead of the selected one.

    Returns:
        (M, E) and (M, R) of t's dtype. No rows launch nothing.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not what is wanted (named in the text).
    """
    _check(t, w3, b3, x, w1, b1)
    check_tma(t)
    inputs = {"t": t, "w3": w3, "b3": b3, "w1": w1, "b1": b1}
    channels, expanded, reduced = t.shape[1], w3.shape[0], w1.shape[0]
    x_next, t_next = _outputs(out, inputs, x, t, reduced)
    if not t.shape[0]:
        return x_next, t_next
    check_aligned(t=t, w3=w3, x=x, w1=w1, x_next=x_next, t_next=t_next)
    gpu = gpu_of(t.device)
    if config is None:
        config = select_config(CONFIGS, t.shape[0], channels, expanded, reduced, gpu)
    bm, bn = config.block_m, config.block_n
    launch(
        b2b_gemm_kernel,
        ceil(t.shape[0] / bm),
        t.device,
        descriptor(t, bm, channels),
        descriptor(w3, bn, channels),
        b3,
        descriptor(x, bm, bn),
        descriptor(w1, reduced, bn),
        b1,
        descriptor(x_next, bm, bn),
        descriptor(t_next, bm, reduced),
        E=expanded,
        R=reduced,
        BLOCK_M=bm,
        BLOCK_N=bn,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return x_next, t_next
