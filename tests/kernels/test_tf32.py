"""Operands of TF32 products are rounded to nearest, which the matrix units do not do."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from helpers import nearest_tf32

from fastres.kernels._common import _to_tf32

pytestmark = pytest.mark.interpreter


@triton.jit
def round_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y_ptr + i, _to_tf32(tl.load(x_ptr + i)))


def test_operands_go_to_the_nearest_tf32(device):
    x = torch.randn(1024, device=device) * torch.logspace(-30, 30, 1024, device=device)
    x[:6] = torch.tensor([1 + 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-23, 0.0, -0.0, 3e38])
    y = torch.empty_like(x)
    round_kernel[(1,)](x, y, 1024)
    assert torch.equal(y.view(torch.int32), nearest_tf32(x).view(torch.int32))


def test_what_is_not_finite_stays(device):
    all_ones = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32, device=device)
    x = torch.cat([all_ones.view(torch.float32), all_ones.new_tensor([0, 0]).float()])
    x[2:] = torch.tensor([float("inf"), -float("inf")])
    y = torch.empty_like(x)
    round_kernel[(1,)](x, y, 4)
    assert y[:2].isnan().all()
    assert torch.equal(y[2:], x[2:])
