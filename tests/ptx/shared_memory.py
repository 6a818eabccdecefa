"""Shared memory that knows who wrote and read each piece, and what orders them.

Every warp has a vector clock; barriers join them. A piece remembers the clock of its last write and
each warp's last read. What an asynchronous copy fills, or a product still reads, carries the clock
``NEVER``, which nothing has seen. Stores of threads reach asynchronous copies and wgmma only
through a proxy fence: ``fenced`` holds, for each warp, the clocks that a fence has passed on. What
cp.async wrote is taken to need none, as Triton and CUTLASS rely on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .global_memory import CELL
from .machine import WARP, Fault

if TYPE_CHECKING:
    from .machine import Machine

NEVER = 2**31 - 1
AGENTS = 24  # mbarriers of a block, each an agent that writes for copies
LATER = 2**62  # a time that no barrier has passed


class Shared:
    """The shared memory of all blocks of a machine, ``size`` bytes each."""

    def __init__(self, machine: Machine, size: int) -> None:
        self.machine, self.size = machine, size
        self.piece = min([16, *map(access_size, machine.program.code)])
        self.stride = -(-size // 16) * 16
        count, warps = machine.count, machine.threads // WARP
        self.data = np.full(count * self.stride, 0xFF, np.uint8)  # NaN, read as any format
        self.views = {size: self.data.view(cell) for size, cell in CELL.items()}
        pieces = len(self.data) // self.piece
        self.writer = np.zeros(pieces, np.int16)
        self.clock = np.zeros(pieces, np.int32)
        self.written = np.full(pieces, -1, np.int64)  # when; -1: not yet
        self.stored = np.zeros(pieces, bool)  # by threads, which a proxy fence must follow
        self.read = np.full(pieces, -1, np.int64)
        self.reads = np.zeros((pieces, warps), np.int32)
        self.seen = np.zeros((count, warps, warps + AGENTS), np.int32)
        self.fenced = np.zeros_like(self.seen)
        grid = machine.grid if machine.memory.order.atomics else 0
        self.known = np.zeros((count, warps, grid * warps), np.int32)  # see global_memory.Order
        self.own = np.arange(warps)
        self.seen[:, self.own, self.own] = 1
        self.passed = np.zeros(count, np.int64)  # when all threads met last

    def join(self, warps: np.ndarray) -> None:
        """A barrier of ``warps`` [blocks, warps]: what each did before, all have seen."""
        for clocks in (self.seen, self.fenced, self.known):
            most = np.where(warps[:, :, None], clocks, 0).max(1, keepdims=True)
            np.copyto(clocks, np.maximum(clocks, most), where=warps[:, :, None])
        self.seen[:, self.own, self.own] += warps
        self.passed[warps.all(1)] = self.machine.total

    def fence(self, warps: np.ndarray) -> None:
        """A proxy fence in ``warps``."""
        np.copyto(self.fenced, np.maximum(self.fenced, self.seen), where=warps[:, :, None])

    def pieces(self, lanes: np.ndarray, address: np.ndarray, size: int) -> np.ndarray:
        """[n, pieces of an access] of block and address of each thread, checked."""
        if len(address) and (address.min() < 0 or address.max() + size > self.size):
            raise Fault(f"access outside the {self.size} bytes of shared memory")
        if (address & (size - 1)).any():
            raise Fault(f"access of {size} bytes to shared memory that is not aligned")
        first = (self.machine.block[lanes] * self.stride + address) // self.piece
        count = size // self.piece
        return first[:, None] if count == 1 else first[:, None] + np.arange(count)

    def load(self, lanes: np.ndarray, address: np.ndarray, size: int) -> np.ndarray:
        """[n, size] bytes for these threads."""
        self.check_read(lanes, self.pieces(lanes, address, size))
        numbers = (self.machine.block[lanes] * self.stride + address) // size
        self.count_banks(lanes, address, size)
        return self.views[size][numbers].view(np.uint8).reshape(-1, size)

    def store(self, lanes: np.ndarray, address: np.ndarray, data: np.ndarray) -> None:
        size = data.shape[1]
        pieces = self.pieces(lanes, address, size)
        self.check_write(lanes, pieces)
        self.count_banks(lanes, address, size)
        self.put(lanes, address, data)
        self.mark(lanes, pieces)
        if (self.writer[pieces] != self.machine.warp[lanes][:, None]).any():
            numbers = (self.machine.block[lanes] * self.stride + address) // size
            if (self.views[size][numbers].view(np.uint8).reshape(-1, size) != data).any():
                raise Fault("shared memory written by two warps at once, with different values")

    def put(self, lanes: np.ndarray, address: np.ndarray, data: np.ndarray) -> None:
        size = data.shape[1]
        numbers = (self.machine.block[lanes] * self.stride + address) // size
        self.views[size][numbers] = np.ascontiguousarray(data).view(CELL[size])[:, 0]

    def mark(self, lanes: np.ndarray, pieces: np.ndarray, stored: bool = True) -> None:
        """These threads have written ``pieces``, by a store or by a copy of theirs."""
        self.stored[pieces] = stored
        block, warp = self.machine.block[lanes], self.machine.warp[lanes]
        self.writer[pieces] = warp[:, None]
        self.clock[pieces] = self.seen[block, warp, warp][:, None]
        self.written[pieces] = self.machine.total

    def expect(self, pieces: np.ndarray, writer: np.ndarray | int) -> None:
        """A copy will write ``pieces``; until then they are nobody's."""
        self.writer[pieces], self.clock[pieces], self.written[pieces] = writer, NEVER, LATER
        self.stored[pieces] = False

    def check_written(
        self, lanes: np.ndarray, pieces: np.ndarray, what: str, proxy: bool = False
    ) -> None:
        """The last write of each piece is ordered before these threads; with ``proxy``, also seen
        by asynchronous copies and products that they start."""
        block, warp = self.machine.block[lanes], self.machine.warp[lanes]
        open_ = self.written[pieces] >= self.passed[block][:, None]
        if not (proxy or open_.any()):
            return
        writer, clock = self.writer[pieces], self.clock[pieces]
        seen = self.seen[block[:, None], warp[:, None], writer]
        late = open_ & (clock > seen)
        if late.any():
            if (clock[late] == NEVER).any():
                raise Fault(f"shared memory {what} before the copy that fills it has landed")
            raise Fault(f"shared memory {what} that another warp wrote, without a barrier between")
        if proxy:
            passed = self.fenced[block[:, None], warp[:, None], writer]
            if (self.stored[pieces] & (clock > passed)).any():
                raise Fault(f"shared memory {what} asynchronously, written without a proxy fence")

    def check_read(self, lanes: np.ndarray, pieces: np.ndarray, proxy: bool = False) -> None:
        if (self.written[pieces] < 0).any():
            raise Fault("shared memory read that nothing has written")
        self.check_written(lanes, pieces, "read", proxy)
        block, warp = self.machine.block[lanes], self.machine.warp[lanes]
        self.reads[pieces, warp[:, None]] = self.seen[block, warp, warp][:, None]
        self.read[pieces] = self.machine.total

    def hold(self, lanes: np.ndarray, pieces: np.ndarray) -> None:
        """Something that these threads started reads ``pieces`` until it is waited for."""
        self.reads[pieces, self.machine.warp[lanes][:, None]] = NEVER
        self.read[pieces] = LATER

    def let_go(self, lanes: np.ndarray, pieces: np.ndarray) -> None:
        block, warp = self.machine.block[lanes], self.machine.warp[lanes]
        self.reads[pieces, warp[:, None]] = self.seen[block, warp, warp][:, None]
        self.read[pieces] = np.where(
            (self.reads[pieces] == NEVER).any(-1), LATER, self.machine.total
        )

    def check_write(self, lanes: np.ndarray, pieces: np.ndarray, proxy: bool = False) -> None:
        self.check_written(lanes, pieces, "written", proxy)
        block, warp = self.machine.block[lanes], self.machine.warp[lanes]
        open_ = self.read[pieces] >= self.passed[block][:, None]
        if not open_.any():
            return
        reads = self.reads[pieces]  # [n, pieces, warps]
        late = (reads > self.seen[block, warp, : len(self.own)][:, None, :]).any(-1) & open_
        if late.any():
            raise Fault("shared memory written that may still be read, without a barrier between")

    def count_banks(self, lanes: np.ndarray, address: np.ndarray, size: int) -> None:
        """Wavefronts of each request: words of 4 bytes that share one of 32 banks take turns."""
        profile = self.machine.memory.profile
        if profile is None:
            return
        together = 32 * 4 // max(4, size)  # threads that one wavefront can serve
        for first in range(0, len(address), together):
            at = address[first : first + together]
            words = np.unique((at[:, None] + np.arange(0, size, 4)) // 4)
            profile["shared wavefronts"] += int(np.bincount(words % 32).max())
            profile["shared ideal"] += 1


def access_size(instruction) -> int:
    """Bytes of an access to shared memory, the least that it may be; 16 for other instructions."""
    opcode = instruction.opcode
    if opcode.startswith(("ld.shared", "st.shared", "ld.volatile.shared")):
        vector = 4 if ".v4." in opcode else 2 if ".v2." in opcode else 1
        return vector * int(opcode.rpartition(".")[2][1:]) // 8
    if opcode.startswith(("cp.async.ca.", "cp.async.cg.")):
        return int(instruction.operands[2], 0)
    return 8 if opcode.startswith("mbarrier") else 16
