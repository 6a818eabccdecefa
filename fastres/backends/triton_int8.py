"""8-bit steps by fastres' own Triton kernels: the numbers are those of every other device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..graph.fold import Weights
from ..graph.ir import Conv2d, Dequantize, Grid, Linear, MaxPool2d, Operation, Quantize
from ..graph.patterns import FusionGroup
from .aten import AtenOps
from .memory_format import CHANNELS_LAST, images_to_channels_last, is_channels_last
from .onednn_int8 import Int8Ops, in_8_bits
from .triton import TritonOps


class TritonInt8Ops(Int8Ops, TritonOps):
    """CUDA, or CPU tensors under Triton's interpreter; steps in floats run as without 8 bits."""

    def prepare(self, op: Conv2d | Linear, weights: Weights) -> Any:
        prepared: Any = super().prepare(op, weights)
        if not in_8_bits(op) or op.x_grid is None:
            return prepared
        weight, bias, scale = prepared
        weight = weight.contiguous(memory_format=CHANNELS_LAST)
        shift = self.kernels.conv_int8.shift_of(weight, op.x_grid.zero)
        return weight, bias.float(), (scale * op.x_grid.scale).float(), shift

    def conv(
        self, op: Conv2d, prepared: Any, x: Tensor, residual: Tensor | None, in_place: bool
    ) -> Tensor:
        if op.x_grid is None:
            return super().conv(op, prepared, x, residual, in_place)
        weight, bias, scale, shift = prepared
        more: dict[str, Any] = {}
        if residual is not None:
            residual = residual.contiguous(memory_format=CHANNELS_LAST)
            more = {"residual": residual, "residual_grid": _pair(op.residual_grid)}
        y: Tensor = self.kernels.conv_int8.conv2d_int8(
            x.contiguous(memory_format=CHANNELS_LAST),
            weight,
            scale,
            bias,
            x_zero=op.x_grid.zero,
            shift=shift,
            stride=op.stride,
            padding=op.padding,
            dilation=op.dilation,
            groups=op.groups,
            relu=op.relu,
            y_grid=_pair(op.y_grid),
            dtype=self._dtype,
            out=residual if in_place else None,
            workspace=self.workspace,
            **more,
        )
        return y

    def max_pool(self, op: MaxPool2d, x: Tensor) -> Tensor:
        return TritonOps.max_pool(self, op, x)

    def _as_bytes(self, grid: Grid, x: Tensor) -> Tensor:
        if not (x.is_contiguous() or is_channels_last(x)):
            x = x.contiguous()
        y: Tensor = self.kernels.elementwise.to_bytes(x, grid.scale, grid.zero)
        converted: Tensor = images_to_channels_last(y)  # of bytes, which is less to move
        return converted

    def may_look(self) -> bool:
        return super().may_look() and not self.kernels.COMPILING.get()

    def instead(self, why: Exception | str, device: torch.device) -> AtenOps | None:
        """The same numbers by PyTorch's operators, for this process and device."""
        return TritonOps.instead(self, why, device) and Int8Ops(self._dtype)

    def kernel_name(self, op: Operation) -> str:
        if in_8_bits(op):
            return "triton conv2d, int8"
        if isinstance(op, Quantize):
            return "triton to_bytes"
        by_torch = isinstance(op, Dequantize) or getattr(op, "x_grid", None)
        return "aten" if by_torch else TritonOps.kernel_name(self, op)

    def _supports(self, group: FusionGroup, dtype: torch.dtype, device: torch.device) -> bool:
        in_floats = all(getattr(step.op, "x_grid", None) is None for step in group.steps)
        return in_floats and super()._supports(group, dtype, device)


def _pair(grid: Grid | None) -> tuple[float, int] | None:
    return (grid.scale, grid.zero) if grid else None
