"""The convolution kernel against float64, exact on integers.

Launchers are called, never the custom operator: on the CPU that would compare the reference with
itself.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from fastres.kernels import LAUNCHES, TileConfig, conv2d, conv2d_ref
from fastres.kernels import conv as conv_module
from fastres.kernels._config import ProblemSize
from fastres.kernels._split_k import WORKSPACE_COUNTS, workspace_size
from fastres.kernels.conv import CONFIGS, math_mode_of

pytestmark = pytest.mark.interpreter

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = TileConfig(16, 16, 16, 4, 2)

# (N, C, H, W), (K, R, S), stride, padding, dilation, groups
SHAPES = {
    "3x3": ((2, 20, 5, 7), (17, 3, 3), 1, 1, 1, 1),
    "3x3/2": ((1, 16, 7, 6), (16, 3, 3), 2, 1, 1, 1),
    "1x1": ((2, 33, 3, 5), (18, 1, 1), 1, 0, 1, 1),
    "1x1/2": ((2, 16, 5, 4), (35, 1, 1), 2, 0, 1, 1),
    "stem": ((1, 3, 15, 13), (8, 7, 7), 2, 3, 1, 1),
    "stem, 4 channels": ((1, 4, 9, 9), (8, 7, 7), 2, 3, 1, 1),
    "uneven": ((1, 18, 6, 9), (5, 2, 3), (2, 1), (0, 2), (1, 2), 1),
    "dilated": ((1, 16, 9, 9), (4, 3, 3), 1, 2, 2, 1),
    "no padding": ((2, 17, 4, 5), (3, 3, 2), 1, 0, 1, 1),
    "groups of 4": ((1, 8, 5, 5), (8, 3, 3), 1, 1, 1, 2),
    "groups of 17": ((1, 34, 4, 4), (6, 3, 3), 2, 1, 1, 2),
    "depthwise": ((2, 5, 4, 6), (10, 3, 3), 1, 1, 1, 5),
    "padding beyond the image": ((1, 16, 1, 2), (4, 3, 3), 1, 3, 1, 1),
}


def operands(integers, shape, dtype):
    """Integer operands, and the keywords of a call."""
    size, (k, r, s), stride, padding, dilation, groups = shape
    x = integers(*size, dtype=dtype)
    w = integers(k, size[1] // groups, r, s, dtype=dtype)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return x, w, geometry


def expected(x, w, b=None, **keywords):
    """The exact result rounded once to x's dtype."""
    return conv2d_ref(x, w, b, upcast=True, **keywords).to(x.dtype)


@pytest.mark.sample(5)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("config", [None, SMALL], ids=["selected", "small"])
def test_every_shape_is_exact(integers, poisoned, name, dtype, config):
    x, w, geometry = operands(integers, SHAPES[name], dtype)
    want = expected(x, w, **geometry)
    guarded = poisoned(want.shape, dtype)
    launches = LAUNCHES["conv2d_kernel"]
    got = conv2d(x, w, out=guarded.out, config=config, **geometry)
    assert LAUNCHES["conv2d_kernel"] == launches + 1
    assert got is guarded.out
    guarded.check()
    assert torch.equal(got, want)


@pytest.mark.sample(5)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("bias", ["none", "float32", "same"])
@pytest.mark.parametrize("name", ["3x3", "stem", "groups of 17"])
def test_every_epilogue_is_exact(integers, poisoned, name, bias, with_residual, relu):
    x, w, geometry = operands(integers, SHAPES[name], torch.float16)
    k = w.shape[0]
    b = None if bias == "none" else integers(k, dtype=x.dtype if bias == "same" else torch.float32)
    shape = conv2d_ref(x, w, **geometry).shape
    residual = 16 * integers(*shape, dtype=x.dtype) if with_residual else None
    inputs = [t for t in (x, w, b, residual) if t is not None]
    before = [t.clone() for t in inputs]

    guarded = poisoned(shape, x.dtype)
    got = conv2d(x, w, b, residual=residual, relu=relu, out=guarded.out, **geometry)
    guarded.check()
    want = expected(x, w, b, residual=residual, relu=relu, **geometry)
    assert torch.equal(got, want)
    assert bool((want < 0).any()) != relu  # the ReLU has something to do
    for t, copy in zip(inputs, before, strict=True):
        assert torch.equal(t, copy)


ROWS = [(math_mode, row) for math_mode, rows in CONFIGS.items() for row in rows]


@pytest.mark.sample(5)
@pytest.mark.fault(19)
@pytest.mark.parametrize(("math_mode", "row"), ROWS, ids=str)
@pytest.mark.parametrize("channels", ["ragged", "even", "few"])
def test_every_config_is_exact(integers, poisoned, math_mode, row, channels):
    dtype = torch.float16 if math_mode == "half" else torch.float32
    precision = "ieee" if math_mode == "half" else math_mode
    c = {"ragged": row.block_k + 3, "even": row.block_k, "few": 3}[channels]
    x, w, b = integers(1, c, 7, 19, dtype=dtype), integers(21, c, 3, 2, dtype=dtype), integers(21)
    want = expected(x, w, b, padding=1, relu=True)
    residual = integers(*want.shape, dtype=dtype)
    want = expected(x, w, b, padding=1, residual=residual, relu=True)
    guarded = poisoned(want.shape, dtype)
    conv2d(
        x,
        w,
        b,
        padding=1,
        residual=residual,
        relu=True,
        precision=precision,
        out=guarded.out,
        config=row,
    )
    guarded.check()
    assert torch.equal(guarded.out, want)


