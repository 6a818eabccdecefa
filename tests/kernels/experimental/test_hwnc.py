"""Convolution in the layout [H, W, N, C] against float64, exact on integers."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import on, refused

pytest.importorskip("triton")

from fastres.kernels import LAUNCHES, conv2d
from fastres.kernels import _tma as tma_module
from fastres.kernels.experimental import hwnc as module
from fastres.kernels.experimental.hwnc import (
    CONFIGS,
    conv2d_hwnc,
    conv2d_hwnc_ref,
    from_hwnc,
    supports,
    to_hwnc,
)
from fastres.kernels.gemm import GemmConfig

interpreter = pytest.mark.interpreter
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
DTYPES = (FLOAT, HALF, BFLOAT)
SMALL = GemmConfig(16, 16, 16, 4, 2)

# (H, W, N, C), (K, R, S), stride, padding. A batch of 16 or 32 gives each tile one pixel; others
# put several pixels into a tile, which strides above 1 gather.
SHAPES = {
    "pixel 3x3": ((4, 3, 16, 32), (24, 3, 3), 1, 1),
    "pixel 3x3/2": ((5, 4, 32, 16), (16, 3, 3), 2, 1),
    "pixel 1x1/2": ((3, 5, 16, 16), (40, 1, 1), 2, 0),
    "pixel 5x2": ((6, 4, 16, 16), (8, 5, 2), 1, 1),
    "row 3x3": ((4, 5, 5, 32), (24, 3, 3), 1, 1),
    "row 1x1": ((3, 5, 3, 16), (24, 1, 1), 1, 0),
    "row, wide padding": ((2, 2, 3, 16), (8, 4, 4), 1, 3),
    "gathered 3x3/2": ((5, 6, 7, 32), (16, 3, 3), 2, 1),
    "gathered 1x1/3": ((4, 7, 3, 16), (8, 1, 1), 3, 0),
    "one image": ((4, 5, 1, 16), (8, 3, 3), 1, 1),
    "one pixel": ((1, 1, 2, 16), (8, 3, 3), 1, 1),
}


@pytest.fixture(autouse=True)
def _needs_tma(request, device):
    if request.node.get_closest_marker("interpreter") and not tma_module.has_tma(device):
        pytest.skip("no TMA before compute capability 9.0")


def operands(integers, shape, dtype):
    size, (k, r, s), stride, padding = shape
    x = to_hwnc(integers(size[2], size[3], size[0], size[1], dtype=dtype))
    w = integers(k, size[3], r, s, dtype=dtype)
    return x, w, {"stride": stride, "padding": padding}


def expected(x, w, b=None, **keywords):
    """The exact result rounded once to x's dtype."""
    return conv2d_hwnc_ref(x, w, b, upcast=True, **keywords).to(x.dtype)


@pytest.mark.sample(5)
@interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_exact(integers, poisoned, name, dtype):
    x, w, geometry = operands(integers, SHAPES[name], dtype)
    want = expected(x, w, **geometry)
    guarded = poisoned((want.numel(),), dtype)
    out = guarded.out.view(want.shape)
    before = x.clone(), w.clone()
    launches = LAUNCHES["conv2d_hwnc_kernel"]
    assert conv2d_hwnc(x, w, out=out, config=SMALL, **geometry) is out
    assert LAUNCHES["conv2d_hwnc_kernel"] == launches + 1
    guarded.check()
    assert torch.equal(out, want)
    assert torch.equal(x, before[0])
    assert torch.equal(w, before[1])


@pytest.mark.sample(5)
@interpreter
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", ["none", "float32", "same"])
@pytest.mark.parametrize("name", ["pixel 3x3", "row 3x3", "gathered 3x3/2"])
def test_every_epilogue_is_exact_also_in_place(integers, poisoned, name, bias, relu):
    x, w, geometry = operands(integers, SHAPES[name], HALF)
    k = w.shape[0]
    b = None if bias == "none" else integers(k, dtype=HALF if bias == "same" else FLOAT)
    shape = expected(x, w, **geometry).shape
    residual = 16 * integers(math.prod(shape), dtype=HALF)
    want = expected(x, w, b, residual=residual.view(shape), relu=relu, **geometry)
    guarded = poisoned(residual.shape, HALF, fill=residual)
    out = guarded.out.view(shape)
    conv2d_hwnc(x, w, b, residual=out, relu=relu, out=out, config=SMALL, **geometry)
    guarded.check()
    assert torch.equal(out, want)
    assert bool((want < 0).any()) != relu  # the ReLU has something to do


ROWS = [(math_mode, row) for math_mode, rows in CONFIGS.items() for row in rows]


@pytest.mark.sample(5)
@pytest.mark.fault(19)
@interpreter
@pytest.mark.parametrize(("math_mode", "row"), ROWS, ids=str)
@pytest.mark.parametrize("path", ["pixel", "row", "gathered"])
def test_every_config_is_exact(integers, path, math_mode, row):
    dtype, precision = (HALF, "ieee") if math_mode == "half" else (FLOAT, math_mode)
    batch = row.block_m if path == "pixel" else row.block_m // 2 + 3
    shape = ((1, 2, batch, row.block_k), (row.block_n + 8, 3, 2), 1 + (path == "gathered"), 1)
    x, w, geometry = operands(integers, shape, dtype)
    # Each channel has its own bias, so that no part of the tile can land in another's.
    b = torch.arange(w.shape[0], device=x.device, dtype=FLOAT)
    got = conv2d_hwnc(x, w, b, relu=True, precision=precision, config=row, **geometry)
    assert torch.equal(got, expected(x, w, b, relu=True, **geometry))


