"""The least time that a plan can take: exact operations and bytes of each kernel over ceilings.

A kernel reads each of its inputs and weights once and writes each of its outputs once; its floor is
the larger of its memory time and its arithmetic time (Williams et al., "Roofline", 2009). Traffic
between caches is not counted, so the floor is a bound, not a forecast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from torch import nn

from ..graph import fold, plan, trace
from ..graph.ir import Conv2d, Flatten, Graph, Input, Linear, Operation
from ..graph.patterns import (
    FusionGroup,
    Pattern,
    Shapes,
    bottleneck_tail,
    expand_project,
    expand_reduce,
    group_steps,
    pool_linear,
    stem_pool,
)
from ..graph.plan import Plan, Step

FUSIONS: dict[str, tuple[Pattern, ...]] = {
    "epilogue per convolution": (),
    "fused stem": (stem_pool,),
    "expand + next reduce": (stem_pool, pool_linear, expand_reduce, expand_project),
    "shifted block": (stem_pool, pool_linear, bottleneck_tail),
}
"""Ways of joining steps, from none to the largest."""


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at most: bytes per second of memory, operations per second.

    ``cache_bytes_per_second`` is what the last cache gives the cores (on a GPU, L2 to the
    multiprocessors), or None where it was not measured; floors do not use it.
    """

    name: str
    bytes_per_second: float
    flop_per_second: float
    cache_bytes_per_second: float | None = None


H200 = Ceilings("H200, fp16", 4.3e12, 790e12)
"""Measured on an H200: device-to-device copy, read plus written, and a large bf16 product."""


@dataclass(frozen=True)
class KernelCost:
    """One kernel's exact work and its floor.

    Attributes:
        flop: operations, a multiply-add counted as two.
        bytes: read plus written, weights included.
        seconds: the floor.
        bound: ``"memory"`` or ``"arithmetic"``.
    """

    name: str
    what: str
    flop: int
    bytes: int
    seconds: float
    bound: str


@dataclass(frozen=True)
class Roofline:
    """All kernels of one way of running a model."""

    fusion: str
    ceilings: Ceilings
    batch: int
    kernels: tuple[KernelCost, ...]

    @property
    def seconds(self) -> float:
        """Floor of the whole."""
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def flop(self) -> int:
        """Operations of the whole."""
        return sum(kernel.flop for kernel in self.kernels)

    @property
    def images_per_second(self) -> float:
        """Throughput at the floor."""
        return self.batch / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **asdict(self),
            "seconds": self.seconds,
            "flop": self.flop,
            "images_per_second": self.images_per_second,
        }


def roofline(
    module: nn.Module,
    input_shape: Sequence[int],
    *,
    fusion: str = "epilogue per convolution",
    itemsize: int = 2,
    ceilings: Ceilings = H200,
) -> Roofline:
    """The floor of a model in inference.

    Args:
        module: any module in eval mode that torch.fx can trace, fully understood by the planner.
        input_shape: (N, C, H, W).
        fusion: ``"none"`` for one kernel per module, as eager PyTorch, or one of :data:`FUSIONS`.
        itemsize: bytes per element of activations and weights.
        ceilings: the machine.

    Raises:
        ValueError: an unknown fusion, or a step whose work is not known.
    """
    if fusion != "none" and fusion not in FUSIONS:
        known = ", ".join(("none", *FUSIONS))
        raise ValueError(f"fusion must be one of {known}; got {fusion!r}")
    graph = trace.trace(module)
    whole = _unfused(graph) if fusion == "none" else plan.build(fold.fold(graph))
    shapes = whole.shapes(tuple(input_shape))
    patterns = {pattern.__name__: pattern for pattern in FUSIONS.get(fusion, ())}
    groups = group_steps(whole, patterns).groups
    kernels = [cost(group, shapes, itemsize, ceilings) for group in groups if not _is_view(group)]
    return Roofline(fusion, ceilings, int(input_shape[0]), tuple(kernels))


def _unfused(graph: Graph) -> Plan:
    steps = tuple(
        Step(node.name, node.op, node.inputs, node.where)
        for node in graph.nodes
        if not isinstance(node.op, Input)
    )
    return Plan(steps, graph.parameters, graph.output)


def _is_view(group: FusionGroup) -> bool:
    return all(isinstance(step.op, Flatten) for step in group.steps)


def cost(group: FusionGroup, shapes: Shapes, itemsize: int, ceilings: Ceilings) -> KernelCost:
    """The exact work of a group in one kernel, for values of these shapes.

    Raises:
        ValueError: a shape is not known.
    """

    def elements(name: str) -> int:
        shape = shapes[name]
        if shape is None:
            raise ValueError(f"the work of {name} is not known: it was left to PyTorch")
        return prod(shape)

    moved = sum(_touched(name, group, shapes, elements(name)) for name in group.inputs)
    moved += sum(elements(name) for name in group.outputs)
    moved += sum(_weights(step.op) for step in group.steps)
    flop = sum(_flop(step.op, elements(step.name)) for step in group.steps)
    in_memory = moved * itemsize / ceilings.bytes_per_second
    in_arithmetic = flop / ceilings.flop_per_second
    last = group.steps[-1]
    return KernelCost(
        name=last.where or last.name,
        what=group.kernel or plan.describe(last.op),
        flop=flop,
        bytes=moved * itemsize,
        seconds=max(in_memory, in_arithmetic),
        bound="memory" if in_memory >= in_arithmetic else "arithmetic",
    )


def _touched(name: str, group: FusionGroup, shapes: Shapes, whole: int) -> int:
    """Elements of an input that are read at all: strides larger than the window skip pixels."""
    read = 0
    for step in group.steps:
        x, y = shapes[name], shapes[step.name]
        if name not in step.inputs:
            continue
        if isinstance(step.op, Conv2d) and step.inputs[0] == name and x and y:
            rows, columns = (
                min(x[2 + i], y[2 + i] * min(step.op.kernel[i], step.op.stride[i])) for i in (0, 1)
            )
            read = max(read, x[0] * x[1] * rows * columns)
        else:
            read = whole
    return read


def _weights(op: Operation) -> int:
    if isinstance(op, Conv2d):
        return op.out_channels * (op.in_channels // op.groups) * prod(op.kernel)
    if isinstance(op, Linear):
        return op.out_features * op.in_features
    return 0


def _flop(op: Operation, outputs: int) -> int:
    """Matrix operations only, as model tables count them; pointwise work hides behind memory."""
    if isinstance(op, Conv2d):
        return 2 * outputs * (op.in_channels // op.groups) * prod(op.kernel)
    if isinstance(op, Linear):
        return 2 * outputs * op.in_features
    return 0
