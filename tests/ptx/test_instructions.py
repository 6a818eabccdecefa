"""Each instruction against values worked out by hand, or by numpy and Python in another way."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

from .global_memory import Memory
from .instructions import decode
from .launch import launch
from .machine import Fault
from .parse import Unknown, parse

REGISTERS = ".reg .pred %p<20>; .reg .b16 %rs<40>; .reg .b32 %r<80>; .reg .b64 %rd<40>;"


def entry(body: str, threads: int = 32, parameters: int = 3) -> str:
    """A kernel with this body; %rd1 to %rd3 hold its parameters, %r1 the thread."""
    listed = ",\n".join(f"\t.param .u64 k_param_{n}" for n in range(parameters))
    loads = "\n".join(f"ld.param.b64 %rd{n + 1}, [k_param_{n}];" for n in range(parameters))
    return f"""
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
{listed}
)
.reqntid {threads}
{{
{REGISTERS}
{loads}
mov.u32 %r1, %tid.x;
{body}
ret;
}}
"""


def run(body: str, *tensors: torch.Tensor, threads: int = 32, **options) -> None:
    memory = Memory()
    values = [memory.add(f"tensor {n}", t) for n, t in enumerate(tensors)]
    launch(entry(body, threads), memory, values, **options)


def bits(value: float) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0]


def computed(code: str, *inputs: int, results: int = 1) -> list[int]:
    """%r20 and on after ``code``, which finds ``inputs`` in %r10 and on."""
    out = torch.full((results,), 77, dtype=torch.int32)
    loads = "\n".join(f"mov.b32 %r{10 + n}, {v & 0xFFFFFFFF};" for n, v in enumerate(inputs))
    stores = "\n".join(
        f"@%p19 st.global.b32 [ %rd1 + {4 * n} ], {{ %r{20 + n} }};" for n in range(results)
    )
    run(f"{loads}\n{code}\nsetp.eq.s32 %p19, %r1, 0;\n{stores}", out)
    return out.tolist()


WHOLE = {
    "add.s32 %r20, %r10, %r11;": ((2**31 - 1, 1), -(2**31)),
    "sub.s32 %r20, %r10, 5;": ((3,), -2),
    "mul.lo.s32 %r20, %r10, %r11;": ((65537, 65537), 131073),
    "mul.hi.u32 %r20, %r10, %r11;": ((-1, -1), -2),
    "mul.hi.s32 %r20, %r10, %r11;": ((-1, 2), -1),
    "mad.lo.s32 %r20, %r10, %r11, -7;": ((-3, 5), -22),
    "div.s32 %r20, %r10, %r11;": ((-7, 2), -3),
    "rem.s32 %r20, %r10, %r11;": ((-7, 2), -1),
    "div.u32 %r20, %r10, %r11;": ((-7, 2), 2147483644),
    "and.b32 %r20, %r10, %r11;": ((12, 10), 8),
    "or.b32 %r20, %r10, %r11;": ((12, 10), 14),
    "xor.b32 %r20, %r10, %r11;": ((12, 10), 6),
    "not.b32 %r20, %r10;": ((5,), -6),
    "neg.s32 %r20, %r10;": ((5,), -5),
    "shl.b32 %r20, %r10, 31;": ((3,), -(2**31)),
    "shl.b32 %r20, %r10, 32;": ((3,), 0),
    "shr.u32 %r20, %r10, 4;": ((-1,), 2**28 - 1),
    "shr.s32 %r20, %r10, 40;": ((-5,), -1),
    "min.s32 %r20, %r10, %r11;": ((-1, 1), -1),
    "min.u32 %r20, %r10, %r11;": ((-1, 1), 1),
    "max.s32 %r20, %r10, %r11;": ((-1, 1), 1),
    "bfe.u32 %r20, %r10, 4, 8;": ((0xABC,), 0xAB),
    "bfe.s32 %r20, %r10, 4, 8;": ((0xABC,), 0xAB - 256),
    "prmt.b32 %r20, %r10, %r11, 0x7340;": ((0x33221100, 0x77665544), 0x77334400),
    "prmt.b32 %r20, %r10, 0, 0x7779;": ((0x0000F100,), 0x000000FF),
    "shf.l.wrap.b32 %r20, %r10, %r11, 8;": ((0x11223344, 0x55667788), 0x66778811),
    "cvt.s32.s8 %r20, %r10;": ((0x1FF,), -1),
    "mov.u16 %rs1, 0xCBA9; cvt.u32.u16 %r20, %rs1;": ((), 0xCBA9),
    "add.s16x2 %r20, %r10, %r11;": ((0x7FFF0001, 0x0001FFFF), -(2**31)),
    "selp.b32 %r20, 7, 9, %p1;": ((), 9),
    "mul.wide.s32 %rd9, %r10, %r11; shr.u64 %rd9, %rd9, 32; cvt.u32.u64 %r20, %rd9;": (
        (-(2**31), 6),
        -3,
    ),
    "mul.wide.u32 %rd9, %r10, %r11; shr.u64 %rd9, %rd9, 32; cvt.u32.u64 %r20, %rd9;": (
        (-(2**31), 6),
        3,
    ),
    "mov.b32 {%rs1, %rs2}, %r10; mov.b32 %r20, {%rs2, %rs1};": ((0x12345678,), 0x56781234),
}


@pytest.mark.parametrize("code", WHOLE)
def test_whole_numbers(code):
    inputs, due = WHOLE[code]
    assert computed(code, *inputs) == [due]


def test_upper_half_of_a_long_product():
    a, b = 0xFEDCBA9876543210, 0x0F1E2D3C4B5A6978
    found = computed(
        f"mov.b64 %rd9, {a}; mov.b64 %rd10, {b}; mul.hi.u64 %rd11, %rd9, %rd10;"
        "cvt.u32.u64 %r20, %rd11; shr.u64 %rd12, %rd11, 32; cvt.u32.u64 %r21, %rd12;",
        results=2,
    )
    due = a * b >> 64
    assert [v & 0xFFFFFFFF for v in found] == [due & 0xFFFFFFFF, due >> 32]


NAN = float("nan")
TINY = 2.0**-24
FRACTIONS = {
    "add.f32": ((1.5, 2.25), 3.75),
    "sub.f32": ((1.0, TINY), 1.0 - TINY),
    "mul.f32": ((3.0, -0.5), -1.5),
    "div.rn.f32": ((1.0, 3.0), struct.unpack("<f", struct.pack("<f", 1 / 3))[0]),
    "max.f32": ((NAN, 2.0), 2.0),
    "min.f32": ((-1.0, NAN), -1.0),
    "fma.rn.f32": ((1 + 2.0**-12, 1 + 2.0**-12, -1 - 2.0**-11), 2.0**-24),
}


@pytest.mark.parametrize("op", FRACTIONS)
def test_fractions(op):
    inputs, due = FRACTIONS[op]
    names = ", ".join(f"%r{10 + n}" for n in range(len(inputs)))
    assert computed(f"{op} %r20, {names};", *map(bits, inputs)) == [bits(due)]


def test_a_maximum_that_keeps_nan():
    (found,) = computed("max.NaN.f32 %r20, %r10, %r11;", bits(NAN), bits(2.0))
    assert math.isnan(struct.unpack("<f", struct.pack("<i", found))[0])


def half_bits(value: float) -> int:
    """The nearest half by the definition, ties to even, without numpy's own rounding."""
    return min(
        range(0x7C00),
        key=lambda b: (
            abs(Fraction(struct.unpack("<e", struct.pack("<H", b))[0]) - Fraction(value)),
            b & 1,
        ),
    )


