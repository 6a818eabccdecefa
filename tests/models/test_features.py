"""Feature maps: timm's and torchvision's semantics, fused in inference, trainable, in detectors."""

import copy
import pickle
from collections import OrderedDict

import pytest
import timm
import torch
from fused import executions
from helpers import adversarial_, real_images
from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FeaturePyramidNetwork
from tutorials import MnistResNet18

import fastres
from fastres import BasicBlock, Bottleneck, ResNet


def small(block=Bottleneck, **kwargs):
    return adversarial_(ResNet(block, [1, 1, 1, 1], num_classes=6, planes=8, **kwargs)).double()


@pytest.fixture
def images():
    return real_images(2, 64).double()


def by_hand(model, images):
    """The five maps of a ResNet, module by module, in plain PyTorch."""
    with torch.no_grad():
        x = model.relu(model.bn1(model.conv1(images)))
        maps = [x]
        x = model.maxpool(x)
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            x = stage(x)
            maps.append(x)
    return maps


def same_eps_(model, other):
    pairs = zip(norms(model), norms(other), strict=True)
    for ours, theirs in pairs:
        ours.eps = theirs.eps


def norms(model):
    return [module for module in model.modules() if hasattr(module, "eps")]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_numbers_are_timms(images, layout):
    model = small()
    images = images.contiguous(memory_format=layout)
    wanted = by_hand(model, images)
    body = fastres.features(model, (0, 1, 2, 3, 4))
    with executions() as ran, torch.no_grad():
        found = body(images)
    assert ran
    assert type(found) is list
    torch.testing.assert_close(found, wanted)
    assert [m.stride() for m in found] == [m.stride() for m in wanted]
    assert body.feature_info.channels() == [8, 32, 64, 128, 256]
    assert body.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert body.feature_info.module_name() == ["relu", "layer1", "layer2", "layer3", "layer4"]
    assert not body.plan().fallbacks
    with torch.no_grad():
        torch.testing.assert_close(fastres.features(model, [-1, 2])(images), [wanted[4], wanted[2]])


@pytest.mark.parametrize("name", ["resnet18", "resnet26d", "regnetx_002", "resnetv2_50"])
def test_timms_models_give_what_timm_gives(name):
    torch.manual_seed(0)
    theirs = adversarial_(timm.create_model(name, features_only=True)).double()
    model = timm.create_model(name).double()
    images = real_images(1, 64).double()
    body = fastres.features(model, range(len(theirs.feature_info.channels())))
    # timm flattens some names; the order is the same.
    values = theirs.state_dict().values()
    body.load_state_dict(dict(zip(body.state_dict(), values, strict=True)))
    same_eps_(body, theirs)
    assert body.feature_info.channels() == theirs.feature_info.channels()
    assert body.feature_info.reduction() == theirs.feature_info.reduction()
    with torch.no_grad():
        torch.testing.assert_close(body.eval()(images), theirs(images))


def test_names_are_torchvisions(images):
    model = adversarial_(resnet18()).double()
    nodes = {"layer2": "mid", "layer4.1.bn1": "inner", "layer4": "out"}
    theirs = create_feature_extractor(model, nodes)
    body = fastres.features(model, nodes)
    with executions() as ran, torch.no_grad():
        found = body(images)
        wanted = theirs(images)
    assert ran
    assert type(found) is OrderedDict
    assert list(found) == ["mid", "inner", "out"]
    torch.testing.assert_close(dict(found), dict(wanted))
    names = fastres.features(model, ["layer1", "layer2"])
    assert list(names.state_dict()) == [
        key for key in model.state_dict() if not key.startswith(("layer3", "layer4", "fc"))
    ]
    assert (names.out_channels, body.out_channels) == (128, 512)


def test_any_traceable_network(images):
    model = adversarial_(MnistResNet18()).double()
    body = fastres.features(model, ["net.2", "net.5"])
    digits = images[:, :1]
    with torch.no_grad():
        found = body(digits)
        wanted = model.net[:3](digits)
    torch.testing.assert_close(found["net.2"], wanted)
    assert found["net.5"].shape == (2, 512, 1, 1)


def test_weights_are_the_networks_own(images):
    model = small()
    body = fastres.features(model, [4])
    with torch.no_grad():
        body(images)
        model.conv1.weight.mul_(-2)
        torch.testing.assert_close(body(images), by_hand(model, images)[4:])
    body.train()
    body(images)[0].square().mean().backward()
    assert model.layer4[0].conv1.weight.grad is not None
    torch.optim.SGD(body.parameters(), lr=0.1).step()
    body.eval()
    with torch.no_grad():
        torch.testing.assert_close(body(images), by_hand(model.eval(), images)[4:])
    assert "fc.weight" not in body.state_dict()


def test_copies_stand_alone(images):
    model = small()
    body = fastres.features(model, [1, 4])
    with torch.no_grad():
        wanted = body(images)
        twins = [copy.deepcopy(body), pickle.loads(pickle.dumps(body))]
        model.conv1.weight.zero_()
        for twin in twins:
            torch.testing.assert_close(twin(images), wanted)
            twin.layer1[0].conv1.weight.mul_(2)
            assert float((twin(images)[0] - wanted[0]).abs().max()) > 1e-3


