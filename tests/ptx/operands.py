"""Operands: how an instruction reads and writes registers, immediates, parameters and addresses.

A kind is a type of PTX. Whole numbers are numpy values of that type, predicates bools, halves
float32, and pairs of halves [threads, 2] of float32, which are rounded once when they are written.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import UNSIGNED, WARP, Machine, Step, Vector
from .parse import Instruction, Program

Source = Callable[[Machine], Vector]
Target = Callable[[Machine, Vector], None]
Form = Callable[[Program, Instruction, "re.Match[str]"], Step]

FORMS: list[tuple[re.Pattern[str], Form]] = []
TYPES: dict[str, Any] = {
    f"{kind}{width}": np.dtype(f"{'i' if kind == 's' else 'u'}{width // 8}").type
    for kind in "bsu"
    for width in (8, 16, 32, 64)
} | {"f32": np.float32, "f64": np.float64}


def form(pattern: str) -> Callable[[Form], Form]:
    """Decorates what makes a step of an instruction whose whole opcode matches."""

    def add(make: Form) -> Form:
        FORMS.append((re.compile(pattern), make))
        return make

    return add


def width_of(dtype: Any) -> int:
    return 8 * np.dtype(dtype).itemsize


def spread(m: Machine, value: Vector) -> np.ndarray:
    """A value of every thread."""
    return np.broadcast_to(value, m.lanes)


def widened(bits: Vector, kind: str) -> Vector:
    """uint16 ``bits`` as float32."""
    bits = np.asarray(bits)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrowed(value: Vector, kind: str) -> Vector:
    """uint16 bits of the nearest ``kind``, ties to even."""
    if kind == "f16":
        return np.asarray(value).astype(np.float16).view(np.uint16)
    value = np.asarray(value, np.float32)
    bits = value.view(np.uint32)
    near = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), near.astype(np.uint16))


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


SPECIAL: dict[str, Source] = {
    "%tid.x": lambda m: m.tid,
    "%ctaid.x": lambda m: m.ctaid,
    "%nctaid.x": lambda m: np.array(m.grid),
    "%ntid.x": lambda m: np.array(m.threads),
    "%laneid": lambda m: m.tid % WARP,
    "global_smem": lambda m: np.array(0),
}


def read(program: Program, text: str, kind: str) -> Source:
    """How to read an operand as ``kind``; wider registers are cut off."""
    if kind == "pred":
        value = None if text in program.registers else np.bool_(int(text, 0))
        return lambda m: m.files[1][program.registers[text][1]] if value is None else value
    if kind in ("f16", "bf16"):
        half = read(program, text, "u16")
        return lambda m: widened(half(m), kind)
    if kind.endswith("x2"):
        pair = read(program, text, "u32")
        bits = lambda m: np.ascontiguousarray(spread(m, pair(m))).view(np.uint16)  # noqa: E731
        return lambda m: widened(bits(m).reshape(-1, 2), kind[:-2])
    dtype, text = TYPES[kind], text.strip("[]")
    if text in program.registers:
        width, row = program.registers[text]
        if width < width_of(dtype):
            raise ValueError(f"{text} is narrower than its use")
        if width == width_of(dtype):
            return lambda m: m.view(width, dtype)[row]
        unsigned = UNSIGNED[width_of(dtype)]
        return lambda m: m.files[width][row].astype(unsigned).view(dtype)
    if text in SPECIAL:
        return lambda m: SPECIAL[text](m).astype(dtype)
    if text in program.parameters:
        return lambda m: dtype(m.arguments[text] & ((1 << width_of(dtype)) - 1))
    literal = immediate(text, dtype)
    return lambda m: literal


def write(program: Program, text: str, kind: str = "") -> Target:
    """How to write a register; ``_`` takes what nobody wants. Values are extended to its width,
    halves and pairs rounded."""
    if text == "_":
        return lambda m, value: None
    width, row = program.registers[text]

    def put(m: Machine, value: Vector) -> None:
        value = np.asarray(value)
        if width == 1:
            kept = m.files[1][row]
        else:
            if width_of(value.dtype) < width:
                value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{width // 8}")
            kept = m.view(width, value.dtype.type)[row]
        np.copyto(kept, value, where=True if m.mask is None else m.mask)

    if kind in ("f32", "f64"):
        return lambda m, value: put(m, np.asarray(value, TYPES[kind]))
    if kind in ("f16", "bf16"):
        return lambda m, value: put(m, narrowed(value, kind))
    if kind in ("f16x2", "bf16x2"):
        pair = lambda v: np.ascontiguousarray(narrowed(v, kind[:-2])).view(np.uint32)  # noqa: E731
        return lambda m, value: put(m, pair(value)[..., 0])
    return put


def address(program: Program, text: str) -> Source:
    """``[register + offset]`` as int64 of every thread."""
    base, _, offset = text.strip("[] ").partition("+")
    wide = program.registers.get(base.strip(), (32, 0))[0] == 64
    start, shift = read(program, base.strip(), "u64" if wide else "u32"), int(offset or "0", 0)
    return lambda m: spread(m, start(m).astype(np.int64) + shift)
