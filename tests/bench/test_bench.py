"""The benchmark's gate: which outputs it believes, and the weights that it judges on."""

import copy
import math
import re

import pytest
import torch

from fastres.bench import run
from fastres.bench.accuracy import SANE_ERROR, AccuracyCheck, calibrate_, random_images
from fastres.bench.baselines import eager
from fastres.bench.run import BASELINE, compare
from fastres.models.registry import create_model
from fastres.perf.timing import Method

BRIEF = Method(rounds=1, budget=0, sample=0, warmup=0)
NCHW = torch.contiguous_format


@pytest.fixture(scope="module")
def images():
    return random_images(4, 3, 64)


@pytest.fixture(scope="module")
def references(model, images):
    contenders = {
        BASELINE: eager(model, torch.float32, NCHW),
        "eager bf16": eager(model, torch.bfloat16, NCHW),
    }
    with torch.inference_mode():
        return AccuracyCheck(model, contenders, images)


@pytest.fixture
def judge(references):
    return copy.deepcopy(references)


def test_an_honest_output_passes_and_its_error_is_kept(judge, model, images):
    with torch.inference_mode():
        output = eager(model, torch.float32, torch.channels_last)(images[1])
    assert judge("honest", 1, output) is None
    error = judge.errors["honest"]
    assert 0 < error.rms <= error.allowed_rms < 1e-5 * error.reference_rms
    assert error.agreement == 1.0
    assert error.max_abs >= error.rms


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda y: y * (1 + 1e-4), "wrong output: RMS error"),
        (lambda y: y + 1e-4, "wrong output: RMS error"),
        (lambda y: y.flip(0), "wrong output: RMS error"),
        (lambda y: y[:, :9], r"the output is \(4, 9\), not \(4, 10\)"),
        (lambda y: y.index_fill(0, torch.tensor([2]), math.nan), "the logits are not finite$"),
        (lambda y: (y * math.inf).half(), "not finite; bfloat16 has the range"),
        (lambda y: (y * 1.5).bfloat16(), "wrong output: RMS error"),
    ],
)
def test_a_spoilt_output_is_refused(judge, model, images, spoil, complaint):
    with torch.inference_mode():
        output = eager(model, torch.float32, NCHW)(images[0])
    assert judge("honest", 0, output) is None
    assert re.search(complaint, judge("spoilt", 0, spoil(output)) or "")


def test_the_worst_output_of_a_contender_is_the_one_reported(judge, model, images):
    with torch.inference_mode():
        output = eager(model, torch.float32, NCHW)(images[0])
    for shift in (0.0, 0.5, 0.1):
        judge("shifted", 0, output + shift)
    assert judge.errors["shifted"].rms == pytest.approx(0.5, rel=1e-3)


def test_rounding_that_overflows_allows_no_more_than_the_sane_error(judge):
    judge.rounding[torch.float16] = math.nan
    assert judge._allowed(torch.float16, 4, scale=2.0) == SANE_ERROR * 2.0
    judge.rounding[torch.float16] = 1e9
    assert judge._allowed(torch.float16, 4, scale=2.0) == SANE_ERROR * 2.0


@pytest.mark.parametrize("forgotten", ["weight", "bias", "running_mean", "running_var"])
def test_calibrated_weights_show_what_is_forgotten(judge, model, images, forgotten):
    """With a network's initial weights each of these would change the logits by less than 1e-6."""
    neutral = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        getattr(wrong.layer2[1].bn2, forgotten).fill_(neutral[forgotten])
        output = eager(wrong, torch.float32, NCHW)(images[0])
    assert "wrong output" in (judge("forgetful", 0, output) or "")


def test_calibration_leaves_mode_and_momentum_as_they_were():
    built = create_model("resnet18").eval()
    calibrate_(built)
    assert not any(module.training for module in built.modules())
    assert built.bn1.momentum == 0.1


@pytest.mark.sweep
@pytest.mark.slow
def test_the_deepest_network_stays_inside_half_precision():
    """Untouched, ResNet-152 in eval mode reaches 4e8 and is infinite in float16."""
    built = create_model("resnet152").eval()
    calibrate_(built)
    x = random_images(1, 3, 224)[:1]
    with torch.inference_mode():
        plain = {BASELINE: eager(built, torch.float32, NCHW)}
        judge = AccuracyCheck(built, plain, x)
        output = eager(built, torch.bfloat16, torch.channels_last)(x[0])
        judge("bf16", 0, output)
        assert judge.errors["bf16"].rms < SANE_ERROR * judge.errors["bf16"].reference_rms
        assert eager(built, torch.float16, torch.channels_last)(x[0]).isfinite().all()


def test_a_contender_that_cannot_be_built_is_listed_and_the_rest_is_timed(
    model, images, monkeypatch
):
    def fails(*args, **kwargs):
        raise OSError("ptxas died\nin pain")

    monkeypatch.setattr(run, "optimize", fails)
    case = compare("rn18", model, images, [torch.float32], "random", BRIEF)
    assert case.comparison.failures == {"fastres fp32": "OSError: ptxas died"}
    assert case.comparison[BASELINE].seconds
    assert not case.comparison["fastres fp32"].seconds


def test_eager_never_runs_the_fused_engine(model, images, monkeypatch):
    def fused(self, x):
        raise AssertionError("the engine ran")

    monkeypatch.setattr("fastres.runtime.live.LiveModule._dispatch", fused)
    with torch.inference_mode():
        eager(model, torch.float32, NCHW)(images[0])


def test_inputs_are_never_zero_and_differ():
    first, second, *_ = random_images(1, 3, 8)
    assert len(random_images(1, 3, 8)) == 8
    assert len(random_images(64, 3, 8)) == 2
    assert not torch.equal(first, second)
    assert first.count_nonzero() == first.numel()
