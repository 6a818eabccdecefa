"""``fastres quantize`` and what ``fastres verify`` says of its files."""

import json
from importlib import resources

import pytest
import torch
from PIL import Image

import fastres
from fastres import cli
from fastres.backends.onednn_int8 import OneDNNInt8Ops, int8_products
from tests.support.helpers import adversarial_, real_images


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = cli.run(list(map(str, arguments)))
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def digits():
    with resources.as_file(resources.files("fastres") / "assets" / "digits.safetensors") as path:
        yield ("resnet20", "--checkpoint", path, "--data", "digits")


@pytest.mark.filterwarnings("ignore:.*lie outside of")
def test_digits_before_and_after(run, digits, tmp_path):
    path = tmp_path / "int8.safetensors"
    code, out, err = run("quantize", *digits, "-o", path, "--test", 300, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["images"] + found["held_out"] == 512
    assert found["calibrator"] in ("mse", "max")
    rows = found["test"]
    assert rows["float32"]["images"] == rows["8 bits"]["images"] == 300
    assert rows["8 bits"]["accuracy"] > 0.98
    assert rows["8 bits"]["low"] < rows["8 bits"]["accuracy"] < rows["8 bits"]["high"]

    model = fastres.load(path)
    assert model.plan().eight_bit == (19, 19)
    assert model.report.held_out == found["held_out"]

    code, out, _ = run("verify", path, "--data", "digits", "--test", 200, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["ok"]
    assert found["test"]["8 bits"]["agreement"] > 0.99
    assert found["test"]["8 bits"]["images"] == 200


@pytest.mark.skipif(not int8_products(), reason="no integer convolutions here")
def test_a_file_that_this_machine_computes_otherwise_is_wrong(run, digits, tmp_path, monkeypatch):
    path = tmp_path / "int8.safetensors"
    assert run("quantize", *digits, "-o", path, "--test", 0, "--images", 64)[0] == 0
    code, _, said = run("verify", path, "--data", "digits", "--test", 0)
    assert (code, "give --data, and --test from 1 on" in said) == (2, True)
    assert run("verify", path, "--data", "digits", "--test", 100)[1].startswith("right")
    right = OneDNNInt8Ops.conv
    monkeypatch.setattr(
        OneDNNInt8Ops, "conv", lambda *args, **others: right(*args, **others).clamp_max(60)
    )
    code, out, _ = run("verify", path, "--data", "digits", "--test", 100)
    assert code == 1
    assert out.startswith("WRONG")


def folder_of_classes(root):
    for name, brightness in (("dark", 0.4), ("light", 1.0)):
        (root / name).mkdir(parents=True)
        for i, image in enumerate(real_images(24, 40)):
            pixels = ((image * 40 + 120) * brightness).clamp(0, 255).to(torch.uint8)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(root / name / f"{i:02}.png")


def test_a_folder_of_classes_is_calibrated_and_tested_on_different_images(run, tmp_path):
    folder_of_classes(tmp_path / "val")
    model = adversarial_(fastres.resnet18(num_classes=2))
    fastres.save_checkpoint(model, tmp_path / "w.safetensors")
    code, out, err = run(
        *("quantize", "resnet18", "--checkpoint", tmp_path / "w.safetensors", "--size", 32),
        *("--data", tmp_path / "val", "-o", tmp_path / "q.safetensors", "--images", 40),
        *("--min-agreement", 0, "--keep", "conv1", "--keep", "layer4.*"),
    )
    assert code == 0, err
    lines = out.splitlines()
    assert "in floats: conv1: asked for by keep" in lines
    assert "14 of 20 convolutions in 8 bits" in " ".join(lines)
    assert lines[-1].split()[-1] == lines[-2].split()[-1] == "8"
    assert "wrote" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet18", "--data", "digits"), "random weights, of which 8 bits say nothing"),
        (("resnet18", "--checkpoint", "gone.pth", "--data", "digits"), "no checkpoint file"),
        (("gone.keras", "--data", "digits"), "gone.keras"),
    ],
)
def test_mistakes(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("quantize", *arguments, "-o", "q.safetensors")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
