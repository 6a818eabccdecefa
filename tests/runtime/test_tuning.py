"""Kernels measured before a shape is captured, by a clock that is made up; no GPU has run it."""

import inspect
import json
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from fused import assert_close, plain
from torch import nn

pytest.importorskip("triton")

from launches import auto_with_kernels, spoiling
from named_gpu import CUDA, TARGETS, executor, fake_gpu

import fastres
from benchmarks.call_cost import _Cuda, stubbed, stubbed_graphs
from fastres.backends import aten, kernel_choice, select, triton
from fastres.graph import plan
from fastres.runtime import first_call, tuning
from fastres.runtime.executor import Executor
from fastres.runtime.live import LiveModule

pytestmark = pytest.mark.interpreter
CPU = torch.device("cpu")
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class Clock:
    """Microseconds by what serves a piece, one for all that has no other; ``timed`` lists it."""

    def __init__(self):
        self.microseconds, self.timed, self.now = {}, [], 0.0

    def seconds(self, calls):
        (*_, kernel) = inspect.getclosurevars(calls[0]).nonlocals["executor"].plan.kernels
        self.timed.append(kernel)
        self.now += 0.1
        return self.microseconds.get(kernel.split()[-1], 1.0) / 1e6


@pytest.fixture(autouse=True)
def tuned_file(monkeypatch, tmp_path):
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("FASTRES_TUNED", str(path))
    monkeypatch.delenv("FASTRES_TUNE", raising=False)
    monkeypatch.setattr(kernel_choice, "_unwritten", {})
    with auto_with_kernels():
        yield path


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(tuning, "quick_seconds", made.seconds)
    monkeypatch.setattr(tuning, "perf_counter", lambda: made.now)
    return made


def tiny(seed=0):
    """(N, 3, H, W) -> (N, 5): two convolutions with ReLU, pool and classifier."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    ).eval()


def one(seed=0):
    """One convolution with ReLU."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()).eval()


def executor_of(model, backend="auto"):
    ops = select.select_ops(backend, CPU, X.dtype)
    return Executor(plan.of_module(model), model, ops, X.dtype)


class Tiny(LiveModule):
    """That, live."""

    def __init__(self):
        super().__init__()
        self.body = tiny()
        self.eval()

    def _forward_impl(self, x):
        return self.body(x)


def captured(model=None, x=X, backend="auto", calls=2):
    """The runner after calls with ``x``, the second of which captures; the answers are right."""
    model = model or tiny()
    runner = stubbed_graphs().GraphRunner(executor_of(model, backend))
    with torch.no_grad():
        answers = [runner(x) for _ in range(calls)]
        for answer in answers:
            torch.testing.assert_close(answer, model(x), rtol=1e-4, atol=1e-5)
    return runner


def of_convolutions(runner):
    return {k: why for k, why in zip(*steps_of(runner), strict=True) if "conv" in k.lower()}


def steps_of(runner):
    whole = runner.executor.plan
    return whole.kernels, whole.reasons


def entries(path):
    (measured,) = json.loads(path.read_text())["machines"].values()
    return [entry for batches in measured.values() for entry in batches.values()]


@pytest.mark.fault(89)
@pytest.mark.parametrize(("microseconds", "wins"), [(0.8, True), (0.951, False), (0.96, False)])
def test_a_rival_has_to_save_five_per_cent(clock, tuned_file, microseconds, wins):
    clock.microseconds["conv"] = microseconds  # cuDNN's fused convolution
    runner = captured()
    found = of_convolutions(runner)
    (kernel,) = found
    assert kernel == ("cuDNN fused conv" if wins else "triton conv2d")
    assert found[kernel].startswith(f"measured here: {microseconds if wins else 1:.1f} us, ")
    assert "triton head" in runner.executor.plan.kernels
    row = runner.executor.plan.to_dict()["steps"][0]
    assert row["reason"] == found[kernel]
    chosen = {("cudnn" if wins else "conv2d"): 2, "head": 1}
    for entry in entries(tuned_file):
        kept = kernel_choice.Measurement(**entry).choice()
        chosen[kept] -= 1
    assert set(chosen.values()) == {0}


@pytest.mark.fault(89)
def test_before_the_capture_and_without_a_rival_all_is_predicted(clock):
    runner = captured(calls=1)
    assert not clock.timed
    assert set(of_convolutions(runner).values()) == {"predicted: no rule for another kernel"}
    captured(one(), backend="triton")
    captured(one(), backend="torch")
    assert not clock.timed


@pytest.mark.fault(89)
def test_a_group_is_compared_with_its_parts(clock, tuned_file):
    clock.microseconds |= {"head": 5.0}
    runner = captured()
    assert {"triton linear", "triton global_avg_pool"} <= set(runner.executor.plan.kernels)
    (entry,) = (e for e in entries(tuned_file) if "head" in e["seconds"])
    assert entry["seconds"] == {"head": 5e-6, "unfused": 2e-6}


