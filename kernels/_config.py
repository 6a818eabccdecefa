"""Tile shapes of the matrix kernels and the pure function that picks one.

The choice is an analytical estimate: it runs no kernel and reads no clock, so equal shapes on
equal GPUs always get equal tiles. Measured overrides belong to the caller (``config=``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from math import ceil

import torch

from ._common import KernelError, host
from ._gpu import BYTES, Gpu, record_of

BARRIER_BYTES = 64  # of shared memory, at most, beside operands that are read asynchronously
_LARGEST_SPLIT = 64 * 128  # elements of a tile
_SPLIT_WAVES = 2  # programs per SM, at most, of a split reduction


@dataclass(frozen=True, slots=True)
class TileConfig:
    """One tile of a matrix kernel: ``block_m x block_n`` outputs, ``block_k`` products a step.

    With ``split_k`` above 1, that many programs share the reduction of a tile.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two of at least 16, got {size}")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps must be 1, 2, 4, 8 or 16, got {self.num_warps}")
        if self.num_stages < 1:
            raise ValueError(f"num_stages must be at least 1, got {self.num_stages}")
        if self.split_k < 1 or (self.split_k > 1 and not self.can_split_k):
            raise ValueError(
                f"split_k must be 1, or at least 1 for tiles of up to {_LARGEST_SPLIT} elements, "
                f"got {self.split_k} for {self.block_m}x{self.block_n}"
            )

    @property
    def can_split_k(self) -> bool:
        """Whether the partial sums of a tile can be exchanged without spilling registers."""
        return self.block_m * self.block_n <= _LARGEST_SPLIT

    @property
    def parts(self) -> int:
        """Parts in which the tile is written; a thread holds at most 32 elements of each."""
        return min(4, max(1, self.block_m * self.block_n // (32 * self.num_warps) // 32))

    def operand_bytes(self, math_mode: str, copied: bool, gpu: Gpu) -> int:
        """Shared memory of the operands of a pipelined loop, as Triton lays it out.

        There are ``num_stages`` buffers where asynchronous products read them; else one fewer,
        since the operands in use are in registers. float32 goes through registers in any case, to
        be rounded or split; the second operand is put back for asynchronous products of TF32, and
        in full precision where TMA has ``copied`` it.
        """
        a, b = (n * self.block_k * BYTES[math_mode] for n in (self.block_m, self.block_n))
        asynchronous = gpu.reads_memory(math_mode) and self.block_m >= 64
        if math_mode == "half" and asynchronous:
            return self.num_stages * (a + b)
        if math_mode == "int8":  # a, whose padding is put in by registers, is held for longer
            return self.num_stages * a + (self.num_stages - (not asynchronous)) * b
        again = b if (copied if math_mode == "ieee" else asynchronous) else 0
        return max(1, self.num_stages - 1) * (a + b) + again

    def shared_bytes(self, math_mode: str, gpu: Gpu) -> int:
        """A block's shared memory on NVIDIA's GPUs, barriers included."""
        return self.operand_bytes(math_mode, False, gpu) + BARRIER_BYTES * gpu.asynchronous

    def fitted(self, math_mode: str, gpu: Gpu) -> TileConfig | None:
        """This row with as many stages as fit the GPU's shared memory; None below two."""
        for stages in range(self.num_stages, min(self.num_stages, 2) - 1, -1):
            config = replace(self, num_stages=stages)
            if config.shared_bytes(math_mode, gpu) <= gpu.shared_limit:
                return config
        return None


@dataclass(frozen=True, slots=True)
class ProblemSize:
    """A convolution as ``groups`` matrix products [m, taps * channels] x [taps * channels, n]."""

    m: int
    n: int
    channels: int
    taps: int
    groups: int
    itemsize: int

    def gathers(self, block_k: int) -> bool:
        """Whether a step of the reduction crosses taps, because one tap cannot fill it."""
        return self.channels < block_k

    def steps(self, block_k: int) -> int:
        """Steps of the reduction of one tile."""
        if self.gathers(block_k):
            return ceil(self.taps * self.channels / block_k)
        return self.taps * ceil(self.channels / block_k)

    def tiles(self, config: TileConfig) -> int:
        """Tiles of the output."""
        return ceil(self.m / config.block_m) * ceil(self.n / config.block_n) * self.groups


_STEP_LATENCY = 700  # cycles from asking for operands to having them
_TILE_OVERHEAD = 2000  # cycles to fill the pipeline and write a tile
_SPLIT_OVERHEAD = 2500  # cycles to publish a partial sum and to find it


def estimated_cycles(config: TileConfig, problem: ProblemSize, math_mode: str, gpu: Gpu) -> float:
    """Cycles that the whole product takes with this row.

    An SM works through its share of the tiles, bound by arithmetic or by its part of L2's
    bandwidth, or waits for operands where the blocks it holds at once do not hide the latency.
    """
    programs = problem.tiles(config) * config.split_k
    steps = ceil(problem.steps(config.block_k) / config.split_k)
    products = config.block_m * config.block_n * config.block_k
    arithmetic = products / gpu.multiply_adds(math_mode, config.block_m)
    traffic = (config.block_m + config.block_n) * config.block_k * problem.itemsize
    full, rest = divmod(programs, gpu.sms)
    bandwidth = gpu.l2_bandwidth(min(programs, gpu.sms))
    busy = full * steps * max(arithmetic, traffic / bandwidth)
    if rest:  # the last wave has L2 for itself
        busy += steps * max(arithmetic, traffic / gpu.l2_bandwidth(rest))

    registers = 56 + config.block_m * config.block_n // (32 * config.num_warps)  # per thread
    resident = min(
        gpu.shared_limit // config.shared_bytes(math_mode, gpu),
        65536 // (32 * config.num_warps * registers),
    )
    waves = ceil(programs / (gpu.sms * max(1, resident)))
    waiting = waves * steps * _STEP_LATENCY / config.num_stages
    overhead: float = _TILE_OVERHEAD
    if config.split_k > 1:
        partial_sum = 4 * config.block_m * config.block_n
        overhead += _SPLIT_OVERHEAD + (1 + config.split_k) * partial_sum / bandwidth
    return max(busy, waiting) + waves * overhead


SPLIT_K_FACTORS = (1, 2, 4, 8, 16)
"""Ways to split a reduction that are considered."""


def candidates(
    rows: Iterable[TileConfig], problem: ProblemSize, math_mode: str, gpu: Gpu
) -> list[TileConfig]:
    """The rows that fit the GPU, with as many stages as fit, and their useful splits: those
    that leave each program a step and that do not oversubscribe the GPU."""
    fitting = (config.fitted(math_mode, gpu) for config in rows)
    return [
        replace(config, split_k=split_k)
        for config in fitting
        if config is not None
        for split_k in (SPLIT_K_FACTORS if config.can_split_k else (1,))
        if split_k == 1
        or (
            split_k <= problem.steps(config.block_k)
            and problem.tiles(config) * split_k <= _SPLIT_WAVES * gpu.sms
        )
    ]


def select_config(
    rows: Iterable[TileConfig], problem: ProblemSize, math_mode: str, gpu: Gpu
) -> TileConfig:
    """The row of least estimated cycles among those that fit; the first of equals.

    Raises:
        KernelError: no row fits the GPU's shared memory.
    """
    usable = candidates(rows, problem, math_mode, gpu)
    if not usable:
        raise KernelError(f"no tile fits {gpu.shared_limit} bytes of shared memory per block")
    return min(usable, key=lambda config: estimated_cycles(config, problem, math_mode, gpu))


def split_elements(gpu: Gpu) -> int:
    """Elements of the partial sums that any selected tile exchanges, at most."""
    return _SPLIT_WAVES * gpu.sms * _LARGEST_SPLIT


def gpu_of(device: torch.device) -> Gpu:
    """The GPU behind ``device``, or what stands in for one on the CPU."""
    if (stand_in := host(device)) is not None:
        return stand_in.gpu
    return _gpu(device)


@cache
def _gpu(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    architecture = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip:
        architecture = properties.gcnArchName.partition(":")[0]
    limit = getattr(properties, "shared_memory_per_block_optin", 0)
    return replace(
        record_of(architecture, properties.name),
        sms=properties.multi_processor_count,
        shared_limit=limit or properties.shared_memory_per_block,
    )
