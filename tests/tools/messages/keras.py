"""Cases: Keras files, hand-made so that Keras itself is not needed."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import torch

from fastres.cli.models import _pixels
from fastres.formats.keras_check import KerasModel, input_shapes
from fastres.formats.keras_import import from_keras
from messages.provoke import add, case, without

INPUT = ("InputLayer", {"name": "input", "batch_shape": [None, 8, 8, 3]})
OPEN = ("InputLayer", {"name": "input", "batch_shape": [None, None, None, 3]})
CONV = {
    "name": "conv",
    "filters": 4,
    "kernel_size": [3, 3],
    "strides": [1, 1],
    "padding": "valid",
    "dilation_rate": [1, 1],
    "activation": "linear",
    "use_bias": False,
}
POOL = {"name": "pool", "pool_size": [2, 2], "strides": [1, 1], "padding": "same"}
NORM = {"name": "norm", "axis": -1, "epsilon": 1e-3, "momentum": 0.9}
DENSE = {"name": "dense", "units": 5, "activation": "linear", "use_bias": False}
KERNEL = {"conv": {"kernel": (3, 3, 3, 4)}}


def keras(*layers: Any, weights: dict[str, Any] | None = None, kind: str = "Sequential") -> None:
    """Reads a model of these layers, in order, whose variables have the shapes of ``weights``."""
    entries = [{"class_name": name, "config": config} for name, config in layers]
    config = {"name": "model", "layers": entries}
    read({"class_name": kind, "config": config}, KERNEL if weights is None else weights)


def functional(*nodes: tuple[Any, list[Any]], inputs: int = 1) -> None:
    """Reads a functional model: each layer with the names that it is called on."""
    entries = [
        {
            "class_name": name,
            "name": config["name"],
            "config": config,
            "inbound_nodes": [[[n, 0, 0, {}] if isinstance(n, str) else n for n in given]]
            if given
            else [],
        }
        for (name, config), given in nodes
    ]
    config = {
        "name": "model",
        "layers": entries,
        "input_layers": [["input", 0, 0]] * inputs,
        "output_layers": [[entries[-1]["name"], 0, 0]],
    }
    read({"class_name": "Functional", "config": config}, KERNEL)


def read(config: Any, weights: dict[str, Any]) -> None:
    with h5py.File("model.h5", "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        groups = file.create_group("model_weights")
        for layer, variables in weights.items():
            group = groups.create_group(layer)
            group.attrs["weight_names"] = [f"{layer}/{name}:0".encode() for name in variables]
            for name, shape in variables.items():
                group[f"{layer}/{name}:0"] = torch.randn(shape).numpy()
    from_keras("model.h5")


def layer(kind: str, **config: Any) -> tuple[str, dict[str, Any]]:
    return kind, {"name": kind.lower(), **config}


def conv(**changes: Any) -> tuple[str, dict[str, Any]]:
    return "Conv2D", {**CONV, **changes}


FLATTEN = layer("Flatten")
GLOBAL = layer("GlobalAveragePooling2D")

add("from_keras: no such file", lambda: from_keras("gone.h5"))
add("from_keras: half a file", lambda: (Path("half.h5").write_bytes(b"HDF"), from_keras("half.h5")))


@case("from_keras: weights only")
def _() -> None:
    h5py.File("weights.h5", "w").close()
    from_keras("weights.h5")


@case("from_keras: without h5py")
def _() -> None:
    Path("model.h5").write_bytes(b"")
    with without("h5py"):
        from_keras("model.h5")


@case("from_keras: a zip without a model")
def _() -> None:
    with zipfile.ZipFile("model.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    from_keras("model.keras")


add("from_keras: no description", lambda: read({"class_name": "Sequential", "config": 3}, {}))
add("from_keras: a layer without options", lambda: keras(INPUT, layer("Conv2D")))
add("from_keras: no model", lambda: keras(INPUT, kind="Attention"))
add("from_keras: no layers", lambda: keras())
add("from_keras: an unknown layer", lambda: keras(INPUT, layer("LSTM")))
add("from_keras: channels first", lambda: keras(INPUT, conv(data_format="channels_first")))
add("from_keras: an unknown activation", lambda: keras(INPUT, conv(activation="gelu")))
add("from_keras: an unknown padding", lambda: keras(INPUT, conv(padding="causal")))
add("from_keras: a size left open", lambda: keras(OPEN, conv(padding="same", strides=[2, 2])))
add("from_keras: an input of unknown form", lambda: keras(layer("InputLayer"), conv()))
add("from_keras: no weights", lambda: keras(INPUT, conv(), weights={}))
add(
    "from_keras: weights of another shape",
    lambda: keras(INPUT, conv(), weights={"conv": {"kernel": (5, 3, 3, 4)}}),
)
add("from_keras: a dense layer on images", lambda: keras(INPUT, ("Dense", DENSE)))
add("from_keras: another axis", lambda: keras(INPUT, ("BatchNormalization", {**NORM, "axis": 1})))
add("from_keras: a mean that pads unevenly", lambda: keras(INPUT, ("AveragePooling2D", POOL)))
add("from_keras: a limited ReLU", lambda: keras(INPUT, layer("ReLU", max_value=6.0)))
add("from_keras: softmax of images", lambda: keras(INPUT, layer("Softmax")))
add(
    "from_keras: flattened, of a size left open",
    lambda: keras(OPEN, FLATTEN, ("BatchNormalization", NORM)),
)
add("from_keras: two layers of one name", lambda: keras(INPUT, conv(), conv()))
add("from_keras: an augmentation", lambda: keras(INPUT, layer("RandomFlip")))
add("from_keras: two inputs", lambda: functional((INPUT, []), (conv(), ["input"]), inputs=2))
add("from_keras: an input from nowhere", lambda: functional((INPUT, []), (conv(), ["moon"])))
add(
    "from_keras: a layer of two inputs",
    lambda: functional((INPUT, []), (conv(), ["input", "input"])),
)
add(
    "from_keras: a sum of other channels",
    lambda: functional((INPUT, []), (conv(), ["input"]), (layer("Add"), ["conv", "input"])),
)
add(
    "from_keras: called in training",
    lambda: functional((INPUT, []), (conv(), [["input", 0, 0, {"training": True}]])),
)
add(
    "from_keras: called with a constant",
    lambda: functional((INPUT, []), (layer("Add"), ["input", ["_CONSTANT_VALUE", -1, 2.0, {}]])),
)


def inside(*nodes: Any, call: int = 1, **calls: Any) -> None:
    """Reads a model whose layer "model" is a model, called by these nodes."""
    inner = {"name": "model", "layers": [], "input_layers": [["input", 0, 0]], **calls}
    inner |= {"output_layers": [["input", 0, 0]]}
    inner["layers"] = [entry(*INPUT)]
    outer = {
        "name": "outer",
        "layers": [entry(*INPUT), entry("Functional", inner) | {"inbound_nodes": list(nodes)}],
        "input_layers": [["input", 0, 0]],
        "output_layers": [["model", call, 0]],
    }
    read({"class_name": "Functional", "config": outer}, {})


def entry(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"class_name": kind, "name": config["name"], "config": config, "inbound_nodes": []}


IN = {"class_name": "__keras_tensor__", "config": {"keras_history": ["input", 0, 0]}}
add("from_keras: a call that is none", lambda: inside([["input", 0, 0, {}]], call=2))
add("from_keras: a dictionary", lambda: inside({"args": [{"input": IN}], "kwargs": {}}))


@case("from_keras: calls without end")
def _() -> None:
    with mock.patch("fastres.formats.keras_import.MOST_CALLS", 3):
        keras(INPUT, *[("ReLU", {"name": name}) for name in "abcd"])


def spoilt(link: Any, **options: Any) -> None:
    """A file whose kernel lies elsewhere."""
    config = {"class_name": "Sequential", "config": {"name": "model", "layers": []}}
    config["config"]["layers"] = [
        {"class_name": kind, "config": config} for kind, config in (INPUT, conv(**options))
    ]
    with h5py.File("model.h5", "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        group = file.create_group("model_weights/conv")
        group.attrs["weight_names"] = [b"kernel:0"]
        link(group)
    from_keras("model.h5")


@case("from_keras: a link to another file")
def _() -> None:
    spoilt(lambda group: group.__setitem__("kernel:0", h5py.ExternalLink("secret.h5", "data")))


@case("from_keras: weights in another file")
def _() -> None:
    outside = [("secret.bin", 0, h5py.h5f.UNLIMITED)]
    spoilt(lambda g: g.create_dataset("kernel:0", (3, 3, 3, 4), "f4", external=outside))


@case("from_keras: weights that are not there")
def _() -> None:
    spoilt(lambda g: g.create_dataset("kernel:0", (3, 3, 3, 4), "f4", chunks=(1, 3, 3, 4)))


add(
    "from_keras: weights of little but zeros",
    lambda: spoilt(
        lambda g: g.create_dataset(
            "kernel:0", data=torch.zeros(3, 3, 3, 2**14).numpy(), compression="gzip"
        ),
        filters=2**14,
    ),
)


@case("from_keras: a zip that grows")
def _() -> None:
    with zipfile.ZipFile("model.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", b" " * 2**21)
        archive.writestr("model.weights.h5", b"")
    from_keras("model.keras")


def compared(stand_in: Any = None, **options: Any) -> None:
    """Reads a model, then lets Keras, or what stands in for it, load it."""
    keras(INPUT, conv(**options), weights=KERNEL)
    with mock.patch.dict("sys.modules", {"keras": stand_in}):
        KerasModel("model.h5")


def failing() -> mock.Mock:
    stand_in = mock.Mock(__version__="4.0")
    stand_in.models.load_model.side_effect = ValueError("no such layer\nand so on")
    return stand_in


add("compare with Keras: without Keras", lambda: compared())
add("compare with Keras: a file that it cannot read", lambda: compared(failing()))
add("compare with Keras: code", lambda: compared(kernel_initializer={"module": "os"}))
add("verify: four channels", lambda: _pixels([], (4, 8, 8)))


@case("verify: another size than the file's")
def _() -> None:
    keras(INPUT, conv())
    input_shapes("model.h5", size=9)
