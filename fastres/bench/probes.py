"""Measurements beside the interleaved timing: latency, memory, layers, ceilings, cold start."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backends.aten import AtenOps
from ..backends.select import select_ops
from ..frontends.fast_model import FastModel
from ..graph import plan
from ..graph.ir import Flatten, Parameter, Ref
from ..graph.plan import Plan, Step
from ..perf.environment import gpu_state
from ..perf.roofline import Ceilings, roofline
from ..runtime.clocks import event_seconds, graph_seconds, host_seconds
from ..runtime.executor import Executor
from .results import ColdStart, LayerTime, Probe

Model = Callable[[Tensor], Tensor]

CALLS = 1000
BLOCK = 10
BLOCK_SECONDS = 0.2
FOREIGN = ("onnxruntime", "OpenVINO", "TensorRT")
GRAPHED = ("fastres", "cuDNN fused", "compile CUDA graphs", "max-autotune")
REPEATS = 10
SUSTAINED_SECONDS = 3.0
COLD_SECONDS = 120.0


def probe(
    contenders: Mapping[str, Model],
    images: Sequence[Tensor],
    *,
    budget: float = 2.0,
    sustained_seconds: float = 0.0,
    seed: int = 0,
) -> dict[str, Probe]:
    """Latency, peak memory and sustained throughput of contenders that are warm and right.

    Latency is of single synchronised calls, in blocks of ten or a fifth of a second, the blocks in
    random order, until each has a thousand or the budget is spent.

    Args:
        budget: seconds per contender for the latencies.
        sustained_seconds: how long to run without a pause; 0 leaves it out.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(seed)
    until = time.perf_counter() + budget * len(contenders)
    while time.perf_counter() < until and any(len(v) < CALLS for v in times.values()):
        for name in order.sample(list(contenders), len(contenders)):
            times[name] += _latencies(contenders[name], images, BLOCK)
    return {
        name: _probe(name, call, images, times[name], sustained_seconds)
        for name, call in contenders.items()
    }


def _probe(
    name: str, call: Model, images: Sequence[Tensor], times: list[float], lasting: float
) -> Probe:
    p50, p90, p99 = (float(q) for q in np.quantile(times, (0.5, 0.9, 0.99)))
    rate, clock = sustained(call, images, lasting) if lasting else (None, None)
    gpu, host = _gpu_and_host(call, images) if images[0].is_cuda else (None, None)
    peak = peak_bytes(call, images[0]) if _shows_memory(name, images[0]) else None
    return Probe(len(times), p50, p90, p99, gpu, host, peak, rate, lasting or None, clock)


def _shows_memory(name: str, x: Tensor) -> bool:
    """Whether a call takes its memory from PyTorch's allocators: a CUDA graph has it already."""
    return not name.startswith((*FOREIGN, *GRAPHED) if x.is_cuda else FOREIGN)


def _latencies(call: Model, images: Sequence[Tensor], count: int) -> list[float]:
    """Seconds of each of ``count`` calls, or of fewer where they are slow."""
    found: list[float] = []
    for i in range(count):
        if sum(found) > BLOCK_SECONDS:
            break
        x = images[i % len(images)]
        _synchronize(x)
        started = time.perf_counter()
        call(x)
        _synchronize(x)
        found.append(time.perf_counter() - started)
    return found


def _gpu_and_host(call: Model, images: Sequence[Tensor]) -> tuple[float, float]:
    """Median seconds of GPU time, and until the call returns."""
    gpu, host = [], []
    for i in range(100):
        x = images[i % len(images)]
        torch.cuda.synchronize()
        (seconds,), (until_return, _) = event_seconds([partial(host_seconds, call, [x])])
        gpu.append(seconds)
        host.append(until_return)
    return median(gpu), median(host)


class _Replayed:
    """A backend that keeps the results of one call, and in later ones hands them out again."""

    OPERATORS = ("conv", "linear", "add", "relu", "max_pool", "avg_pool", "global_avg_pool")

    def __init__(self, ops: AtenOps) -> None:
        self._ops = ops
        self._results: list[Tensor] = []
        self._turn: Iterator[Tensor] | None = None
        for name in self.OPERATORS:
            setattr(self, name, self._operator(getattr(ops, name)))

    def rewind(self) -> None:
        """From now on, computes nothing: results come from the first again."""
        self._turn = iter(self._results)

    def _operator(self, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any, **others: Any) -> Tensor:
            if self._turn is not None:
                return next(self._turn)
            self._results.append(compute(*arguments, **others))
            return self._results[-1]

        return call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)


def python_seconds(model: FastModel, x: Tensor, calls: int = 200) -> float:
    """Median seconds of a call on the CPU whose operators do nothing: dispatch and engine alone.

    Args:
        x: a small input, since the check for non-finite values and the output's copy remain.
    """
    executor = model.executor()
    before = executor.ops
    replayed: Any = _Replayed(before)
    executor.ops = replayed
    times = []
    try:
        model(x)
        for _ in range(calls):
            replayed.rewind()
            started = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - started)
    finally:
        executor.ops = before
    return median(times)


