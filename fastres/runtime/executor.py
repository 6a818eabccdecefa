"""Runs a plan: one executor that walks the steps and lets a backend compute them.

Activations are ordinary torch tensors in channels_last memory, dropped at their last use, so that
torch's allocator reuses their buffers, inside a CUDA graph's private pool as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.aten import AtenOps, residual_fits
from ..backends.memory_format import is_channels_last, to_channels_last
from ..graph.fold import Weights, fold_step
from ..graph.ir import (
    Add,
    AvgPool2d,
    BatchNorm2d,
    Call,
    Conv2d,
    Dequantize,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    Operation,
    Quantize,
    ReLU,
    attribute,
    substitute,
)
from ..graph.patterns import FusionGroup, Grouping, relu_apart, ungrouped
from ..graph.plan import Plan, Shape, Step, parameter_paths
from .inputs import check_inputs, common_shapes

Restore = Callable[[Any], Any]
Observer = Callable[[Step, list[Any], Any], None]


@dataclass(frozen=True)
class _Bound:
    """A group with what computes it, and each of its steps, from the values of their inputs.

    A step that PyTorch computes has none.
    """

    group: FusionGroup
    kernel: Callable[[list[Any]], tuple[Tensor, ...] | None] | None
    steps: tuple[tuple[Step, Callable[..., Any] | None], ...]


@dataclass(frozen=True, eq=False)
class _Schedule:
    """How the plan runs on inputs of one kind."""

    grouping: Grouping
    plan: Plan  # with the kernel of each step
    as_given: frozenset[str]  # parameters that are read in any memory order


class Executor:
    """A plan with weights: ``run`` computes it.

    Args:
        plan: what to run.
        module: where parameters, buffers and called submodules are looked up by path.
        ops: what computes the steps.
        dtype: dtype of weights and activations.
        weights: gives a step's folded weights; by default they are folded from ``module``.
        names: other paths below ``module`` than the plan's, by these.

    Attributes:
        plan: with the kernel of each step: for the last inputs, at first for one common image.
        folds: how often the weights have been folded.
    """

    def __init__(
        self,
        plan: Plan,
        module: nn.Module,
        ops: AtenOps,
        dtype: torch.dtype,
        weights: Callable[[Step], Weights] | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.module = module
        self.names = names or {}
        self.ops = ops
        self.dtype = dtype
        self.weights = weights or self._fold
        self.plan = plan
        self._prepared: dict[str, Any] = {}
        self._finite: dict[str, bool] = {}
        self._finite_weights = True
        self._prepared_groups: dict[str, tuple[Tensor, ...]] = {}
        self._unfused = ungrouped(relu_apart(plan.steps))
        self._schedules: dict[Hashable, _Schedule] = {}
        self._bound: dict[_Schedule | None, tuple[_Bound, ...]] = {}  # None: with ReLU apart
        self._falling_back = Lock()
        self.folds = 0
        self.refold()
        self.plan = self._schedule(common_shapes(plan)).plan

    def refold(self, changed: Collection[str] | None = None) -> None:
        """Read the module's parameters again, into the same storage.

        Args:
            changed: paths of parameters and buffers; only the steps that read one are folded. None
                stands for all.

        Raises:
            FoldError: the numbers of a layer cannot be folded.
        """
        steps = [step for step in self.plan.steps if isinstance(step.op, (Conv2d, Linear))]
        if changed is not None:
            steps = [s for s in steps if not set(parameter_paths(s.op)).isdisjoint(changed)]
        with torch.inference_mode(False), torch.no_grad():
            folded = {step.name: self.weights(step) for step in steps}
            if changed is None:
                self._device = next((w.device for w, *_ in folded.values()), torch.device("cpu"))
            for step in steps:
                self._prepared[step.name] = self._prepare(step, folded[step.name])
            if not self.plan.source_layout:
                for group in self.ops.candidates(self.plan, self.dtype, self._device):
                    if any(step.name in folded for step in group.steps):
                        self._prepare_group(group)
            if self.ops.fused_relu_drops_nan:
                self._finite |= {name: all(map(_is_finite, pair)) for name, pair in folded.items()}
                self._finite_weights = all(self._finite.values())
        _settle(t for pair in folded.values() for t in pair if t is not None)
        self._bound = {}  # another dictionary: a call in another thread may still fill that one
        self.folds += 1

    def _fold(self, step: Step) -> Weights:
        return fold_step(step.op, self._lookup, self.dtype)

    def _prepare(self, step: Step, weights: Weights) -> Any:
        assert isinstance(step.op, (Conv2d, Linear))
        if step.name in self._prepared:
            return self.ops.update(step.op, self._prepared[step.name], weights)
        return self.ops.prepare(step.op, weights)

    def _prepare_group(self, group: FusionGroup) -> None:
        """What a group's kernel needs beside its steps' weights, in the same storage as before."""
        fresh = self.ops.prepare_group(group, self._weights_of(group))
        held = self._prepared_groups.setdefault(group.kernel + group.steps[0].name, fresh)
        for old, new in zip(held, fresh, strict=True):
            if old is not new:
                old.copy_(new)

    def _weights_of(self, group: FusionGroup) -> list[Any]:
        return [self._prepared.get(step.name) for step in group.steps]

    def run(
        self,
        arguments: Sequence[Any],
        observe: Observer | None = None,
        contiguous: bool | None = None,
    ) -> Any:
        """The plan's output for these arguments, one per parameter of the plan.

        Args:
            observe: called after each step with the step, its inputs and its result; nothing is
                computed in place then.
            contiguous: whether outputs are row-major, not channels_last; by default as arguments.

        Raises:
            InputError, InputTypeError: an argument does not fit; nothing was computed.
        """
        names = [parameter.name for parameter in self.plan.parameters]
        values: dict[str, Any] = dict(zip(names, arguments, strict=True))
        schedule, is_new = self._checked_schedule(values, observe is not None)
        if is_new:
            self.compile_ahead([arguments], observe=observe and (lambda *_: None))
        self.plan = schedule.plan
        if contiguous is None:
            contiguous = not any(is_channels_last(v) for v in arguments)
        restore = self.ops.restore(contiguous)
        if not self.plan.source_layout:
            for name in values.keys() - schedule.as_given:
                values[name] = to_channels_last(values[name])
        ops = self.ops
        try:
            for bound in self._bound_groups(schedule, arguments, observe):
                fused = bound.kernel
                outputs = fused([values[n] for n in bound.group.inputs]) if fused else None
                if outputs is not None:
                    values.update(zip(bound.group.outputs, outputs, strict=True))
                for step, compute in bound.steps if outputs is None else ():
                    inputs = [values[name] for name in step.inputs]
                    result = compute(*inputs) if compute else self._call(step, values, restore)
                    if observe is not None:
                        observe(step, inputs, result)
                    values[step.name] = restore(result) if self.plan.source_layout else result
                for step in bound.group.steps:
                    for name in step.frees:
                        values.pop(name, None)
        except RuntimeError as error:
            if not self.fall_back(error, ops):
                raise
            return self.run(arguments, observe, contiguous)
        return substitute(self.plan.output, lambda name: restore(values[name]))

    def compile_ahead(
        self,
        calls: Iterable[Sequence[Any]],
        tell: Callable[[int, int], Any] | None = None,
        observe: Observer | None = None,
    ) -> None:
        """Compile all kernels of these calls at once, where a GPU is to run them.

        Args:
            calls: the arguments of each.
            tell: called with (kernels compiled, kernels to compile).
            observe: as for :meth:`run`, with results that were not computed.
        """

        def run() -> None:
            for arguments in calls:
                self.run(arguments, observe)

        if not self.plan.fallbacks:  # PyTorch's steps may look at what no kernel has computed
            self.ops.compile_ahead(run, self._device, tell)

    def fall_back(self, why: Exception | str, ops: AtenOps | None = None) -> bool:
        """Go on with what ``ops``, those of now by default, name instead, if anything.

        The steps before the failure wrote to values of that run alone, so it can be repeated.
        """
        with self._falling_back:
            if ops is None or self.ops is ops:
                plainer = self.ops.instead(why, self._device)
                if plainer is None:
                    return False
                self.ops, self._prepared, self._prepared_groups = plainer, {}, {}
                self.refold()  # schedules of the others have another setting in their key
        return True

    def plan_for(self, *shapes: Shape) -> Plan:
        """The plan with the kernel of each step for inputs of these shapes, one per parameter."""
        names = (parameter.name for parameter in self.plan.parameters)
        return self._schedule(dict(zip(names, map(tuple, shapes), strict=True))).plan

    def reads_any_order(self, x: Tensor) -> bool:
        """Whether the image ``x``, the only argument, is read in the memory order that it has."""
        (parameter,) = self.plan.parameters
        if self.plan.source_layout or x.dim() != 4 or not x.is_floating_point():
            return True
        schedule = self._schedule({parameter.name: tuple(x.shape)}, x.device)
        return parameter.name in schedule.as_given

    def _bound_groups(
        self, schedule: _Schedule, arguments: Sequence[Any], observe: Observer | None
    ) -> tuple[_Bound, ...]:
        """The schedule's groups, with ReLU apart where it could meet NaN and would drop it."""
        if observe is not None:
            plain = (replace(step, in_place=False) for step in self.plan.steps)
            return tuple(map(self._bind_group, ungrouped(plain)))
        key: _Schedule | None = schedule
        if self.ops.fused_relu_drops_nan:
            overflows = self.dtype is torch.float16
            if overflows or not self._finite_weights or not all(map(_is_finite, arguments)):
                key = None
        bound = self._bound
        if key not in bound:
            groups = self._unfused if key is None else key.grouping.groups
            bound[key] = tuple(map(self._bind_group, groups))
        return bound[key]

    def _bind_group(self, group: FusionGroup) -> _Bound:
        kernel = None
        if group.kernel:
            extra = self._prepared_groups[group.kernel + group.steps[0].name]
            kernel = partial(self.ops.run_group, group, self._weights_of(group), extra)
        return _Bound(group, kernel, tuple((step, self._bind(step)) for step in group.steps))

    def _bind(self, step: Step) -> Callable[..., Any] | None:
        """What computes the step from the values of its inputs; None for what PyTorch computes."""
        op: Any = step.op
        ops: Any = self.ops
        weighted = partial(self._bind_weights, step)
        match op:
            case Conv2d(residual=True):
                return weighted(partial(self._conv_add, step))
            case Conv2d():
                return weighted(partial(ops.conv, op, residual=None, in_place=False))
            case Linear():
                return weighted(partial(ops.linear, op))
            case BatchNorm2d():
                return partial(self._batch_norm, op)
            case ReLU():
                return partial(ops.relu, in_place=step.in_place)
            case Add():
                return partial(self._add, op.relu, step.in_place)
            case MaxPool2d():
                return partial(ops.max_pool, op)
            case AvgPool2d():
                return partial(ops.avg_pool, op)
            case GlobalAvgPool():
                return partial(ops.global_avg_pool, op)
            case Quantize():
                return partial(ops.quantize, op.grid)
            case Dequantize():
                return partial(ops.dequantize, op.grid)
        return None

    def _bind_weights(self, step: Step, compute: Callable[..., Any]) -> Callable[..., Any]:
        compute = partial(compute, self._prepared[step.name])
        return partial(self._autocast, compute) if self.plan.fallbacks else compute

    def _checked_schedule(
        self, values: Mapping[str, Any], observed: bool
    ) -> tuple[_Schedule, bool]:
        """How to run on these values, whose kind is checked when it is first met, as it is now."""
        key = (
            self.ops.setting(),
            observed,
            *(
                (tuple(v.shape), v.dtype, v.device) if isinstance(v, Tensor) else None
                for v in values.values()
            ),
        )
        if (found := self._schedules.get(key)) is not None:
            return found, False
        check_inputs(self.plan, values, self.dtype)
        if len(self._schedules) > 256:
            self._schedules, self._bound = {}, {}
        tensors = {name: v for name, v in values.items() if isinstance(v, Tensor)}
        device = next((t.device for t in tensors.values()), None)
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        found = self._schedules[key] = self._schedule(shapes, device)
        return found, True

    def _schedule(
        self, given: Mapping[str, Shape], device: torch.device | None = None
    ) -> _Schedule:
        """How to run on inputs of these shapes, by default on the weights' device."""
        plan = self.plan
        if plan.source_layout:
            grouping = Grouping(ungrouped(plan.steps))
        else:
            shapes = plan.shapes(*(given.get(p.name) for p in plan.parameters))
            grouping = self.ops.group_steps(plan, shapes, self.dtype, device or self._device)
        planned = replace(
            plan,
            kernels=_kernel_names(grouping.groups, self.ops),
            reasons=_reasons(grouping) if any(grouping.why) else (),
            chosen_for=tuple(given.values()) if any(grouping.why) else (),
        )
        return _Schedule(grouping, planned, _read_as_given(grouping.groups, plan, self.ops))

    def _lookup(self, path: str) -> Any:
        return attribute(self.module, self.names.get(path, path))

    def _conv_add(self, step: Step, prepared: Any, x: Tensor, residual: Any) -> Tensor:
        op: Any = step.op
        if residual_fits(op, x, residual):
            return self.ops.conv(op, prepared, x, residual, step.in_place)
        ops: Any = self.ops
        bare = replace(op, relu=False, residual=False, y_grid=None)
        total = ops.conv(bare, prepared, x, None, False)
        if op.y_grid is None:
            return self._add(op.relu, False, total, residual)
        residual = ops.dequantize(op.residual_grid, residual)
        return ops.quantize(op.y_grid, self._add(op.relu, False, total, residual))

    def _autocast(self, compute: Callable[..., Any], x: Tensor, *others: Any) -> Any:
        """Under autocast a PyTorch step may have widened ``x``; the weights stay as they are."""
        widened = x.dtype is not self.dtype and torch.is_autocast_enabled(x.device.type)
        return compute(x.to(self.dtype) if widened else x, *others)

    def _batch_norm(self, op: BatchNorm2d, x: Tensor) -> Tensor:
        weight, bias = (self._lookup(p) if p else None for p in (op.weight, op.bias))
        mean, var = self._lookup(op.mean), self._lookup(op.var)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, op.eps)

    def _add(self, relu: bool, in_place: bool, x: Any, *others: Any) -> Any:
        y = others[0] if others else x
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            return (x + y).relu() if relu else x + y
        alike = x.shape == y.shape and x.dtype == y.dtype
        return self.ops.add(x, y, relu, in_place and alike)

    def _call(self, step: Step, values: dict[str, Any], restore: Restore) -> Any:
        op: Any = step.op
        if isinstance(op, Flatten):
            return restore(values[step.inputs[0]]).flatten(1)
        if op.kind == "get_attr":
            return self._lookup(op.target)
        fetch = values.__getitem__ if op.any_layout else lambda name: restore(values[name])
        args, kwargs = substitute(op.args, fetch), substitute(op.kwargs, fetch)
        if op.kind == "call_module":
            return self._lookup(op.target)(*args, **kwargs)
        if op.kind == "call_method":
            return getattr(args[0], op.target)(*args[1:], **kwargs)
        return op.target(*args, **kwargs)


