"""Pretrained weights: the table against torchvision's, downloads by file:// URLs, mistakes."""

import dataclasses
import hashlib
from collections import OrderedDict

import pytest
import torch
import torchvision
from helpers import adversarial_, real_images
from torchvision.models import ResNet18_Weights, ResNet50_Weights, get_model_weights
from torchvision.models._api import Weights, WeightsEnum

from fastres import errors
from fastres.models import registry, weights


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """A torch.hub cache of the test's own."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def source():
    """A adversarial ResNet-18, standing for a published one; with 3 classes to be small."""
    return adversarial_(torchvision.models.resnet18(num_classes=3), seed=5)


@pytest.fixture(scope="module")
def published(source, tmp_path_factory):
    """Where the source's weights lie, with the beginning of their SHA-256 in the name."""
    folder = tmp_path_factory.mktemp("published")
    plain = folder / "plain.pth"
    torch.save(source.state_dict(), plain)
    named = folder / f"resnet18-{hashlib.sha256(plain.read_bytes()).hexdigest()[:8]}.pth"
    plain.rename(named)
    return named


def at(path):
    return weights.ImageNetWeights("resnet18", "IMAGENET1K_V1", path.as_uri(), 1, 0.0, 0.0)


class Offer:
    """Anything that offers get_state_dict and meta."""

    meta = {"categories": ["cat", "dog", "bird"]}

    def __init__(self, state):
        self.state = state

    def get_state_dict(self, progress, check_hash):
        assert check_hash
        return self.state


def test_table_equals_torchvisions():
    seen = 0
    for name in weights.ENUMS:
        enum = get_model_weights(name)
        assert enum.__name__ == weights.ENUMS[name]
        assert weights.get_weights(name).url == enum.DEFAULT.url
        for theirs in enum:
            ours = weights.get_weights(name, theirs.name)
            preset = theirs.transforms()
            metrics = theirs.meta["_metrics"]["ImageNet-1K"]
            assert str(ours) == str(theirs)
            assert ours.url == theirs.url
            assert ours.num_params == theirs.meta["num_params"]
            assert (ours.acc1, ours.acc5) == (metrics["acc@1"], metrics["acc@5"])
            assert ([ours.resize_size], [ours.crop_size]) == (preset.resize_size, preset.crop_size)
            seen += 1
    assert seen == len(weights.WEIGHTS)


def test_preprocessing_and_labels_are_torchvisions():
    ours = weights.get_weights("resnet50", "IMAGENET1K_V2")
    image = (real_images(1, 300)[0].sigmoid() * 255).byte()
    assert torch.equal(ours.transforms()(image), ResNet50_Weights.IMAGENET1K_V2.transforms()(image))
    assert ours.categories() == ResNet50_Weights.DEFAULT.meta["categories"]


@pytest.mark.parametrize(
    "given",
    [
        "DEFAULT",
        "IMAGENET1K_V2",
        "ResNet50_Weights.IMAGENET1K_V2",
        "ResNet50_Weights.DEFAULT",
        ResNet50_Weights.IMAGENET1K_V2,
        ResNet50_Weights.DEFAULT,
        weights.get_weights("resnet50", "IMAGENET1K_V2"),
    ],
)
def test_every_way_of_naming_weights_finds_the_same(given):
    found = weights.resolve_weights("resnet50", given, {})
    assert found is weights.get_weights("resnet50", "IMAGENET1K_V2")


@pytest.mark.parametrize(
    ("model", "given", "error", "message"),
    [
        ("resnet50", "IMAGENET1K_V9", ValueError, "available: DEFAULT, IMAGENET1K_V1, IMAGENET"),
        ("resnet50", "ResNet18_Weights.DEFAULT", ValueError, "unknown weights 'ResNet18"),
        ("resnet20", "DEFAULT", ValueError, "No weights available for model resnet20"),
        ("resnet50", ResNet18_Weights.DEFAULT, TypeError, "expected ResNet50_Weights but received"),
        ("resnet50", weights.get_weights("resnet18"), TypeError, "expected ResNet50_Weights but"),
        ("resnet20", ResNet18_Weights.DEFAULT, TypeError, "received ResNet18_Weights"),
        ("resnet50", {"fc.bias": 1}, TypeError, "get_state_dict.. and meta, got dict"),
    ],
)
def test_wrong_weights_are_refused(model, given, error, message):
    with pytest.raises(error, match=message):
        registry.create_model(model, weights=given)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": 10}, "'num_classes' expected value 1000 but got 10"),
        ({"in_chans": 1}, "'in_chans' expected value 3 but got 1"),
        ({"stem": "cifar"}, "'stem' expected value imagenet but got cifar"),
    ],
)
def test_arguments_that_contradict_the_weights_are_refused_before_any_download(kwargs, message):
    with pytest.raises(ValueError, match=message):
        registry.resnet50(weights="DEFAULT", **kwargs)