@pytest.mark.fault(89)
def test_each_piece_is_timed_once_and_its_own_kernel_before_and_after(clock):
    captured()
    both = ["triton conv2d", "cuDNN fused conv", "triton conv2d"]
    parts = ["triton global_avg_pool", "triton linear"]
    assert clock.timed == [*both, *both, *parts, "triton head", "triton head"]


@pytest.mark.fault(89)
def test_what_the_budget_leaves_is_predicted_until_the_next_shape(clock, monkeypatch):
    monkeypatch.setenv("FASTRES_TUNE", "0.25")
    runner = captured()
    kernels, reasons = steps_of(runner)
    assert reasons[0].startswith("measured here: ")
    assert reasons[1].startswith("predicted: ")
    assert len(clock.timed) == 3
    captured(tiny(), torch.cat([X, X]))  # a batch size within a factor of two
    assert len(clock.timed) == 6


@pytest.mark.fault(89)
def test_a_wrong_kernel_is_never_chosen(clock, tuned_file, monkeypatch):
    conv = aten.CudnnOps.conv
    monkeypatch.setattr(aten.CudnnOps, "conv", lambda *given: conv(*given) * 1.01)
    clock.microseconds["conv"] = 0.1
    assert set(of_convolutions(captured(one()))) == {"triton conv2d"}
    (entry,) = entries(tuned_file)
    assert entry["excluded"]["cudnn"].startswith("wrong: error ")


