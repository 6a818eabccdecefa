"""Drawings: nothing empty, nothing outside its frame, every series there."""

import dataclasses
import math
import re

import pytest
from test_report import EAGER, FAST, LAYERS, STARTS, Document, full_report

from fastres.bench import plots

FRAME = re.compile(r'viewBox="0 0 (\d+) (\d+)">(.*?)</svg>', re.S)
TEXT = re.compile(r'<text x="([-\d.]+)" y="([-\d.]+)"(?: text-anchor="(\w+)")?>([^<]+)</text>')
RECT = re.compile(r'<rect class="(\w+)" x="([\d.]+)" y="([\d.]+)" width="([-\d.]+)"')


@pytest.fixture(scope="module")
def html():
    return full_report().to_html()


def test_a_full_report_has_every_drawing_and_is_well_formed(html):
    document = Document(html)
    labels = [value for name, value in document.attributes if name == "aria-label"]
    for start in (
        "Images per second over batch size, resnet50",
        "Images per second, resnet50, batch 1",
        "Latency of a single call, resnet50, batch 1",
        "Peak memory, resnet50, batch 8",
        "Relative RMS error against float64, resnet50",
        "Achieved share of the floor, fastres fp32, resnet50, batch 1",
        "Seconds from process start",
    ):
        assert any(label.startswith(start) for label in labels), start


def test_no_label_is_cut_and_nothing_is_empty(html):
    frames = FRAME.findall(html)
    assert len(frames) >= 9
    for width, height, inside in frames:
        texts = TEXT.findall(inside)
        assert texts
        assert "<rect" in inside or "<polyline" in inside
        for x, y, anchor, text in texts:
            length = 7.5 * len(text)  # 13 px system fonts are narrower than 7.5 px per character
            left = float(x) - {"end": length, "middle": length / 2, "": 0}[anchor]
            assert left >= 0, text
            assert left + length <= int(width), text
            assert 0 <= float(y) <= int(height), text


def test_bars_are_as_long_as_their_values():
    drawn = plots.throughput(full_report().cases[0])
    lengths = {kind: float(width) for kind, _, _, width in RECT.findall(drawn)}
    assert lengths["ours"] == pytest.approx(2 * lengths["theirs"], rel=1e-3)


def test_a_share_of_one_fills_the_width():
    whole = dataclasses.replace(LAYERS[0], floor=LAYERS[0].seconds)
    half = dataclasses.replace(LAYERS[0], floor=LAYERS[0].seconds / 2)
    widths = [float(row[3]) for row in RECT.findall(plots.shares((whole, half), "t"))]
    assert widths[0] == plots.CHART_WIDTH - plots.LABEL_WIDTH - plots.VALUE_WIDTH
    assert widths[1] == pytest.approx(widths[0] / 2, abs=0.1)


def test_lines_carry_every_contender_and_the_floor(html):
    legend = re.search(r'<ul class="legend">(.*?)</ul>', html, re.S).group(1)
    for name in (EAGER.name, FAST.name, "floor fp32"):
        assert f"{name}</li>" in legend
    assert html.count("<polyline") == 3


def test_one_batch_size_draws_no_line_and_no_start_no_bar():
    assert plots.over_batch(full_report().cases[:1]) == ""
    assert plots.cold([start for start in STARTS if start.failure]) == ""


@pytest.mark.parametrize("value", [0.03, 1.0, 7.7, 99.9, 60_200.0])
def test_the_top_of_an_axis_is_round_and_not_far(value):
    top = plots._ceiling(value)
    assert value <= top <= 2.0 * value * (1 + 1e-9)
    mantissa = top / 10 ** math.floor(math.log10(top) + 1e-9)
    assert round(mantissa, 6) in (1, 2, 4, 6, 8)
