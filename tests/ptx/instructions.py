"""Instructions to functions of a machine: arithmetic, moves, memory access of threads, shuffles.

``decode`` finds the form that the whole opcode matches; one that none matches is refused.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from . import copies, matrix
from .machine import UNSIGNED, WARP, Fault, Machine, Step, Vector
from .parse import Instruction, Program, Unknown, registers_in

Source = Callable[[Machine], Vector]
Target = Callable[[Machine, np.ndarray], None]
Form = Callable[[Program, Instruction, "re.Match[str]"], Step]

FORMS: list[tuple[re.Pattern[str], Form]] = []
TYPES: dict[str, Any] = {
    f"{kind}{width}": np.dtype(f"{'i' if kind == 's' else 'u'}{width // 8}").type
    for kind in "bsu"
    for width in (8, 16, 32, 64)
} | {"f16": np.float16, "f32": np.float32, "f64": np.float64}


def form(pattern: str) -> Callable[[Form], Form]:
    def add(make: Form) -> Form:
        FORMS.append((re.compile(pattern), make))
        return make

    return add


def decode(program: Program, instruction: Instruction) -> Step:
    for forms in (FORMS, copies.FORMS, matrix.FORMS):
        for pattern, make in forms:
            if match := pattern.fullmatch(instruction.opcode):
                try:
                    return make(program, instruction, match)
                except (KeyError, ValueError, IndexError) as error:
                    raise Unknown(f"line {instruction.line}: {instruction} ({error!r})") from error
    if instruction.opcode.partition(".")[0] in ("bra", "ret", "bar", "barrier"):
        return lambda m: None  # the machine itself does these
    raise Unknown(f"line {instruction.line}: {instruction}")


def width_of(dtype: Any) -> int:
    return 8 * np.dtype(dtype).itemsize


def immediate(text: str, dtype: Any) -> Vector:
    """A literal's bits as a scalar of ``dtype``."""
    width = width_of(dtype)
    if text.startswith("0f"):
        bits = int(text[2:], 16)
    elif text.startswith("0d"):
        value = struct.unpack(">d", bytes.fromhex(text[2:]))[0]
        bits = int(np.array(value, dtype).view(UNSIGNED[width]))
    else:
        bits = int(text.rstrip("U"), 0)
    return np.array(bits & ((1 << width) - 1), UNSIGNED[width]).view(dtype)[()]


def source(program: Program, text: str, dtype: Any) -> Source:
    """How to read an operand as ``dtype``; wider registers are cut off."""
    if text in program.registers:
        width, row = program.registers[text]
        if dtype is bool or width == width_of(dtype):
            return lambda m: m.view(width, dtype)[row]
        if width < width_of(dtype):
            raise ValueError(f"{text} is narrower than its use")
        unsigned = UNSIGNED[width_of(dtype)]
        return lambda m: m.files[width][row].astype(unsigned).view(dtype)
    special: dict[str, Source] = {
        "%tid.x": lambda m: m.tid.astype(dtype),
        "%ctaid.x": lambda m: m.ctaid.astype(dtype),
        "%nctaid.x": lambda m: np.array(m.grid).astype(dtype),
        "%ntid.x": lambda m: np.array(m.threads).astype(dtype),
        "%laneid": lambda m: (m.tid % WARP).astype(dtype),
        "global_smem": lambda m: dtype(0),
    }
    if text in special:
        return special[text]
    if text in program.parameters:
        return lambda m: dtype(m.arguments[text] & ((1 << width_of(dtype)) - 1))
    value = immediate(text, dtype)
    return lambda m: value


def predicate(program: Program, text: str) -> Source:
    if text in program.registers:
        return source(program, text, bool)
    value = np.bool_(int(text, 0))
    return lambda m: value


def target(program: Program, text: str) -> Target:
    """How to write a register; ``_`` takes what nobody wants. Wider registers are extended."""
    if text == "_":
        return lambda m, value: None
    width, row = program.registers[text]

    def put(m: Machine, value: np.ndarray) -> None:
        if width == 1:
            kept = m.files[1][row]
        else:
            if width_of(value.dtype) < width:
                kind = "i" if value.dtype.kind == "i" else "u"
                value = value.astype(f"{kind}{width // 8}")
            kept = m.view(width, value.dtype.type)[row]
        np.copyto(kept, value, where=True if m.mask is None else m.mask)

    return put


