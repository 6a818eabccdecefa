"""Inline SVG of a report's figures: horizontal bars, and lines over the batch size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .results import Case, ColdStart, LayerTime, is_ours, milliseconds

CHART_WIDTH, LABEL_WIDTH, VALUE_WIDTH, ROW, BAR = 720, 230, 150, 30, 18
HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 78, 24, 16, 52
COLOURS = ("#2563eb", "#0f766e", "#7c3aed", "#b45309", "#be185d", "#4d7c0f", "#0e7490", "#6b7280")
OURS = ("#c2410c", "#f59e0b", "#dc2626", "#7f1d1d")
DASHES = ("", "7 3", "2 3", "9 3 2 3")


@dataclass(frozen=True)
class Bar:
    """One bar; ``low`` and ``high`` end its whisker, ``text`` stands behind it."""

    label: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None


def bars(rows: Sequence[Bar], label: str, full: float | None = None, log: bool = False) -> str:
    """Horizontal bars; empty without any.

    Args:
        label: what a screen reader says.
        full: the value of a bar of full length; by default the largest.
        log: lengths are logarithms, from a decade below the smallest value.
    """
    if not rows:
        return ""
    width = CHART_WIDTH - LABEL_WIDTH - VALUE_WIDTH
    top = full or max(max(row.value, row.high or 0.0) for row in rows)
    if log:
        base = math.floor(math.log10(min(row.value for row in rows))) - 1.0
        span = math.log10(top) - base

        def length(value: float) -> float:
            return width * (math.log10(value) - base) / span

    else:

        def length(value: float) -> float:
            return width * min(value / top, 1.0)

    drawn = []
    for index, row in enumerate(rows):
        low = length(row.value if row.low is None else row.low)
        high = length(row.value if row.high is None else row.high)
        drawn.append(_bar(row, index, length(row.value), low, high))
    height = ROW * len(rows) + 4
    return (
        f'<svg class="chart" role="img" aria-label="{escape(label)}" '
        f'viewBox="0 0 {CHART_WIDTH} {height}">{"".join(drawn)}</svg>'
    )


def _bar(row: Bar, index: int, length: float, low: float, high: float) -> str:
    top, middle = ROW * index + 4, ROW * index + 4 + BAR / 2
    end = LABEL_WIDTH + max(length, high) + 10
    whisker = (
        f'<line class="whisker" x1="{LABEL_WIDTH + low:.1f}" y1="{middle}" '
        f'x2="{LABEL_WIDTH + high:.1f}" y2="{middle}"/>'
    )
    return (
        f'<text x="{LABEL_WIDTH - 12}" y="{middle + 4.5:.1f}" text-anchor="end">'
        f"{escape(row.label)}</text>"
        f'<rect class="{"ours" if is_ours(row.label) else "theirs"}" x="{LABEL_WIDTH}" '
        f'y="{top}" width="{length:.1f}" height="{BAR}" rx="2"/>'
        f"{whisker if high > low else ''}"
        f'<text x="{end:.1f}" y="{middle + 4.5:.1f}">{escape(row.text)}</text>'
    )


def throughput(case: Case) -> str:
    """Images per second of each contender, with the 20th to 80th percentile as a whisker."""
    rates = {t.name: case.images_per_second(t) for t in case.comparison.timings if t.seconds}
    rows = [
        Bar(name, r.median, f"{r.median:,.1f} images/s", r.p20, r.p80) for name, r in rates.items()
    ]
    return bars(rows, f"Images per second, {case.title}; the figures are in the table below")


def latency(case: Case) -> str:
    """Single calls: the median as a bar, the 90th and 99th percentile as its whisker."""
    rows = [
        Bar(n, p.p50, f"{milliseconds(p.p50)} ms, p99 {milliseconds(p.p99)}", p.p90, p.p99)
        for n, p in case.probes.items()
    ]
    return bars(rows, f"Latency of a single call, {case.title}")


def memory(case: Case) -> str:
    """Peak memory of a call, beyond weights and input."""
    rows = [
        Bar(n, p.peak_bytes, f"{p.peak_bytes / 1e6:,.1f} MB")
        for n, p in case.probes.items()
        if p.peak_bytes
    ]
    return bars(rows, f"Peak memory, {case.title}")


def errors(case: Case) -> str:
    """Relative RMS error against float64, on a logarithmic scale."""
    relative = {n: e.rms / e.reference_rms for n, e in case.errors.items() if e.reference_rms}
    rows = [Bar(n, r, f"{r:.1e}") for n, r in relative.items() if 0 < r < math.inf]
    return bars(rows, f"Relative RMS error against float64, {case.title}", log=True)


def shares(layers: Sequence[LayerTime], title: str) -> str:
    """Each step's achieved share of its floor; a full bar is all that the machine can do."""
    rows = [Bar(e.name, e.share, f"{e.share:.0%} of {e.bound}") for e in layers if e.seconds]
    return bars(rows, f"Achieved share of the floor, {title}", full=1.0)


