"""Rows 12, 13 and 16 through the CPU's engine: special values and extreme scales."""

import math

import pytest
import torch
from fused import assert_close, assert_fused, images, plain, small
from helpers import adversarial_
from torch import nn

import fastres


class Block(nn.Module):
    """relu(norm(conv(x)) + x), the max pool of it, and the max pool of values far below zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.low, self.pool = nn.Conv2d(6, 6, 1), nn.MaxPool2d(3, 2, 1)

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x)) + x)
        return y, self.pool(y), self.pool(self.low(x))


@pytest.mark.fault(12, 13)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_special_values_go_where_torch_lets_them(value, dtype):
    """Windows of the third output are all negative, and the padding must not win there."""
    source = adversarial_(Block()).to(dtype)
    with torch.no_grad():
        source.low.bias -= 100
    fast = fastres.optimize(source, verify=False)
    assert [reason for _, reason in fast.plan().fallbacks] == []
    x = torch.randn(2, 6, 9, 9).to(dtype)
    x[0, :, 3, 4] = value
    for out, expected in zip(fast(x), plain(source, x), strict=True):
        for what in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(what(out), what(expected))
        finite = expected.isfinite()
        assert finite.any()
        # bfloat16's roundings of one layer.
        torch.testing.assert_close(out[finite], expected[finite], rtol=0.02, atol=0.05)
    assert (out[finite] < -50).all()


@pytest.mark.fault(16)
@pytest.mark.parametrize("scale", [1e-8, 1e4, 1e-38, 1e-42])
def test_scales_of_the_images(scale):
    assert_fused(small(), scale * images())


@pytest.mark.fault(16)
@pytest.mark.parametrize("scale", [1e-8, 1e4])
def test_scales_of_the_weights(scale):
    """The next norm brings the values back to size, from a variance of the same scale squared."""
    model = small()
    with torch.no_grad():
        model.conv1.weight.mul_(scale)
        model.bn1.running_mean.mul_(scale)
        model.bn1.running_var.mul_(scale**2)
        model.bn1.eps = 1e-5 * scale**2
    assert_fused(model, images())


@pytest.mark.parametrize(
    "options",
    [{"divisor_override": 3}, {"count_include_pad": False}, {"ceil_mode": True}, {"padding": 0}],
    ids=lambda options: next(iter(options)),
)
def test_a_mean_keeps_its_divisor(options):
    pool = nn.AvgPool2d(3, 2, **{"padding": 1, **options})
    source = adversarial_(nn.Sequential(nn.Conv2d(3, 6, 1), pool))
    fast = fastres.optimize(source, verify=False)
    assert not fast.plan().fallbacks
    assert_close(fast(images()), source, images())


@pytest.mark.fault(12)
@pytest.mark.interpreter
def test_an_infinity_stays_one_where_the_last_step_is_masked(device):
    """24 channels are a step and a half of the reduction; 0 * inf would be NaN."""
    pytest.importorskip("triton")
    from fastres.kernels import _tma
    from fastres.kernels.gemm import GemmConfig, dual_gemm

    if not _tma.has_tma(device):
        pytest.skip("no TMA before compute capability 9.0")
    x, w = torch.ones(1, 8, device=device), torch.ones(8, 8, device=device)
    x2, w2 = torch.ones(1, 24, device=device), torch.ones(8, 24, device=device)
    x2[0, 3] = math.inf
    out = dual_gemm(
        x, w, x2, w2, images=(1, 1, 1, 1), stride=2, config=GemmConfig(16, 16, 16, 4, 2)
    )
    assert out.tolist() == [[math.inf] * 8]
