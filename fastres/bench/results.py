"""What a run finds out about a case, and the table that every form of a report shows of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..perf.roofline import Ceilings
from ..perf.timing import Comparison, Samples, Timing

COLUMNS = (
    "contender",
    "ms per batch",
    "CPU ms",
    "images/s",
    "speed-up",
    "relative RMS error",
    "top-1 agreement",
)
NOISY = 1.1


@dataclass(frozen=True)
class Check:
    """One thing that had to hold, whether it did, and the figures."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class OutputError:
    """How far a contender's logits are from a float64 run of the same model.

    Attributes:
        rms: root mean square of the difference.
        max_abs: its largest absolute value.
        reference_rms: root mean square of the reference itself.
        allowed_rms: the bound that ``rms`` had to keep.
        agreement: share of images whose highest logit is the reference's.
    """

    rms: float
    max_abs: float
    reference_rms: float
    allowed_rms: float
    agreement: float


@dataclass(frozen=True)
class Probe:
    """What one contender showed apart from the interleaved timing; None where not measured.

    Attributes:
        calls: single synchronised calls, by the host's clock, that the quantiles are of.
        p50, p90, p99: seconds of such a call.
        gpu: median seconds of GPU time of such a call.
        host: median seconds until a call returns without waiting for the GPU.
        python: median seconds of a call whose operators do nothing, the engine's own on a CPU.
        peak_bytes: memory taken at most during a call, beyond weights and input; None for a CUDA
            graph, which holds its memory all the time.
        sustained: images per second over ``sustained_seconds`` without a pause.
        sm_clock: MHz of the GPU in the midst of that.
    """

    calls: int
    p50: float
    p90: float
    p99: float
    gpu: float | None = None
    host: float | None = None
    peak_bytes: int | None = None
    sustained: float | None = None
    sustained_seconds: float | None = None
    sm_clock: int | None = None
    python: float | None = None


@dataclass(frozen=True)
class LayerTime:
    """One step by itself: the seconds that it took, and its floor on this machine.

    ``bound`` says what the floor is: ``"memory"`` or ``"arithmetic"``.
    """

    name: str
    what: str
    seconds: float
    floor: float
    bound: str

    @property
    def share(self) -> float:
        """Floor over time: 1 is all that the machine can do."""
        return self.floor / self.seconds


@dataclass(frozen=True)
class ColdStart:
    """Seconds from the start of a process to its first answer; or why there are none."""

    contender: str
    caches: str
    seconds: float | None
    failure: str | None = None


@dataclass(frozen=True)
class Case:
    """One model at one batch size on one device: the timings and what else was found beside them.

    Attributes:
        shape: an input's (N, C, H, W).
        weights: where the parameters come from.
        errors: by contender.
        probes: by contender, where latency, memory and the like were measured.
        floors: seconds per batch that no plan with one kernel per convolution can beat on this
            machine's measured ceilings, by dtype ("fp32").
        layers: by contender, where steps were timed one by one.
        form: what sets the case apart from the usual one: how float32 is multiplied, cold caches.
    """

    model: str
    shape: tuple[int, int, int, int]
    weights: str
    comparison: Comparison
    errors: dict[str, OutputError] = field(default_factory=dict)
    probes: dict[str, Probe] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    layers: dict[str, tuple[LayerTime, ...]] = field(default_factory=dict)
    form: str = ""

    @property
    def title(self) -> str:
        batch, _, height, width = self.shape
        title = f"{self.model}, batch {batch}, {height}x{width}"
        return f"{title}, {self.form}" if self.form else title

    def images_per_second(self, timing: Timing) -> Samples:
        """Throughput, one value per round."""
        return Samples(tuple(self.shape[0] / seconds for seconds in timing.seconds.values))

    def to_dict(self) -> dict[str, Any]:
        """The fields, with the comparison written out."""
        return {
            "model": self.model,
            "form": self.form,
            "shape": list(self.shape),
            "weights": self.weights,
            **self.comparison.to_dict(),
            "errors": {name: asdict(error) for name, error in self.errors.items()},
            "probes": {name: asdict(probe) for name, probe in self.probes.items()},
            "floors": self.floors,
            "layers": {
                name: [asdict(layer) | {"share": layer.share} for layer in layers]
                for name, layers in self.layers.items()
            },
        }


@dataclass(frozen=True)
class Picture:
    """A classified grey image: rows of pixels in [0, 1], what it is and what it was taken for."""

    pixels: tuple[tuple[float, ...], ...]
    label: str
    predicted: str
    probability: float

    @property
    def correct(self) -> bool:
        return self.label == self.predicted


def case_rows(case: Case) -> list[tuple[str, ...]]:
    """The cells of a case's table, one row per contender, in the columns of ``COLUMNS``."""
    return [_row(case, timing) for timing in case.comparison.timings]


