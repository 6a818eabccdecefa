"""The 3x3, the expansion with its residual and the next reduction in one kernel: exact on integers,
within twice PyTorch's error on floats."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from fastres.kernels import LAUNCHES, shifted_block, shifted_block_ref
from fastres.kernels._config import Machine
from fastres.kernels.shifted import (
    CONFIGS,
    ShiftedConfig,
    _Problem,
    fits,
    select_config,
    shifted_block_op,
    shifted_tail_op,
    supports,
)

interpreter = pytest.mark.interpreter
shifted_module = import_module("fastres.kernels.shifted")
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
DTYPES = [HALF, BFLOAT, FLOAT]
SMALL = ShiftedConfig(16, 16, 16, 4, 2)
MACHINES = {
    "sm_90": Machine(132, 227 * 1024),
    "sm_80": Machine(108, 163 * 1024),
    "gfx942": Machine(304, 64 * 1024),
}
SMALLER = [(64, 64), (64, 128), (64, 0), (128, 128), (128, 0)]
LARGER = [(128, 256), (256, 256), (256, 0)]
STAGES = [(target, w) for target in MACHINES for w in SMALLER + LARGER]
NOT_OFFERED = [("gfx942", w) for w in LARGER]  # 64 KiB hold neither the weights nor the tile


def sparse(rows: int, columns: int) -> torch.Tensor:
    """Weights of which two in a row count, 1 and -2: no sum leaves float16's whole numbers."""
    w = torch.zeros(rows, columns)
    i = torch.arange(rows)
    w[i, (7 * i) % columns] = 1.0
    w[i, (11 * i + 5) % columns] -= 2.0
    return w


@pytest.fixture
def operands(integers, device):
    """``operands(N, H, W, C, C', E, R, dtype, stride)``: t, w2, b2, w3, b3, x, w1, b1."""

    def make(n, h, w, c, middle, e, r, dtype, stride=1):
        p, q = (h - 1) // stride + 1, (w - 1) // stride + 1
        w2 = sparse(middle, 9 * c).view(middle, 3, 3, c).permute(0, 3, 1, 2)
        return (
            integers(n, c, h, w, dtype=dtype),
            w2.to(device, dtype),
            integers(middle),
            sparse(e, middle).to(device, dtype),
            integers(e),
            16 * integers(n, e, p, q, dtype=dtype),
            sparse(r, e).to(device, dtype) if r else None,
            integers(r, dtype=dtype) if r else None,
        )

    return make


def expected(*inputs, **keywords):
    """The exact results, each rounded once."""
    results = shifted_block_ref(*inputs, upcast=True, **keywords)
    return tuple(None if y is None else y.to(inputs[0].dtype) for y in results)


def guarded(poisoned, want, dtype):
    return [None if y is None else poisoned(y.shape, dtype) for y in want]


@interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 16, 16, 64, 16), (2, 5, 4, 16, 32, 64, 16), (3, 2, 7, 32, 16, 128, 64)],
    ids=str,
)
@pytest.mark.parametrize("tail", [False, True], ids=["next", "tail"])
def test_every_shape_is_exact(operands, poisoned, sizes, stride, dtype, tail):
    sizes = (*sizes[:-1], 0) if tail else sizes
    inputs = operands(*sizes, dtype, stride)
    before = [None if t is None else t.clone() for t in inputs]
    want = expected(*inputs, stride=stride)
    outputs = guarded(poisoned, want, dtype)
    launches = LAUNCHES["shifted_block_kernel"]
    got = shifted_block(
        *inputs, stride=stride, out=tuple(o and o.out for o in outputs), config=SMALL
    )
    assert LAUNCHES["shifted_block_kernel"] == launches + 1
    for one, out, exact in zip(got, outputs, want, strict=True):
        assert (one is None) == (exact is None)
        if exact is not None:
            out.check()
            assert torch.equal(one, exact)
            assert bool((exact > 0).any())
    assert all(t is None or torch.equal(t, c) for t, c in zip(inputs, before, strict=True))


@interpreter
@pytest.mark.parametrize("dtype", [HALF, FLOAT], ids=str)
def test_the_relus_and_biases_have_something_to_do(operands, dtype):
    inputs = operands(2, 5, 4, 16, 32, 64, 16, dtype)
    middle = F.conv2d(*(t.float() for t in inputs[:3]), padding=1)
    assert bool((middle < 0).any())
    for x in expected(*inputs):
        assert bool((x == 0).any())
    for i in (2, 4, 7):
        without = [None if j == i else t for j, t in enumerate(inputs)]
        got, want = shifted_block(*without, config=SMALL), expected(*without)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert not torch.equal(got[1], expected(*inputs)[1])


