"""Reports: what they must show, what they must not, and that each form is well formed."""

import dataclasses
import itertools
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastres.bench.report import Report, check_output
from fastres.bench.results import (
    Case,
    Check,
    ColdStart,
    LayerTime,
    OutputError,
    Picture,
    Probe,
    footnote,
    milliseconds,
)
from fastres.perf.environment import Environment, environment
from fastres.perf.roofline import Ceilings
from fastres.perf.timing import Comparison, Method, Samples, Timing

DOCUMENTED = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
EAGER = Timing("eager fp32", Samples((0.4, 0.5, 0.6)), 1, 0.9, 3, 1.5)
FAST = Timing(
    "fastres fp32", Samples((0.2, 0.25, 0.3)), 2, 1.9, 4, 2.0, cpu_seconds=Samples((0.4, 0.5, 0.7))
)
BROKEN = Timing("fastres bf16", failure="wrong output: RMS error 1.2e+00")
ERROR = OutputError(1e-6, 5e-6, 1.0, 3e-6, 1.0)
PROBES = {
    EAGER.name: Probe(1000, 0.5, 0.6, 0.7, peak_bytes=3_000_000),
    FAST.name: Probe(1000, 0.25, 0.3, 0.35, 0.2, 0.01, 1_500_000, 40.0, 3.0, 1755),
}
LAYERS = tuple(
    LayerTime(f"layer{i}.conv2", "conv 3x3 64->64 + bias + ReLU", 2e-3, 2e-4 * i, "memory")
    for i in range(1, 9)
)
STARTS = (ColdStart("fastres", "empty", 3.5), ColdStart("eager", "empty", None, "no answer"))
CEILINGS = (Ceilings("a machine, fp32, measured", 2e10, 3e11),)


def report(*timings, **parts):
    comparison = Comparison(EAGER.name, "cpu", "clock", Method(), 3, timings, EAGER)
    case = Case("resnet50", (8, 3, 224, 224), "random", comparison, {FAST.name: ERROR})
    return dataclasses.replace(Report.now("a title", cases=(case,)), **parts)


def full_report(**parts):
    """Every section filled: two batch sizes, probes, floors, layers, cold starts, ceilings."""
    comparison = report(EAGER, FAST).cases[0].comparison
    cases = tuple(
        Case(
            "resnet50",
            (batch, 3, 224, 224),
            "random",
            comparison,
            {EAGER.name: ERROR, FAST.name: ERROR},
            PROBES,
            {"fp32": 0.05 * batch},
            {FAST.name: LAYERS} if batch == 1 else {},
        )
        for batch in (1, 8)
    )
    return report(EAGER, cases=cases, cold_starts=STARTS, ceilings=CEILINGS, **parts)


class Document(HTMLParser):
    """Checks that tags nest, and gathers the text, the attributes and the tags."""

    VOID = ("meta", "rect", "line", "br", "polyline", "circle")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def keys(value):
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from keys(item)


def test_json_holds_the_raw_samples_and_where_they_come_from():
    read = json.loads(report(EAGER, FAST).to_json())
    assert (read["schema"], read["schema_version"]) == ("fastres.report", 1)
    assert read["environment"]["versions"]["torch"]
    assert read["command"]
    timing = read["cases"][0]["timings"][1]
    assert timing["seconds"]["values"] == [0.2, 0.25, 0.3]
    assert timing["speedup"]["values"] == [2.0, 2.0, 2.0]
    assert timing["cpu_seconds"]["values"] == [0.4, 0.5, 0.7]
    assert read["cases"][0]["timings"][0]["cpu_seconds"] is None
    assert timing["warmup"] == 2.0
    assert read["cases"][0]["errors"][FAST.name]["allowed_rms"] == 3e-6


def test_every_field_of_the_json_is_documented():
    picture = Picture(((0.0,),), "1", "1", 0.9)
    full = full_report(pictures=(picture,), checks=(Check("a", True, "b"),))
    written = full.to_dict()
    free = {"versions", "variables", "errors", "flags"}  # their keys are data
    for name in free & set(written["environment"]):
        written["environment"][name] = {}
    for case, name in itertools.product(written["cases"], ("errors", "probes", "layers", "floors")):
        case[name] = list(case[name].values())
    missing = {key for key in keys(written) if f"`{key}`" not in DOCUMENTED}
    assert not missing


