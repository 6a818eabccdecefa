"""Instructions to functions of a machine: arithmetic, moves, memory access of threads, shuffles.

``decode`` finds the form that the whole opcode matches; one that none matches is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from . import copies, matrix  # noqa: F401  their forms
from .machine import UNSIGNED, WARP, Fault, Machine, Step, Vector
from .operands import FORMS, TYPES, address, form, read, spread, width_of, write
from .parse import Instruction, Program, Unknown, registers_in

Compute = Callable[..., Vector]
Plan = tuple[str, list[str], Compute]  # kinds of the result and of the operands, and the function


def decode(program: Program, instruction: Instruction) -> Step:
    for pattern, make in FORMS:
        if match := pattern.fullmatch(instruction.opcode):
            try:
                return make(program, instruction, match)
            except (KeyError, ValueError, IndexError) as error:
                raise Unknown(f"line {instruction.line}: {instruction} ({error!r})") from error
    if instruction.opcode.partition(".")[0] in ("bra", "ret", "bar", "barrier"):
        return lambda m: None  # the machine itself does these
    raise Unknown(f"line {instruction.line}: {instruction}")


# What computes one value of others.


def shift_left(x: Vector, by: Vector) -> Vector:
    width = width_of(x.dtype)
    return np.where(by < width, x << np.minimum(by, width - 1).astype(x.dtype), x.dtype.type(0))


def shift_right(x: Vector, by: Vector) -> Vector:
    width = width_of(x.dtype)
    over = x.dtype.type(0) if x.dtype.kind == "u" else x >> x.dtype.type(width - 1)
    return np.where(by < width, x >> np.minimum(by, width - 1).astype(x.dtype), over)


def quotient(x: Vector, y: Vector) -> Vector:
    """Rounded towards zero; what is divided by zero is told apart by the caller."""
    y = np.where(y == 0, y.dtype.type(1), y)
    whole = x // y
    return whole + ((x % y != 0) & ((x < 0) != (y < 0))).astype(x.dtype)


def high(x: Vector, y: Vector) -> Vector:
    """The upper half of a product."""
    width = width_of(x.dtype)
    if width < 64:
        wide = np.int64 if x.dtype.kind == "i" else np.uint64
        return ((x.astype(wide) * y.astype(wide)) >> wide(width)).astype(x.dtype)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a, b, c, d = x >> half, x & low, y >> half, y & low
    middle = a * d + ((b * d) >> half)
    return a * c + (middle >> half) + ((b * c + (middle & low)) >> half)


def funnel(low: Vector, upper: Vector, by: Vector, left: bool) -> Vector:
    both = (upper.astype(np.uint64) << np.uint64(32)) | low
    turn = (by & np.uint32(31)).astype(np.uint64)
    both = (both << turn) >> np.uint64(32) if left else both >> turn
    return np.asarray(both).astype(np.uint32)


def field(x: Vector, first: Vector, length: Vector, kind: str) -> Vector:
    """``length`` bits from ``first`` on, their sign extended in the signed form."""
    unsigned, signed, width = x.dtype.type, TYPES[f"s{kind[1:]}"], width_of(x.dtype)
    if (length == 0).any() or (first + length > width).any():
        raise Fault("a bit field outside the register")
    top = x << (width - first.astype(unsigned) - length).astype(unsigned)
    rest = (width - length.astype(unsigned)).astype(unsigned)
    return top.view(signed) >> rest.astype(signed) if kind[0] == "s" else top >> rest


def permute(x: Vector, y: Vector, selector: Vector) -> Vector:
    """Four bytes of eight, or their signs."""
    x, y, selector = map(np.ravel, np.broadcast_arrays(x, y, selector))
    pool = np.stack([x, y], 1).view(np.uint8)
    nibbles = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)
    taken = np.take_along_axis(pool, (nibbles & 7).astype(np.int64), 1)
    taken = np.where(nibbles & 8, (taken.view(np.int8) >> 7).view(np.uint8), taken)
    return taken.view(np.uint32)[:, 0]


def add_pairs(x: Vector, y: Vector) -> Vector:
    halves = (np.array(v).reshape(-1).view(np.uint16) for v in np.broadcast_arrays(x, y))
    return np.add(*halves).view(np.uint32)


OPERATIONS: dict[str, Compute] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mul.lo": np.multiply,
    "mul.hi": high,
    "mad": lambda x, y, z: x * y + z,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "abs": np.absolute,
    "shl": shift_left,
    "shr": shift_right,
    "div": np.divide,
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
    "fma": lambda x, y, z: np.multiply(x, y, dtype=np.float64) + z,
    "same": lambda x: x,
}
FLOATS = {"min": np.fmin, "max": np.fmax, "min.NaN": np.minimum, "max.NaN": np.maximum}
WHOLE = "(s16|u16|s32|u32|s64|u64)"
FRACTION = "(f16|bf16|f16x2|bf16x2|f32|f64)"
ANY = "(b16|b32|b64|u16|u32|u64|s16|s32|s64|f32)"
BYTES = f"{WHOLE[:-1]}|s8|u8)"
DOUBLE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def of(count: int) -> Callable[[str, str], Plan]:
    """``count`` operands of the kind of the result."""
    return lambda op, kind: (kind, [kind] * count, OPERATIONS[op])


def product(op: str, kind: str) -> Plan:
    """Of twice the operands' width; ``mad`` adds a third."""
    wide = TYPES[DOUBLE[kind]]
    plus = [DOUBLE[kind]] * (op == "mad")
    compute = lambda x, y, z=0: x.astype(wide) * y.astype(wide) + wide(z)  # noqa: E731
    return DOUBLE[kind], [kind, kind, *plus], compute


