"""Every guard of the dispatcher: the engine runs only where nobody could tell, and then it does."""

import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from fused import assert_close, assert_fused, assert_plain, executions, images, plain, small
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fastres import ResNet
from fastres.runtime import live


class Subclass(Tensor):
    """Any tensor subclass."""


class Negating(TorchFunctionMode):
    """Changes what one function means."""

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return -out if func is F.linear else out


class Doubled(ResNet):
    """Overrides the public method and calls the base's."""

    def forward(self, x):
        return 2 * super().forward(x)


class Halved(ResNet):
    """Overrides what the base calls."""

    def _forward_impl(self, x):
        return super()._forward_impl(x) / 2


def used(**kwargs) -> ResNet:
    """A model whose engine has run."""
    model = small(**kwargs)
    assert_fused(model, images())
    return model


def test_inference_is_fused():
    model, x = small(), images()
    assert_fused(model, x)
    with executions() as ran, torch.inference_mode():
        out = model(x)
    assert len(ran) == 1
    assert out.is_inference()
    assert not ran[0].fallbacks


def test_without_parameters_that_want_gradients_no_context_is_needed():
    model, x = small().requires_grad_(False), images()
    with executions() as ran:
        out = model(x)
    assert len(ran) == 1
    assert not out.requires_grad


def test_dispatch_mode_sees_every_operation():
    model, x = used(), images()
    with FlopCounterMode(display=False) as ours, torch.no_grad():
        model(x)
    with FlopCounterMode(display=False) as theirs:
        plain(model, x)
    assert ours.get_total_flops() == theirs.get_total_flops() > 0
    assert_fused(model, x)


def test_function_mode_sees_every_function():
    model, x = used(), images()
    with executions() as ran, Negating(), torch.no_grad():
        out = model(x)
    assert not ran
    assert torch.equal(out, -plain(model, x))
    assert_fused(model, x)


def test_default_device_as_a_context_is_no_obstacle():
    model, x = used(), images()
    with torch.device("cpu"):
        assert_fused(model, x)


def test_functorch_transforms():
    model, x = used(), images(4)
    params = dict(model.named_parameters())
    with executions() as ran:
        batched = vmap(model)(x.unsqueeze(1))[:, 0]
        loss = lambda p: functional_call(model, p, (x,)).square().sum()  # noqa: E731
        gradient = grad(loss)(params)["conv1.weight"]
        _, tangent = jvp(lambda v: model(v), (x,), (x,))
    assert not ran
    torch.testing.assert_close(batched, model._forward_impl(x))
    model._forward_impl(x).square().sum().backward()
    torch.testing.assert_close(gradient, model.conv1.weight.grad)
    assert tangent.abs().max() > 0
    assert_fused(model, x)


def test_forward_mode_differentiation():
    model, x = used(), images()
    with executions() as ran, forward_ad.dual_level(), torch.no_grad():
        out = forward_ad.unpack_dual(model(forward_ad.make_dual(x, x)))
    assert not ran
    assert out.tangent is not None
    assert_fused(model, x)


def test_replicas_of_data_parallel():
    model, x = used(), images()
    replica = model._replicate_for_data_parallel()
    for name, child in model.named_children():
        setattr(replica, name, child)
    with executions() as ran, torch.no_grad():
        out = replica(x)
    assert not ran
    assert torch.equal(out, plain(model, x))
    assert_fused(model, x)


def test_tensor_subclasses():
    model, x = used(), images()
    assert_plain(model, x.as_subclass(Subclass))
    assert_plain(model, nn.Parameter(x))
    weight = model.fc.weight
    model.fc.weight = nn.Parameter(weight.detach().as_subclass(Subclass), requires_grad=False)
    assert_plain(model, x)
    model.fc.weight = weight
    assert_fused(model, x)
    fresh = small()
    fresh.fc.weight = nn.Parameter(weight.detach().as_subclass(Subclass), requires_grad=False)
    assert_plain(fresh, x)