def test_json_has_no_numbers_that_json_lacks():
    odd = dataclasses.replace(ERROR, rms=float("nan"), max_abs=float("inf"))
    full = report(EAGER, FAST)
    case = dataclasses.replace(full.cases[0], errors={FAST.name: odd})
    read = json.loads(dataclasses.replace(full, cases=(case,)).to_json())
    assert read["cases"][0]["errors"][FAST.name]["rms"] == "nan"
    assert read["cases"][0]["errors"][FAST.name]["max_abs"] == "inf"


def test_markdown_gives_median_spread_ratio_and_error_in_one_row():
    rows = [
        line for line in report(EAGER, FAST).to_markdown().splitlines() if "fastres fp32" in line
    ]
    assert rows == [
        "| fastres fp32 | 250 (220-280) | 500 | 32.0 | 2.00x (2.00x-2.00x) | 1.0e-06 | 100.0% |"
    ]


@pytest.mark.parametrize(("a_a", "busy"), [((0.41, 0.5, 0.6), False), ((0.2, 0.5, 1.2), True)])
def test_a_noisy_run_says_so(a_a, busy):
    full = report(EAGER, FAST)
    noisy = dataclasses.replace(
        full.cases[0].comparison, a_a=dataclasses.replace(EAGER, seconds=Samples(a_a))
    )
    case = dataclasses.replace(full.cases[0], comparison=noisy)
    assert ("The machine was busy" in footnote(case)) is busy


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5e-4, "0.25"), (0.0123456, "12.3"), (0.25, "250"), (1.2345, "1,234")]
)
def test_milliseconds_never_need_an_exponent(seconds, text):
    assert milliseconds(seconds) == text


@pytest.mark.parametrize("form", ["to_markdown", "to_html"])
def test_a_wrong_contender_shows_its_reason_and_no_speed(form):
    full = report(EAGER, BROKEN)
    assert not full.ok
    text = getattr(full, form)()
    row = next(part for part in re.split(r"\n|<tr", text) if "fastres bf16" in part)
    assert "wrong output: RMS error 1.2e+00" in row
    assert "images/s" not in row
    assert not re.search(r"\d+\.\d+x", row)


def test_a_failing_baseline_is_no_fault_of_ours():
    full = report(EAGER, FAST, dataclasses.replace(BROKEN, name="eager fp16"))
    assert full.ok


def test_a_red_check_turns_the_report_red():
    red = report(EAGER, FAST, checks=(Check("agreement", False, "12 of 446 differ"),))
    assert not red.ok
    assert "12 of 446 differ" in red.to_html()
    assert "Some answers are wrong" in red.to_html()
    assert "| agreement | WRONG | 12 of 446 differ |" in red.to_markdown()


def test_html_is_one_well_formed_file_that_loads_nothing():
    picture = Picture(((0.0, 1.0), (0.5, 0.25)), "3", "8", 0.61)
    document = Document(report(EAGER, FAST, pictures=(picture,)).to_html())
    assert not {"script", "link", "img", "iframe"} & set(document.tags)
    assert not {"src", "href"} & {name for name, _ in document.attributes}
    assert ("lang", "en") in document.attributes
    assert "it is 3" in "".join(document.texts)
    assert "prefers-color-scheme: dark" in "".join(document.texts)


PAYLOAD = """ <script>x</script>"><img src=x onerror='x'>&lt;{{ 7 * 7 }}{% raw %}</title></style>"""


def poisoned(value):
    """The same with the payload behind each string, and behind the keys of results."""
    if isinstance(value, str):
        return value + PAYLOAD
    if isinstance(value, Environment):  # its summary looks for some keys
        return dataclasses.replace(value, **{k: extended(v) for k, v in vars(value).items()})
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{k: poisoned(v) for k, v in vars(value).items()})
    if isinstance(value, dict):
        return {poisoned(key): poisoned(item) for key, item in value.items()}
    return tuple(map(poisoned, value)) if isinstance(value, tuple) else value


