"""The digits: the split, the shipped network, and the script that trained it."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fastres import errors
from fastres.models import checkpoint, digits

ROOT = Path(__file__).parents[2]
ASSET = ROOT / "fastres" / "assets" / "digits.safetensors"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("train_digits", ROOT / "examples/train_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_split_is_every_fourth_image_of_each_digit():
    data = load_digits()
    order = {"heldout": [], "train": []}
    for index in range(len(data.target)):
        nth = np.count_nonzero(data.target[: index + 1] == data.target[index])
        order["heldout" if nth % 4 == 0 else "train"].append(index)
    for part, chosen in order.items():
        images, labels = digits.digits_split(part)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert np.array_equal(images.squeeze(1).numpy() * 16, data.images[chosen])
        assert np.array_equal(labels.numpy(), data.target[chosen])
        shares = labels.bincount() / torch.tensor(data.target).bincount()
        # A class of 174 to 183 images gives its quarter to within one image.
        wanted = 0.25 if part == "heldout" else 0.75
        assert (shares - wanted).abs().max() < 1 / 174


def test_no_heldout_image_is_also_a_training_image():
    heldout, train = (digits.digits_split(part)[0].flatten(1) for part in ("heldout", "train"))
    assert (heldout[:, None] != train).any(-1).all()


def test_shipped_network_reads_heldout_digits():
    images, labels = digits.digits_split()
    model = digits.load_digits_model(backend="torch")
    assert not model.training
    assert model.backend == "torch"
    with torch.no_grad():
        accuracy = float((model._forward_impl(images).argmax(1) == labels).float().mean())
    assert accuracy >= 0.98
    metadata = checkpoint.read_metadata(ASSET)
    stated = json.loads(metadata["heldout_accuracy"])
    # Another machine rounds differently: at most one image may change sides.
    assert accuracy == pytest.approx(stated[metadata["seed"]], abs=1.5 / len(labels))
    assert sorted(stated) == ["0", "1", "2"]
    assert min(stated.values()) >= 0.98
    assert ASSET.stat().st_size < 2e6


def test_training_learns_and_never_asks_for_the_heldout_part_before_its_end(
    script, tmp_path, monkeypatch, capsys
):
    events = []

    def recorded_split(part):
        events.append(part)
        return digits.digits_split(part)

    train = script.train

    def recorded_train(images, labels, seed, epochs):
        model = train(images, labels, seed, epochs)
        events.append("trained")
        return model

    output = tmp_path / "new.safetensors"
    arguments = ["train_digits.py", "--seeds", "4", "--epochs", "2", "--output", str(output)]
    monkeypatch.setattr(script, "digits_split", recorded_split)
    monkeypatch.setattr(script, "train", recorded_train)
    monkeypatch.setattr(script.torch, "use_deterministic_algorithms", lambda _: None)
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()

    assert events == ["train", "trained", "heldout"]
    metadata = checkpoint.read_metadata(output)
    accuracy = json.loads(metadata["heldout_accuracy"])["4"]
    assert accuracy > 0.3, "two epochs must be far above the 0.1 of guessing"
    assert f"seed 4: {accuracy:.2%} of 445 held-out digits" in capsys.readouterr().out
    model = script.create_model(**json.loads(metadata["architecture"]))
    checkpoint.load_checkpoint(model, output)


def test_training_is_reproducible(script):
    images, labels = (t[:128] for t in digits.digits_split("train"))
    first, second = (script.train(images, labels, 7, 1).state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    other = script.train(images, labels, 8, 1).state_dict()
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_augmentation_moves_pixels_and_keeps_digits_legible(script):
    torch.manual_seed(0)
    images, labels = digits.digits_split("train")
    moved = script.augment(images)
    assert moved.shape == images.shape
    assert (moved != images).flatten(1).any(1).all()
    heldout, truth = digits.digits_split("heldout")
    nearest = torch.cdist(heldout.flatten(1), moved.flatten(1)).argmin(1)
    share = (labels[nearest] == truth).float().mean()
    assert share > 0.9, "a nearest neighbour among moved digits still reads untouched ones"


def test_wrong_part_and_missing_scikit_learn(monkeypatch):
    with pytest.raises(ValueError, match="part must be 'heldout' or 'train', got 'test'"):
        digits.digits_split("test")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(errors.MissingDependencyError, match=r"install fastres\[train\]"):
        digits.digits_split()