@interpreter
@pytest.mark.parametrize("name", ["pixel 3x3/2", "row 3x3", "gathered 3x3/2"])
def test_it_agrees_with_the_convolution_of_nhwc_images(integers, name):
    x, w, geometry = operands(integers, SHAPES[name], HALF)
    want = conv2d(from_hwnc(x), w, **geometry)
    assert torch.equal(from_hwnc(conv2d_hwnc(x, w, config=SMALL, **geometry)), want)


@pytest.mark.fault(6)
@interpreter
@pytest.mark.parametrize("name", ["pixel 3x3", "row 3x3", "gathered 3x3/2"])
def test_the_int64_path_is_exact(monkeypatch, integers, name):
    monkeypatch.setattr(module, "needs_int64", lambda *_: True)
    x, w, geometry = operands(integers, SHAPES[name], FLOAT)
    got = conv2d_hwnc(x, w, config=SMALL, **geometry)
    assert torch.equal(got, expected(x, w, **geometry))


@interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["pixel 3x3", "row 3x3", "gathered 3x3/2"])
def test_floats_keep_the_rule_of_two(device, rule_of_two, name, dtype):
    size, (k, r, s), stride, padding = SHAPES[name]
    x = torch.randn(size, device=device).to(dtype)
    w = torch.randn(k, size[3], r, s, device=device) / 9
    w, b = w.to(dtype, memory_format=torch.channels_last), torch.randn(k, device=device)
    geometry = {"stride": stride, "padding": padding, "relu": True}
    rule_of_two(
        conv2d_hwnc(x, w, b, config=SMALL, **geometry),
        conv2d_hwnc_ref(x, w, b, **geometry),
        conv2d_hwnc_ref(x, w, b, upcast=True, **geometry),
    )


@pytest.mark.fault(14)
@interpreter
@pytest.mark.parametrize("name", ["pixel 3x3", "row 3x3", "gathered 3x3/2"])
def test_nan_stays_in_its_image(integers, name):
    x, w, geometry = operands(integers, SHAPES[name], FLOAT)
    clean = conv2d_hwnc(x, w, config=SMALL, **geometry)
    x[:, :, 1] = math.nan
    y = conv2d_hwnc(x, w, config=SMALL, **geometry)
    assert bool(y[:, :, 1].isnan().all())
    others = torch.arange(x.shape[2], device=x.device) != 1
    assert torch.equal(y[:, :, others], clean[:, :, others])


def test_layouts_convert_back_and_forth():
    x = torch.randn(2, 3, 4, 5)
    h = to_hwnc(x)
    assert h.is_contiguous()
    assert torch.equal(h[1, 2], x[:, :, 1, 2])
    back = from_hwnc(h)
    assert torch.equal(back, x)
    assert back.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.fault(1)
def test_an_empty_batch_launches_nothing(device):
    before = LAUNCHES.total()
    w = torch.randn(8, 16, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    y = conv2d_hwnc(torch.empty(4, 5, 0, 16, device=device), w, stride=2, padding=1)
    assert (y.shape, LAUNCHES.total()) == ((2, 3, 0, 8), before)


X = torch.randn(3, 3, 2, 16)
W = torch.randn(8, 16, 3, 3).contiguous(memory_format=torch.channels_last)
BAD = {
    "x of rank 3": ({"x": X[0]}, ValueError, "x must have 4 dimensions"),
    "x permuted": ({"x": X.transpose(0, 2)}, ValueError, r"x must be contiguous \(H, W, N, C\)"),
    "x other channels": ({"x": X[..., :8].clone()}, ValueError, "wants 16 input channels"),
    "x ragged": (
        {"x": X[..., :6].clone(), "w": W[:, :6].contiguous(memory_format=torch.channels_last)},
        ValueError,
        "x must have or make rows of a multiple of 16 bytes, got 6",
    ),
    "w NCHW": ({"w": W.contiguous()}, ValueError, "w must be dense in channels_last"),
    "w makes ragged rows": ({"w": W[:7]}, ValueError, "w must have or make rows .* got 7"),
    "b short": ({"b": torch.randn(7)}, ValueError, r"b must have shape \(8,\)"),
    "stride 0": ({"stride": 0}, ValueError, "stride must be at least 1"),
    "padding wide": ({"padding": 3}, ValueError, "padding must be less than the window, got 3"),
    "x small": ({"x": X[:2].clone()}, ValueError, "x of 2x3 with padding 0 is smaller"),
    "residual": ({"residual": X}, ValueError, r"residual must have shape \(1, 1, 2, 8\)"),
    "out over x": ({"out": X.view(-1)[:16].view(1, 1, 2, 8)}, ValueError, "out overlaps x"),
    "precision": ({"precision": "fast"}, ValueError, "precision must be"),
    "config": (
        {"config": GemmConfig(16, 16, 32, 4, 2)},
        ValueError,
        "config must not be persistent and divide 16 channels",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_name_themselves_and_launch_nothing(device, name):
    change, error, message = BAD[name]
    call = on(device, {"x": X, "w": W} | change)
    with refused(error, message):
        conv2d_hwnc(**call)


def test_supports_says_beforehand_what_the_checks_refuse():
    assert supports(64, 256, HALF)
    assert not supports(96, 256, HALF)
    assert not supports(64, 4, HALF)
    assert not supports(3, 64, HALF)