def _read_as_given(groups: Sequence[FusionGroup], plan: Plan, ops: AtenOps) -> frozenset[str]:
    """The parameters that only kernels read which take any memory order."""
    readers = {p.name: [g for g in groups if p.name in g.inputs] for p in plan.parameters}
    return frozenset(
        name
        for name, read_by in readers.items()
        if read_by and all(map(ops.reads_any_layout, read_by))
    )


def _kernel_names(groups: Sequence[FusionGroup], ops: AtenOps) -> tuple[str, ...]:
    """What computes each step, for the plan's table."""
    return tuple(
        ops.group_kernel_name(group) if group.kernel else _kernel_name(ops, step.op)
        for group in groups
        for step in group.steps
    )


def _reasons(grouping: Grouping) -> tuple[str, ...]:
    """Why each step is served as it is, said once for a group."""
    said: list[str] = []
    for group, why in zip(grouping.groups, grouping.why, strict=True):
        said += [why, *("as above" for _ in group.steps[1:])]
    return tuple(said)


def _kernel_name(ops: AtenOps, op: Operation) -> str:
    if isinstance(op, (Call, BatchNorm2d)):
        return ""
    slow = ops.emulated and isinstance(op, (Conv2d, Linear))
    return f"{ops.kernel_name(op)}, emulated" if slow else ops.kernel_name(op)


def _settle(tensors: Iterable[Tensor]) -> None:
    """Wait until folded weights are there, for calls on other streams know nothing of this one."""
    for device in {t.device for t in tensors if t.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def _is_finite(value: Any) -> bool:
    """Whether a tensor's sum is finite, which only NaN, infinities or huge numbers prevent."""
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return not floating or math.isfinite(value.sum().item())
