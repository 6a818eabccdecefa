"""Interleaved timing of several callables, whose outputs are checked before and after.

Every round times each contender once, in a new random order, so that clocks, caches and neighbours
disturb all of them alike; ratios are taken within a round. The baseline runs twice per round under
two names, and the ratio of the two is the noise. A contender whose output is wrong, or that fails,
has a reason and no time. (Statisticians call the plan a randomised complete block design.)
"""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Generic

import numpy as np
import torch

from ..errors import one_line
from ..runtime.clocks import X, Y, sampler, wait_until_idle

OutputCheck = Callable[[str, int, Y], str | None]
Progress = Callable[[int, int], None]

LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Method:
    """How to measure; all durations in seconds.

    Attributes:
        rounds: samples wanted of each contender.
        budget: no further round begins after this long, once there are ``LEAST_ROUNDS``.
        sample: a sample repeats the call until it lasts about this long.
        warmup: each contender is called for at least this long, and on every input, beforehand.
        seed: of the order within the rounds.
        cold_cache: empty the caches before every call (on a GPU: "L2-cold"); otherwise the caches
            hold what the calls before left in them, the steady state.
    """

    rounds: int = 20
    budget: float = 20.0
    sample: float = 0.05
    warmup: float = 0.3
    seed: int = 0
    cold_cache: bool = False

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        for name in ("budget", "sample", "warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


DEFAULT_METHOD = Method()


@dataclass(frozen=True)
class Samples:
    """Measured values, one per round, in order; falsy and without quantiles if there are none."""

    values: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.values)

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def p20(self) -> float:
        return self.quantile(0.2)

    @property
    def p80(self) -> float:
        return self.quantile(0.8)

    def quantile(self, share: float) -> float:
        """The value that a share of the samples stays below. Raises ValueError without samples."""
        if not self.values:
            raise ValueError("no samples, so no quantiles")
        return float(np.quantile(self.values, share))

    def to_dict(self) -> dict[str, Any] | None:
        """Quantiles and raw values, or None without samples."""
        if not self:
            return None
        quantiles = {"median": self.median, "p20": self.p20, "p80": self.p80}
        return {**quantiles, "values": list(self.values)}


@dataclass(frozen=True)
class Timing:
    """One contender: seconds per call, or why there are none.

    Attributes:
        seconds: time per call, one value per round.
        cpu_seconds: of all threads of the process, per call, one value per round; none on a GPU
            and with cold caches.
        calls: calls per sample.
        first_call: seconds of the very first call, compilation and all.
        warmup_calls: calls before the first sample, the first one included; never timed.
        warmup: seconds that they took.
        failure: why there is no time: a wrong output, an exception, a clock that cannot be right.
    """

    name: str
    seconds: Samples = field(default_factory=Samples)
    calls: int = 0
    first_call: float | None = None
    warmup_calls: int = 0
    warmup: float = 0.0
    failure: str | None = None
    cpu_seconds: Samples = field(default_factory=Samples)

    def to_dict(self) -> dict[str, Any]:
        """The fields, with the quantiles beside the raw samples."""
        times = {"seconds": self.seconds.to_dict(), "cpu_seconds": self.cpu_seconds.to_dict()}
        return {**asdict(self), **times}


