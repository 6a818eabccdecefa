"""Measures which kernel is the fastest for the pieces of a plan: right answers first, then seconds.

A piece is a step, or steps that one kernel can serve; equal pieces are measured once. A kernel
whose answer is wrong, or that fails, gets no time. :func:`tune_shape` does it for one shape on the
operands of a call, :mod:`fastres.perf.autotune` for all kernels that there are; both keep what they
find with :mod:`fastres.backends.kernel_choice`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from threading import Lock
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..backends.aten import AtenOps
from ..backends.kernel_choice import (
    DEFAULT,
    UNFUSED,
    KernelSelector,
    Measurement,
    math_mode_of,
    only,
    remember,
    times_remembered,
)
from ..backends.triton import TritonOps
from ..errors import one_line
from ..graph.fold import Weights
from ..graph.ir import Conv2d, Flatten, Parameter, Ref
from ..graph.patterns import FusionGroup, Workload, ungrouped, workload_of
from ..graph.plan import Plan, Shape, Step
from .clocks import graph_seconds
from .executor import Executor
from .first_call import can_show_errors
from .tolerance import allowed_error, rms

Clock = Callable[[Sequence[Callable[[], Any]]], float]

MARGIN = 0.05  # of its time that a kernel must save to go before the predicted one
CHECKED_IMAGES = 4  # images at each end of a batch
COLD_BYTES = 256 * 2**20  # of operands that take turns, so that none is left in a cache
_ONE_AT_A_TIME = Lock()  # two that measure would slow each other down


@dataclass(frozen=True)
class Candidate:
    """A piece of a network and the ways to serve it, in the order in which they are measured.

    A way that is named twice is measured twice, and the less time counts.
    """

    workload: Workload
    dtype: torch.dtype
    group: FusionGroup
    shapes: Mapping[str, Shape]
    kernels: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {
            "work": list(self.workload.work),
            "batch": self.workload.batch,
            "dtype": dtype,
            "kernels": list(self.kernels),
        }


class Session:
    """The pieces of one batch size; larger ones build on what smaller ones took.

    Args:
        executor: has the weights.
        device: where the kernels run.
        clock: seconds that one of several equal calls takes.

    Attributes:
        best: least seconds of the pieces so far, by their work.
    """

    def __init__(self, executor: Executor, device: torch.device, clock: Clock) -> None:
        self.executor = executor
        self.device = device
        self.clock = clock
        self.best: dict[tuple[str, ...], float] = {}

    def measure(self, candidate: Candidate, inputs: Sequence[Tensor]) -> Measurement:
        """Judge and time each kernel of a piece on the values of its group's inputs.

        Raises:
            RuntimeError: the GPU is lost, or PyTorch itself fails.
        """
        seconds: dict[str, float] = {}
        excluded: dict[str, str] = {}
        judged: dict[str, Executor] = {}
        with torch.no_grad():
            exact, error = self._reference(candidate, inputs)
            for kernel in candidate.kernels:
                unfused = self._unfused(candidate.workload.work) if kernel == UNFUSED else None
                if unfused is not None:
                    seconds[kernel] = unfused
                    continue
                if kernel in excluded:
                    continue
                try:
                    executor = judged.get(kernel) or self._by(candidate, kernel)
                    if kernel not in judged:
                        wrong = _judge(executor.run(inputs), exact, error, candidate.dtype)
                        if kernel not in (DEFAULT, UNFUSED) and not _ran(kernel, executor):
                            wrong = "does not take these sizes here"
                        if wrong:
                            excluded[kernel] = wrong
                            continue
                        judged[kernel] = executor
                    # As in a captured network, where no call clears memory of its own.
                    with executor.ops.workspace_held(self.device):
                        took = self.clock(_turns(executor, inputs))
                    seconds[kernel] = min(took, seconds.get(kernel, took))
                except Exception as failure:
                    excluded[kernel] = one_line(failure)
                    seconds.pop(kernel, None)
                    if self.device.type == "cuda":
                        torch.cuda.synchronize()  # raises if the GPU is lost: then nothing is kept
        if seconds:
            self.best[candidate.workload.work] = min(seconds.values())
        return Measurement(seconds, excluded)

    def _unfused(self, work: tuple[str, ...]) -> float | None:
        """Least seconds of a piece by smaller ones; None where those do not make it up."""
        least: list[float | None] = [None] * len(work) + [0.0]
        for start in reversed(range(len(work))):
            for end in range(start + 1, len(work) + 1):
                took, rest = self._took(work[start:end]), least[end]
                if took is None or rest is None or end - start == len(work):
                    continue
                least[start] = min(took + rest, least[start] or float("inf"))
        return least[0] if len(work) > 1 else None

    def _took(self, work: tuple[str, ...]) -> float | None:
        """Least seconds of a piece that was measured; a view takes none."""
        view = len(work) == 1 and work[0].startswith(Flatten.__name__)
        return 0.0 if view else self.best.get(work)

    def _by(self, candidate: Candidate, kernel: str) -> Executor:
        """Runs the piece by one kernel."""
        selector = only(*(() if kernel in (DEFAULT, UNFUSED) else (kernel,)))
        return self._piece(candidate, TritonOps(cudnn=True, selector=selector))

    def _piece(
        self,
        candidate: Candidate,
        ops: AtenOps,
        dtype: torch.dtype | None = None,
        weights: Callable[[Step], Weights] | None = None,
    ) -> Executor:
        own, plan = self.executor, piece(candidate.group)
        weights = weights or own.weights
        return Executor(plan, own.module, ops, dtype or candidate.dtype, weights, own.names)

    def _reference(
        self, candidate: Candidate, inputs: Sequence[Tensor]
    ) -> tuple[list[Tensor], float]:
        """The exact outputs for the images that are judged, and the error of plain PyTorch's."""
        some = [_judged(x) for x in inputs]
        wide = self._piece(candidate, AtenOps(), torch.float64, self._upcast)
        exact = list(wide.run([x.double() for x in some]))
        plain = self._piece(candidate, AtenOps()).run(some)
        return exact, _error(plain, exact)

    def _upcast(self, step: Step) -> Weights:
        """Folded weights rounded to their dtype, in float64."""
        weight, bias, *_ = self.executor.weights(step)
        return weight.double(), None if bias is None else bias.double()