def address(program: Program, text: str) -> Source:
    """``[register + offset]`` as int64."""
    base, _, offset = text.strip("[] ").partition("+")
    base = base.strip()
    wide = program.registers.get(base, (32, 0))[0] == 64
    start, shift = source(program, base, np.uint64 if wide else np.uint32), int(offset or "0", 0)

    def get(m: Machine) -> np.ndarray:
        place = np.asarray(start(m).astype(np.int64) + shift)
        return place if place.ndim else np.full(m.lanes, place)

    return get


def quietly(step: Step) -> Step:
    def run(m: Machine) -> None:
        with np.errstate(all="ignore"):
            step(m)

    return run


# Whole numbers.

INTEGER = "(s16|u16|s32|u32|s64|u64)"
BITS = "(b16|b32|b64)"
WIDER = {"s16": np.int32, "u16": np.uint32, "s32": np.int64, "u32": np.uint64}


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


BINARY: dict[str, Callable[[Vector, Vector], Vector]] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "mul.lo": np.multiply,
    "mul.hi": high,
}


@form(rf"(add|sub|min|max|mul\.lo|mul\.hi)\.{INTEGER}")
@form(rf"(and|or|xor)\.{BITS}")
def binary(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    if match[0] == "mul.hi.s64":
        raise Unknown(f"line {i.line}: {i}")
    compute, dtype, put = BINARY[match[1]], TYPES[match[2]], target(program, i.operands[0])
    x, y = (source(program, text, dtype) for text in i.operands[1:])
    return quietly(lambda m: put(m, compute(x(m), y(m))))


@form(r"(and|or|xor)\.pred")
def logic(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    compute, put = BINARY[match[1]], target(program, i.operands[0])
    x, y = (predicate(program, text) for text in i.operands[1:])
    return lambda m: put(m, compute(x(m), y(m)))


@form(rf"(div|rem)\.{INTEGER}")
def division(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    dtype, put = TYPES[match[2]], target(program, i.operands[0])
    x, y = (source(program, text, dtype) for text in i.operands[1:])

    def step(m: Machine) -> None:
        by = y(m)
        if (np.broadcast_to(by == 0, m.lanes) & m.on()).any():
            raise Fault("division by zero")
        whole = quotient(x(m), by)
        put(m, whole if match[1] == "div" else x(m) - whole * by)

    return quietly(step)


@form(r"(mul|mad)\.wide\.(s16|u16|s32|u32)")
def wide(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    dtype, double, put = TYPES[match[2]], WIDER[match[2]], target(program, i.operands[0])
    x, y = (source(program, text, dtype) for text in i.operands[1:3])
    plus = source(program, i.operands[3], double) if match[1] == "mad" else lambda m: double(0)
    return quietly(lambda m: put(m, x(m).astype(double) * y(m).astype(double) + plus(m)))


@form(rf"mad\.lo\.{INTEGER}")
def mad(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    put, dtype = target(program, i.operands[0]), TYPES[match[1]]
    x, y, z = (source(program, text, dtype) for text in i.operands[1:])
    return quietly(lambda m: put(m, x(m) * y(m) + z(m)))


@form(r"add\.(s16x2|u16x2)")
def add_pairs(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    put = target(program, i.operands[0])
    x, y = (source(program, text, np.uint32) for text in i.operands[1:])

    def step(m: Machine) -> None:
        a, b = (np.broadcast_to(v(m), m.lanes).copy().view(np.uint16) for v in (x, y))
        put(m, (a + b).view(np.uint32))

    return quietly(step)


@form(r"(not|neg|abs)\.(b16|b32|b64|s16|s32|s64|pred)")
def unary(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    put = target(program, i.operands[0])
    if match[2] == "pred":
        p = predicate(program, i.operands[1])
        return lambda m: put(m, np.logical_not(p(m)))
    compute = {"not": np.invert, "neg": np.negative, "abs": np.absolute}[match[1]]
    x = source(program, i.operands[1], TYPES[match[2]])
    return quietly(lambda m: put(m, compute(x(m))))


@form(r"(shl)\.(b16|b32|b64)")
@form(r"(shr)\.(b16|b32|b64|s16|s32|s64|u16|u32|u64)")
def shift(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    put, compute = target(program, i.operands[0]), shift_left if match[1] == "shl" else shift_right
    x = source(program, i.operands[1], TYPES[match[2]])
    by = source(program, i.operands[2], np.uint32)
    return lambda m: put(m, compute(x(m), by(m)))


@form(r"shf\.(l|r)\.wrap\.b32")
def funnel(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    put, left = target(program, i.operands[0]), match[1] == "l"
    low, upper, by = (source(program, text, np.uint32) for text in i.operands[1:])

    def step(m: Machine) -> None:
        both = (upper(m).astype(np.uint64) << np.uint64(32)) | low(m)
        turn = (by(m) & np.uint32(31)).astype(np.uint64)
        both = (both << turn) >> np.uint64(32) if left else both >> turn
        put(m, np.asarray(both).astype(np.uint32))

    return step


@form(r"bfe\.(u32|s32|u64|s64)")
def extract(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    """A field of ``length`` bits from ``first`` on, its sign extended in the signed form."""
    dtype, put = TYPES[match[1]], target(program, i.operands[0])
    width = width_of(dtype)
    unsigned, signed = UNSIGNED[width], TYPES[f"s{width}"]
    x = source(program, i.operands[1], unsigned)
    first, length = (int(text, 0) for text in i.operands[2:])
    if not (length > 0 and first + length <= width):
        raise ValueError("a field outside the register")

    def step(m: Machine) -> None:
        top = x(m) << unsigned(width - first - length)
        put(m, top.view(signed if match[1][0] == "s" else unsigned) >> dtype(width - length))

    return step


@form(r"prmt\.b32")
def permute(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    put, selector = target(program, i.operands[0]), int(i.operands[3].rstrip("U"), 0)
    x, y = (source(program, text, np.uint32) for text in i.operands[1:3])

    def step(m: Machine) -> None:
        pool = np.stack([np.broadcast_to(v(m), m.lanes) for v in (x, y)], 1).view(np.uint8)
        taken = []
        for nibble in (selector >> 4 * n & 15 for n in range(4)):
            byte = pool[:, nibble & 7]
            taken.append((byte.view(np.int8) >> 7).view(np.uint8) if nibble & 8 else byte)
        put(m, np.ascontiguousarray(np.stack(taken, 1)).view(np.uint32)[:, 0])

    return step


# Fractions. Halves are computed in float32 (sums and products are exact enough) and rounded once.


def widened(bits: Vector, kind: str) -> Vector:
    """uint16 ``bits`` as float32."""
    bits = np.asarray(bits)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrowed(value: Vector, kind: str) -> Vector:
    """uint16 bits of the nearest ``kind``, ties to even."""
    if kind == "f16":
        return value.astype(np.float16).view(np.uint16)
    value = np.asarray(value, np.float32)
    bits = value.view(np.uint32)
    near = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), near.astype(np.uint16))


def fraction(program: Program, text: str, kind: str) -> Source:
    """An operand as float32 (f64 as float64); of pairs, [threads, 2]."""
    if kind in ("f32", "f64"):
        return source(program, text, TYPES[kind])
    if not kind.endswith("x2"):
        half = source(program, text, np.uint16)
        return lambda m: widened(half(m), kind)
    pair = source(program, text, np.uint32)

    def get(m: Machine) -> Vector:
        bits = np.ascontiguousarray(np.broadcast_to(pair(m), m.lanes))
        return widened(bits.view(np.uint16).reshape(-1, 2), kind[:-2])

    return get


def fraction_target(program: Program, text: str, kind: str) -> Target:
    put = target(program, text)
    if kind in ("f32", "f64"):
        return lambda m, value: put(m, np.asarray(value, TYPES[kind]))
    if not kind.endswith("x2"):
        return lambda m, value: put(m, narrowed(value, kind))
    return lambda m, value: put(
        m, np.ascontiguousarray(narrowed(value, kind[:-2])).view(np.uint32)[:, 0]
    )


FRACTION = "(f16|bf16|f16x2|bf16x2|f32|f64)"
FLOAT: dict[str, Callable[..., Vector]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": np.fmin,
    "max": np.fmax,
    "min.NaN": np.minimum,
    "max.NaN": np.maximum,
    "neg": np.negative,
    "abs": np.absolute,
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
}


@form(rf"(add|sub|mul|div)(?:\.rn)?\.{FRACTION}")
@form(rf"(min|max|min\.NaN|max\.NaN|neg|abs)\.{FRACTION}")
@form(r"(sqrt|rcp)\.rn\.(f32|f64)")
def floating(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    compute, put = FLOAT[match[1]], fraction_target(program, i.operands[0], match[2])
    get = [fraction(program, text, match[2]) for text in i.operands[1:]]
    return quietly(lambda m: put(m, compute(*(x(m) for x in get))))


@form(rf"fma\.rn\.{FRACTION}")
def fused(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    if match[1] == "f64":
        raise Unknown(f"line {i.line}: {i}")
    put = fraction_target(program, i.operands[0], match[1])
    x, y, z = (fraction(program, text, match[1]) for text in i.operands[1:])
    return quietly(lambda m: put(m, np.multiply(x(m), y(m), dtype=np.float64) + z(m)))


@form(r"mov\.(b16|b32|b64|u16|u32|u64|s32|f32)")
def move(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    to, of = i.operands
    dtype = UNSIGNED[int(match[1][1:])]
    if to.startswith("{"):
        parts = registers_in(to)
        piece = UNSIGNED[width_of(dtype) // len(parts)]
        puts, whole = [target(program, part) for part in parts], source(program, of, dtype)

        def unpack(m: Machine) -> None:
            value = np.ascontiguousarray(np.broadcast_to(whole(m), m.lanes))
            columns = value.view(piece).reshape(-1, len(parts)).copy()
            for n, put in enumerate(puts):
                put(m, columns[:, n])

        return unpack
    put = target(program, to)
    if of.startswith("{"):
        parts = registers_in(of)
        get = [source(program, part, UNSIGNED[width_of(dtype) // len(parts)]) for part in parts]
        return lambda m: put(
            m, np.stack([np.broadcast_to(x(m), m.lanes) for x in get], 1).view(dtype)[:, 0]
        )
    value = source(program, of, dtype)
    return lambda m: put(m, np.asarray(value(m)))


@form(r"cvta(?:\.to)?\.(?:param|global|shared)\.(u32|u64)")
def generic(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    put, x = target(program, i.operands[0]), source(program, i.operands[1], TYPES[match[1]])
    return lambda m: put(m, np.asarray(x(m)))


@form(r"mov\.pred")
def move_predicate(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    put, value = target(program, i.operands[0]), predicate(program, i.operands[1])
    return lambda m: put(m, np.asarray(value(m)))


@form(r"selp\.(b16|b32|b64|u16|u32|u64|s32|f32)")
def select(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    put, dtype = target(program, i.operands[0]), UNSIGNED[int(match[1][1:])]
    x, y = (source(program, text, dtype) for text in i.operands[1:3])
    p = predicate(program, i.operands[3])
    return lambda m: put(m, np.where(p(m), x(m), y(m)))


ORDERED: dict[str, Callable[[Vector, Vector], Vector]] = {
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


def compare(name: str, floating: bool) -> Callable[[Vector, Vector], Vector]:
    if floating and name == "ne":  # ordered: false for NaN
        return lambda x, y: (x < y) | (x > y)
    if floating and name[-1] == "u" and name[:-1] in ORDERED:  # true for NaN
        nan, ordered = ORDERED["nan"], ORDERED[name[:-1]]
        return lambda x, y: nan(x, y) | ordered(x, y)
    return ORDERED[name]


@form(rf"setp\.(\w+)(?:\.(and|or|xor))?\.{INTEGER}")
@form(rf"setp\.(\w+)(?:\.(and|or|xor))?\.{BITS}")
@form(rf"setp\.(\w+)(?:\.(and|or|xor))?\.{FRACTION}")
def set_predicate(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    kind = match[3]
    floats = "f" in kind
    test = compare(match[1], floats)
    puts = [target(program, part) for part in i.operands[0].split("|")]
    x, y = (
        fraction(program, text, kind) if floats else source(program, text, TYPES[kind])
        for text in i.operands[1:3]
    )
    also = predicate(program, i.operands[3]) if match[2] else None

    def step(m: Machine) -> None:
        found = np.asarray(test(x(m), y(m)))
        if also is not None:
            found = np.asarray(BINARY[match[2]](found, also(m)))
        if found.ndim == 2:
            for n, put in enumerate(puts):
                put(m, found[:, n])
        else:
            puts[0](m, found)
            for put in puts[1:]:
                put(m, ~found)

    return quietly(step)


@form(rf"cvt\.{INTEGER[:-1]}|s8|u8)\.{INTEGER[:-1]}|s8|u8)")
def convert_integers(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    put, dtype = target(program, i.operands[0]), TYPES[match[1]]
    x = source(program, i.operands[1], TYPES[match[2]])
    return lambda m: put(m, np.asarray(x(m)).astype(dtype))


@form(r"cvt(?:\.rn)?\.(f16|bf16|f32|f64)\.(f16|bf16|f32|f64)")
def convert_fractions(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    put = fraction_target(program, i.operands[0], match[1])
    x = fraction(program, i.operands[1], match[2])
    return quietly(lambda m: put(m, np.asarray(x(m))))


@form(r"cvt\.rn\.(f16x2|bf16x2)\.f32")
def convert_pair(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    put = fraction_target(program, i.operands[0], match[1])
    upper, lower = (source(program, text, np.float32) for text in i.operands[1:])
    both = lambda m: np.stack([np.broadcast_to(v(m), m.lanes) for v in (lower, upper)], 1)  # noqa: E731
    return quietly(lambda m: put(m, both(m)))


@form(rf"cvt\.rn\.(f32|f64)\.{INTEGER[:-1]}|s8|u8)")
def convert_to_fraction(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    put, x = target(program, i.operands[0]), source(program, i.operands[1], TYPES[match[2]])
    return lambda m: put(m, np.asarray(x(m)).astype(TYPES[match[1]]))


# Memory of threads.


@form(r"ld\.param\.(b8|b16|b32|b64|u32|u64)")
def load_parameter(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    put = target(program, i.operands[0])
    name, dtype = i.operands[1].strip("[]"), TYPES[match[1]]
    mask = (1 << width_of(dtype)) - 1
    return lambda m: put(m, np.asarray(dtype(m.arguments[name] & mask)))


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
    dtype = TYPES[match[4].replace("f", "b") + match[5]]
    if load:
        puts = [target(program, name) for name in registers]

        def read(m: Machine) -> None:
            lanes = m.active()
            where, size = at(m)[lanes], len(puts) * np.dtype(dtype).itemsize
            data = m.shared.load(lanes, where, size) if shared else m.fetch(lanes, where, size)
            columns = data.view(dtype)
            for n, put in enumerate(puts):
                if m.mask is None:
                    put(m, columns[:, n])
                else:
                    spread = np.zeros(m.lanes, dtype)
                    spread[lanes] = columns[:, n]
                    put(m, spread)

        return read
    get = [source(program, name, dtype) for name in registers]

    def write(m: Machine) -> None:
        lanes = m.active()
        columns = [np.broadcast_to(x(m), m.lanes)[lanes] for x in get]
        data = np.stack(columns, 1).view(np.uint8).reshape(len(lanes), -1)
        if shared:
            m.shared.store(lanes, at(m)[lanes], data)
        else:
            m.deposit(lanes, at(m)[lanes], data)

    return write


@form(r"atom\.global\.gpu\.(acq_rel|relaxed)\.add\.(u32|f32)")
def atomic_add(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    put, at = target(program, i.operands[0]), address(program, i.operands[1])
    dtype = TYPES[match[2]]
    value = source(program, i.operands[2], dtype)

    def step(m: Machine) -> None:
        lanes = m.active()
        where, add = at(m), np.broadcast_to(value(m), m.lanes)
        old = np.zeros(m.lanes, dtype)
        m.check_waited(lanes)
        if match[1] == "acq_rel":
            m.memory.meet(m, lanes)
        for lane in m.rng.permutation(lanes):
            cells, numbers, _ = m.memory.cells(where[lane : lane + 1], 4)[0]
            cell = cells.view(dtype)[numbers]
            old[lane] = cell[0]
            cells.view(dtype)[numbers] = cell + add[lane]
        put(m, old)

    return quietly(step)


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
    puts = [target(program, part) for part in i.operands[0].split("|")]
    x, by, clamp = (source(program, text, np.uint32) for text in i.operands[1:4])
    if len(puts) > 1 or int(i.operands[4], 0) & 0xFFFFFFFF != 0xFFFFFFFF:
        raise ValueError("a form of shfl that nobody needed")

    def step(m: Machine) -> None:
        m.warps()
        lane, limit = (m.tid % WARP).astype(np.int64), clamp(m).astype(np.int64)
        step_, segment = by(m).astype(np.int64) & 31, limit >> 8 & 31
        most = (lane & segment) | (limit & 31 & ~segment)
        least = lane & segment
        if match[1] == "idx":
            of = least | (step_ & ~segment)
        else:
            of = {"bfly": lane ^ step_, "up": lane - step_, "down": lane + step_}[match[1]]
        valid = of >= most if match[1] == "up" else of <= most
        of = np.where(valid, of, lane)
        puts[0](m, np.broadcast_to(x(m), m.lanes)[np.arange(m.lanes) // WARP * WARP + of])

    return step


@form(r"elect\.sync")
def elect(program: Program, i: Instruction, match: re.Match[str]) -> Step:
    leader, chosen = (target(program, part) for part in i.operands[0].split("|"))

    def step(m: Machine) -> None:
        m.warps()
        leader(m, np.zeros(m.lanes, np.uint32))
        chosen(m, m.tid % WARP == 0)

    return step
