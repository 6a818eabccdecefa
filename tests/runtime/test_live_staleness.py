"""However weights or structure change after a fused call, the next one uses what is there now."""

import copy

import pytest
import torch
from fused import assert_close, assert_fused, executions, images, plain, small
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

from fastres import BasicBlock, ResNet
from fastres.models import resnet


def used(cls=ResNet, **kwargs) -> ResNet:
    """A model whose engine has run."""
    model = small(cls, **kwargs)
    assert_fused(model, images())
    return model


def steps_with(make):
    """Train a few steps with an optimizer, in eval mode so that statistics stay."""

    def change(model):
        optimizer = make(model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            model._forward_impl(images()).square().mean().backward()
            optimizer.step()

    return change


def fused_adamw(model):
    """The fused kernel leaves ``_version`` alone; asserted, or the case would prove nothing."""
    version = model.conv1.weight._version
    steps_with(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True))(model)
    assert model.conv1.weight._version == version


def train_one_step(model):
    """Statistics move as well."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    model(images()).square().mean().backward()
    optimizer.step()
    model.eval()


def forward_in_training_mode(model):
    model.train()
    with torch.no_grad():
        model(images())
    model.eval()


def train_one_norm(model):
    """Only a child trains, through the model's own forward."""
    model.layer1[0].bn1.train()
    with torch.no_grad():
        model(images())
    model.layer1[0].bn1.eval()


def train_one_norm_alone(model):
    """Only a child trains, and the root is not called meanwhile."""
    norm = model.layer1[0].bn1.train()
    norm(torch.randn(4, 8, 3, 3) + 2)
    norm.eval()


def other_state(model, factor=1.5):
    return {k: v * factor if v.is_floating_point() else v for k, v in model.state_dict().items()}


def exponential_average(model):
    source = small(seed=3)
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.module = model
    average.update_parameters(source)
    average.n_averaged += 1
    average.update_parameters(source)


def hand_written_average(model):
    with torch.no_grad():
        for own, other in zip(model.parameters(), small(seed=3).parameters(), strict=True):
            own.copy_(0.9 * own + 0.1 * other)


def swap(model):
    other = torch.nn.Parameter(2 * model.layer1[0].conv2.weight.detach())
    torch.utils.swap_tensors(model.layer1[0].conv2.weight, other)


def data_twice(model):
    """The second tensor may get the first one's address: both are freed in between."""
    weight = model.fc.weight
    for factor in (2.0, 3.0):
        weight.data = weight.data * factor
    del weight


CHANGES = {
    "fused AdamW": fused_adamw,
    "foreach SGD": steps_with(lambda p: torch.optim.SGD(p, lr=0.1, foreach=True)),
    "plain Adam": steps_with(lambda p: torch.optim.Adam(p, lr=0.1, foreach=False)),
    "one step of training": train_one_step,
    "forward in training mode": forward_in_training_mode,
    "forward with one norm in training": train_one_norm,
    "one norm trained by itself": train_one_norm_alone,
    "load_state_dict": lambda m: m.load_state_dict(other_state(m)),
    "load_state_dict(assign=True)": lambda m: m.load_state_dict(other_state(m), assign=True),
    "in place under no_grad": torch.no_grad()(lambda m: m.conv1.weight.mul_(2)),
    "one element": torch.no_grad()(lambda m: m.fc.bias[2].add_(1)),
    "statistics in place": lambda m: m.layer2[0].bn1.running_var.mul_(3),
    "reset_running_stats": lambda m: m.layer2[0].bn2.reset_running_stats(),
    "reset_parameters": lambda m: m.fc.reset_parameters(),
    "p.data = once": lambda m: setattr(m.fc.weight, "data", 2 * m.fc.weight.data),
    "p.data = twice": data_twice,
    "swap_tensors": swap,
    "a new Parameter": lambda m: setattr(m.conv1, "weight", nn.Parameter(2 * m.conv1.weight)),
    "a new buffer": lambda m: setattr(m.bn1, "running_mean", 1 + m.bn1.running_mean),
    "eps": lambda m: setattr(m.layer1[0].bn2, "eps", 5.0),
    "exponential average": exponential_average,
    "hand-written average": hand_written_average,
    "a new fc": lambda m: setattr(m, "fc", nn.Linear(16, 3).eval()),
    "a new conv1": lambda m: setattr(m, "conv1", nn.Conv2d(3, 8, 5, padding=2).eval()),
    "a new stage": lambda m: setattr(
        m, "layer2", nn.Sequential(BasicBlock(8, 16, downsample=nn.Conv2d(8, 16, 1))).eval()
    ),
    "a longer stage": lambda m: m.layer1.append(BasicBlock(8, 8).eval()),
    "a norm removed": lambda m: setattr(m.layer1[0], "bn2", nn.Identity().eval()),
    "a downsample added": lambda m: setattr(m.layer1[0], "downsample", nn.Conv2d(8, 8, 1).eval()),
    "a ReLU replaced": lambda m: setattr(m.layer1[0], "relu", nn.SiLU(inplace=True).eval()),
    "reset_classifier": lambda m: m.reset_classifier(7),
    "a stride": lambda m: setattr(m.conv1, "stride", (2, 2)),
    "padding and dilation": lambda m: (
        setattr(m.conv1, "padding", (2, 2)),
        setattr(m.conv1, "dilation", (2, 2)),
    ),
    "a pool's size": lambda m: (
        setattr(m.avgpool, "output_size", (2, 2)) or setattr(m, "fc", nn.Linear(64, 5).eval())
    ),
    "float64 and back": lambda m: m.double().float(),
    "delattr and a buffer instead": lambda m: _parameter_to_buffer(m.fc),
}