@interpreter
def test_row10_the_residual_may_be_overwritten(operands, poisoned):
    inputs = operands(2, 5, 7, 16, 16, 128, 32, HALF)
    want = expected(*inputs)
    wide = poisoned(inputs[5].shape, HALF, fill=inputs[5])
    narrow = poisoned(want[1].shape, HALF)
    inputs = (*inputs[:5], wide.out, *inputs[6:])
    got = shifted_block(*inputs, out=(wide.out, narrow.out), config=SMALL)
    wide.check()
    narrow.check()
    assert got[0] is wide.out
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


ROWS = [(kind, row) for kind, rows in CONFIGS.items() for row in rows]


@interpreter
@pytest.mark.parametrize("tail", [False, True], ids=["next", "tail"])
@pytest.mark.parametrize(("kind", "row"), ROWS, ids=str)
def test_row19_every_config_is_exact(operands, poisoned, kind, row, tail):
    dtype, precision = (HALF, "ieee") if kind == "half" else (FLOAT, kind)
    size = (12, 11) if row.block_m > 16 else (5, 4)  # a tile and a part
    inputs = operands(1, *size, 64, 64, 64, 0 if tail else 64, dtype)
    want = expected(*inputs)
    outputs = guarded(poisoned, want, dtype)
    out = tuple(o and o.out for o in outputs)
    got = shifted_block(*inputs, precision=precision, out=out, config=row)
    for one, exact in zip(got, want, strict=True):
        assert one is exact is None or torch.equal(one, exact)


@interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_floats_keep_the_rule_of_two(device, rule_of_two, dtype):
    def normal(*shape, scale=1.0):
        t = (torch.randn(shape, device=device) * scale).to(dtype)
        return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t

    inputs = (
        normal(2, 32, 5, 4),
        normal(32, 32, 3, 3, scale=288**-0.5),
        torch.randn(32, device=device),
        normal(128, 32, scale=0.2),
        torch.randn(128, device=device),
        normal(2, 128, 5, 4),
        normal(64, 128, scale=0.1),
        torch.randn(64, device=device),
    )
    got, pt = shifted_block(*inputs, config=SMALL), shifted_block_ref(*inputs)
    for out, same, ref in zip(got, pt, shifted_block_ref(*inputs, upcast=True), strict=True):
        rule_of_two(out, same, ref)


@interpreter
def test_row12_nan_passes_every_relu_and_stays_near(operands):
    inputs = operands(2, 6, 5, 16, 16, 64, 16, HALF)
    clean = shifted_block(*inputs, config=SMALL)
    inputs[0][0, 3, 1, 1] = math.nan
    got, want = shifted_block(*inputs, config=SMALL), shifted_block_ref(*inputs)
    for y, ref, before in zip(got, want, clean, strict=True):
        assert torch.equal(y.isnan(), ref.isnan())
        assert bool(ref[0, :, :3, :3].isnan().any())
        assert torch.equal(y[1], before[1])
        assert torch.equal(y[0, :, 3:], before[0, :, 3:])


