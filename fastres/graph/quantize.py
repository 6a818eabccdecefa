"""8 bits on a fused plan: which values are held as bytes, on which grid, and what computes on them.

A grid belongs to a tensor, not to a layer: what reads a tensor reads its bytes, and values that a
step only moves (pooled maxima, slices, padding with zeros, concatenations) share one grid.
(Jacob et al., "Quantization and Training of Neural Networks", 2018, section 2.)
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F

from .ir import (
    Call,
    Conv2d,
    Dequantize,
    Flatten,
    GlobalAvgPool,
    Graph,
    Grid,
    Input,
    MaxPool2d,
    Node,
    Operation,
    Quantize,
    Ref,
    refs,
    substitute,
)
from .plan import Plan, Step, schedule

BYTES = Grid(1.0, 0)  # of 8-bit images as they come in


def pads(op: Operation) -> bool:
    """Whether a step surrounds an image with zeros, which bytes do where zero is their 0."""
    if not isinstance(op, Call) or op.kind != "call_function" or op.target is not F.pad:
        return False
    given = dict(zip(("input", "pad", "mode", "value"), op.args, strict=False)) | op.kwargs
    return given.get("mode", "constant") == "constant" and not given.get("value")


def moves(op: Operation) -> bool:
    """Whether a step's result consists of values of its operands, so that bytes pass through it."""
    if isinstance(op, MaxPool2d) or pads(op):
        return True
    if not isinstance(op, Call) or op.kind != "call_function":
        return False
    if op.target is operator.getitem:
        return len(list(refs(op.args))) == 1
    return op.target in (torch.cat, torch.concat)


def sharing(plan: Plan, nonnegative: Collection[str]) -> dict[str, str]:
    """For each value one that stands for all whose bytes must be on the same grid.

    Args:
        nonnegative: values that are never below 0, whose grids begin there.
    """
    found = {name: name for name in [p.name for p in plan.parameters]}
    for step in plan.steps:
        found[step.name] = step.name
        if moves(step.op) and (not pads(step.op) or set(step.inputs) <= set(nonnegative)):
            joined = {found[name] for name in step.inputs}
            first = found[step.inputs[0]]
            found = {k: first if v in joined else v for k, v in found.items()}
            found[step.name] = first
    return found


def quantize(plan: Plan, grids: Mapping[str, Grid], convolutions: Collection[str]) -> Plan:
    """The plan with these convolutions on bytes, and what that needs between them and the rest.

    Args:
        plan: fused, in floating point.
        grids: of the values that may be held as bytes; those :func:`sharing` one have the same.
        convolutions: names of the steps; all that they read has a grid.
    """
    return _Rewriting(plan, grids, convolutions).run()


class _Rewriting:
    def __init__(self, plan: Plan, grids: Mapping[str, Grid], chosen: Collection[str]) -> None:
        self.plan, self.grids, self.chosen = plan, grids, chosen
        self.nodes = [Node(p.name, Input()) for p in plan.parameters]
        self.held: dict[str, Grid] = {}  # values whose own name is that of bytes
        self.copies: dict[tuple[str, type], str] = {}
        self.written = _written(plan)
        self.passing = {step.name for step in plan.steps if self._passes(step)}

    def run(self) -> Plan:
        wanted: set[str] = set()
        for step in reversed(self.plan.steps):
            if step.name in self.chosen or step.name in self.passing & wanted:
                wanted.update(step.inputs)
        for step in self.plan.steps:
            if isinstance(step.op, Conv2d) and step.name in self.chosen:
                self._convolution(step, step.op, step.name in wanted)
            elif step.name in self.passing & wanted and self._pays(step):
                self._add(step, self._moved(step.op), map(self._bytes, step.inputs))
                self.held[step.name] = self.grids[step.name]
            else:
                self._plain(step)
        output = substitute(self.plan.output, lambda name: Ref(self._float(name)))
        return schedule(Graph(tuple(self.nodes), self.plan.parameters, output))

    def _passes(self, step: Step) -> bool:
        grid = self.grids.get(step.name)
        values = {step.name, *step.inputs}
        if grid is None or not moves(step.op) or (pads(step.op) and grid.zero):
            return False
        return not self.written & values and all(self.grids.get(v) == grid for v in values)

    def _pays(self, step: Step) -> bool:
        """Floats are pooled as they are: their maxima become the same bytes, and are fewer."""
        return not isinstance(step.op, MaxPool2d) or step.inputs[0] in self.held

    def _convolution(self, step: Step, op: Conv2d, wanted: bool) -> None:
        x, *residual = step.inputs
        if op.images is not None:
            self.held[x] = BYTES
        y = self.grids[step.name] if wanted or op.residual else None
        op = replace(
            op,
            x_grid=self.held.get(x) or self.grids[x],
            y_grid=y,
            residual_grid=self.grids[residual[0]] if residual else None,
        )
        inputs = [self._bytes(name) for name in step.inputs]
        if y is None or step.name not in self.written:
            self._add(step, op, inputs)
            self.held |= {step.name: y} if y else {}
        else:  # who writes into the result writes into floats
            name = self._new(f"{step.name}.bytes")
            self.nodes.append(Node(name, op, tuple(inputs), step.where))
            self._add(step, Dequantize(y), [name])

    def _plain(self, step: Step) -> None:
        op = step.op
        if isinstance(op, GlobalAvgPool) and step.inputs[0] in self.held:
            return self._add(step, replace(op, x_grid=self.held[step.inputs[0]]), step.inputs)
        if isinstance(op, Call):
            args, kwargs = substitute((op.args, op.kwargs), lambda name: Ref(self._float(name)))
            op = replace(op, args=args, kwargs=kwargs)
        self._add(step, op, map(self._float, step.inputs))
        if isinstance(op, Call) and op.mutates:
            self.copies.clear()
        return None

    def _moved(self, op: Operation) -> Operation:
        if not isinstance(op, Call):
            return op
        args, kwargs = substitute((op.args, op.kwargs), lambda name: Ref(self._bytes(name)))
        return replace(op, args=args, kwargs=kwargs, any_layout=True)

    def _add(self, step: Step, op: Operation, inputs: Collection[str] | map[str]) -> None:
        inputs = tuple(inputs)
        self.nodes.append(Node(step.name, op, inputs, step.where))

    def _bytes(self, name: str) -> str:
        return name if name in self.held else self._copy(name, Quantize(self.grids[name]))

    def _float(self, name: str) -> str:
        return self._copy(name, Dequantize(self.held[name])) if name in self.held else name

    def _copy(self, name: str, op: Quantize | Dequantize) -> str:
        key = name, type(op)
        if key not in self.copies:
            kind = "bytes" if isinstance(op, Quantize) else "float"
            self.copies[key] = self._new(f"{name}.{kind}")
            self.nodes.append(Node(self.copies[key], op, (name,)))
        return self.copies[key]

    def _new(self, name: str) -> str:
        taken = {node.name for node in self.nodes} | {step.name for step in self.plan.steps}
        while name in taken:
            name += "_"
        return name