def _parameter_to_buffer(layer):
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", 2 * weight)


@pytest.mark.fault(35)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changed_weights_and_structure(change):
    model, x = used(), images()
    before = plain(model, x)
    with torch.enable_grad():
        change(model)
    assert_fused(model, x)
    after = plain(model, x)
    assert (
        after.shape != before.shape
        or not torch.allclose(after, before, atol=1e-3)
        or (change is CHANGES["float64 and back"])
    ), "the change does not show"
    assert_fused(model, x)


@pytest.mark.fault(35)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_dtype_conversions(dtype):
    model, x = used(), images()
    assert_fused(model.to(dtype), x.to(dtype))
    assert_fused(model.float(), x)


@pytest.mark.fault(35)
def test_half_precision_of_data_alone():
    """``p.data = p.data.half()`` keeps identity and version."""
    model, x = used(), images()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.bfloat16()
    assert_fused(model, x.bfloat16())


@pytest.mark.fault(35)
@pytest.mark.parametrize("write", ["data", "numpy"])
def test_refresh_after_changes_that_pytorch_cannot_see(write):
    model, x = used(), images()
    stale = plain(model, x)
    if write == "data":
        model.conv1.weight.data.mul_(3)
    else:
        weight = model.conv1.weight.detach().numpy()
        weight *= 3
    model.refresh()
    assert_fused(model, x)
    assert not torch.allclose(stale, plain(model, x), atol=1e-3)


@pytest.mark.fault(35)
def test_functional_call_uses_the_tensors_given():
    model, other, x = used(), small(seed=4), images()
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with executions() as ran, torch.no_grad():
        out = functional_call(model, state, (x,))
    assert len(ran) == 1
    assert len(norms) == 6
    assert_close(out, other, x)
    assert_fused(model, x)


@pytest.mark.fault(35)
def test_alternating_weights_are_never_mixed_up():
    model, x = used(), images()
    states = [copy.deepcopy(small(seed=seed).state_dict()) for seed in (1, 2)]
    for turn in range(4):
        model.load_state_dict(states[turn % 2])
        assert_fused(model, x)


@pytest.mark.fault(35)
def test_unchanged_weights_are_folded_once(monkeypatch):
    model, x = used(), images()
    folds = []
    refold = type(model._live()._runners.popitem()[1].executor).refold
    monkeypatch.setattr(
        "fastres.runtime.executor.Executor.refold", lambda self: folds.append(1) or refold(self)
    )
    for size in (16, 24, 16):
        assert_fused(model, images(size=size))
    assert_fused(model, x)
    assert len(folds) == 1


@pytest.mark.fault(35)
def test_a_users_plain_attribute_is_watched():
    class Scaled(ResNet):
        scale = 1.0

        def _forward_impl(self, x):
            return self.scale * super()._forward_impl(x)

    model = small(Scaled)
    model.scale = 2.0
    assert_fused(model, images())
    model.scale = 3.0
    assert_fused(model, images())
    shortcut = used(shortcut="A").layer2[0].downsample
    assert isinstance(shortcut, resnet.ZeroPadShortcut)


@pytest.mark.fault(35)
def test_a_shortcuts_attributes_are_watched():
    model = used(shortcut="A")
    shortcut = model.layer2[0].downsample
    shortcut.before, shortcut.after = 0, 8
    assert_fused(model, images())


@pytest.mark.fault(35)
def test_methods_patched_on_a_class_are_watched(monkeypatch):
    model = used()
    forward = BasicBlock.forward
    monkeypatch.setattr(BasicBlock, "forward", lambda self, x: 2 * forward(self, x))
    assert_fused(model, images())
    monkeypatch.undo()
    assert_fused(model, images())
