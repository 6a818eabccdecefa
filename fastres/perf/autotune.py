"""Measures which kernel is the fastest for each distinct piece of a network on the GPU at hand.

A piece is a step, or steps that one kernel can serve; equal pieces are measured once. A kernel
whose answer is wrong gets no time. What is found goes into the cache of
:mod:`fastres.backends.kernel_choice`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.aten import AtenOps, conv_precision
from ..backends.kernel_choice import UNFUSED, Measurement, cache_path, machine, only, store
from ..backends.triton import TritonOps
from ..errors import BackendError
from ..files import check_target
from ..graph import plan
from ..graph.fold import Weights, fold_step
from ..graph.ir import Conv2d, Flatten, Parameter, Ref, attribute
from ..graph.patterns import FusionGroup, Workload, ungrouped, workload_of
from ..graph.plan import Plan, Shape, Step
from ..runtime.executor import Executor
from ..runtime.tolerance import allowed_error, rms
from .clocks import graph_seconds
from .timing import one_line

Clock = Callable[[Sequence[Callable[[], Any]]], float]
Progress = Callable[[int, int], None]

DEFAULT = "conv2d"
CHECKED_IMAGES = 4  # images at each end of a batch
COLD_BYTES = 256 * 2**20  # of operands that take turns, so that none is left in a cache


@dataclass(frozen=True)
class Candidate:
    """A piece of a network and the ways to serve it, the plainest first."""

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


def candidates_of(
    whole: Plan,
    shape: Shape,
    ops: TritonOps,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Candidate, ...]:
    """The distinct pieces of a plan on which a kernel has to be chosen, small ones first.

    Args:
        whole: the network's.
        shape: (N, C, H, W) of its images.
        device: where the kernels must be able to run; on a CPU all are listed.
    """
    shapes = {name: s for name, s in whole.shapes(shape).items() if s is not None}
    math_mode = conv_precision() if dtype is torch.float32 else "half"
    found: dict[str, Candidate] = {}
    options = ops.candidates(whole, dtype, device)
    in_question = {step.name for group in options for step in group.steps}
    single = [g for g in ungrouped(whole.steps) if g.steps[0].name in in_question]
    for group in (*single, *sorted(options, key=lambda g: len(g.steps))):
        workload = workload_of(group, shapes, math_mode)
        if workload is None or isinstance(group.steps[0].op, Flatten):
            continue
        plainest = DEFAULT if len(group.steps) == 1 else UNFUSED
        candidate = found.setdefault(
            workload.key, Candidate(workload, dtype, group, shapes, (plainest,))
        )
        if group.kernel and group.kernel not in candidate.kernels:
            found[workload.key] = replace(candidate, kernels=(*candidate.kernels, group.kernel))
    return tuple(found.values())


@dataclass(frozen=True)
class Tuned:
    """What was measured, and where it is kept."""

    machine: str
    path: str
    results: tuple[tuple[Candidate, Measurement], ...]

    @property
    def wrong(self) -> tuple[str, ...]:
        """Kernels that were excluded, with the reason, in words."""
        return tuple(
            f"{kernel} at batch {candidate.workload.batch}, {candidate.workload.work[0]}: {reason}"
            for candidate, found in self.results
            for kernel, reason in found.excluded.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        cases = [
            candidate.to_dict()
            | {"choice": m.fastest(), "seconds": m.seconds, "excluded": m.excluded}
            for candidate, m in self.results
        ]
        return {"machine": self.machine, "path": self.path, "cases": cases}


def tune(
    module: nn.Module,
    shapes: Iterable[Shape],
    dtypes: Iterable[torch.dtype],
    device: torch.device,
    *,
    cache: Path | None = None,
    clock: Clock | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> Tuned:
    """Measure the alternatives for a network's pieces and keep what is found.

    Args:
        module: a network with one image input, on ``device``.
        shapes: (N, C, H, W) of its images.
        cache: the file; by default where the planner looks for it.
        clock: seconds that one of several equal calls takes.
        progress: takes the title of some work and returns what is told (done, wanted).

    Raises:
        BackendError: there is no CUDA GPU, and no other clock was given.
    """
    if clock is None and device.type != "cuda":
        raise BackendError(
            f"tuning measures on a CUDA GPU, got device {str(device)!r}; --dry lists the cases"
        )
    path = cache or cache_path()
    check_target(path, makes_folder=True)
    whole = plan.of_module(module.eval())
    results: list[tuple[Candidate, Measurement]] = []
    for dtype in dtypes:
        for shape in shapes:
            title = f"batch {shape[0]}, {str(dtype).removeprefix('torch.')}"
            tell = progress(title) if progress else None
            session = _Session(module, device, clock or _gpu_seconds)
            pieces = candidates_of(whole, shape, TritonOps(cudnn=True), dtype, device)
            found = session.run(pieces, tell)
            store(path, machine(device), _by_case(found))
            results += found
    return Tuned(machine(device), str(path), tuple(results))


def _by_case(found: Iterable[tuple[Candidate, Measurement]]) -> dict[str, dict[int, Measurement]]:
    workloads: dict[str, dict[int, Measurement]] = {}
    for candidate, measurement in found:
        if len(candidate.kernels) > 1:
            workloads.setdefault(candidate.workload.key, {})[candidate.workload.batch] = measurement
    return workloads


class _Session:
    """The candidates of one batch size and dtype; larger pieces build on what smaller ones took."""

    def __init__(self, module: nn.Module, device: torch.device, clock: Clock) -> None:
        self.module = module
        self.device = device
        self.clock = clock
        self.found: list[tuple[Candidate, Measurement]] = []
        self._best: dict[tuple[str, ...], float] = {}

    def run(
        self, cases: Sequence[Candidate], tell: Progress | None
    ) -> list[tuple[Candidate, Measurement]]:
        for done, candidate in enumerate(cases):
            if tell:
                tell(done, len(cases))
            measurement = self._measure(candidate)
            self.found.append((candidate, measurement))
            if measurement.seconds:
                self._best[candidate.workload.work] = min(measurement.seconds.values())
        if tell:
            tell(len(cases), len(cases))
        return self.found

    def _measure(self, candidate: Candidate) -> Measurement:
        seconds: dict[str, float] = {}
        excluded: dict[str, str] = {}
        with torch.no_grad():
            inputs = _inputs(candidate, self.device)
            exact, error = self._reference(candidate, inputs)
            for kernel in candidate.kernels:
                unfused = self._unfused(candidate.workload.work) if kernel == UNFUSED else None
                if unfused is not None:
                    seconds[kernel] = unfused
                    continue
                try:
                    executor = self._executor(candidate, kernel)
                    wrong = _judge(executor.run(inputs), exact, error, candidate.dtype)
                    if kernel not in (DEFAULT, UNFUSED) and not _ran(kernel, executor):
                        wrong = "does not take these sizes here"
                    if wrong:
                        excluded[kernel] = wrong
                        continue
                    # As in a captured network, where no call clears memory of its own.
                    with executor.ops.workspace_held(self.device):
                        seconds[kernel] = self.clock(_turns(executor, inputs))
                except Exception as failure:
                    excluded[kernel] = one_line(failure)
                    if self.device.type == "cuda":
                        torch.cuda.synchronize()  # raises if the GPU is lost: then nothing is kept
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
        return 0.0 if view else self._best.get(work)

    def _executor(self, candidate: Candidate, kernel: str) -> Executor:
        """Runs the piece by one kernel."""
        selector = only(*(() if kernel in (DEFAULT, UNFUSED) else (kernel,)))
        ops = TritonOps(cudnn=True, selector=selector)
        return Executor(_piece(candidate.group), self.module, ops, candidate.dtype)

    def _reference(
        self, candidate: Candidate, inputs: Sequence[Tensor]
    ) -> tuple[list[Tensor], float]:
        """The exact outputs for the images that are judged, and the error of plain PyTorch's."""
        piece = _piece(candidate.group)
        some = [_judged(x) for x in inputs]
        weights = _Upcast(self.module, candidate.dtype)
        wide = Executor(piece, self.module, AtenOps(), torch.float64, weights)
        exact = list(wide.run([x.double() for x in some]))
        plain = Executor(piece, self.module, AtenOps(), candidate.dtype).run(some)
        return exact, _error(plain, exact)


