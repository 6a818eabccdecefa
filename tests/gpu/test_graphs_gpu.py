"""CUDA graphs: captured once a shape returns, replayed on any stream; outputs are the caller's."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from fused import assert_close, small
from helpers import real_images

import fastres
from fastres.backends.select import _has_triton
from fastres.graph.ir import Conv2d

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
BACKENDS = ["torch", *(["triton"] if _has_triton() else [])]


def images(n=2, size=32):
    return real_images(n, size).to(CUDA)


@pytest.fixture(params=BACKENDS)
def model(request):
    return small(backend=request.param).to(CUDA)


def runner_of(model):
    (runner,) = model._live()._runners.values()
    return runner


@torch.no_grad()
def warm(model, *inputs):
    """Captured: the next call of these shapes is a replay."""
    for x in inputs:
        model(x)
        model(x)
    torch.cuda.synchronize()
    return model


@torch.no_grad()
def answer(model, x):
    return model(x)


def test_the_second_call_captures_and_the_third_replays(model):
    x = images()
    first = answer(model, x)
    assert runner_of(model).shapes == ()
    second = answer(model, x)
    assert runner_of(model).shapes == ((2, 3, 32, 32),)
    assert_close(first, model, x)
    assert_close(second, model, x)
    other = images() * 2 - 1
    assert_close(answer(model, other), model, other)
    assert_close(answer(model, x), model, x)
    assert len(runner_of(model).shapes) == 1


@pytest.mark.skipif(not _has_triton(), reason="needs triton")
def test_a_replay_launches_no_kernel_by_itself():
    from fastres.kernels import LAUNCHES

    model, x = small(backend="triton").to(CUDA), images()
    warm(model, x)
    before = sum(LAUNCHES.values())
    assert before > 0
    answer(model, x)
    assert sum(LAUNCHES.values()) == before


@pytest.mark.fault(24)
def test_outputs_belong_to_the_caller(model):
    inputs = [images() + i for i in range(6)]
    warm(model, inputs[0])
    outs = [answer(model, x) for x in inputs]
    copies = [out.clone() for out in outs]
    outs[0].fill_(float("nan"))
    for x in inputs:
        answer(model, x)
    for x, out, copy in list(zip(inputs, outs, copies, strict=True))[1:]:
        assert torch.equal(out, copy)
        assert_close(out, model, x)
    assert_close(answer(model, inputs[0]), model, inputs[0])


@pytest.mark.fault(24)
def test_each_shape_dtype_and_layout_has_a_graph_of_its_own(model):
    variants = [
        images(1),
        images(2),
        images(2, 48),
        images(2).contiguous(memory_format=torch.channels_last),
        images(4)[::2],
        images(2).transpose(2, 3),
        images(1).expand(2, -1, -1, -1),
    ]
    for _ in range(3):
        for x in variants:
            assert_close(answer(model, x), model, x)


@pytest.mark.fault(21)
def test_graphs_are_bounded_and_the_oldest_goes_first(model):
    sizes = range(16, 40)
    warm(model, images(1, 16))
    runner_of(model).limit = 8
    for size in sizes:
        warm(model, images(1, size))
        assert len(runner_of(model).shapes) <= runner_of(model).limit
    assert runner_of(model).shapes[-1] == (1, 3, 39, 39)
    assert (1, 3, 16, 16) not in runner_of(model).shapes
    for size in sizes:
        assert_close(answer(model, images(1, size)), model, images(1, size))


@pytest.mark.fault(23)
def test_evicted_graphs_may_still_be_running(model):
    """Calls on a stream of their own, evicted at once from another."""
    stream = torch.cuda.Stream()
    x = images(8, 64)
    warm(model, x)
    runner_of(model).limit = 8
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = answer(model, x)
    for size in range(16, 16 + 2 * runner_of(model).limit):
        warm(model, images(1, size))
    stream.synchronize()
    assert_close(out, model, x)


@pytest.mark.fault(23)
@pytest.mark.parametrize("captured", [False, True])
def test_a_side_stream(model, captured):
    x = images()
    if captured:
        warm(model, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outs = [answer(model, x + i) for i in range(4)]
    torch.cuda.current_stream().wait_stream(stream)
    for i, out in enumerate(outs):
        assert_close(out, model, x + i)


@pytest.mark.fault(23)
def test_streams_in_turn_without_waiting(model):
    """The first call folds on one stream; the next comes on another, at once."""
    streams = [torch.cuda.Stream() for _ in range(3)]
    inputs = [images() + i for i in range(12)]
    torch.cuda.synchronize()
    outs = []
    for i, x in enumerate(inputs):
        with torch.cuda.stream(streams[i % 3]):
            outs.append(answer(model, x))
    torch.cuda.synchronize()
    for x, out in zip(inputs, outs, strict=True):
        assert_close(out, model, x)


@pytest.mark.fault(23)
@pytest.mark.parametrize("captured", [False, True])
def test_an_input_freed_right_after_the_call(model, captured):
    if captured:
        warm(model, images(4, 64))
    kept = images(4, 64)
    torch.cuda.synchronize()
    outs = []
    for i in range(20):
        x = kept + i
        outs.append(answer(model, x))
        del x
        torch.full_like(kept, float("nan"))  # most likely where the input was
    for i, out in enumerate(outs):
        assert_close(out, model, kept + i)


@pytest.mark.fault(25)
def test_a_users_own_capture(model):
    """After warm-up the model can be part of a larger graph, which sees refolded weights too."""
    static = images().clone()
    warm(model, static)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        logits = model(static)
        best = logits.argmax(1)
    for i in range(3):
        static.copy_(images() + i)
        graph.replay()
        assert_close(logits.clone(), model, static)
        assert torch.equal(best, logits.argmax(1))
    model.load_state_dict(small(seed=4).state_dict())
    assert_close(answer(model, static), model, static)
    graph.replay()
    assert_close(logits.clone(), model, static)


@pytest.mark.fault(25)
def test_folding_inside_a_capture_is_refused(model):
    """New weights and changed ones; afterwards everything works."""
    x = images()
    for change in (lambda: None, lambda: model.load_state_dict(small(seed=4).state_dict())):
        change()
        graph = torch.cuda.CUDAGraph()
        refused = pytest.raises(RuntimeError, match="call it once outside the capture")
        with refused, torch.no_grad(), torch.cuda.graph(graph):
            model(x)
        torch.cuda.synchronize()
        for _ in range(3):
            assert_close(answer(model, x), model, x)


@pytest.mark.fault(35)
def test_changed_weights_keep_their_graphs(model):
    x = images()
    warm(model, x)
    (entry,) = runner_of(model)._graphs.values()
    for seed in (2, 3):
        model.load_state_dict(small(seed=seed).state_dict())
        assert_close(answer(model, x), model, x)
    (same,) = runner_of(model)._graphs.values()
    assert same is entry


@pytest.mark.fault(35)
def test_changed_weights_while_another_stream_is_still_computing(model):
    x, stream = images(8, 64), torch.cuda.Stream()
    warm(model, x)
    expected = answer(model, x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        outs = [answer(model, x) for _ in range(20)]
    model.load_state_dict(small(seed=4).state_dict())
    changed = answer(model, x)
    torch.cuda.synchronize()
    for out in outs:
        torch.testing.assert_close(out, expected)
    assert_close(changed, model, x)


@pytest.mark.fault(35)
def test_structure_may_change_behind_a_graph(model):
    x = images()
    warm(model, x)
    model.fc = torch.nn.Linear(16, 3).to(CUDA).eval()
    model.layer1[0].conv1.stride = (2, 2)
    model.layer1[0].downsample = torch.nn.MaxPool2d(2).eval()
    for _ in range(3):
        assert_close(answer(model, x), model, x)


def test_modes_of_inference_in_turn(model):
    x = images()
    for _ in range(3):
        with torch.inference_mode():
            out = model(x)
        assert out.is_inference()
        out = answer(model, x)
        assert not out.is_inference()
        assert_close(out, model, x)
    model.train()
    model(x).sum().backward()
    model.eval()
    for _ in range(3):
        assert_close(answer(model, x), model, x)


@pytest.mark.fault(1)
def test_empty_batches_and_wrong_inputs_between_replays(model):
    x = images()
    warm(model, x)
    assert answer(model, x[:0]).shape == (0, 5)
    for wrong in (x[:, :2], x.double(), x[0]):
        with pytest.raises((ValueError, TypeError)):
            answer(model, wrong)
    assert_close(answer(model, x), model, x)


def test_fast_models_are_captured_too():
    source, x = small().to(CUDA), images()
    fast = fastres.optimize(source, example_input=x)
    outs = [fast(x) for _ in range(3)]
    (runner,) = fast._runners.values()
    assert (2, 3, 32, 32) in runner.shapes
    for out in outs:
        assert_close(out, source, x)


def test_warmup_captures(model):
    assert model.warmup([(2, 3, 32, 32), (1, 3, 48, 48)]) is model
    assert set(runner_of(model).shapes) == {(2, 3, 32, 32), (1, 3, 48, 48)}
    assert_close(answer(model, images()), model, images())


@pytest.mark.fault(89)
@pytest.mark.skipif(not _has_triton(), reason="needs triton")
def test_kernels_are_measured_before_a_capture_and_not_again(monkeypatch, tmp_path):
    tuned = tmp_path / "tuned.json"
    monkeypatch.setenv("FASTRES_TUNED", str(tuned))
    monkeypatch.setenv("FASTRES_TUNE", "60")
    model, x = small(backend="auto").to(CUDA), images()
    warm(model, x, x)
    convolutions = [
        why
        for step, why in zip(model.plan().steps, model.plan().reasons, strict=True)
        if isinstance(step.op, Conv2d)
    ]
    assert all(why.startswith(("measured here", "as above")) for why in convolutions)
    with torch.no_grad():
        assert_close(model(x), model, x)
    found = tuned.read_bytes()
    warm(small(backend="auto", seed=1).to(CUDA), x, x)
    assert tuned.read_bytes() == found
