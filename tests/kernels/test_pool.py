"""Max, average and global average pooling against PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import refused

pytest.importorskip("triton")

from fastres.kernels import (
    LAUNCHES,
    avg_pool2d,
    avg_pool2d_ref,
    global_avg_pool,
    global_avg_pool_ref,
    max_pool2d,
    max_pool2d_ref,
)
from fastres.kernels import pool as pool_module
from fastres.kernels.global_pool import CONFIGS as GLOBAL_CONFIGS
from fastres.kernels.global_pool import global_avg_pool_op
from fastres.kernels.pool import CONFIGS, avg_pool2d_op, max_pool2d_op, select_config

interpreter = pytest.mark.interpreter
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# kernel_size, stride, padding, dilation, ceil_mode
WINDOWS = [
    (3, 2, 1, 1, False),
    (3, 2, 1, 1, True),
    (2, None, 0, 1, True),
    ((2, 3), (1, 2), (1, 1), (2, 1), False),
    (5, 4, 2, 1, True),
    ((1, 4), 3, (0, 2), 1, True),
]


def guarded_call(poisoned, want, function, *args, **keywords):
    """Call with a guarded output and count the launch."""
    guarded = poisoned(want.shape, want.dtype)
    before = LAUNCHES.total()
    assert function(*args, out=guarded.out, **keywords) is guarded.out
    assert LAUNCHES.total() == before + 1
    guarded.check()
    return guarded.out


@pytest.mark.sample(5)
@interpreter
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 5, 9, 7), (1, 65, 6, 6)], ids=str)
def test_max_pool_equals_torch(device, poisoned, size, dtype, window):
    kernel_size, stride, padding, dilation, ceil_mode = window
    x = torch.randn(size, device=device).to(dtype, memory_format=torch.channels_last)
    before = x.clone()
    keywords = {"stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode}
    want = max_pool2d_ref(x, kernel_size, **keywords)
    got = guarded_call(poisoned, want, max_pool2d, x, kernel_size, **keywords)
    assert torch.equal(got, want)
    assert torch.equal(x, before)


@pytest.mark.sample(7)
@interpreter
@pytest.mark.parametrize("window", [w for w in WINDOWS if w[3] == 1], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize("divisor", [None, 3])
def test_average_pool_keeps_the_rule_of_two(
    device, poisoned, rule_of_two, dtype, window, count_include_pad, divisor
):
    kernel_size, stride, padding, _, ceil_mode = window
    x = torch.randn(2, 17, 9, 7, device=device).to(dtype, memory_format=torch.channels_last)
    keywords = {
        "stride": stride,
        "padding": padding,
        "ceil_mode": ceil_mode,
        "count_include_pad": count_include_pad,
        "divisor_override": divisor,
    }
    want = avg_pool2d_ref(x, kernel_size, **keywords)
    got = guarded_call(poisoned, want, avg_pool2d, x, kernel_size, **keywords)
    rule_of_two(got, want, avg_pool2d_ref(x, kernel_size, upcast=True, **keywords))


@interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", [(3, 5, 7, 7), (1, 65, 1, 1), (2, 64, 8, 9), (1, 1, 5, 1)], ids=str
)
def test_global_average_keeps_the_rule_of_two(device, poisoned, rule_of_two, size, dtype):
    x = (torch.randn(size, device=device) + 1).to(dtype, memory_format=torch.channels_last)
    want = global_avg_pool_ref(x)
    got = guarded_call(poisoned, want, global_avg_pool, x)
    rule_of_two(got, want, global_avg_pool_ref(x, upcast=True))


@pytest.mark.fault(19)
@interpreter
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_pool_config_is_exact(integers, poisoned, config):
    x = integers(2, config.block_c + 3, 7, 9, dtype=torch.float16)
    want = max_pool2d_ref(x, 3, stride=2, padding=1)
    got = guarded_call(poisoned, want, max_pool2d, x, 3, stride=2, padding=1, config=config)
    assert torch.equal(got, want)
    want = avg_pool2d_ref(x, 2, upcast=True).half()
    assert torch.equal(guarded_call(poisoned, want, avg_pool2d, x, 2, config=config), want)


@pytest.mark.fault(19)
@interpreter
@pytest.mark.parametrize("config", GLOBAL_CONFIGS, ids=str)
def test_every_global_pool_config_is_exact(integers, poisoned, config):
    x = integers(2, config.block_c + 3, 16, config.block_m // 8, dtype=torch.float16)
    want = global_avg_pool_ref(x, upcast=True).half()
    assert torch.equal(guarded_call(poisoned, want, global_avg_pool, x, config=config), want)


@pytest.mark.fault(6)
@interpreter
def test_the_int64_path_is_exact(integers, monkeypatch):
    monkeypatch.setattr(pool_module, "needs_int64", lambda *_: True)
    x = integers(2, 5, 9, 7)
    assert torch.equal(max_pool2d(x, 3, padding=1), max_pool2d_ref(x, 3, padding=1))
    monkeypatch.setattr("fastres.kernels.global_pool.needs_int64", lambda *_: True)
    want = global_avg_pool_ref(x, upcast=True).float()
    assert torch.equal(global_avg_pool(x), want)


@pytest.mark.fault(8)
@interpreter
def test_sizes_of_one(integers):
    for size in [(1, 1, 1, 1), (3, 1, 4, 5), (1, 17, 1, 1), (2, 16, 1, 3)]:
        x = integers(*size)
        assert torch.equal(max_pool2d(x, 1), x)
        want = global_avg_pool_ref(x, upcast=True).float()
        assert torch.equal(global_avg_pool(x), want)


@pytest.mark.fault(13)
@interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_infinities_and_negative_windows(device, dtype):
    x = -1 - torch.rand(1, 6, 6, 6, device=device)
    x[0, 1, 2, 2] = math.nan
    x[0, 2, 0, 0] = math.nan
    x[0, 3, 3, 3] = math.inf
    x[0, 4] = -math.inf
    x[0, 5, 5, 5], x[0, 5, 5, 4] = math.nan, math.inf
    x = x.to(dtype, memory_format=torch.channels_last)
    got = max_pool2d(x, 3, stride=2, padding=1)
    want = max_pool2d_ref(x, 3, stride=2, padding=1)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
    assert bool((got[0, 0] < 0).all())  # padding is -inf, not 0
    assert bool((got[0, 4] == -math.inf).all())


@pytest.mark.fault(14)
@interpreter
def test_nan_stays_in_its_image(device):
    x = torch.randn(3, 20, 5, 5, device=device).contiguous(memory_format=torch.channels_last)
    clean = max_pool2d(x, 3, padding=1), avg_pool2d(x, 3, padding=1), global_avg_pool(x)
    x[1] = math.nan
    dirty = max_pool2d(x, 3, padding=1), avg_pool2d(x, 3, padding=1), global_avg_pool(x)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[::2], b[::2])
        assert bool(b[1].isnan().all())


@pytest.mark.fault(1)
def test_an_empty_batch_launches_nothing(device):
    x, before = torch.empty(0, 3, 9, 8, device=device), LAUNCHES.total()
    assert max_pool2d(x, 3, stride=2, padding=1).shape == (0, 3, 5, 4)
    assert avg_pool2d(x, 2).shape == (0, 3, 4, 4)
    assert global_avg_pool(x).shape == (0, 3, 1, 1)
    assert LAUNCHES.total() == before


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: max_pool2d(x, 9), ValueError, "x of 6x7 .* is smaller than the 9x9 window"),
        (lambda x: max_pool2d(x, 3, padding=2), ValueError, "padding must be at most half"),
        (lambda x: max_pool2d(x, 0), ValueError, "kernel_size must be at least 1, got 0"),
        (lambda x: max_pool2d(x, 2, stride=0), ValueError, "stride must be at least 1, got 0"),
        (lambda x: max_pool2d(x.contiguous(), 2), ValueError, "x must be dense in channels_last"),
        (lambda x: max_pool2d(x[0], 2), ValueError, "x must have 4 dimensions"),
        (lambda x: avg_pool2d(x.double(), 2), TypeError, "x must be float32.*float64"),
        (lambda x: avg_pool2d(x, 2, divisor_override=0), ValueError, "divisor_override"),
        (lambda x: max_pool2d(x, 1, out=x), ValueError, "out overlaps x"),
        (lambda x: max_pool2d(x, 2, out=x), ValueError, r"out must have shape \(2, 5, 3, 3\)"),
        (lambda x: global_avg_pool(x[:, :, :0]), ValueError, "x must have channels and pixels"),
        (lambda x: global_avg_pool(x.contiguous()), ValueError, "x must be dense"),
    ],
)
def test_bad_arguments_name_themselves_and_launch_nothing(device, call, error, message):
    x = torch.randn(2, 5, 6, 7, device=device).contiguous(memory_format=torch.channels_last)
    with refused(error, message):
        call(x)


@pytest.mark.parametrize("size", range(1, 12))
def test_ceil_mode_counts_windows_as_torch(size):
    for kernel in range(1, 5):
        for stride in range(1, 5):
            for padding in range(kernel // 2 + 1):
                if size + 2 * padding < kernel:
                    continue
                want = F.max_pool1d(torch.ones(1, 1, size), kernel, stride, padding, 1, True)
                got = pool_module._output_size(size, kernel, stride, padding, 1, True)
                assert got == want.shape[2], (kernel, stride, padding)


def test_the_config_follows_the_channels():
    assert [select_config(c).block_c for c in (2048, 64, 63, 32, 17, 16, 1)] == [
        64,
        64,
        32,
        32,
        16,
        16,
        16,
    ]


@pytest.mark.fault(40)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    x = torch.randn(2, 5, 6, 7).to(dtype, memory_format=torch.channels_last)
    torch.library.opcheck(max_pool2d_op, (x, [3, 3], [2, 2], [1, 1], [1, 1], True))
    torch.library.opcheck(avg_pool2d_op, (x, [2, 2], [2, 2], [0, 0], False, True, None))
    torch.library.opcheck(global_avg_pool_op, (x,))
