"""The fuzzer stops in time, in the middle of a round as well, and keeps what it found by then."""

import json
import time

import pytest

pytest.importorskip("hypothesis")

import fuzz
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

SECONDS = 1.0


def slow(case):
    time.sleep(0.1)


def slow_and_wrong(case):
    time.sleep(0.1)
    assert case < 0


class SlowLife(RuleBasedStateMachine):
    @rule()
    def wait(self):
        time.sleep(0.1)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """``run(name, check)``: the exit code of a second of fuzzing, which has taken little more."""
    monkeypatch.setattr(fuzz, "REGRESSIONS", tmp_path)
    monkeypatch.setattr(fuzz, "Pair", SlowLife)

    def fuzzing(name, check=slow):
        monkeypatch.setattr(fuzz, "properties", lambda: {name: (st.integers(0, 999), check)})
        arguments = ["fuzz.py", "--minutes", str(SECONDS / 60), "--only", name]
        monkeypatch.setattr("sys.argv", arguments)
        monkeypatch.setattr(fuzz, "START", time.monotonic())
        code = fuzz.main()
        # A round of 100 cases, or a life of 25 steps ten times, would take ten seconds and more.
        assert time.monotonic() - fuzz.START < SECONDS + 8
        return code

    return fuzzing


@pytest.mark.fault(82)
def test_a_round_stops_in_time(run):
    assert run("numbers") == 0


@pytest.mark.fault(82)
def test_a_life_stops_in_time(run):
    assert run("life") == 0


@pytest.mark.fault(82)
def test_a_failing_case_is_kept_though_shrinking_stops(run, tmp_path):
    assert run("numbers", slow_and_wrong) == 1
    (case,) = json.loads((tmp_path / "numbers.json").read_text())
    assert case >= 0


@pytest.mark.fault(82)
def test_a_case_that_fails_at_once_is_shrunk(run, tmp_path):
    def wrong(case):
        assert case < 500

    assert run("numbers", wrong) == 1
    assert 500 in json.loads((tmp_path / "numbers.json").read_text())