def bits(kind: str) -> str:
    return f"b{kind[1:]}"


PLANS: list[tuple[str, Callable[..., Plan]]] = [
    (rf"(add|sub|min|max|mul\.lo)\.{WHOLE}", of(2)),
    (r"(mul\.hi)\.(s16|u16|s32|u32|u64)", of(2)),
    (r"(and|or|xor)\.(b16|b32|b64|pred)", of(2)),
    (r"(not|neg|abs)\.(b16|b32|b64|s16|s32|s64|pred)", of(1)),
    (r"(mul|mad)\.wide\.(s16|u16|s32|u32)", product),
    (rf"(mad)\.lo\.{WHOLE}", of(3)),
    (r"add\.(?:s16x2|u16x2)", lambda: ("u32", ["u32"] * 2, add_pairs)),
    (r"(shl)\.(b16|b32|b64)", lambda op, t: (t, [t, "u32"], shift_left)),
    (rf"(shr)\.(b16|b32|b64|{WHOLE[1:]}", lambda op, t: (t, [t, "u32"], shift_right)),
    (
        r"shf\.(l|r)\.wrap\.b32",
        lambda way: ("u32", ["u32"] * 3, lambda x, y, by: funnel(x, y, by, way == "l")),
    ),
    (
        r"bfe\.(u32|s32|u64|s64)",
        lambda t: (t, [bits(t), "u32", "u32"], lambda x, a, n: field(x, a, n, t)),
    ),
    (r"prmt\.b32", lambda: ("u32", ["u32"] * 3, permute)),
    (rf"(add|sub|mul|div)(?:\.rn)?\.{FRACTION}", of(2)),
    (rf"(min|max|min\.NaN|max\.NaN)\.{FRACTION}", lambda op, t: (t, [t, t], FLOATS[op])),
    (rf"(neg|abs)\.{FRACTION}", of(1)),
    (r"(sqrt|rcp)\.rn\.(f32|f64)", of(1)),
    (r"(fma)\.rn\.(f16|bf16|f16x2|bf16x2|f32)", of(3)),
    (
        rf"selp\.{ANY}",
        lambda t: (bits(t), [bits(t)] * 2 + ["pred"], lambda x, y, p: np.where(p, x, y)),
    ),
    (
        r"(?:cvta(?:\.to)?\.(?:param|global|shared)|ld\.param)\.(b8|b16|b32|b64|u32|u64)",
        lambda t: of(1)("same", t),
    ),
    (r"mov\.pred", lambda: of(1)("same", "pred")),
    (rf"cvt\.{BYTES}\.{BYTES}", lambda to, t: (to, [t], lambda x: x.astype(TYPES[to]))),
    (
        rf"cvt\.rn\.(f32|f64)\.{BYTES}",
        lambda to, t: (to, [t], lambda x: x.astype(TYPES[to])),
    ),
    (
        r"cvt(?:\.rn)?\.(f16|bf16|f32|f64)\.(f16|bf16|f32|f64)",
        lambda to, t: (to, [t], OPERATIONS["same"]),
    ),
    (
        r"cvt\.rn\.(f16x2|bf16x2)\.f32",
        lambda to: (to, ["f32"] * 2, lambda up, low: np.stack(np.broadcast_arrays(low, up), -1)),
    ),
]


