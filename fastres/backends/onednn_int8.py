"""What computes the 8-bit steps: oneDNN's integer convolutions, or their definition in floats."""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..graph.fold import Weights
from ..graph.ir import Conv2d, GlobalAvgPool, Grid, Linear, MaxPool2d, Operation
from .aten import AtenOps, OneDNNOps, PackedWeight
from .memory_format import CHANNELS_LAST, images_to_channels_last

CLIPPED = 0.01  # of the first values that are met on a grid: more are not those it was made for


class Int8Ops(AtenOps):
    """8-bit steps on any device, as they are defined: whole numbers in floating point.

    An 8-bit convolution's weights are int8 (K, C/groups, R, S), its bias and the scale of each
    channel (K,) float32 or wider, in which everything is computed.

    Args:
        dtype: of what is not bytes; half precisions are rounded to at the end of a step.
        more: what the backend of the steps in floats takes.
    """

    most = 127  # the largest weight

    def __init__(self, dtype: torch.dtype = torch.float32, **more: Any) -> None:
        super().__init__(**more)
        self._dtype = dtype
        self._met: set[Grid] = set()

    def prepare(self, op: Conv2d | Linear, weights: Weights) -> Any:
        return weights if in_8_bits(op) else super().prepare(op, weights)

    def conv(
        self, op: Conv2d, prepared: Any, x: Tensor, residual: Tensor | None, in_place: bool
    ) -> Tensor:
        if op.x_grid is None:
            return super().conv(op, prepared, x, residual, in_place)
        weight, bias, scale = prepared
        wide = _wide(self._dtype)
        whole = x.to(wide) - op.x_grid.zero
        geometry = (op.stride, op.padding, op.dilation, op.groups)
        y = F.conv2d(whole, weight.to(wide), None, *geometry)
        y = y * (scale * op.x_grid.scale).view(-1, 1, 1) + bias.view(-1, 1, 1)
        if residual is not None and op.residual_grid is not None:
            y = y + self._number(op.residual_grid, residual)
        if op.relu:
            y = y.relu_()
        return y.to(self._dtype) if op.y_grid is None else _to_bytes(_rounded(op.y_grid, y))

    def max_pool(self, op: MaxPool2d, x: Tensor) -> Tensor:
        if x.dtype is torch.uint8:
            return super().max_pool(op, x.float()).to(torch.uint8)
        return super().max_pool(op, x)

    def global_avg_pool(self, op: GlobalAvgPool, x: Tensor) -> Tensor:
        grid = op.x_grid
        if grid is None:
            return super().global_avg_pool(op, x)
        pixels = x.shape[-1] * x.shape[-2]
        total = x.sum(op.dims, keepdim=op.keepdim, dtype=torch.int32) - grid.zero * pixels
        return (total.to(_wide(self._dtype)) * (grid.scale / pixels)).to(self._dtype)

    def quantize(self, grid: Grid, x: Tensor) -> Tensor:
        """Bytes of a floating-point tensor, images in channels_last memory.

        Raises:
            InputError: it holds NaN or infinity, for which there is no byte.
        """
        if self.may_look():
            if not math.isfinite(x.sum(dtype=_wide(x.dtype)).item()):
                raise InputError(
                    "the images, or what the network made of them, hold NaN or infinity, which 8 "
                    "bits cannot carry"
                )
            if grid not in self._met:
                self._met.add(grid)
                _warn_of_clipping(grid, _rounded(grid, x))
        return self._as_bytes(grid, x)

    def _as_bytes(self, grid: Grid, x: Tensor) -> Tensor:
        return _to_bytes(_rounded(grid, x))

    def may_look(self) -> bool:
        """Whether values are there to be looked at: while a CUDA graph is captured there are none,
        and none in its replays."""
        return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())

    def dequantize(self, grid: Grid, x: Tensor) -> Tensor:
        return self._number(grid, x).to(self._dtype)

    def _number(self, grid: Grid, x: Tensor) -> Tensor:
        return x.to(_wide(self._dtype)).sub_(grid.zero).mul_(grid.scale)

    def kernel_name(self, op: Operation) -> str:
        name = super().kernel_name(op)
        return f"{name}, 8 bits in floats" if in_8_bits(op) else name