def extended(value):
    """The payload behind what a field of the environment holds, and in one key more."""
    if isinstance(value, dict):
        return {k: extended(v) for k, v in value.items()} | {f"key{PAYLOAD}": "value"}
    return tuple(map(extended, value)) if isinstance(value, tuple) else poisoned(value)


def test_html_escapes_every_string():
    """Model names, notes, environment and the rest arrive as text; the tags are ours alone."""
    full = full_report(
        pictures=(Picture(((0.0,),), "three", "eight", 0.6), Picture(((1.0,),), "5", "5", 0.9)),
        checks=(Check("agreement", True, "all"), Check("digits", False, "none")),
        notes=("a note",),
    )
    comparison = dataclasses.replace(full.cases[0].comparison, timings=(EAGER, FAST, BROKEN))
    odd = {"comparison": comparison, "form": "cold"}
    cases = tuple(dataclasses.replace(case, **odd) for case in full.cases)
    machine = dataclasses.replace(full.environment, gpus=({"name": "a GPU"},), commit="a commit")
    full = dataclasses.replace(full, cases=cases, environment=machine)
    plain, hostile = Document(full.to_html()), Document(poisoned(full).to_html())
    added = 5  # keys: of versions, cpu, the GPU, flags and variables
    assert Counter(hostile.tags) - Counter(plain.tags) == dict.fromkeys(("tr", "th", "td"), added)
    assert {name for name, _ in hostile.attributes} == {name for name, _ in plain.attributes}
    shown = "\n".join([*hostile.texts, *(value or "" for _, value in hostile.attributes)])
    for text in (
        *(full.title, full.command, full.created, machine.python, machine.cpu["name"], "a commit"),
        *("a GPU", "cpu.key", "versions.key", "gpus.0.key", machine.versions["torch"], "a note"),
        *("agreement", "all", "digits", "none", "three", "eight", "resnet50", "cold", "random"),
        *(EAGER.name, FAST.name, BROKEN.name, BROKEN.failure, "floor fp32", "clock"),
        *("layer1.conv2", LAYERS[0].what, "empty", "no answer", CEILINGS[0].name),
    ):
        assert text + PAYLOAD in shown, text


def test_the_chart_names_every_bar_and_stays_inside_its_frame():
    document = Document(report(EAGER, FAST).to_html())
    attributes = dict(document.attributes)
    assert attributes["role"] == "img"
    width = int(next(v for k, v in document.attributes if k == "viewbox").split()[2])
    html = report(EAGER, FAST).to_html()
    labels = re.findall(r'<text x="([\d.]+)"[^>]*?(text-anchor="end")?>([^<]+)</text>', html)
    assert [text for _, _, text in labels] == [
        "eager fp32",
        "16.0 images/s",
        "fastres fp32",
        "32.0 images/s",
    ]
    for x, end, text in labels:
        length = 7.5 * len(text)  # 13 px system fonts are narrower than 7.5 px per character
        left, right = (float(x) - length, float(x)) if end else (float(x), float(x) + length)
        assert left >= 0
        assert right <= width


def test_write_makes_folders_and_chooses_the_form_by_suffix(tmp_path):
    full = report(EAGER, FAST)
    for suffix, form in (
        (".json", full.to_json),
        (".md", full.to_markdown),
        (".html", full.to_html),
    ):
        path = tmp_path / "new" / f"bench{suffix}"
        full.write(path)
        assert path.read_text() == form()


def test_a_report_that_cannot_be_written_is_refused_beforehand(tmp_path):
    with pytest.raises(
        ValueError, match=r"a report ends in \.json, \.md, \.html; got 'report.pdf'"
    ):
        check_output("report.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="is not a folder to write in"):
        check_output(tmp_path / "file" / "report.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(PermissionError, match="cannot write"):
        check_output(tmp_path / "folder.html")


def test_the_environment_tells_precision_threads_and_commit():
    found = environment()
    assert {"matmul_precision", "conv_precision", "cudnn_benchmark"} <= set(found.flags)
    assert found.cpu["threads"] >= 1
    assert found.commit is None or re.fullmatch(r"[0-9a-f]{12}(-dirty)?", found.commit)
    assert found.versions["torch"] in found.summary()
