"""Memory, copies, threads and modes: the engine is never in the way of what modules can do."""

import gc
import pickle
import pickletools
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fused import assert_close, assert_fused, assert_plain, executions, images, plain, small
from helpers import copied
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastres import ResNet
from fastres.models import resnet


def used(**kwargs) -> ResNet:
    """A model whose engine has run."""
    model = small(**kwargs)
    assert_fused(model, images())
    return model


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(o, Tensor) for o in gc.get_objects())


def test_inference_mode_then_no_grad_then_training():
    model, x = small(), images()
    with torch.inference_mode():
        first = model(x)
    assert_fused(model, x)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(x).square().mean().backward()
    optimizer.step()
    model.eval()
    with torch.inference_mode():
        trained = model(x)
    assert_close(trained, model, x)
    assert not torch.allclose(first, trained, atol=1e-3)
    model.load_state_dict(small(seed=2).state_dict())
    assert_fused(model, x)


def test_weights_loaded_under_inference_mode():
    model, x = used(), images()
    with torch.inference_mode():
        model.load_state_dict(small(seed=2).state_dict())
        out = model(x)
    assert_close(out, model, x)
    assert_fused(model, x)


@pytest.mark.parametrize("arrival", ["built", "assigned", "data"])
def test_weights_without_version_counters_run_as_pytorch(arrival):
    x = images()
    if arrival == "built":
        with torch.inference_mode():
            model = small()
    else:
        model = used().requires_grad_(False)
        with torch.inference_mode():
            state = {k: v.clone() for k, v in small(seed=2).state_dict().items()}
            if arrival == "assigned":
                model.load_state_dict(state, assign=True)
            else:
                model.conv1.weight.data = state["conv1.weight"]
    if arrival != "data":
        assert model.conv1.weight.is_inference()
        assert_plain(model, x)
    with torch.no_grad():
        assert_close(model(x), model, x)


@pytest.mark.fault(26)
@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "torch.save"])
def test_copies_after_use(how):
    model, x = used(), images()
    with torch.no_grad():
        out = model(x)
    twin = copied(model, how)
    with torch.no_grad():
        assert torch.equal(twin(x), out)
    assert twin._live() is not model._live()
    twin.fc = nn.Linear(16, 3).eval()
    assert_fused(twin, x)
    assert_fused(model, x)


def test_copies_do_not_carry_the_engine():
    fresh, model = small(), used()
    assert pickled(model) == pickled(fresh)
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in fresh.named_modules()]


def pickled(model):
    """All names in a pickle, and the sizes of its tensors. Its length depends on what is shared."""
    arguments = [argument for _, argument, _ in pickletools.genops(pickle.dumps(model))]
    names = {value for value in arguments if isinstance(value, str) and not value.isdigit()}
    return names, [len(value) for value in arguments if isinstance(value, bytes)]


def test_the_engine_dies_with_the_model():
    model = used()
    alive = [weakref.ref(model), weakref.ref(model._live()), weakref.ref(model.conv1.weight)]
    del model
    gc.collect()
    assert [ref() for ref in alive] == [None, None, None]


def test_training_frees_the_engine():
    model = used()
    (runner,) = model._live()._runners.values()
    alive = [weakref.ref(runner), weakref.ref(runner.executor)]
    del runner
    model.train()
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert_fused(model.eval(), images())


def test_replaced_weights_are_let_go():
    model, x = used(), images()
    old = weakref.ref(model.fc.weight)
    model.fc = nn.Linear(16, 3).eval()
    assert_fused(model, x)
    gc.collect()
    assert old() is None


@pytest.mark.fault(21)
def test_many_runs_and_sizes_leave_nothing_behind():
    model = used()
    assert_fused(model, images(size=9))
    before = live_tensors()
    with torch.no_grad():
        for i in range(300):
            model(torch.randn(1 + i % 5, 3, 8 + i % 50, 9))
    assert live_tensors() == before
    (runner,) = model._live()._runners.values()
    assert len(runner.executor._schedules) <= 257


