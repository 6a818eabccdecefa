"""What decides between kernels: the user, then measurements, then the shipped table."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fastres
from fastres.backends.fused import EXPERIMENTAL, KERNELS
from fastres.backends.kernel_choice import (
    KernelSelector,
    Measurement,
    cache_path,
    forced,
    load,
    only,
    store,
)
from fastres.backends.kernel_table import TABLES, family, shipped
from fastres.graph import fold, plan, trace
from fastres.graph.patterns import Workload, convolution, group_steps, stem_pool, workload_of

CASE = Workload(("Conv2d k1x1 s1x1 p0x0 relu 64x56x56>256x56x56",), 32, 32 * 56 * 56, 64, "half")
FOUND = {CASE.key: {32: Measurement({"conv2d": 2e-5, "gemm": 1e-5}, {"cudnn": "wrong: 3 of 4"})}}
MACHINE = "A GPU; driver 1.2; torch 3; triton 4; fastres 5"


def test_the_user_goes_before_measurements_and_these_before_the_table():
    assert KernelSelector("sm_90").select("gemm", CASE).chosen
    slow = {CASE.key: {32: Measurement({"conv2d": 1e-5, "gemm": 2e-5})}}
    measured = KernelSelector("sm_90", slow)
    assert not measured.select("gemm", CASE).chosen
    assert measured.select("gemm", CASE).why == "measured here: 20.0 us, 0.50x conv2d"
    asked = KernelSelector("sm_90", slow, {"gemm": True}, "FASTRES_KERNELS")
    assert asked.select("gemm", CASE) == asked.select("gemm", None)
    assert asked.select("gemm", CASE).chosen


@pytest.mark.parametrize(
    ("batch", "chosen"), [(16, True), (32, True), (33, True), (64, True), (65, None), (15, None)]
)
def test_a_measurement_holds_for_batches_within_a_factor_of_two(batch, chosen):
    near = Workload(CASE.work, batch, batch * 56 * 56, 64, "half")
    decision = KernelSelector("sm_80", FOUND).select("gemm", near)
    assert decision.chosen is bool(chosen), "sm_80 has no row for gemm, so only the measured one"
    assert decision.why.startswith("measured" if chosen else "")


def test_what_cannot_be_had_leaves_the_second_fastest():
    fast = {CASE.key: {32: Measurement({"conv2d": 3e-5, "gemm": 2e-5, "cudnn": 1e-5})}}
    assert KernelSelector("sm_90", fast).select("cudnn", CASE).chosen
    unavailable = KernelSelector("sm_90", fast, unavailable=frozenset(("cudnn",)))
    assert not unavailable.select("cudnn", CASE).chosen
    assert unavailable.select("gemm", CASE).chosen


def test_excluded_kernels_say_why():
    decision = KernelSelector("sm_90", FOUND).select("cudnn", CASE)
    assert (decision.chosen, decision.why) == (False, "measured here: wrong: 3 of 4")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", {}), ("gemm", {"gemm": True}), ("-b2b_gemm, head", {"b2b_gemm": False, "head": True})],
)
def test_forcing_by_the_environment(text, expected):
    assert forced(text) == expected


def test_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match="FASTRES_KERNELS takes names out of .*; got 'conv'"):
        forced("gemm,conv")
    with pytest.raises(ValueError, match="kernels takes names out of"):
        only("rot3")


def test_every_row_is_evidenced_and_names_a_kernel():
    assert set(TABLES) == {"sm_80", "sm_89", "sm_90", "sm_100", "gfx942"}
    for rows in TABLES.values():
        for row in rows:
            assert row.kernel in KERNELS
            assert row.evidence.startswith(("predicted: ", "measured on "))
            assert row.batch[0] <= row.batch[1]
            assert row.pixels[0] <= row.pixels[1]


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("sm_90", "sm_90"), ("sm_86", "sm_80"), ("sm_103", "sm_100"), ("sm_75", ""), ("gfx90a", "")],
)
def test_gpus_without_a_table_of_their_own(architecture, expected):
    assert family(architecture) == expected


def test_doubtful_kernels_are_off_and_tma_is_not_assumed():
    for architecture in (*TABLES, "sm_75"):
        for doubtful in (*EXPERIMENTAL, "cudnn"):
            assert shipped(architecture, doubtful, CASE) is None
    for old in ("sm_80", "sm_89", "gfx942", "sm_75", "sm_120"):
        for modern in ("gemm", "dual_gemm", "b2b_gemm"):
            assert shipped(old, modern, CASE) is None


def test_cases_tell_geometries_apart():
    """Sizes alone do not: padding and dilation may cancel."""
    plain = torch.nn.Conv2d(8, 8, 3, padding=1)
    wide = torch.nn.Conv2d(8, 8, 3, padding=2, dilation=2)
    keys = set()
    for conv in (plain, wide, torch.nn.Conv2d(8, 8, 3, padding=1, groups=2)):
        whole = plan.build(fold.fold(trace.trace(torch.nn.Sequential(conv).eval())))
        (group,) = group_steps(whole, {"cudnn": convolution}).groups
        found = workload_of(group, whole.shapes((2, 8, 9, 9)), "half")
        keys.add(found.key)
        assert (found.batch, found.pixels, found.width) == (2, 162, 8)
        other = workload_of(group, whole.shapes((5, 8, 9, 9)), "half")
        assert other.key == found.key
    assert len(keys) == 3


def test_a_step_left_to_pytorch_has_no_case():
    whole = plan.build(fold.fold(trace.trace(fastres.resnet18().eval())))
    (first, *_) = group_steps(whole, {"stem": stem_pool}).groups
    assert workload_of(first, whole.shapes(()), "half") is None


def test_measurements_survive(tmp_path):
    path = tmp_path / "deep" / "tuned.json"
    store(path, MACHINE, FOUND)
    other = Workload(("Linear",), 1, 1, 8, "ieee")
    store(path, MACHINE, {other.key: {1: Measurement({"a": 1.0})}})
    store(path, MACHINE, {CASE.key: {8: Measurement({"conv2d": 1e-6})}})
    found = load(path, lambda: MACHINE)
    assert found[CASE.key] == FOUND[CASE.key] | {8: Measurement({"conv2d": 1e-6})}
    assert found[other.key] == {1: Measurement({"a": 1.0})}
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


WRITER = """
import sys
from fastres.backends.kernel_choice import Measurement, store
from pathlib import Path
for i in range(25):
    store(Path(sys.argv[1]), "m", {f"{sys.argv[2]} {i}": {1: Measurement({"a": 1e-6})}})
