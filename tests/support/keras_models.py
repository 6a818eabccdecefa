"""The Keras networks of the tutorials, built as their readers would; run by Keras on PyTorch."""

import io
import json
import os
import zipfile

os.environ["KERAS_BACKEND"] = "torch"

import h5py
import keras
import numpy as np
import torch
from keras import layers


def _bottleneck(x, kernel, filters, stage, block, stride=None):
    """An identity block; with ``stride`` a convolutional block, strided on the first 1x1."""
    conv, norm = f"res{stage}{block}_branch", f"bn{stage}{block}_branch"
    f1, f2, f3 = filters
    shortcut = x
    x = layers.Conv2D(f1, 1, strides=stride or 1, padding="valid", name=conv + "2a")(x)
    x = layers.BatchNormalization(axis=3, name=norm + "2a")(x)
    x = layers.Activation("relu")(x)
    x = layers.Conv2D(f2, kernel, padding="same", name=conv + "2b")(x)
    x = layers.BatchNormalization(axis=3, name=norm + "2b")(x)
    x = layers.Activation("relu")(x)
    x = layers.Conv2D(f3, 1, padding="valid", name=conv + "2c")(x)
    x = layers.BatchNormalization(axis=3, name=norm + "2c")(x)
    if stride:
        shortcut = layers.Conv2D(f3, 1, strides=stride, padding="valid", name=conv + "1")(shortcut)
        shortcut = layers.BatchNormalization(axis=3, name=norm + "1")(shortcut)
    x = layers.Add()([x, shortcut])
    return layers.Activation("relu")(x)


def resnet50(size, classes, *, zero_padding, pool):
    """(N, size, size, 3) -> (N, classes) probabilities; He et al.'s ResNet-50, version 1."""
    inputs = keras.Input((size, size, 3))
    x = layers.ZeroPadding2D((3, 3))(inputs) if zero_padding else inputs
    x = layers.Conv2D(64, (7, 7), strides=(2, 2), name="conv1")(x)
    x = layers.BatchNormalization(axis=3, name="bn_conv1")(x)
    x = layers.Activation("relu")(x)
    x = layers.MaxPooling2D((3, 3), strides=(2, 2))(x)
    for stage, (blocks, width, stride) in enumerate(
        [(3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)], start=2
    ):
        filters = (width, width, 4 * width)
        for index in range(blocks):
            first = stride if index == 0 else None
            x = _bottleneck(x, 3, filters, stage, "abcdef"[index], stride=first)
    x = layers.AveragePooling2D(pool, name="avg_pool")(x)
    x = layers.Flatten()(x)
    x = layers.Dense(classes, activation="softmax", name=f"fc{classes}")(x)
    return keras.Model(inputs, x, name="ResNet50")


def adversarial_(model, seed=0):
    """Weights under which no part can be forgotten: see ``helpers.adversarial_``."""
    random = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            adversarial_(layer, seed + 1)
            continue
        values = []
        for variable in layer.weights:
            shape, name = variable.shape, variable.name
            if "kernel" in name:
                fan_in = int(np.prod(shape[:-1]))
                value = random.standard_normal(shape) / np.sqrt(fan_in)
                if len(shape) == 2:
                    value *= 0.2  # a softmax near 0 or 1 would hide errors
            elif "gamma" in name:
                value = random.uniform(0.5, 1.5, shape) * random.choice([-1, 1], shape)
                value[0] = 0
            elif "variance" in name:
                value = 0.35 * 16 ** random.uniform(0, 1, shape)
            else:
                value = random.standard_normal(shape) * 0.3
            values.append(value.astype("float32"))
        layer.set_weights(values)
    return model


def answers(model, images):
    """What Keras returns for (N, C, H, W): lists of tensors, images as (N, C, H, W)."""
    found = model.predict(images.permute(0, 2, 3, 1).numpy(), verbose=0)
    if isinstance(found, dict):
        found = [found[key] for key in sorted(found)]
    found = [torch.from_numpy(f) for f in (found if isinstance(found, list) else [found])]
    return [f.permute(0, 3, 1, 2) if f.dim() == 4 else f for f in found]


def rewrite(path, config=None, weights=None):
    """Change the configuration, the weights or both in a file of Keras, in place."""
    if path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            if config:
                file.attrs["model_config"] = json.dumps(config(json.loads(file.attrs[CONFIG])))
            if weights:
                weights(file["model_weights"])
        return
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    if config:
        members["config.json"] = json.dumps(config(json.loads(members["config.json"]))).encode()
    if weights:
        buffer = io.BytesIO(members["model.weights.h5"])
        with h5py.File(buffer, "r+") as file:
            weights(file)
        members["model.weights.h5"] = buffer.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


CONFIG = "model_config"


def as_keras_2(path):
    """A file of Keras 3 in the notation of tf.keras 2.15: what it wrote for the same model.

    Lists instead of objects, calls of inner models counted from 1 everywhere, ``:0`` behind names
    (.h5), groups without names (.keras), ``batch_input_shape``.
    """
    rewrite(path, _config_2, _weights_2 if path.suffix == ".h5" else _strip_names)


def _config_2(model):
    config = model["config"]
    kinds = {e["config"]["name"]: e["class_name"] for e in config["layers"]}
    born = {e["config"]["name"]: _is_born(e) for e in config["layers"]}
    for layer in config["layers"]:
        if layer["class_name"] == "InputLayer":
            layer["config"]["batch_input_shape"] = layer["config"].pop("batch_shape")
        if "layers" in layer["config"]:
            _config_2(layer)
        if "inbound_nodes" in layer:
            nodes = [_histories(node) for node in layer["inbound_nodes"]]
            layer["inbound_nodes"] = [
                [[name, call + born[name], output, {}] for name, call, output in node]
                for node in nodes
            ]
    for key in ("input_layers", "output_layers"):
        if key in config:
            found = config[key] if isinstance(config[key][0], list) else [config[key]]
            config[key] = [[n, c + (kinds[n] == "Sequential" and born[n]), o] for n, c, o in found]
    return model


def _is_born(layer):
    """Whether tf.keras counts a call before the first: of models that know their input."""
    inner = layer["config"].get("layers", [])
    return bool(inner) and inner[0]["class_name"] == "InputLayer"


def _histories(value):
    if isinstance(value, dict) and "keras_history" in value.get("config", {}):
        return [value["config"]["keras_history"]]
    inner = value.values() if isinstance(value, dict) else value
    return [h for v in inner if isinstance(v, (dict, list)) for h in _histories(v)]


def _weights_2(groups):
    for group in groups.values():
        names = [f"{n}:0" for n in group.attrs.get("weight_names", [])]
        for name in names:
            group.move(name.removesuffix(":0"), name)
        group.attrs["weight_names"] = [n.encode() for n in names]


def _strip_names(file):
    named = []
    file.visititems(lambda _, item: named.append(item) if "name" in item.attrs else None)
    assert named
    for item in named:
        del item.attrs["name"]
