"""What a plan takes: checks of its arguments before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError
from ..graph.ir import Conv2d
from ..graph.plan import Plan, Shape


def check_inputs(plan: Plan, values: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Refuse, before anything runs, what the plan's convolutions cannot take.

    Raises:
        InputTypeError: not a tensor where a convolution reads it, or another dtype.
        InputError: wrong rank or channel count, or an image too small for a window.
    """
    names = {parameter.name for parameter in plan.parameters}
    for step in plan.steps:
        for name in set(step.inputs[:1]) & names:
            if isinstance(step.op, Conv2d):
                _check_image(name, values[name], step.op, dtype)
    shapes = plan.shapes(
        *(tuple(v.shape) if isinstance(v, Tensor) else None for v in values.values())
    )
    for step in plan.steps:
        shape = shapes[step.name]
        if shape is not None and any(size <= 0 for size in shape[2:]):
            source = next(tuple(v.shape) for v in values.values() if isinstance(v, Tensor))
            raise InputError(
                f"the image is too small: input {source} leaves {tuple(shape[2:])} pixels "
                f"at {step.where or step.name}"
            )


def _check_image(name: str, x: Any, op: Conv2d, dtype: torch.dtype) -> None:
    if not isinstance(x, Tensor):
        raise InputTypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}")
    if x.dim() != 4:
        raise InputError(f"{name} must be 4-D (N, C, H, W); got shape {tuple(x.shape)}")
    if x.shape[1] != op.in_channels:
        raise InputError(
            f"{name} must have {op.in_channels} channels (axis 1); got shape {tuple(x.shape)}"
        )
    if x.dtype is not dtype:
        raise InputTypeError(f"{name} must be {dtype}, the dtype of the weights; got {x.dtype}")


def common_shapes(plan: Plan) -> dict[str, Shape]:
    """One image of 224x224 for each parameter that a convolution reads."""
    found: dict[str, Shape] = {}
    for parameter in plan.parameters:
        readers = (s.op for s in plan.steps if parameter.name in s.inputs[:1])
        channels = next((op.in_channels for op in readers if isinstance(op, Conv2d)), None)
        if channels is not None:
            found[parameter.name] = (1, channels, 224, 224)
    return found