@pytest.mark.fault(34)
@pytest.mark.parametrize("start", [small, used])
def test_parametrized_weights(start):
    model, x = start(), images()
    parametrizations.weight_norm(model.layer1[0].conv1)
    with torch.no_grad():
        model.layer1[0].conv1.parametrizations.weight.original0.mul_(3)
    assert_plain(model, x)
    nn.utils.parametrize.remove_parametrizations(model.layer1[0].conv1, "weight")
    assert_fused(model, x)


@pytest.mark.fault(34)
@pytest.mark.parametrize("start", [small, used])
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "pruned", "weight_norm"]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_hooks_of_submodules(start, register):
    model, x = start(), images()
    before = plain(model, x)
    layer = model.layer1[0].conv1
    if register == "pruned":
        prune.l1_unstructured(layer, "weight", 0.5)
    elif register == "weight_norm":
        nn.utils.weight_norm(layer)
        layer.weight_g.data.mul_(3)
    elif register == "register_forward_hook":
        handle = layer.register_forward_hook(lambda module, args, out: 2 * out)
    else:
        handle = layer.register_forward_pre_hook(lambda module, args: 2 * args[0])
    assert_plain(model, x)
    assert not torch.allclose(plain(model, x), before)
    if register == "pruned":
        prune.remove(layer, "weight")
    elif register == "weight_norm":
        nn.utils.remove_weight_norm(layer)
    else:
        handle.remove()
    assert_fused(model, x)


def test_global_hooks():
    model, x = used(), images()
    seen = []
    handle = nn_module.register_module_forward_hook(lambda m, args, out: seen.append(m))
    try:
        assert_plain(model, x)
    finally:
        handle.remove()
    assert model.layer1[0].bn2 in seen
    assert_fused(model, x)


def test_hooks_of_the_root_run_around_the_engine():
    model, x = used(), images()
    model.register_forward_hook(lambda module, args, out: -out)
    with executions() as ran, torch.no_grad():
        out = model(x)
    assert len(ran) == 1
    assert_close(-out, model, x)


@pytest.mark.fault(31)
@pytest.mark.parametrize("path", ["bn1", "layer2.0.downsample.1", "layer1"])
def test_training_submodules(path):
    model, x = used(), images()
    child = model.get_submodule(path).train()
    with executions() as ran, torch.no_grad():
        model(x)
    assert not ran
    child.eval()
    assert_fused(model, x)


def test_gradients_are_pytorchs_and_said_once(monkeypatch):
    monkeypatch.setattr(live, "_said", set())
    model, x = used(), images()
    with executions() as ran, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            out = model(x)
        small()(images().requires_grad_())
    assert not ran
    (warning,) = caught
    assert "wrap the call in torch.inference_mode()" in str(warning.message)
    out.sum().backward()
    gradient = model.conv1.weight.grad.clone()
    model.zero_grad()
    model._forward_impl(x).sum().backward()
    assert torch.equal(gradient, model.conv1.weight.grad)


def test_gradient_of_the_input_alone(monkeypatch):
    monkeypatch.setattr(live, "_said", {"gradient"})
    model, x = used().requires_grad_(False), images().requires_grad_()
    with executions() as ran:
        model(x).sum().backward()
    assert not ran
    assert x.grad.abs().max() > 0


def test_an_overridden_forward_wraps_the_engine():
    model, x = small(Doubled), images()
    with executions() as ran, torch.no_grad():
        out = model(x)
    assert len(ran) == 1
    assert_close(out / 2, model, x)


def test_an_overridden_implementation_is_fused():
    assert_fused(small(Halved), images())


@pytest.mark.parametrize("start", [small, used])
def test_an_implementation_replaced_on_the_instance(start):
    model, x = start(), images()
    model._forward_impl = types.MethodType(lambda self, x: 3 * ResNet._forward_impl(self, x), model)
    assert_plain(model, x)
    del model._forward_impl
    assert_fused(model, x)


def test_a_forward_replaced_on_the_instance_wraps_the_engine():
    model, x = small(), images()
    forward = model.forward
    model.forward = lambda x: 2 * forward(x)
    with executions() as ran, torch.no_grad():
        out = model(x)
    assert len(ran) == 1
    assert_close(out / 2, model, x)
