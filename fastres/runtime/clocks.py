"""The clocks: seconds by CUDA events or, on a CPU, by the host's, of one call or of many."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from threading import Lock
from typing import Any, TypeVar

import torch

ONE_CAPTURE = Lock()  # a capture begins by waiting for the GPU, which would break off another
X = TypeVar("X")
Y = TypeVar("Y")
Sampler = Callable[[Callable[[X], Y], list[X]], tuple[float, Y]]

FLUSHED_BYTES = 256 * 2**20  # more than the last cache of any GPU or of most CPUs
EVENT_SLACK_SECONDS = 1e-3
IDLE_SECONDS, LONGEST_WAIT = 5e-3, 0.2


def event_seconds(calls: Sequence[Callable[[], Any]]) -> tuple[list[float], Any]:
    """GPU seconds of each of ``calls`` on the current stream, and what the last one returned.

    The calls are queued one after another without a pause; then the last one is waited for.
    """
    first, *others = (torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1))
    first.record()
    for call, event in zip(calls, others, strict=True):
        output = call()
        event.record()
    others[-1].synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise((first, *others))], output


def call_seconds(call: Callable[[], Any], device: torch.device, tries: int) -> list[float]:
    """Seconds of each of ``tries`` calls, each begun when the one before is done.

    One more call before them warms up.
    """
    call()
    if device.type == "cuda":
        return [event_seconds([call])[0][0] for _ in range(tries)]
    return [host_seconds(lambda _: call(), [None])[0] for _ in range(tries)]


def host_seconds(call: Callable[[X], Y], inputs: Sequence[X]) -> tuple[float, Y]:
    """Seconds that ``call`` takes over all inputs by the host's clock, and its last output."""
    started = time.perf_counter()
    for x in inputs:
        output = call(x)
    return time.perf_counter() - started, output


def wait_until_idle(longest: float = LONGEST_WAIT) -> bool:
    """Waits until no thread of this process computes; False where some still did after ``longest``.

    The threads of a runtime spin for a while after a call, on the cores of whoever is called next.
    """
    until = time.perf_counter() + longest
    while time.perf_counter() < until:
        started, used = time.perf_counter(), time.process_time()
        time.sleep(IDLE_SECONDS)
        if time.process_time() - used < 0.1 * (time.perf_counter() - started):
            return True
    return False


def graph_seconds(calls: Sequence[Callable[[], Any]], tries: int = 7) -> list[float]:
    """GPU seconds of one of ``calls``, in each of ``tries`` replays of a CUDA graph of them all.

    In a graph, launches cost least.
    """
    replays = call_seconds(captured(calls).replay, torch.device("cuda"), tries)
    return [seconds / len(calls) for seconds in replays]


def captured(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all ``calls``; the first also runs before it, to warm up what it needs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with ONE_CAPTURE, torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for call in calls:
            call()
    return graph


def sampler(device: torch.device, cold_cache: bool) -> Sampler[Any, Any]:
    """What times the calls of a sample on this device, before each an emptied cache if wanted.

    It takes a callable and its inputs, and returns the seconds of all calls and the last output.
    On CUDA it raises RuntimeError where the events saw less than half of the time that passed.
    """
    cuda = device.type == "cuda"
    if not cold_cache:
        return _cuda_sample if cuda else host_seconds
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
    form = _cold_cuda_sample if cuda else _cold_cpu_sample
    return lambda call, inputs: form(call, inputs, lambda: flushed.add_(1))


def _cuda_sample(call: Callable[[X], Y], inputs: list[X]) -> tuple[float, Y]:
    (elapsed,), (_, output) = _believed([partial(host_seconds, call, inputs)])
    return elapsed, output


def _cold_cpu_sample(
    call: Callable[[X], Y], inputs: list[X], flush: Callable[[], Any]
) -> tuple[float, Y]:
    """Seconds of the calls alone; before each, ``flush`` fills the caches with something else."""
    elapsed = 0.0
    for x in inputs:
        flush()
        seconds, output = host_seconds(call, [x])
        elapsed += seconds
    return elapsed, output


def _cold_cuda_sample(
    call: Callable[[X], Y], inputs: list[X], flush: Callable[[], Any]
) -> tuple[float, Y]:
    """The same by CUDA events; each call is queued while the flush still runs."""
    seconds, output = _believed([step for x in inputs for step in (flush, partial(call, x))])
    return sum(seconds[1::2]), output


def _believed(calls: Sequence[Callable[[], Any]]) -> tuple[list[float], Any]:
    """The seconds of events. Raises RuntimeError where they saw too little of what passed."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    seconds, output = event_seconds(calls)
    torch.cuda.synchronize()
    wall = time.perf_counter() - started
    if sum(seconds) < wall / 2 - EVENT_SLACK_SECONDS:
        raise RuntimeError(
            f"the events saw {sum(seconds) * 1e3:.3f} ms of {wall * 1e3:.3f} ms: "
            "work ran outside the timed stream"
        )
    return seconds, output