def test_row1_an_empty_batch_launches_nothing(device):
    before = LAUNCHES.total()
    t, x = (torch.empty(0, c, 4, 4, device=device) for c in (16, 64))
    w2 = torch.randn(16, 16, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    w3, w1 = torch.randn(64, 16, device=device), torch.randn(32, 64, device=device)
    wide, narrow = shifted_block(t, w2, None, w3, None, x, w1)
    assert (wide.shape, narrow.shape, LAUNCHES.total()) == ((0, 64, 4, 4), (0, 32, 4, 4), before)


@pytest.mark.parametrize("batch", [32, 256])
@pytest.mark.parametrize(("target", "widths"), STAGES, ids=str)
def test_each_stage_has_a_row_or_is_not_offered(target, widths, batch):
    channels, reduced = widths
    machine = MACHINES[target]
    assert supports(channels, channels, 4 * channels, reduced)
    problem = _Problem(batch * 3136, channels, channels, 4 * channels, reduced, 2)
    if (target, widths) in NOT_OFFERED:
        with pytest.raises(RuntimeError, match="no tile of half for widths"):
            select_config(CONFIGS["half"], problem, "half", machine)
        return
    row = select_config(CONFIGS["half"], problem, "half", machine)
    assert fits(row, channels, channels, reduced, "half", machine)
    assert not fits(row, channels, channels, reduced, "half", Machine(132, 8 * 1024))


def images(c, size=4):
    return torch.randn(2, c, size, size).contiguous(memory_format=torch.channels_last)


GOOD = {
    "t": images(16),
    "w2": torch.randn(16, 16, 3, 3).contiguous(memory_format=torch.channels_last),
    "b2": None,
    "w3": torch.randn(64, 16),
    "b3": None,
    "x": images(64),
    "w1": torch.randn(32, 64),
    "b1": None,
}
BAD = {
    "t contiguous": ({"t": images(16).contiguous()}, ValueError, "t must be dense in channels_l"),
    "t odd width": ({"t": images(24)}, ValueError, r"w2 must have shape \(16, 24, 3, 3\)"),
    "w2 window": (
        {"w2": torch.randn(16, 16, 1, 1)},
        ValueError,
        r"w2 must have shape \(16, 16, 3, 3\)",
    ),
    "w3 width": ({"w3": torch.randn(64, 32)}, ValueError, r"w3 must have shape \(64, 16\)"),
    "w3 other dtype": ({"w3": torch.randn(64, 16).half()}, TypeError, "w3 must be torch.float32"),
    "w1 transposed": ({"w1": torch.randn(64, 32).T}, ValueError, "w1 must be contiguous"),
    "w1 odd width": ({"w1": torch.randn(48, 64)}, ValueError, "must be powers of two.*48"),
    "b1 without w1": ({"w1": None, "b1": torch.randn(32)}, ValueError, "b1 is given without w1"),
    "b2 short": ({"b2": torch.randn(15)}, ValueError, r"b2 must have shape \(16,\)"),
    "x of t's width": ({"x": images(16)}, ValueError, r"x must have shape \(2, 64, 4, 4\)"),
    "x at stride 1": ({"stride": 2}, ValueError, r"x must have shape \(2, 64, 2, 2\)"),
    "stride 3": ({"stride": 3}, ValueError, "stride must be 1 or 2, got 3"),
    "precision": ({"precision": "fp16"}, ValueError, "precision must be 'ieee' or 'tf32'"),
    "out short": ({"out": (images(64), None)}, ValueError, r"out\[1\] must be a Tensor with w1"),
    "out shape": (
        {"out": (images(64), images(16))},
        ValueError,
        r"out\[1\] must have shape \(2, 32, 4, 4\)",
    ),
    "out over t": (
        {"w1": torch.randn(16, 64), "out": (images(64), GOOD["t"])},
        ValueError,
        "out overlaps t",
    ),
    "tile too wide": ({"config": ShiftedConfig(16, 128, 16, 4, 2)}, ValueError, "config must div"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_name_themselves_and_launch_nothing(device, name):
    change, error, message = BAD[name]

    def here(value):
        if isinstance(value, tuple):
            return tuple(here(v) for v in value)
        return value.to(device) if isinstance(value, torch.Tensor) else value

    moved = {id(v): here(v) for v in (GOOD | change).values() if isinstance(v, torch.Tensor)}
    call = {k: moved.get(id(v), here(v)) for k, v in (GOOD | change).items()}
    if name == "out over t":
        call["out"] = (call["out"][0], call["t"])
    before = LAUNCHES.total()
    with pytest.raises(error, match=message):
        shifted_block(**call)
    assert LAUNCHES.total() == before


def test_a_gpu_too_small_is_refused(device, monkeypatch):
    monkeypatch.setattr(shifted_module, "machine_of", lambda device: Machine(1, 1024))
    with pytest.raises(RuntimeError, match="no tile of ieee for widths .* fits"):
        shifted_block(*(t.to(device) if t is not None else None for t in GOOD.values()))


@pytest.mark.parametrize("stride", [1, 2])
def test_row40_opcheck(stride):
    x = images(64) if stride == 1 else images(64, 2)
    arguments = [GOOD["t"], GOOD["w2"], torch.randn(16), GOOD["w3"], torch.randn(64), x]
    torch.library.opcheck(
        shifted_block_op, (*arguments, GOOD["w1"], torch.randn(32), stride, "ieee")
    )
    torch.library.opcheck(shifted_tail_op, (*arguments, stride, "ieee"))
