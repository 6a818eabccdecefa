"""The stopwatch: what it interleaves, what it leaves out, and what it refuses to call a time."""

import dataclasses
import gc
import json
import threading
import time
import types

import pytest
import torch

from fastres.bench import probes
from fastres.perf import timing as timing_module
from fastres.perf.timing import LEAST_ROUNDS, Comparison, Method, Samples, Timing, measure
from fastres.runtime import clocks

ONE_CALL = Method(rounds=8, sample=0, warmup=0)


def right(name, index, output):
    """A check that is content with everything."""


def compare(samples_by_name, twin=(1.0,)):
    timings = tuple(Timing(name, Samples(values)) for name, values in samples_by_name.items())
    baseline = timings[0].name
    return Comparison(
        baseline, "cpu", "clock", Method(), 3, timings, Timing(baseline, Samples(twin))
    )


def test_quantiles_are_those_of_the_samples():
    samples = Samples(tuple(float(v) for v in (11, 1, 10, 2, 9, 3, 8, 4, 7, 5, 6)))
    assert (samples.p20, samples.median, samples.p80) == (3.0, 6.0, 9.0)


def test_without_samples_there_are_no_quantiles():
    assert not Samples()
    assert Samples().to_dict() is None
    with pytest.raises(ValueError, match="no samples"):
        _ = Samples().median


def test_ratios_are_taken_within_each_round():
    """A machine that slows down by four during the run does not widen a constant ratio."""
    comparison = compare({"slow": (1.0, 2.0, 4.0), "fast": (0.5, 1.0, 2.0)}, twin=(1.0, 1.0, 8.0))
    assert comparison.speedup("fast").values == (2.0, 2.0, 2.0)
    assert comparison.speedup("slow", over="fast").values == (0.5, 0.5, 0.5)
    assert comparison.noise.values == (1.0, 2.0, 0.5)


