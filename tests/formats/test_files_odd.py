"""Row 74: reports and measurements that are no files, no JSON, too deep, large or incomplete."""

import copy
import json
import os
import resource
import signal
import warnings
from pathlib import Path

import pytest

from fastres import cli
from fastres.backends import kernel_choice
from fastres.bench import compare

ROOT = Path(__file__).parents[2]
REPORT = next((ROOT / "benchmarks" / "results").glob("*/latest.json"), None)
DEEP = b'{"format": 1, "machines": ' + b"[" * 10**5
ODD = {
    "deep": DEEP,
    "deeper, closed": b"[" * 5000 + b"]" * 5000,
    "no text": b"\xff\xfe\x00",
    "nothing": b"",
    "null": b"null",
    "a number": b"1e999",
    "a list": b"[1, 2]",
    "half": b'{"format": 1, "machines": {"here": {"a": {"1": {"sec',
}
KINDS = ("pipe", "zero", "folder", "large", *ODD)


@pytest.fixture(autouse=True)
def in_time():
    """A hang is an error, and so are gigabytes."""

    def stop(*_):
        raise AssertionError("it hangs")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB


def made(folder, kind):
    path = folder / "odd.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zero":
        return Path("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "large":
        with open(path, "wb") as file:
            file.truncate(2**33)  # declared, not stored
    else:
        path.write_bytes(ODD[kind])
    return path


@pytest.mark.fault(74)
@pytest.mark.parametrize("kind", KINDS)
def test_measurements_that_are_none_are_ignored_with_one_warning(kind, tmp_path):
    path = made(tmp_path, kind)
    kernel_choice._load.cache_clear()
    with pytest.warns(UserWarning, match="fastres ignores") as said:
        assert kernel_choice.load(path, lambda: "here") == {}
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_choice.load(path, lambda: "here") == {}


ENTRY = {"seconds": {"unfused": 1e-3, "b2b_gemm": 2e-3}, "excluded": {}}
WRONG = {
    "seconds of text": {"1": {**ENTRY, "seconds": {"unfused": "fast"}}},
    "seconds past any float": {"1": {**ENTRY, "seconds": {"unfused": 10**400}}},
    "seconds that are a list": {"1": {**ENTRY, "seconds": [1]}},
    "no seconds": {"1": {"excluded": {}}},
    "no exclusions": {"1": {"seconds": {}}},
    "a batch of text": {"one": ENTRY},
    "a batch past any size": {"1" + "0" * 400: ENTRY},
    "a batch of none": {"0": ENTRY},
    "no batches": [],
}


@pytest.mark.fault(74)
@pytest.mark.parametrize("name", WRONG)
def test_measurements_of_another_form_are_ignored_with_one_warning(name, tmp_path):
    path = tmp_path / "tuned.json"
    cases = {"good": {"1": ENTRY}, "wrong": WRONG[name]}
    path.write_text(json.dumps({"format": 1, "machines": {"here": cases}}))
    kernel_choice._load.cache_clear()
    with pytest.warns(UserWarning, match="fastres ignores") as said:
        assert kernel_choice.load(path, lambda: "here") == {}
    assert len(said) == 1


def compared(capsys, *paths):
    """Exit code and standard error of ``fastres report compare``."""
    code = cli.run(["report", "compare", *map(str, paths)])
    return code, capsys.readouterr().err.strip()


@pytest.mark.fault(74)
@pytest.mark.parametrize("kind", KINDS)
def test_reports_that_are_none_are_refused_in_one_line(kind, tmp_path, capsys):
    path = made(tmp_path, kind)
    code, said = compared(capsys, path, path)
    assert code == 2
    assert said.startswith("error: ")
    assert "\n" not in said
    assert len(said) < 500


def places(value, path=()):
    """The place of everything in a JSON value, of lists the first entry only."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1]
        for key, item in items:
            yield (*path, key)
            yield from places(item, (*path, key))


def changed(value, path, new):
    """A copy with something else, or nothing, at a place."""
    copied = copy.deepcopy(value)
    holder = copied
    for key in path[:-1]:
        holder = holder[key]
    if new is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = new
    return copied


@pytest.mark.fault(74)
@pytest.mark.skipif(REPORT is None, reason="the checkout has no published report")
@pytest.mark.parametrize("new", [..., None, -1, 0, "text", [], {}, [[]], {"a": 1}], ids=repr)
def test_reports_that_lack_something_are_compared_or_refused(new, tmp_path):
    """Anything at any place that a comparison reads: a whole comparison, or one line."""
    whole = json.loads(REPORT.read_text())
    read = ("model", "shape", "device", "noise", "form", "timings")
    case = {key: value for key, value in whole["cases"][0].items() if key in read}
    for timing in case["timings"]:
        timing["seconds"] = timing["seconds"] and {**timing["seconds"], "samples": []}
    cpu = whole["environment"]["cpu"]
    whole |= {"cases": [case], "environment": {"gpus": [], "cpu": cpu}}
    path, refused = tmp_path / "old.json", 0
    for place in places(whole):
        path.write_text(json.dumps(changed(whole, place, new)))
        said = ""
        try:
            found = compare.load(path)
            compare.compare(found, found)
        except ValueError as error:
            said = str(error)
        assert not said or str(path) in said
        assert "\n" not in said
        refused += bool(said)
    assert refused > 5


@pytest.mark.fault(74)
def test_the_schema_is_looked_at_first(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(
        json.dumps({"schema": compare.SCHEMA, "schema_version": compare.SCHEMA_VERSION})
    )
    with pytest.raises(ValueError, match=r"report.json is no whole report .*KeyError"):
        compare.load(path)