@pytest.mark.parametrize("config", [row for _, row in ROWS if row.parts > 1][:3], ids=str)
def test_every_part_of_a_wide_tile_lands_in_its_columns(integers, config):
    x = integers(1, 16, 3, 3, dtype=torch.float16)
    w = integers(config.block_n + 5, 16, 1, 1, dtype=torch.float16)
    b = torch.arange(w.shape[0], device=x.device, dtype=torch.float32)
    assert torch.equal(conv2d(x, w, b, config=config), expected(x, w, b))


@pytest.mark.sample(5)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("name", ["3x3", "stem", "groups of 17"])
def test_floats_keep_the_rule_of_two(device, rule_of_two, name, dtype, precision):
    if device.type == "cuda" and precision == "tf32" and dtype == torch.float32:
        pytest.skip("TF32 rounds its operands: judged on the GPU against cuDNN's TF32")
    size, (k, r, s), stride, padding, dilation, groups = SHAPES[name]
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    x = torch.randn(size, device=device).to(dtype, memory_format=torch.channels_last)
    w = torch.randn(k, size[1] // groups, r, s, device=device) / (r * s)
    w = w.to(dtype, memory_format=torch.channels_last)
    b = torch.randn(k, device=device)
    residual = torch.randn(conv2d_ref(x, w, **geometry).shape, device=device)
    residual = residual.to(dtype, memory_format=torch.channels_last)
    epilogue = {"residual": residual, "relu": True, **geometry}
    rule_of_two(
        conv2d(x, w, b, precision=precision, **epilogue),
        conv2d_ref(x, w, b, **epilogue),
        conv2d_ref(x, w, b, upcast=True, **epilogue),
    )


@pytest.mark.fault(5)
def test_more_tiles_than_an_axis_y_holds_go_on_axis_x(monkeypatch):
    grids = []
    monkeypatch.setattr(conv_module, "launch", lambda kernel, grid, *_, **__: grids.append(grid))
    x = torch.empty(70_000, 16, 4, 4, memory_format=torch.channels_last)
    w = torch.empty(16, 16, 1, 1)
    monkeypatch.setattr(conv_module, "check_device", lambda x: None)
    conv2d(x, w, config=SMALL)
    assert grids == [70_000]


@pytest.mark.parametrize(("channels", "gather_c", "even_c"), [(15, 15, False), (16, 0, True)])
def test_steps_cross_taps_only_where_one_tap_cannot_fill_them(
    monkeypatch, channels, gather_c, even_c
):
    metas = []
    monkeypatch.setattr(conv_module, "launch", lambda *_, **meta: metas.append(meta))
    monkeypatch.setattr(conv_module, "check_device", lambda x: None)
    x, w = torch.empty(1, channels, 1, 1), torch.empty(1, channels, 1, 1)
    conv2d(x, w, config=SMALL)
    assert (metas[0]["GATHER_C"], metas[0]["EVEN_C"]) == (gather_c, even_c)


@pytest.mark.fault(6)
@pytest.mark.parametrize("name", ["3x3", "1x1/2", "stem", "groups of 17"])
def test_the_int64_path_is_exact(monkeypatch, integers, name):
    monkeypatch.setattr(conv_module, "needs_int64", lambda *_: True)
    x, w, geometry = operands(integers, SHAPES[name], torch.float32)
    residual = integers(*conv2d_ref(x, w, **geometry).shape)
    got = conv2d(x, w, residual=residual, config=SMALL, **geometry)
    assert torch.equal(got, expected(x, w, residual=residual, **geometry))


@pytest.mark.fault(8)
def test_sizes_of_one_are_both_layouts_at_once(integers):
    for size, k in [((1, 1, 1, 1), 1), ((3, 1, 4, 5), 2), ((1, 17, 1, 1), 1), ((2, 16, 1, 3), 1)]:
        x, w, b = integers(*size), integers(k, size[1], 1, 1), integers(k)
        want = expected(x, w, b)
        assert torch.equal(conv2d(x, w, b), want)
        strange = x[:1].as_strided(x[:1].shape, (12345, *x.stride()[1:]))
        assert torch.equal(conv2d(strange, w, b), want[:1])


@pytest.mark.fault(9)
def test_storage_offsets_that_break_alignment(integers):
    x, w, geometry = operands(integers, SHAPES["1x1"], torch.float16)
    want = expected(x, w, **geometry)
    for offset in (0, 1, 0, 3, 8, 5):
        flat = torch.empty(x.numel() + offset, dtype=x.dtype, device=x.device)
        shifted = flat[offset:].view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2).copy_(x)
        assert torch.equal(conv2d(shifted, w, **geometry), want)


