"""Threads: registers, the groups that run together, divergence, reconvergence and barriers.

All threads of several blocks run at once, each register a numpy vector over them. Threads that
branch apart run as groups, the one furthest behind first, and join where they meet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .parse import Instruction, Program, Unknown

if TYPE_CHECKING:
    from .global_memory import Memory

WARP = 32
LIMIT = 400_000  # instructions of one batch of blocks: more is a loop that does not end
POISON = 0x7FEDCBA97FEDCBA9  # what registers hold before they are written
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}

Vector = Any  # a numpy vector over all threads, or a scalar that stands for one
Step = Callable[["Machine"], None]


class Fault(AssertionError):
    """The program does what hardware would not allow, or not always get right."""


@dataclass(eq=False)
class Group:
    """Threads that are at one instruction. ``turn`` orders blocks after an atomic."""

    pc: int
    lanes: np.ndarray
    turn: float = 0.0
    parked: bool = False  # waits for an mbarrier
    granted: bool = False  # may execute the atomic that it is at


@dataclass(eq=False)
class Arrival:
    """Threads that wait at a barrier, for ``due`` in all (None: the block's), then go to ``pc``."""

    pc: int
    turn: float
    due: int | None
    lanes: np.ndarray


class Machine:
    """Blocks ``blocks`` of a grid, with what they share and wait for."""

    def __init__(
        self,
        program: Program,
        steps: list[Step],
        arguments: dict[str, int],
        memory: Memory,
        blocks: np.ndarray,
        grid: int,
        threads: int,
        shared: int,
        rng: np.random.Generator,
    ) -> None:
        from .copies import Copies
        from .matrix import Products
        from .shared_memory import Shared

        self.program, self.steps, self.arguments = program, steps, arguments
        self.memory, self.grid, self.rng = memory, grid, rng
        self.threads, self.count = threads, len(blocks)
        self.lanes = self.count * threads
        self.tid = np.tile(np.arange(threads, dtype=np.uint32), self.count)
        self.block = np.repeat(np.arange(self.count), threads)
        self.warp = self.tid.astype(np.int64) // WARP
        self.ctaid = blocks.astype(np.uint32)[self.block]
        self.files = {
            width: np.full((rows, self.lanes), POISON & ((1 << width) - 1), UNSIGNED[width])
            if width > 1
            else np.zeros((rows, self.lanes), bool)
            for width, rows in program.rows.items()
        }
        self.views: dict[tuple[int, Any], np.ndarray] = {}
        self.mask: np.ndarray | None = None  # threads that execute the instruction; None: all
        self.live = np.ones(self.lanes, bool)
        self.arrived: dict[int, list[Arrival]] = {}
        self.groups = [Group(0, self.live.copy())]
        self.executed: Counter[str] = Counter()  # warps that executed each instruction
        self.total = self.events = 0
        waits = any(i.opcode.startswith("griddepcontrol") for i in program.code)
        self.waited = np.full(self.lanes, not waits)
        self.shared = Shared(self, shared)
        self.copies = Copies(self)
        self.products = Products(self)

    def release_parts(self) -> None:
        """Its parts refer to it: without this, much memory would stay until the next collection."""
        del self.shared, self.copies, self.products

    def view(self, width: int, dtype: Any) -> np.ndarray:
        """The registers of a width, read as ``dtype``."""
        found = self.views.get((width, dtype))
        if found is None:
            found = self.views[width, dtype] = self.files[width].view(dtype)
        return found

    def active(self) -> np.ndarray:
        """Numbers of the threads that execute."""
        return np.arange(self.lanes) if self.mask is None else np.nonzero(self.mask)[0]

    def scatter(self, lanes: np.ndarray, values: np.ndarray) -> np.ndarray:
        """The values of these threads, among zeros of all others."""
        if self.mask is None:
            return values
        everyone = np.zeros(self.lanes, values.dtype)
        everyone[lanes] = values
        return everyone

    def on(self) -> np.ndarray:
        return np.ones(self.lanes, bool) if self.mask is None else self.mask

    def warps(self) -> np.ndarray:
        """[blocks, warps]: those that execute, each as a whole."""
        warps = self.on().reshape(self.count, -1, WARP)
        some = warps.any(2)
        if not (some == warps.all(2)).all():
            raise Fault("part of a warp executes what takes a whole one")
        return some

    def fetch(self, lanes: np.ndarray, address: np.ndarray, size: int) -> np.ndarray:
        """[n, size] bytes of global memory for these threads."""
        self.check_waited(lanes)
        self.memory.check_order(self, lanes, address, size, writes=False)
        return self.memory.load(address, size)

    def deposit(self, lanes: np.ndarray, address: np.ndarray, data: np.ndarray) -> None:
        self.check_waited(lanes)
        self.memory.check_order(self, lanes, address, data.shape[1], writes=True)
        self.memory.store(address, data)

    def check_waited(self, lanes: np.ndarray) -> None:
        if not self.waited[lanes].all():
            raise Fault("global memory touched before the kernels before this one are through")

    def run(self) -> None:
        seen = 0
        while self.groups:
            ready = [group for group in self.groups if not group.parked]
            if ready:
                self.advance(min(ready, key=lambda group: (group.turn, group.pc)))
            elif self.events == seen:
                raise Fault("waits for ever on an mbarrier")
            else:
                seen = self.events
                for group in self.groups:
                    group.parked = False
        if self.arrived:
            raise Fault(f"threads wait for ever at barriers {sorted(self.arrived)}")

    def advance(self, group: Group) -> None:
        """Run ``group`` until it splits, waits, ends, or meets another one."""
        alone = len(self.groups) == 1
        full = bool(group.lanes.all())
        while True:
            if not alone and self.joins(group):
                return
            pc = group.pc
            instruction = self.program.code[pc]
            self.total += 1
            if self.total > LIMIT:
                raise Fault(f"more than {LIMIT} instructions: a loop does not end")
            mask = None if full else group.lanes
            if instruction.guard is not None:
                width, row = self.program.registers[instruction.guard]
                guard = self.files[width][row]
                guard = ~guard if instruction.negated else guard
                mask = guard if mask is None else guard & mask
                if mask.all():
                    mask = None
            self.mask = mask
            group.pc = pc + 1
            try:
                if not self.execute(instruction, pc, group):
                    return
            except Fault as fault:
                raise Fault(f"{fault}\n  line {instruction.line}: {instruction}") from None

    def joins(self, group: Group) -> bool:
        """Whether the group became part of another, or another one is behind it now."""
        for other in self.groups:
            if other is group or other.parked or other.turn != group.turn:
                continue
            if other.pc == group.pc:
                other.lanes = other.lanes | group.lanes
                self.groups.remove(group)
                return True
            if other.pc < group.pc:
                return True
        return False

    def execute(self, instruction: Instruction, pc: int, group: Group) -> bool:
        """Whether the group may go on at once."""
        name = instruction.opcode.partition(".")[0]
        if name == "bra":
            return self.branch(group, self.program.labels[instruction.operands[0]])
        if name == "ret":
            return self.leave(group)
        if self.mask is not None and not self.mask.any():
            return True
        if self.memory.profile is not None:
            self.executed[instruction.opcode] += int(self.on().reshape(-1, WARP).any(1).sum())
        if name in ("bar", "barrier") and "warp" not in instruction.opcode:
            return self.barrier(group, instruction)
        if "try_wait" in instruction.opcode:
            return self.copies.wait(group, instruction)
        if name == "atom" and self.scatters(group):
            return False
        if self.products.tracks:
            self.products.check(instruction)
        self.steps[pc](self)
        return True

    def branch(self, group: Group, target: int) -> bool:
        if self.mask is None:
            group.pc = target
            return True
        taken = self.mask
        if not taken.any():
            return True
        if (taken == group.lanes).all():
            group.pc = target
            return True
        self.groups.append(Group(target, taken.copy(), group.turn))
        group.lanes = group.lanes & ~taken
        return False

    def leave(self, group: Group) -> bool:
        gone = group.lanes & self.on()
        self.live &= ~gone
        self.copies.check_end(gone)
        group.lanes = group.lanes & ~gone
        if group.lanes.any():
            return False
        self.groups.remove(group)
        self.events += 1
        for number in list(self.arrived):
            self.release(number)
        return False

    def scatters(self, group: Group) -> bool:
        """Blocks that come to an atomic go on one by one, in random order."""
        if group.granted:
            group.granted = False
            return False
        self.groups.remove(group)
        for block in np.unique(self.block[group.lanes]):
            lanes = group.lanes & (self.block == block)
            self.groups.append(Group(group.pc - 1, lanes, 1 + self.rng.random(), granted=True))
        return True

    def barrier(self, group: Group, instruction: Instruction) -> bool:
        """bar.sync: of all threads of the block that have not ended, or of as many as it says."""
        if instruction.opcode not in ("bar.sync", "barrier.sync", "barrier.sync.aligned"):
            raise Unknown(f"line {instruction.line}: {instruction}")
        warps = self.warps()
        number, *count = (int(text, 0) for text in instruction.operands)
        if not count and number not in self.arrived:
            there = warps.any(1)[self.block]
            if self.mask is None or (self.mask == (self.live & there)).all():
                self.shared.join(warps)
                return True
        arrival = Arrival(group.pc, group.turn, count[0] if count else None, self.on().copy())
        self.arrived.setdefault(number, []).append(arrival)
        group.lanes = group.lanes & ~arrival.lanes
        if not group.lanes.any():
            self.groups.remove(group)
        self.release(number)
        return False

    def release(self, number: int) -> None:
        """Let those blocks go on whose threads have all arrived."""
        waiting = self.arrived.pop(number)
        there = np.sum([a.lanes.reshape(self.count, -1).sum(1) for a in waiting], axis=0)
        live = self.live.reshape(self.count, -1).sum(1)
        due = live if waiting[0].due is None else waiting[0].due
        done = (there >= due) & (there > 0)
        lanes = done[self.block]
        if done.any():
            self.events += 1
            everyone = np.logical_or.reduce([a.lanes for a in waiting]) & lanes
            self.shared.join(everyone.reshape(self.count, -1, WARP).any(2))
        for a in waiting:
            if (go := a.lanes & lanes).any():
                self.groups.append(Group(a.pc, go, a.turn))
            if (stay := a.lanes & ~lanes).any():
                self.arrived.setdefault(number, []).append(Arrival(a.pc, a.turn, a.due, stay))