class OneDNNInt8Ops(Int8Ops, OneDNNOps):
    """The CPU: bytes times int8, int32 sums; bias, residual, ReLU and requantising in one kernel.

    A processor without dot products of bytes (VNNI) adds two products in 16 bits: 255 * 127 * 2
    saturates there, 255 * 64 * 2 does not, so that it gets weights of 7 bits.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        self.most = 127 if int8_products() == "exact" else 64
        self._int8 = torch.ops.onednn.qconv2d_pointwise.default
        self._int8_sum = torch.ops.onednn.qconv2d_pointwise.binary

    def prepare(self, op: Conv2d | Linear, weights: Weights) -> Any:
        prepared: Any = super().prepare(op, weights)
        return _PackedInt8(prepared, self.most) if in_8_bits(op) else prepared

    def conv(
        self, op: Conv2d, prepared: Any, x: Tensor, residual: Tensor | None, in_place: bool
    ) -> Tensor:
        grid = op.x_grid
        if grid is None:
            return super().conv(op, prepared, x, residual, in_place)
        packed: _PackedInt8 = prepared
        x = x.contiguous(memory_format=CHANNELS_LAST)
        weight = packed.weight(op, x), packed.scale, packed.zeros
        geometry = op.stride, op.padding, op.dilation, op.groups
        relu = "relu" if op.relu else "none"
        y: Any = (1.0, 0, torch.float32)
        if op.y_grid is not None:
            y = (op.y_grid.scale, op.y_grid.zero, torch.uint8)
        of_x = (x, grid.scale, grid.zero)
        if residual is None or op.residual_grid is None:
            found: Tensor = self._int8(*of_x, *weight, packed.bias, *geometry, *y, relu, [], "")
            return found if op.y_grid else found.to(self._dtype)
        if not in_place:  # the sum is written over the residual
            residual = residual.clone(memory_format=CHANNELS_LAST)
        of_sum: Any = (op.residual_grid.scale, op.residual_grid.zero, "sum", 1.0, relu, [], "")
        return self._int8_sum(*of_x, *weight, residual, packed.bias, *geometry, *y, *of_sum)

    def max_pool(self, op: MaxPool2d, x: Tensor) -> Tensor:
        if x.dtype is not torch.uint8:
            return super().max_pool(op, x)
        window = (list(v) for v in (op.kernel, op.stride, op.padding, op.dilation))
        return torch.ops.quantized.max_pool2d(x, *window, op.ceil_mode)

    def kernel_name(self, op: Operation) -> str:
        if not in_8_bits(op):
            return OneDNNOps.kernel_name(self, op)
        return "oneDNN int8 conv" + ", 7-bit weights: no VNNI" * (self.most < 127)


class _PackedInt8(PackedWeight):
    """As its base, of int8 weights."""

    __slots__ = ("scale", "zeros")

    def __init__(self, weights: tuple[Tensor, Tensor, Tensor], most: int) -> None:
        weight, bias, scale = weights
        if int(weight.abs().amax()) > most:
            weight = (weight * (most / 127)).round().to(torch.int8)
            scale = scale * (127 / most)
        super().__init__(weight, bias)
        self.scale = scale
        self.zeros = torch.zeros(len(scale), dtype=torch.int32)

    def reordered(self, dense: Tensor, op: Conv2d, x: Tensor) -> Tensor:
        assert op.x_grid is not None
        grid = op.x_grid.scale, op.x_grid.zero
        geometry = op.stride, op.padding, op.dilation, op.groups
        shape = [max(size, 1) for size in x.shape]
        found: Tensor = torch.ops.onednn.qconv_prepack(dense, self.scale, *grid, *geometry, shape)
        return found


def in_8_bits(op: Operation) -> TypeGuard[Conv2d]:
    return isinstance(op, Conv2d) and op.x_grid is not None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rounded(grid: Grid, x: Tensor) -> Tensor:
    """What is to be clamped to bytes; halves go to the even neighbour."""
    return (x.to(_wide(x.dtype)) / grid.scale).round_().add_(grid.zero)


def _to_bytes(rounded: Tensor) -> Tensor:
    found: Tensor = images_to_channels_last(rounded.clamp_(0, 255).to(torch.uint8))
    return found


def _warn_of_clipping(grid: Grid, y: Tensor) -> None:
    outside = float(((y < 0) | (y > 255)).float().mean()) if y.numel() else 0.0
    if outside > CLIPPED:
        low, high = ((q - grid.zero) * grid.scale for q in (0, 255))
        warnings.warn(
            f"{outside:.0%} of the values of an 8-bit step lie outside of {low:.3g} to {high:.3g}, "
            "the range that it was calibrated for: were these images prepared in another way?",
            stacklevel=2,
        )


@cache
def int8_products() -> str:
    """How oneDNN sums products of bytes and int8 here: exact, saturating, or not at all (empty).

    What torch says of the processor is not asked: oneDNN may have been told to use less of it.
    """
    weight = torch.full((16, 64, 3, 3), 127, dtype=torch.int8)
    x = torch.full((1, 64, 4, 4), 255, dtype=torch.uint8).contiguous(memory_format=CHANNELS_LAST)
    geometry: Any = ([1, 1], [0, 0], [1, 1], 1)
    scale, zeros = torch.ones(16), torch.zeros(16, dtype=torch.int32)
    onednn = torch.ops.onednn
    try:
        packed = onednn.qconv_prepack(weight, scale, 1.0, 0, *geometry, list(x.shape))
        result: Any = (1.0, 0, torch.float32, "none", [], "")
        y = onednn.qconv2d_pointwise(x, 1.0, 0, packed, scale, zeros, None, *geometry, *result)
    except (RuntimeError, AttributeError):  # a build without oneDNN, or another processor's
        return ""
    exact = 64 * 9 * 255 * 127
    return "exact" if float((y - exact).abs().max()) < 1e-5 * exact else "saturating"
