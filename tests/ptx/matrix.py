"""Matrix instructions: ldmatrix, stmatrix, mma.sync and wgmma, on all warps at once.

A lane is 4 * g + q. Fragments are gathered by reshapes: 32 lanes of a register with two halves are
the 8 x 8 numbers [g, 2 * q + half]. Products are exact, sums are float32.

wgmma computes at once; what it reads must stay as it is, and what it writes stay alone, until the
group is waited for.
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

from .flights import Flights
from .machine import WARP, Fault, Machine, Step
from .operands import address, form, read, spread, widened, write
from .parse import Instruction, Program, registers_in

CUT = np.uint32(0xFFFFE000)  # TF32 operands lose the rest
ROW = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a swizzled row, by a descriptor's mode
TURN = {0: 0, 1: 7, 2: 3, 3: 1}


def values(bits: np.ndarray, kind: str) -> np.ndarray:
    """What a matrix unit takes bits of ``kind`` for, in float32."""
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
    d, a, b, c = (registers_in(text) for text in i.operands)
    kind = match[2]
    step_k = {"tf32": 2}.get(kind, 4) * len(a)
    if match[1] != f"m16n8k{step_k}" or len(b) * 2 != len(a) or len(c) != 4:
        raise ValueError("the fragments of a product")
    puts = [write(program, name) for name in d]

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
    load, transposed = match[1] == "ld", match[3] is not None
    regs, place = i.operands if load else i.operands[::-1]
    names, at = registers_in(regs), address(program, place)
    if len(names) != int(match[2]):
        raise ValueError("as many registers as matrices")
    puts = [write(program, name) for name in names] if load else []

    def rows(m: Machine) -> np.ndarray:
        """Lanes that hold addresses, of the warps that execute."""
        starts = np.nonzero(m.warps().ravel())[0] * WARP
        return (starts[:, None] + np.arange(8 * len(names))).ravel()

    def take(m: Machine) -> None:
        lanes = rows(m)
        data = m.shared.load(lanes, at(m)[lanes], 16).view(np.uint16)
        square = data.reshape(-1, len(names), 8, 8)
        if transposed:
            square = square.transpose(0, 1, 3, 2)
        warps = m.warps().ravel()
        for n, put in enumerate(puts):
            got = np.zeros((len(warps), 8, 8), np.uint16)
            got[warps] = square[:, n]
            put(m, got.reshape(-1).view(np.uint32))

    def give(m: Machine) -> None:
        lanes = rows(m)
        warps = m.warps().ravel()
        files = [m.files[32][program.registers[name][1]] for name in names]
        square = np.stack([f.view(np.uint16).reshape(-1, 8, 8)[warps] for f in files], 1)
        if transposed:
            square = square.transpose(0, 1, 3, 2)
        data = np.ascontiguousarray(square).reshape(-1, 8).view(np.uint8)
        m.shared.store(lanes, at(m)[lanes], data)

    return take if load else give


class Products(Flights):
    """The wgmma in flight of a machine, and what may not be touched because of them."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.tracks = any(i.opcode.startswith("wgmma") for i in machine.program.code)
        self.touched: dict[str, np.ndarray] = {}  # registers written since the threads' last fence

    def check(self, instruction: Instruction) -> None:
        """Nobody else touches the registers of a product in flight."""
        if instruction.opcode.startswith("wgmma"):
            return
        used, written = touches(instruction)
        on = self.machine.on()
        for flight in self.all:
            clash = used & flight.written or written & flight.held
            if clash and flight.touches(on):
                raise Fault(f"{min(clash)} belongs to a wgmma that has not been waited for")
        moved = instruction.opcode.startswith("mov.") and instruction.operands[1]
        for name in written:
            found = self.touched.setdefault(name, np.zeros(len(on), bool))
            if moved and moved in self.machine.program.registers:  # ptxas gives both one place
                found[on] = self.touched[moved][on] if moved in self.touched else False
            else:
                found |= on

    def fence(self) -> None:
        for found in self.touched.values():
            found &= ~self.machine.on()

    def check_start(self, written: frozenset[str], held: frozenset[str]) -> None:
        for name in written | held:
            if name in self.touched and (self.touched[name] & self.machine.on()).any():
                raise Fault(f"wgmma of {name}, which was written without wgmma.fence since")
        for other in self.all:
            clash = written & (other.written | other.held)
            if clash and written != other.written:
                raise Fault(f"wgmma writes {min(clash)}, which belongs to another in flight")


@lru_cache(None)
def touches(instruction: Instruction) -> tuple[frozenset[str], frozenset[str]]:
    """The registers of an instruction, and those that it writes."""
    stores = instruction.opcode.startswith(("st", "cp", "mbarrier", "bar", "red"))
    first = "" if stores or not instruction.operands else instruction.operands[0]
    return frozenset(instruction.registers()), frozenset(re.findall(r"[%$\w]+", first))


Operand = tuple[int, np.ndarray, list[np.ndarray]]


