"""oneDNN's 8-bit convolutions against numpy's whole numbers, and what they must refuse."""

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastres.backends.onednn_int8 import Int8Ops, OneDNNInt8Ops, int8_products
from fastres.errors import InputError
from fastres.graph.ir import Conv2d, GlobalAvgPool, Grid, MaxPool2d
from tests.support.eight_bit import MOST

needs_onednn = pytest.mark.skipif(not int8_products(), reason="no integer convolutions here")
OPS = [Int8Ops, pytest.param(OneDNNInt8Ops, marks=needs_onednn)]

# Powers of two: every product and sum is exact in float32, and ties are ties.
X, Y, R = Grid(2.0**-3, 3), Grid(2.0**-1, 78), Grid(2.0**-3, 9)


def conv_of(channels, outputs, kernel=3, stride=1, padding=1, dilation=1, groups=1, **more):
    pairs = ((v, v) for v in (kernel, stride, padding, dilation))
    return Conv2d("w", "b", channels, outputs, *pairs, groups, **more)


def weights_of(op, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (op.out_channels, op.in_channels // op.groups, *op.kernel)
    weight = torch.randint(-MOST, MOST + 1, shape, generator=generator, dtype=torch.int8)
    bias = torch.randint(-40, 40, shape[:1], generator=generator) / 4
    scale = 2.0 ** torch.randint(-8, -5, shape[:1], generator=generator)
    return weight, bias, scale.float()


def bytes_of(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return found.contiguous(memory_format=torch.channels_last)


def numpy_conv(op, weights, x, residual=None):
    """By the definition, window by window, in numpy's float64; halves to even."""
    weight, bias, scale = (t.numpy().astype(np.float64) for t in weights)
    (down, right), (sh, sw), (dh, dw), (kh, kw) = op.padding, op.stride, op.dilation, op.kernel
    whole = x.numpy().astype(np.float64) - op.x_grid.zero
    whole = np.pad(whole, ((0, 0), (0, 0), (down, down), (right, right)))
    height = (whole.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (whole.shape[3] - dw * (kw - 1) - 1) // sw + 1
    y = np.zeros((len(whole), op.out_channels, height, width))
    ins, outs = op.in_channels // op.groups, op.out_channels // op.groups
    for k, i, j, c in product(range(op.out_channels), range(kh), range(kw), range(ins)):
        rows = slice(i * dh, i * dh + sh * (height - 1) + 1, sh)
        columns = slice(j * dw, j * dw + sw * (width - 1) + 1, sw)
        y[:, k] += weight[k, c, i, j] * whole[:, k // outs * ins + c, rows, columns]
    y = y * (scale * op.x_grid.scale)[:, None, None] + bias[:, None, None]
    if residual is not None:
        y += (residual.numpy().astype(np.float64) - op.residual_grid.zero) * op.residual_grid.scale
    if op.relu:
        y = np.maximum(y, 0)
    if op.y_grid is None:
        return torch.from_numpy(y).float()
    y = np.rint(y / op.y_grid.scale) + op.y_grid.zero
    return torch.from_numpy(np.clip(y, 0, 255).astype(np.uint8))


GEOMETRIES = {
    "3x3": conv_of(16, 16),
    "1x1 of 5 to 17": conv_of(5, 17, 1, padding=0),
    "1 channel": conv_of(1, 1),
    "7x7/2 of 3": conv_of(3, 8, 7, 2, 3),
    "1x1/2": conv_of(8, 24, 1, 2, 0),
    "dilated": conv_of(4, 6, 3, 1, 2, 2),
    "groups": conv_of(32, 32, groups=8),
    "depthwise": conv_of(12, 12, groups=12),
}


def with_grids(op, residual, relu, y=Y):
    sum_of = {"residual": True, "residual_grid": R} if residual else {}
    return replace(op, relu=relu, x_grid=X, y_grid=y, **sum_of)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("op", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_convolution_is_whole_number_arithmetic(ops, op):
    weights = weights_of(op)
    x = bytes_of(4, op.in_channels, 9, 11)
    ties = 0
    for residual, relu, y_grid in product((False, True), (False, True), (Y, Grid(2.0, 0), None)):
        if residual and y_grid is None:
            continue
        one = with_grids(op, residual, relu, y_grid)
        engine = ops()
        prepared = engine.prepare(one, weights)
        shape = numpy_conv(with_grids(op, False, relu), weights, x).shape
        other = bytes_of(*shape, seed=1) if residual else None
        expected = numpy_conv(one, weights, x, other)
        found = engine.conv(one, prepared, x, other, False)
        assert found.dtype is expected.dtype
        assert torch.equal(found, expected), (residual, relu, y_grid)
        if y_grid is not None:
            exact = numpy_conv(with_grids(op, False, relu, None), weights, x) / y_grid.scale
            ties += int((exact - exact.floor() == 0.5).sum())
    assert ties > 0  # halves decided, and went to the even neighbour


@pytest.mark.parametrize("ops", OPS)
def test_the_sum_is_written_over_a_residual_only_where_it_may_be(ops):
    """oneDNN's sum returns its accumulator: who reads the residual later must find it whole."""
    op = with_grids(conv_of(8, 8), True, True)
    engine, weights = ops(), weights_of(op)
    prepared = engine.prepare(op, weights)
    x, residual = bytes_of(1, 8, 6, 6), bytes_of(1, 8, 6, 6, seed=1)
    before = residual.clone()
    found = engine.conv(op, prepared, x, residual, False)
    assert torch.equal(residual, before)
    assert found.data_ptr() != residual.data_ptr()
    again = engine.conv(op, prepared, x, residual, True)
    assert torch.equal(again, found)
    if ops is OneDNNInt8Ops:
        assert again.data_ptr() == residual.data_ptr()


@needs_onednn
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_saturate(sign):
    op = with_grids(conv_of(64, 16, padding=0), False, False, None)
    weight = torch.full((16, 64, 3, 3), MOST * sign, dtype=torch.int8)
    weights = weight, torch.zeros(16), torch.full((16,), 2.0**-7)
    x = torch.full((1, 64, 5, 5), 255, dtype=torch.uint8)
    engine = OneDNNInt8Ops()
    found = engine.conv(op, engine.prepare(op, weights), x, None, False)
    exact = 64 * 9 * (255 - X.zero) * MOST * sign * 2.0**-7 * X.scale
    assert torch.allclose(found, torch.full_like(found, exact), rtol=1e-6)


@pytest.mark.parametrize("ops", OPS)
def test_an_empty_batch_and_other_sizes_with_the_same_weights(ops):
    op = with_grids(conv_of(5, 6), False, True)
    engine, weights = ops(), weights_of(op)
    prepared = engine.prepare(op, weights)
    for n, height, width in ((0, 4, 4), (1, 1, 1), (3, 12, 7), (1, 30, 2)):
        x = bytes_of(n, 5, height, width)
        for memory in (x, x.contiguous()):
            expected = numpy_conv(op, weights, x)
            assert torch.equal(engine.conv(op, prepared, memory, None, False), expected)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_pooling_on_bytes(ops, ceil_mode):
    """torch's own max_pool2d raises on bytes in channels_last memory from 12x12 on."""
    engine = ops()
    for kernel, stride, padding, dilation in ((3, 2, 1, 1), (2, 2, 0, 1), (3, 1, 1, 2)):
        pairs = ((v, v) for v in (kernel, stride, padding, dilation))
        op = MaxPool2d(*pairs, ceil_mode)
        for shape in ((1, 3, 13, 12), (2, 70, 5, 14)):
            x = bytes_of(*shape)
            window = kernel, stride, padding, dilation, ceil_mode
            expected = F.max_pool2d(x.double(), *window).to(torch.uint8)
            assert torch.equal(engine.max_pool(op, x), expected)
    x = bytes_of(2, 5, 7, 3)
    for keepdim in (True, False):
        found = engine.global_avg_pool(GlobalAvgPool(keepdim, (-2, -1), Grid(0.75, 30)), x)
        exact = (x.double() - 30).mean((2, 3), keepdim=keepdim) * 0.75
        assert torch.allclose(found.double(), exact, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:22% of the values")
def test_rounding_is_to_even_and_clamped():
    grid = Grid(0.5, 100)  # the zero is even: with an odd one halves would go to odd neighbours
    x = torch.tensor([-51.0, -50.0, -0.75, -0.25, 0.25, 0.75, 1.25, 77.5, 78.0])
    found = Int8Ops().quantize(grid, x)
    assert found.tolist() == [0, 0, 98, 100, 100, 102, 102, 255, 255]
    assert Int8Ops().dequantize(grid, found)[3:6].tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_no_byte_stands_for_is_refused(bad):
    x = torch.ones(1, 2, 3, 3)
    x[0, 1, 2, 2] = bad
    with pytest.raises(InputError, match="NaN or infinity, which 8 bits cannot carry"):
        Int8Ops().quantize(X, x)


def test_values_outside_of_the_calibrated_range_are_told_once():
    engine, x = Int8Ops(), torch.linspace(0, 40, 200)
    with pytest.warns(UserWarning, match="lie outside of -0.375 to 31.5"):
        engine.quantize(X, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.quantize(X, x)


PROBE = """
import torch
from fastres.backends.onednn_int8 import OneDNNInt8Ops, int8_products
from fastres.graph.ir import Conv2d, Grid
assert int8_products() == "saturating", int8_products()
pair = lambda v: (v, v)
op = Conv2d("w", "b", 64, 16, pair(3), pair(1), pair(0), pair(1), 1, x_grid=Grid(1.0, 0))
ops = OneDNNInt8Ops()
assert "7-bit weights: no VNNI" in ops.kernel_name(op)
x = torch.full((1, 64, 5, 5), 255, dtype=torch.uint8)
for value in (127, -127, 64):
    weight = torch.full((16, 64, 3, 3), value, dtype=torch.int8)
    y = ops.conv(op, ops.prepare(op, (weight, torch.zeros(16), torch.ones(16))), x, None, False)
    exact = 64 * 9 * 255 * value
    assert float((y / exact - 1).abs().max()) < 1e-5, (value, y[0, 0, 0, 0], exact)
"""


@needs_onednn
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_without_dot_products_of_bytes_the_weights_have_seven_bits(isa):
    """There two products are added in 16 bits: 255 * 127 * 2 would be half of what it is."""
    found = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_numbers_of_half_precision_become_the_nearest_bytes(dtype):
    """Every number of float16 below 12; a quotient rounded to half precision is often another."""
    scale, zero = 2**0.5 / 20, 128  # irrational: no number is half way between two bytes
    x = torch.arange(0, 0x4A00, dtype=torch.int16).view(torch.float16).to(dtype)
    x = torch.stack([x, -x]).view(2, 16, 32, -1)
    want = np.clip(np.rint(x.double().numpy() / scale) + zero, 0, 255)
    found = Int8Ops(dtype)._as_bytes(Grid(scale, zero), x)
    assert found.dtype is torch.uint8
    assert (found.numpy() == want).all()