def test_pairs_of_halves_are_rounded_to_even():
    tie = 1 + 2.0**-11  # between 1 and the next half
    code = "cvt.rn.f16x2.f32 %r20, %r10, %r11;"
    (found,) = computed(code, bits(tie), bits(1 + 3 * 2.0**-11))
    assert found & 0xFFFF == half_bits(1 + 3 * 2.0**-11)
    assert found >> 16 == half_bits(tie) == 0x3C00


def test_bfloat16_is_rounded_to_even():
    code = "cvt.rn.bf16.f32 %rs1, %r10; cvt.u32.u16 %r20, %rs1;"
    assert computed(code, 0x3F808000) == [0x3F80]
    assert computed(code, 0x3F818000) == [0x3F82]
    assert computed(code, 0x3F808001) == [0x3F81]


COMPARED = {
    ("lt.s32", -1, 1): True,
    ("lt.u32", -1, 1): False,
    ("hi.u32", -1, 1): True,
    ("ge.s32", 4, 4): True,
    ("eq.b32", 4, 5): False,
    ("num.f32", bits(NAN), bits(1.0)): False,
    ("nan.f32", bits(1.0), bits(NAN)): True,
    ("lt.f32", bits(NAN), bits(1.0)): False,
    ("ltu.f32", bits(NAN), bits(1.0)): True,
    ("ne.f32", bits(NAN), bits(1.0)): False,
    ("neu.f32", bits(NAN), bits(1.0)): True,
    ("eq.f32", bits(0.0), bits(-0.0)): True,
}


