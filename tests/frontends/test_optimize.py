"""``optimize``: the source untouched, the copy right, verified, portable; wrong arguments named."""

import copy

import pytest
import torch
from fused import assert_close, executions, plain, rms, small
from helpers import adversarial_, copied, real_images
from torch import nn
from torch.func import functional_call

import fastres
from fastres.errors import VerificationError
from fastres.graph import fold


def torchvision_model(name):
    models = pytest.importorskip("torchvision").models
    kwargs = {"init_weights": False} if name == "googlenet" else {}
    model = getattr(models, name)(num_classes=7, **kwargs)
    if name == "resnext50_32x4d":  # its other blocks are alike, and take half a gigabyte
        model.layer3, model.layer4 = model.layer3[:2], model.layer4[:2]
    return adversarial_(model)


def snapshot(module):
    """Everything about a source that a copy could disturb."""
    return (
        {
            name: (id(t), t._version, t.clone())
            for name, t in module.state_dict(keep_vars=True).items()
        },
        {name: (m.training, id(m), m._forward_hooks) for name, m in module.named_modules()},
        {name: p.requires_grad for name, p in module.named_parameters()},
        [sorted(vars(m)) for m in module.modules()],
    )


def assert_unchanged(before, module):
    after = snapshot(module)
    for name, (identity, version, value) in before[0].items():
        assert after[0][name][:2] == (identity, version)
        assert torch.equal(after[0][name][2], value)
    assert after[1:] == before[1:]


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("resnet18", set()),
        ("resnext50_32x4d", set()),
        ("densenet121", {"cat", "batch norm"}),
        ("googlenet", {"cat"}),
        ("mobilenet_v2", {"ReLU6"}),
        ("regnet_y_400mf", {"Sigmoid", "mul"}),
    ],
)
def test_torchvision_models(name, left):
    source, x = torchvision_model(name), real_images(2, 64)
    before = snapshot(source)
    with executions() as ran:
        fast = fastres.optimize(source, example_input=x)
    assert len(ran) >= 1
    assert fast.verification.ok
    assert fast.verification.reference_rms > 0
    assert fast.verification.agreement == 1
    assert_unchanged(before, source)
    assert_close(fast(x), source, x)
    assert {
        reason.split(" ")[0] if "norm" not in reason else "batch norm"
        for _, reason in fast.plan().fallbacks
    } == left
    assert len(fast.plan().fused) > 20


def test_our_own_models():
    source, x = small(), real_images(2, 16)
    before = snapshot(source)
    fast = fastres.optimize(source, example_input=x)
    assert_unchanged(before, source)
    assert not fast.plan().fallbacks
    assert_close(fast(x), source, x)


def test_the_copy_is_frozen():
    source, x = small(), real_images(2, 16)
    fast = fastres.optimize(source, example_input=x)
    out = fast(x)
    with torch.no_grad():
        for tensor in (*source.parameters(), *source.buffers()):
            tensor.mul_(2)
        source.bn1.eps = 3.0
        source.fc = nn.Linear(16, 2)
    assert torch.equal(fast(x), out)
    assert all(not parameter.requires_grad for parameter in fast.parameters())


@pytest.mark.parametrize("source", ["torchvision", "ours"])
@pytest.mark.parametrize("when", ["example", "first call", "bfloat16"])
def test_verification_fails_and_goes_on_failing(monkeypatch, source, when):
    model = small() if source == "ours" else torchvision_model("resnet18")
    affine = fold._affine

    def without_mean(norm, lookup, channels, device):
        scale, shift = affine(norm, lookup, channels, device)
        return scale, shift + lookup(norm.mean).double() * scale

    monkeypatch.setattr("fastres.graph.fold._affine", without_mean)
    x = real_images(2, 32)
    if when == "example":
        with pytest.raises(VerificationError, match="ResNet and its fused copy differ: error .*"):
            fastres.optimize(model, example_input=x)
        return
    dtype = torch.bfloat16 if when == "bfloat16" else None
    fast = fastres.optimize(model, dtype=dtype)
    for _ in range(2):
        with pytest.raises(VerificationError, match="differ|is wrong"):
            fast(x)
        assert fast.verification is None
    assert fastres.optimize(model, verify=False)(x).shape == (2, model.fc.out_features)


def test_half_precision_is_verified_by_steps(monkeypatch):
    """A dropped bias of the classifier moves bfloat16 logits less than rounding does."""
    linear = fold.folded_linear

    def shifted(op, lookup, dtype):
        weight, bias = linear(op, lookup, dtype)
        return weight, bias * 1.02

    monkeypatch.setattr("fastres.graph.fold.folded_linear", shifted)
    source = torchvision_model("resnet18")
    with torch.no_grad():
        source.fc.weight.mul_(0.02)
    with pytest.raises(VerificationError, match=r"step fc \(linear 512->7\) is wrong: error"):
        fastres.optimize(source, dtype=torch.bfloat16, example_input=real_images(2, 32))


