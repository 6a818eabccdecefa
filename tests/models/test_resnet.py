"""The models against torchvision's: names, numbers, arguments, and what users do to modules."""

import copy
import inspect
import pickle

import pytest
import torch
import torchvision
from helpers import adversarial_, real_images
from torch import nn
from torchvision.models import feature_extraction

from fastres import errors
from fastres.models import registry, resnet

TORCHVISION = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

# Parameters in millions, table 6 of https://arxiv.org/abs/1512.03385.
CIFAR = {
    "resnet20": 0.27,
    "resnet32": 0.46,
    "resnet44": 0.66,
    "resnet56": 0.85,
    "resnet110": 1.7,
    "resnet1202": 19.4,
}


def seeded_pair(name, **kwargs):
    torch.manual_seed(11)
    ours = getattr(registry, name)(**kwargs)
    torch.manual_seed(11)
    return ours, getattr(torchvision.models, name)(**kwargs)


def assert_equal_states(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", TORCHVISION)
def test_seeded_state_equals_torchvisions(name):
    ours, theirs = seeded_pair(name)
    assert_equal_states(ours, theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {"zero_init_residual": True, "num_classes": 7}),
        ("resnet50", {"replace_stride_with_dilation": [False, True, True], "num_classes": 5}),
        ("resnet50", {"norm_layer": lambda c: nn.GroupNorm(8, c), "zero_init_residual": True}),
        ("resnext50_32x4d", {"num_classes": 3}),
    ],
)
def test_training_equals_torchvisions_bit_for_bit(name, kwargs):
    """One whole step: logits, running statistics and gradients come from the same operations."""
    ours, theirs = seeded_pair(name, **kwargs)
    images = real_images(2, 48)
    outputs = []
    for model in (ours, theirs):
        output = model.train()(images)
        output.square().mean().backward()
        outputs.append(output)
    assert torch.equal(*outputs)
    assert_equal_states(ours, theirs)
    gradients = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in gradients)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_adversarial_eval_equals_torchvisions(name):
    ours = adversarial_(getattr(registry, name)(backend="torch"), seed=2)
    theirs = adversarial_(getattr(torchvision.models, name)(), seed=2)
    assert_equal_states(ours, theirs)
    images = real_images(2, 64)
    assert torch.equal(ours._forward_impl(images), theirs(images))


def test_builders_take_torchvisions_arguments():
    for name in TORCHVISION:
        theirs = inspect.signature(getattr(torchvision.models, name)).parameters
        ours = inspect.signature(getattr(registry, name)).parameters
        assert list(ours) == list(theirs)
        assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]
    ours = list(inspect.signature(resnet.ResNet).parameters)
    theirs = list(inspect.signature(torchvision.models.ResNet).parameters)
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_family_has_the_papers_size(name):
    with torch.device("meta"):
        model = getattr(registry, name)().eval()
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters / 1e6 == pytest.approx(CIFAR[name], rel=0.03)  # the table has two digits
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(convolutions) == int(name.removeprefix("resnet"))


def test_cifar_networks_take_its_images():
    model = registry.resnet20().eval()
    assert model(real_images(2, 32)).shape == (2, 10)
    assert model.forward_features(real_images(1, 32)).shape == (1, 64, 8, 8)


def test_shortcut_a_pads_the_subsampled_input_with_zeros():
    shortcut = resnet.ZeroPadShortcut(3, 8, 2)
    x = torch.randn(2, 3, 5, 7)
    y = shortcut(x)
    assert y.shape == (2, 8, 3, 4)
    assert torch.equal(y[:, 2:5], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 5:].any()
    projected = registry.resnet20(shortcut="B")
    assert isinstance(projected.layer2[0].downsample[0], nn.Conv2d)


@pytest.mark.parametrize(
    ("name", "stride_on"), [("resnet18", "3x3"), ("resnet50", "3x3"), ("resnet50", "1x1")]
)
@pytest.mark.parametrize("size", [64, 97])
def test_dilation_only_adds_pixels_between_those_of_the_strided_network(name, stride_on, size):
    """Dilated features at every 4th pixel are the strided ones (a trous); exact in float64."""
    torch.manual_seed(0)
    strided = adversarial_(registry.create_model(name, stride_on=stride_on)).double()
    dilated = registry.create_model(
        name, stride_on=stride_on, replace_stride_with_dilation=[False, True, True]
    )
    adversarial_(dilated).double()
    assert_equal_states(strided, dilated)
    images = real_images(1, size).double()
    with torch.no_grad():
        coarse, fine = strided.forward_features(images), dilated.forward_features(images)
    assert fine.shape[-1] > 2 * coarse.shape[-1]
    # Other convolution shapes sum in another order: a few hundred ulps of float64 over 50 layers.
    torch.testing.assert_close(fine[:, :, ::4, ::4], coarse, rtol=1e-10, atol=1e-11)


@pytest.mark.fault(39)
def test_stride_placements_are_told_apart():
    v15 = adversarial_(registry.resnet50())
    v1 = adversarial_(registry.resnet50(stride_on="1x1"))
    assert_equal_states(v1, v15)
    assert v1.layer2[0].conv1.stride == v15.layer2[0].conv2.stride == (2, 2)
    assert v1.layer2[0].conv2.stride == v15.layer2[0].conv1.stride == (1, 1)
    images = real_images(1, 64)
    difference = (v1._forward_impl(images) - v15._forward_impl(images)).abs().max()
    assert difference > 0.05


