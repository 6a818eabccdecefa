"""Global memory: each storage at an address of its own, far from the others.

An access is checked for bounds (of the tensor, not of its storage) and for its own alignment.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .machine import Fault

if TYPE_CHECKING:
    from .machine import Machine

SPACING = 1 << 36  # bytes between storages: what runs out of one reaches no other
CELL = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


@dataclass
class Region:
    """A tensor's bytes [low, high), as simulated addresses; ``raw`` begins at ``origin``."""

    name: str
    low: int
    high: int
    origin: int
    raw: np.ndarray


class Memory:
    """The tensors of one launch. ``profile`` counts sectors and requests where it is not None."""

    def __init__(self, profile: Counter[str] | None = None) -> None:
        self.regions: list[Region] = []
        self.storages: dict[int, int] = {}
        self.kept: list[Any] = []
        self.maps: dict[int, Any] = {}  # tensor maps, by their place
        self.profile = profile
        self.order = Order(1, 1, False)  # of the launch

    def add(self, name: str, tensor: torch.Tensor) -> int:
        """Make a tensor of the CPU known; its simulated address, as aligned as it is."""
        start = tensor.untyped_storage().data_ptr()
        base = self.storages.setdefault(start, (len(self.storages) + 1) * SPACING + start % 256)
        low = base + tensor.data_ptr() - start
        span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        size = (span + 1) * tensor.element_size() if tensor.numel() else 0
        origin, end = low & ~15, -(-(low + size) // 16) * 16
        raw = (ctypes.c_uint8 * (end - origin)).from_address(tensor.data_ptr() - (low - origin))
        self.kept.append(tensor)
        self.regions.append(Region(name, low, low + size, origin, np.ctypeslib.as_array(raw)))
        self.regions.sort(key=lambda region: region.low)
        return low

    def region(self, low: int, high: int) -> Region:
        """The tensor that holds all of [low, high)."""
        place = bisect_right([region.low for region in self.regions], low)
        for region in self.regions[:place]:
            if low < region.high and high <= region.high:
                return region
        near = min(self.regions, key=lambda r: min(abs(low - r.low), abs(low - r.high)))
        raise Fault(
            f"access to bytes {low - near.low} to {high - near.low} of {near.name}, which has "
            f"{near.high - near.low}"
        )

    def cells(self, address: np.ndarray, size: int) -> list[tuple[Any, np.ndarray, np.ndarray]]:
        """(cells, their numbers, which addresses), a tensor at a time."""
        if (address & (size - 1)).any():
            raise Fault(f"access of {size} bytes to global memory that is not aligned")
        left, found = np.arange(len(address)), []
        while len(left):
            at = address[left]
            low = int(at.min())
            region = self.region(low, low + size)
            inside = at + size <= region.high
            cells = region.raw.view(CELL[size])
            found.append((cells, (at[inside] - region.origin) // size, left[inside]))
            left = left[~inside]
        return found

    def check_order(
        self, machine: Machine, lanes: np.ndarray, address: np.ndarray, size: int, writes: bool
    ) -> None:
        """What another warp wrote was released to this one."""
        piece = min(4, size)
        each = (address[:, None] + np.arange(0, size, piece)).ravel()
        whose = np.repeat(lanes, size // piece)
        for region in self.regions:
            inside = (each >= region.low) & (each < region.high)
            if inside.any():
                at = (each[inside] - region.origin) // piece
                self.order.check(machine, region, piece, whose[inside], at, writes)

    def load(self, address: np.ndarray, size: int) -> np.ndarray:
        """[n, size] bytes."""
        self.note("load", address, size)
        parts = self.cells(address, size)
        if len(parts) == 1:
            cells, numbers, _ = parts[0]
            return cells[numbers].view(np.uint8).reshape(-1, size)
        loaded = np.empty(len(address), CELL[size])
        for cells, numbers, which in parts:
            loaded[which] = cells[numbers]
        return loaded.view(np.uint8).reshape(-1, size)

    def store(self, address: np.ndarray, data: np.ndarray) -> None:
        size = data.shape[1]
        self.note("store", address, size)
        values = np.ascontiguousarray(data).view(CELL[size])[:, 0]
        for cells, numbers, which in self.cells(address, size):
            cells[numbers] = values[which]

    def note(self, kind: str, address: np.ndarray, size: int) -> None:
        """Count bytes and what they take: sectors of 32 bytes, by groups of 32 threads."""
        if self.profile is None or not len(address):
            return
        self.profile[f"{kind} bytes"] += len(address) * size
        for first in range(0, len(address), 32):
            sectors = len(np.unique(address[first : first + 32] // 32))
            self.profile[f"{kind} sectors"] += max(sectors, -(-size // 32))


class Order:
    """Which writes to global memory each warp of a launch may rely on.

    ``released`` [grid, warps] holds the clocks that a block's atomics have made known; a machine's
    ``known`` holds what each of its warps has acquired of them, nothing without ``atomics``.
    """

    def __init__(self, grid: int, warps: int, atomics: bool) -> None:
        self.released, self.atomics = np.zeros((grid, warps), np.int32), atomics
        self.writes: dict[tuple[int, int], tuple[np.ndarray, ...]] = {}

    def meet(self, machine: Machine, lanes: np.ndarray) -> None:
        """An acquiring and releasing atomic of these threads."""
        shared = machine.shared
        for block, warp in {(machine.block[n], machine.warp[n]) for n in lanes}:
            mine = self.released[machine.ctaid[block * machine.threads]]
            np.maximum(mine, shared.seen[block, warp, : len(mine)], out=mine)
            known = shared.known[block, warp]
            np.maximum(known, self.released.ravel(), out=known)
            shared.seen[block, warp, warp] += 1

    def check(
        self,
        machine: Machine,
        region: Region,
        piece: int,
        lanes: np.ndarray,
        at: np.ndarray,
        writes: bool,
    ) -> None:
        key = region.origin, piece
        if key not in self.writes:
            count = len(region.raw) // piece
            kinds = (np.int32, -1), (np.int16, 0), (np.int32, 0)
            self.writes[key] = tuple(np.full(count, fill, kind) for kind, fill in kinds)
        writer, by, clock = self.writes[key]
        block, warp, own = machine.block[lanes], machine.warp[lanes], machine.ctaid[lanes]
        seen = machine.shared.seen[block, warp, by[at]]
        known = np.int32(0)
        if self.atomics:
            whose = np.maximum(writer[at], 0) * self.released.shape[1] + by[at]
            known = machine.shared.known[block, warp, whose]
        late = clock[at] > np.where(writer[at] == own.astype(np.int32), seen, known)
        if late.any():
            raise Fault("global memory that another warp wrote, and did not release to this one")
        if writes:
            writer[at], by[at] = own, warp
            if ((writer[at] != own.astype(np.int32)) | (by[at] != warp)).any():
                raise Fault("global memory written by two warps at once")
            clock[at] = machine.shared.seen[block, warp, warp]
