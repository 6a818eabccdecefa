"""The HTML form of a report: one file, readable in light and dark, by eye and by screen reader."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from . import plots
from .results import (
    COLUMNS,
    Case,
    Check,
    Picture,
    case_rows,
    ceiling_table,
    cold_table,
    footnote,
    is_ours,
    layer_table,
    probe_table,
)

if TYPE_CHECKING:
    from .report import Report

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #566172; --paper: #fff; --line: #d9dee6;
  --panel: #f5f7fa; --ours: #c2410c; --theirs: #64748b; --good: #15703a; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #a3adbb; --paper: #12161c;
  --line: #2f3844; --panel: #1a2028; --ours: #fb923c; --theirs: #8695aa; --good: #4ade80;
  --bad: #ff8a7a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 62rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p.sub, p.note, figcaption { color: var(--soft); } p.note, figcaption { font-size: .875rem; }
code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } .wide td, .wide th { white-space: nowrap; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem .4rem 0; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th:first-child, td:first-child, table.facts td { text-align: left; }
table.facts td { overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 600; font-size: .875rem; }
tbody th { font-weight: 400; text-align: left; } tr.ours th { font-weight: 650; }
.wide td.failure { text-align: left; white-space: normal; color: var(--bad); }
ul.checks { list-style: none; padding: 0; margin: 1rem 0; }
ul.checks li { padding: .5rem .75rem; margin: .4rem 0; background: var(--panel);
  border-left: 4px solid var(--good); } ul.checks li.wrong { border-color: var(--bad); }
ul.checks b { margin-right: .5rem; } .good { color: var(--good); } .bad { color: var(--bad); }
svg.chart { width: 100%; min-width: 34rem; height: auto; display: block; }
svg text { font: 13px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--ink); }
svg .ours { fill: var(--ours); } svg .theirs { fill: var(--theirs); }
svg .dot { fill: var(--paper); stroke-dasharray: none; }
svg .grid { stroke: var(--line); } h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
ul.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; }
ul.legend svg { vertical-align: middle; } svg .whisker { stroke: var(--ink); stroke-width: 1.5; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr));
  gap: 1rem; }
.pictures figure { margin: 0; } .pictures svg { width: 100%; border: 1px solid var(--line);
  display: block; }
details { margin-top: 1rem; } summary { cursor: pointer; font-weight: 600; }
"""


