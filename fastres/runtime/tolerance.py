"""How large an error may be: no more than twice PyTorch's own, measured against float64."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from ..backends.aten import conv_precision, matmul_precision

# Draws of a rounding error: of fewer, an estimate of its size can be wrong by two.
ENOUGH = 64
RULE_OF_TWO = 2.0
# Rounding the result itself costs up to half a unit; sums of a few roundings stay within four.
FLOOR_ULPS = 4.0
# One step in half precision, with float32 sums, is 0.4 units from float64, like PyTorch: a floor is
# needed for exact results alone, and a larger one would hide a wrong eps.
HALF_FLOOR_ULPS = 0.5
HALF_EPS = 2.0**-12  # half precision and TF32 are coarser than this
# Seven sigma: the roundings of a channel may all be one draw, that of its folded weights, and a
# network has tens of thousands of channels.
CHANNEL = 7.0
# Without a more exact answer, two roundings of every one of ~100 layers may add up at random.
UNMEASURED_ULPS = 20.0

Size = TypeVar("Size", float, Tensor)


def allowed_error(own: Size, scale: Size, eps: float, ulps: float = FLOOR_ULPS) -> Size:
    """How far from float64 a candidate may be, by the rule of two.

    Args:
        own: the reference's error in its own precision.
        scale: size of the exact answer, by the same norm as ``own``.
        eps: relative unit in the last place of the candidate's dtype.
        ulps: such units that are allowed besides, where the reference happens to round well.
    """
    return RULE_OF_TWO * own + ulps * eps * scale


def product_eps(dtype: torch.dtype, device: torch.device) -> float:
    """The unit that operands of products are rounded to: TF32's where float32 may be made so."""
    may = "tf32" in (conv_precision(), matmul_precision())
    tf32 = dtype is torch.float32 and device.type == "cuda" and may
    return 2.0**-10 if tf32 else eps_of(dtype)


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def rms(x: Tensor) -> float:
    """Root mean square in float64; 0 of no elements."""
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0
