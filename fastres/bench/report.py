"""Results as JSON, as Markdown and as one self-contained HTML file.

The JSON is described in docs/report.md; ``SCHEMA_VERSION`` grows when a field changes its meaning.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..files import atomic_write, check_target
from ..perf.environment import Environment, environment
from ..perf.roofline import Ceilings
from .html import page
from .results import (
    COLUMNS,
    Case,
    Check,
    ColdStart,
    Picture,
    case_rows,
    ceiling_table,
    cold_table,
    footnote,
    is_ours,
    layer_table,
    probe_table,
)

SCHEMA = "fastres.report"
SCHEMA_VERSION = 1
SUFFIXES = (".json", ".md", ".html")


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
    cold_starts: tuple[ColdStart, ...] = ()
    ceilings: tuple[Ceilings, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def now(cls, title: str, **parts: Any) -> Report:
        """A report of this process: its environment, its command line and the time (UTC)."""
        return cls(title, environment(), command_line(), now(), **parts)

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
            "cold_starts": [asdict(start) for start in self.cold_starts],
            "ceilings": [asdict(ceiling) for ceiling in self.ceilings],
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
            parts += _side_tables(case)
        if self.cold_starts:
            parts += ["## Process start to first answer", _table(*cold_table(self.cold_starts))]
        if self.ceilings:
            parts += ["## What this machine can do", _table(*ceiling_table(self.ceilings))]
        parts += self.notes
        return "\n\n".join(parts) + "\n"

    def to_html(self) -> str:
        """One file that needs nothing else: style and drawings are inside."""
        return page(self)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the form that the suffix names, whole or not at all.

        Raises ValueError for another suffix than .json, .md or .html; OSError where it cannot.
        """
        path = check_output(path)
        text = {".json": self.to_json, ".md": self.to_markdown, ".html": self.to_html}[path.suffix]
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text().encode())


def _side_tables(case: Case) -> list[str]:
    parts = [_table(*probe_table(case))] if case.probes else []
    for name, layers in case.layers.items():
        parts += [f"### {name}, step by step", _table(*layer_table(layers))]
    return parts


def started(path: Path) -> Callable[[Case], None]:
    """Begin a file of JSON lines with where and when; returns what appends a finished case.

    A run that is killed keeps the cases that were done.
    """
    head = {
        "schema": f"{SCHEMA}.lines",
        "schema_version": SCHEMA_VERSION,
        "created": now(),
        "command": command_line(),
        "environment": environment().to_dict(),
    }
    check_target(path, makes_folder=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, _line(head).encode())

    def append(case: Case) -> None:
        size = path.stat().st_size
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(_line(case.to_dict()))
        except OSError:  # a full disk: half a line is no JSON
            os.truncate(path, size)
            raise

    return append


def now() -> str:
    """The time (UTC), to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _line(value: Any) -> str:
    return json.dumps(_finite(value), allow_nan=False) + "\n"


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
    check_target(path, makes_folder=True)
    return path


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
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
