"""Contests of kernels: the same operation done by several callables, checked, then timed.

A contender runs as a CUDA graph of one call per set of operands, so that neither Python nor
launches are in its time. ``cold`` rotates through sets that together exceed the L2 cache,
``steady`` stays on one. Without a GPU a contest is only checked, on tiny shapes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import partial
from math import ceil
from typing import Any

import torch
import triton
from torch import Tensor

from fastres.backends.aten import cudnn_benchmarking
from fastres.bench.run import float32_products
from fastres.errors import one_line
from fastres.perf.timing import Method, measure
from fastres.runtime.clocks import captured
from fastres.runtime.tolerance import allowed_error, rms

Operands = tuple[Any, ...]
Call = Callable[..., Any]

FLOOR_ULPS = 2.0  # allowed where PyTorch happens to round well
MOST_SETS = 256
COLD_FACTOR = 4  # times the L2 cache; some sets hold a tensor in two layouts


@dataclass(frozen=True)
class Setting:
    """Where and how a section runs; ``tiny`` checks on small shapes and times nothing."""

    device: torch.device
    dtype: torch.dtype = torch.float16
    tiny: bool = False
    method: Method = field(default_factory=lambda: Method(9, 0.8, 0.003, 0.01))

    def rows(self, table: Sequence[Any]) -> Sequence[Any]:
        """The configurations to try: one when tiny."""
        return table[:1] if self.tiny else table

    def batches(self, *sizes: int) -> tuple[int, ...]:
        return (2,) if self.tiny else sizes


@dataclass(frozen=True)
class Case:
    """One piece of a section, done or lost as a whole; ``run`` returns what JSON can hold."""

    name: str
    run: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Section:
    """Cases under one limit of seconds; ``case_limit`` is after how long one counts as hung."""

    name: str
    what: str
    limit: float
    cases: Callable[[Setting], Iterator[Case]]
    case_limit: float = 45.0


@dataclass(frozen=True)
class Choice:
    """Whether ``kernel`` beats what else would serve the work: the contenders of that prefix.

    ``width`` is the channels that the first step reads.
    """

    kernel: str
    over: str
    width: int
    batch: int


def row_text(row: Any) -> str:
    """A configuration as the tables of ``kernels/`` spell it; values left at their default last."""
    values = [(f.name, getattr(row, f.name), f.default) for f in fields(row)]
    plain = [repr(value) for _, value, default in values if default is MISSING]
    named = [
        f"{name}={value!r}"
        for name, value, default in values
        if default is not MISSING and value != default
    ]
    return f"{type(row).__name__}({', '.join(plain + named)})"


def normal(setting: Setting, *shape: int, scale: float = 1.0) -> Tensor:
    """Random values in the setting's dtype, channels_last if 4-D."""
    t = (torch.randn(shape, device=setting.device) * scale).to(setting.dtype)
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t