def piece(group: FusionGroup) -> Plan:
    """A plan of the group's steps alone, which overwrites none of its inputs."""
    steps = tuple(replace(step, in_place=False, frees=()) for step in group.steps)
    parameters = tuple(Parameter(name, True) for name in group.inputs)
    return Plan(steps, parameters, tuple(Ref(name) for name in group.outputs))


def _ran(kernel: str, executor: Executor) -> bool:
    """Whether this kernel ran the piece: an executor goes on without one that does not take it."""
    return any(kernel in name.lower() for name in executor.plan.kernels)


def _judged(x: Tensor) -> Tensor:
    """The images at both ends of a batch."""
    return (
        x if len(x) <= 2 * CHECKED_IMAGES else torch.cat([x[:CHECKED_IMAGES], x[-CHECKED_IMAGES:]])
    )


def _judge(
    outputs: Sequence[Tensor], exact: Sequence[Tensor], error: float, dtype: torch.dtype
) -> str:
    """What is wrong with a kernel's outputs: at most twice PyTorch's error, or four roundings."""
    found = _error([_judged(y) for y in outputs], exact)
    scale = max(rms(y) for y in exact)
    allowed = allowed_error(error, scale, torch.finfo(dtype).eps)
    return "" if found <= allowed else f"wrong: error {found:.3g}, allowed {allowed:.3g}"