def cold(starts: Sequence[ColdStart]) -> str:
    """Process start to first answer."""
    rows = [
        Bar(f"{s.contender}, caches {s.caches}", s.seconds, f"{s.seconds:.2f} s")
        for s in starts
        if s.seconds
    ]
    return bars(rows, "Seconds from process start to the first answer")


def over_batch(cases: Sequence[Case]) -> str:
    """Throughput over batch size, one drawing for each network and image size with two batches."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        _, channels, height, width = case.shape
        form = f", {case.form}" if case.form else ""
        groups.setdefault(f"{case.model}, {channels}x{height}x{width}{form}", []).append(case)
    return "".join(
        _lines(title, group)
        for title, group in groups.items()
        if len({case.shape[0] for case in group}) > 1
    )


def _lines(title: str, cases: Sequence[Case]) -> str:
    series: dict[str, dict[int, float]] = {}
    for case in cases:
        batch = case.shape[0]
        for timing in case.comparison.timings:
            if timing.seconds:
                rate = case.images_per_second(timing).median
                series.setdefault(timing.name, {}).setdefault(batch, rate)
        for kind, seconds in case.floors.items():
            series.setdefault(f"floor {kind}", {}).setdefault(batch, batch / seconds)
    batches = sorted({batch for points in series.values() for batch in points})
    if not batches:
        return ""
    top = _ceiling(max(rate for points in series.values() for rate in points.values()))
    span = math.log2(batches[-1] / batches[0])

    def place(batch: int, rate: float) -> tuple[float, float]:
        x = LEFT + (CHART_WIDTH - LEFT - RIGHT) * math.log2(batch / batches[0]) / span
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * rate / top

    drawn = [_axes(batches, top, place(batches[0], 0)[1], [place(b, 0)[0] for b in batches])]
    keys = []
    for name, style in _styles(list(series)).items():
        points = [place(b, rate) for b, rate in sorted(series[name].items())]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        drawn.append(f'<polyline points="{path}" fill="none" {style}/>')
        drawn += [
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3" {style}/>' for x, y in points
        ]
        swatch = f'<svg width="34" height="10"><line x1="0" y1="5" x2="34" y2="5" {style}/></svg>'
        keys.append(f"<li>{swatch} {escape(name)}</li>")
    label = escape(f"Images per second over batch size, {title}")
    return (
        f"<section><h2>Throughput over batch size: {escape(title)}</h2>"
        f'<div class="wide"><svg class="chart" role="img" aria-label="{label}" '
        f'viewBox="0 0 {CHART_WIDTH} {HEIGHT}">{"".join(drawn)}</svg></div>'
        f'<ul class="legend">{"".join(keys)}</ul></section>'
    )


def _axes(batches: Sequence[int], top: float, bottom: float, places: Sequence[float]) -> str:
    parts = []
    for part in range(5):
        value, y = top * part / 4, bottom - (bottom - TOP) * part / 4
        parts.append(
            f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{CHART_WIDTH - RIGHT}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 8}" y="{y + 4.5:.1f}" text-anchor="end">{value:,.10g}</text>'
        )
    parts += [
        f'<text x="{x:.1f}" y="{bottom + 20:.1f}" text-anchor="middle">{batch}</text>'
        for x, batch in zip(places, batches, strict=True)
    ]
    middle = (LEFT + CHART_WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle:.1f}" y="{bottom + 42:.1f}" text-anchor="middle">'
        "images/s (upwards) over batch size</text>"
    )
    return "".join(parts)


def _styles(names: Sequence[str]) -> dict[str, str]:
    """Stroke attributes by name: fastres warm and thick, floors grey and dashed."""
    found, ours, theirs = {}, 0, 0
    for name in names:
        if name.startswith("floor"):
            found[name] = 'stroke="#9ca3af" stroke-width="1.5" stroke-dasharray="4 4"'
        elif is_ours(name):
            found[name] = f'stroke="{OURS[ours % len(OURS)]}" stroke-width="3"'
            ours += 1
        else:
            dash = DASHES[theirs // len(COLOURS) % len(DASHES)]
            colour = COLOURS[theirs % len(COLOURS)]
            found[name] = f'stroke="{colour}" stroke-width="1.75" stroke-dasharray="{dash}"'
            theirs += 1
    return found


def _ceiling(value: float) -> float:
    """The least of 1, 2, 4, 6, 8 times a power of ten that is no smaller."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= value)