def footnote(case: Case) -> str:
    """How to read a case's table: the baseline, the spread, the noise and the warm-up."""
    comparison = case.comparison
    noise = comparison.noise
    warmup = sum(timing.warmup for timing in comparison.timings)
    cold = comparison.method.cold_cache
    caches = "caches emptied before each call" if cold else "steady state, inputs taking turns"
    text = (
        f"{comparison.rounds} interleaved rounds in random order on {comparison.device}, "
        f"{comparison.clock}, {caches}; medians, and in brackets the 20th to 80th percentile; "
        f"speed-up over {comparison.baseline}, by round; {comparison.baseline} against itself: "
        f"{spread(noise, '{:.3f}x'.format)}; warm-up of {warmup:.1f} s not counted; "
        f"weights: {case.weights}; errors against float64."
    )
    if any(timing.cpu_seconds for timing in comparison.timings):
        text += " CPU ms: of all threads; each sample begins when no other's threads spin."
    if noise and noise.p80 > NOISY * noise.p20:
        text += " The machine was busy: the noise is too large for fine differences."
    return text


Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def probe_table(case: Case) -> Table:
    """Latency, memory and sustained throughput of each contender; only columns with a figure."""
    columns: dict[str, Callable[[Probe], str | None]] = {
        "p50 ms": lambda p: milliseconds(p.p50),
        "p90 ms": lambda p: milliseconds(p.p90),
        "p99 ms": lambda p: milliseconds(p.p99),
        "calls": lambda p: str(p.calls),
        "GPU ms": lambda p: None if p.gpu is None else milliseconds(p.gpu),
        "until return us": lambda p: _microseconds(p.host),
        "Python us": lambda p: _microseconds(p.python),
        "peak MB": lambda p: None if p.peak_bytes is None else f"{p.peak_bytes / 1e6:,.1f}",
        "sustained images/s": _sustained,
    }
    shown = [c for c, show in columns.items() if any(show(p) for p in case.probes.values())]
    rows = [
        (name, *(columns[column](probe) or "-" for column in shown))
        for name, probe in case.probes.items()
    ]
    return ("contender", *shown), rows


def _microseconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds * 1e6:,.0f}"


def _sustained(probe: Probe) -> str | None:
    if probe.sustained is None:
        return None
    clock = "" if probe.sm_clock is None else f" at {probe.sm_clock} MHz"
    return f"{probe.sustained:,.1f}{clock}"


def layer_table(layers: Sequence[LayerTime]) -> Table:
    """Each step's time beside its floor, and the whole."""
    header = ("step", "what", "us", "floor us", "share", "bound by")
    rows = [
        (e.name, e.what, f"{e.seconds * 1e6:,.1f}", f"{e.floor * 1e6:,.1f}", f"{e.share:.0%}")
        + (e.bound,)
        for e in layers
    ]
    seconds, floor = sum(e.seconds for e in layers), sum(e.floor for e in layers)
    total = (f"{seconds * 1e6:,.1f}", f"{floor * 1e6:,.1f}", f"{floor / seconds:.0%}")
    return header, [*rows, ("all steps", "", *total, "")]


def cold_table(starts: Sequence[ColdStart]) -> Table:
    """Process start to first answer."""
    rows = [
        (s.contender, s.caches, f"{s.seconds:.2f} s" if s.seconds else f"not measured: {s.failure}")
        for s in starts
    ]
    return ("contender", "caches", "to the first answer"), rows


def ceiling_table(ceilings: Sequence[Ceilings]) -> Table:
    """Measured memory bandwidth, that of the last cache, and matrix throughput."""
    rows = [
        (
            c.name,
            f"{c.bytes_per_second / 1e9:,.1f} GB/s",
            "not measured"
            if c.cache_bytes_per_second is None
            else f"{c.cache_bytes_per_second / 1e9:,.0f} GB/s",
            f"{c.flop_per_second / 1e12:,.2f} TFLOP/s",
        )
        for c in ceilings
    ]
    header = ("ceiling", "copy, read plus written", "L2 to the cores", "large matrix product")
    return header, rows


def is_ours(contender: str) -> bool:
    """Whether a contender is fastres, by its name."""
    return contender.startswith("fastres")


def spread(samples: Samples, form: Callable[[float], str]) -> str:
    """``median (p20-p80)``, or a dash where nothing was measured."""
    if not samples:
        return "-"
    return f"{form(samples.median)} ({form(samples.p20)}-{form(samples.p80)})"


def milliseconds(seconds: float) -> str:
    """Three digits of a duration, without an exponent."""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _row(case: Case, timing: Timing) -> tuple[str, ...]:
    error = case.errors.get(timing.name)
    wrong = ("-", "-") if error is None else _error_cells(error)
    if timing.failure:
        return (timing.name, f"no time: {timing.failure}", "-", "-", "-", *wrong)
    return (
        timing.name,
        spread(timing.seconds, milliseconds),
        milliseconds(timing.cpu_seconds.median) if timing.cpu_seconds else "-",
        f"{case.images_per_second(timing).median:,.1f}",
        spread(case.comparison.speedup(timing.name), "{:.2f}x".format),
        *wrong,
    )


def _error_cells(error: OutputError) -> tuple[str, str]:
    return f"{error.rms / error.reference_rms:.1e}", f"{error.agreement:.1%}"
