"""Expansion, residual sum and next reduction in one kernel, against float64, exact on integers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import on, refused

pytest.importorskip("triton")

from fastres.kernels import LAUNCHES
from fastres.kernels import _tma as tma_module
from fastres.kernels import b2b_gemm as b2b_gemm_module
from fastres.kernels._gpu import HOPPER, Gpu
from fastres.kernels.b2b_gemm import (
    CONFIGS,
    B2bGemmConfig,
    b2b_gemm,
    b2b_gemm_ref,
    fits,
    select_config,
    supports,
)
from fastres.kernels.gemm import rows_of

interpreter = pytest.mark.interpreter
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
SMALL = B2bGemmConfig(16, 32, 4, 2)
STAGES = [(64, 256, 64), (64, 256, 128), (128, 512, 128), (128, 512, 256), (256, 1024, 256)]


@pytest.fixture(autouse=True)
def _needs_tma(request, device):
    if request.node.get_closest_marker("interpreter") and not tma_module.has_tma(device):
        pytest.skip("no TMA before compute capability 9.0")


@pytest.fixture
def operands(integers):
    """``operands(M, C, E, R, dtype)``: t, w3, b3, x, w1, b1 of small whole numbers.

    Of each row of w1 two elements count, so that in float16 no sum overflows.
    """

    def make(rows, channels, expanded, reduced, dtype):
        w1 = torch.zeros(reduced, expanded, dtype=dtype, device=integers(1).device)
        i = torch.arange(reduced)
        w1[i, (7 * i) % expanded] = 1.0
        w1[i, (11 * i + 5) % expanded] -= 2.0
        return (
            integers(rows, channels, dtype=dtype),
            integers(expanded, channels, dtype=dtype),
            integers(expanded),
            16 * integers(rows, expanded, dtype=dtype),
            w1,
            integers(reduced, dtype=dtype),
        )

    return make


def expected(*inputs):
    """The exact results, each rounded once."""
    return tuple(y.to(inputs[0].dtype) for y in b2b_gemm_ref(*inputs, upcast=True))


@interpreter
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 16, 64, 16), (16, 32, 64, 16), (37, 16, 128, 32), (50, 64, 64, 128)], ids=str
)
@pytest.mark.parametrize("config", [None, SMALL], ids=["selected", "small"])
def test_every_shape_is_exact(operands, poisoned, shape, dtype, config):
    inputs = operands(*shape, dtype)
    before = [t.clone() for t in inputs]
    wide, narrow = poisoned(inputs[3].shape, dtype), poisoned((shape[0], shape[3]), dtype)
    launches = LAUNCHES["b2b_gemm_kernel"]
    b2b_gemm(*inputs, out=(wide.out, narrow.out), config=config)
    assert LAUNCHES["b2b_gemm_kernel"] == launches + 1
    wide.check()
    narrow.check()
    for got, want in zip((wide.out, narrow.out), expected(*inputs), strict=True):
        assert torch.equal(got, want)
        assert bool((want == 0).any())  # the ReLU has something to do
        assert bool((want > 0).any())
    assert all(torch.equal(t, copy) for t, copy in zip(inputs, before, strict=True))


@pytest.mark.fault(10)
@interpreter
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
def test_the_residual_may_be_overwritten(operands, poisoned, dtype):
    t, w3, b3, x, w1, b1 = operands(37, 16, 128, 32, dtype)
    want = expected(t, w3, b3, x, w1, b1)
    wide = poisoned(x.shape, dtype, fill=x)
    x_next, t_next = b2b_gemm(
        t, w3, b3, wide.out, w1, b1, out=(wide.out, x.new_empty(37, 32)), config=SMALL
    )
    wide.check()
    assert x_next is wide.out
    assert torch.equal(x_next, want[0])
    assert torch.equal(t_next, want[1])


@pytest.mark.fault(19)
@interpreter
@pytest.mark.parametrize("row", CONFIGS, ids=str)
@pytest.mark.parametrize("widths", [(64, 128, 64), (16, 64, 128)], ids=str)
def test_every_config_is_exact(operands, poisoned, row, widths):
    rows = row.block_m + 3
    inputs = operands(rows, *widths, HALF)
    wide, narrow = poisoned((rows, widths[1]), HALF), poisoned((rows, widths[2]), HALF)
    b2b_gemm(*inputs, out=(wide.out, narrow.out), config=row)
    wide.check()
    narrow.check()
    want = expected(*inputs)
    assert torch.equal(wide.out, want[0])
    assert torch.equal(narrow.out, want[1])


@interpreter
def test_biases_may_be_absent(operands):
    t, w3, _, x, w1, _ = operands(5, 16, 64, 16, HALF)
    got, want = b2b_gemm(t, w3, None, x, w1, None), expected(t, w3, None, x, w1, None)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@interpreter
def test_it_is_the_seam_of_two_blocks(integers):
    """Against torch's convolutions of images, on integers."""
    t, x = integers(2, 16, 3, 4), integers(2, 64, 3, 4)
    w3, w1 = integers(64, 16, 1, 1), integers(16, 64, 1, 1)
    wide = (F.conv2d(t, w3) + x).relu()
    want = F.conv2d(wide, w1).relu()
    inputs = [v.half() for v in (rows_of(t), w3.flatten(1), rows_of(x), w1.flatten(1))]
    got = b2b_gemm(inputs[0], inputs[1], None, inputs[2], inputs[3], None, config=SMALL)
    assert torch.equal(got[0], rows_of(wide).half())
    assert torch.equal(got[1], rows_of(want).half())


