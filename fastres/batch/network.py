"""A network by what a user calls it: a name of the table, a file, the folder of a training run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..formats.fused_file import load
from ..formats.keras_import import from_keras
from ..models.pretrained import is_run, load_network, read_run
from ..models.weights import ENUMS, ImageNetWeights, get_weights
from ..train.data import IMAGENET

KERAS = (".h5", ".hdf5", ".keras")
FUSED = ".safetensors"


def read_network(
    source: str,
    size: int | None = None,
    weights: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """What the argument names: a Keras or fused file, a training run, a network of the table.

    Raises:
        ValueError: weights beside a file that has its own, or a file of another kind.
        UnknownModelError, WeightsError, CheckpointError, FileNotFoundError: as they say.
    """
    suffix = Path(source).suffix
    if suffix in (*KERAS, FUSED) and (weights or checkpoint):
        raise ValueError(f"--weights and --checkpoint do not go with {source}, which has weights")
    if suffix in KERAS:
        network = from_keras(source, input_size=None if size is None else (size, size))
        if size is not None and network.input_size != (size, size):
            asked = "x".join(map(str, network.input_size))  # type: ignore[arg-type]
            raise ValueError(f"{source} is for images of {asked}; got --size {size}")
        return network
    if suffix == FUSED:
        return load(source)
    if Path(source).is_file():
        raise ValueError(
            f"{source} is no .h5, .keras or fused .safetensors file; name its network instead, "
            f"with --checkpoint {source}"
        )
    return load_network(source, weights=weights, checkpoint=checkpoint)


@dataclass(frozen=True)
class Source:
    """A network with torchvision's preset for its images, and its classes' names if known."""

    network: nn.Module
    preset: Any
    names: list[str] | None


def open_classifier(
    model: str, weights: str, checkpoint: str | os.PathLike[str] | None = None
) -> Source:
    """The network, what prepares its images, and the names of its classes.

    Raises:
        ValueError: unknown weights, a Keras file, or a training run on other images than those of
            folders; besides what :func:`read_network` raises.
    """
    if Path(model).suffix in KERAS:
        raise ValueError(f"convert {model} first: a Keras file does not say how to prepare images")
    if is_run(model):
        if weights != "DEFAULT" or checkpoint is not None:
            raise ValueError(f"weights and checkpoint do not go with {model}, which has weights")
        return _trained(model)
    if Path(model).suffix == FUSED:
        known = _by_full_name(weights)
        return Source(read_network(model, checkpoint=checkpoint), *_prepared(known))
    known = get_weights(model, weights)
    prepared = _prepared(known)
    network = read_network(model, weights=None if checkpoint else known, checkpoint=checkpoint)
    return Source(network, *prepared)


def _prepared(weights: ImageNetWeights) -> tuple[Any, list[str]]:
    return weights.transforms(), weights.categories()


def _by_full_name(weights: str) -> ImageNetWeights:
    """Those that a fused file was made of; by default the preprocessing of 256 and 224 pixels."""
    if weights == "DEFAULT":
        return get_weights("resnet50", "IMAGENET1K_V1")
    models = {enum: model for model, enum in ENUMS.items()}
    enum = weights.partition(".")[0]
    if enum not in models:
        raise ValueError(
            "weights of a fused file must be named in full, such as "
            f"ResNet50_Weights.IMAGENET1K_V2; got {weights!r}"
        )
    return get_weights(models[enum], weights)


def _trained(folder: str) -> Source:
    held = read_run(folder)
    mean = held.get("mean")
    if mean is None or tuple(mean) != IMAGENET[0]:
        raise ValueError(f"{folder} was not trained on images in folders, as it would be used for")
    preset, names = _prepared(get_weights("resnet50", "IMAGENET1K_V1"))
    side = (held.get("options") or {}).get("resize") or 224
    preset.crop_size, preset.resize_size = [side], [round(side / 0.875)]
    return Source(load_network(folder), preset, list(held.get("classes") or names))
