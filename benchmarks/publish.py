"""Keep a report as the latest of its machine, and write the README's table from all of them.

python benchmarks/publish.py out/standard.json    # publish a report, then write the table
python benchmarks/publish.py                      # only write the table
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
sys.path.insert(0, str(ROOT))

from fastres.bench.compare import load, machine  # noqa: E402
from fastres.bench.results import is_ours  # noqa: E402

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
HISTORY = (
    *("created", "commit", "torch", "model", "batch", "size", "form", "contender"),
    *("median_s", "p20_s", "p80_s", "images_per_second", "relative_rms_error"),
)
HEADER = (
    *("network", "batch", "image", "dtype", "fastres images/s", "over eager fp32"),
    *("over eager, same dtype", "fastest other", "over it"),
)
KINDS = ("fp32", "fp16", "bf16", "int8")


def publish(path: Path, results: Path = RESULTS) -> Path:
    """Copy a report's files to its machine's folder and append its rows to the history.

    Raises:
        ValueError: it is no report, or one with wrong answers, which is not published.
        OSError: it cannot be read.
    """
    report = load(path)
    if not report["ok"]:
        raise ValueError(f"{path} has wrong answers or lost cases; it is not published")
    folder = results / slug(machine(report))
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in (".json", ".md", ".html"):
        if path.with_suffix(suffix).exists():
            shutil.copyfile(path.with_suffix(suffix), folder / f"latest{suffix}")
    history = folder / "history.csv"
    fresh = not history.exists()
    with history.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([HISTORY] if fresh else [])
        writer.writerows(history_rows(report))
    return folder


def slug(name: str) -> str:
    """A folder name out of a machine's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def history_rows(report: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """One row per contender that has a time."""
    found = report["environment"]
    where = (report["created"], found["commit"], found["versions"]["torch"])
    for case in report["cases"]:
        batch, _, size, _ = case["shape"]
        for timing in case["timings"]:
            t = timing["seconds"]
            if t:
                error = case["errors"].get(timing["name"])
                relative = error and f"{error['rms'] / error['reference_rms']:.2e}"
                times = (f"{t[key]:.6g}" for key in ("median", "p20", "p80"))
                rate = f"{batch / t['median']:.5g}"
                what = (case["model"], batch, size, case["form"], timing["name"])
                yield (*where, *what, *times, rate, relative)


def tables(results: Path = RESULTS) -> str:
    """The README's text: a table per machine, and what was not measured."""
    reports = [load(path) for path in sorted(results.glob("*/latest.json"))]
    parts = [_section(report) for report in reports]
    if not any(report["environment"]["gpus"] for report in reports):
        parts.append("GPU: not measured. No figure here is of a CUDA device.")
    if all(report["environment"]["gpus"] for report in reports):
        parts.append("CPU: not measured.")
    return "\n\n".join(parts)


def _section(report: dict[str, Any]) -> str:
    found = report["environment"]
    folder = f"benchmarks/results/{slug(machine(report))}"
    intro = (
        f"**{machine(report)}**, torch {found['versions']['torch']}, "
        f"commit {found['commit'] or 'unknown'}, {report['created'][:10]}, "
        f"`{report['command']}`. Medians of interleaved rounds, ratios round by round; outputs "
        f"checked against float64 in the same run. [Everything measured]({folder}/latest.md), "
        f"[raw samples]({folder}/latest.json)."
    )
    rows = [row for case in report["cases"] for row in _rows(case)]
    lines = [HEADER, ("---",) * 4 + ("---:",) * 5, *rows]
    missing = sorted(
        {
            f"{t['name']} ({t['failure']})"
            for case in report["cases"]
            for t in case["timings"]
            if t["failure"]
        }
    )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join([intro, table, *([f"No time: {'; '.join(missing)}."] if missing else [])])


def _rows(case: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    batch, _, height, width = case["shape"]
    timed = {t["name"]: t["seconds"]["values"] for t in case["timings"] if t["seconds"]}
    for name in (t["name"] for t in case["timings"] if is_ours(t["name"])):
        kind = kind_of(name)
        label = " ".join(filter(None, [kind, *name.split()[2:], case["form"]]))
        what = (case["model"], str(batch), f"{height}x{width}", label)
        if name not in timed:
            yield (*what, "no time", "-", "-", "-", "-")
            continue
        alike = {n: v for n, v in timed.items() if kind_of(n) == kind and not is_ours(n)}
        eager = {n: v for n, v in alike.items() if n.startswith("eager")}
        fastest = min(alike, key=lambda n: median(alike[n]), default=None)
        yield (
            *what,
            f"{batch / median(timed[name]):,.1f}",
            _ratio(timed.get(case["baseline"]), timed[name]),
            _ratio(min(eager.values(), key=median, default=None), timed[name]),
            fastest or "-",
            _ratio(alike[fastest] if fastest else None, timed[name]),
        )


def kind_of(name: str) -> str:
    """The short dtype in a contender's name."""
    return next((word for word in name.split() if word in KINDS), "")


def _ratio(slow: list[float] | None, fast: list[float]) -> str:
    if slow is None:
        return "-"
    return f"{median(a / b for a, b in zip(slow, fast, strict=False)):.2f}x"


def with_tables(readme: str, text: str) -> str:
    """The README with ``text`` between its markers. Raises ValueError without exactly one pair."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"the README needs one {BEGIN} and one {END}")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Verbatim)
    parser.add_argument("report", nargs="?", type=Path, help="a report's .json")
    arguments = parser.parse_args()
    try:
        if arguments.report:
            print(f"published in {publish(arguments.report)}")
        README.write_text(with_tables(README.read_text("utf-8"), tables()), "utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote the tables of {README}")
    return 0


class _Verbatim(argparse.RawDescriptionHelpFormatter):
    """Keeps the commands of the description on lines of their own."""


if __name__ == "__main__":
    sys.exit(main())
