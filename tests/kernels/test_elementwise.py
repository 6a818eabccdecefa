"""add_relu, relu and linear against PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import refused

pytest.importorskip("triton")

from fastres.kernels import (
    LAUNCHES,
    TileConfig,
    add_relu,
    add_relu_ref,
    relu,
    relu_ref,
)
from fastres.kernels.elementwise import CONFIGS, select_config
from fastres.kernels.linear import linear, linear_ref

interpreter = pytest.mark.interpreter
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = TileConfig(16, 16, 16, 4, 2)


@pytest.mark.sample(5)
@interpreter
@pytest.mark.parametrize("config", [None, *CONFIGS], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 5, 9, 7), (1, 1, 1, 1), (4097,), (3, 1000)], ids=str)
def test_sum_and_relu_equal_torch(device, poisoned, size, dtype, config):
    a, b = torch.randn(2, *size, device=device).to(dtype)
    if len(size) == 4:
        a, b = (t.contiguous(memory_format=torch.channels_last) for t in (a, b))
    copies = a.clone(), b.clone()
    for function, operands, keywords, want in [
        (add_relu, (a, b), {}, add_relu_ref(a, b)),
        (add_relu, (a, b), {"relu": False}, add_relu_ref(a, b, relu=False)),
        (relu, (a,), {}, relu_ref(a)),
    ]:
        guarded = poisoned(size, dtype)
        before = LAUNCHES["elementwise_kernel"]
        function(*operands, out=guarded.out, config=config, **keywords)
        assert LAUNCHES["elementwise_kernel"] == before + 1
        guarded.check()
        assert torch.equal(guarded.out, want)
    assert torch.equal(a, copies[0])
    assert torch.equal(b, copies[1])


@pytest.mark.fault(10)
@interpreter
def test_out_may_be_an_operand(device, poisoned):
    a, b = torch.randn(2, 2, 5, 9, 70, device=device)
    a, b = (t.contiguous(memory_format=torch.channels_last) for t in (a, b))
    for first in (True, False):
        guarded = poisoned(a.shape, a.dtype, fill=a)
        operands = (guarded.out, b) if first else (b, guarded.out)
        add_relu(*operands, out=guarded.out)
        guarded.check()
        assert torch.equal(guarded.out, add_relu_ref(a, b))
    guarded = poisoned(a.shape, a.dtype, fill=a)
    relu(guarded.out, out=guarded.out)
    assert torch.equal(guarded.out, a.relu())


@pytest.mark.fault(12)
@interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_negative_zero_and_infinities(device, dtype):
    values = torch.tensor([math.nan, -0.0, 0.0, math.inf, -math.inf, -1.0, 2.0], device=device)
    a, b = (t.flatten().to(dtype) for t in torch.meshgrid(values, values, indexing="ij"))
    for got, want in [
        (relu(a), relu_ref(a)),
        (add_relu(a, b), add_relu_ref(a, b)),
        (add_relu(a, b, relu=False), add_relu_ref(a, b, relu=False)),
    ]:
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
        assert torch.equal(got.signbit()[~got.isnan()], want.signbit()[~want.isnan()])


@pytest.mark.fault(6)
@interpreter
def test_the_int64_path_is_exact(integers, monkeypatch):
    monkeypatch.setattr("fastres.kernels.elementwise.needs_int64", lambda *_: True)
    a, b = integers(2, 5, 9, 7), integers(2, 5, 9, 7)
    assert torch.equal(add_relu(a, b), add_relu_ref(a, b))


@pytest.mark.sample(5)
@interpreter
@pytest.mark.parametrize("config", [None, SMALL], ids=["selected", "small"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_relu", [False, True])
@pytest.mark.parametrize("size", [(1, 64, 10), (5, 17, 33), (3, 1, 1), (17, 70, 20)], ids=str)
def test_linear_is_exact(integers, poisoned, size, with_relu, dtype, config):
    n, c, k = size
    x, w, b = integers(n, c, dtype=dtype), integers(k, c, dtype=dtype), integers(k)
    want = linear_ref(x, w, b, relu=with_relu, upcast=True).to(dtype)
    guarded = poisoned(want.shape, dtype)
    before = LAUNCHES["conv2d_kernel"]
    assert linear(x, w, b, relu=with_relu, out=guarded.out, config=config) is guarded.out
    assert LAUNCHES["conv2d_kernel"] == before + 1
    guarded.check()
    assert torch.equal(guarded.out, want)
    fresh = linear(x, w, b, relu=with_relu, config=config)
    assert fresh.is_contiguous()
    assert torch.equal(fresh, want)


@interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_keeps_the_rule_of_two(device, rule_of_two, dtype, bias):
    x = torch.randn(3, 200, device=device).to(dtype)
    w = torch.randn(30, 200, device=device).to(dtype)
    b = torch.randn(30, device=device) if bias else None
    rule_of_two(linear(x, w, b), linear_ref(x, w, b), linear_ref(x, w, b, upcast=True))


@pytest.mark.fault(1)
def test_nothing_in_nothing_out(device):
    before = LAUNCHES.total()
    empty, w = torch.empty(0, 8, device=device), torch.randn(3, 8, device=device)
    assert linear(empty, w).shape == (0, 3)
    assert relu(empty).shape == add_relu(empty, empty).shape == (0, 8)
    assert LAUNCHES.total() == before


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: add_relu(t, t[:1]), ValueError, r"b must have shape \(4, 6\), got \(1, 6\)"),
        (lambda t: add_relu(t, t.half()), TypeError, "b must be torch.float32 as the input"),
        (lambda t: add_relu(t, t.t().contiguous().t()), ValueError, "b must be dense and in the"),
        (lambda t: relu(t[:, ::2]), ValueError, "x must be dense and in the memory order"),
        (lambda t: relu(t[:1].expand(4, 6)), ValueError, "x must be dense and in the memory order"),
        (lambda t: relu(t.long()), TypeError, "x must be float32.*int64"),
        (lambda t: relu(t[1:], out=t[:3]), ValueError, "out overlaps the first operand"),
        (
            lambda t: add_relu(t[:1], t[1:2], out=t.view(-1)[8:14].view(1, 6)),
            ValueError,
            "out .* b",
        ),
        (lambda t: linear(t, t[:, :5].contiguous()), ValueError, "must agree in their second"),
        (lambda t: linear(t[:, ::2], t[:, :3].contiguous()), ValueError, "x must be contiguous"),
        (lambda t: linear(t, t[:, :6].t()), ValueError, "must agree in their second"),
        (lambda t: linear(t[0], t), ValueError, r"x must have 2 dimensions, got shape \(6,\)"),
        (lambda t: linear(t, t, t[0]), ValueError, r"b must have shape \(4,\), got \(6,\)"),
        (lambda t: linear(t, t, out=t[:, :4]), ValueError, "out must be contiguous"),
        (lambda t: linear(t, t, out=t.view(-1)[:16].view(4, 4)), ValueError, "out overlaps x"),
        (lambda t: linear(t, t, precision="no"), ValueError, "precision must be .*'no'"),
    ],
)
def test_bad_arguments_name_themselves_and_launch_nothing(device, call, error, message):
    t = torch.randn(4, 6, device=device)
    with refused(error, message):
        call(t)


def test_the_config_follows_the_size():
    assert select_config(1000) == CONFIGS[0]
    assert select_config(2**22) == CONFIGS[1]
