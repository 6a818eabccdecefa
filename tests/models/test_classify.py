"""Photographs to labels, against torchvision's own pipeline with the same parameters."""

import json
from urllib.error import URLError

import numpy as np
import pytest
import torch
from helpers import adversarial_

import fastres
from fastres import cli
from fastres.models.checkpoint import save_checkpoint
from fastres.models.classify import Crop, classify, read_image
from fastres.models.pretrained import load_network
from fastres.models.registry import create_model
from fastres.train.data import IMAGENET

torchvision = pytest.importorskip("torchvision")
Image = pytest.importorskip("PIL.Image")
to_tensor = torchvision.transforms.functional.pil_to_tensor
datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """scikit-learn's two photographs: a JPEG, and a grey PNG that must become RGB."""
    folder = tmp_path_factory.mktemp("photos")
    temple, flower = (Image.fromarray(pixels) for pixels in datasets.load_sample_images().images)
    temple.save(folder / "temple.jpg")
    flower.convert("L").save(folder / "flower.png")
    return [folder / "temple.jpg", folder / "flower.png"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A ResNet-18 whose 1000 logits are far from equal."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(adversarial_(create_model("resnet18")).state_dict(), path)
    return path


def test_the_answers_are_torchvisions(photos, checkpoint):
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    theirs = torchvision.models.resnet18()
    theirs.load_state_dict(torch.load(checkpoint, weights_only=True))
    images = [weights.transforms()(Image.open(path).convert("RGB")) for path in photos]
    with torch.no_grad():
        expected = theirs.eval()(torch.stack(images)).softmax(1).topk(5)

    found = classify(photos, model="resnet18", checkpoint=checkpoint)
    assert [photo.path for photo in found] == [str(path) for path in photos]
    for photo, indices, values in zip(found, expected.indices, expected.values, strict=True):
        labels, probabilities = zip(*photo.top, strict=True)
        assert list(labels) == [weights.meta["categories"][i] for i in indices]
        # Folding rounds the weights once more: a few units in the last place of 20 layers.
        assert list(probabilities) == pytest.approx(values.tolist(), rel=1e-4)
    assert found[0].top[0] != found[1].top[0]


def test_other_classes_are_numbered_and_read_off_the_file(photos, tmp_path):
    path = tmp_path / "three.pth"
    model = adversarial_(create_model("resnet18", num_classes=3, stem="cifar"))
    torch.save({f"module.{name}": value for name, value in model.state_dict().items()}, path)
    (found,) = classify(photos[:1], model="resnet18", checkpoint=path, top=5)
    assert {label for label, _ in found.top} == {"class 0", "class 1", "class 2"}
    assert sum(probability for _, probability in found.top) == pytest.approx(1)
    assert load_network("resnet18", checkpoint=path).conv1.kernel_size == (3, 3)


def test_the_command_prints_labels_or_json(photos, checkpoint, capsys):
    arguments = ["classify", *map(str, photos), "--model", "resnet18", "--device", "cpu"]
    arguments += ["--checkpoint", str(checkpoint), "--top", "2"]
    assert cli.run([*arguments, "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert [len(photo["top"]) for photo in read] == [2, 2]
    assert cli.run(arguments) == 0
    assert read[1]["top"][0]["label"] in capsys.readouterr().out


def test_a_photograph_of_a_turned_camera_is_turned_back(photos, tmp_path):
    upright = Image.open(photos[1])
    orientation = Image.Exif()
    orientation[0x0112] = 6  # turn a quarter clockwise to show it
    path = tmp_path / "turned.png"
    upright.rotate(90, expand=True).save(path, exif=orientation)
    assert torch.equal(read_image(path, to_tensor), to_tensor(upright.convert("RGB")))


def test_sixteen_bits_of_grey_keep_their_shades(photos, tmp_path):
    grey = np.array(Image.open(photos[1]))
    path = tmp_path / "deep.png"
    Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    assert torch.equal(read_image(path, to_tensor), torch.from_numpy(grey).expand(3, -1, -1))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "there is no such file"),
        (b"not an image", "cannot identify image file"),
        (b"", "cannot identify image file"),
        ("truncated", "image file is truncated"),
    ],
)
def test_an_unreadable_image_is_one_line_before_anything_is_fetched(
    content, reason, photos, tmp_path, monkeypatch, capsys
):
    def fetched(*args, **kwargs):
        raise AssertionError("weights were fetched")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetched)
    path = tmp_path / "photo.jpg"
    if content == "truncated":
        path.write_bytes(photos[0].read_bytes()[:4000])
    elif content is not None:
        path.write_bytes(content)
    assert cli.run(["classify", str(photos[1]), str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: cannot read image {str(path)!r}: ")
    assert reason in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (URLError("Name or service not known"), "cannot get weights from https://"),
        (RuntimeError('invalid hash value (expected "f37072fd", got "0")'), "invalid hash value"),
    ],
)
def test_weights_that_cannot_be_had_are_one_line_with_advice(
    error, reason, photos, monkeypatch, capsys
):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fails)
    assert cli.run(["classify", str(photos[0]), "--model", "resnet18"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert reason in err
    assert "--checkpoint FILE" in err
    assert err.count("\n") == 1


def test_mistakes_are_named(photos):
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        classify(photos, top=0)
    with pytest.raises(ValueError, match="No weights available for model resnet20"):
        classify(photos, model="resnet20")


@pytest.mark.fault(90)
@pytest.mark.parametrize("size", [(12, 300), (300, 12), (3, 500), (2001, 5), (1, 900)])
def test_a_long_image_is_cropped_before_it_is_resized(size, monkeypatch):
    """Resized as a whole, a kilobyte of PNG can take gigabytes; the pixels are torchvision's."""
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (*size, 3), np.uint8))
    preset = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.transforms()
    functional = torchvision.transforms.functional
    whole = functional.resize(image, preset.resize_size, antialias=True)
    expected = to_tensor(functional.center_crop(whole, preset.crop_size)).int()
    monkeypatch.delattr(functional, "resize")
    difference = (Crop(preset)(image).int() - expected).abs()
    # A value that lies just between two bytes is rounded to either.
    assert difference.max() <= 1
    assert (difference == 0).float().mean() > 0.99


