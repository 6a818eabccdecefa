"""What a run finds out about a case, and the table that every form of a report shows of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from .timing import Comparison, Samples, Timing

COLUMNS = (
    "contender",
    "ms per batch",
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
class Case:
    """One model at one batch size on one device: the timings and the errors beside them.

    ``shape`` is an input's (N, C, H, W); ``weights`` says where the parameters come from.
    """

    model: str
    shape: tuple[int, int, int, int]
    weights: str
    comparison: Comparison
    errors: dict[str, OutputError] = field(default_factory=dict)

    @property
    def title(self) -> str:
        batch, _, height, width = self.shape
        return f"{self.model}, batch {batch}, {height}x{width}"

    def images_per_second(self, timing: Timing) -> Samples:
        """Throughput, one value per round."""
        return Samples(tuple(self.shape[0] / seconds for seconds in timing.seconds.values))

    def to_dict(self) -> dict[str, Any]:
        """The fields, with the comparison written out."""
        return {
            "model": self.model,
            "shape": list(self.shape),
            "weights": self.weights,
            **self.comparison.to_dict(),
            "errors": {name: asdict(error) for name, error in self.errors.items()},
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
    text = (
        f"{comparison.rounds} interleaved rounds in random order on {comparison.device}, "
        f"{comparison.clock}; medians, and in brackets the 20th to 80th percentile; speed-up over "
        f"{comparison.baseline}, by round; {comparison.baseline} against itself: "
        f"{spread(noise, '{:.3f}x'.format)}; warm-up of {warmup:.1f} s not counted; "
        f"weights: {case.weights}; errors against float64."
    )
    if noise and noise.p80 > NOISY * noise.p20:
        text += " The machine was busy: the noise is too large for fine differences."
    return text


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
        return (timing.name, f"no time: {timing.failure}", "-", "-", *wrong)
    return (
        timing.name,
        spread(timing.seconds, milliseconds),
        f"{case.images_per_second(timing).median:,.1f}",
        spread(case.comparison.speedup(timing.name), "{:.2f}x".format),
        *wrong,
    )


def _error_cells(error: OutputError) -> tuple[str, str]:
    return f"{error.rms / error.reference_rms:.1e}", f"{error.agreement:.1%}"
