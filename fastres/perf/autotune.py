"""Measures which kernel is the fastest for each distinct piece of a network on the GPU at hand.

A piece is a step, or steps that one kernel can serve; equal pieces are measured once. A kernel
whose answer is wrong gets no time. What is found goes into the cache of
:mod:`fastres.backends.kernel_choice`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.aten import AtenOps
from ..backends.kernel_choice import (
    DEFAULT,
    UNFUSED,
    Measurement,
    cache_path,
    machine,
    math_mode_of,
    store,
)
from ..backends.triton import TritonOps
from ..errors import BackendError
from ..files import check_target
from ..graph import plan
from ..graph.ir import Conv2d, Flatten
from ..graph.patterns import ungrouped, workload_of
from ..graph.plan import Plan, Shape
from ..runtime.executor import Executor
from ..runtime.tuning import Candidate, Clock, Session, gpu_seconds

Progress = Callable[[int, int], None]


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
    math_mode = math_mode_of(dtype)
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
            executor = Executor(whole, module, AtenOps(), dtype)
            session = Session(executor, device, clock or gpu_seconds)
            pieces = candidates_of(whole, shape, TritonOps(cudnn=True), dtype, device)
            found = [(p, session.measure(p, _inputs(p, device))) for p in _told(pieces, tell)]
            store(path, machine(device), _by_case(found))
            results += found
    return Tuned(machine(device), str(path), tuple(results))


def _told(pieces: Sequence[Candidate], tell: Progress | None) -> Iterator[Candidate]:
    """The pieces, with progress."""
    for done, candidate in enumerate(pieces):
        if tell:
            tell(done, len(pieces))
        yield candidate
    if tell:
        tell(len(pieces), len(pieces))


def _by_case(found: Iterable[tuple[Candidate, Measurement]]) -> dict[str, dict[int, Measurement]]:
    workloads: dict[str, dict[int, Measurement]] = {}
    for candidate, measurement in found:
        if len(candidate.kernels) > 1:
            workloads.setdefault(candidate.workload.key, {})[candidate.workload.batch] = measurement
    return workloads


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