class _Upcast:
    """Folded weights rounded to a dtype, in float64."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module = module
        self.dtype = dtype

    def __call__(self, step: Step) -> Weights:
        weight, bias = fold_step(step.op, lambda path: attribute(self.module, path), self.dtype)
        return weight.double(), None if bias is None else bias.double()


def _ran(kernel: str, executor: Executor) -> bool:
    """Whether this kernel ran the piece: an executor goes on without one that does not take it."""
    return any(kernel in name.lower() for name in executor.plan.kernels)


def _piece(group: FusionGroup) -> Plan:
    """A plan of the group's steps alone, which overwrites none of its inputs."""
    steps = tuple(replace(step, in_place=False, frees=()) for step in group.steps)
    parameters = tuple(Parameter(name, True) for name in group.inputs)
    return Plan(steps, parameters, tuple(Ref(name) for name in group.outputs))


def _inputs(candidate: Candidate, device: torch.device) -> list[Tensor]:
    """Random images or, behind a convolution, what a ReLU leaves of them, in channels_last."""
    generator = torch.Generator().manual_seed(0)
    first = candidate.group.steps[0].op
    raw = isinstance(first, Conv2d) and first.in_channels <= 4
    found = []
    for name in candidate.group.inputs:
        x = torch.randn(candidate.shapes[name], generator=generator, device="cpu")
        x = (x if raw else x.relu()).to(device, candidate.dtype)
        found.append(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x)
    return found


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


def _gpu_seconds(calls: Sequence[Callable[[], Any]]) -> float:
    return median(graph_seconds(calls))