@lru_cache(4096)
def described(descriptor: int, shape: tuple[int, int, int], across: int, piece: int) -> Operand:
    """The operand of a matrix descriptor, whose columns (k) lie together unless it is ``across``:
    where it ends, numbers of its elements [rows, columns], and its pieces of shared memory by 16
    rows; ``shape`` ends with the bytes of an element."""
    start, lead, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise Fault("a base offset in a matrix descriptor, which the machine does not know")
    mode, (rows, columns, size) = descriptor >> 62 & 3, shape
    r, c = np.ogrid[:rows, :columns][:: -1 if across else 1]
    per = ROW[mode] // size
    place = start + r // 8 * stride + r % 8 * ROW[mode] + c // per * lead + c % per * size
    place = place ^ ((place >> 7 & TURN[mode]) << 4)
    pieces = [np.unique(place[n : n + 16] // piece) for n in range(0, rows, 16)]
    return int(place.max()) + size, place // size, pieces


@form(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(8|16)\.f32\.(f16|bf16|tf32)\.\3")
def wgmma(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    columns, k, kind = int(match[1]), int(match[2]), match[3]
    d, a = registers_in(i.operands[0]), i.operands[1]
    size = 4 if kind == "tf32" else 2
    in_registers = a.startswith("{")
    if len(d) != columns // 2 or k * size != 32:
        raise ValueError("the fragments of a product")
    held = registers_in(a) if in_registers else []
    of_a = None if in_registers else read(program, a, "u64")
    of_b, adds = read(program, i.operands[2], "u64"), read(program, i.operands[3], "pred")
    signs, majors = [int(x) for x in i.operands[4:6]], [int(x) for x in i.operands[6:]]
    if signs != [1, 1] or len(majors) != (0 if kind == "tf32" else 1 if in_registers else 2):
        raise ValueError("a form of wgmma that nobody needed")
    across_a = majors[0] if len(majors) == 2 else 0
    across_b = majors[-1] if majors else 0
    puts = [write(program, name) for name in d]
    rows_d = [program.registers[name][1] for name in d]

    def fetch(m: Machine, first: int, descriptor: int, is_a: bool, holds: list):
        """The operand of the warpgroup whose first lane this is. Of a, which is made of 64 rows,
        each of the four warps holds its own 16 until it is waited for, of b each holds all."""
        shared = m.shared
        rows, across = (64, across_a) if is_a else (columns, across_b)
        end, numbers, pieces = described(descriptor, (rows, k, size), across, shared.piece)
        if end > shared.size:
            raise Fault("a wgmma operand outside shared memory")
        base = int(m.block[first]) * shared.stride
        if not is_a:
            pieces = [np.unique(np.concatenate(pieces))] * 4
        for warp in range(4):
            part = base // shared.piece + pieces[warp]
            holds.append((np.full(len(part), first + WARP * warp), part[:, None]))
        return values(shared.views[size][base // size + numbers], kind)

    def step(m: Machine) -> None:
        warps = m.warps().ravel()
        groups = warps.reshape(-1, 4)
        if not (groups.any(1) == groups.all(1)).all():
            raise Fault("part of a warpgroup executes what takes a whole one")
        chosen = np.nonzero(groups.all(1))[0]
        holds: list[tuple[np.ndarray, np.ndarray]] = []
        b_at = spread(m, of_b(m))
        a_at = None if of_a is None else spread(m, of_a(m))
        if in_registers:
            whole = operand(m, held, kind, tall=True).reshape(-1, 64, k)
        total = np.zeros((len(groups), 64, columns), np.float32)
        for group in chosen:
            first = int(group) * 4 * WARP
            right = fetch(m, first, int(b_at[first]), False, holds)
            left = whole[group] if a_at is None else fetch(m, first, int(a_at[first]), True, holds)
            with np.errstate(all="ignore"):
                total[group] = left @ right.T
        lanes = np.concatenate([part for part, _ in holds])
        pieces = np.concatenate([part for _, part in holds])
        m.shared.check_read(lanes, pieces, proxy=True)
        m.shared.hold(lanes, pieces)
        m.products.check_start(frozenset(d), frozenset(held))
        m.products.start(lanes, pieces, written=frozenset(d), held=frozenset(held))
        parts = total.reshape(len(groups), 4, 2, 8, columns // 8, 4, 2)
        parts = parts.transpose(4, 2, 6, 0, 1, 3, 5).reshape(len(d), -1)
        add = spread(m, adds(m))
        for put, row, part in zip(puts, rows_d, parts, strict=True):
            old = m.view(32, np.float32)[row]
            with np.errstate(all="ignore"):
                put(m, np.where(add, old + part, part))

    return step


@form(r"wgmma\.(fence|commit_group|wait_group)\.sync\.aligned")
def groups(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    left = int(i.operands[0], 0) if i.operands else 0

    def wait(m: Machine) -> None:
        for lanes, pieces in m.products.settle(left):
            m.shared.let_go(lanes, pieces)

    if match[1] == "wait_group":
        return wait
    return lambda m: m.products.fence() if match[1] == "fence" else m.products.commit()
