"""Tuning by a clock that is made up: what is measured, what counts, that the planner obeys."""

import json
from functools import partial

import pytest
import torch
from helpers import adversarial_

from fastres import Bottleneck, ResNet, cli
from fastres.backends.aten import AtenOps
from fastres.backends.kernel_choice import load
from fastres.backends.triton import TritonOps
from fastres.errors import BackendError
from fastres.graph.plan import of_module
from fastres.perf import autotune
from fastres.perf.autotune import candidates_of, tune
from fastres.runtime.executor import Executor
from fastres.runtime.tuning import Session

kernels = pytest.importorskip("fastres.kernels")
pytestmark = pytest.mark.interpreter
CPU, HALF = torch.device("cpu"), torch.float16


def network(seed=0):
    """(N, 3, H, W) -> (N, 8): one stage with a seam, wide enough for b2b_gemm and TMA."""
    return adversarial_(ResNet(Bottleneck, [3], num_classes=8, planes=16, stem="cifar"), seed)


def plain_executor():
    model = network()
    return Executor(of_module(model), model, AtenOps(), HALF)


def clock(cheap, calls):
    """Microseconds by what a call launches: one for those named, two for others."""
    kernels.LAUNCHES.clear()
    calls[0]()
    return sum(1e-6 if name in cheap else 2e-6 for name in kernels.LAUNCHES.elements()) or 3e-6


@pytest.fixture
def tuned_file(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("FASTRES_TUNED", str(path))
    return path


def served(model, batch=2):
    made = Executor(of_module(model), model, TritonOps(cudnn=True), HALF)
    with torch.no_grad():
        made.run([torch.randn(batch, 3, 8, 8).to(HALF)])
    return made.plan


def run(cheap, model=None, batch=2, **kwargs):
    return tune(model or network(), [(batch, 3, 8, 8)], [HALF], CPU, clock=partial(clock, cheap))


def test_equal_pieces_are_tried_once_and_small_ones_first():
    found = candidates_of(
        of_module(network()), (2, 3, 8, 8), TritonOps(), HALF, torch.device("cpu")
    )
    keys = [candidate.workload.key for candidate in found]
    assert len(keys) == len(set(keys))
    lengths = [len(candidate.group.steps) for candidate in found]
    assert lengths == sorted(lengths)
    alternatives = {name for candidate in found for name in candidate.kernels}
    assert {"conv2d", "gemm", "unfused", "dual_gemm", "b2b_gemm", "head"} <= alternatives
    assert "cudnn" not in alternatives


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cheap", "expected", "unwanted"),
    [
        (("conv2d_kernel", "b2b_gemm_kernel"), "triton b2b_gemm", "triton dual_gemm"),
        (("conv2d_kernel",), "triton conv2d", "triton gemm"),
    ],
)
def test_the_plan_shows_what_was_measured(tuned_file, cheap, expected, unwanted):
    model = network()
    before, far = served(model), served(model, 5)
    assert not any(why.startswith("measured") for why in before.reasons)
    found = run(cheap, model)
    assert not found.wrong
    after = served(model)
    assert expected in after.kernels
    assert unwanted not in after.kernels
    assert after.kernels != before.kernels
    assert any(why.startswith("measured here: ") for why in after.reasons)
    assert "measured here: " in str(after)
    assert {"reason", "served_by"} <= set(after.to_dict()["steps"][0])
    assert served(model, 5).kernels == far.kernels, "more than twice the batch measured"


def test_what_is_timed_has_the_workspace_that_a_captured_network_has(tuned_file, monkeypatch):
    given, timed = {}, {}

    def record(module, name):
        kernel = getattr(module, name)

        def recorded(*operands, workspace=None, **options):
            given[name] = workspace
            return kernel(*operands, workspace=workspace, **options)

        monkeypatch.setattr(module, name, recorded)

    def watching(calls):
        given.clear()
        calls[0]()
        timed.update(given)
        return 1e-6

    record(kernels, "conv2d")
    record(kernels.linear, "linear")
    record(kernels.head, "head")
    found = tune(network(), [(2, 3, 8, 8)], [HALF], CPU, clock=watching)
    assert not found.wrong
    assert {"conv2d", "linear", "head"} == timed.keys()
    assert all(workspace is not None for workspace in timed.values())


def test_apart_is_the_best_that_the_parts_can_do(tuned_file):
    found = run(("gemm_kernel",))
    (pair,) = (m for t, m in found.results if t.kernels == ("unfused", "dual_gemm"))
    assert pair.seconds == {"unfused": 2e-6, "dual_gemm": 1e-6}, "two products against one"
    head = next(m for t, m in found.results if t.kernels == ("unfused", "head"))
    assert head.seconds == {"unfused": 4e-6, "head": 2e-6}, "the view between the two takes nothing"


