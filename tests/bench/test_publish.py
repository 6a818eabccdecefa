"""Published results and the README's table, and comparing two reports."""

import copy
import csv
import json

import pytest

from benchmarks import publish
from fastres import cli
from fastres.bench.compare import compare, load
from fastres.bench.report import Report
from fastres.bench.results import Case, OutputError
from fastres.perf.timing import Comparison, Method, Samples, Timing

ERROR = OutputError(2e-6, 5e-6, 1.0, 3e-6, 1.0)


def report(ours=(0.1, 0.2, 0.4), a_a=(0.4, 0.8, 1.6), **changes):
    eager = Timing("eager fp32", Samples((0.4, 0.8, 1.6)), 1, 0.9, 3, 1.5)
    other = Timing("onnxruntime fp32", Samples((0.2, 0.5, 0.6)), 1, 0.9, 3, 1.5)
    fast = Timing("fastres fp32", Samples(ours), 2, 1.9, 4, 2.0)
    lost = Timing("OpenVINO fp32", failure="Unavailable: openvino is not installed")
    a_a = Timing("eager fp32", Samples(a_a), 1, 0.9, 3, 1.5)
    timings = (eager, fast, other, lost)
    comparison = Comparison(eager.name, "cpu", "clock", Method(), 3, timings, a_a)
    case = Case("resnet50", (8, 3, 224, 224), "random", comparison, {fast.name: ERROR})
    return json.loads(Report.now("a title", cases=(case,)).to_json()) | changes


@pytest.fixture
def written(tmp_path):
    def write(found, name="new.json"):
        path = tmp_path / name
        path.write_text(json.dumps(found))
        return path

    return write


def test_the_readme_is_generated_from_the_published_results():
    """When this fails, run: python benchmarks/publish.py"""
    text = publish.README.read_text("utf-8")
    assert publish.with_tables(text, publish.tables()) == text


def test_a_published_report_fills_the_table_the_history_and_the_reasons(written, tmp_path):
    found = report()
    folder = publish.publish(written(found), tmp_path / "results")
    publish.publish(written(found), tmp_path / "results")
    assert json.loads((folder / "latest.json").read_text()) == found
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert len(rows) == 2 * 3  # a header once; what has no time has no row
    assert rows[1]["contender"] == "fastres fp32"
    assert (rows[1]["median_s"], rows[1]["images_per_second"]) == ("0.2", "40")
    text = publish.tables(tmp_path / "results")
    # Ratios are medians over rounds: 4 to eager; 2, 2.5 and 1.5 to onnxruntime.
    row = "| resnet50 | 8 | 224x224 | fp32 | 40.0 | 4.00x | 4.00x | onnxruntime fp32 | 2.00x |"
    assert row in text
    assert "OpenVINO fp32 (Unavailable: openvino is not installed)" in text
    assert "GPU: not measured" in text


def test_a_report_with_wrong_answers_is_not_published(written, tmp_path):
    with pytest.raises(ValueError, match="it is not published"):
        publish.publish(written(report(ok=False)), tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_markers_must_be_there_once():
    with pytest.raises(ValueError, match="the README needs one"):
        publish.with_tables("no markers", "text")


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ((0.05, 0.05, 0.05), "faster"),
        ((0.8, 0.9, 1.0), "slower"),
        ((0.15, 0.16, 0.17), "same"),  # inside the range that the old run had
    ],
)
def test_changes_count_beyond_the_spread(ours, verdict):
    change = next(c for c in compare(report(), report(ours)) if c.contender == "fastres fp32")
    assert change.verdict == verdict


def test_changes_within_the_noise_do_not_count():
    """Tight samples a fifth apart, in runs whose baseline differs from itself by half."""
    old = report((0.20, 0.20, 0.20), a_a=(0.6, 1.2, 2.4))
    new = report((0.16, 0.16, 0.16))
    verdicts = {c.contender: c.verdict for c in compare(old, new)}
    assert verdicts["fastres fp32"] == "same"
    assert compare(report((0.20,) * 3), new)[1].verdict == "faster"


def test_contenders_that_came_went_or_failed_are_listed():
    old, new = report(), report()
    new["cases"][0]["timings"][2]["name"] = "TensorRT fp32"
    verdicts = {c.contender: c.verdict for c in compare(old, new)}
    assert verdicts["TensorRT fp32"] == "only in the new report"
    assert verdicts["onnxruntime fp32"] == "only in the old"
    assert verdicts["OpenVINO fp32"] == "no time in both"


def test_other_machines_schemas_and_files_are_one_clear_line(written, capsys):
    mine = written(report())
    other = copy.deepcopy(report())
    other["environment"]["cpu"]["threads"] += 1
    cases = {
        written(other, "a.json"): "error: different machines: ",
        written(report(schema="else"), "b.json"): "is no report: its schema is 'else'",
        written(report(schema_version=99), "c.json"): "has version 99 of the schema",
        written([], "d.json"): "is no report: its schema is None",
    }
    for path, message in cases.items():
        assert cli.run(["report", "compare", str(mine), str(path)]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    (mine.parent / "e.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load(mine.parent / "e.json")


def test_the_command_fails_when_fastres_got_slower(written, capsys):
    old, new = written(report(), "old.json"), written(report((0.8, 0.9, 1.0)))
    assert cli.run(["report", "compare", str(old), str(new)]) == 1
    assert "slower" in capsys.readouterr().out
    assert cli.run(["report", "compare", str(old), str(old)]) == 0
