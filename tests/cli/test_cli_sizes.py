"""Options of the command line that contradict a file: one line, exit code 2, nothing written."""

import pytest
import torch
from torch import nn

import fastres
from fastres import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Keras files for 32x32, for 24x40 and for any size, and fused files."""
    keras = pytest.importorskip("keras_models", exc_type=ImportError).keras
    layers, made = keras.layers, tmp_path_factory.mktemp("sources")

    def save(name, shape, pool):
        inputs = keras.Input(shape)
        x = layers.BatchNormalization()(layers.Conv2D(4, 3, activation="relu")(inputs))
        model = keras.Model(inputs, layers.Dense(5)(pool()(x)))
        for suffix in (".h5", ".keras"):
            model.save(made / f"{name}{suffix}")

    save("flat", (32, 32, 3), layers.Flatten)
    save("pooled", (32, 32, 3), layers.GlobalAveragePooling2D)
    save("oblong", (24, 40, 3), layers.Flatten)
    save("open", (None, None, 3), layers.GlobalAveragePooling2D)
    network = fastres.from_keras(made / "flat.keras")
    fused = fastres.optimize(network, example_input=torch.rand(2, 3, 32, 32))
    fastres.save(fused, made / "flat.safetensors")
    linear = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval()
    fastres.save(fastres.optimize(linear, verify=False), made / "linear.safetensors")
    torch.save(fastres.resnet20().state_dict(), made / "resnet20.pth")
    return made


COMMANDS = {
    "convert": "out.safetensors",
    "export": "out.pt2",
    "plot": "out.svg",
    "summary": "",
}
CONTRADICTIONS = {
    "flat.h5 --size 64": "flat.h5 is for images of 32x32; got --size 64",
    "flat.keras --size 31": "flat.keras is for images of 32x32; got --size 31",
    "pooled.h5 --size 64": "pooled.h5 is for images of 32x32; got --size 64",
    "oblong.keras --size 24": "oblong.keras is for images of 24x40; got --size 24",
    "open.h5 --size 2": "--size 2 does not fit the network: ",
    "flat.safetensors --size 64": "--size 64 does not fit the network: ",
    "resnet20.pth": "no .h5, .keras or fused .safetensors file; name its network instead",
}
OTHERS = {
    "export linear.safetensors out.pt2": "the file speaks of 0 channels",
    "plot linear.safetensors out.svg": "the file speaks of 0 channels",
    "verify flat.h5 --size 64": "flat.h5 is for images of",
    "verify resnet20 --weights DEFAULT --checkpoint resnet20.pth": "not both; got DEFAULT and",
    "convert resnet18 out.safetensors --weights DEFAULT --checkpoint resnet20.pth": "not both",
    "convert flat.safetensors out.safetensors --dtype bfloat16": "folded in torch.float32 already",
    "convert flat.h5 out.safetensors --dtype int8": "dtype must be one of",
    "plan resnet20 --dtype float64": "dtype must be one of",
    "summary resnet18 --checkpoint resnet20.pth": "does not fit the model",
}


def refused(capsys, arguments, message):
    assert cli.run(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert message in said.err


@pytest.mark.fault(59)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_size_that_is_not_the_files(folder, monkeypatch, capsys, command, case):
    if command == "summary" and ".safetensors" in case:
        pytest.skip("fused files have no summary")
    monkeypatch.chdir(folder)
    source, *options = case.split()
    target = [COMMANDS[command]] if COMMANDS[command] else []
    refused(capsys, [command, source, *target, *options], CONTRADICTIONS[case])
    assert not list(folder.glob("out*"))


@pytest.mark.fault(59)
@pytest.mark.parametrize("case", OTHERS)
def test_other_contradictions(folder, monkeypatch, capsys, case):
    monkeypatch.chdir(folder)
    refused(capsys, case.split(), OTHERS[case])
    assert not list(folder.glob("out*"))


@pytest.mark.fault(59)
@pytest.mark.parametrize(
    "case", ["flat.h5 --size 32", "oblong.h5", "open.keras --size 20", "flat.safetensors --size 32"]
)
def test_sizes_that_fit_are_taken(folder, monkeypatch, capsys, case):
    monkeypatch.chdir(folder)
    source, *options = case.split()
    assert cli.run(["plot", source, "drawn.svg", *options]) == 0
    assert cli.run(["convert", source, "fits.safetensors", *options]) == 0