@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_comparisons(case):
    op, *inputs = case
    code = f"setp.{op} %p1, %r10, %r11; selp.b32 %r20, 1, 0, %p1;"
    assert computed(code, *inputs) == [int(COMPARED[case])]


def test_shuffles():
    out = torch.zeros(96, dtype=torch.int32)
    run(
        """
        shfl.sync.bfly.b32 %r2, %r1, 3, 31, -1;
        shfl.sync.idx.b32 %r3, %r1, 7, 31, -1;
        shfl.sync.down.b32 %r4, %r1, 30, 31, -1;
        mad.wide.s32 %rd4, %r1, 4, %rd1;
        st.global.b32 [ %rd4 + 0 ], { %r2 };
        st.global.b32 [ %rd4 + 128 ], { %r3 };
        st.global.b32 [ %rd4 + 256 ], { %r4 };
        """,
        out,
    )
    assert out[:32].tolist() == [lane ^ 3 for lane in range(32)]
    assert out[32:64].tolist() == [7] * 32
    assert out[64:].tolist() == [30, 31, *range(2, 32)]


def test_threads_branch_apart_and_meet_again():
    """A loop that each thread leaves after as many turns as its number says."""
    out = torch.zeros(64, dtype=torch.int32)
    run(
        """
        mov.b32 %r2, 0;
        mov.b32 %r3, 0;
        $again:
        add.s32 %r3, %r3, %r2;
        setp.eq.s32 %p2, %r2, %r1;
        @%p2 bra $out;
        add.s32 %r2, %r2, 1;
        bra.uni $again;
        $out:
        shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;
        mad.wide.s32 %rd4, %r1, 4, %rd1;
        st.global.b32 [ %rd4 + 0 ], { %r4 };
        """,
        out,
        threads=64,
    )
    assert out.tolist() == [sum(range((lane ^ 1) + 1)) for lane in range(64)]


def test_a_shuffle_of_part_of_a_warp_is_refused():
    with pytest.raises(Fault, match="part of a warp"):
        run("setp.lt.s32 %p1, %r1, 3;\n@%p1 shfl.sync.bfly.b32 %r2, %r1, 3, 31, -1;")


