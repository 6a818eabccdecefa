"""The ten networks on photographs: float32 against float64, bfloat16 step by step on the CPU."""

import copy

import pytest
import torch
from fused import executions, plain, rms
from helpers import adversarial_, real_images
from tolerance import allowed_error

import fastres
from fastres.graph import fold
from fastres.runtime.verify_steps import verify_steps

# Steps: convolutions and the classifier.
CASES = {
    "resnet18": 21,
    "resnet34": 37,
    "resnet50": 54,
    "resnet101": 105,
    "resnet152": 156,
    "resnext50_32x4d": 54,
    "resnext101_32x8d": 39,
    "resnext101_64x4d": 39,
    "wide_resnet50_2": 39,
    "wide_resnet101_2": 39,
}
WIDE = {"resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"}
"""With two blocks of the wide stages, which differ in their numbers alone: all take over 2 GB."""


def network(name, seed=0):
    """With adversarial weights, without the seconds that initial values take."""
    with torch.device("meta"):
        model = getattr(fastres, name)()
    if name in WIDE:
        model.layer3, model.layer4 = model.layer3[:2], model.layer4[:2]
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.zero_()
    return adversarial_(model, seed)


def in_float64(model, x):
    """The plain model's answer; weights are widened layer by layer, since all take gigabytes."""

    def widen(layer, inputs):
        layer.double()

    def narrow(layer, inputs, output):
        layer.float()

    wide = copy.deepcopy(model)
    for layer in wide.modules():
        if not list(layer.children()):
            layer.register_forward_pre_hook(widen)
            layer.register_forward_hook(narrow)
    with torch.no_grad():
        return plain(wide, x.double())


def judge_float32(model, x):
    """At most twice the RMS error of PyTorch's own float32, whichever layout it runs in.

    oneDNN's channels_last is up to twice less exact than its NCHW for small images, more exact for
    others. One unit in the last place on top is a third of those errors; a wrong eps or a
    forgotten mean misses by hundreds of times.
    """
    exact = in_float64(model, x)
    layouts = (torch.contiguous_format, torch.channels_last)
    errors = [rms(plain(model, x.contiguous(memory_format=f)) - exact) for f in layouts]
    with executions() as ran, torch.inference_mode():
        out = model(x)
    assert len(ran) == 1
    assert not ran[0].fallbacks
    assert rms(out - exact) <= allowed_error(max(errors), rms(exact), torch.float32, ulps=1)
    assert torch.equal(out.argmax(1), exact.argmax(1))


def judge_bfloat16(model, x, steps):
    """Each step on its own inputs: a whole network's bfloat16 hides a dropped bias."""
    fast = fastres.optimize(model, dtype=torch.bfloat16, verify=False)
    found = verify_steps(fast.executor(), model, [x.bfloat16()])
    assert len(found) == steps
    assert [error for error in found if not error.ok] == []
    out = fast(x)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


@pytest.mark.slow
@pytest.mark.sample(3)
@pytest.mark.fault(41)
@pytest.mark.parametrize(("name", "steps"), CASES.items())
def test_adversarial_weights_and_real_images(name, steps):
    x = real_images(1, 64)
    model = network(name)
    judge_float32(model, x)
    model._live().free()
    judge_bfloat16(model, x, steps)


@pytest.mark.fault(41)
def test_other_weights():
    for seed in range(1, 4):
        judge_float32(network("resnet18", seed), real_images(2, 64))


@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_cifar_networks(name, shortcut):
    model = adversarial_(fastres.create_model(name, shortcut=shortcut), 3)
    x = real_images(4, 32)
    with executions() as ran, torch.inference_mode():
        out = model(x)
    assert len(ran) == 1
    exact = plain(copy.deepcopy(model).double(), x.double())
    assert rms(out - exact) <= 2 * rms(plain(model, x) - exact) + 1.2e-7 * rms(exact)


def test_live_bfloat16_and_autocast():
    """``.bfloat16()`` folds rounded parameters, autocast the float32 ones: both judged by steps."""
    x = real_images(2, 64)
    rounded = network("resnet18").bfloat16()
    with torch.inference_mode():
        rounded(x.bfloat16())
    (runner,) = rounded._live()._runners.values()
    found = verify_steps(runner.executor, rounded, [x.bfloat16()])
    assert len(found) == 21
    assert all(error.ok for error in found)
    model = network("resnet18")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    (runner,) = model._live()._runners.values()
    assert all(e.ok for e in verify_steps(runner.executor, model, [x.bfloat16()]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bug", ["eps", "mean", "beta", "gamma", "bias twice", "residual first"])
def test_the_judges_see_each_bug(monkeypatch, bug, dtype):
    """The mutation suite of the fold, against both judges, which pass the network without it."""
    model = adversarial_(fastres.ResNet(fastres.BasicBlock, [1, 1, 1, 1], planes=16))
    x = real_images(1, 64)
    judged = judge_float32 if dtype is torch.float32 else lambda m, x: judge_bfloat16(m, x, 13)
    judged(model, x)
    model._live().free()
    _inject(monkeypatch, bug)
    with pytest.raises(AssertionError):
        judged(model, x)


def _inject(monkeypatch, bug):
    affine, conv = fold._affine, fold.folded_conv

    def wrong(norm, lookup, channels, device):
        changed = {
            "eps": {"eps": norm.eps * 1.5},
            "gamma": {"weight": None},
            "beta": {"bias": None},
        }
        norm = copy.copy(norm)
        for field, value in changed.get(bug, {}).items():
            object.__setattr__(norm, field, value)
        scale, shift = affine(norm, lookup, channels, device)
        if bug == "mean":
            shift = shift + lookup(norm.mean).double() * scale
        return scale, shift

    def twice(op, lookup, dtype):
        weight, bias = conv(op, lookup, dtype)
        return weight, 2 * bias

    if bug == "bias twice":
        monkeypatch.setattr(fold, "folded_conv", twice)
    elif bug == "residual first":
        monkeypatch.setattr("fastres.backends.select.OneDNNOps.conv", _relu_before_add)
        monkeypatch.setattr("fastres.backends.select.AtenOps.conv", _relu_before_add)
    else:
        monkeypatch.setattr(fold, "_affine", wrong)


def _relu_before_add(self, op, prepared, x, residual=None, in_place=False):
    weight, bias = getattr(prepared, "dense", None), getattr(prepared, "bias", None)
    if weight is None:
        weight, bias = prepared
    y = torch.conv2d(x, weight, bias, op.stride, op.padding, op.dilation, op.groups)
    y = y.relu() if op.relu else y
    return y if residual is None else y + residual