@pytest.mark.fault(18)
def test_the_same_call_gives_the_same_bits():
    model, x = used(), images(4)
    with torch.no_grad():
        first = model(x)
        assert all(torch.equal(model(x), first) for _ in range(100))


@pytest.mark.fault(18)
def test_images_do_not_see_each_other():
    model, x = used(), images(4)
    spoilt = x.clone()
    spoilt[1, 0, 3, 3] = float("nan")
    with torch.no_grad():
        clean, out = model(x), model(spoilt)
        alone = torch.cat([model(image[None]) for image in x])
        turned = model(x.flip(0)).flip(0)
    assert out[1].isnan().all()
    keep = [0, 2, 3]
    assert torch.equal(out[keep], clean[keep])
    assert_close(alone, model, x)
    assert_close(turned, model, x)


@pytest.mark.fault(23)
def test_two_models_do_not_mix():
    first, second, x = used(), used(seed=5), images()
    for _ in range(2):
        assert_fused(first, x)
        assert_fused(second, x)


@pytest.mark.fault(23)
def test_threads_share_a_model():
    """First calls, later calls and refolds at once."""
    model = small()
    inputs = [images(1 + i % 3, 16 + i) for i in range(8)]

    def call(x):
        with torch.inference_mode():
            return [model(x) for _ in range(4)]

    for seed in (1, 2):
        model.load_state_dict(small(seed=seed).state_dict())
        with executions() as ran, ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(call, inputs))
        assert len(ran) == 32
        for x, outs in zip(inputs, answers, strict=True):
            assert_close(outs[0], model, x)
            assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.fault(23)
def test_a_mode_of_another_thread_changes_nothing_here():
    """Building a plan enters one, while other threads call."""
    model, x = used(), images()
    with ThreadPoolExecutor(1) as pool, executions() as ran, FakeTensorMode(), torch.no_grad():
        out = pool.submit(torch.inference_mode()(model), x).result()
    assert len(ran) == 1
    assert_close(out, model, x)


def test_grad_mode_of_the_caller_is_left_alone():
    model, x = used(), images()
    with torch.no_grad():
        model(x)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    model.requires_grad_(False)
    model(x)
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match="channels"), torch.no_grad():
        model(x[:, :2])
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("bypass", ["children", "features", "getter"])
def test_calling_the_children_bypasses_the_engine(bypass):
    model, x = used(), images()
    if bypass == "children":
        children = list(model.children())
        around = nn.Sequential(*children[:-1], nn.Flatten(), children[-1])
        expected = plain(model, x)
    elif bypass == "getter":
        from torchvision.models._utils import IntermediateLayerGetter

        around = lambda x: getter(x)["out"]  # noqa: E731
        getter = IntermediateLayerGetter(model, {"layer2": "out"})
        expected = model.forward_features(x)
    else:
        around = model.forward_features
        expected = plain(
            nn.Sequential(model.conv1, model.bn1, model.relu, model.layer1, model.layer2), x
        )
    with executions() as ran, torch.no_grad():
        assert torch.equal(around(x), expected)
    assert not ran
    assert_fused(model, x)


def test_data_parallel_without_gpus():
    model, x = small(), images()
    with executions() as ran, torch.no_grad():
        out = nn.DataParallel(model)(x)
    if not torch.cuda.is_available():
        assert len(ran) == 1
    assert_close(out, model, x)


def test_the_plan_can_be_read_before_and_after_use():
    model = small()
    before = model.plan()
    assert_fused(model, images())
    after = model.plan()
    assert before.steps == after.steps
    assert not before.fallbacks
    assert after.kernels[0]
    with pytest.raises(RuntimeError, match="there is no fused plan: a submodule is in training"):
        model.train().plan()
    assert isinstance(model.layer1[0], resnet.BasicBlock)