def busy(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_cpu_time_is_that_of_all_threads_and_not_of_waiting():
    def threaded(x):
        threads = [threading.Thread(target=busy, args=(0.01 * i,)) for i in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    contenders = {"waits": lambda x: time.sleep(0.02), "two threads": threaded}
    found = measure(contenders, [None], check=right, method=ONE_CALL)
    waits, computes = found.timings
    assert waits.seconds.median >= 0.02 > 4 * waits.cpu_seconds.median
    assert 0.02 <= computes.cpu_seconds.median < 0.1
    assert len(computes.cpu_seconds.values) == found.rounds
    cold = measure(contenders, [None], check=right, method=Method(1, 0, 0, 0, cold_cache=True))
    assert not any(timing.cpu_seconds for timing in cold.timings)


def test_a_sample_begins_when_the_threads_of_the_one_before_rest(monkeypatch):
    happened = []
    monkeypatch.setattr(timing_module, "wait_until_idle", lambda: happened.append("waited"))
    contenders = {name: lambda x, name=name: happened.append(name) for name in "ab"}
    measure(contenders, [None], check=right, method=ONE_CALL)
    samples = happened[happened.index("waited") :]
    assert samples[::2] == ["waited"] * 3 * ONE_CALL.rounds
    assert sorted(samples[1::2]) == sorted("aab" * ONE_CALL.rounds)


def test_other_threads_are_waited_for_until_they_rest(monkeypatch):
    """By a clock of its own: two threads that spin for 50 ms, then a hundredth of that."""
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    def used():
        return 2 * min(now[0], 0.05) + 0.01 * now[0]

    clock = types.SimpleNamespace(perf_counter=lambda: now[0], process_time=used, sleep=sleep)
    monkeypatch.setattr(clocks, "time", clock)
    assert not clocks.wait_until_idle(0.03)
    assert now[0] == pytest.approx(0.03, abs=clocks.IDLE_SECONDS)
    assert clocks.wait_until_idle()
    assert now[0] == pytest.approx(0.055, abs=clocks.IDLE_SECONDS)


def test_every_round_has_each_contender_once_and_the_baseline_twice_in_changing_order():
    called = []
    contenders = {name: lambda x, name=name: called.append(name) for name in "abc"}
    found = measure(contenders, [None], check=right, method=ONE_CALL)
    rounds = called[-4 * found.rounds :]
    rounds = [tuple(rounds[i : i + 4]) for i in range(0, len(rounds), 4)]
    assert found.rounds == 8
    assert all(sorted(each) == ["a", "a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 1


def test_warm_up_is_reported_and_not_timed():
    calls = 0

    def compiles_first(x):
        nonlocal calls
        calls += 1
        time.sleep(0.1 if calls == 1 else 0.001)

    found = measure({"a": compiles_first}, [None], check=right, method=ONE_CALL)["a"]
    # A sleep may last longer than asked, on a busy machine by tens of milliseconds.
    assert max(found.seconds.values) < found.first_call
    assert found.first_call >= 0.1
    assert found.warmup >= found.first_call
    assert found.warmup_calls >= 2


def test_a_sample_repeats_short_calls_and_reports_seconds_per_call():
    method = Method(rounds=5, sample=0.05, warmup=0.01)
    found = measure({"a": lambda x: time.sleep(0.001)}, [None], check=right, method=method)["a"]
    assert 2 <= found.calls <= 50  # few where a busy machine sleeps too long
    # At least the sleep itself; its upper side is the scheduler's.
    assert 0.001 <= found.seconds.median < 0.02


def test_a_call_that_waits_three_times_as_long_is_three_times_slower():
    contenders = {"slow": lambda x: time.sleep(0.03), "fast": lambda x: time.sleep(0.01)}
    found = measure(contenders, [None], check=right, method=ONE_CALL)
    # Sleeps of 10 ms overshoot by a few per cent, on a loaded machine by some tens.
    assert 2 < found.speedup("fast").median < 4


def test_inputs_take_turns_and_the_check_knows_whose_output_it_sees():
    inputs = [object() for _ in range(3)]
    seen = []

    def check(name, index, output):
        seen.append(index)
        return None if output is inputs[index] else "another input's output"

    found = measure({"a": lambda x: x}, inputs, check=check, method=ONE_CALL)
    assert not found.failures
    assert set(seen) == {0, 1, 2}


def test_a_wrong_output_costs_its_time_and_nobody_elses():
    def check(name, index, output):
        return None if output == 1 else "wrong: not 1"

    contenders = {"good": lambda x: 1, "bad": lambda x: 2}
    found = measure(contenders, [None], check=check, method=ONE_CALL)
    assert found.failures == {"bad": "wrong: not 1"}
    assert not found["bad"].seconds
    assert not found.speedup("bad")
    assert len(found["good"].seconds.values) == found.rounds


def test_an_output_that_goes_wrong_while_it_is_timed_is_noticed():
    """What is checked is the timed mode itself: a replay that goes stale keeps no time."""
    calls = 0

    def goes_stale(x):
        nonlocal calls
        calls += 1
        return calls < 5

    def check(name, index, output):
        return None if output else "stale"

    found = measure({"a": goes_stale}, [None], check=check, method=ONE_CALL)
    assert found["a"].failure == "stale"
    assert not found["a"].seconds


def test_a_contender_that_raises_is_listed_with_the_reason():
    def raises(x):
        raise torch.OutOfMemoryError("no memory left\nand a second line")

    found = measure({"a": raises, "b": lambda x: 1}, [None], check=right, method=ONE_CALL)
    assert found.failures == {"a": "OutOfMemoryError: no memory left"}
    assert not found.noise
    assert not found.speedup("b")
    assert found["b"].seconds


def test_the_budget_ends_the_rounds_but_never_before_the_least():
    method = Method(rounds=100, budget=0, sample=0, warmup=0)
    assert measure({"a": lambda x: 1}, [None], check=right, method=method).rounds == LEAST_ROUNDS


def test_progress_counts_up_to_the_rounds_wanted():
    told = []
    measure(
        {"a": lambda x: 1},
        [None],
        check=right,
        method=ONE_CALL,
        progress=lambda done, wanted: told.append((done, wanted)),
    )
    assert told == [(done, 8) for done in range(9)]


def test_garbage_collection_is_off_while_timing_and_on_afterwards():
    states = []
    measure({"a": lambda x: states.append(gc.isenabled())}, [None], check=right, method=ONE_CALL)
    assert states[-1] is False
    assert gc.isenabled()


class FakeEvent:
    """A CUDA event whose clock has seen ``milliseconds``, whatever really passed."""

    milliseconds = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return self.milliseconds


@pytest.mark.parametrize(("milliseconds", "believed"), [(0.01, False), (60.0, True)])
def test_events_that_missed_the_work_are_not_believed(monkeypatch, milliseconds, believed):
    """Work on another stream, or a timer that does not wait, would look too good to be true."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(FakeEvent, "milliseconds", milliseconds)
    if believed:
        assert clocks._cuda_sample(lambda x: time.sleep(0.06), [None])[0] == pytest.approx(0.06)
    else:
        with pytest.raises(RuntimeError, match="outside the timed stream"):
            clocks._cuda_sample(lambda x: time.sleep(0.06), [None])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_with_cold_caches_each_call_follows_a_flush_that_is_not_timed(monkeypatch, device):
    done = []

    def flush():
        time.sleep(0.05)
        done.append("flush")

    def call(x):
        time.sleep(0.01)
        done.append(x)
        return x

    class Clock(FakeEvent):
        def record(self):
            self.now = time.perf_counter()

        def elapsed_time(self, end):
            return (end.now - self.now) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    sample = clocks._cold_cuda_sample if device == "cuda" else clocks._cold_cpu_sample
    seconds, output = sample(call, [1, 2, 3], flush)
    assert done == ["flush", 1, "flush", 2, "flush", 3]
    assert output == 3
    assert 0.03 <= seconds < 0.15  # three calls, none of the three flushes


def test_cold_caches_are_a_part_of_the_method():
    method = dataclasses.replace(ONE_CALL, cold_cache=True, rounds=1)
    found = measure({"a": lambda x: 1}, [None], check=right, method=method)
    assert found.to_dict()["method"]["cold_cache"] is True


def test_the_dict_is_json_with_the_raw_samples():
    found = measure({"a": lambda x: 1}, [None], check=right, method=ONE_CALL)
    read = json.loads(json.dumps(found.to_dict()))
    assert len(read["timings"][0]["seconds"]["values"]) == read["rounds"] == 8
    assert read["timings"][0]["speedup"]["values"] == [1.0] * 8
    assert len(read["noise"]["values"]) == 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measure({}, [1], check=right), "nothing to time: 0 contenders"),
        (lambda: measure({"a": id}, [], check=right), "nothing to time: 1 contenders, 0 inputs"),
        (lambda: measure({"a": id}, [1], check=right, baseline="b"), "baseline 'b' is not one of"),
        (lambda: Method(rounds=0), "rounds must be at least 1, got 0"),
        (lambda: Method(budget=-1), "budget must not be negative, got -1"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_slow_answer_about_the_clock_takes_nothing_from_the_sustained_rate(monkeypatch):
    """nvidia-smi can take most of a second, in which a GPU must not rest."""

    class OnGpu(list):
        is_cuda = True

    def slow_clock():
        time.sleep(0.5)
        return 1980

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(probes, "_sm_clock", slow_clock)
    calls = []
    rate, clock = probes.sustained(
        lambda x: calls.append(time.sleep(0.01)), [OnGpu([0, 1])], seconds=0.2
    )
    assert clock == 1980
    # Two images in 0.01 s are 200 a second, with the wait 60; half is room for a busy CPU.
    assert rate > 100
    assert len(calls) > 5


@pytest.mark.parametrize(
    ("name", "on_gpu", "shown"),
    [
        ("eager fp16 channels_last", True, True),
        ("fastres fp16 triton", True, False),
        ("cuDNN fused fp16", True, False),
        ("fastres fp32", False, True),
        ("onnxruntime fp32", False, False),
    ],
)
def test_a_graphs_memory_is_not_taken_for_none(name, on_gpu, shown):
    x = dataclasses.make_dataclass("Image", ["is_cuda"])(on_gpu)
    assert probes._shows_memory(name, x) is shown


def test_events_time_each_call_from_the_end_of_the_one_before(monkeypatch):
    """A GPU on which call after call takes 1, 2, 3, ... ms."""
    done = []

    class Clock(FakeEvent):
        def record(self):
            self.now = sum(done)

        def elapsed_time(self, end):
            return end.now - self.now

    def call():
        done.append(len(done) + 1)
        return len(done)

    monkeypatch.setattr(torch.cuda, "Event", Clock)
    assert clocks.event_seconds([call] * 3) == (pytest.approx([0.001, 0.002, 0.003]), 3)
    monkeypatch.setattr(clocks, "captured", lambda calls: types.SimpleNamespace(replay=call))
    assert clocks.graph_seconds([call] * 2, tries=2) == pytest.approx([0.0025, 0.003])
    warmed_up = len(done) + 1
    times = clocks.call_seconds(call, torch.device("cuda"), 2)
    assert times == pytest.approx([(warmed_up + 1) / 1e3, (warmed_up + 2) / 1e3])