def _written(plan: Plan) -> set[str]:
    """Values that PyTorch steps may write into, or into a view of them."""
    found: set[str] = set()
    for step in reversed(plan.steps):
        view = isinstance(step.op, (Call, Flatten)) and step.name in found
        if view or (isinstance(step.op, Call) and step.op.mutates):
            found.update(step.inputs)
    return found


def value_grids(plan: Plan) -> dict[str, Grid]:
    """The grid of each value that is held as bytes.

    Raises:
        ValueError: a step reads bytes where it takes floats, floats where it takes bytes, or bytes
            on another grid; the message names the step.
    """
    images = {
        step.inputs[0]: f"{step.op.images.module}.centered"
        for step in plan.steps
        if isinstance(step.op, Conv2d) and step.op.images and step.op.x_grid
    }
    found: dict[str, Grid] = {}
    for step in plan.steps:
        op = step.op
        got = [found.get(name) for name in step.inputs]
        wanted: list[Grid | None] = [None] * len(got)
        result: Grid | None = None
        if isinstance(op, Conv2d):
            wanted = [op.x_grid, op.residual_grid][: len(got)]
            result = op.y_grid
        elif isinstance(op, Quantize):
            result = op.grid
        elif isinstance(op, Dequantize):
            wanted = [op.grid]
        elif isinstance(op, GlobalAvgPool):
            wanted = [op.x_grid]
        elif moves(op) and any(got):
            result = got[0]
            wanted = [result] * len(got)
            if pads(op) and result and result.zero:
                wanted = [None]
        elif images.get(step.name) == getattr(op, "target", ""):
            result = BYTES
        if got != wanted or (isinstance(op, Conv2d) and not _whole(op)):
            raise ValueError(f"step {step.name} reads other bytes than the steps before it give")
        found |= {step.name: result} if result else {}
    if not found.keys().isdisjoint(refs(plan.output)):
        raise ValueError("the output are bytes")
    return found


def _whole(op: Conv2d) -> bool:
    """Whether a convolution has all grids that go together, or none."""
    if op.x_grid is None:
        return op.y_grid is None and op.residual_grid is None
    if op.residual:
        return op.y_grid is not None and op.residual_grid is not None
    return op.residual_grid is None and (op.images is None or op.x_grid == BYTES)


def quantized_weight(
    weight: torch.Tensor, most: int, least: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (K, C, R, S) as int8 from -most to most, and each channel's scale (K,), float32.

    Scales are not below ``least``, nor below 2^-100, whose products could underflow.
    """
    scale = torch.maximum(weight.double().abs().amax((1, 2, 3)) / most, least.double())
    scale = torch.where(scale > 0, scale, 1.0).clamp_min(2.0**-100).float()
    whole = weight.double() / scale.double().view(-1, 1, 1, 1)
    return whole.round().clamp_(-most, most).to(torch.int8), scale
