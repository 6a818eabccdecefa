"""What may be fused and what has changed, one condition at a time."""

import threading

import pytest
import torch
from fused import small
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.runtime import guards
from fastres.runtime.guards import Change, WeightGuard


class Kind(Tensor):
    """Any subclass."""


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_a_plain_call_may_be_fused():
    x = torch.randn(2)
    assert guards.ambient_reason(x) is None
    with torch.inference_mode():
        assert guards.ambient_reason(x) is None
    with torch.no_grad():
        assert guards.ambient_reason(x.requires_grad_()) is None
    with torch.device("cpu"), torch.autocast("cpu", torch.bfloat16):
        assert guards.ambient_reason(x.detach()) is None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "not a plain tensor"),
        ([1.0], "not a plain tensor"),
        (nn.Parameter(torch.zeros(1)), "not a plain tensor"),
        (torch.zeros(1).as_subclass(Kind), "not a plain tensor"),
        (torch.zeros(1, device="meta"), "the input is on meta"),
        (torch.zeros(1, requires_grad=True), "a gradient is wanted"),
    ],
)
def test_inputs(value, reason):
    assert reason in guards.ambient_reason(value)


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        (Dispatch, "dispatch or function mode"),
        (Function, "dispatch or function mode"),
        (forward_ad.dual_level, "forward-mode"),
        (guards.unfused, "ordinary PyTorch was asked for"),
    ],
)
def test_modes(mode, reason):
    x = torch.randn(2)
    with mode():
        assert reason in guards.ambient_reason(x)
    assert guards.ambient_reason(x) is None


def test_transforms_and_tracers():
    seen = []

    def look(x):
        seen.append(guards.ambient_reason(x))
        return x * 1

    torch.func.vmap(look)(torch.randn(3))
    torch.func.jvp(look, (torch.randn(3),), (torch.randn(3),))
    assert all("plain tensor" in r or "functorch" in r for r in seen)
    plain = torch.randn(3)
    torch.func.vmap(lambda x: look(plain) + x)(torch.randn(3))
    assert "functorch" in seen[-1]
    torch.jit.trace(look, torch.randn(3), check_trace=False)
    assert "compiled or traced" in seen[-1]


@pytest.mark.parametrize(
    "register",
    [
        nn_module.register_module_forward_hook,
        nn_module.register_module_forward_pre_hook,
        nn_module.register_module_full_backward_hook,
    ],
)
def test_global_hooks(register):
    handle = register(lambda *args: None)
    try:
        assert "global" in guards.ambient_reason(torch.randn(2))
    finally:
        handle.remove()
    assert guards.ambient_reason(torch.randn(2)) is None


def test_unfused_is_for_this_thread_and_nests():
    x, seen = torch.randn(2), []
    with guards.unfused():
        with guards.unfused():
            pass
        assert guards.ambient_reason(x) is not None
        thread = threading.Thread(target=lambda: seen.append(guards.ambient_reason(x)))
        thread.start()
        thread.join()
    assert seen == [None]


def guarded(model=None):
    model = model or small()
    paths = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return model, WeightGuard(model, paths, "_forward_impl")


@pytest.mark.fault(35)
def test_nothing_changed():
    model, guard = guarded()
    assert guard.check() is Change.NONE
    with torch.no_grad():
        model._forward_impl(torch.randn(1, 3, 8, 8))
    model.train().eval()
    model.zero_grad()
    model.state_dict()
    assert guard.check() is Change.NONE
    assert guard.reason() is None


WEIGHTS = {
    "version": lambda m: m.bn1.running_mean.add_(0),
    "identity": lambda m: setattr(m.fc, "bias", nn.Parameter(m.fc.bias.detach())),
    "address": lambda m: setattr(m.fc.bias, "data", m.fc.bias.detach().clone()),
    "dtype": lambda m: setattr(m.fc.bias, "data", m.fc.bias.detach().half()),
    "counter": lambda m: m.layer1[0].bn2.num_batches_tracked.add_(1),
    "deleted": lambda m: m.fc.register_parameter("bias", None),
    "optimizer step": lambda m: torch.optim.SGD([m.fc.bias]).step(),
}


@pytest.mark.fault(35)
@pytest.mark.parametrize("change", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_weights(change):
    model, guard = guarded()
    change(model)
    assert guard.check() is Change.WEIGHTS


class Other(nn.ReLU):
    """Same attributes, another forward."""

    def forward(self, x):
        return -super().forward(x)


STRUCTURE = {
    "another child": lambda m: setattr(m, "fc", nn.Linear(16, 5)),
    "one more child": lambda m: m.layer1.append(nn.Identity()),
    "no child": lambda m: m.layer1.__delitem__(0),
    "None": lambda m: setattr(m.layer2[0], "downsample", None),
    "stride": lambda m: setattr(m.conv1, "stride", (2, 2)),
    "groups": lambda m: setattr(m.conv1, "groups", 8),
    "padding mode": lambda m: setattr(m.conv1, "padding_mode", "circular"),
    "eps": lambda m: setattr(m.bn1, "eps", 1.0),
    "statistics": lambda m: setattr(m.bn1, "track_running_stats", False),
    "pool": lambda m: setattr(m.avgpool, "output_size", 2),
    "another class": lambda m: setattr(m.relu, "__class__", Other),
    "forward": lambda m: setattr(m.relu, "forward", lambda x: x),
    "implementation": lambda m: setattr(m, "_forward_impl", lambda x: x),
    "an own attribute": lambda m: setattr(m.layer1[0], "stride", 7),
    "a deleted attribute": lambda m: delattr(m.layer1[0], "stride"),
    "parametrization": lambda m: nn.utils.parametrizations.weight_norm(m.fc),
}


@pytest.mark.fault(35)
@pytest.mark.parametrize("change", STRUCTURE.values(), ids=STRUCTURE.keys())
def test_structure(change):
    model, guard = guarded()
    change(model)
    assert guard.check() is Change.STRUCTURE


def test_busy_modules():
    model, guard = guarded()
    model.layer1[0].bn1.train()
    assert guard.reason() == "a submodule is in training mode"
    model.eval()
    handle = model.fc.register_forward_hook(lambda *args: None)
    assert guard.reason() == "a submodule has forward hooks"
    handle.remove()
    model.register_forward_hook(lambda *args: None)
    assert guard.reason() is None
    assert guard.check() is Change.NONE


@pytest.mark.fault(35)
def test_watched_addresses_are_never_reused():
    """Many tensors of the same size come and go: none may take the watched one's place."""
    model, guard = guarded()
    for _ in range(50):
        model.fc.bias.data = model.fc.bias.detach().clone()
        assert guard.check() is Change.WEIGHTS
        guard = WeightGuard(model, ["fc.bias"], "_forward_impl")
        assert guard.check() is Change.NONE


def test_inference_tensors_are_watched_without_versions():
    with torch.inference_mode():
        model = small()
    model, guard = guarded(model)
    assert guard.check() is Change.NONE
    model.fc.bias = nn.Parameter(torch.zeros(5))
    assert guard.check() is Change.WEIGHTS


def test_what_cannot_be_watched():
    assert guards.pytorch_reason(small(), "_forward_impl") is None
    assert "training" in guards.pytorch_reason(small().train())
    model = small()
    model.fc.bias = nn.Parameter(torch.zeros(5).as_subclass(Kind))
    assert guards.pytorch_reason(model) == "fc.bias is a Kind"
    with torch.inference_mode():
        assert "inference tensor" in guards.pytorch_reason(small())
    replica = small()
    replica._is_replica = True
    assert "replica" in guards.pytorch_reason(replica)
