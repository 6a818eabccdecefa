"""Matrix instructions: ldmatrix, stmatrix, mma.sync and wgmma, on all warps at once.

A lane is 4 * g + q. Fragments are gathered by reshapes: 32 lanes of a register with two halves are
the 8 x 8 numbers [g, 2 * q + half]. Products are exact, sums are float32.

wgmma computes at once; what it reads must stay as it is, and what it writes stay alone, until the
group is waited for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .machine import WARP, Fault, Machine, Step
from .parse import Instruction, Program, registers_in

if TYPE_CHECKING:
    from .instructions import Form

FORMS: list[tuple[re.Pattern[str], Form]] = []
CUT = np.uint32(0xFFFFE000)  # TF32 operands lose the rest
ROW = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a swizzled row, by a descriptor's mode
TURN = {0: 0, 1: 7, 2: 3, 3: 1}


def form(pattern: str):
    def add(make: Form) -> Form:
        FORMS.append((re.compile(pattern), make))
        return make

    return add


def values(bits: np.ndarray, kind: str) -> np.ndarray:
    """What a matrix unit takes bits of ``kind`` for, in float32."""
    from .instructions import widened

    if kind == "tf32":
        return (bits & CUT).view(np.float32)
    return widened(bits, kind)


def fragment(m: Machine, name: str, kind: str) -> np.ndarray:
    """[warps, 8, 8] of a register of halves, [warps, 8, 4] of one of float32."""
    width, row = m.program.registers[name]
    bits = m.files[width][row]
    if kind == "tf32":
        return values(bits, kind).reshape(-1, 8, 4)
    return values(bits.view(np.uint16), kind).reshape(-1, 8, 8)


def operand(m: Machine, names: list[str], kind: str, tall: bool) -> np.ndarray:
    """[warps, 16 or 8, k]: registers go down the rows first where there are 16 (``tall``)."""
    parts = [fragment(m, name, kind) for name in names]
    if not tall:
        return np.concatenate(parts, 2)
    halves = [np.concatenate(parts[n : n + 2], 1) for n in range(0, len(parts), 2)]
    return np.concatenate(halves, 2)


def accumulator(m: Machine, names: list[str]) -> np.ndarray:
    """[warps, 16, 8] float32."""
    parts = [m.view(32, np.float32)[m.program.registers[name][1]] for name in names]
    square = np.stack(parts).reshape(2, 2, -1, 8, 4)  # row half, column parity, warp, g, q
    return square.transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)


@form(r"mma\.sync\.aligned\.(m16n8k(?:4|8|16))\.row\.col\.f32\.(f16|bf16|tf32)\.\2\.f32")
def mma(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    from .instructions import target

    d, a, b, c = (registers_in(text) for text in i.operands)
    kind = match[2]
    step_k = {"tf32": 2}.get(kind, 4) * len(a)
    if match[1] != f"m16n8k{step_k}" or len(b) * 2 != len(a) or len(c) != 4:
        raise ValueError("the fragments of a product")
    puts = [target(program, name) for name in d]

    def step(m: Machine) -> None:
        m.warps()
        left, right = operand(m, a, kind, tall=True), operand(m, b, kind, tall=False)
        with np.errstate(all="ignore"):
            total = accumulator(m, c) + np.matmul(left, right.transpose(0, 2, 1))
        parts = total.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        for put, part in zip(puts, np.ascontiguousarray(parts), strict=True):
            put(m, part)

    return step


@form(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
def matrices(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    """Lane 8 * n + r holds the address of row r of matrix n."""
    from .instructions import address, target

    load, transposed = match[1] == "ld", match[3] is not None
    regs, place = i.operands if load else i.operands[::-1]
    names, at = registers_in(regs), address(program, place)
    if len(names) != int(match[2]):
        raise ValueError("as many registers as matrices")
    puts = [target(program, name) for name in names] if load else []

    def rows(m: Machine) -> np.ndarray:
        """Lanes that hold addresses, of the warps that execute."""
        starts = np.nonzero(m.warps().ravel())[0] * WARP
        return (starts[:, None] + np.arange(8 * len(names))).ravel()

    def read(m: Machine) -> None:
        lanes = rows(m)
        data = m.shared.load(lanes, np.broadcast_to(at(m), m.lanes)[lanes], 16).view(np.uint16)
        square = data.reshape(-1, len(names), 8, 8)
        if transposed:
            square = square.transpose(0, 1, 3, 2)
        warps = m.warps().ravel()
        for n, put in enumerate(puts):
            got = np.zeros((len(warps), 8, 8), np.uint16)
            got[warps] = square[:, n]
            put(m, got.reshape(-1).view(np.uint32))

    def write(m: Machine) -> None:
        lanes = rows(m)
        warps = m.warps().ravel()
        files = [m.files[32][program.registers[name][1]] for name in names]
        square = np.stack([f.view(np.uint16).reshape(-1, 8, 8)[warps] for f in files], 1)
        if transposed:
            square = square.transpose(0, 1, 3, 2)
        data = np.ascontiguousarray(square).reshape(-1, 8).view(np.uint8)
        m.shared.store(lanes, np.broadcast_to(at(m), m.lanes)[lanes], data)

    return read if load else write


@dataclass(eq=False)
class Reading:
    """A wgmma in flight: its registers, what it reads, its group in each warp (-1: open)."""

    registers: frozenset[str]  # that it writes
    held: frozenset[str]  # that it reads
    lanes: np.ndarray
    pieces: np.ndarray
    warps: np.ndarray
    group: np.ndarray


class Products:
    """The wgmma in flight of a machine, and what may not be touched because of them."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.tracks = any(i.opcode.startswith("wgmma") for i in machine.program.code)
        self.flying: list[Reading] = []
        warps = machine.lanes // WARP
        self.groups = np.zeros(warps, np.int64)
        self.touched: dict[str, np.ndarray] = {}  # registers written since the warp's last fence

    def warps(self) -> np.ndarray:
        return self.machine.on().reshape(-1, WARP).any(1)

    def check(self, instruction: Instruction) -> None:
        """Nobody else touches the registers of a product in flight."""
        if instruction.opcode.startswith("wgmma"):
            return
        used = _registers(instruction)
        warps = None
        for reading in self.flying:
            clash = used & reading.registers or (instruction_writes(instruction) & reading.held)
            if clash:
                warps = self.warps() if warps is None else warps
                if (warps & reading.warps).any():
                    raise Fault(f"{min(clash)} belongs to a wgmma that has not been waited for")
        warps = self.warps() if warps is None else warps
        moved = instruction.opcode.startswith("mov.") and instruction.operands[1]
        for name in instruction_writes(instruction):
            found = self.touched.setdefault(name, np.zeros(len(self.groups), bool))
            if moved and moved in self.machine.program.registers:  # ptxas gives both one place
                found[warps] = self.touched[moved][warps] if moved in self.touched else False
            else:
                found |= warps

    def fence(self) -> None:
        warps = self.warps()
        for found in self.touched.values():
            found &= ~warps

    def start(self, reading: Reading) -> None:
        for name in reading.registers | reading.held:
            if name in self.touched and (self.touched[name] & reading.warps).any():
                raise Fault(f"wgmma of {name}, which was written without wgmma.fence since")
        for other in self.flying:
            clash = reading.registers & (other.registers | other.held)
            if clash and reading.registers != other.registers:
                raise Fault(f"wgmma writes {min(clash)}, which belongs to another in flight")
        self.flying.append(reading)

    def commit(self) -> None:
        warps = self.warps()
        for reading in self.flying:
            reading.group = np.where(warps & (reading.group < 0), self.groups, reading.group)
        self.groups += warps

    def settle(self, left: int) -> None:
        warps = self.warps()
        for reading in list(self.flying):
            done = reading.warps & warps & (reading.group >= 0)
            done &= reading.group < self.groups - left
            if done.any():
                mine = done[reading.lanes // WARP]
                self.machine.shared.let_go(reading.lanes[mine], reading.pieces[mine])
                reading.lanes, reading.pieces = reading.lanes[~mine], reading.pieces[~mine]
                reading.warps = reading.warps & ~done
                if not reading.warps.any():
                    self.flying.remove(reading)


CACHE: dict[Instruction, tuple[frozenset[str], frozenset[str]]] = {}


def _sets(instruction: Instruction) -> tuple[frozenset[str], frozenset[str]]:
    found = CACHE.get(instruction)
    if found is None:
        first = instruction.operands[0] if instruction.operands else ""
        stores = instruction.opcode.startswith(("st", "cp", "mbarrier", "bar", "red"))
        writes = [] if stores else re.findall(r"[%$\w]+", first)
        found = frozenset(instruction.registers()), frozenset(writes)
        CACHE[instruction] = found
    return found


def _registers(instruction: Instruction) -> frozenset[str]:
    return _sets(instruction)[0]


def instruction_writes(instruction: Instruction) -> frozenset[str]:
    return _sets(instruction)[1]


def tile(start: int, lead: int, stride: int, mode: int, shape: tuple[int, int, int], across: int):
    """Addresses [rows, columns] of a wgmma operand; ``across`` 0: columns (k) lie together."""
    rows, columns, size = shape
    r, c = np.ogrid[:rows, :columns]
    if across:
        r, c = c, r
    per = ROW[mode] // size
    if across:
        place = r // 8 * stride + r % 8 * ROW[mode] + c // per * lead + c % per * size
    else:
        place = r // 8 * stride + r % 8 * ROW[mode] + c // per * lead + c % per * size
    place = start + place
    return place ^ ((place >> 7 & TURN[mode]) << 4)


def described(
    m: Machine, lane: int, descriptor: int, shape: tuple[int, int, int], across: int
) -> np.ndarray:
    """Addresses of the operand of a matrix descriptor."""
    start, lead, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise Fault("a base offset in a matrix descriptor, which the machine does not know")
    mode = descriptor >> 62 & 3
    found = tile(start, lead, stride, mode, shape, across)
    if found.min() < 0 or found.max() + shape[2] > m.shared.size:
        raise Fault("a wgmma operand outside shared memory")
    return found


@form(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(8|16)\.f32\.(f16|bf16|tf32)\.\3")
def wgmma(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    from .instructions import predicate, source, target

    columns, k, kind = int(match[1]), int(match[2]), match[3]
    d, a = registers_in(i.operands[0]), i.operands[1]
    size = 4 if kind == "tf32" else 2
    in_registers = a.startswith("{")
    if len(d) != columns // 2 or k * size != 32:
        raise ValueError("the fragments of a product")
    held = registers_in(a) if in_registers else []
    of_a = None if in_registers else source(program, a, np.uint64)
    of_b, adds = source(program, i.operands[2], np.uint64), predicate(program, i.operands[3])
    signs, majors = [int(x) for x in i.operands[4:6]], [int(x) for x in i.operands[6:]]
    if signs != [1, 1] or len(majors) != (0 if kind == "tf32" else 1 if in_registers else 2):
        raise ValueError("a form of wgmma that nobody needed")
    across_a = majors[0] if len(majors) == 2 else 0
    across_b = majors[-1] if majors else 0
    puts = [target(program, name) for name in d]
    rows_d = [program.registers[name][1] for name in d]

    def fetch(m: Machine, first: int, descriptor: int, rows: int, across: int, held_by: list):
        """The operand of the warpgroup whose first lane this is; its four warps hold it."""
        place = described(m, first, descriptor, (rows, k, size), across)
        where = m.block[first] * m.shared.stride + place
        pieces = np.unique(where // m.shared.piece)
        for warp in range(4):
            part = pieces
            if held_by is not None and rows == 64:  # each warp reads its own 16 rows of a
                part = np.unique(where[16 * warp : 16 * warp + 16] // m.shared.piece)
            held_by.append((np.full(len(part), first + WARP * warp), part[:, None]))
        return values(m.shared.views[size][where // size], kind)

    def step(m: Machine) -> None:
        warps = m.warps().ravel()
        groups = warps.reshape(-1, 4)
        if not (groups.any(1) == groups.all(1)).all():
            raise Fault("part of a warpgroup executes what takes a whole one")
        chosen = np.nonzero(groups.all(1))[0]
        holds: list[tuple[np.ndarray, np.ndarray]] = []
        b_at = np.broadcast_to(of_b(m), m.lanes)
        a_at = None if of_a is None else np.broadcast_to(of_a(m), m.lanes)
        if in_registers:
            whole = operand(m, held, kind, tall=True).reshape(-1, 64, k)
        total = np.zeros((len(groups), 64, columns), np.float32)
        for group in chosen:
            first = int(group) * 4 * WARP
            right = fetch(m, first, int(b_at[first]), columns, across_b, holds)
            if a_at is None:
                left = whole[group]
            else:
                left = fetch(m, first, int(a_at[first]), 64, across_a, holds)
            with np.errstate(all="ignore"):
                total[group] = left @ right.T
        lanes = np.concatenate([part for part, _ in holds])
        pieces = np.concatenate([part for _, part in holds])
        m.shared.check_read(lanes, pieces, proxy=True)
        m.shared.hold(lanes, pieces)
        reading = Reading(
            frozenset(d), frozenset(held), lanes, pieces, warps, np.where(warps, -1, 0)
        )
        m.products.start(reading)
        parts = total.reshape(len(groups), 4, 2, 8, columns // 8, 4, 2)
        parts = parts.transpose(4, 2, 6, 0, 1, 3, 5).reshape(len(d), -1)
        add = np.broadcast_to(adds(m), m.lanes)
        for put, row, part in zip(puts, rows_d, parts, strict=True):
            old = m.view(32, np.float32)[row]
            with np.errstate(all="ignore"):
                put(m, np.where(add, old + part, part))

    return step


@form(r"wgmma\.(fence|commit_group|wait_group)\.sync\.aligned")
def groups(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    if match[1] == "fence":
        return lambda m: m.products.fence()
    if match[1] == "commit_group":
        return lambda m: m.products.commit()
    left = int(i.operands[0], 0)
    return lambda m: m.products.settle(left)
