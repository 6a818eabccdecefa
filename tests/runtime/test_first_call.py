"""The first fused call that auto gives to our kernels is judged against PyTorch, once."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fused import assert_close, images, plain, small
from torch import nn

pytest.importorskip("triton")

from launches import auto_with_kernels, spoiling

from fastres import ResNet
from fastres.backends import triton
from fastres.runtime import first_call

pytestmark = pytest.mark.interpreter
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _kernels():
    with auto_with_kernels():
        yield


@pytest.fixture
def judged(monkeypatch):
    """The batches of the answers that were judged."""
    found = []
    wrong = first_call.FirstCall.wrong

    def recorded(self, output):
        found.append(self.x)
        return wrong(self, output)

    monkeypatch.setattr(first_call.FirstCall, "wrong", recorded)
    return found


@torch.no_grad()
def told(model, *batches):
    """The answers to some batches, and the warnings meanwhile."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", UserWarning)
        answers = [model(x) for x in batches]
    return answers, [str(w.message) for w in found if w.category is UserWarning]


def served_by(model):
    return {name.split()[0] for name in model.plan().kernels if name and name != "view"}


@pytest.mark.fault(88)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1.02, float("nan")])
def test_a_wrong_answer_is_never_given(dtype, factor):
    model, x = small().to(dtype), images(3, 8).to(dtype)
    with spoiling(factor):
        (first, second), messages = told(model, x, x)
    assert torch.equal(first, plain(model, x))
    assert_close(second, model, x)
    (message,) = messages
    assert "goes on without its Triton kernels on cpu" in message
    assert "the first answer is wrong: up to" in message
    if factor == 1.02:
        assert "against float64, allowed" in message
    assert "triton" not in served_by(model)
    assert CPU in triton.FAILED


@pytest.mark.fault(88)
def test_another_model_avoids_the_kernels_in_silence():
    with spoiling(1.02):
        told(small(), images(2, 8))
        (out,), messages = told(other := small(seed=3), images(2, 8))
    assert not messages
    assert_close(out, other, images(2, 8))


@pytest.mark.fault(88)
def test_a_right_answer_is_judged_once_and_nothing_is_said(judged):
    model = small()
    answers, messages = told(model, images(3, 8), images(3, 8), images(1, 12))
    assert not messages
    assert len(judged) == 1
    assert_close(answers[0], model, images(3, 8))
    assert served_by(model) == {"triton"}
    told(model.half(), images(3, 8).half())  # another runner
    assert len(judged) == 2


@pytest.mark.fault(88)
def test_new_weights_are_not_judged_again(judged):
    model = small()
    told(model, images(2, 8))
    with torch.no_grad():
        model.fc.weight.mul_(2)
    (out,), _ = told(model, images(2, 8))
    assert_close(out, model, images(2, 8))
    assert len(judged) == 1


@pytest.mark.fault(88)
def test_few_images_are_computed_by_pytorch(monkeypatch):
    batches = []
    forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda m, x: batches.append(len(x)) or forward(m, x))
    told(small(), images(9, 8))
    assert set(batches) == {4}


@pytest.mark.fault(88)
def test_a_wrong_image_of_many_is_seen():
    model, x = small(), images(9, 8)
    executor = runner_of(model).executor
    call = first_call.FirstCall(executor, x)
    right = executor.run([x])
    assert call.wrong(right) is None
    for place in (0, 3, 6, 8):
        wrong = right.clone()
        wrong[place] += 0.1
        assert "off PyTorch's" in call.wrong(wrong)


def runner_of(model):
    told(model, images(1, 8))
    return next(iter(model._live()._runners.values()))


@pytest.mark.fault(88)
@pytest.mark.parametrize("x", [images(2, 8)[:0], images(2, 8) * float("nan")], ids=["empty", "NaN"])
def test_what_shows_nothing_is_not_judged_and_the_next_call_is(judged, x):
    model = small()
    told(model, x, x)
    assert not judged
    assert model._live()._last is None  # no graph of unjudged kernels is replayed
    told(model, images(2, 8))
    assert len(judged) == 1


@pytest.mark.fault(88)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_backend_that_was_asked_for_is_not_judged(judged, backend):
    model = small(backend=backend)
    with spoiling(1.02):
        (out,), messages = told(model, images(2, 8))
    assert not judged
    assert not messages
    wrong = not torch.allclose(out, plain(model, images(2, 8)), rtol=1e-3)
    assert wrong is (backend == "triton")


@pytest.mark.fault(88)
def test_nothing_of_the_model_and_no_random_state_changes():
    model, x = small(), images(3, 8)
    held = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    seen = []
    model.register_forward_hook(lambda *_: seen.append("root"))
    told(model, x)
    assert seen == ["root"]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, held[name]) for name, t in model.state_dict().items())
    assert not model.training
    assert torch.equal(x, images(3, 8))


@pytest.mark.fault(88)
def test_pytorch_computes_on_a_copy(monkeypatch):
    model, called = small(), []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda m, x: called.append(m) or forward(m, x))
    told(model, images(2, 8))
    assert called
    assert not any(m is model.fc for m in called)


@pytest.mark.fault(88)
def test_threads_wait_for_the_verdict(judged):
    model, x = small(), images(2, 8)
    warned = pytest.warns(UserWarning, match="the first answer is wrong")
    with spoiling(1.02), ThreadPoolExecutor(4) as pool, warned:
        answers = list(pool.map(torch.no_grad()(lambda _: model(x)), range(4)))
    assert len(judged) == 2  # our kernels' and, after them, PyTorch's
    for out in answers:
        assert_close(out, model, x)


@pytest.mark.fault(88)
def test_a_plan_that_is_wrong_without_kernels_too_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(first_call.FirstCall, "wrong", lambda self, output: "off")
    model, x = small(), images(2, 8)
    answers, messages = told(model, x, x)
    assert all(torch.equal(out, plain(model, x)) for out in answers)
    assert len(messages) == 2
    assert "runs this model as ordinary PyTorch: its answer is wrong" in messages[1]


@pytest.mark.fault(88)
def test_a_subclass_that_returns_more_than_logits_is_judged(judged):
    class Both(ResNet):
        def _forward_impl(self, x):
            x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
            return x, self.fc(self.layer2(x).mean((2, 3)))

    model, x = small(Both), images(5, 8)
    with spoiling(1.02):
        ((features, logits),), messages = told(model, x)
    assert len(messages) == 1
    wanted = plain(model, x)
    assert torch.equal(features, wanted[0])
    assert torch.equal(logits, wanted[1])


@pytest.mark.fault(88)
def test_under_inference_mode_and_autocast():
    model, x = small(), images(3, 8)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), spoiling(1.5):
        with pytest.warns(UserWarning, match="the first answer is wrong"):
            out = model(x)
        assert torch.equal(out, plain(model, x))