@dataclass(frozen=True)
class Comparison:
    """Timings from one interleaved run; ``a_a`` is the baseline measured a second time."""

    baseline: str
    device: str
    clock: str
    method: Method
    rounds: int
    timings: tuple[Timing, ...]
    a_a: Timing

    def __getitem__(self, name: str) -> Timing:
        for timing in self.timings:
            if timing.name == name:
                return timing
        raise KeyError(f"no contender {name!r}; there are {[t.name for t in self.timings]}")

    @property
    def failures(self) -> dict[str, str]:
        """The contenders without a time, each with the reason."""
        return {t.name: t.failure for t in self.timings if t.failure}

    @property
    def noise(self) -> Samples:
        """The baseline over itself (A/A), per round: what a ratio of 1 looks like here."""
        return _ratios(self.a_a, self[self.baseline])

    def speedup(self, name: str, over: str | None = None) -> Samples:
        """How many times faster ``name`` is than ``over`` (by default the baseline), per round."""
        return _ratios(self[name], self[over or self.baseline])

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, raw samples included, with the ratios to the baseline."""
        return {
            "baseline": self.baseline,
            "device": self.device,
            "clock": self.clock,
            "method": asdict(self.method),
            "rounds": self.rounds,
            "noise": self.noise.to_dict(),
            "timings": [
                {**t.to_dict(), "speedup": self.speedup(t.name).to_dict()} for t in self.timings
            ],
            "twin": self.a_a.to_dict(),
        }


def measure(
    contenders: Mapping[str, Callable[[X], Y]],
    inputs: Sequence[X],
    *,
    check: OutputCheck[Y],
    baseline: str | None = None,
    device: torch.device | str = "cpu",
    method: Method = DEFAULT_METHOD,
    progress: Progress | None = None,
) -> Comparison:
    """Time ``contenders`` against each other on ``inputs``, which take turns.

    Args:
        contenders: by name, callables of one input that return their output. They are called in
            whatever mode (``torch.inference_mode``, autocast) surrounds this call.
        inputs: at least one; sample after sample goes on with the next.
        check: called as ``check(name, index of the input, output)`` on every input after warm-up,
            and on the last output of each contender's timed calls; returns what is wrong, or None.
            A contender that fails it keeps no time.
        baseline: the name that the ratios refer to; by default the first contender.
        device: where the work runs. On CUDA, events on the current stream are the clock.
        method: how often and how long.
        progress: called with (rounds done, rounds wanted) before every round and at the end.

    Raises:
        ValueError: for no contenders, no inputs or an unknown baseline.
    """
    if not contenders or not inputs:
        raise ValueError(f"nothing to time: {len(contenders)} contenders, {len(inputs)} inputs")
    baseline = next(iter(contenders)) if baseline is None else baseline
    if baseline not in contenders:
        raise ValueError(f"baseline {baseline!r} is not one of {list(contenders)}")

    device = torch.device(device)
    sample = sampler(device, method.cold_cache)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else _nothing
    runners = [_Runner(name, call, inputs, check) for name, call in contenders.items()]
    runners.append(_Runner(baseline, contenders[baseline], inputs, check))

    for runner in runners:
        runner.warm_up(method, synchronize)
    rounds = _run_rounds(runners, sample, method, progress, device.type == "cpu")
    for runner in runners:
        runner.check_last()

    cpu_time = device.type == "cpu" and not method.cold_cache
    *timed, a_a = (runner.result(cpu_time) for runner in runners)
    clock = "cuda events" if device.type == "cuda" else "time.perf_counter"
    return Comparison(baseline, str(device), clock, method, rounds, tuple(timed), a_a)


def _run_rounds(
    runners: list[_Runner[Any, Any]],
    sample: Callable[..., tuple[float, Any]],
    method: Method,
    progress: Progress | None,
    on_cpu: bool,
) -> int:
    """Samples every runner once per round, in random order; returns the number of rounds."""
    order = random.Random(method.seed)
    started = time.perf_counter()
    done = 0
    with _no_garbage_collection():
        while done < method.rounds:
            if done >= LEAST_ROUNDS and time.perf_counter() - started > method.budget:
                break
            if progress:
                progress(done, method.rounds)
            for runner in order.sample(runners, len(runners)):
                runner.take(sample, on_cpu)
            done += 1
    if progress:
        progress(method.rounds, method.rounds)
    return done


class _Runner(Generic[X, Y]):
    """One contender on its way through warm-up, rounds and checks; the first failure stays."""

    def __init__(
        self, name: str, call: Callable[[X], Y], inputs: Sequence[X], check: OutputCheck[Y]
    ) -> None:
        self.name = name
        self.call = call
        self.check = check
        self.inputs = inputs
        self.turns = itertools.cycle(range(len(inputs)))
        self.calls = 0
        self.values: list[float] = []
        self.cpu_values: list[float] = []
        self.last: tuple[int, Y] | None = None
        self.first_call: float | None = None
        self.warmup_calls = 0
        self.warmup = 0.0
        self.failure: str | None = None

    def warm_up(self, method: Method, synchronize: Callable[[], None]) -> None:
        """Calls until warm, checks the output of every input, and sizes the samples."""
        try:
            started = time.perf_counter()
            for index, x in enumerate(self.inputs):
                output = self.call(x)
                synchronize()
                if self.first_call is None:
                    self.first_call = time.perf_counter() - started
                self.warmup_calls += 1
                self._judge(index, output)
            pace = self.first_call or 0.0
            while self.failure is None:
                begun = time.perf_counter()
                self.call(self.inputs[next(self.turns)])
                synchronize()
                pace = time.perf_counter() - begun
                self.warmup_calls += 1
                if time.perf_counter() - started >= method.warmup:
                    break
            self.warmup = time.perf_counter() - started
            self.calls = max(1, round(method.sample / max(pace, 1e-9)))
        except Exception as error:
            self._fail(error)

    def take(self, sample: Callable[..., tuple[float, Any]], on_cpu: bool) -> None:
        """One sample, unless this contender has failed already; on a CPU from rest."""
        if self.failure:
            return
        turns = [next(self.turns) for _ in range(self.calls)]
        if on_cpu:
            wait_until_idle()
        started = time.process_time()
        try:
            elapsed, output = sample(self.call, [self.inputs[turn] for turn in turns])
        except Exception as error:
            self._fail(error)
        else:
            self.values.append(elapsed / self.calls)
            self.cpu_values.append((time.process_time() - started) / self.calls)
            self.last = (turns[-1], output)

    def check_last(self) -> None:
        """Checks what the last timed call returned."""
        if self.last and not self.failure:
            try:
                self._judge(*self.last)
            except Exception as error:
                self._fail(error)

    def result(self, cpu_time: bool) -> Timing:
        """What was found; with the CPU time where that is of the calls alone."""
        return Timing(
            self.name,
            Samples(() if self.failure else tuple(self.values)),
            self.calls,
            self.first_call,
            self.warmup_calls,
            self.warmup,
            self.failure,
            Samples(tuple(self.cpu_values) if cpu_time and not self.failure else ()),
        )

    def _judge(self, index: int, output: Y) -> None:
        self.failure = self.failure or self.check(self.name, index, output)

    def _fail(self, error: Exception) -> None:
        self.failure = one_line(error)


def _ratios(fast: Timing, slow: Timing) -> Samples:
    """``slow`` over ``fast``, round by round; empty when either has no times."""
    pairs = zip(slow.seconds.values, fast.seconds.values, strict=False)
    return Samples(tuple(a / b for a, b in pairs))


def _nothing() -> None:
    """The CPU has nothing to wait for."""


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collects now, so that no collection falls into a sample."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