def test_stem_and_channels():
    model = registry.resnet18(stem="cifar", in_chans=1, num_classes=10).eval()
    assert model.conv1.weight.shape == (64, 1, 3, 3)
    assert isinstance(model.maxpool, nn.Identity)
    assert model.forward_features(real_images(1, 32, channels=1)).shape == (1, 512, 4, 4)
    five = registry.resnet18(in_chans=5, num_classes=2).eval()
    assert five(real_images(2, 40, channels=5)).shape == (2, 2)


def test_norms_without_parameters():
    model = registry.resnet18(norm_layer=lambda c: nn.BatchNorm2d(c, affine=False), num_classes=2)
    assert model(real_images(2, 32)).isfinite().all()
    frozen = registry.resnet50(norm_layer=torchvision.ops.FrozenBatchNorm2d, num_classes=2)
    assert frozen.eval()(real_images(1, 32)).shape == (1, 2)


def test_classifier_can_be_replaced():
    model = adversarial_(registry.resnet18()).to(torch.float64)
    images = real_images(2, 64).double()
    features = model.forward_features(images).mean((2, 3))
    assert model.get_classifier() is model.fc
    model.reset_classifier(4)
    assert model.fc.weight.shape == (4, 512)
    assert model.fc.weight.dtype == torch.float64
    assert not model.fc.training
    expected = features @ model.fc.weight.T + model.fc.bias
    torch.testing.assert_close(model._forward_impl(images), expected)
    model.reset_classifier(0)
    torch.testing.assert_close(model._forward_impl(images), features)


class ShuffledBlock(resnet.Bottleneck):
    """A user's block that knows only torchvision's arguments."""

    def __init__(
        self,
        inplanes,
        planes,
        stride=1,
        downsample=None,
        groups=1,
        base_width=64,
        dilation=1,
        norm_layer=None,
    ):
        super().__init__(
            inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer
        )

    def forward(self, x):
        return super().forward(x.flip(3))


class Doubled(resnet.ResNet):
    """A user's network; at module level, so that it can be pickled."""

    def _forward_impl(self, x):
        return 2 * super()._forward_impl(x)


def test_subclasses_keep_their_forward():
    layers, dilate = [1, 1, 1, 1], [False, True, True]
    torch.manual_seed(0)
    model = resnet.ResNet(ShuffledBlock, layers, replace_stride_with_dilation=dilate)
    torch.manual_seed(0)
    double = Doubled(ShuffledBlock, layers, replace_stride_with_dilation=dilate)
    torch.manual_seed(0)
    plain = resnet.ResNet(resnet.Bottleneck, layers, replace_stride_with_dilation=dilate)
    images = real_images(1, 40)
    reference = adversarial_(model)._forward_impl(images)
    assert torch.equal(adversarial_(double)(images), 2 * reference)
    assert not torch.allclose(adversarial_(plain)(images), reference)


@pytest.mark.parametrize("name", ["resnet20", "resnet50"])
def test_script_fx_pickle_and_deepcopy_give_the_same_logits(name):
    model = adversarial_(registry.create_model(name))
    images = real_images(2, 32)
    reference = model._forward_impl(images)
    # Compared bit for bit: each runs the very same operations.
    with torch.no_grad():
        assert torch.equal(torch.jit.script(model)(images), reference)
        assert torch.equal(torch.fx.symbolic_trace(model)(images), reference)
        assert torch.equal(pickle.loads(pickle.dumps(model))._forward_impl(images), reference)
        assert torch.equal(copy.deepcopy(model)._forward_impl(images), reference)


def test_torchvisions_feature_extractor():
    model = adversarial_(registry.resnet18())
    extractor = feature_extraction.create_feature_extractor(model, ["layer2", "layer4"])
    images = real_images(1, 64)
    features = extractor(images)
    assert torch.equal(features["layer4"], model.forward_features(images))
    assert features["layer2"].shape == (1, 128, 8, 8)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"stem": "tiny"}, "stem must be one of 'imagenet', 'cifar', got 'tiny'"),
        ({"stride_on": "5x5"}, "stride_on must be one of '3x3', '1x1', got '5x5'"),
        ({"shortcut": "C"}, "shortcut must be one of 'A', 'B', got 'C'"),
        ({"backend": "cuda"}, "backend must be one of 'auto', 'triton', 'torch', got 'cuda'"),
        ({"in_chans": 0}, "in_chans must be an integer of at least 1, got 0"),
        ({"num_classes": -1}, "num_classes must be an integer of at least 0, got -1"),
        ({"num_classes": 2.5}, "num_classes must be an integer of at least 0, got 2.5"),
        ({"replace_stride_with_dilation": []}, "None or a 3-element tuple, got"),
        ({"replace_stride_with_dilation": [True]}, "None or a 3-element tuple, got"),
        ({"stride_on": "1x1"}, "a BasicBlock has no 1x1"),
        ({"groups": 2}, "BasicBlock only supports groups=1 and base_width=64, got groups=2"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        registry.resnet18(**kwargs)


def test_stages_are_counted():
    with pytest.raises(ValueError, match="layers must have 1 to 4 entries"):
        resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1, 1])


def test_variants_cannot_be_contradicted():
    with pytest.raises(ValueError, match="'groups' expected value 32 but got 8"):
        registry.resnext50_32x4d(groups=8)


def test_models_are_found_by_name():
    assert registry.list_models() == TORCHVISION + list(CIFAR)
    assert registry.list_models("wide_*") == ["wide_resnet50_2", "wide_resnet101_2"]
    for name in registry.list_models():
        builder = getattr(registry, name)
        assert builder.__name__ == name
        assert builder.__module__ == "fastres.models.registry"
    with pytest.raises(errors.UnknownModelError, match=r"'resnet51'; did you mean resnet5[06]"):
        registry.create_model("resnet51")
    with pytest.raises(ValueError, match="unknown model 'vgg'; known: resnet18"):
        registry.create_model("vgg")
