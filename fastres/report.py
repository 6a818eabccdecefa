"""Results as JSON, as Markdown and as one self-contained HTML file.

The JSON is described in docs/report.md; ``SCHEMA_VERSION`` grows when a field changes its meaning.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .checkpoint import atomic_write
from .environment import Environment, environment
from .timing import Comparison, Samples, Timing

SCHEMA = "fastres.report"
SCHEMA_VERSION = 1
SUFFIXES = (".json", ".md", ".html")


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


@dataclass(frozen=True)
class Report:
    """Everything one run found out. ``ok`` is False when any check or any of our outputs failed."""

    title: str
    environment: Environment
    command: str
    created: str
    checks: tuple[Check, ...] = ()
    cases: tuple[Case, ...] = ()
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def now(cls, title: str, **parts: Any) -> Report:
        """A report of this process: its environment, its command line and the time (UTC)."""
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(title, environment(), command_line(), created, **parts)

    @property
    def ok(self) -> bool:
        ours = (n for case in self.cases for n in case.comparison.failures if is_ours(n))
        return all(check.ok for check in self.checks) and not any(ours)

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON structure."""
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "title": self.title,
            "created": self.created,
            "command": self.command,
            "ok": self.ok,
            "environment": self.environment.to_dict(),
            "checks": [asdict(check) for check in self.checks],
            "cases": [case.to_dict() for case in self.cases],
            "pictures": [asdict(picture) for picture in self.pictures],
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """Indented JSON, without NaN or infinities."""
        return json.dumps(_finite(self.to_dict()), indent=1, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """Tables for a README or a terminal."""
        parts = [f"# {self.title}", f"{self.environment.summary()}; `{self.command}`"]
        if self.checks:
            rows = [[c.name, "ok" if c.ok else "WRONG", c.detail] for c in self.checks]
            parts.append(_table(["check", "", ""], rows))
        for case in self.cases:
            parts += [f"## {case.title}", _table(COLUMNS, [list(r) for r in case_rows(case)])]
            parts.append(footnote(case))
        parts += self.notes
        return "\n\n".join(parts) + "\n"

    def to_html(self) -> str:
        """One file that needs nothing else: style and drawings are inside."""
        from .report_html import page

        return page(self)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the form that the suffix names, whole or not at all.

        Raises ValueError for another suffix than .json, .md or .html; OSError where it cannot.
        """
        path = check_output(path)
        text = {".json": self.to_json, ".md": self.to_markdown, ".html": self.to_html}[path.suffix]
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text().encode())


COLUMNS = ("", "ms per batch", "images/s", "speed-up", "RMS error / RMS", "top-1 agreement")


def case_rows(case: Case) -> list[tuple[str, ...]]:
    """The cells of a case's table, one row per contender, in the columns of ``COLUMNS``."""
    return [_row(case, timing) for timing in case.comparison.timings]


def footnote(case: Case) -> str:
    """How to read a case's table: the baseline, the spread, the noise and the warm-up."""
    comparison = case.comparison
    noise = spread(comparison.noise, "{:.3f}x")
    warmup = sum(timing.warmup for timing in comparison.timings)
    return (
        f"{comparison.rounds} interleaved rounds in random order on {comparison.device}, "
        f"{comparison.clock}; medians, and in brackets the 20th to 80th percentile; speed-up over "
        f"{comparison.baseline}, by round; {comparison.baseline} against itself: {noise}; warm-up "
        f"of {warmup:.1f} s not counted; weights: {case.weights}; errors against float64."
    )


def is_ours(contender: str) -> bool:
    """Whether a contender is fastres, by its name."""
    return contender.startswith("fastres")


def spread(samples: Samples, form: str, scale: float = 1.0) -> str:
    """``median (p20 to p80)``, or a dash where nothing was measured."""
    if not samples:
        return "-"
    quantiles = (samples.p20, samples.median, samples.p80)
    low, middle, high = (form.format(value * scale) for value in quantiles)
    return f"{middle} ({low} to {high})"


def command_line() -> str:
    """The command of this process, as it would be typed."""
    program = Path(sys.argv[0])
    name = "fastres" if program.name in ("fastres", "__main__.py") else program.name
    return shlex.join([name, *sys.argv[1:]])


def check_output(path: str | os.PathLike[str]) -> Path:
    """The path of a report, if one can be written there.

    Raises ValueError for a suffix that is no report's; OSError where the folder cannot be written.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a report ends in {', '.join(SUFFIXES)}; got {str(path)!r}")
    folder = next(p for p in path.absolute().parents if p.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write {path}: {folder} is not a folder to write in")
    return path


def _row(case: Case, timing: Timing) -> tuple[str, ...]:
    error = case.errors.get(timing.name)
    wrong = ("-", "-") if error is None else _error_cells(error)
    if timing.failure:
        return (timing.name, f"no time: {timing.failure}", "-", "-", *wrong)
    return (
        timing.name,
        spread(timing.seconds, "{:.3g}", 1e3),
        f"{case.images_per_second(timing).median:,.1f}",
        spread(case.comparison.speedup(timing.name), "{:.2f}x"),
        *wrong,
    )


def _error_cells(error: OutputError) -> tuple[str, str]:
    return f"{error.rms / error.reference_rms:.1e}", f"{error.agreement:.1%}"


def _table(header: list[str] | tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "/") for c in line) + " |" for line in lines)


def _finite(value: Any) -> Any:
    """The same structure, with NaN and infinities, which JSON lacks, spelt as strings."""
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