def planned(plan: Callable[..., Plan]) -> Callable[[Program, Instruction, Any], Step]:
    """The form of an instruction that computes one value of others."""

    def make(program: Program, i: Instruction, match: re.Match[str]) -> Step:
        result, kinds, compute = plan(*match.groups())
        put = write(program, i.operands[0], result)
        get = [read(program, t, k) for t, k in zip(i.operands[1:], kinds, strict=True)]

        def step(m: Machine) -> None:
            with np.errstate(all="ignore"):
                put(m, compute(*(x(m) for x in get)))

        return step

    return make


for _pattern, _plan in PLANS:
    form(_pattern)(planned(_plan))


@form(rf"(div|rem)\.{WHOLE}")
def division(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    put = write(program, i.operands[0])
    x, y = (read(program, text, match[2]) for text in i.operands[1:])

    def step(m: Machine) -> None:
        by = y(m)
        if (spread(m, by == 0) & m.on()).any():
            raise Fault("division by zero")
        with np.errstate(all="ignore"):
            whole = quotient(x(m), by)
            put(m, whole if match[1] == "div" else x(m) - whole * by)

    return step


@form(rf"mov\.{ANY}")
def move(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    """Of a value, or between a register and its parts, the low ones first."""
    kind = bits(match[1])
    inputs, outputs = registers_in(i.operands[1]), registers_in(i.operands[0])
    width = int(kind[1:])
    part = UNSIGNED[width // len(outputs)]
    get = [read(program, text, f"b{width // len(inputs)}") for text in inputs]
    puts = [write(program, text) for text in outputs]
    if len(i.operands) != 2 or min(len(get), len(puts)) > 1:
        raise ValueError("a form of mov that nobody needed")

    def step(m: Machine) -> None:
        columns = np.stack([spread(m, x(m)) for x in get], 1).view(part)
        for put, column in zip(puts, columns.T.copy(), strict=True):
            put(m, column)

    return step if len(get) != len(puts) else lambda m: puts[0](m, get[0](m))


ORDERED: dict[str, Compute] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "nan": lambda x, y: np.isnan(x) | np.isnan(y),
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
}


def compare(name: str, floating: bool) -> Compute:
    if floating and name == "ne":  # ordered: false for NaN
        return lambda x, y: (x < y) | (x > y)
    if floating and name[-1] == "u" and name[:-1] in ORDERED:  # true for NaN
        nan, ordered = ORDERED["nan"], ORDERED[name[:-1]]
        return lambda x, y: nan(x, y) | ordered(x, y)
    return ORDERED[name]


@form(rf"setp\.(\w+)(?:\.(and|or|xor))?\.({WHOLE[1:-1]}|b16|b32|b64|{FRACTION[1:]}")
def set_predicate(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    """Two predicates are of the pair's numbers, or of the result and its opposite."""
    kind = match[3]
    test = compare(match[1], "f" in kind)
    puts = [write(program, part) for part in i.operands[0].split("|")]
    x, y = (read(program, text, kind) for text in i.operands[1:3])
    also = read(program, i.operands[3], "pred") if match[2] else None

    def step(m: Machine) -> None:
        with np.errstate(all="ignore"):
            found = np.asarray(test(x(m), y(m)))
        if also is not None:
            found = np.asarray(OPERATIONS[match[2]](found, also(m)))
        each = found.T if found.ndim == 2 else (found, ~found)
        for put, value in zip(puts, each, strict=False):
            put(m, value)

    return step


# Memory of threads.

ACCESS = (
    r"(ld|st)(?:\.volatile|\.relaxed\.gpu)?\.(global|shared)(?:::cta)?"
    r"(?:\.(?:ca|cg|cs|nc|wb|L1::\w+|L2::[\w:]+))*(?:\.(v2|v4))?\.([bsuf])(8|16|32|64)"
)


@form(ACCESS)
def access(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    load, shared = match[1] == "ld", match[2] == "shared"
    values, place = i.operands if load else i.operands[::-1]
    registers, at = registers_in(values), address(program, place)
    if len(registers) != int(match[3][1:] if match[3] else 1):
        raise ValueError("as many registers as elements")
    kind = match[4].replace("f", "b") + match[5]
    dtype = TYPES[kind]
    puts = [write(program, name) for name in registers] if load else []
    get = [] if load else [read(program, name, kind) for name in registers]

    def take(m: Machine) -> None:
        lanes = m.active()
        where, size = at(m)[lanes], len(puts) * np.dtype(dtype).itemsize
        data = m.shared.load(lanes, where, size) if shared else m.fetch(lanes, where, size)
        for put, column in zip(puts, data.view(dtype).T, strict=True):
            put(m, m.scatter(lanes, column))

    def give(m: Machine) -> None:
        lanes = m.active()
        columns = [spread(m, x(m))[lanes] for x in get]
        data = np.stack(columns, 1).view(np.uint8).reshape(len(lanes), -1)
        (m.shared.store if shared else m.deposit)(lanes, at(m)[lanes], data)

    return take if load else give


@form(r"atom\.global\.gpu\.(acq_rel|relaxed)\.add\.(u32|f32)")
def atomic_add(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    put, at = write(program, i.operands[0]), address(program, i.operands[1])
    value, dtype = read(program, i.operands[2], match[2]), TYPES[match[2]]

    def step(m: Machine) -> None:
        lanes = m.active()
        where, add = at(m), spread(m, value(m))
        old = np.zeros(m.lanes, dtype)
        m.check_waited(lanes)
        if match[1] == "acq_rel":
            m.memory.order.meet(m, lanes)
        for lane in m.rng.permutation(lanes):
            cells, numbers, _ = m.memory.cells(where[lane : lane + 1], 4)[0]
            cell = cells.view(dtype)[numbers]
            old[lane] = cell[0]
            with np.errstate(all="ignore"):
                cells.view(dtype)[numbers] = cell + add[lane]
        put(m, old)

    return step


@form(r"membar\.(gl|cta|sys)|fence\.(sc|acq_rel)\.(gpu|cta|sys)|prefetch\.\S+|nanosleep\.u32")
@form(r"griddepcontrol\.launch_dependents|bar\.warp\.sync")
def nothing(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    return lambda m: None


@form(r"griddepcontrol\.wait")
def wait_for_producers(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    def step(m: Machine) -> None:
        m.waited |= m.on()

    return step


# Warps.


@form(r"shfl\.sync\.(bfly|idx|up|down)\.b32")
def shuffle(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    put = write(program, i.operands[0])  # one with a predicate beside it is refused
    x, by, clamp = (read(program, text, "u32") for text in i.operands[1:4])
    if int(i.operands[4], 0) & 0xFFFFFFFF != 0xFFFFFFFF:
        raise ValueError("a form of shfl that nobody needed")

    def step(m: Machine) -> None:
        m.warps()
        lane, limit = (m.tid % WARP).astype(np.int64), clamp(m).astype(np.int64)
        far, segment = by(m).astype(np.int64) & 31, limit >> 8 & 31
        least = lane & segment
        most = least | (limit & 31 & ~segment)
        source = {
            "bfly": lane ^ far,
            "idx": least | (far & ~segment),
            "up": lane - far,
            "down": lane + far,
        }[match[1]]
        valid = source >= most if match[1] == "up" else source <= most
        source = np.where(valid, source, lane)
        put(m, spread(m, x(m))[np.arange(m.lanes) // WARP * WARP + source])

    return step


@form(r"elect\.sync")
def elect(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    leader, chosen = (write(program, part) for part in i.operands[0].split("|"))

    def step(m: Machine) -> None:
        m.warps()
        leader(m, np.uint32(0))
        chosen(m, m.tid % WARP == 0)

    return step