def fragments(kind: str, k: int):
    """a [16, k], b [k, 8] and c [16, 8] of whole numbers, and the lanes' registers of each, from
    the tables of the PTX manual, one element at a time."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-4, 5, (16, k)), rng.integers(-4, 5, (k, 8))
    c = rng.integers(-9, 10, (16, 8))
    word = 1 if kind == "tf32" else 2
    registers = np.zeros((32, 10, 2))
    for lane in range(32):
        group, in_group = lane >> 2, lane & 3
        for n in range(4 * word):
            row = group if n // word % 2 == 0 else group + 8
            if word == 2:
                column = in_group * 2 + (n & 1) + (8 if n >= 4 else 0)
            else:
                column = in_group + (4 if n >= 2 else 0)
            registers[lane, n // word, n % word] = a[row, column]
        for n in range(2 * word):
            row = in_group * 2 + (n & 1) + (8 if n >= 2 else 0) if word == 2 else in_group + 4 * n
            registers[lane, 4 + n // word, n % word] = b[row, group]
        for n in range(4):
            row = group if n < 2 else group + 8
            registers[lane, 6 + n, 0] = c[row, in_group * 2 + (n & 1)]
    return a, b, c, registers


def packed(registers: np.ndarray, kind: str) -> torch.Tensor:
    """[10, 32] words."""
    words = torch.zeros(10, 32, dtype=torch.int32)
    words[6:] = torch.tensor(registers[:, 6:, 0].T.copy()).float().view(torch.int32)
    given = torch.tensor(registers[:, :6].transpose(1, 0, 2).copy())
    if kind == "tf32":
        words[:6] = given[..., 0].float().view(torch.int32) | 0x1FFF  # bits that are cut off
    else:
        dtype = torch.float16 if kind == "f16" else torch.bfloat16
        words[:6] = given.to(dtype).contiguous().view(torch.int32)[..., 0]
    return words


@pytest.mark.parametrize(("kind", "k"), [("f16", 16), ("bf16", 16), ("tf32", 8)])
def test_a_product_of_fragments(kind, k):
    a, b, c, registers = fragments(kind, k)
    words, out = packed(registers, kind), torch.zeros(4, 32)
    loads = "\n".join(f"ld.global.b32 {{ %r{10 + n} }}, [ %rd4 + {128 * n} ];" for n in range(10))
    stores = "\n".join(f"st.global.b32 [ %rd5 + {128 * n} ], {{ %r{30 + n} }};" for n in range(4))
    run(
        f"""
        mad.wide.s32 %rd4, %r1, 4, %rd1;
        mad.wide.s32 %rd5, %r1, 4, %rd2;
        {loads}
        mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {{ %r30, %r31, %r32, %r33 }},
            {{ %r10, %r11, %r12, %r13 }}, {{ %r14, %r15 }}, {{ %r16, %r17, %r18, %r19 }};
        {stores}
        """,
        words,
        out,
    )
    due = a @ b + c
    for lane in range(32):
        for n in range(4):
            row, column = lane // 4 + 8 * (n // 2), lane % 4 * 2 + n % 2
            assert out[n, lane] == due[row, column]


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_between_memory_and_fragments(trans):
    """ldmatrix of numbers that say where they stand; stmatrix puts them back."""
    numbers = torch.arange(256, dtype=torch.int16)
    words, back = torch.zeros(4, 32, dtype=torch.int32), torch.zeros(256, dtype=torch.int16)
    run(
        f"""
        mad.wide.s32 %rd4, %r1, 16, %rd1;
        ld.global.v4.b32 {{ %r2, %r3, %r4, %r5 }}, [ %rd4 + 0 ];
        shl.b32 %r6, %r1, 4;
        st.shared.v4.b32 [%r6], {{%r2, %r3, %r4, %r5}};
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r6];
        mad.wide.s32 %rd5, %r1, 4, %rd2;
        st.global.b32 [ %rd5 + 0 ], {{ %r10 }};
        st.global.b32 [ %rd5 + 128 ], {{ %r11 }};
        st.global.b32 [ %rd5 + 256 ], {{ %r12 }};
        st.global.b32 [ %rd5 + 384 ], {{ %r13 }};
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r6+512], {{%r10, %r11, %r12, %r13}};
        ld.shared.v4.b32 {{%r2, %r3, %r4, %r5}}, [%r6+512];
        mad.wide.s32 %rd6, %r1, 16, %rd3;
        st.global.v4.b32 [ %rd6 + 0 ], {{ %r2, %r3, %r4, %r5 }};
        """,
        numbers,
        words,
        back,
        shared=1024,
    )
    halves = words.view(torch.int16).view(4, 32, 2)
    for matrix in range(4):
        for lane in range(32):
            for half in range(2):
                row, column = lane // 4, lane % 4 * 2 + half
                if trans:
                    row, column = column, row
                assert halves[matrix, lane, half] == 64 * matrix + 8 * row + column
    assert torch.equal(back, numbers)


UNKNOWN = (
    "ex2.approx.f32 %r1, %r2;",
    "add.rz.f32 %r1, %r2, %r3;",
    "add.ftz.f32 %r1, %r2, %r3;",
    "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r1}, {%r2}, {%r3}, {%r4};",
    "ld.global.acquire.sys.b32 {%r1}, [%rd1];",
    "shfl.sync.idx.b32 %r1|%p1, %r2, 0, 31, -1;",
    "mov.u32 %r1, %clock;",
    "cp.async.ca.shared.global [%r1], [%rd1], 5;",
)


@pytest.mark.parametrize("line", UNKNOWN)
def test_what_the_machine_does_not_know_is_an_error_that_shows_the_line(line):
    program = parse(entry(line))
    where = program.code[-2]
    with pytest.raises(Unknown, match=f"line {where.line}: {where.opcode}"):
        decode(program, where)


def test_names_of_inner_scopes_are_their_own():
    scope = "{ .reg .pred done; again: setp.eq.s32 done, %r1, %r1; @!done bra again; }\n"
    program = parse(entry(scope * 2))
    assert len([name for name in program.registers if name.startswith("done")]) == 2
    assert len({i.operands[0] for i in program.code if i.opcode == "bra"}) == 2