def test_networks_of_ones_own_name_their_classes(photos, tmp_path, capsys):
    model = adversarial_(create_model("resnet18", num_classes=3)).eval()
    theirs = torchvision.models.resnet18(num_classes=3).eval()
    theirs.load_state_dict(model.state_dict())
    run = tmp_path / "run"
    run.mkdir()
    save_checkpoint(model, run / "best.safetensors")
    described = {"model": "resnet18", "classes": ["cat", "dog", "emu"], "options": {"resize": 64}}
    (run / "config.json").write_text(json.dumps({**described, "mean": IMAGENET[0]}))
    x = torch.stack([read_image(path, _side_of_64) for path in photos])
    mean, std = (torch.tensor(v)[:, None, None] for v in IMAGENET)
    with torch.no_grad():
        expected = theirs((x / 255 - mean) / std).softmax(1)
    arguments = ["classify", *map(str, photos), "--device", "cpu", "--json", "--model"]
    assert cli.run([*arguments, str(run)]) == 0
    for photo, wanted in zip(json.loads(capsys.readouterr().out), expected, strict=True):
        found = {row["label"]: row["probability"] for row in photo["top"]}
        assert [found[name] for name in described["classes"]] == pytest.approx(
            wanted.tolist(), rel=1e-3
        )
    fused = tmp_path / "fused.safetensors"
    fastres.save(fastres.optimize(model), fused)
    assert cli.run([*arguments, str(fused)]) == 0
    assert {row["label"] for row in json.loads(capsys.readouterr().out)[0]["top"]} == {
        "class 0", "class 1", "class 2"
    }  # fmt: skip
    (tmp_path / "none.png").write_bytes(b"none")
    assert cli.run(["classify", str(tmp_path / "none.png"), "--model", str(fused)]) == 2
    assert "none.png: cannot read image" in capsys.readouterr().err


def _side_of_64(image):
    functional = torchvision.transforms.functional
    return to_tensor(functional.center_crop(functional.resize(image, [73], antialias=True), [64]))