def integers(setting: Setting, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Whole numbers from -3 to 3: their sums of products are exact in float32 in any order."""
    t = torch.randint(-3, 4, shape, device=setting.device).to(dtype or setting.dtype)
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t


def tensors(value: Any) -> list[Tensor]:
    """The tensors of an output, a tensor or a tuple with some left out."""
    if isinstance(value, Tensor):
        return [value]
    return [t for t in value if t is not None]


def size_in_bytes(operands: Operands) -> int:
    return sum(t.numel() * t.element_size() for t in operands if isinstance(t, Tensor))


class Graphed:
    """One call per set of operands as a CUDA graph, captured at the first call."""

    def __init__(self, call: Call, sets: Sequence[Operands]) -> None:
        self.call = call
        self.sets = sets
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Any = None

    def __call__(self, _: int) -> Any:
        if self.graph is None:
            self.graph = captured([partial(self._keep, operands) for operands in self.sets])
        self.graph.replay()
        return self.output

    def _keep(self, operands: Operands) -> None:
        self.output = self.call(*operands)


@dataclass(frozen=True)
class Judge:
    """Holds a float64 or float32 answer and PyTorch's own rounding of it."""

    exact: Sequence[Tensor]
    same: Sequence[Tensor]

    def __call__(self, name: str, index: int, output: Any) -> str | None:
        got = tensors(output)
        if [t.shape for t in got] != [t.shape for t in self.exact]:
            return f"shapes {[tuple(t.shape) for t in got]}"
        for out, exact, same in zip(got, self.exact, self.same, strict=True):
            error, rounding, scale = rms(out - exact), rms(same - exact), rms(exact)
            if not error <= allowed_error(rounding, scale, torch.finfo(out.dtype).eps, FLOOR_ULPS):
                return f"wrong output: RMS error {error:.2e}, PyTorch's {rounding:.2e}"
        return None


def contest(
    setting: Setting,
    contenders: Mapping[str, Call],
    make: Callable[[], Operands],
    reference: Call,
    *,
    flop: int = 0,
    steady: bool = False,
    choice: Choice | None = None,
) -> dict[str, Any]:
    """Check the contenders against ``reference`` and each other; on a GPU also time them.

    Args:
        contenders: callables of a set of operands; the first is the baseline.
        make: a fresh random set of operands.
        reference: as the contenders, with a keyword ``upcast`` for the exact answer.
        flop: operations of a call, to state the rate of.
        steady: also measured on one set, where the sets are small enough for that to matter.
        choice: what the contest decides about the planner's tables.

    Returns:
        ``checked``, ``failures`` and, by form (``cold``, ``steady``), the comparison and the best.
    """
    torch.manual_seed(0)
    first = make()
    size = size_in_bytes(first)
    if setting.tiny:
        return _checked(contenders, first, reference)
    cache = getattr(torch.cuda.get_device_properties(setting.device), "L2_cache_size", 50 << 20)
    count = max(2, min(MOST_SETS, ceil(COLD_FACTOR * cache / size)))
    sets = [first, *(make() for _ in range(count - 1))]
    found: dict[str, Any] = {"bytes": size, "flop": flop}
    if choice is not None:
        found["choice"] = asdict(choice)
    for form, chosen in (("cold", sets), ("steady", sets[:1])):
        if form == "steady" and not (steady and size < cache):
            continue
        found[form] = _timed(setting, contenders, chosen, reference, flop)
    return found


def _checked(contenders: Mapping[str, Call], operands: Operands, reference: Call) -> dict[str, Any]:
    judge = _judge(operands, reference)
    failures = {}
    for name, call in contenders.items():
        try:
            reason = judge(name, 0, call(*operands))
        except Exception as error:
            reason = one_line(error)
        if reason:
            failures[name] = reason
    return {"checked": list(contenders), "failures": failures}


def _judge(operands: Operands, reference: Call) -> Judge:
    # Nobody waits for the fastest float64 convolution: cuDNN need not look for it.
    with cudnn_benchmarking(False), float32_products("ieee"):
        return Judge(tensors(reference(*operands, upcast=True)), tensors(reference(*operands)))


def _timed(
    setting: Setting,
    contenders: Mapping[str, Call],
    sets: Sequence[Operands],
    reference: Call,
    flop: int,
) -> dict[str, Any]:
    compile_ahead(setting, [lambda c=call: c(*sets[0]) for call in contenders.values()])
    calls = {name: Graphed(call, sets) for name, call in contenders.items()}
    comparison = measure(
        calls, [0], check=_judge(sets[-1], reference), device="cuda", method=setting.method
    )
    times = {t.name: t.seconds.median / len(sets) for t in comparison.timings if t.seconds}
    best = min(times, key=lambda name: times[name]) if times else None
    return {
        "sets": len(sets),
        "comparison": comparison.to_dict(),
        "seconds": times,
        "failures": comparison.failures,
        "best": best,
        "best_tflops": flop / times[best] / 1e12 if best and flop else None,
    }


@contextlib.contextmanager
def _compiling_only() -> Iterator[None]:
    """Launches inside are compiled and not launched."""

    def compile_only(kernel: Any, grid: Any) -> Call:
        return lambda *args, **meta: kernel.warmup(*args, grid=grid, **meta)

    original = triton.JITFunction.__getitem__
    triton.JITFunction.__getitem__ = compile_only
    try:
        yield
    finally:
        triton.JITFunction.__getitem__ = original


def compile_ahead(setting: Setting, calls: Iterable[Callable[[], Any]]) -> dict[str, Any]:
    """Compile what the calls would launch, side by side; what they return is meaningless.

    What fails here fails again, with its reason, where it is run.
    """

    def attempt(call: Callable[[], Any]) -> None:
        with contextlib.suppress(Exception):
            call()

    started = time.perf_counter()
    calls = list(calls)
    if not setting.tiny:
        with _compiling_only(), ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(attempt, calls))
    return {"calls": len(calls), "seconds": time.perf_counter() - started}