"""


def test_names_that_kernels_had_before_are_understood(tmp_path):
    assert forced("rot2,-gemm_pair,stem") == {"b2b_gemm": True, "dual_gemm": False, "stem": True}
    entry = {"seconds": {"apart": 2.0, "rot2": 1.0}, "excluded": {"gemm_pair": "a wrong answer"}}
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"format": 1, "machines": {"m": {"k": {"8": entry}}}}))
    seconds, excluded = {"unfused": 2.0, "b2b_gemm": 1.0}, {"dual_gemm": "a wrong answer"}
    assert load(path, lambda: "m") == {"k": {8: Measurement(seconds, excluded)}}


@pytest.mark.slow
def test_two_processes_lose_nothing(tmp_path):
    path = tmp_path / "tuned.json"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], cwd=ROOT)
        for name in ("first", "second")
    ]
    assert [w.wait(timeout=120) for w in writers] == [0, 0]
    found = load(path, lambda: "m")
    assert set(found) == {f"{name} {i}" for name in ("first", "second") for i in range(25)}


ROOT = Path(__file__).parents[2]
GOOD = {"format": 1, "machines": {MACHINE: {"k": {"1": {"seconds": {"a": 1.0}, "excluded": {}}}}}}


def bad(**changes):
    entry = {"seconds": {"a": 1.0}, "excluded": {}} | changes
    return json.dumps({"format": 1, "machines": {MACHINE: {"k": {"1": entry}}}})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe not text",
        b"[]",
        b"{}",
        b'{"format": 2, "machines": {}}',
        json.dumps(GOOD)[:-20].encode(),
        bad(seconds={"a": -1.0}).encode(),
        bad(seconds={"a": "soon"}).encode(),
        bad(seconds=None).encode(),
        bad(excluded=[1]).encode(),
        b"[" * 100_000,
    ],
    ids=lambda c: repr(c[:24]),
)
def test_a_corrupt_file_is_ignored_with_one_warning_and_replaced(tmp_path, content):
    path = tmp_path / "tuned.json"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="fastres ignores .*tuned.json") as caught:
        found = [load(path, lambda: MACHINE) for _ in range(2)]
    assert found == [{}, {}]
    assert len(caught) == 1
    store(path, MACHINE, FOUND)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(path, lambda: MACHINE) == FOUND


def test_another_machines_file_is_ignored_with_one_warning(tmp_path):
    path = tmp_path / "tuned.json"
    store(path, MACHINE, FOUND)
    newer = MACHINE.replace("torch 3", "torch 3.1")
    with pytest.warns(UserWarning, match="with other versions than A GPU; .*torch 3.1") as caught:
        found = [load(path, lambda: newer) for _ in range(2)]
    assert found == [{}, {}]
    assert len(caught) == 1
    store(path, newer, FOUND)
    assert load(path, lambda: MACHINE) == load(path, lambda: newer) == FOUND


def test_no_file_is_no_warning_and_asks_for_no_machine(tmp_path, recwarn):
    assert load(tmp_path / "none.json", lambda: pytest.fail("the GPU's name costs time")) == {}
    assert not recwarn.list


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTRES_TUNED", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_path() == tmp_path / "fastres" / "tuned.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_path() == Path.home() / ".cache" / "fastres" / "tuned.json"
    monkeypatch.setenv("FASTRES_TUNED", str(tmp_path / "mine.json"))
    assert cache_path() == tmp_path / "mine.json"
