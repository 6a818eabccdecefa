"""The judge: who passes, who does not, and what it says."""

import copy
import dataclasses
import json

import pytest
import torch
from fused import executions, images, rms, small
from torch import nn

import fastres
from fastres.backends.aten import AtenOps
from fastres.errors import VerificationError
from fastres.graph import fold, plan, trace
from fastres.runtime.executor import Executor
from fastres.runtime.tolerance import product_eps
from fastres.runtime.verify import compare_outputs
from fastres.runtime.verify_steps import verify_steps


def rounded(values, dtype=torch.float32):
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def test_a_model_agrees_with_its_fused_self():
    model, x = small(), images(3)
    with executions() as ran:
        found = fastres.verify(model, model, x)
    assert len(ran) == 1, "the candidate ran fused, the reference did not"
    assert found.ok
    assert found.finite
    assert found.agreement == 1.0
    assert 0 < found.rms <= 2 * found.reference_rms + 4 * 2**-23 * found.scale
    assert found.max_abs > 0
    assert found.shape == (3, 3, 16, 16)
    assert found.dtype == "float32"
    assert "float64" in found.reason


def test_what_is_measured():
    """Each figure by hand."""
    exact = [torch.tensor([[3.0, 4.0], [0.0, 5.0]], dtype=torch.float64)]
    expected = [torch.tensor([[3.0, 4.0], [0.0, 5.0 + 1e-6]])]
    actual = [torch.tensor([[4.0, 3.0], [0.0, 5.0]])]
    found, _ = compare_outputs(expected, actual, exact, (2, 7))
    assert not found.ok
    assert found.agreement == 0.5
    assert found.max_abs == 1.0
    assert found.rms == pytest.approx((2 / 4) ** 0.5)
    assert found.scale == pytest.approx((50 / 4) ** 0.5)
    assert found.reference_rms == rms(expected[0].double() - exact[0])
    assert found.shape == (2, 7)
    assert json.loads(json.dumps(found.to_dict()))["agreement"] == 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.ok = True


@pytest.mark.parametrize("factor", [1.9, 2.1])
def test_the_rule_of_two(factor):
    """The reference is 100 units from the exact answer; the floor of four units hardly counts."""
    exact = [torch.linspace(1, 2, 100, dtype=torch.float64)]
    off = 100 * torch.finfo(torch.float32).eps * rms(exact[0])
    expected = [(exact[0] + off).float()]
    actual = [(exact[0] - factor * off).float()]
    assert compare_outputs(expected, actual, exact)[0].ok == (factor < 2)


def test_the_floor():
    """Where PyTorch is exact, a few units in the last place are no error."""
    exact = [torch.linspace(1, 2, 100, dtype=torch.float64).float().double()]
    unit = torch.finfo(torch.float32).eps * rms(exact[0])
    same = [exact[0].float()]
    assert compare_outputs(same, [(exact[0] + 3 * unit).float()], exact)[0].ok
    assert not compare_outputs(same, [(exact[0] + 5 * unit).float()], exact)[0].ok


def test_infinities_and_nan_must_be_in_the_same_places():
    exact = [torch.tensor([1.0, float("inf"), 3.0, 4.0], dtype=torch.float64)]
    expected = [exact[0].float()]
    assert compare_outputs(expected, [exact[0].float()], exact)[0].ok
    holes = [torch.tensor([1.0, 2.0, float("nan"), 4.0])]
    found, _ = compare_outputs(expected, holes, exact)
    assert not found.ok
    assert not found.finite
    assert "infinite or NaN outputs in different places" in found.reason


def test_a_float64_model_is_not_held_to_its_own_rounding():
    """It has no error against itself, but another order of adding up a deep network has."""
    model, x = small().double(), images(2).double()

    def off(units):
        return lambda x: model(x) * (1 + units * torch.finfo(torch.float64).eps)

    found = fastres.verify(model, off(12), x)
    assert found.ok
    assert 0 < found.reference_rms < 4 * torch.finfo(torch.float64).eps * found.scale
    assert "against the reference" in found.reason
    assert not fastres.verify(model, off(60), x).ok


def test_without_float64_the_reference_itself_is_the_measure():
    """A function is no module: it cannot be run in float64."""
    model, x = small(), images()
    found = fastres.verify(lambda v: model._forward_impl(v), model, x)
    assert found.ok
    assert found.reference_rms is None
    assert "against the reference" in found.reason
    wrong = fastres.verify(
        lambda v: model._forward_impl(v), lambda v: model._forward_impl(v) + 1e-3, x
    )
    assert not wrong.ok


class InsistsOnFloat32(nn.Module):
    """Fails in float64."""

    def forward(self, x):
        if x.dtype is not torch.float32:
            raise TypeError("float32 only")
        return 2 * x


def test_a_reference_that_refuses_float64():
    module = InsistsOnFloat32().eval()
    assert fastres.verify(module, lambda x: x + x, images()).reference_rms is None


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (lambda x: torch.zeros(2, 4), r"the outputs differ in form: .*\(2, 5\).*\(2, 4\)"),
        (lambda x: torch.zeros(2, 5).double(), "the outputs differ in form: .*float64"),
        (lambda x: (torch.zeros(2, 5), torch.zeros(2, 5)), "the outputs differ in form"),
        (lambda x: "logits", "the output holds no tensor; got str"),
    ],
)
def test_other_structures_are_errors(candidate, message):
    with pytest.raises(VerificationError, match=message):
        fastres.verify(small(), candidate, images())


