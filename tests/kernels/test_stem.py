"""The fused stem against float64, exact on integers."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import on, refused

pytest.importorskip("triton")

from fastres.kernels import LAUNCHES
from fastres.kernels import stem as stem_module
from fastres.kernels._gpu import HOPPER
from fastres.kernels.stem import (
    CONFIGS,
    StemConfig,
    _ProblemSize,
    pack_stem_weight,
    select_config,
    stem,
    stem_ref,
)

interpreter = pytest.mark.interpreter
HALF, BFLOAT, FLOAT, BYTE = torch.float16, torch.bfloat16, torch.float32, torch.uint8
SMALL = StemConfig(16, 3, 16, 64, 4, 1)


def images(integers, shape, dtype, planar, device="cpu"):
    """Whole numbers, of which bytes reach 255."""
    if dtype == BYTE:
        x = torch.randint(0, 256, shape, dtype=BYTE, device=device)
    else:
        x = integers(*shape, dtype=dtype)
    return x.contiguous() if planar else x.contiguous(memory_format=torch.channels_last)


def expected(x, w, b=None, **keywords):
    """The exact result rounded once to the dtype of the weights."""
    return stem_ref(x, w, b, upcast=True, **keywords).to(w.dtype)


@pytest.mark.sample(5)
@interpreter
@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT], ids=str)
@pytest.mark.parametrize("inputs", [HALF, BFLOAT, FLOAT, BYTE], ids=str)
@pytest.mark.parametrize("planar", [True, False], ids=["NCHW", "NHWC"])
def test_every_input_is_exact(integers, poisoned, device, planar, inputs, dtype):
    x = images(integers, (2, 3, 13, 18), inputs, planar, device)
    w, b = integers(9, 3, 7, 7, dtype=dtype), integers(9)
    want = expected(x, w, b)
    before = x.clone()
    guarded = poisoned(want.shape, dtype)
    launches = LAUNCHES["stem_kernel"]
    assert stem(x, w, b, out=guarded.out, config=SMALL) is guarded.out
    assert LAUNCHES["stem_kernel"] == launches + 1
    guarded.check()
    assert torch.equal(guarded.out, want)
    assert bool((want == 0).any())  # the ReLU has something to do
    assert torch.equal(x, before)


SIZES = [(1, 1), (1, 9), (2, 5), (7, 7), (8, 8), (5, 66), (15, 4), (17, 9)]


@pytest.mark.fault(3)
@interpreter
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("planar", [True, False], ids=["NCHW", "NHWC"])
def test_every_size_is_exact(integers, size, planar):
    channels = 1 + size[1] % 4
    x = images(integers, (1, channels, *size), FLOAT, planar)
    w, b = integers(5, channels, 7, 7, dtype=HALF), integers(5)
    assert torch.equal(stem(x, w, b, config=SMALL), expected(x, w, b))


ROWS = [(math_mode, row) for math_mode, rows in CONFIGS.items() for row in rows]


@pytest.mark.sample(4)
@pytest.mark.fault(19)
@interpreter
@pytest.mark.parametrize(("math_mode", "row"), ROWS, ids=str)
def test_every_config_is_exact(integers, poisoned, math_mode, row):
    planar = row.num_warps == 8
    dtype = HALF if math_mode == "half" else FLOAT
    # The second strip has one row; few columns where the tile is wide, else two tiles of them.
    size = 4 * row.rows + 1, 4 * row.columns + 3 if row.columns < 64 else 9
    x = images(integers, (1, 1, *size), dtype, planar)
    w, b = integers(row.block_n + 3, 1, 7, 7, dtype=dtype), integers(row.block_n + 3)
    want = expected(x, w, b)
    guarded = poisoned(want.shape, dtype)
    stem(x, w, b, out=guarded.out, config=row)
    guarded.check()
    assert torch.equal(guarded.out, want)


@interpreter
@pytest.mark.parametrize("bias", ["none", "float32", "same"])
@pytest.mark.parametrize("inputs", [HALF, BYTE], ids=str)
@pytest.mark.parametrize("planar", [True, False], ids=["NCHW", "NHWC"])
def test_normalisation_leaves_the_padding_zero(integers, device, planar, inputs, bias):
    x = images(integers, (1, 3, 9, 11), inputs, planar, device)
    w = integers(8, 3, 7, 7, dtype=HALF)
    b = None if bias == "none" else integers(8, dtype=HALF if bias == "same" else FLOAT)
    scale = torch.tensor([0.5, -1.0, 2.0], device=device)
    shift = torch.tensor([3.0, -5.0, 7.0], device=device)
    got = stem(x, w, b, scale=scale, shift=shift, config=SMALL)
    assert torch.equal(got, expected(x, w, b, scale=scale, shift=shift))


@interpreter
@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT], ids=str)
def test_floats_keep_the_rule_of_two(device, rule_of_two, dtype):
    x = torch.randn(1, 3, 11, 23, device=device)
    w, b = torch.randn(16, 3, 7, 7, device=device).to(dtype) / 12, torch.randn(16, device=device)
    scale, shift = torch.rand(3, device=device) + 0.5, torch.randn(3, device=device)
    keywords = {"scale": scale, "shift": shift}
    out = stem(x, w, b, config=SMALL, **keywords)
    rule_of_two(out, stem_ref(x, w, b, **keywords), stem_ref(x, w, b, upcast=True, **keywords))


@interpreter
def test_packed_weights_may_be_given(integers):
    x, w = images(integers, (1, 3, 9, 9), HALF, True), integers(11, 3, 7, 7, dtype=HALF)
    want = expected(x, w)
    assert torch.equal(stem(x, w, packed=pack_stem_weight(w, planar=True), config=SMALL), want)
    x = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(stem(x, w, packed=pack_stem_weight(w, planar=False), config=SMALL), want)
    with pytest.raises(ValueError, match=r"packed must have shape \(32, 256\), got \(8, 256\)"):
        stem(x, w, packed=pack_stem_weight(w, planar=True)[:8])


@pytest.mark.fault(6)
@interpreter
@pytest.mark.parametrize("planar", [True, False], ids=["NCHW", "NHWC"])
def test_the_int64_path_is_exact(monkeypatch, integers, planar):
    monkeypatch.setattr(stem_module, "needs_int64", lambda *_: True)
    x, w = images(integers, (3, 2, 6, 7), HALF, planar), integers(4, 2, 7, 7, dtype=HALF)
    assert torch.equal(stem(x, w, config=SMALL), expected(x, w))


@pytest.mark.fault(13)
@interpreter
def test_nan_is_never_lost_and_stays_near(device):
    """Zero weights of a wider window meet the NaN, so it may go one pooled column further."""
    x = torch.randn(2, 3, 15, 21, device=device)
    w = torch.randn(4, 3, 7, 7, device=device)
    clean = stem(x, w, config=SMALL)
    for place in ((0, 0), (14, 20), (7, 10)):
        dirty = x.clone()
        dirty[1, 1, place[0], place[1]] = math.nan
        y, seen = stem(dirty, w, config=SMALL), stem_ref(dirty, w).isnan()
        nearby = torch.nn.functional.max_pool2d(seen.float(), (1, 3), 1, (0, 1)).bool()
        assert 0 < int(nearby.sum()) < nearby.numel() // 2
        assert bool(y[seen].isnan().all())
        assert torch.equal(y[~nearby], clean[~nearby])


@pytest.mark.fault(9)
@interpreter
def test_storage_offsets_that_break_alignment(integers):
    x, w = images(integers, (1, 3, 16, 16), HALF, True), integers(4, 3, 7, 7, dtype=HALF)
    want = expected(x, w)
    for offset in (0, 1, 0, 3):
        flat = torch.empty(x.numel() + offset, dtype=x.dtype, device=x.device)
        shifted = flat[offset:].view(x.shape).copy_(x)
        assert torch.equal(stem(shifted, w, config=SMALL), want)


@pytest.mark.fault(1)
def test_an_empty_batch_launches_nothing(device):
    before = LAUNCHES.total()
    y = stem(torch.empty(0, 3, 9, 8, device=device), torch.randn(4, 3, 7, 7, device=device).half())
    assert (y.shape, y.dtype, LAUNCHES.total()) == ((0, 4, 3, 2), HALF, before)


X, W = torch.randn(1, 3, 9, 9), torch.randn(8, 3, 7, 7)
BAD = {
    "x no tensor": ({"x": 3}, TypeError, "x must be a Tensor, got int"),
    "x of rank 3": ({"x": X[0]}, ValueError, "x must have 4 dimensions"),
    "bytes of rank 3": ({"x": X[0].byte()}, ValueError, "x must have 4 dimensions"),
    "x integer": ({"x": X.int()}, TypeError, "x must be float32.*int32"),
    "x strided": ({"x": X[..., ::2]}, ValueError, "x must be dense"),
    "x without pixels": ({"x": X[..., :0]}, ValueError, "x of 9x0 has no pixels"),
    "w other channels": ({"w": W[:, :2]}, ValueError, r"w must have shape \(8, 3, 7, 7\)"),
    "w 3x3": ({"w": W[..., :3, :3]}, ValueError, r"w must have shape \(8, 3, 7, 7\)"),
    "w bytes": ({"w": W.byte()}, TypeError, "w must be float32"),
    "b short": ({"b": torch.randn(7)}, ValueError, r"b must have shape \(8,\)"),
    "scale alone": (
        {"scale": torch.randn(3)},
        ValueError,
        "scale and shift must be given together",
    ),
    "shift long": (
        {"scale": torch.randn(3), "shift": torch.randn(4)},
        ValueError,
        r"shift must have shape \(3,\)",
    ),
    "precision": ({"precision": "fast"}, ValueError, "precision must be 'ieee' or 'tf32'"),
    "out dtype": ({"out": torch.empty(1, 8, 3, 3).half()}, TypeError, "out must be torch.float32"),
    "out NHWC": (
        {"out": torch.empty(3, 3, 2, 8).permute(2, 3, 0, 1), "x": X.repeat(2, 1, 1, 1)},
        ValueError,
        "out must be dense in channels_last order",
    ),
    "out over w": ({"out": W.view(-1)[:72].view(1, 8, 3, 3)}, ValueError, "out"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_name_themselves_and_launch_nothing(device, name):
    change, error, message = BAD[name]
    call = on(device, {"x": X, "w": W} | change)
    with refused(error, message):
        stem(call.pop("x"), call.pop("w"), call.pop("b", None), **call)


def test_small_batches_take_small_strips():
    large = select_config(_ProblemSize(256, 64, 56, 56), "half", HOPPER)
    single = select_config(_ProblemSize(1, 64, 56, 56), "half", HOPPER)
    assert large.columns > 56 > single.columns
    assert single.rows < large.rows
