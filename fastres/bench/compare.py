"""Two reports of one machine: what got faster or slower by more than either run's spread."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from ..files import read_text
from .report import SCHEMA, SCHEMA_VERSION
from .results import is_ours

Key = tuple[str, str]
LARGEST = 2**26  # bytes of a report


@dataclass(frozen=True)
class Change:
    """One contender of one case in both reports.

    Attributes:
        ratio: how many times faster the new report is, or None where one has no time.
        verdict: faster, slower, same (within the spread), or why there is no ratio.
    """

    case: str
    contender: str
    ratio: float | None
    verdict: str

    @property
    def ours(self) -> bool:
        return is_ours(self.contender)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A report out of its JSON file.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is no report, is incomplete, or is of another version of the schema.
    """
    text = read_text(path, LARGEST)
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    schema = read.get("schema") if isinstance(read, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} is no report: its schema is {schema!r}, not {SCHEMA!r}")
    if read.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has version {read.get('schema_version')!r} of the schema; "
            f"this fastres reads {SCHEMA_VERSION}"
        )
    try:
        machine(read)
        _check_figures(read)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no whole report of fastres bench ({reason})") from None
    return read


def _check_figures(report: dict[str, Any]) -> None:
    """Raises for a report that lacks what a comparison reads, or has something else there."""
    for (_, name), (timing, factor) in _timings(report).items():
        seconds = timing["seconds"]
        figures = [seconds[part] for part in ("median", "p20", "p80")] if seconds else []
        if not isinstance(name, str) or not all(0 < f < math.inf for f in (factor, *figures)):
            raise ValueError(f"the times of {name!r} are {seconds!r}")


def machine(report: dict[str, Any]) -> str:
    """What of the environment makes times comparable: the GPU, or the CPU and its threads."""
    found = report["environment"]
    if found["gpus"]:
        return str(found["gpus"][0]["name"])
    return f"{found['cpu']['name']}, {found['cpu']['threads']} threads"


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Every contender of either report, the cases in the order of the new one.

    A change counts where the ranges from the 20th to the 80th percentile do not overlap, and the
    medians are further apart than the noise of either run (the baseline against itself).

    Raises:
        ValueError: the reports are of different machines.
    """
    if machine(old) != machine(new):
        raise ValueError(f"different machines: {machine(old)!r} and {machine(new)!r}")
    before, after = _timings(old), _timings(new)
    return [_change(key, before.get(key), after.get(key)) for key in {**after, **before}]


def _timings(report: dict[str, Any]) -> dict[Key, tuple[dict[str, Any], float]]:
    """Each timing with the noise of its run, as a factor from 1 on."""
    found: dict[Key, tuple[dict[str, Any], float]] = {}
    for case in report["cases"]:
        parts = (case["model"], "x".join(map(str, case["shape"])), case.get("form"))
        title = f"{' '.join(filter(None, parts))} on {case['device']}"
        noise = case["noise"]
        factor = max(noise["p80"], 1 / noise["p20"]) if noise else 1.0
        for timing in case["timings"]:
            found.setdefault((title, timing["name"]), (timing, factor))
    return found


def _change(
    key: Key, old: tuple[dict[str, Any], float] | None, new: tuple[dict[str, Any], float] | None
) -> Change:
    if old is None or new is None:
        return Change(*key, None, "only in the new report" if old is None else "only in the old")
    (before, noise), (after, later_noise) = old, new
    a, b = before["seconds"], after["seconds"]
    if not a or not b:
        lost = "no time in both" if a == b else ("no longer measured" if a else "measured now")
        return Change(*key, None, lost)
    ratio = a["median"] / b["median"]
    noise = max(noise, later_noise)
    if b["p80"] < a["p20"] and ratio > noise:
        return Change(*key, ratio, "faster")
    if b["p20"] > a["p80"] and ratio < 1 / noise:
        return Change(*key, ratio, "slower")
    return Change(*key, ratio, "same")