@interpreter
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
def test_floats_keep_the_rule_of_two(device, rule_of_two, dtype):
    def normal(*shape, scale=1.0):
        return (torch.randn(shape, device=device) * scale).to(dtype)

    t, x = normal(40, 32), normal(40, 128)
    w3, w1 = normal(128, 32, scale=0.2), normal(64, 128, scale=0.1)
    b3, b1 = torch.randn(128, device=device), torch.randn(64, device=device)
    inputs = (t, w3, b3, x, w1, b1)
    got, pt = b2b_gemm(*inputs, config=SMALL), b2b_gemm_ref(*inputs)
    for out, same, ref in zip(got, pt, b2b_gemm_ref(*inputs, upcast=True), strict=True):
        rule_of_two(out, same, ref)


@pytest.mark.fault(12)
@interpreter
def test_nan_passes_both_relus_and_stays_in_its_row(operands):
    inputs = operands(20, 16, 64, 16, HALF)
    clean = b2b_gemm(*inputs, config=SMALL)
    inputs[3][3, 5] = math.nan
    got, want = b2b_gemm(*inputs, config=SMALL), b2b_gemm_ref(*inputs)
    for y, ref, before in zip(got, want, clean, strict=True):
        assert torch.equal(y.isnan(), ref.isnan())
        assert bool(ref[3].isnan().any())
        others = torch.arange(20, device=y.device) != 3
        assert torch.equal(y[others], before[others])


@pytest.mark.fault(1)
def test_no_rows_launch_nothing(device):
    before = LAUNCHES.total()
    w3, w1 = torch.randn(64, 16, device=device).half(), torch.randn(32, 64, device=device).half()
    t, x = torch.empty(0, 16, device=device).half(), torch.empty(0, 64, device=device).half()
    x_next, t_next = b2b_gemm(t, w3, None, x, w1, None)
    assert (x_next.shape, t_next.shape, LAUNCHES.total()) == ((0, 64), (0, 32), before)


@pytest.mark.parametrize("stage", STAGES, ids=str)
@pytest.mark.parametrize("batch", [32, 256])
def test_each_stage_of_a_resnet_has_a_row(stage, batch):
    channels, expanded, reduced = stage
    pixels = batch * (3584 // channels) ** 2
    assert supports(channels, expanded, reduced, HALF)
    row = select_config(CONFIGS, pixels, channels, expanded, reduced, HOPPER)
    assert fits(row, channels, reduced, HOPPER)
    assert not fits(row, channels, reduced, Gpu(HOPPER.sms, 48 * 1024))


T, W3, X, W1 = (torch.randn(s).half() for s in ((4, 16), (64, 16), (4, 64), (32, 64)))
BAD = {
    "t of rank 3": ({"t": T[None]}, ValueError, "t must have 2 dimensions"),
    "t single": (
        {"t": T.float(), "w3": W3.float(), "x": X.float(), "w1": W1.float()},
        TypeError,
        "t must be float16 or bfloat16",
    ),
    "w3 other dtype": ({"w3": W3.bfloat16()}, TypeError, "w3 must be torch.float16"),
    "w3 other width": ({"w3": torch.randn(64, 32).half()}, ValueError, "w3 must have shape"),
    "x rows": ({"x": torch.randn(5, 64).half()}, ValueError, r"x must have shape \(4, 64\)"),
    "w1 columns": (
        {"w1": torch.randn(32, 32).half()},
        ValueError,
        r"w1 must have shape \(32, 64\)",
    ),
    "w1 odd width": ({"w1": torch.randn(48, 64).half()}, ValueError, "must be powers of two.*48"),
    "b3 short": ({"b3": torch.randn(63)}, ValueError, r"b3 must have shape \(64,\)"),
    "out shape": (
        {"out": (X.clone(), X.clone())},
        ValueError,
        r"out\[1\] must have shape \(4, 32\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_name_themselves_and_launch_nothing(device, name):
    change, error, message = BAD[name]
    good = {"t": T, "w3": W3, "b3": None, "x": X, "w1": W1, "b1": None}
    call = on(device, good | change)
    with refused(error, message):
        b2b_gemm(**call)


@pytest.mark.fault(10)
@pytest.mark.parametrize("second", [False, True])
def test_other_overlaps_are_refused(device, second):
    flat = torch.zeros(4 * 64 + 64, device=device).half()
    x = flat[:256].view(4, 64)
    w3, w1, t = W3.to(device), W1.to(device), T.to(device)
    shifted = flat[64:].view(4, 64)
    out = (torch.empty_like(x), x.view(-1)[:128].view(4, 32)) if second else (shifted, t)
    with pytest.raises(ValueError, match="out overlaps x" if second else r"out\[1\] must have"):
        b2b_gemm(t, w3, None, x, w1, None, out=out)
    if not second:
        with pytest.raises(ValueError, match="out overlaps x"):
            b2b_gemm(t, w3, None, x, w1, None, out=(shifted, torch.empty_like(t).repeat(1, 2)))


def test_a_gpu_too_small_is_refused(device, monkeypatch):
    monkeypatch.setattr(b2b_gemm_module, "gpu_of", lambda device: Gpu(1, 1024))
    with pytest.raises(RuntimeError, match="no tile fits 1024 bytes"):
        b2b_gemm(*(t.to(device) if t is not None else None for t in (T, W3, None, X, W1, None)))
