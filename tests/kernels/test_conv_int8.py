"""The convolution of bytes against its definition in float64; powers of two make it exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import on, refused

pytest.importorskip("triton")

from fastres.kernels import LAUNCHES, TileConfig, conv2d, elementwise, max_pool2d, max_pool2d_ref
from fastres.kernels._gpu import GPUS
from fastres.kernels.conv_int8 import CONFIGS, conv2d_int8, conv2d_int8_ref, shift_of

pytestmark = pytest.mark.interpreter
SMALL = TileConfig(16, 16, 32, 4, 2)
R, Y = (2.0**-3, 9), (2.0**-1, 78)

# (N, C, H, W), (K, R, S), stride, padding, dilation, groups
SHAPES = {
    "3x3": ((2, 40, 5, 7), (17, 3, 3), 1, 1, 1, 1),
    "3x3/2 of 24": ((1, 24, 7, 6), (16, 3, 3), 2, 1, 1, 1),
    "1x1": ((2, 33, 3, 5), (18, 1, 1), 1, 0, 1, 1),
    "7x7/2 of 3": ((1, 3, 15, 13), (8, 7, 7), 2, 3, 1, 1),
    "dilated": ((1, 32, 9, 9), (4, 3, 3), 1, 2, 2, 1),
    "groups": ((1, 16, 5, 5), (8, 3, 3), 1, 1, 1, 4),
    "padding beyond the image": ((1, 32, 1, 2), (4, 3, 3), 1, 3, 1, 1),
}


def bytes_of(*shape, device="cpu"):
    t = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    return t.contiguous(memory_format=torch.channels_last)


def operands(name, device="cpu"):
    """x, w, scale and b, and the geometry; every sum, product and tie is exact in float32."""
    size, (k, r, s), stride, padding, dilation, groups = SHAPES[name]
    w = torch.randint(-127, 128, (k, size[1] // groups, r, s), dtype=torch.int8, device=device)
    scale = 2.0 ** torch.randint(-12, -9, (k,), device=device)
    b = torch.randint(-40, 40, (k,), device=device) / 4
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    w = w.contiguous(memory_format=torch.channels_last)
    return (bytes_of(*size, device=device), w, scale, b), geometry


def guarded(want, fill):
    """An output like ``want`` filled with other numbers, and the memory around it, which is 77."""
    n, c, h, w = want.shape
    flat = torch.full((want.numel() + 128,), 77, dtype=want.dtype, device=fill.device)
    out = flat[64:-64].view(n, h, w, c).permute(0, 3, 1, 2)
    return out.copy_(fill), flat.as_strided((2, 64), (len(flat) - 64, 1))


def guarded_call(tensors, config=None, **given):
    """The kernel's answer, which is all of its output and nothing beside it, and what is due."""
    want = conv2d_int8_ref(*tensors, **given)
    out, around = guarded(want, 255 - want)  # which differs everywhere
    got = conv2d_int8(*tensors, out=out, config=config, **given)
    assert got is out
    assert bool((around == 77).all())
    return got, want


@pytest.mark.fault(92)
@pytest.mark.sample(3)
@pytest.mark.parametrize("zero", [0, 7, 128, 255])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_and_zero_point_is_exact(device, name, zero):
    tensors, geometry = operands(name, device)
    launches = LAUNCHES["conv2d_kernel"]
    got, want = guarded_call(tensors, SMALL, x_zero=zero, y_grid=Y, **geometry)
    assert LAUNCHES["conv2d_kernel"] == launches + 1
    assert torch.equal(got, want)
    assert want.unique().numel() > 8


@pytest.mark.fault(92)
@pytest.mark.sample(3)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("to", [Y, (2.0, 0), torch.float32, torch.float16], ids=str)
def test_every_epilogue_is_exact(device, with_residual, relu, to):
    tensors, geometry = operands("3x3", device)
    given = {"relu": relu, "x_zero": 6, **geometry}
    given |= {"dtype": to} if isinstance(to, torch.dtype) else {"y_grid": to}
    if with_residual:
        shape = conv2d_int8_ref(*tensors, **geometry).shape
        given |= {"residual": bytes_of(*shape, device=device), "residual_grid": R}
    got, want = guarded_call(tensors, **given)
    assert got.dtype is want.dtype
    assert torch.equal(got, want)