@pytest.mark.fault(89)
def test_a_kernel_that_fails_is_never_chosen(clock, tuned_file, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED\nand more")

    monkeypatch.setattr(aten.CudnnOps, "conv", fail)
    assert set(of_convolutions(captured(one()))) == {"triton conv2d"}
    reason = {"cudnn": "RuntimeError: CUDNN_STATUS_NOT_SUPPORTED"}
    assert [e["excluded"] for e in entries(tuned_file)] == [reason]


@pytest.mark.fault(89)
def test_the_predicted_kernel_goes_where_it_is_wrong(clock):
    clock.microseconds["conv"] = 9.0
    model = tiny()
    made = executor_of(model)
    with torch.no_grad(), spoiling(1.01):
        tuning.tune_shape(made, X)
        assert_close(made.run([X]), model, X)
    assert "cuDNN fused conv" in made.plan.kernels


def deterministic(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)


def deterministic_cudnn(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def off(monkeypatch):
    monkeypatch.setenv("FASTRES_TUNE", "0")


def under_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")


def one_of_two_ranks(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)


def in_a_capture(monkeypatch):
    monkeypatch.setattr(_Cuda, "is_current_stream_capturing", staticmethod(lambda: True))


@pytest.mark.fault(89)
@pytest.mark.fault(25)
@pytest.mark.parametrize(
    "state",
    [deterministic, deterministic_cudnn, off, under_torchrun, one_of_two_ranks, in_a_capture],
    ids=lambda state: state.__name__,
)
def test_where_nothing_is_measured(clock, tuned_file, monkeypatch, state):
    state(monkeypatch)
    runner = captured(one())
    assert not clock.timed
    assert not tuned_file.exists()
    assert set(of_convolutions(runner).values()) == {"predicted: no rule for another kernel"}


@pytest.mark.fault(89)
@pytest.mark.parametrize(
    ("microseconds", "kernel"), [(0.5, "cuDNN fused conv"), (1.0, "triton conv2d")]
)
def test_another_process_reads_what_was_measured(clock, tuned_file, microseconds, kernel):
    clock.microseconds["conv"] = microseconds
    captured(one())
    timed = list(clock.timed)
    assert not kernel_choice._unwritten, "the file alone knows"
    before = tuned_file.read_bytes()
    runner = captured(one(seed=1))
    assert clock.timed == timed
    assert set(of_convolutions(runner)) == {kernel}
    assert tuned_file.read_bytes() == before


@pytest.mark.fault(89)
def test_other_versions_are_measured_again_in_silence(clock, tuned_file, monkeypatch):
    captured(one())
    timed = len(clock.timed)
    monkeypatch.setattr("fastres.version.__version__", "9.9.9")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        captured(one())
    assert len(clock.timed) == 2 * timed
    assert len(json.loads(tuned_file.read_text())["machines"]) == 2


@pytest.mark.fault(89)
@pytest.mark.parametrize("content", [None, b'{"mine": 1}'], ids=["no folder", "not ours"])
def test_a_file_that_cannot_be_written_is_no_error(clock, monkeypatch, tmp_path, content):
    path = tmp_path / "taken"
    path.write_bytes(content or b"")
    monkeypatch.setenv("FASTRES_TUNED", str(path if content else path / "tuned.json"))
    clock.microseconds["conv"] = 0.5
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fastres ignores .*: not a file of measurements")
        warnings.filterwarnings("error", "fastres keeps")
        for _ in range(2):  # the second model of the process measures nothing
            assert set(of_convolutions(captured(one()))) == {"cuDNN fused conv"}
    assert clock.timed.count("cuDNN fused conv") == 1
    assert path.read_bytes() == (content or b"")


@pytest.mark.fault(89)
def test_a_measurement_that_fails_is_one_warning(clock, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(tuning.Session, "_reference", fail)
    told = "keeps to predicted kernels for images of shape .*OutOfMemoryError: CUDA out of memory"
    with pytest.warns(UserWarning, match=told):
        runner = captured(one())
    assert set(of_convolutions(runner)) == {"triton conv2d"}


@pytest.mark.fault(89)
@pytest.mark.parametrize("value", ["fast", "-1", "nan", "inf"])
def test_a_bad_budget_is_one_error(monkeypatch, value):
    monkeypatch.setenv("FASTRES_TUNE", value)
    with pytest.raises(ValueError, match=f"FASTRES_TUNE takes seconds .* got '{value}'"):
        captured()


@pytest.mark.fault(89)
def test_a_live_models_answer_is_judged_again_once_others_were_chosen(clock, monkeypatch):
    judged, wrong = [], first_call.FirstCall.wrong
    monkeypatch.setattr(
        first_call.FirstCall, "wrong", lambda self, out: judged.append(1) or wrong(self, out)
    )
    clock.microseconds["conv"] = 0.5
    with torch.no_grad(), stubbed():
        model = Tiny()
        for _ in range(3):
            assert_close(model(X), model, X)
    assert len(judged) == 2
    assert "cuDNN fused conv" in model.plan().kernels


@pytest.mark.fault(89)
def test_a_live_model_goes_on_without_kernels_that_are_wrong_together(clock, monkeypatch):
    verdicts = iter([None, "up to 1 off PyTorch's", None])
    monkeypatch.setattr(first_call.FirstCall, "wrong", lambda *_: next(verdicts))
    with torch.no_grad(), stubbed():
        model = Tiny()
        model(X)
        with pytest.warns(UserWarning, match="the first answer is wrong: up to 1 off"):
            out = model(X)
    assert torch.equal(out, plain(model, X))
    assert CPU in triton.FAILED


@pytest.mark.fault(89)
def test_threads_measure_once(clock):
    with stubbed(), ThreadPoolExecutor(3) as pool:
        model = Tiny()
        for out in pool.map(torch.no_grad()(lambda _: model(X)), range(4)):
            assert_close(out, model, X)
    assert clock.timed.count("triton head") == 2


@pytest.mark.fault(89)
def test_two_models_do_not_measure_at_a_time(monkeypatch):
    underway, most = [], []

    def run(self):
        underway.append(self)
        time.sleep(0.05)
        most.append(len(underway))
        underway.remove(self)

    monkeypatch.setattr(tuning._Tuning, "run", run)
    made = [executor_of(tiny()) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda each: tuning.tune_shape(each, X), made))
    assert most == [1, 1]


@pytest.mark.fault(89)
@pytest.mark.parametrize(
    ("architecture", "batch", "rivals"),
    [
        # Stage 1 has 5 distinct convolutions behind the stem's, the others 7 each.
        ("sm_80", 1, {"conv2d": 26, "stem": 1, "head": 1}),
        # The 3x3 (1, 2, 2, 2); the 1x1 (2, 2, 3, 3) but for those in the groups.
        ("sm_90", 32, {"conv2d": 7, "gemm": 10, "dual_gemm": 4, "b2b_gemm": 2, "stem": 1}),
    ],
)
def test_what_is_in_question_on_a_gpu(architecture, batch, rivals):
    """Of ResNet-50 at 224x224 in float16."""
    with torch.device("meta"):
        model = fastres.resnet50().eval()
    with torch.no_grad(), fake_gpu(TARGETS[architecture]):
        made = executor(model, torch.float16)
        x = torch.empty(batch, 3, 224, 224, dtype=torch.float16, device=CUDA)
        asked = tuning._Tuning(made, made.ops, x)._in_question()
    assert Counter(candidate.kernels[0] for candidate in asked) == rivals
    for candidate in asked:
        rival = "cudnn" if len(candidate.group.steps) == 1 else "unfused"
        assert candidate.kernels[1:] == (rival, candidate.kernels[0])


@pytest.mark.fault(89)
def test_nothing_is_measured_where_a_kernel_is_forced(clock, monkeypatch):
    monkeypatch.setenv("FASTRES_KERNELS", "-cudnn,head")
    captured()
    assert not clock.timed


@pytest.mark.fault(89)
def test_images_that_show_nothing_are_not_measured(clock):
    made = executor_of(tiny())
    with torch.no_grad(), mock.patch.object(tuning._Tuning, "run") as run:
        tuning.tune_shape(made, X * float("nan"))
        assert not run.called
        tuning.tune_shape(made, X)
        assert run.called