def test_compiles_and_optimizes(images):
    body = fastres.features(small(), [2, 4])
    with torch.no_grad():
        wanted = body(images)
        compiled = torch.compile(body, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), wanted)
    fast = fastres.optimize(body, example_input=images)
    found = fast(images)
    assert type(found) is list
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrappers_are_looked_through(images, wrap):
    model = small()
    body = fastres.features(wrap(model), [4])
    assert body.layer4 is model.layer4
    with torch.inference_mode():
        torch.testing.assert_close(body(images), [model.forward_features(images)])


def detector(body, levels):
    anchors = AnchorGenerator(tuple((2 ** (4 + i),) for i in range(levels)), ((1.0,),) * levels)
    options = {"min_size": 96, "max_size": 96, "box_detections_per_img": 20}
    return FasterRCNN(body, 3, rpn_anchor_generator=anchors, **options)


class Pyramid(nn.Module):
    """A body and torchvision's pyramid on it, as its own backbones have them."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), 16)
        self.out_channels = 16

    def forward(self, x):
        return self.fpn(self.body(x))


@pytest.mark.parametrize("pyramid", [False, True])
def test_torchvisions_detectors_take_it(pyramid, images):
    """In float64, where the order of boxes is certain; against torchvision's own extractor."""
    stages = (1, 2, 3, 4) if pyramid else (4,)
    nodes = {f"layer{stage}": str(level) for level, stage in enumerate(stages)}
    model = small(BasicBlock)
    theirs = create_feature_extractor(copy.deepcopy(model), nodes)
    ours = fastres.features(model, nodes)
    theirs.feature_info, theirs.out_channels = ours.feature_info, ours.out_channels
    torch.manual_seed(0)
    wrap = Pyramid if pyramid else lambda body: body
    found, wanted = (detector(wrap(body), 4 if pyramid else 1).double() for body in (ours, theirs))
    adversarial_(wanted)
    found.load_state_dict(wanted.state_dict())
    same_eps_(found, wanted)
    found.eval()
    with executions() as ran, torch.no_grad():
        boxes = found(list(images))
        torch.testing.assert_close(boxes, wanted(list(images)))
    assert ran
    assert len(boxes[0]["boxes"]) > 5
    targets = [
        {"boxes": torch.tensor([[3.0, 4, 40, 50]]).double(), "labels": torch.tensor([1])}
    ] * 2
    losses = found.train()(list(images), targets)
    sum(losses.values()).backward()
    assert model.conv1.weight.grad is not None


BAD = {
    "no module": (lambda m: fastres.features("resnet", [1]), TypeError, "torch.nn.Module"),
    "too far": (lambda m: fastres.features(m, [5]), ValueError, "has 5; the model has 5"),
    "unknown": (
        lambda m: fastres.features(m, ["layer9"]),
        ValueError,
        "no module 'layer9'.*layer1",
    ),
    "mixed": (lambda m: fastres.features(m, [1, "layer1"]), TypeError, "numbers or names"),
    "none": (lambda m: fastres.features(m, []), ValueError, "empty"),
    "a name alone": (lambda m: fastres.features(m, "layer4"), TypeError, "mapping; got 'layer4'"),
    "a number alone": (lambda m: fastres.features(m, 4), TypeError, "mapping; got 4"),
    "no images": (
        lambda m: fastres.features(nn.Sequential(nn.Linear(3, 4)), ["0"]),
        ValueError,
        "no Conv2d",
    ),
    "unnumbered": (
        lambda m: fastres.features(MnistResNet18(), [1]),
        ValueError,
        "MnistResNet18.*net",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named(name):
    make, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        make(small())


def test_timm_users_methods(images):
    model = small()
    with torch.inference_mode():
        maps = model.forward_features(images)
        torch.testing.assert_close(maps, by_hand(model, images)[4])
        torch.testing.assert_close(model.forward_head(maps), model(images))
        torch.testing.assert_close(model.forward_head(maps, pre_logits=True), maps.mean((2, 3)))
    assert model.get_classifier() is model.get_submodule(model.get_classifier(name_only=True))
    model.reset_classifier(3, "avg")
    assert model(images).shape == (2, 3)
    assert model.num_classes == 3
    with torch.inference_mode():
        model.reset_classifier(0)
        torch.testing.assert_close(model(images), maps.mean((2, 3)))
        model.reset_classifier(0, "")
        torch.testing.assert_close(model(images), maps)
        torch.testing.assert_close(torch.jit.script(model)(images), maps)
        model.reset_classifier(0, "avg")
        torch.testing.assert_close(model(images), maps.mean((2, 3)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "num_classes must be an integer of at least 0, got -1"),
        ((7, "max"), "global_pool must be one of 'avg', '', got 'max'"),
        ((7, ""), "global_pool='' needs num_classes=0, got 7"),
    ],
)
def test_classifiers_that_cannot_be(images, arguments, message):
    model = small()
    with torch.inference_mode():
        before = model(images)
        with pytest.raises(ValueError, match=message):
            model.reset_classifier(*arguments)
        assert torch.equal(model(images), before)
