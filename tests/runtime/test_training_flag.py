"""Which modules in training mode keep a network from being fused: those whose forward heeds it."""

import copy
import functools
from types import ModuleType

import pytest
import torch
from fused import assert_close, assert_fused, assert_plain, images, small
from torch import nn
from torch.ao.nn import intrinsic

import fastres
from fastres.runtime.guards import heeds_training


class Scale(nn.Module):
    """A forward that does not read the flag."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        """Not in training alone: the word in a text says nothing about the flag."""
        return x * self.factor


class Doubled(Scale):
    def forward(self, x):
        return 2 * super().forward(x)


class Heeding(nn.Module):
    def forward(self, x):
        return x + 1 if self.training else x


class Inherited(Heeding):
    def forward(self, x):
        return 2 * super().forward(x)


class ByMethod(nn.Module):
    def forward(self, x):
        return self.scaled(x)

    def scaled(self, x):
        return x * self.factor

    @property
    def factor(self):
        return 2 if self.training else 1


def shifted(module, x):
    return x + int(module.training)


class ByFunction(nn.Module):
    def forward(self, x):
        return shifted(self, x)


USERS = ModuleType("users")
USERS.moved = lambda module, x: shifted(module, x)


class InModule(nn.Module):
    def forward(self, x):
        return USERS.moved(self, x)


def logged(forward):
    @functools.wraps(forward)
    def call(self, x):
        return forward(self, x)

    return call


class Decorated(nn.Module):
    @logged
    def forward(self, x):
        return x + int(self.training)


class ByText(nn.Module):
    def forward(self, x):
        return x + int(getattr(self, "training", False))


class Nested(nn.Module):
    def forward(self, x):
        return (lambda y: y + int(self.training))(x)


def own_forward():
    module = nn.ReLU()
    module.forward = lambda x: x + int(module.training)
    return module


LAYERS = {
    "linear": lambda: nn.Linear(16, 7),
    "two linears": lambda: nn.Sequential(nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 4)),
    "a container of containers": lambda: nn.Sequential(nn.Sequential(nn.Linear(16, 3))),
    "an own module": lambda: nn.Sequential(nn.Linear(16, 7), Scale()),
    "a subclass of it": lambda: nn.Sequential(nn.Linear(16, 7), Doubled()),
    "identity": nn.Identity,
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 2)),
    "dropout that was switched off": lambda: nn.Sequential(nn.Dropout().eval(), nn.Linear(16, 2)),
}
PLACES = {
    "conv1": lambda m: setattr(m, "conv1", nn.Conv2d(3, 8, 5, padding=2)),
    "activation": lambda m: setattr(m.layer1[0], "relu", nn.SiLU()),
    "norm": lambda m: setattr(m.layer1[0], "bn2", nn.Identity()),
    "group norm": lambda m: setattr(m, "bn1", nn.GroupNorm(2, 8)),
    "instance norm": lambda m: setattr(m, "bn1", nn.InstanceNorm2d(8)),
    "downsample": lambda m: setattr(m.layer1[0], "downsample", nn.Conv2d(8, 8, 1)),
    "pool": lambda m: setattr(m, "avgpool", nn.AdaptiveAvgPool2d(1)),
    "stage": lambda m: setattr(m, "layer1", nn.Sequential(*m.layer1)),
    "stage with more": lambda m: m.layer1.append(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())),
}


@pytest.mark.fault(80)
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_a_new_classifier_in_training_mode_is_fused(make, used):
    model, x = small(), images()
    if used:
        assert_fused(model, x)
    model.fc = make()
    assert model.fc.training
    assert_fused(model, x)


@pytest.mark.fault(80)
@pytest.mark.parametrize("change", PLACES.values(), ids=PLACES.keys())
def test_other_new_layers_are_fused(change):
    model, x = small(), images()
    assert_fused(model, x)
    change(model)
    assert any(m.training for m in model.modules())
    assert_fused(model, x)
    fast = fastres.optimize(model, example_input=x)
    assert_close(fast(x), copy.deepcopy(model).eval(), x)


@pytest.mark.fault(80)
def test_the_smallest_input():
    model, x = fastres.resnet18().eval(), images(1, 32)
    model.fc = nn.Linear(512, 3)
    assert_fused(model, x)


HEEDING = (
    *(nn.Dropout, nn.RReLU, Heeding, Inherited, ByMethod, ByFunction, InModule, Decorated),
    *(ByText, Nested, own_forward),
)


@pytest.mark.fault(80)
@pytest.mark.parametrize("make", HEEDING)
def test_layers_that_heed_the_flag_run_as_pytorch(make):
    model, x = small(), images()
    assert_fused(model, x)
    model.fc = nn.Sequential(nn.Linear(16, 5), make())
    assert model.fc[1].training
    with torch.no_grad():
        torch.manual_seed(1)
        out = model(x)
        torch.manual_seed(1)
        assert torch.equal(out, model._forward_impl(x))
    if make is not own_forward:
        with pytest.raises(ValueError, match=r"fc\.1 is in training mode"):
            fastres.optimize(model)
        assert_fused(model.eval(), x)


@pytest.mark.fault(80)
def test_a_norm_or_the_root_in_training_runs_as_pytorch():
    for change in (lambda m: m.layer1[0].bn1.train(), lambda m: m.layer1.train()):
        model, x = small(), images()
        change(model)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            assert torch.equal(model(x), twin._forward_impl(x))
    model = small()
    model.training = True
    assert_plain(model, x)


@pytest.mark.fault(80)
@pytest.mark.parametrize(
    ("module", "heeds"),
    [
        (nn.BatchNorm2d(2), True),
        (nn.SyncBatchNorm(2), True),
        (nn.InstanceNorm2d(2), False),
        (nn.InstanceNorm2d(2, track_running_stats=True), True),
        (nn.MultiheadAttention(2, 1), True),
        (nn.GroupNorm(1, 2), False),
        (nn.ModuleList(), False),
        (nn.Module(), False),
        (intrinsic.ConvReLU2d(nn.Conv2d(1, 1, 1), nn.ReLU()), False),
        (torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))), False),
        (Scale(), False),
        (Heeding(), True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_what_heeds_the_flag(module, heeds):
    assert heeds_training(module) is heeds


@pytest.mark.fault(80)
def test_a_source_whose_flag_means_nothing_is_taken_as_it_is():
    source, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Scale()), images()
    fast = fastres.optimize(source, example_input=x)
    assert source.training
    assert_close(fast(x), source, x)
    with pytest.raises(ValueError, match="the model is in training mode"):
        fastres.optimize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