def test_structures_are_compared_leaf_by_leaf():
    def nest(x):
        return {"a": [x, (x + 1,)], "b": x * 2}

    assert fastres.verify(nest, nest, images()).ok
    assert not fastres.verify(nest, lambda x: {**nest(x), "b": x * 2.001}, images()).ok


@dataclasses.dataclass
class Labelled:
    logits: torch.Tensor
    other: object


class Labelling(nn.Module):
    """Logits in a dataclass that torch knows nothing of, and in another inside it."""

    def __init__(self):
        super().__init__()
        self.network = small()

    def forward(self, x):
        logits = self.network(x)
        return Labelled(logits, (Labelled(2 * logits, None), 3))


def test_dataclasses_are_looked_into():
    model, x = Labelling().eval(), images(2)
    fast = fastres.optimize(model, example_input=x)
    assert fast.verification.ok
    found = fast(x)
    assert type(found) is Labelled
    inner, number = found.other
    assert (type(inner), number) == (Labelled, 3)
    assert torch.equal(inner.logits, 2 * found.logits)

    def wrong(x):
        found = model(x)
        return Labelled(found.logits, (Labelled(found.logits, None), 3))

    assert not fastres.verify(model, wrong, x).ok


def test_several_arguments_and_their_copies():
    """Both sides get the arguments as they were, though one of them writes into its own."""

    def reference(x, y):
        return x.mul_(y)

    x, y = images(), torch.tensor(3.0)
    before = x.clone()
    assert fastres.verify(reference, lambda x, y: x * y, (x, y)).ok
    assert torch.equal(x, before)


def test_a_wrong_candidate_fails():
    model, x = small(), images()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.bn1.bias.add_(1e-3)
    assert fastres.verify(model, copy.deepcopy(model), x).ok
    assert not fastres.verify(model, other, x).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("path", ["conv1", "layer2.0.downsample.0", "fc"])
def test_a_wrong_step_is_found_by_name(dtype, path):
    """One bias a hundredth off, among float32 or half-precision steps."""
    model, x = small().to(dtype), images().to(dtype)
    with torch.no_grad():
        model(x)
    (runner,) = model._live()._runners.values()
    right = verify_steps(runner.executor, model, [x])
    assert len(right) == 7
    assert all(error.ok for error in right)
    index = next(i for i, e in enumerate(right) if e.step == path)
    changed = copy.deepcopy(model)
    layer = changed.get_submodule(path)
    with torch.no_grad():
        layer.weight.mul_(1.02)
    found = verify_steps(runner.executor, changed, [x])
    assert [i for i, error in enumerate(found) if not error.ok] == [index]
    assert found[index].rms > found[index].allowed
    assert found[index].what.startswith("linear" if path == "fc" else "conv")


def test_nan_of_a_step_is_an_error():
    model, x = small(), images()
    with torch.no_grad():
        model(x)
    (runner,) = model._live()._runners.values()
    weight = runner.executor._prepared[runner.executor.plan.steps[-1].name][0]
    weight[0, 0] = float("nan")
    found = verify_steps(runner.executor, model, [x])
    assert [error.step for error in found if not error.ok] == ["fc"]


def test_cudnn_looks_for_no_fast_algorithms_of_what_is_compared_with(monkeypatch):
    """The search takes most of a second for each layer, and float64 is needed just once."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    model, x, searched = small(), images(), {}

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            searched.setdefault(x.dtype, torch.backends.cudnn.benchmark)
            return self.model(x)

    def candidate(x):
        searched["candidate"] = torch.backends.cudnn.benchmark
        return model(x)

    assert fastres.verify(Watched(), candidate, x).ok
    assert searched == {"candidate": True, torch.float32: False, torch.float64: False}
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize("allowed", [False, True])
def test_where_tf32_is_allowed_two_ways_may_differ_by_its_roundings(allowed, monkeypatch):
    """What torch.compile's graphs are judged by, for which there is no float64."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert product_eps(torch.float32, gpu) == (2**-10 if allowed else 2**-23)
    assert product_eps(torch.float32, cpu) == 2**-23
    assert product_eps(torch.float16, gpu) == 2**-10
    assert product_eps(torch.float64, gpu) == 2**-52


@pytest.mark.parametrize("factor", [1.0, 1.0 + 1e-5])
def test_one_wrong_channel_of_many_is_found(factor):
    """By 1e-5 in one of 512 channels: too little for the root mean square over all of them."""
    model = nn.Sequential(nn.Conv2d(8, 512, 1, bias=False), nn.ReLU()).eval()
    built = plan.build(fold.fold(trace.trace(model)))
    made = Executor(built, model, AtenOps(), torch.float32)
    with torch.no_grad():
        made._prepared[built.steps[0].name][0][7] *= factor
    (found,) = verify_steps(made, model, [torch.randn(2, 8, 8, 8)])
    assert found.ok == (factor == 1.0)
