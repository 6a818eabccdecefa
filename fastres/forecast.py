"""How long kernels should take on a GPU that is not here: a model, never a measurement.

A kernel takes the longer of its time on the chip, by the model with which it picks its tile (waves
of tiles, arithmetic, traffic from L2), and of its bytes through device memory; and a launch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from math import prod
from typing import Any

import torch
from torch import nn

from . import plan
from .choices import Choices, forced
from .ir import Conv2d, Flatten, Linear
from .plan import Shape
from .roofline import H200, cost
from .triton_ops import TritonOps
from .tuning import Group, Shapes

CLOCK = 1.755e9  # cycles per second of an H200 under load
LAUNCH_SECONDS = 1.3e-6  # inside a CUDA graph
H200_SHAPE = (132, 227 * 1024)
"""SMs, and shared memory in bytes that a block may have."""


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
    ops = TritonOps(choices=Choices(architecture, forced=forced(kernels)))
    arranged = ops.arrange(whole, shapes, dtype, torch.device("cpu"))
    return tuple(
        Forecast(
            group.steps[0].where or group.steps[0].name,
            ops.serves_group(group) if group.kernel else ops.serves(group.steps[0].op),
            why,
            len(group.steps),
            cost(group, shapes, dtype.itemsize, H200).seconds,
            predicted_seconds([group], shapes, dtype.itemsize),
        )
        for group, why in zip(arranged.groups, arranged.why, strict=True)
        if not isinstance(group.steps[0].op, Flatten)
    )


def predicted_seconds(groups: Iterable[Group], shapes: Shapes, itemsize: int = 2) -> float:
    """Seconds of groups run one after the other on an H200, in float16 or bfloat16.

    Raises:
        ValueError: a shape is not known.
    """
    return sum(_seconds(group, shapes, itemsize) for group in groups)


def _seconds(group: Group, shapes: Shapes, itemsize: int) -> float:
    if all(isinstance(step.op, Flatten) for step in group.steps):
        return 0.0
    moved = cost(group, shapes, itemsize, H200).bytes / H200.bytes_per_second
    return max(moved, _cycles(group, shapes, itemsize) / CLOCK) + LAUNCH_SECONDS


def _cycles(group: Group, shapes: Shapes, itemsize: int) -> float:
    """Cycles on the chip; 0 for what only moves data."""
    first, last = group.steps[0], group.steps[-1]
    x, y = shapes[first.inputs[0]], shapes[first.name]
    if x is None or y is None:
        raise ValueError(f"the size of {first.name} is not known")
    machine = _kernels("_config").Machine(*H200_SHAPE)
    rows = prod(y) // y[1]
    if group.kernel in ("stem", "stem_hwnc"):
        stem, pooled = _kernels("stem"), shapes[last.name]
        assert pooled is not None
        problem = stem._Problem(pooled[0], pooled[1], pooled[2], pooled[3])
        return _best(stem.estimated_cycles, stem.CONFIGS["half"], problem, machine)
    if group.kernel == "head":
        head, op = _kernels("head"), last.op
        assert isinstance(op, Linear)
        problem = head._Problem(x[0], op.out_features, x[1], prod(x[2:]), itemsize)
        row = head.select_config(problem, machine)
        return float(head.estimated_cycles(row, problem, machine))
    if group.kernel == "rot2":
        rot2 = _kernels("rot2")
        sizes = (rows, x[1], y[1], _outputs(last.op), machine)
        row = rot2.select_config(rot2.CONFIGS, *sizes)
        return float(rot2.estimated_cycles(row, *sizes))
    if group.kernel == "sliding_block":
        block, reduced = _kernels("sliding_fused"), 0
        if len(group.steps) > 2:
            reduced = _outputs(last.op)
        size, expanded = (y[2], y[3], y[0]), _outputs(group.steps[1].op)
        row = block.select_config(block.CONFIGS, size, expanded, reduced, machine)
        return float(block.estimated_cycles(row, size, expanded, reduced, machine))
    channels = x[1]
    if group.kernel == "gemm_pair":
        projected = shapes[last.inputs[0]]
        assert projected is not None
        channels += projected[1]
    return _matrix_cycles(group, y, channels, itemsize, machine)


def _matrix_cycles(group: Group, y: Shape, channels: int, itemsize: int, machine: Any) -> float:
    op = group.steps[0].op
    if not isinstance(op, (Conv2d, Linear)):
        return 0.0
    config = _kernels("_config")
    taps, groups = (prod(op.kernel), op.groups) if isinstance(op, Conv2d) else (1, 1)
    outputs = _outputs(op) // groups
    problem = config.Problem(prod(y) // y[1], outputs, channels // groups, taps, groups, itemsize)
    file = {"gemm": "gemm", "gemm_pair": "gemm", "conv2d_hwnc": "hwnc"}.get(group.kernel, "conv")
    table = _kernels(file).CONFIGS["half"]
    if group.kernel == "gemm_pair":
        table = [row for row in table if not row.persistent]
    row = config.select_config(table, problem, "half", machine)
    cycles = float(config.estimated_cycles(row, problem, "half", machine))
    if group.kernel == "conv2d_hwnc" and isinstance(op, Conv2d):
        return min(cycles, _sliding_cycles(op, y, machine))
    return cycles


def _sliding_cycles(op: Conv2d, y: Shape, machine: Any) -> float:
    """Cycles of the sliding form of a convolution in HWNC, infinite where it has none."""
    sliding = _kernels("sliding")
    if not sliding.supports(op.in_channels, op.kernel, op.stride[0], op.padding[0], torch.half):
        return float("inf")
    size = (y[2], y[3], y[0], y[1])
    return _best(sliding.estimated_cycles, sliding.CONFIGS, size, machine)


def _outputs(op: Any) -> int:
    return op.out_channels if isinstance(op, Conv2d) else op.out_features


def _best(cycles: Any, rows: Iterable[Any], problem: Any, machine: Any) -> float:
    return float(min(cycles(row, problem, machine) for row in rows))


@cache
def _kernels(name: str) -> Any:
    return import_module(f"fastres.kernels.{name}")