def page(report: Report) -> str:
    """The whole document."""
    body = [
        f"<h1>{escape(report.title)}</h1>",
        f'<p class="sub">{escape(report.environment.summary())}<br>'
        f"<code>{escape(report.command)}</code>, {escape(report.created)}</p>",
        _verdict(report),
        _checks(report.checks),
        plots.over_batch(report.cases),
        *map(_case, report.cases),
        _cold(report),
        _ceilings(report),
        _pictures(report.pictures),
        *(f'<p class="note">{escape(note)}</p>' for note in report.notes),
        _environment(report),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _verdict(report: Report) -> str:
    if report.ok:
        return '<p><b class="good">✓ Every answer was checked and is right.</b></p>'
    return '<p><b class="bad">✗ Some answers are wrong; no speed is given for them.</b></p>'


def _checks(checks: tuple[Check, ...]) -> str:
    if not checks:
        return ""
    items = (
        f'<li class="{"right" if c.ok else "wrong"}">'
        f"<b>{'✓' if c.ok else '✗ wrong:'} {escape(c.name)}</b>{escape(c.detail)}</li>"
        for c in checks
    )
    return f'<h2>Answers</h2>\n<ul class="checks">{"".join(items)}</ul>'


def _case(case: Case) -> str:
    return (
        f"<section><h2>{escape(case.title)}</h2>\n"
        f'<div class="wide">{plots.throughput(case)}</div>\n'
        f"{_plain_table(COLUMNS, case_rows(case))}\n"
        f'<p class="note">{escape(footnote(case))}</p>\n{_side(case)}</section>'
    )


def _table_row(cells: tuple[str, ...]) -> str:
    name, *values = cells
    kind = ' class="ours"' if is_ours(name) else ""
    if values[0].startswith("no time"):
        rest = f'<td class="failure" colspan="{len(values)}">{escape(values[0])}</td>'
    else:
        rest = "".join(f"<td>{escape(value)}</td>" for value in values)
    return f'<tr{kind}><th scope="row">{escape(name)}</th>{rest}</tr>'


def _drawing(title: str, drawn: str) -> str:
    return f'<h3>{escape(title)}</h3>\n<div class="wide">{drawn}</div>' if drawn else ""


def _side(case: Case) -> str:
    """What was measured of a case beside its throughput."""
    parts = []
    if case.probes:
        single = "Latency of a single call: median, whisker from p90 to p99"
        parts.append(_drawing(single, plots.latency(case)))
        parts.append(_drawing("Peak memory, beyond weights and input", plots.memory(case)))
        parts.append(_drawing("Relative RMS error (logarithmic)", plots.errors(case)))
        parts.append(_plain_table(*probe_table(case)))
    for name, layers in case.layers.items():
        title = f"{name}: share of each step's floor that it achieves"
        parts.append(_drawing(title, plots.shares(layers, f"{name}, {case.title}")))
        parts.append(
            f"<details><summary>{escape(name)}, step by step</summary>"
            f"{_plain_table(*layer_table(layers))}</details>"
        )
    return "\n".join(parts)


def _cold(report: Report) -> str:
    if not report.cold_starts:
        return ""
    drawn = f'<div class="wide">{plots.cold(report.cold_starts)}</div>'
    table = _plain_table(*cold_table(report.cold_starts))
    return f"<section><h2>Process start to first answer</h2>{drawn}{table}</section>"


def _ceilings(report: Report) -> str:
    if not report.ceilings:
        return ""
    table = _plain_table(*ceiling_table(report.ceilings))
    return f"<section><h2>What this machine can do</h2>{table}</section>"


def _plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in header)
    body = "\n".join(_table_row(tuple(row)) for row in rows)
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _pictures(pictures: tuple[Picture, ...]) -> str:
    if not pictures:
        return ""
    return f'<h2>Some pictures</h2>\n<div class="pictures">{"".join(map(_picture, pictures))}</div>'


def _picture(picture: Picture) -> str:
    height, width = len(picture.pixels), len(picture.pixels[0])
    squares = "".join(
        f'<rect x="{x}" y="{y}" width="1.02" height="1.02" fill="#{_grey(value) * 3}"/>'
        for y, row in enumerate(picture.pixels)
        for x, value in enumerate(row)
    )
    verdict = "✓" if picture.correct else "✗ it is " + picture.label
    kind = "good" if picture.correct else "bad"
    return (
        f'<figure><svg role="img" aria-label="the image of a {escape(picture.label)}" '
        f'viewBox="0 0 {width} {height}" shape-rendering="crispEdges">{squares}</svg>'
        f"<figcaption>{escape(picture.predicted)} ({picture.probability:.0%}) "
        f'<span class="{kind}">{escape(verdict)}</span></figcaption></figure>'
    )


def _grey(value: float) -> str:
    return f"{round(255 * min(max(value, 0.0), 1.0)):02x}"


def _environment(report: Report) -> str:
    facts = flatten(report.environment.to_dict())
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in facts
    )
    return (
        "<details><summary>Environment</summary>"
        f'<table class="facts"><tbody>{rows}</tbody></table></details>'
    )


def flatten(value: Any, name: str = "") -> list[tuple[str, str]]:
    """``(dotted name, text)`` of every leaf in nested dicts and lists."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return [(name, str(value))]
    return [pair for key, item in items for pair in flatten(item, f"{name}.{key}".strip("."))]
