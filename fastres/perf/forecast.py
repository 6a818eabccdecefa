"""How long kernels should take on a GPU that is not here: a model, never a measurement.

A kernel takes the longer of its time on the chip, by the model with which it picks its tile (waves
of tiles, arithmetic, traffic from L2), and of its bytes through device memory; and a launch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from ..backends.fused import FUSED_KERNELS, FusedKernel, Sizes
from ..backends.kernel_choice import KernelSelector, forced
from ..backends.select import triton_ops
from ..graph import plan
from ..graph.ir import Conv2d, Flatten, Linear
from ..graph.patterns import FusionGroup, Shapes
from ..graph.plan import Shape
from .roofline import H200, cost

CLOCK = 1.755e9  # cycles per second of an H200 under load
LAUNCH_SECONDS = 1.3e-6  # inside a CUDA graph


@dataclass(frozen=True)
class Forecast:
    """A kernel as the planner chooses it.

    Attributes:
        name: of the first step, by its source module.
        what: what serves the steps.
        why: the reason, where there was a choice.
        steps: how many it serves.
        floor: seconds that no kernel can beat.
        seconds: predicted.
    """

    name: str
    what: str
    why: str
    steps: int
    floor: float
    seconds: float


def forecast(
    module: nn.Module,
    shape: Shape,
    dtype: torch.dtype,
    architecture: str = "sm_90",
    kernels: str = "",
) -> tuple[Forecast, ...]:
    """Each kernel that an H200 would run for a network, by the shipped table.

    Args:
        module: a network in eval mode with one image input, fully understood by the planner.
        shape: (N, C, H, W) of its images.
        dtype: float16 or bfloat16.
        architecture: whose table.
        kernels: those that are forced, as FASTRES_KERNELS names them.

    Raises:
        BackendError: Triton is not installed, whose kernels know their own cost.
        ValueError: a step's size is not known, or a kernel's name.
    """
    whole = plan.of_module(module)
    shapes = whole.shapes(shape)
    ops = triton_ops(selector=KernelSelector(architecture, forced=forced(kernels)))
    grouping = ops.group_steps(whole, shapes, dtype, torch.device("cpu"))
    return tuple(
        Forecast(
            group.steps[0].where or group.steps[0].name,
            ops.group_kernel_name(group) if group.kernel else ops.kernel_name(group.steps[0].op),
            why,
            len(group.steps),
            cost(group, shapes, dtype.itemsize, H200).seconds,
            predicted_seconds([group], shapes, dtype.itemsize, ops.by_name.values()),
        )
        for group, why in zip(grouping.groups, grouping.why, strict=True)
        if not isinstance(group.steps[0].op, Flatten)
    )


def predicted_seconds(
    groups: Iterable[FusionGroup],
    shapes: Shapes,
    itemsize: int = 2,
    fused: Iterable[FusedKernel] = FUSED_KERNELS,
) -> float:
    """Seconds of groups run one after the other on an H200, in float16 or bfloat16.

    Args:
        fused: the kernels that run groups of more than one step.

    Raises:
        ValueError: a shape is not known.
    """
    kernels = import_module("fastres.kernels")
    by_name = {kernel.name: kernel for kernel in fused}
    sizes = Sizes(shapes, itemsize, kernels._gpu.HOPPER)
    return sum(_seconds(group, sizes, kernels, by_name.get(group.kernel)) for group in groups)


def _seconds(group: FusionGroup, sizes: Sizes, kernels: Any, fused: FusedKernel | None) -> float:
    step = group.steps[0]
    if all(isinstance(step.op, Flatten) for step in group.steps):
        return 0.0
    sizes.of(step.inputs[0])
    cycles = 0.0  # of what only moves data
    if fused is not None:
        cycles = fused.cycles(kernels, group, sizes)
    elif isinstance(step.op, (Conv2d, Linear)):
        cycles = sizes.matrix_cycles(kernels, step, kernels.conv.CONFIGS["half"])
    moved = cost(group, sizes.shapes, sizes.itemsize, H200).bytes / H200.bytes_per_second
    return max(moved, cycles / CLOCK) + LAUNCH_SECONDS
