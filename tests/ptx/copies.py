"""Asynchronous copies and mbarriers. A copy lands when it is waited for, and not before.

cp.async belongs to the thread that issued it, a bulk copy to the mbarrier that it reports to. The
tensor map of a bulk copy is checked as the driver would, see ``TensorMap``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .machine import WARP, Fault, Group, Machine, Step
from .parse import Instruction, Program, registers_in
from .shared_memory import AGENTS

if TYPE_CHECKING:
    from .instructions import Form

FORMS: list[tuple[re.Pattern[str], Form]] = []
SPAN = {0: 0, 1: 32, 2: 64, 3: 128}  # bytes of a swizzled row, by mode
TURN = {0: 0, 1: 1, 2: 3, 3: 7}
PLACE = 1 << 60  # where tensor maps are


def form(pattern: str):
    def add(make: Form) -> Form:
        FORMS.append((re.compile(pattern), make))
        return make

    return add


class TensorMap:
    """A tensor as TMA moves it, in boxes; refused as the driver would."""

    def __init__(
        self, values: np.ndarray, shape: list[int], strides: list[int], box: list[int], mode: int
    ) -> None:
        """``values``: the tensor's elements as unsigned numbers, from its first on; ``strides``
        in elements; ``box``: of one copy; ``mode``: the swizzle."""
        size, inner = values.itemsize, box[-1] * values.itemsize
        problems = {
            "strides must be multiples of 16 bytes": any(s * size % 16 for s in strides[:-1]),
            "rows must be dense": strides[-1] != 1,
            "a box has 1 to 256 elements a dimension": not all(1 <= b <= 256 for b in box),
            "a box's rows must be multiples of 16 bytes": inner % 16 != 0,
            "a box's rows must fit the swizzle": mode > 0 and inner > SPAN[mode],
            "a map has 1 to 5 dimensions": not 1 <= len(shape) <= 5,
            "sizes must be 1 to 2^32": not all(1 <= n <= 2**32 for n in shape),
        }
        if wrong := [text for text, found in problems.items() if found]:
            raise Fault(f"tensor map: {'; '.join(wrong)}")
        self.size, self.shape, self.box = size, shape, box
        self.bytes = int(np.prod(box)) * size
        self.view = np.lib.stride_tricks.as_strided(values, shape, [s * size for s in strides])
        place = np.arange(self.bytes // inner)[:, None] * max(inner, SPAN[mode])
        self.place = (place + np.arange(0, inner, 16)).ravel()
        self.turn = TURN[mode]

    def pieces(self, start: int) -> np.ndarray:
        """Addresses of the box's pieces of 16 bytes in shared memory."""
        if start % 128:
            raise Fault("bulk copy to or from shared memory that is not aligned to 128 bytes")
        place = start + self.place
        return place ^ ((place >> 7 & self.turn) << 4)

    def overlap(self, corner: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where tensor and box meet: of the tensor, of the box."""
        low = [max(0, c) for c in corner]
        high = [min(n, c + b) for n, c, b in zip(self.shape, corner, self.box, strict=True)]
        inside = tuple(slice(a, max(a, b)) for a, b in zip(low, high, strict=True))
        box = tuple(slice(s.start - c, s.stop - c) for s, c in zip(inside, corner, strict=True))
        return inside, box

    def load(self, corner: list[int]) -> np.ndarray:
        """[pieces, 16] bytes; zero outside the tensor."""
        box = np.zeros(self.box, self.view.dtype)
        inside, there = self.overlap(corner)
        if all(s.stop > s.start for s in inside):
            box[there] = self.view[inside]
        return box.reshape(-1).view(np.uint8).reshape(-1, 16)

    def store(self, corner: list[int], data: np.ndarray) -> None:
        inside, there = self.overlap(corner)
        if all(s.stop > s.start for s in inside):
            self.view[inside] = data.reshape(-1).view(self.view.dtype).reshape(self.box)[there]


@dataclass(eq=False)
class Copy:
    """cp.async of one instruction: group of each thread, -1 before its commit."""

    lanes: np.ndarray
    address: np.ndarray
    data: np.ndarray
    group: np.ndarray


@dataclass(eq=False)
class Arriving:
    """A bulk load on its way."""

    lanes: np.ndarray
    address: np.ndarray
    data: np.ndarray
    pieces: np.ndarray


@dataclass(eq=False)
class Barrier:
    """An mbarrier: arrivals and bytes that its phase still waits for."""

    count: int
    agent: int
    seen: np.ndarray
    fenced: np.ndarray
    made: np.ndarray  # the clock that who uses it must have seen
    pending: int = 0
    bytes: int = 0
    phase: int = 0
    landed: int = 0
    copies: list[Arriving] = field(default_factory=list)
    done: tuple[np.ndarray, np.ndarray] | None = None  # clocks of the last complete phase


@dataclass(eq=False)
class Outgoing:
    """A bulk store that still reads shared memory."""

    lane: int
    pieces: np.ndarray
    group: int = -1


class Copies:
    """What is on its way in a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.copies: list[Copy] = []
        self.groups = np.zeros(machine.lanes, np.int64)  # committed by each thread
        self.barriers: dict[tuple[int, int], Barrier] = {}
        self.agents = [0] * machine.count
        self.polled = np.zeros(machine.lanes // WARP, bool)  # warps whose last try_wait failed
        self.outgoing: list[Outgoing] = []
        self.stored = np.zeros(machine.lanes, np.int64)  # bulk groups committed by each thread

    # cp.async

    def commit(self) -> None:
        for copy in self.copies:
            mine = (copy.group < 0) & self.machine.on()[copy.lanes]
            copy.group = np.where(mine, self.groups[copy.lanes], copy.group)
        self.groups += self.machine.on()

    def settle(self, left: int) -> None:
        """Of the groups that these threads committed all but the last ``left`` land."""
        machine = self.machine
        for copy in list(self.copies):
            due = (copy.group >= 0) & (copy.group < self.groups[copy.lanes] - left)
            due &= machine.on()[copy.lanes]
            if not due.any():
                continue
            lanes, address = copy.lanes[due], copy.address[due]
            pieces = machine.shared.pieces(lanes, address, copy.data.shape[1])
            machine.shared.put(lanes, address, copy.data[due])
            machine.shared.mark(lanes, pieces, stored=False)
            if due.all():
                self.copies.remove(copy)
            else:
                copy.lanes, copy.address = copy.lanes[~due], copy.address[~due]
                copy.data, copy.group = copy.data[~due], copy.group[~due]

    # mbarriers

    def barrier(self, lane: int, address: int) -> Barrier:
        """The one at this address, which the thread must know to be there."""
        machine = self.machine
        block, warp = machine.block[lane], machine.warp[lane]
        found = self.barriers.get((int(block), address))
        if found is None:
            raise Fault(f"no mbarrier at {address}")
        if (found.made > machine.shared.seen[block, warp]).any():
            raise Fault("an mbarrier used that another warp made, without a barrier between")
        return found

    def make(self, lane: int, address: int, count: int) -> None:
        machine, block, warp = self.machine, self.machine.block[lane], self.machine.warp[lane]
        shared, one = machine.shared, np.array([lane])
        if self.agents[block] == AGENTS or (int(block), address) in self.barriers:
            raise Fault("an mbarrier made where one is, or too many of them")
        pieces = shared.pieces(one, np.array([address]), 8)
        shared.check_write(one, pieces)
        shared.expect(pieces, warp)
        size = shared.seen.shape[2]
        clocks = np.zeros((3, size), np.int32)
        barrier = Barrier(count, len(shared.own) + self.agents[block], *clocks, pending=count)
        barrier.made[warp] = shared.seen[block, warp, warp]
        self.agents[block] += 1
        self.barriers[int(block), address] = barrier

    def unmake(self, lane: int, address: int) -> None:
        if self.barrier(lane, address).copies:
            raise Fault("an mbarrier ends while copies report to it")
        del self.barriers[int(self.machine.block[lane]), address]
        shared, one = self.machine.shared, np.array([lane])
        shared.mark(one, shared.pieces(one, np.array([address]), 8))

    def arrive(self, lane: int, address: int, size: int) -> None:
        """One arrival, which announces ``size`` bytes."""
        barrier, shared = self.barrier(lane, address), self.machine.shared
        block, warp = self.machine.block[lane], self.machine.warp[lane]
        np.maximum(barrier.seen, shared.seen[block, warp], out=barrier.seen)
        np.maximum(barrier.fenced, shared.fenced[block, warp], out=barrier.fenced)
        shared.seen[block, warp, warp] += 1
        barrier.pending -= 1
        barrier.bytes += size
        if barrier.pending < 0:
            raise Fault("more arrivals at an mbarrier than it was made for")
        self.turn(barrier)

    def turn(self, barrier: Barrier) -> None:
        """Begin the next phase where nothing is missing from this one."""
        if barrier.pending == 0 and barrier.bytes == 0:
            barrier.phase ^= 1
            barrier.pending = barrier.count
            barrier.done = barrier.seen.copy(), barrier.fenced.copy()
            self.machine.events += 1

    def land(self, barrier: Barrier) -> None:
        """All that is on its way to this barrier arrives."""
        shared = self.machine.shared
        for copy in barrier.copies:
            shared.put(copy.lanes, copy.address, copy.data)
            barrier.landed += 1
            barrier.bytes -= copy.data.size
            shared.clock[copy.pieces] = barrier.landed
            shared.written[copy.pieces] = self.machine.total
            barrier.seen[barrier.agent] = barrier.landed
        barrier.copies.clear()
        self.turn(barrier)

    def wait(self, group: Group, instruction: Instruction) -> bool:
        """try_wait: threads whose phase is not complete stay; nothing lands before it must."""
        from .instructions import address, source, target

        machine, program = self.machine, self.machine.program
        place = np.broadcast_to(address(program, instruction.operands[1])(machine), machine.lanes)
        parity = source(program, instruction.operands[2], np.uint32)(machine)
        parity = np.broadcast_to(parity, machine.lanes)
        done, lanes = np.zeros(machine.lanes, bool), machine.active()
        stay = done.copy()
        for first in lanes[np.unique(lanes // WARP, return_index=True)[1]]:
            self.wait_warp(int(first), place, parity, done, stay)
        on = machine.on()
        target(program, instruction.operands[0])(machine, done)
        if not stay.any():
            return True
        if (on & ~stay).any():
            machine.groups.append(Group(group.pc, on & ~stay, group.turn))
            group.lanes = group.lanes & (stay | ~on)
        group.pc -= 1
        group.parked = True
        return False

    def wait_warp(
        self, first: int, place: np.ndarray, parity: np.ndarray, done: np.ndarray, stay: np.ndarray
    ) -> None:
        """The threads of the warp of ``first`` that wait: ``done``, told to try again, or to
        ``stay`` until something happens. The first try fails where the phase is not complete."""
        machine, shared = self.machine, self.machine.shared
        warp_number = first // WARP
        mine = np.zeros(machine.lanes, bool)
        mine[warp_number * WARP : (warp_number + 1) * WARP] = True
        mine &= machine.on()
        if len({*zip(place[mine].tolist(), parity[mine].tolist(), strict=True)}) > 1:
            raise Fault("threads of a warp wait for different phases")
        barrier = self.barrier(first, int(place[first]))
        complete = barrier.phase != parity[first] & 1
        if not complete and not self.polled[warp_number]:
            self.polled[warp_number] = True
            return
        if not complete and barrier.pending == 0:
            self.land(barrier)
            complete = barrier.phase != parity[first] & 1
        if not complete:
            stay |= mine
            return
        self.polled[warp_number] = False
        done |= mine
        if barrier.done is not None:
            block, warp = machine.block[first], machine.warp[first]
            for clocks, given in zip((shared.seen, shared.fenced), barrier.done, strict=True):
                np.maximum(clocks[block, warp], given, out=clocks[block, warp])

    def check_end(self, lanes: np.ndarray) -> None:
        """These threads end; shared memory goes with the last of a block."""
        if any(lanes[store.lane] for store in self.outgoing):
            raise Fault("a thread ends while its bulk store still reads shared memory")
        ended = ~self.machine.live.reshape(self.machine.count, -1).any(1)
        if any(ended[block] and b.copies for (block, _), b in self.barriers.items()):
            raise Fault("a block ends while a bulk copy to it is on its way")

    # Bulk copies

    def bulk_load(self, lane: int, to: int, map_: TensorMap, corner: list[int], at: int) -> None:
        machine, shared = self.machine, self.machine.shared
        machine.check_waited(np.array([lane]))
        barrier, address = self.barrier(lane, at), map_.pieces(to)
        lanes = np.full(len(address), lane)
        pieces = shared.pieces(lanes, address, 16)
        shared.check_write(lanes, pieces, proxy=True)
        shared.expect(pieces, barrier.agent)
        barrier.copies.append(Arriving(lanes, address, map_.load(corner), pieces))

    def bulk_store(self, lane: int, of: int, map_: TensorMap, corner: list[int]) -> None:
        machine, shared = self.machine, self.machine.shared
        machine.check_waited(np.array([lane]))
        address = map_.pieces(of)
        lanes = np.full(len(address), lane)
        pieces = shared.pieces(lanes, address, 16)
        shared.check_read(lanes, pieces, proxy=True)
        shared.hold(lanes, pieces)
        numbers = (machine.block[lane] * shared.stride + address) // 16
        map_.store(corner, shared.views[16][numbers].view(np.uint8))
        self.outgoing.append(Outgoing(lane, pieces))

    def bulk_commit(self) -> None:
        for store in self.outgoing:
            if store.group < 0 and self.machine.on()[store.lane]:
                store.group = self.stored[store.lane]
        self.stored += self.machine.on()

    def bulk_settle(self, left: int) -> None:
        for store in list(self.outgoing):
            done = 0 <= store.group < self.stored[store.lane] - left
            if done and self.machine.on()[store.lane]:
                self.outgoing.remove(store)
                lanes = np.full(len(store.pieces), store.lane)
                self.machine.shared.let_go(lanes, store.pieces)


@form(r"cp\.async\.(ca|cg)\.shared(?:::cta)?\.global(?:\.L2::[\w:]+)?")
def copy(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    from .instructions import address, source

    to, of = (address(program, text) for text in i.operands[:2])
    size = int(i.operands[2], 0)
    if size not in ((16,) if match[1] == "cg" else (4, 8, 16)):
        raise ValueError("bytes of a copy")
    given = source(program, i.operands[3], np.uint32) if len(i.operands) > 3 else None

    def step(m: Machine) -> None:
        lanes = m.active()
        many = np.full(len(lanes), size)
        if given is not None:
            many = np.broadcast_to(given(m), m.lanes)[lanes].astype(np.int64)
        if not np.isin(many, (0, size)).all():
            raise Fault("cp.async of part of its bytes")
        where, place = of(m)[lanes], to(m)[lanes]
        if (where & (size - 1)).any():  # read or not
            raise Fault(f"cp.async of {size} bytes from an address that is not aligned")
        data = np.zeros((len(lanes), size), np.uint8)
        if (full := many > 0).any():
            data[full] = m.fetch(lanes[full], where[full], size)
        pieces = m.shared.pieces(lanes, place, size)
        m.shared.check_write(lanes, pieces)
        m.shared.count_banks(lanes, place, size)
        m.shared.expect(pieces, m.warp[lanes][:, None])
        m.copies.copies.append(Copy(lanes, place, data, np.full(len(lanes), -1)))

    return step


@form(r"cp\.async\.commit_group")
def commit(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    return lambda m: m.copies.commit()


@form(r"cp\.async\.wait_(group|all)")
def settle(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    left = int(i.operands[0], 0) if match[1] == "group" else 0

    def step(m: Machine) -> None:
        if match[1] == "all":
            m.copies.commit()
        m.copies.settle(left)

    return step


@form(r"mbarrier\.(init|inval)\.shared(?:::cta)?\.b64")
@form(r"mbarrier\.(arrive)(\.expect_tx)?(?:\.release\.cta)?\.shared(?:::cta)?\.b64")
def barrier(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    from .instructions import address, source

    place = next(text for text in i.operands if text.startswith("["))
    at, number = address(program, place), i.operands[-1]
    bytes_ = match[1] == "arrive" and match[2] is not None
    value = None
    if match[1] == "init" or bytes_:
        value = source(program, number, np.uint32)
    elif number != place:
        raise ValueError("a form of mbarrier that nobody needed")

    def step(m: Machine) -> None:
        where = np.broadcast_to(at(m), m.lanes)
        given = np.broadcast_to(0 if value is None else value(m), m.lanes)
        for lane in m.active():
            if match[1] == "init":
                m.copies.make(lane, int(where[lane]), int(given[lane]))
            elif match[1] == "inval":
                m.copies.unmake(lane, int(where[lane]))
            else:
                m.copies.arrive(lane, int(where[lane]), int(given[lane]))

    return step


@form(r"mbarrier\.try_wait\.parity(?:\.acquire\.cta)?\.shared(?:::cta)?\.b64")
def by_machine(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    return lambda m: None  # Machine.execute calls Copies.wait


@form(r"fence\.proxy\.async(?:\.shared::cta)?")
def proxy_fence(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    return lambda m: m.shared.fence(m.on().reshape(m.count, -1, WARP).any(2))


@form(
    r"cp\.async\.bulk\.tensor\.(\d)d\.(shared::(?:cluster|cta)\.global(?:\.tile)?"
    r"\.mbarrier::complete_tx::bytes|global\.shared::cta(?:\.tile)?\.bulk_group)"
)
def bulk(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    from .instructions import address, source

    loads = match[2].startswith("shared")
    shared, tensor = i.operands[:2] if loads else i.operands[1::-1]
    place = address(program, shared)
    name, _, corner = tensor.strip("[] ").partition(",")
    map_ = source(program, name.strip(), np.uint64)
    corners = [source(program, text, np.int32) for text in registers_in(corner.strip())][::-1]
    if len(corners) != int(match[1]):
        raise ValueError("as many coordinates as dimensions")
    at = address(program, i.operands[2]) if loads else None

    def step(m: Machine) -> None:
        def of(value: Any, lane: int) -> int:
            return int(np.broadcast_to(value(m), m.lanes)[lane])

        for lane in m.active():
            found = m.memory.maps.get(of(map_, lane))
            if found is None:
                raise Fault("no tensor map at this address")
            box = [of(c, lane) for c in corners]
            if at is not None:
                m.copies.bulk_load(lane, of(place, lane), found, box, of(at, lane))
            else:
                m.copies.bulk_store(lane, of(place, lane), found, box)

    return step


@form(r"cp\.async\.bulk\.(commit_group|wait_group(?:\.read)?)")
def bulk_groups(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    if match[1] == "commit_group":
        return lambda m: m.copies.bulk_commit()
    left = int(i.operands[0], 0)
    return lambda m: m.copies.bulk_settle(left)