@pytest.mark.fault(10)
@pytest.mark.parametrize("config", [None, SMALL], ids=["selected", "small"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_may_be_the_residual(integers, poisoned, dtype, config):
    x, w, geometry = operands(integers, SHAPES["3x3"], dtype)
    residual = integers(*conv2d_ref(x, w, **geometry).shape, dtype=dtype)
    want = expected(x, w, residual=residual, relu=True, **geometry)
    guarded = poisoned(residual.shape, dtype, fill=residual)
    conv2d(x, w, residual=guarded.out, relu=True, out=guarded.out, config=config, **geometry)
    guarded.check()
    assert torch.equal(guarded.out, want)


@pytest.mark.fault(18)
def test_position_and_company_of_an_image_change_no_bit(numbers):
    x, w = numbers(3, 20, 6, 6), numbers(9, 20, 3, 3)
    batch = conv2d(x, w, padding=1, config=SMALL)
    for _ in range(2):
        assert torch.equal(conv2d(x, w, padding=1, config=SMALL), batch)
    for i in range(3):
        assert torch.equal(conv2d(x[i : i + 1], w, padding=1, config=SMALL)[0], batch[i])


@pytest.mark.sample(5)
@pytest.mark.parametrize("split_k", [2, 3, 8, 20])
@pytest.mark.parametrize("name", ["3x3", "1x1", "stem", "groups of 17"])
def test_a_split_reduction_is_exact(integers, poisoned, name, split_k):
    x, w, geometry = operands(integers, SHAPES[name], torch.float16)
    b = integers(w.shape[0])
    residual = integers(*conv2d_ref(x, w, **geometry).shape, dtype=x.dtype)
    want = expected(x, w, b, residual=residual, relu=True, **geometry)
    guarded = poisoned(want.shape, x.dtype)
    config = replace(SMALL, split_k=split_k)
    conv2d(x, w, b, residual=residual, relu=True, out=guarded.out, config=config, **geometry)
    guarded.check()
    assert torch.equal(guarded.out, want)
    conv2d(x, w, b, residual=residual, relu=True, out=residual, config=config, **geometry)
    assert torch.equal(residual, want)


@pytest.mark.sample(5)
@pytest.mark.fault(19)
@pytest.mark.parametrize(("math_mode", "row"), [r for r in ROWS if r[1].can_split_k], ids=str)
def test_every_config_splits(integers, math_mode, row):
    dtype = torch.float16 if math_mode == "half" else torch.float32
    c = 2 * row.block_k + 3
    x, w = integers(1, c, 5, 4, dtype=dtype), integers(21, c, 2, 2, dtype=dtype)
    precision = "ieee" if math_mode == "half" else math_mode
    got = conv2d(x, w, precision=precision, config=replace(row, split_k=4))
    assert torch.equal(got, expected(x, w))


def test_workspace_serves_one_call_after_another(integers, device):
    workspace = torch.zeros(20_000, device=device)
    for name, split_k in [("3x3", 2), ("1x1", 3), ("3x3", 5)]:
        x, w, geometry = operands(integers, SHAPES[name], torch.float32)
        config = replace(SMALL, split_k=split_k)
        got = conv2d(x, w, config=config, workspace=workspace, **geometry)
        assert torch.equal(got, expected(x, w, **geometry))
        counts = workspace[: WORKSPACE_COUNTS.value]
        assert torch.equal(counts, torch.zeros_like(counts))


@pytest.mark.parametrize(
    ("workspace", "message"),
    [
        (torch.zeros(100), "workspace must be 5632 or more elements"),
        (torch.zeros(9999).half(), "of float32"),
        (torch.zeros(9999, 2)[:, 0], "workspace must be contiguous"),
    ],
    ids=["small", "half", "strided"],
)
def test_workspace_that_does_not_serve_is_refused(integers, device, workspace, message):
    x, w = integers(1, 64, 4, 5), integers(16, 64, 1, 1)
    config = replace(SMALL, split_k=3)
    with pytest.raises(ValueError, match=message):
        conv2d(x, w, config=config, workspace=workspace.to(device))
    problem = ProblemSize(20, 16, 64, 1, 1, 4)
    assert workspace_size(problem, config) == WORKSPACE_COUNTS.value + 2 * 3 * 16 * 16
    assert workspace_size(problem, SMALL) == 0


def test_too_many_tiles_to_split_are_refused(device):
    x = torch.empty(70_000, 16, 1, 1, device=device)
    with pytest.raises(ValueError, match="config splits the reduction of 4375 tiles; at most 4096"):
        conv2d(x, torch.empty(16, 16, 1, 1, device=device), config=replace(SMALL, split_k=2))


def test_arithmetic_names_a_table():
    assert math_mode_of(torch.float16, "ieee") == math_mode_of(torch.bfloat16, "tf32") == "half"
    assert {math_mode_of(torch.float32, p) for p in ("ieee", "tf32")} == {"ieee", "tf32"}
    assert set(CONFIGS) == {"half", "ieee", "tf32"}