def _error(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    return max(rms(y.double() - e) for y, e in zip(outputs, exact, strict=True))


def _turns(executor: Executor, inputs: Sequence[Tensor]) -> list[Callable[[], Any]]:
    """Equal calls on copies of the inputs, enough of them that no cache holds an earlier one."""
    size = sum(x.numel() * x.element_size() for x in inputs)
    count = max(2, min(16, COLD_BYTES // max(size, 1))) if inputs[0].is_cuda else 1
    copies = [list(inputs), *([x.clone() for x in inputs] for _ in range(count - 1))]
    return [lambda given=given: executor.run(given) for given in copies]  # type: ignore[misc]


def gpu_seconds(calls: Sequence[Callable[[], Any]], tries: int = 7) -> float:
    """The median of ``tries`` replays of a CUDA graph."""
    return median(graph_seconds(calls, tries))


def quick_seconds(calls: Sequence[Callable[[], Any]]) -> float:
    """As :func:`gpu_seconds`, for a network that waits to be captured."""
    return gpu_seconds(calls, tries=3)


def measures(ops: AtenOps) -> bool:
    """Whether kernels may be measured for a new shape.

    They are not where the answers must be the same bits each time, nor where several ranks must
    agree: those follow what one process has measured before.
    """
    if not ops.tuning_seconds or os.environ.get("WORLD_SIZE", "1") != "1":
        return False
    if torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic:
        return False
    group = torch.distributed
    return not (group.is_available() and group.is_initialized() and group.get_world_size() > 1)


def tune_shape(executor: Executor, x: Tensor) -> None:
    """Measure what the choice of kernels for one call rests on, as far as that was predicted.

    The kernel that was predicted for a piece is compared with cuDNN's, and that of several steps
    with the best that was found for its parts, on the operands that plain PyTorch makes of ``x``.
    Another has to save :data:`MARGIN` of the time. It ends after ``executor.ops.tuning_seconds``,
    with the piece that is then being measured; what is left stays predicted until the next shape.
    A failure is a warning.

    Args:
        x: the plan's only argument, on the device where it runs.
    """
    ops = executor.ops
    try:
        # An experimental layout of the whole network is no matter of pieces.
        if type(ops) is TritonOps and measures(ops) and can_show_errors([x]):
            with _ONE_AT_A_TIME, torch.no_grad():
                _Tuning(executor, ops, x).run()
    except Exception as error:
        warnings.warn(
            f"fastres keeps to predicted kernels for images of shape {tuple(x.shape)}: "
            f"measuring them failed: {one_line(error)}",
            stacklevel=2,
        )


class _Tuning:
    """The pieces of one shape, single steps first: they need no kernel that is not compiled yet."""

    def __init__(self, executor: Executor, ops: TritonOps, x: Tensor) -> None:
        self.executor, self.ops, self.x = executor, ops, x
        shapes = executor.plan.shapes(tuple(x.shape))
        self.shapes = {name: shape for name, shape in shapes.items() if shape is not None}
        self.session = Session(executor, x.device, quick_seconds)
        self.ends = perf_counter() + ops.tuning_seconds
        self.found: dict[str, dict[int, Measurement]] = {}
        self.tried: set[str] = set()

    def run(self) -> None:
        """Measure; pieces that come into question by what was found too."""
        while asked := [c for c in self._in_question() if c.workload.key not in self.tried]:
            self.tried |= {candidate.workload.key for candidate in asked}
            try:
                for several in (False, True):
                    self._walk([c for c in asked if (len(c.group.steps) > 1) is several])
            finally:
                if self.found:
                    remember(self.found, self.x.device)
                    self.found = {}
        self.ops.measured = times_remembered()

    def _in_question(self) -> list[Candidate]:
        """The distinct pieces of the plan whose kernel is predicted and may be another."""
        whole, dtype, device = self.executor.plan, self.executor.dtype, self.x.device
        grouping = self.ops.group_steps(whole, self.shapes, dtype, device)
        selector = self.ops.selector_on(device)
        found = (self._candidate(group, selector) for group in grouping.groups)
        distinct = {c.workload.key: c for c in found if c is not None and len(c.kernels) > 1}
        return [c for c in distinct.values() if selector.found(c.workload) is None]

    def _candidate(self, group: FusionGroup, selector: KernelSelector) -> Candidate | None:
        """A group with its kernel and that one's rival, if there is one."""
        own, rival = group.kernel or DEFAULT, ""
        workload = workload_of(group, self.shapes, math_mode_of(self.executor.dtype))
        if len(group.steps) > 1:
            rival = UNFUSED
        elif isinstance(group.steps[0].op, Conv2d) and "cudnn" in self.ops.by_name:
            rival = "cudnn"
        forced = bool({own, rival} & selector.forced.keys())
        # The first again at the end: a GPU's clocks may have risen meanwhile.
        kernels = (own,) if forced or rival in ("", own) else (own, rival, own)
        if workload is None or isinstance(group.steps[0].op, Flatten):
            return None
        return Candidate(workload, self.executor.dtype, group, self.shapes, kernels)

    def _walk(self, asked: Sequence[Candidate]) -> None:
        """One run by plain PyTorch; each piece is measured when its operands are there."""
        own = self.executor
        by_last = {c.group.steps[-1].name: c for c in asked}
        members = {step.name for c in asked for step in c.group.steps}
        given = {parameter.name: self.x for parameter in own.plan.parameters}
        held: dict[str, Any] = {}

        def observe(step: Step, inputs: list[Any], result: Any) -> None:
            if step.name in members and perf_counter() < self.ends:
                held.update(zip(step.inputs, inputs, strict=True))
            if step.name in by_last and perf_counter() < self.ends:
                self._measure(by_last[step.name], held | given)
                held.clear()

        if asked and perf_counter() < self.ends:
            plain = Executor(own.plan, own.module, AtenOps(), own.dtype, own.weights, own.names)
            plain.run([self.x], observe)

    def _measure(self, candidate: Candidate, values: Mapping[str, Any]) -> None:
        """A piece, after its parts."""
        if len(candidate.group.steps) > 1:
            selector = self.ops.selector_on(self.x.device)
            for single in ungrouped(candidate.group.steps):
                of_it = piece(single), self.shapes, candidate.dtype, self.x.device
                part = self._candidate(self.ops.group_steps(*of_it).groups[0], selector)
                if part is not None and part.workload.work not in self.session.best:
                    self._time(part, values, selector)
        self._time(candidate, values)

    def _time(
        self,
        candidate: Candidate,
        values: Mapping[str, Any],
        selector: KernelSelector | None = None,
    ) -> None:
        """One piece, unless the time is over, or ``selector`` knows what it takes."""
        work = candidate.workload
        known = selector.measured.get(work.key, {}).get(work.batch) if selector else None
        if known is not None and known.seconds:
            self.session.best[work.work] = min(known.seconds.values())
        elif perf_counter() < self.ends:
            inputs = [values[name] for name in candidate.group.inputs]
            found = _decided(self.session.measure(candidate, inputs), candidate.kernels[0])
            if len(candidate.kernels) > 1 and found.seconds:
                self.found.setdefault(work.key, {})[work.batch] = found


def _decided(found: Measurement, own: str) -> Measurement:
    """The measurement, by which a kernel that hardly saves anything does not replace ``own``."""
    least = found.seconds.get(found.fastest(), 0.0)
    hardly = own in found.seconds and least > (1 - MARGIN) * found.seconds[own]
    return replace(found, chosen=own) if hardly else found