def sustained(
    call: Model, images: Sequence[Tensor], seconds: float = SUSTAINED_SECONDS
) -> tuple[float, int | None]:
    """Images per second over ``seconds`` without a pause, and the SM clock (MHz) half-way."""
    done = 0
    clock: Future[int | None] | None = None
    with ThreadPoolExecutor(1) as beside:  # a GPU would rest while its clock is asked for
        started = time.perf_counter()
        while (passed := time.perf_counter() - started) < seconds:
            for x in images:
                call(x)
                done += len(x)
            if images[0].is_cuda and clock is None and passed > seconds / 2:
                clock = beside.submit(_sm_clock)
            _synchronize(images[0])
        rate = done / (time.perf_counter() - started)
    return rate, clock.result() if clock else None


def _sm_clock() -> int | None:
    text = gpu_state().get("clocks.sm", "")
    return int(text) if text.isdigit() else None


def peak_bytes(call: Model, x: Tensor) -> int:
    """Most memory that PyTorch's allocators had handed out during a call, beyond before it."""
    if x.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(x)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    watched = [ProfilerActivity.CPU]
    with profile(activities=watched, profile_memory=True, acc_events=True) as profiler:
        call(x)
    inner: Any = profiler.profiler
    events = [e for e in inner.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(0, int(np.cumsum([e.nbytes() for e in events] or [0]).max()))


def layers(
    model: nn.Module, dtype: torch.dtype, x: Tensor, ceilings: Ceilings
) -> tuple[LayerTime, ...]:
    """Every step of the fused model by itself on its true inputs, beside its floor.

    A step repeats on the same operands, so that they are cached where they fit.
    """
    whole = plan.of_module(model)
    ops = select_ops("auto", x.device, dtype)
    costs = roofline(model, tuple(x.shape), itemsize=dtype.itemsize, ceilings=ceilings).kernels
    timed: list[tuple[Step, float]] = []
    planned = {step.name: step for step in whole.steps}

    def observe(step: Step, operands: list[Any], result: Any) -> None:
        if isinstance(step.op, Flatten):
            return
        alone = replace(planned[step.name], frees=())
        parameters = tuple(Parameter(name, True) for name in dict.fromkeys(step.inputs))
        single = Executor(Plan((alone,), parameters, Ref(step.name)), model, ops, dtype)
        given = dict(zip(step.inputs, operands, strict=True))
        copies = [given[p.name].clone() for p in parameters]  # a residual is overwritten
        with ops.workspace_held(x.device):
            timed.append((step, _step_seconds(lambda: single.run(copies), x)))

    Executor(whole, model, ops, dtype).run([x.to(dtype)], observe)
    return tuple(
        LayerTime(cost.name, cost.what, seconds, cost.seconds, cost.bound)
        for (_, seconds), cost in zip(timed, costs, strict=True)
    )


def _step_seconds(call: Callable[[], Any], x: Tensor) -> float:
    call()
    if x.is_cuda:
        return min(graph_seconds([call] * REPEATS))
    started = time.perf_counter()
    call()
    repeats = max(1, min(REPEATS, int(2e-3 / max(time.perf_counter() - started, 1e-7))))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - started) / repeats)
    return median(times)


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


FIRST_ANSWER = """
import torch, fastres
from fastres.bench.baselines import eager
model = fastres.create_model({model!r}).eval()
x = torch.randn(1, 3, 224, 224)
x, model = x.to({device!r}), model.to({device!r})
with torch.inference_mode():
    y = {call}
assert torch.isfinite(y.sum()).item()
"""
CALLS_OF = {
    "fastres": "model(x)",
    "eager": "eager(model, torch.float32, torch.contiguous_format)(x)",
}


def cold_starts(
    model: str, device: torch.device, limit: float = COLD_SECONDS
) -> tuple[ColdStart, ...]:
    """Seconds from starting Python to the first answer of a network at batch 1, 224x224.

    First with empty caches of Triton and Inductor, then with those that the first run filled.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, call in CALLS_OF.items():
            caches = {
                "TRITON_CACHE_DIR": f"{folder}/{name}/triton",
                "TORCHINDUCTOR_CACHE_DIR": f"{folder}/{name}/inductor",
            }
            script = FIRST_ANSWER.format(model=model, device=str(device), call=call)
            for state in ("empty", "filled"):
                found.append(_cold_start(name, state, script, caches, limit))
    return tuple(found)


def _cold_start(
    name: str, state: str, script: str, caches: Mapping[str, str], limit: float
) -> ColdStart:
    paths = (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""))
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | dict(caches)
    command = (sys.executable, "-c", script)
    started = time.perf_counter()
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return ColdStart(name, state, None, f"no answer after {limit:g} s")
    seconds = time.perf_counter() - started
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return ColdStart(name, state, None, f"exit status {done.returncode}: {last}")
    return ColdStart(name, state, seconds)
