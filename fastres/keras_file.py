"""Keras' files without Keras: the configuration and the weights of ``.h5`` and ``.keras``.

``.h5`` (Keras 1 to 3): an attribute ``model_config``; each ``model_weights/<layer>`` lists its
``weight_names``. ``.keras`` (Keras 3): a zip of ``config.json`` and ``model.weights.h5``, whose
groups are named after the layers' classes and counted in the order of the layers. Only numbers and
JSON are read.
"""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, MissingDependencyError

# The order in which Keras 3 numbers a layer's variables.
VARIABLES = ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance")


class KerasFile:
    """An open file: ``config`` is the model's, ``read`` gives the weights of one layer.

    Raises:
        FileNotFoundError: there is no such file.
        MissingDependencyError: without h5py.
        CheckpointError: it is no Keras model, or only its weights.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no Keras file at {self.path}")
        try:
            import h5py  # type: ignore[import-untyped]
        except ImportError as error:
            raise MissingDependencyError(
                f"reading Keras files needs h5py, which cannot be imported ({error}); "
                "install fastres[keras]"
            ) from error
        try:
            if zipfile.is_zipfile(self.path):
                self._open_zip(h5py)
            else:
                self._open_hdf5(h5py)
        except CheckpointError:
            raise
        except Exception as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise CheckpointError(
                f"cannot read {self.path}: truncated or not a Keras model ({reason})"
            ) from error

    def _open_zip(self, h5py: Any) -> None:
        with zipfile.ZipFile(self.path) as archive:
            self.config = json.loads(archive.read("config.json"))
            data = io.BytesIO(archive.read("model.weights.h5"))
        weights = h5py.File(data, "r")
        self._groups = dict(_numbered_groups(self.config, weights, ()))

    def _open_hdf5(self, h5py: Any) -> None:
        file = h5py.File(self.path, "r")
        if "model_config" not in file.attrs:
            raise CheckpointError(
                f"{self.path} holds weights without a model; save the model itself "
                "(model.save, not save_weights)"
            )
        self.config = json.loads(file.attrs["model_config"])
        self._groups = dict(_named_groups(self.config, _member(file, "model_weights")))

    def read(
        self, path: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Tensor]:
        """The variables of the layer at ``path`` (names of enclosing models first), in float32.

        Args:
            shapes: the name and shape of each variable that the layer must have.

        Raises:
            CheckpointError: a variable is missing, unexpected, misshapen or not of numbers.
        """
        layer = "/".join(path)
        found = self._groups.get(path, {})
        if set(found) != set(shapes):
            raise CheckpointError(
                f"{self.path}: layer {layer!r} has {sorted(found)}, wanted {sorted(shapes)}"
            )
        return {name: self._tensor(found[name], f"{layer}/{name}", shapes[name]) for name in shapes}

    def shape(self, path: tuple[str, ...], variable: str) -> tuple[int, ...]:
        """The stored shape of a layer's variable; () where there is none."""
        found = self._groups.get(path, {}).get(variable)
        return () if found is None else tuple(found.shape)

    def _tensor(self, dataset: Any, name: str, shape: tuple[int, ...]) -> Tensor:
        if tuple(dataset.shape) != shape or dataset.dtype.kind != "f":
            raise CheckpointError(
                f"{self.path}: {name} is {dataset.dtype} {tuple(dataset.shape)}, wanted {shape}"
            )
        return torch.from_numpy(dataset[()].astype("float32"))


Groups = Iterator[tuple[tuple[str, ...], dict[str, Any]]]


def sublayers(config: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The layers of a model's configuration; empty for a layer that is none."""
    inner = config["config"]
    layers = inner if isinstance(inner, list) else inner.get("layers", ())  # Keras 1: a bare list
    return layers if isinstance(layers, (list, tuple)) else ()


def layer_name(config: Mapping[str, Any]) -> str:
    """A layer's name, which older files keep in its inner configuration only."""
    return str(config.get("name") or config["config"]["name"])


def _named_groups(config: Mapping[str, Any], weights: Any) -> Groups:
    """``.h5``: a nested model's weights all lie in its own group, named ``layer/variable:0``."""
    for layer in sublayers(config):
        name = layer_name(layer)
        if name not in weights:
            continue
        group = _member(weights, name)
        names = [n.decode() if isinstance(n, bytes) else n for n in group.attrs["weight_names"]]
        if not sublayers(layer):
            yield (name,), {_variable(n): _dataset(group, n) for n in names}
            continue
        owners: dict[str, dict[str, Any]] = {}
        for full in names:
            owner = full.split("/")[-2]
            owners.setdefault(owner, {})[_variable(full)] = _dataset(group, full)
        for inner in _paths(layer, (name,)):
            if inner[-1] in owners:
                yield inner, owners[inner[-1]]


def _paths(config: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for layer in sublayers(config):
        path = (*above, layer_name(layer))
        yield path
        yield from _paths(layer, path)


def _numbered_groups(config: Mapping[str, Any], weights: Any, above: tuple[str, ...]) -> Groups:
    """``.keras``: ``layers/conv2d_3/vars/0`` and so on; newer files name each layer as well."""
    members = _member(weights, "layers")
    groups = {name: _member(members, name) for name in members}
    by_name = {
        str(_member(group, "vars").attrs["name"]): group
        for group in groups.values()
        if "vars" in group and "name" in _member(group, "vars").attrs
    }
    seen: Counter[str] = Counter()
    for layer in sublayers(config):
        kind = _snake_case(layer["class_name"])
        key = f"{kind}_{seen[kind]}" if seen[kind] else kind
        seen[kind] += 1
        path = (*above, layer_name(layer))
        group = by_name.get(path[-1], groups.get(key))
        if group is None:
            continue
        if sublayers(layer):
            yield from _numbered_groups(layer, group, path)
        elif "vars" in group:
            names = _variables(layer)
            yield path, {n: _dataset(_member(group, "vars"), str(i)) for i, n in enumerate(names)}


def _variables(layer: Mapping[str, Any]) -> list[str]:
    """The variables that a layer's configuration says it has, in Keras' order."""
    config, kind = layer["config"], layer["class_name"]
    if kind == "BatchNormalization":
        optional = {"gamma": config.get("scale", True), "beta": config.get("center", True)}
        return [v for v in VARIABLES[2:] if optional.get(v, True)]
    if kind in ("Conv2D", "Dense"):
        return ["kernel", "bias"] if config.get("use_bias", True) else ["kernel"]
    return []


def _variable(full: str) -> str:
    return full.rpartition("/")[2].partition(":")[0]


def _dataset(group: Any, name: str) -> Any:
    for part in name.split("/"):
        group = _member(group, part)
    if group.external or group.is_virtual:
        raise CheckpointError(f"{name} is kept in another file, which is not read")
    return group


def _member(group: Any, name: str) -> Any:
    """What the file itself holds under ``name``; links, which may lead to any file, are refused."""
    import h5py

    if not isinstance(group.get(name, getlink=True), (h5py.HardLink, type(None))):
        raise CheckpointError(f"{name} is a link, perhaps to another file, which is not followed")
    return group[name]


def _snake_case(name: str) -> str:
    """Keras' own rule: ``BatchNormalization`` is ``batch_normalization``, ``Conv2D`` ``conv2d``."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