@pytest.mark.fault(92)
@pytest.mark.parametrize("zero", [0, 77])
def test_halves_go_to_the_even_neighbour_and_ends_are_clamped(device, zero):
    """A byte times 1, half of it: all ties in both directions; then the clamp."""
    x = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 16, 16)
    x = x.contiguous(memory_format=torch.channels_last)
    w = torch.tensor([1, -1, 4], dtype=torch.int8, device=device).view(3, 1, 1, 1)
    w = w.contiguous(memory_format=torch.channels_last)
    scale = torch.full((3,), 0.5, device=device)
    got = conv2d_int8(x, w, scale, y_grid=(1.0, zero))
    half = (torch.arange(256, dtype=torch.float64) / 2).round()  # torch's halves go to even
    double = 2 * torch.arange(256, dtype=torch.float64)
    for row, due in zip(got[0].cpu(), (half, -half, double), strict=True):
        assert torch.equal(row.flatten(), (due + zero).clamp(0, 255).to(torch.uint8))


@pytest.mark.fault(92)
@pytest.mark.parametrize("weight", [127, -127])
def test_the_largest_sums_do_not_saturate(device, weight):
    x = torch.full((1, 512, 3, 3), 255, dtype=torch.uint8, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    w = torch.full((1, 512, 3, 3), weight, dtype=torch.int8, device=device)
    w = w.contiguous(memory_format=torch.channels_last)
    got = conv2d_int8(x, w, torch.ones(1, device=device))
    exact = 512 * 9 * 255 * weight  # beyond 2^24: rounded once, to float32
    assert got.flatten().tolist() == [float(torch.tensor(exact, dtype=torch.float32))]


@pytest.mark.sample(5)
@pytest.mark.fault(19)
@pytest.mark.parametrize("row", CONFIGS, ids=str)
@pytest.mark.parametrize("split_k", [1, 3])
def test_every_config_is_exact(device, row, split_k):
    if split_k > 1 and not row.can_split_k:
        pytest.skip("its partial sums would spill")
    c = row.block_k + 3
    x = bytes_of(1, c, 4, 9, device=device)
    w = torch.randint(-127, 128, (21, c, 3, 2), dtype=torch.int8, device=device)
    w = w.contiguous(memory_format=torch.channels_last)
    scale = torch.full((21,), 2.0**-11, device=device)
    row = replace(row, split_k=split_k)
    got, want = guarded_call((x, w, scale), row, x_zero=4, padding=1, y_grid=Y)
    assert torch.equal(got, want)


@pytest.mark.fault(92)
def test_a_split_sum_is_exact_where_float32_is_not(device):
    """Two partial sums beyond 2^24, the first of them odd, that nearly cancel."""
    x = torch.full((1, 4096, 1, 1), 255, dtype=torch.uint8, device=device)
    x[0, 0] = 254
    w = torch.full((1, 4096, 1, 1), 127, dtype=torch.int8, device=device)
    w[0, 2048:] = -127
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    got = conv2d_int8(x, w, torch.ones(1, device=device), config=replace(SMALL, split_k=2))
    assert got.item() == -127


def test_a_split_sum_shares_the_workspace_of_floats(device):
    """The same memory holds int32 in one call, float32 in the next, and counts of 0 between."""
    workspace = torch.zeros(20_000, device=device)
    tensors, geometry = operands("3x3", device)
    for _ in range(2):
        config = replace(SMALL, split_k=3)
        got = conv2d_int8(*tensors, y_grid=Y, config=config, workspace=workspace, **geometry)
        assert torch.equal(got, conv2d_int8_ref(*tensors, y_grid=Y, **geometry))
        x, w = (t.float() for t in tensors[:2])
        exact = conv2d(x, w, config=config, workspace=workspace, **geometry)
        assert torch.equal(exact, torch.nn.functional.conv2d(x, w, **geometry))


@pytest.mark.fault(10)
def test_out_may_be_the_residual_of_bytes(device):
    tensors, geometry = operands("3x3", device)
    residual = bytes_of(*conv2d_int8_ref(*tensors, **geometry).shape, device=device)
    given = {"residual_grid": R, "relu": True, "y_grid": Y, **geometry}
    want = conv2d_int8_ref(*tensors, residual=residual, **given)
    out, around = guarded(want, residual)
    conv2d_int8(*tensors, residual=out, out=out, **given)
    assert torch.equal(out, want)
    assert bool((around == 77).all())


def test_a_shift_that_is_given_is_not_computed(device):
    tensors, geometry = operands("1x1", device)
    shift = shift_of(tensors[1], 6)
    due = (128 - 6) * tensors[1].double().sum((1, 2, 3))
    assert torch.equal(shift.double(), due)
    given = {"x_zero": 6, "y_grid": Y, **geometry}
    want = conv2d_int8_ref(*tensors, **given)
    assert torch.equal(conv2d_int8(*tensors, shift=shift, **given), want)
    other = conv2d_int8(*tensors, shift=shift + 4096, **given)
    assert not torch.equal(other, want)


@pytest.mark.fault(1)
def test_an_empty_batch_launches_nothing(device):
    (x, *rest), geometry = operands("3x3", device)
    before = LAUNCHES.total()
    y = conv2d_int8(x[:0], *rest, y_grid=Y, **geometry)
    assert (y.shape, y.dtype, LAUNCHES.total()) == ((0, 17, 5, 7), torch.uint8, before)


def good():
    return {
        "x": bytes_of(1, 16, 5, 5),
        "w": torch.ones(8, 16, 3, 3, dtype=torch.int8).contiguous(
            memory_format=torch.channels_last
        ),
        "scale": torch.ones(8),
        "b": torch.ones(8),
    }


BAD = {
    "x of floats": (
        {"x": torch.ones(1, 16, 5, 5)},
        TypeError,
        "x must be uint8, got torch.float32",
    ),
    "x NCHW": (
        {"x": bytes_of(1, 16, 5, 5).contiguous()},
        ValueError,
        "x must be dense in channels",
    ),
    "w unsigned": ({"w": bytes_of(8, 16, 3, 3)}, TypeError, "w must be int8, got torch.uint8"),
    "scale double": ({"scale": torch.ones(8).double()}, TypeError, "scale must be float32, got"),
    "scale short": ({"scale": torch.ones(7)}, ValueError, r"scale must have shape \(8,\)"),
    "b elsewhere": ({"b": torch.ones(8, device="meta")}, ValueError, "b must be on .* got meta"),
    "shift of floats": ({"shift": torch.ones(8)}, TypeError, "shift must be int32, got"),
    "x_zero 256": ({"x_zero": 256}, ValueError, "x_zero must be a whole number from 0 to 255"),
    "x_zero -1": ({"x_zero": -1}, ValueError, "x_zero must be a whole number from 0 to 255"),
    "y_grid": ({"y_grid": (0.0, 0)}, ValueError, "scale of y_grid must be positive and finite"),
    "y zero": ({"y_grid": (1.0, 300)}, ValueError, "zero point of y_grid must be a whole number"),
    "residual of floats": (
        {"residual": torch.ones(1, 8, 3, 3)},
        TypeError,
        "residual must be torch.uint8 as the input is",
    ),
    "residual shape": ({"residual": bytes_of(1, 8, 3, 4)}, ValueError, "residual must have shape"),
    "dtype": ({"dtype": torch.float64}, TypeError, "dtype must be float32, float16 or bfloat16"),
    "out dtype": ({"out": bytes_of(1, 8, 3, 3)}, TypeError, "out must be float32, got torch.uint8"),
    "narrow steps": (
        {"config": TileConfig(16, 16, 16, 4, 2)},
        ValueError,
        "config must have block_k of at least 32, got 16",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_name_themselves_and_launch_nothing(device, name):
    change, error, message = BAD[name]
    call = on(device, good() | change)
    with refused(error, message):
        conv2d_int8(call.pop("x"), call.pop("w"), call.pop("scale"), **call)


def test_out_over_an_input_is_refused(device):
    x = bytes_of(1, 8, 5, 5, device=device)
    w = torch.ones(8, 8, 1, 1, dtype=torch.int8, device=device)
    with pytest.raises(ValueError, match="out overlaps x in memory"):
        conv2d_int8(x, w, torch.ones(8, device=device), y_grid=Y, out=x)


@pytest.mark.parametrize("gpu", GPUS)
def test_some_tile_fits_each_gpu(gpu):
    """And products of bytes are twice those of halves, but for tcgen05, where Triton has none."""
    record = GPUS[gpu]
    assert sum(row.fitted("int8", record) is not None for row in CONFIGS) >= 8
    rate = record.multiply_adds("int8", 128)
    assert rate == 2 * (record.mma if gpu == "sm_100" else record.matrix)


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_the_maximum_of_bytes(device, ceil_mode):
    for kernel, stride, padding, dilation in ((3, 2, 1, 1), (2, 2, 0, 1), (3, 1, 1, 2)):
        x = bytes_of(2, 20, 5, 14, device=device)
        window = {"stride": stride, "padding": padding, "dilation": dilation}
        want = max_pool2d_ref(x, kernel, ceil_mode=ceil_mode, upcast=True, **window)
        out, around = guarded(want.to(torch.uint8), 255 - want)
        max_pool2d(x, kernel, ceil_mode=ceil_mode, out=out, **window)
        assert torch.equal(out.double(), want)
        assert bool((around == 77).all())


@pytest.mark.sample(4)
@pytest.mark.fault(92)
@pytest.mark.parametrize("config", [None, *elementwise.CONFIGS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [(0.3, 0), (0.1, 128), (0.25, 77)], ids=str)
def test_numbers_become_bytes(device, grid, dtype, config):
    """Also ties, which scale 1/4 has many of, and what lies outside of the bytes."""
    scale, zero = grid
    x = (torch.randn(2, 30, 5, 9) * 64).round().div(8).to(dtype)
    x[0, :, 0, 0] = 1e4
    x[0, :, 0, 1] = -1e4
    x = x.contiguous(memory_format=torch.channels_last)
    want = ((x.float() / scale).round() + zero).clamp(0, 255).to(torch.uint8).to(device)
    out, around = guarded(want, 255 - want)
    assert elementwise.to_bytes(x.to(device), scale, zero, out=out, config=config) is out
    assert torch.equal(out, want)
    assert bool((around == 77).all())
    rows = x.to(device).contiguous()
    assert torch.equal(elementwise.to_bytes(rows, scale, zero), want.contiguous())


BAD_BYTES = {
    "scale": ({"scale": 0.0}, ValueError, "the scale of x must be positive and finite, got 0.0"),
    "zero": ({"zero": 256}, ValueError, "the zero point of x must be a whole number from 0 to 255"),
    "out of floats": ({"out": torch.ones(2, 8)}, TypeError, "out must be uint8, got torch.float32"),
    "out in another order": (
        {"x": torch.ones(1, 2, 2, 2), "out": bytes_of(1, 2, 2, 2)},
        ValueError,
        "out must be dense and in the memory order",
    ),
    "strided": ({"x": torch.ones(2, 16)[:, ::2]}, ValueError, "x must be dense"),
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_what_does_not_become_bytes(device, name):
    change, error, message = BAD_BYTES[name]
    with refused(error, message):
        elementwise.to_bytes(
            **on(device, {"x": torch.ones(2, 8), "scale": 0.5, "zero": 3} | change)
        )