def test_download_with_the_right_hash(source, published):
    state = at(published).get_state_dict(progress=False)
    assert all(torch.equal(state[k], v) for k, v in source.state_dict().items())


def test_a_download_is_told_on_standard_error(published, capsys):
    """On standard output it would be in the JSON of ``fastres classify --json``."""
    at(published).get_state_dict(progress=True)
    told = capsys.readouterr()
    assert told.out == ""
    assert published.name in told.err


@pytest.mark.fault(37)
def test_download_with_a_wrong_hash_is_refused(published, tmp_path):
    wrong = tmp_path / "resnet18-0badc0de.pth"
    wrong.write_bytes(published.read_bytes())
    with pytest.raises(errors.WeightsError, match=r"invalid hash value .*0badc0de"):
        at(wrong).get_state_dict(progress=False)
    assert not (tmp_path / "hub" / "checkpoints" / wrong.name).exists()


def test_missing_file_is_one_clear_error(tmp_path):
    with pytest.raises(errors.WeightsError, match=r"cannot get weights from file://.*gone.*load"):
        at(tmp_path / "gone-12345678.pth").get_state_dict(progress=False)


def test_damaged_cached_file_is_named(published, tmp_path):
    cached = tmp_path / "hub" / "checkpoints" / published.name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(published.read_bytes()[:1000])
    with pytest.raises(errors.WeightsError, match=r"damaged .* delete any copy in .*checkpoints"):
        at(published).get_state_dict(progress=False)


@pytest.mark.fault(37)
def test_published_code_does_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (type(tmp_path / "x").touch, (tmp_path / "ran",))

    torch.save({"fc.bias": Payload()}, tmp_path / "payload.pth")
    with pytest.raises(errors.WeightsError, match="damaged or not what was asked for"):
        weights.fetch((tmp_path / "payload.pth").as_uri(), progress=False)
    assert not (tmp_path / "ran").exists()


def test_weights_reach_the_model(source, published):
    """By a torchvision enum with its own file, and by any object with the same two members."""
    meta = {"categories": ["cat", "dog", "bird"]}

    class OwnWeights(WeightsEnum):
        V1 = Weights(url=published.as_uri(), transforms=None, meta=meta)

    images = real_images(2, 64)
    expected = source(images)
    for given in (OwnWeights.V1, Offer(source.state_dict())):
        model = registry.resnet18(weights=given, progress=False)
        # The fixture's epsilons are attributes, which no file carries.
        for ours, theirs in zip(model.modules(), source.modules(), strict=True):
            if hasattr(theirs, "eps"):
                ours.eps = theirs.eps
        assert torch.equal(model.eval()._forward_impl(images), expected)


@pytest.mark.fault(36)
def test_weights_that_do_not_fit_are_listed(source):
    state = OrderedDict(source.state_dict())
    del state["layer3.1.conv2.weight"]
    state["conv1.weight"] = torch.full((64, 3, 7, 7), float("nan"))
    with pytest.raises(errors.CheckpointError) as caught:
        registry.resnet18(weights=Offer(state))
    assert "missing: layer3.1.conv2.weight" in str(caught.value)
    assert "not finite: conv1.weight has 9408" in str(caught.value)


def test_pretrained_is_taken_with_a_warning(monkeypatch):
    state = {"asked": None}

    def get_state_dict(self, *, progress, check_hash):
        state["asked"] = str(self)
        return torchvision.models.resnet18().state_dict()

    monkeypatch.setattr(weights.ImageNetWeights, "get_state_dict", get_state_dict)
    for arguments in ({"pretrained": True}, {"weights": True}):
        with pytest.warns(UserWarning, match="weights=ResNet18_Weights.IMAGENET1K_V1") as caught:
            registry.resnet18(**arguments)
        assert caught[0].filename == __file__
        assert state.pop("asked") == "ResNet18_Weights.IMAGENET1K_V1"
    with pytest.warns(UserWarning, match="'pretrained' is deprecated"):
        registry.resnet18(pretrained=False)
    assert state == {}
    with pytest.raises(TypeError, match="both 'weights' and the deprecated 'pretrained'"):
        registry.resnet18(weights="DEFAULT", pretrained=True)


def test_rows_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        weights.get_weights("resnet18").url = "file:///elsewhere"
