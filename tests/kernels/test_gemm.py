"""Products by TMA, alone and in pairs, against float64, exact on integers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import on, refused

pytest.importorskip("triton")

from fastres.kernels import LAUNCHES
from fastres.kernels import _tma as tma_module
from fastres.kernels import gemm as gemm_module
from fastres.kernels.gemm import (
    CONFIGS,
    GemmConfig,
    dual_gemm,
    dual_gemm_ref,
    gemm,
    gemm_ref,
    rows_of,
    supports,
)

interpreter = pytest.mark.interpreter
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
DTYPES = (FLOAT, HALF, BFLOAT)
SMALL = GemmConfig(16, 16, 16, 4, 2)


@pytest.fixture(autouse=True)
def _needs_tma(request, device):
    if request.node.get_closest_marker("interpreter") and not tma_module.has_tma(device):
        pytest.skip("no TMA before compute capability 9.0")


@pytest.mark.sample(5)
@interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 8), (16, 16, 16), (37, 40, 24), (50, 8, 72)], ids=str)
@pytest.mark.parametrize("config", [None, SMALL], ids=["selected", "small"])
def test_every_shape_is_exact(integers, poisoned, shape, dtype, config):
    rows, channels, outputs = shape
    x, w = integers(rows, channels, dtype=dtype), integers(outputs, channels, dtype=dtype)
    guarded = poisoned((rows, outputs), dtype)
    launches = LAUNCHES["gemm_kernel"]
    assert gemm(x, w, out=guarded.out, config=config) is guarded.out
    assert LAUNCHES["gemm_kernel"] == launches + 1
    guarded.check()
    assert torch.equal(guarded.out, gemm_ref(x, w, upcast=True).to(dtype))


@pytest.mark.sample(5)
@interpreter
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("bias", ["none", "float32", "same"])
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
def test_every_epilogue_is_exact(integers, poisoned, dtype, bias, with_residual, relu):
    x, w = integers(21, 24, dtype=dtype), integers(40, 24, dtype=dtype)
    b = None if bias == "none" else integers(40, dtype=dtype if bias == "same" else FLOAT)
    residual = 16 * integers(21, 40, dtype=dtype) if with_residual else None
    inputs = [t for t in (x, w, b, residual) if t is not None]
    before = [t.clone() for t in inputs]
    guarded = poisoned((21, 40), dtype)
    gemm(x, w, b, residual=residual, relu=relu, out=guarded.out, config=SMALL)
    guarded.check()
    want = gemm_ref(x, w, b, residual=residual, relu=relu, upcast=True).to(dtype)
    assert torch.equal(guarded.out, want)
    assert bool((want < 0).any()) != relu  # the ReLU has something to do
    assert all(torch.equal(t, copy) for t, copy in zip(inputs, before, strict=True))


ROWS = [(math_mode, row) for math_mode, rows in CONFIGS.items() for row in rows]


@pytest.mark.sample(4)
@pytest.mark.fault(19)
@interpreter
@pytest.mark.parametrize(("math_mode", "row"), ROWS, ids=str)
def test_every_config_is_exact(integers, poisoned, math_mode, row):
    dtype, precision = (HALF, "ieee") if math_mode == "half" else (FLOAT, math_mode)
    rows, channels, outputs = row.block_m + 5, row.block_k + 8, row.block_n + 8
    x, w = integers(rows, channels, dtype=dtype), integers(outputs, channels, dtype=dtype)
    # Each column has its own bias, so that no part of the tile can land in another's.
    b = torch.arange(outputs, device=x.device, dtype=FLOAT)
    guarded = poisoned((rows, outputs), dtype, fill=integers(rows, outputs, dtype=dtype))
    want = gemm_ref(x, w, b, residual=guarded.out, relu=True, upcast=True).to(dtype)
    gemm(
        x,
        w,
        b,
        residual=guarded.out,
        relu=True,
        precision=precision,
        out=guarded.out,
        config=row,
    )
    guarded.check()
    assert torch.equal(guarded.out, want)
    if not row.persistent:
        want = dual_gemm_ref(x, w, x, w, b, upcast=True).to(dtype)
        got = dual_gemm(x, w, x, w, b, precision=precision, config=row)
        assert torch.equal(got, want)


IMAGES = [(2, 5, 7, 1), (1, 4, 6, 3), (3, 1, 1, 1), (1, 9, 2, 2)]


@pytest.mark.sample(5)
@interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("images", IMAGES, ids=str)
def test_pairs_are_exact(integers, poisoned, images, stride, dtype):
    outer, height, width, inner = images
    rows = outer * math.ceil(height / stride) * math.ceil(width / stride) * inner
    x, w = integers(rows, 24, dtype=dtype), integers(40, 24, dtype=dtype)
    x2 = integers(outer * height * width * inner, 40, dtype=dtype)
    w2, b = integers(40, 40, dtype=dtype), integers(40)
    keywords = {"images": images, "stride": stride, "relu": True}
    want = dual_gemm_ref(x, w, x2, w2, b, upcast=True, **keywords).to(dtype)
    guarded = poisoned((rows, 40), dtype)
    dual_gemm(x, w, x2, w2, b, out=guarded.out, config=SMALL, **keywords)
    guarded.check()
    assert torch.equal(guarded.out, want)


@interpreter
@pytest.mark.parametrize("stride", [1, 2])
def test_a_pair_is_a_blocks_expansion_and_projection(device, stride):
    """Against torch's convolutions of images, on integers."""
    x = torch.randint(-3, 4, (2, 16, 8, 6), device=device).float()
    x = x.contiguous(memory_format=torch.channels_last)
    t = torch.randint(-3, 4, (2, 8, 8 // stride, 6 // stride), device=device).float()
    t = t.contiguous(memory_format=torch.channels_last)
    w, w2 = torch.randn(24, 8, device=device).round(), torch.randn(24, 16, device=device).round()
    want = F.conv2d(t, w[:, :, None, None]) + F.conv2d(x, w2[:, :, None, None], stride=stride)
    got = dual_gemm(rows_of(t), w, rows_of(x), w2, images=(2, 8, 6, 1), stride=stride)
    assert torch.equal(got, rows_of(want))


@pytest.mark.fault(6)
@interpreter
def test_the_int64_path_is_exact(monkeypatch, integers):
    monkeypatch.setattr(gemm_module, "needs_int64", lambda *_: True)
    x, w, x2 = integers(12, 8), integers(8, 8), integers(40, 8)
    keywords = {"images": (2, 4, 5, 1), "stride": 2}
    got = dual_gemm(x, w, x2, w, config=SMALL, **keywords)
    assert torch.equal(got, dual_gemm_ref(x, w, x2, w, **keywords))


@interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_floats_keep_the_rule_of_two(device, rule_of_two, dtype):
    x, w = torch.randn(30, 72, device=device), torch.randn(40, 72, device=device) / 8
    x, w, b = x.to(dtype), w.to(dtype), torch.randn(40, device=device)
    residual = torch.randn(30, 40, device=device).to(dtype)
    keywords = {"residual": residual, "relu": True}
    ref = gemm_ref(x, w, b, upcast=True, **keywords)
    rule_of_two(gemm(x, w, b, config=SMALL, **keywords), gemm_ref(x, w, b, **keywords), ref)
    ref = dual_gemm_ref(x, w, x, w, b, upcast=True)
    rule_of_two(dual_gemm(x, w, x, w, b, config=SMALL), dual_gemm_ref(x, w, x, w, b), ref)


@pytest.mark.fault(12)
@interpreter
def test_nan_and_negative_zero_pass_the_relu(device):
    x = torch.tensor([math.nan, -2.0, 3.0, -0.0], device=device).view(4, 1) * torch.eye(
        1, 8, device=device
    )
    w = torch.eye(8, device=device)
    want = gemm_ref(x, w, relu=True)
    got = gemm(x, w, relu=True, config=SMALL)
    assert torch.equal(got.isnan(), want.isnan())
    assert int(got.isnan().sum()) == 8
    assert torch.equal(got.nan_to_num(9.0), want.nan_to_num(9.0))


@interpreter
def test_the_tail_of_the_second_product_is_masked(device):
    """0 * NaN is NaN: what the last step reads past the channels must not count."""
    x, x2 = torch.ones(1, 8, device=device), torch.ones(4, 24, device=device)
    x2[1:] = math.nan
    w, w2 = torch.ones(8, 8, device=device), torch.ones(8, 24, device=device)
    got = dual_gemm(x, w, x2, w2, images=(1, 2, 2, 1), stride=2, config=SMALL)
    assert got.tolist() == [[32.0] * 8]


@pytest.mark.fault(18)
@interpreter
def test_the_same_bits_each_time_and_for_each_row(numbers):
    x, w = numbers(40, 24), numbers(16, 24)
    whole = gemm(x, w, config=SMALL)
    assert torch.equal(gemm(x, w, config=SMALL), whole)
    assert torch.equal(gemm(x[3:8], w, config=SMALL), whole[3:8])


@pytest.mark.fault(1)
def test_no_rows_launch_nothing(device):
    before = LAUNCHES.total()
    x, w = torch.empty(0, 8, device=device).half(), torch.randn(16, 8, device=device).half()
    assert gemm(x, w).shape == dual_gemm(x, w, x, w).shape == (0, 16)
    assert LAUNCHES.total() == before


def odd_start() -> torch.Tensor:
    return torch.randn(4 * 8 + 1)[1:].view(4, 8)


X, W, Y = torch.randn(4, 8), torch.randn(12, 8), torch.randn(4, 12)
BAD = {
    "x of rank 4": ({"x": X[None, None]}, ValueError, "x must have 2 dimensions"),
    "x strided": ({"x": torch.randn(4, 16)[:, ::2]}, ValueError, "x must be contiguous"),
    "x ragged": ({"x": X[:, :6].clone()}, ValueError, "x must have rows of a multiple of 16 bytes"),
    "x starts oddly": ({"x": odd_start()}, ValueError, "x must start on 16 bytes.*offset is 1"),
    "w other channels": ({"w": torch.randn(12, 4)}, ValueError, r"w must have shape \(12, 8\)"),
    "w ragged": ({"w": torch.randn(7, 8)}, ValueError, "w must make rows of .* got 7 outputs"),
    "w half": ({"w": W.half()}, TypeError, "w must be torch.float32"),
    "b short": ({"b": torch.randn(11)}, ValueError, r"b must have shape \(12,\)"),
    "residual shape": ({"residual": X}, ValueError, r"residual must have shape \(4, 12\)"),
    "precision": ({"precision": "fast"}, ValueError, "precision must be"),
    "out shape": ({"out": X.clone()}, ValueError, r"out must have shape \(4, 12\)"),
    "out over w": ({"out": W.view(-1)[:48].view(4, 12)}, ValueError, "out overlaps w"),
    "wants a gradient": ({"x": X.clone().requires_grad_()}, RuntimeError, "x requires a gradient"),
    "x2 rows": ({"x2": torch.randn(5, 8)}, ValueError, "images of .* and stride 1 want 5"),
    "w2 outputs": ({"w2": torch.randn(8, 8)}, ValueError, r"w2 must have shape \(12, 8\)"),
    "stride 0": ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    "stride alone": ({"stride": 2}, ValueError, "a stride above 1 needs images"),
    "three sizes": ({"images": (1, 2, 2)}, ValueError, "images must be .outer, height"),
    "other sizes": ({"images": (1, 2, 3, 1)}, ValueError, "x2 has 4 rows, images of"),
    "persistent pair": (
        {"config": GemmConfig(16, 16, 16, 4, 2, persistent=True)},
        ValueError,
        "config must not be persistent",
    ),
}
PAIR_ONLY = {"x2 rows", "w2 outputs", "stride 0", "stride alone", "three sizes", "other sizes"}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_name_themselves_and_launch_nothing(device, name):
    change, error, message = BAD[name]
    pair = name in PAIR_ONLY or name == "persistent pair"
    good = {"x": X, "w": W} | ({"x2": X, "w2": W} if pair else {})
    call = on(device, good | change)
    if name == "x starts oddly" and device.type == "cuda":
        call["x"] = torch.randn(33, device=device)[1:].view(4, 8)
    with refused(error, message):
        (dual_gemm if pair else gemm)(**call)


def test_without_tma_it_refuses(monkeypatch, device):
    monkeypatch.setattr(tma_module, "has_tma", lambda device: False)
    with pytest.raises(RuntimeError, match="needs a GPU of compute capability 9.0"):
        gemm(X.to(device), W.to(device))


def test_supports_says_beforehand_what_the_checks_refuse():
    assert supports(64, 256, HALF)
    assert supports(8, 8, BFLOAT)
    assert supports(4, 4, FLOAT)
    assert not supports(4, 8, HALF)
    assert not supports(8, 1001, HALF)
