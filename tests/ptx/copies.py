"""Asynchronous copies and mbarriers. A copy lands when it is waited for, and not before.

cp.async belongs to the thread that issued it, a bulk copy to the mbarrier that it reports to. The
tensor map of a bulk copy is checked as the driver would, see ``TensorMap``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .flights import Flights
from .machine import WARP, Fault, Group, Machine, Step
from .operands import address, form, read, spread, write
from .parse import Instruction, Program, registers_in
from .shared_memory import AGENTS

SPAN = {0: 0, 1: 32, 2: 64, 3: 128}  # bytes of a swizzled row, by mode
TURN = {0: 0, 1: 1, 2: 3, 3: 7}
PLACE = 1 << 60  # where tensor maps are


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


Arriving = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""A bulk load on its way: lanes, addresses, data and pieces of shared memory."""


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


class Copies:
    """What is on its way in a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.coming, self.outgoing = Flights(machine), Flights(machine)  # cp.async, bulk stores
        self.barriers: dict[tuple[int, int], Barrier] = {}
        self.agents = [0] * machine.count
        self.polled = np.zeros(machine.lanes // WARP, bool)  # warps whose last try_wait failed

    def settle(self, left: int) -> None:
        """Of the groups of cp.async of these threads all but the last ``left`` land."""
        shared = self.machine.shared
        for lanes, place, data in self.coming.settle(left):
            shared.put(lanes, place, data)
            shared.mark(lanes, shared.pieces(lanes, place, data.shape[1]), stored=False)

    def settle_stores(self, left: int) -> None:
        for lanes, pieces in self.outgoing.settle(left):
            self.machine.shared.let_go(lanes, pieces)

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
        for lanes, place, data, pieces in barrier.copies:
            shared.put(lanes, place, data)
            barrier.landed += 1
            barrier.bytes -= data.size
            shared.clock[pieces] = barrier.landed
            shared.written[pieces] = self.machine.total
            barrier.seen[barrier.agent] = barrier.landed
        barrier.copies.clear()
        self.turn(barrier)

    def wait(self, group: Group, instruction: Instruction) -> bool:
        """try_wait: threads whose phase is not complete stay; nothing lands before it must."""
        machine, program = self.machine, self.machine.program
        place = address(program, instruction.operands[1])(machine)
        parity = spread(machine, read(program, instruction.operands[2], "u32")(machine))
        on = machine.on()
        done, stay = np.zeros((2, machine.lanes), bool)
        for warp in np.nonzero(on.reshape(-1, WARP).any(1))[0]:
            lanes = warp * WARP + np.nonzero(on[warp * WARP : (warp + 1) * WARP])[0]
            if len({*zip(place[lanes].tolist(), parity[lanes].tolist(), strict=True)}) > 1:
                raise Fault("threads of a warp wait for different phases")
            ready = self.poll(int(lanes[0]), int(place[lanes[0]]), int(parity[lanes[0]]))
            if ready is None:
                stay[lanes] = True
            else:
                done[lanes] = ready
        write(program, instruction.operands[0])(machine, done)
        if not stay.any():
            return True
        if (on & ~stay).any():
            machine.groups.append(Group(group.pc, on & ~stay, group.turn))
            group.lanes = group.lanes & (stay | ~on)
        group.pc -= 1
        group.parked = True
        return False

    def poll(self, lane: int, place: int, parity: int) -> bool | None:
        """Whether the phase is complete, as the warp of ``lane`` is told; None: it must stay until
        something happens. The first try fails where the phase is not complete."""
        machine, shared, warp = self.machine, self.machine.shared, lane // WARP
        barrier = self.barrier(lane, place)
        if barrier.phase == parity & 1:
            if not self.polled[warp]:
                self.polled[warp] = True
                return False
            if barrier.pending == 0:
                self.land(barrier)
            if barrier.phase == parity & 1:
                return None
        self.polled[warp] = False
        if barrier.done is not None:
            mine = machine.block[lane], machine.warp[lane]
            for clocks, given in zip((shared.seen, shared.fenced), barrier.done, strict=True):
                np.maximum(clocks[mine], given, out=clocks[mine])
        return True

    def check_end(self, lanes: np.ndarray) -> None:
        """These threads end; shared memory goes with the last of a block."""
        if any(store.touches(lanes) for store in self.outgoing.all):
            raise Fault("a thread ends while its bulk store still reads shared memory")
        ended = ~self.machine.live.reshape(self.machine.count, -1).any(1)
        if any(ended[block] and b.copies for (block, _), b in self.barriers.items()):
            raise Fault("a block ends while a bulk copy to it is on its way")

    # Bulk copies

    def box(self, lane: int, to: int, map_: TensorMap, corner: list[int]) -> tuple[Any, ...]:
        """Lanes, addresses and pieces of shared memory of a box that this thread moves."""
        self.machine.check_waited(np.array([lane]))
        if (profile := self.machine.memory.profile) is not None:
            profile["copied bytes"] += map_.view[map_.overlap(corner)[0]].nbytes
        place = map_.pieces(to)
        lanes = np.full(len(place), lane)
        return lanes, place, self.machine.shared.pieces(lanes, place, 16)

    def bulk_load(self, lane: int, to: int, map_: TensorMap, corner: list[int], at: int) -> None:
        barrier, shared = self.barrier(lane, at), self.machine.shared
        lanes, place, pieces = self.box(lane, to, map_, corner)
        shared.check_write(lanes, pieces, proxy=True)
        shared.expect(pieces, barrier.agent)
        barrier.copies.append((lanes, place, map_.load(corner), pieces))

    def bulk_store(self, lane: int, of: int, map_: TensorMap, corner: list[int]) -> None:
        shared = self.machine.shared
        lanes, place, pieces = self.box(lane, of, map_, corner)
        shared.check_read(lanes, pieces, proxy=True)
        shared.hold(lanes, pieces)
        numbers = (self.machine.block[lane] * shared.stride + place) // 16
        map_.store(corner, shared.views[16][numbers].view(np.uint8))
        self.outgoing.start(lanes, pieces)


@form(r"cp\.async\.(ca|cg)\.shared(?:::cta)?\.global(?:\.L2::[\w:]+)?")
def copy(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    to, of = (address(program, text) for text in i.operands[:2])
    size = int(i.operands[2], 0)
    if size not in ((16,) if match[1] == "cg" else (4, 8, 16)):
        raise ValueError("bytes of a copy")
    given = read(program, i.operands[3] if len(i.operands) > 3 else str(size), "s32")

    def step(m: Machine) -> None:
        lanes = m.active()
        many = spread(m, given(m))[lanes]
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
        m.copies.coming.start(lanes, place, data)

    return step


@form(r"cp\.async\.(bulk\.)?(commit_group|wait_all|wait_group(?:\.read)?)")
def groups(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    left = int(i.operands[0], 0) if match[2].startswith("wait_group") else 0

    def step(m: Machine) -> None:
        copies = m.copies
        if not match[2].startswith("wait_group"):
            (copies.outgoing if match[1] else copies.coming).commit()
        if match[2] != "commit_group":
            (copies.settle_stores if match[1] else copies.settle)(left)

    return step


@form(r"mbarrier\.(init|inval)\.shared(?:::cta)?\.b64")
@form(r"mbarrier\.(arrive(?:\.expect_tx)?)(?:\.release\.cta)?\.shared(?:::cta)?\.b64")
def barrier(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    place = next(text for text in i.operands if text.startswith("["))
    counts = match[1] in ("init", "arrive.expect_tx")
    if not counts and i.operands[-1] != place:
        raise ValueError("a form of mbarrier that nobody needed")
    at, value = address(program, place), read(program, i.operands[-1] if counts else "0", "u32")

    def step(m: Machine) -> None:
        where, given = at(m), spread(m, value(m))
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
    loads = match[2].startswith("shared")
    shared, tensor = i.operands[:2] if loads else i.operands[1::-1]
    name, _, corner = tensor.strip("[] ").partition(",")
    coordinates = registers_in(corner.strip())[::-1]
    if len(coordinates) != int(match[1]):
        raise ValueError("as many coordinates as dimensions")
    place, map_ = address(program, shared), read(program, name.strip(), "u64")
    corners = [read(program, text, "s32") for text in coordinates]
    at = address(program, i.operands[2]) if loads else None

    def step(m: Machine) -> None:
        for lane in m.active():
            of = lambda value, lane=lane: int(spread(m, value(m))[lane])  # noqa: E731
            found = m.memory.maps.get(of(map_))
            if found is None:
                raise Fault("no tensor map at this address")
            box = [of(c) for c in corners]
            if at is not None:
                m.copies.bulk_load(lane, of(place), found, box, of(at))
            else:
                m.copies.bulk_store(lane, of(place), found, box)

    return step
