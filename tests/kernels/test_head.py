"""Average pooling and classifier in one kernel, against float64, exact on integers."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import on, refused

pytest.importorskip("triton")

from fastres.kernels import LAUNCHES, new_workspace
from fastres.kernels import head as head_module
from fastres.kernels._gpu import HOPPER
from fastres.kernels.head import (
    CONFIGS,
    HeadConfig,
    _ProblemSize,
    head,
    head_ref,
    select_config,
)

interpreter = pytest.mark.interpreter
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
DTYPES = (FLOAT, HALF, BFLOAT)
SMALL = (HeadConfig(1, 16, 16, 4, 2, 4), HeadConfig(16, 16, 16, 4, 3, 4))


def expected(x, w, b=None):
    """The exact result rounded once; means of 4 or 16 whole numbers are exact as well."""
    return head_ref(x, w, b, upcast=True).to(x.dtype)


@pytest.mark.sample(5)
@interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (3, 40, 2, 8), (17, 33, 2, 1)], ids=str)
@pytest.mark.parametrize("config", [None, *SMALL], ids=["selected", "vector", "matrix"])
def test_every_shape_is_exact(integers, poisoned, shape, dtype, config):
    x, w, b = integers(*shape, dtype=dtype), integers(21, shape[1], dtype=dtype), integers(21)
    want = expected(x, w, b)
    before = x.clone(), w.clone(), b.clone()
    guarded = poisoned(want.shape, dtype)
    launches = LAUNCHES["head_kernel"]
    assert head(x, w, b, out=guarded.out, config=config) is guarded.out
    assert LAUNCHES["head_kernel"] == launches + 1
    guarded.check()
    assert torch.equal(guarded.out, want)
    assert all(torch.equal(t, copy) for t, copy in zip((x, w, b), before, strict=True))


@pytest.mark.fault(19)
@interpreter
@pytest.mark.parametrize("row", CONFIGS, ids=str)
@pytest.mark.parametrize("channels", ["ragged", "even"])
def test_every_config_is_exact(integers, poisoned, row, channels):
    channels = row.block_c * 3 + (5 if channels == "ragged" else 0)
    x = integers(row.block_m + 1, channels, 4, 4, dtype=HALF)
    w, b = integers(row.block_n + 3, channels, dtype=HALF), integers(row.block_n + 3, dtype=HALF)
    want = expected(x, w, b)
    guarded = poisoned(want.shape, HALF)
    head(x, w, b, out=guarded.out, config=row)
    guarded.check()
    assert torch.equal(guarded.out, want)


@interpreter
@pytest.mark.parametrize("config", SMALL, ids=["vector", "matrix"])
def test_the_workspace_is_left_ready_for_the_next_call(integers, device, config):
    workspace = new_workspace(device)
    workspace[4096:] = math.nan
    for batch in (3, 5, 1):
        x, w = integers(batch, 48, 2, 2, dtype=HALF), integers(20, 48, dtype=HALF)
        assert torch.equal(head(x, w, config=config, workspace=workspace), expected(x, w))
        assert not workspace[:4096].any()


@interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", SMALL, ids=["vector", "matrix"])
def test_floats_keep_the_rule_of_two(device, rule_of_two, dtype, config):
    x = torch.randn(2, 70, 5, 5, device=device).to(dtype, memory_format=torch.channels_last)
    w = torch.randn(30, 70, device=device).to(dtype)
    b = torch.randn(30, device=device)
    ref = head_ref(x, w, b, upcast=True)
    rule_of_two(head(x, w, b, config=config), head_ref(x, w, b), ref)


@pytest.mark.fault(14)
@interpreter
@pytest.mark.parametrize("config", SMALL, ids=["vector", "matrix"])
def test_nan_stays_in_its_image(numbers, config):
    x, w = numbers(3, 40, 2, 2), numbers(18, 40)
    clean = head(x, w, config=config)
    x[1, 7, 1, 0] = math.nan
    y = head(x, w, config=config)
    assert bool(y[1].isnan().all())
    assert torch.equal(y[::2], clean[::2])


@pytest.mark.fault(18)
@interpreter
@pytest.mark.parametrize("config", SMALL, ids=["vector", "matrix"])
def test_the_same_bits_each_time_and_for_each_image(numbers, config):
    x, w = numbers(4, 50, 2, 2), numbers(18, 50)  # means over 4 pixels are exact
    whole = head(x, w, config=config)
    assert torch.equal(head(x, w, config=config), whole)
    assert torch.equal(head(x[2:3], w, config=config), whole[2:3])


@pytest.mark.fault(6)
@interpreter
def test_the_int64_path_is_exact(monkeypatch, integers):
    monkeypatch.setattr(head_module, "needs_int64", lambda *_: True)
    x, w = integers(3, 20, 2, 2), integers(5, 20)
    for config in SMALL:
        assert torch.equal(head(x, w, config=config), expected(x, w))


@pytest.mark.fault(1)
def test_an_empty_batch_launches_nothing(device):
    before = LAUNCHES.total()
    x = torch.empty(0, 8, 2, 2, device=device)
    assert head(x, torch.randn(5, 8, device=device)).shape == (0, 5)
    assert LAUNCHES.total() == before


def test_every_batch_fits_the_shared_workspace():
    for batch in (1, 2, 5, 32, 256, 3000):
        row = select_config(_ProblemSize(batch, 1000, 2048, 49, 2), HOPPER)
        size = _ProblemSize(batch, 1000, 2048, 49, 2).tiles(row) * row.split_k
        assert row.split_k == 1 or size * row.block_m * row.block_n <= 2 * 132 * 64 * 128
    assert select_config(_ProblemSize(1, 1000, 2048, 49, 2), HOPPER).split_k > 1


X, W = torch.randn(2, 8, 3, 3).contiguous(memory_format=torch.channels_last), torch.randn(5, 8)
BAD = {
    "x NCHW": ({"x": torch.randn(2, 8, 3, 3)}, ValueError, "x must be dense in channels_last"),
    "x without pixels": ({"x": X[:, :, :0]}, ValueError, "x must have channels and pixels"),
    "w other channels": ({"w": torch.randn(5, 7)}, ValueError, r"w must have shape \(5, 8\)"),
    "w half": ({"w": W.half()}, TypeError, "w must be torch.float32"),
    "w strided": ({"w": torch.randn(5, 16)[:, ::2]}, ValueError, "w must be contiguous"),
    "b long": ({"b": torch.randn(6)}, ValueError, r"b must have shape \(5,\)"),
    "precision": ({"precision": "fast"}, ValueError, "precision must be"),
    "out shape": ({"out": torch.randn(2, 6)}, ValueError, r"out must have shape \(2, 5\)"),
    "out over w": ({"out": W.view(-1)[:10].view(2, 5)}, ValueError, "out overlaps w"),
    "workspace small": (
        {"workspace": torch.zeros(9), "config": SMALL[0]},
        ValueError,
        "workspace must be .* or more elements",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_name_themselves_and_launch_nothing(device, name):
    change, error, message = BAD[name]
    call = on(device, {"x": X, "w": W} | change)
    with refused(error, message):
        head(**call)