def test_a_wrong_kernel_gets_no_time_and_is_never_chosen(tuned_file, monkeypatch):
    gemm = kernels.gemm.gemm
    monkeypatch.setattr(kernels.gemm, "gemm", lambda *a, **k: gemm(*a, **k) * 1.01)
    model = network()
    found = run(("gemm_kernel", "b2b_gemm_kernel"), model)
    assert found.wrong
    assert all(sentence.startswith("gemm at batch 2, Conv2d") for sentence in found.wrong)
    for candidate, measurement in found.results:
        if "gemm" in candidate.kernels:
            assert measurement.excluded["gemm"].startswith("wrong: error ")
            assert "gemm" not in measurement.seconds
    monkeypatch.setattr(kernels.gemm, "gemm", gemm)
    assert "triton gemm" not in served(model).kernels


def test_a_kernel_that_fails_is_excluded_with_its_error(tuned_file, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of registers\nand more")

    monkeypatch.setattr(kernels.b2b_gemm, "b2b_gemm", broken)
    found = run(("b2b_gemm_kernel",))
    b2b_gemm = next(m for t, m in found.results if t.kernels == ("unfused", "b2b_gemm"))
    assert b2b_gemm.excluded == {"b2b_gemm": "RuntimeError: out of registers"}
    assert b2b_gemm.fastest() == "unfused"


def test_a_lost_gpu_condemns_no_kernel(monkeypatch):
    """After an illegal access everything fails; none of it may be kept."""

    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    candidate = candidates_of(
        of_module(network()), (2, 3, 8, 8), TritonOps(), HALF, torch.device("cpu")
    )[0]
    session = Session(plain_executor(), torch.device("cuda"), lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        session.measure(candidate, autotune._inputs(candidate, CPU))


def test_a_kernel_that_did_not_run_gets_no_time(monkeypatch):
    """The executor goes on without one that does not take the piece: conv2d's time is not its."""
    found = candidates_of(of_module(network()), (2, 3, 8, 8), TritonOps(), HALF, CPU)
    candidate = next(c for c in found if "gemm" in c.kernels)
    monkeypatch.setattr(TritonOps, "_supports", lambda self, group, *_: group.kernel != "gemm")
    session = Session(plain_executor(), CPU, lambda _: 1e-6)
    measured = session.measure(candidate, autotune._inputs(candidate, CPU))
    assert "gemm" not in measured.seconds
    assert measured.excluded == {"gemm": "does not take these sizes here"}


def test_nan_is_wrong(tuned_file, monkeypatch):
    gemm = kernels.gemm.gemm
    monkeypatch.setattr(kernels.gemm, "gemm", lambda *a, **k: gemm(*a, **k) * float("nan"))
    assert run(("gemm_kernel",)).wrong


def test_other_versions_do_not_count(tuned_file, monkeypatch):
    model = network()
    run(("gemm_kernel", "b2b_gemm_kernel"), model)
    monkeypatch.setattr("fastres.version.__version__", "9.9.9")
    with pytest.warns(UserWarning, match="other versions than interpreter; .*fastres 9.9.9"):
        plan = served(model)
    assert not any(why.startswith("measured") for why in plan.reasons)


def test_progress_and_plain_data(tuned_file):
    told = []

    def follow(title):
        return lambda done, wanted: told.append((title, done, wanted))

    found = tune(
        network(),
        [(1, 3, 8, 8)],
        [HALF],
        CPU,
        clock=partial(clock, ()),
        progress=follow,
    )
    wanted = len(found.results)
    assert told == [("batch 1, float16", done, wanted) for done in range(wanted + 1)]
    data = json.loads(json.dumps(found.to_dict()))
    assert data["path"] == str(tuned_file)
    assert {case["batch"] for case in data["cases"]} == {1}
    kept = load(tuned_file, lambda: found.machine)
    assert {t.workload.key for t, _ in found.results if len(t.kernels) > 1} == set(kept)


def test_tuning_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(BackendError, match="tuning measures on a CUDA GPU, got device 'cpu'"):
        tune(network(), [(1, 3, 8, 8)], [HALF], CPU, cache=tmp_path / "t.json")
    assert not list(tmp_path.iterdir())


def test_command_lists_the_cases(capsys):
    assert cli.run(["tune", "resnet50", "--batch", "1,64", "--size", "64", "--dry", "--json"]) == 0
    cases = json.loads(capsys.readouterr().out)
    assert {case["batch"] for case in cases} == {1, 64}
    assert {"unfused", "stem"} in [set(case["kernels"]) for case in cases]
    assert all(len(case["kernels"]) > 1 for case in cases)
    assert cli.run(["tune", "resnet20", "--batch", "2", "--dry"]) == 0
    assert "pieces to choose for" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet20"], "tuning measures on a CUDA GPU, got device 'cpu'; --dry lists the cases"),
        (["resnet20", "--batch", "0", "--dry"], "--batch takes sizes of at least 1; got '0'"),
        (["resnet20", "--dtype", "int3", "--dry"], "int3"),
        (["resnet1", "--dry"], "resnet1"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    assert cli.run(["tune", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_command_keeps_what_it_finds(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("fastres.perf.autotune.tune", partial(tune, clock=partial(clock, ())))
    path = tmp_path / "mine.json"
    arguments = ["tune", "resnet20", "--size", "8", "--batch", "1", "--cache", str(path)]
    assert cli.run([*arguments, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["path"] == str(path)
    assert path.is_file()
    assert cli.run(arguments) == 0
    assert "conv2d 2.0" in capsys.readouterr().out