def test_the_first_call_is_verified_and_kept():
    source, x = small(), real_images(6, 16)
    fast = fastres.optimize(source)
    assert fast.verification is None
    assert fast(x[:0]).shape == (0, 5)
    fast(torch.full_like(x, float("nan")))
    assert fast.verification is None, "nothing finite was compared"
    out = fast(x)
    kept = fast.verification
    assert kept.ok
    assert kept.shape == (4, 3, 16, 16)
    assert kept.to_dict()["dtype"] == "float32"
    with executions() as ran:
        assert torch.equal(fast(x), out)
    assert len(ran) == 1, "verified once"
    assert fast.verification is kept


def test_a_source_changed_before_the_first_call():
    source, x = small(), real_images(2, 16)
    fast = fastres.optimize(source)
    with torch.no_grad():
        source.conv1.weight.mul_(2)
    with pytest.raises(VerificationError, match="the source changed before the first call"):
        fast(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype(dtype):
    """Folded from float32 in float64, cast last; images in either dtype are taken."""
    source, x = (
        adversarial_(fastres.ResNet(fastres.BasicBlock, [2, 2, 2, 2], planes=16)),
        real_images(2, 64),
    )
    fast = fastres.optimize(source, dtype=dtype, example_input=x)
    assert fast.dtype is dtype
    assert fast.verification.dtype == str(dtype).removeprefix("torch.")
    assert {b.dtype for b in fast.parameters()} <= {
        dtype,
        torch.promote_types(dtype, torch.float32),
    }
    out = fast(x)
    assert out.dtype is dtype
    assert torch.equal(fast(x.to(dtype)), out)
    exact = plain(copy.deepcopy(source).double(), x.double())
    rounded = plain(copy.deepcopy(source).to(dtype), x.to(dtype))
    assert rms(out - exact) <= 1.5 * rms(rounded - exact) + 1e-12
    with pytest.raises(TypeError, match="got torch.int64"):
        fast(x.long())


def test_autocast_changes_nothing():
    source, x = small(), real_images(2, 16)
    fast = fastres.optimize(source, example_input=x)
    out = fast(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), out)


@pytest.mark.fault(26)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how):
    densenet = pytest.importorskip("torchvision").models.DenseNet  # with steps left to PyTorch
    source, x = adversarial_(densenet(8, (2, 2), 16, num_classes=7)), real_images(2, 64)
    fast = fastres.optimize(source, example_input=x)
    out = fast(x)
    twin = copied(fast, how)
    assert torch.equal(twin(x), out)
    assert twin.plan().steps == fast.plan().steps
    assert twin.verification == fast.verification
    with torch.no_grad():
        next(twin.parameters()).mul_(0)
    twin.to("cpu")
    assert not torch.equal(twin(x), out)
    assert torch.equal(fast(x), out)


def test_state_dict_round_trip():
    first, second = (fastres.optimize(small(seed=seed), verify=False) for seed in (1, 2))
    x = real_images(2, 16)
    out = second(x)
    assert not torch.equal(first(x), out)
    assert first.load_state_dict(second.state_dict()) is not None
    assert torch.equal(first(x), out)
    first.load_state_dict(fastres.optimize(small(seed=3), verify=False).state_dict(), assign=True)
    assert not torch.equal(first(x), out)


def test_weights_loaded_through_the_module_around_it():
    first, second = (fastres.optimize(small(seed=seed), verify=False) for seed in (1, 2))
    x = real_images(2, 16)
    around = nn.Sequential(first)
    assert not torch.equal(around(x), second(x))
    around.load_state_dict(nn.Sequential(second).state_dict())
    assert torch.equal(around(x), second(x))


def test_functional_call_uses_the_weights_given_and_keeps_the_own():
    first, second = (fastres.optimize(small(seed=seed), verify=False) for seed in (1, 2))
    x = real_images(2, 16)
    own, others = copy.deepcopy(first)(x), second(x)
    for _ in range(2):  # before the engine has run and after
        found = functional_call(first, second.state_dict(), (x,))
        # The same float32 arithmetic in another memory order.
        torch.testing.assert_close(found, others, rtol=0, atol=1e-5 * others.abs().max().item())
        assert torch.equal(first(x), own)
    assert (own - others).abs().max() > 0.1


@pytest.mark.parametrize("wrap", ["DataParallel", "compile", "hooked inside"])
def test_wrappers_are_looked_through(wrap):
    source, x = small(), real_images(2, 16)
    if wrap == "hooked inside":
        source.register_forward_hook(lambda module, args, out: 2 * out)
        with pytest.raises(ValueError, match="has forward hooks"):
            fastres.optimize(nn.DataParallel(source).eval())
        return
    wrapped = nn.DataParallel(source) if wrap == "DataParallel" else torch.compile(source)
    assert_close(fastres.optimize(wrapped.eval(), example_input=x)(x), source, x)


def test_sources_with_inference_tensors():
    with torch.inference_mode():
        source = small()
    x = real_images(2, 16)
    fast = fastres.optimize(source, example_input=x)
    assert_close(fast(x), source, x)
