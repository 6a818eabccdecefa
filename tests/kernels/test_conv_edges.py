"""What the convolution kernel refuses, and special values, scales and random shapes."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import on, refused

pytest.importorskip("triton")

from fastres.kernels import LAUNCHES, TileConfig, conv2d, conv2d_ref
from fastres.kernels._common import needs_int64
from fastres.kernels.conv import conv2d_op

SMALL = TileConfig(16, 16, 16, 4, 2)
interpreter = pytest.mark.interpreter


def nhwc(*shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)


@pytest.mark.fault(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_empty_batch_launches_nothing(device, dtype):
    before = LAUNCHES.total()
    x = torch.empty(0, 3, 9, 8, dtype=dtype, device=device)
    y = conv2d(x, nhwc(5, 3, 3, 3, dtype=dtype, device=device), stride=2, padding=1)
    assert (y.shape, y.dtype, LAUNCHES.total()) == ((0, 5, 5, 4), dtype, before)
    out = torch.empty_like(y)
    assert (
        conv2d(x, nhwc(5, 3, 3, 3, dtype=dtype, device=device), stride=2, padding=1, out=out) is out
    )


BAD = {
    "x no tensor": ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
    "x double": ({"x": nhwc(1, 16, 5, 5).double()}, TypeError, "x must be float32.*float64"),
    "x integer": ({"x": nhwc(1, 16, 5, 5).int()}, TypeError, "x must be float32.*int32"),
    "x of rank 3": ({"x": torch.randn(16, 5, 5)}, ValueError, r"x must have 4 dim.*\(16, 5, 5\)"),
    "x other channels": ({"x": nhwc(1, 8, 5, 5)}, ValueError, r"wants 16 input channels.*\(1, 8"),
    "w other dtype": (
        {"w": nhwc(8, 16, 3, 3).half()},
        TypeError,
        "w must be torch.float32 as the input",
    ),
    "w elsewhere": ({"w": nhwc(8, 16, 3, 3).to("meta")}, ValueError, "w must be on .* got meta"),
    "w NCHW": ({"w": torch.randn(8, 16, 3, 3)}, ValueError, "w must be dense in channels_last"),
    "b short": ({"b": torch.randn(7)}, ValueError, r"b must have shape \(8,\), got \(7,\)"),
    "b half": ({"b": torch.randn(8).half()}, TypeError, "b must be float32 .*got torch.float16"),
    "b strided": ({"b": torch.randn(16)[::2]}, ValueError, "b must be contiguous"),
    "b elsewhere": ({"b": torch.randn(8, device="meta")}, ValueError, "b must be on .* got meta"),
    "groups": ({"groups": 3}, ValueError, "groups must divide w's 8 .* got 3"),
    "no groups": ({"groups": 0}, ValueError, "groups must divide w's 8 .* got 0"),
    "stride 0": ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    "stride of three": ({"stride": (1, 1, 1)}, TypeError, "stride must be an int or a pair"),
    "stride of floats": ({"stride": (1.0, 1.0)}, TypeError, "stride must be an int or a pair"),
    "padding -1": ({"padding": (0, -1)}, ValueError, r"padding must be at least 0, got \(0, -1\)"),
    "dilation 0": ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
    "precision": ({"precision": "fast"}, ValueError, "precision must be 'ieee' or 'tf32'.*'fast'"),
    "residual shape": ({"residual": nhwc(1, 8, 4, 3)}, ValueError, r"residual must have shape"),
    "residual NCHW": ({"residual": torch.randn(1, 8, 3, 3)}, ValueError, "residual must be dense"),
    "out dtype": (
        {"out": nhwc(1, 8, 3, 3).half()},
        TypeError,
        "out must be torch.float32 as the input",
    ),
    "out shape": ({"out": nhwc(1, 8, 3, 4)}, ValueError, r"out must have shape \(1, 8, 3, 3\)"),
    "x wants a gradient": (
        {"x": nhwc(1, 16, 5, 5).requires_grad_()},
        RuntimeError,
        "x requires a gradient",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_name_themselves_and_launch_nothing(device, name):
    change, error, message = BAD[name]
    good = {"x": nhwc(1, 16, 5, 5), "w": nhwc(8, 16, 3, 3), "b": torch.randn(8)}
    call = on(device, good | change)
    with refused(error, message):
        conv2d(call.pop("x"), call.pop("w"), call.pop("b"), **call)


@pytest.mark.fault(2)
def test_an_image_smaller_than_the_window(device):
    x, w = nhwc(1, 16, 2, 9, device=device), nhwc(8, 16, 3, 3, device=device)
    with pytest.raises(ValueError, match=r"x of 2x9 with padding \(0, 1\) .*3x3 window"):
        conv2d(x, w, padding=(0, 1))


@pytest.mark.fault(7)
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.contiguous(),
        lambda t: t[:, :, ::2],
        lambda t: t[:, :16],
        lambda t: t[:, :, :, 1:],
        lambda t: t[:, :, :1].expand(-1, -1, 8, -1),
        lambda t: t.transpose(2, 3),
    ],
    ids=["NCHW", "every other row", "some channels", "cropped", "expanded", "transposed"],
)
def test_other_layouts_are_refused(device, view):
    x = view(nhwc(2, 32, 8, 8, device=device))
    with pytest.raises(ValueError, match="x must be dense in channels_last order, got torch.float"):
        conv2d(x, nhwc(4, x.shape[1], 1, 1, device=device))


@pytest.mark.fault(10)
@pytest.mark.parametrize("name", ["x", "w", "b"])
def test_out_over_an_input_is_refused(device, name):
    x, w, b = nhwc(1, 8, 4, 4), nhwc(8, 8, 1, 1), torch.randn(8)
    tensors = {"x": x.to(device), "w": w.to(device), "b": b.to(device)}
    flat = torch.zeros(512, device=device)
    storage = flat[64 : 64 + tensors[name].numel()]
    shared = storage.as_strided(tensors[name].shape, tensors[name].stride(), 64)
    tensors[name] = shared.copy_(tensors[name])
    out = flat[60:188].view(1, 4, 4, 8).permute(0, 3, 1, 2)
    before = flat.clone()
    with pytest.raises(ValueError, match=f"out overlaps {name} in memory"):
        conv2d(tensors["x"], tensors["w"], tensors["b"], out=out)
    assert torch.equal(flat, before)


@pytest.mark.fault(10)
def test_out_over_part_of_the_residual_is_refused(device):
    flat = torch.zeros(160, device=device)
    residual = flat[:128].view(1, 4, 4, 8).permute(0, 3, 1, 2)
    out = flat[8:136].view(1, 4, 4, 8).permute(0, 3, 1, 2)
    x, w = nhwc(1, 8, 4, 4, device=device), nhwc(8, 8, 1, 1, device=device)
    with pytest.raises(ValueError, match="out overlaps residual"):
        conv2d(x, w, residual=residual, out=out)


@pytest.mark.fault(6)
def test_offsets_past_2_to_the_31_take_the_int64_path():
    assert not needs_int64(torch.empty(2**20, 2**10, device="meta"), None)
    assert needs_int64(None, torch.empty(2**21, 2**10, device="meta"))


@pytest.mark.fault(12)
@interpreter
def test_nan_and_negative_zero_pass_the_relu(device):
    nan = math.nan
    x = torch.tensor([nan, -2.0, 3.0, -0.0], device=device).view(4, 1, 1, 1)
    residual = torch.tensor([1.0, nan, -3.0, -0.0], device=device).view(4, 1, 1, 1)
    y = conv2d(x, torch.ones(1, 1, 1, 1, device=device), residual=residual, relu=True)
    want = conv2d_ref(x, torch.ones(1, 1, 1, 1, device=device), residual=residual, relu=True)
    assert torch.equal(
        y.isnan(), torch.tensor([True, True, False, False], device=device).view_as(y)
    )
    assert torch.equal(y.nan_to_num(9.0), want.nan_to_num(9.0))


@pytest.mark.fault(14)
@interpreter
@pytest.mark.parametrize(("channels", "window"), [(20, 3), (3, 5), (16, 1)])
def test_nan_stays_in_its_image(device, channels, window):
    x = nhwc(3, channels, 5, 5, device=device)
    w = nhwc(18, channels, window, window, device=device)
    clean = conv2d(x, w, padding=window // 2, config=SMALL)
    x[1] = math.nan
    y = conv2d(x, w, padding=window // 2, config=SMALL)
    assert bool(y[1].isnan().all())
    assert torch.equal(y[::2], clean[::2])


@pytest.mark.fault(14)
@interpreter
@pytest.mark.parametrize("channels", [19, 3])
def test_the_tail_of_the_reduction_is_masked_on_both_sides(device, channels):
    """0 * inf is NaN: a masked element of x must never meet an infinite weight."""
    x = torch.ones(1, channels, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    w = torch.ones(2, channels, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    w[1] = math.inf
    y = conv2d(x, w, config=SMALL)
    assert y.flatten().tolist() == [9 * channels, math.inf]


@pytest.mark.fault(15)
@interpreter
def test_overflow_of_float16_is_infinite(device):
    x = torch.full((1, 16, 2, 2), 64.0, dtype=torch.float16, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    w = torch.full((3, 16, 1, 1), 63.0, dtype=torch.float16, device=device)
    w[1], w[2] = 64.0, -64.0  # 64512 is finite, 65536 is not
    w = w.contiguous(memory_format=torch.channels_last)
    y = conv2d(x, w)
    assert torch.equal(y, conv2d_ref(x, w))
    assert y[0, :, 0, 0].tolist() == [64512.0, math.inf, -math.inf]


@pytest.mark.fault(16)
@interpreter
@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4])
def test_scales_keep_the_rule_of_two(device, rule_of_two, scale):
    x = nhwc(1, 24, 4, 4, device=device) * scale
    w = nhwc(8, 24, 3, 3, device=device)
    out = conv2d(x, w, padding=1)
    rule_of_two(out, conv2d_ref(x, w, padding=1), conv2d_ref(x, w, padding=1, upcast=True))
    half_x, half_w = x.half(), w.half()  # 1e-8 is below the least subnormal of float16
    pt = conv2d_ref(half_x, half_w, padding=1)
    ref = conv2d_ref(half_x, half_w, padding=1, upcast=True)
    finite = pt.isfinite()
    out = conv2d(half_x, half_w, padding=1)
    assert torch.equal(out.isfinite(), finite)
    rule_of_two(out[finite], pt[finite], ref[finite])


OP_CASES = [
    ((2, 8, 5, 4), (6, 8, 3, 3), True, True, [2, 1], [1, 1], [1, 1], 1),
    ((1, 8, 4, 4), (4, 2, 1, 1), False, False, [1, 1], [0, 0], [1, 1], 4),
]


@pytest.mark.fault(40)
@pytest.mark.parametrize("case", OP_CASES, ids=["full", "groups"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(case, dtype):
    size, weights, bias, relu, stride, padding, dilation, groups = case
    x, w = nhwc(*size, dtype=dtype), nhwc(*weights, dtype=dtype)
    b = torch.randn(w.shape[0]) if bias else None
    keywords = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    residual = conv2d_ref(x, w, **keywords) if bias else None
    torch.library.opcheck(
        conv2d_op, (x, w, b, residual, stride, padding, dilation, groups, relu, "ieee")
    )
