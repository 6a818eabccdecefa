"""Keras' files without Keras: the configuration and the weights of ``.h5`` and ``.keras``.

``.h5`` (Keras 1 to 3): an attribute ``model_config``; each ``model_weights/<layer>`` lists its
``weight_names``. ``.keras`` (Keras 3): a zip of ``config.json`` and ``model.weights.h5``, whose
groups are named after the layers' classes and counted in the order of the layers. Only numbers and
JSON are read, and only what is there: an array that is declared but not stored, or that would take
far more memory than the file, is refused before it is taken.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, MissingDependencyError

# The order in which Keras 3 numbers a layer's variables.
VARIABLES = ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance")
LAYERS, EARLY_LAYERS = "layers", "_layer_checkpoint_dependencies"  # the second until tf.keras 2.13
# Keras compresses nothing, and trained weights shrink by a quarter: a file of honest numbers, even
# where many are zero, comes nowhere near these.
EXPANSION = 20
FLOOR = 2**20


class KerasFile:
    """An open file: ``config`` is the model's, ``read`` gives the weights of one layer.

    Raises:
        FileNotFoundError: there is no such file.
        MissingDependencyError: without h5py.
        CheckpointError: it is no Keras model, or only its weights; or it would take more memory
            than ``EXPANSION`` times its own size (and ``FLOOR`` bytes).
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
        self.allowed = EXPANSION * self.path.stat().st_size + FLOOR
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
            for member in map(archive.getinfo, ("config.json", "model.weights.h5")):
                if member.file_size > self.allowed:
                    raise self._bomb(member.filename, member.file_size)
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
            CheckpointError: a variable is missing, unexpected, misshapen, not of numbers or not
                really stored.
        """
        layer = "/".join(path)
        found = self._groups.get(path, {})
        if set(found) != set(shapes):
            hint = "" if found else "; of a layer in two models, .keras files hold one: save as .h5"
            raise CheckpointError(
                f"{self.path}: layer {layer!r} has {sorted(found)}, wanted {sorted(shapes)}{hint}"
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
        if not _stored_whole(dataset):
            raise CheckpointError(f"{self.path}: {name} is declared, {shape}, but not stored")
        self.allowed -= dataset.nbytes
        if self.allowed < 0:
            raise self._bomb(name, dataset.nbytes)
        return torch.from_numpy(dataset[()].astype("float32"))

    def _bomb(self, name: str, size: int) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {name} declares {size} bytes, far more than a file of its size holds"
        )


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
        if weights.get(name.partition("/")[0], getlink=True) is None:
            continue
        group = _member(weights, name)
        names = _weight_names(group)
        if not sublayers(layer):
            yield (name,), {_variable(n): _member(group, n) for n in names}
            continue
        tails: dict[str, list[tuple[str, ...]]] = {}
        places = list(_places(layer, (name,), frozen=False))
        for path in dict.fromkeys(path for path, _, _ in places):
            for start in range(len(path)):
                tails.setdefault("/".join(path[start:]), []).append(path)
        found: dict[tuple[str, ...], dict[str, Any]] = {}
        for full in names:
            parts = full.split("/")[:-1]
            owners = ("/".join(parts[start:]) for start in range(len(parts)))
            # Names are unique in a group: where several layers answer to one, they share weights.
            for path in next((tails[owner] for owner in owners if owner in tails), ()):
                found.setdefault(path, {})[_variable(full)] = _member(group, full)
        if {(path, v) for path, v, _ in places} != {(p, v) for p in found for v in found[p]}:
            # A layer renamed after it was built: Keras itself goes by the order, frozen ones last.
            places.sort(key=lambda place: place[2])
            if [v for _, v, _ in places] == [_variable(full) for full in names]:
                found = {path: {} for path, _, _ in places}
                for (path, variable, _), full in zip(places, names, strict=True):
                    found[path][variable] = _member(group, full)
        yield from found.items()


def _weight_names(group: Any) -> list[str]:
    """The attribute ``weight_names``; a long one is written in pieces."""
    keys = ("weight_names", *(f"weight_names{i}" for i in range(len(group.attrs))))
    names = [name for key in keys if key in group.attrs for name in group.attrs[key]]
    return [n.decode() if isinstance(n, bytes) else str(n) for n in names]


def _places(
    config: Mapping[str, Any], above: tuple[str, ...], *, frozen: bool
) -> Iterator[tuple[tuple[str, ...], str, bool]]:
    """Each variable's layer and name, and whether it is frozen."""
    for layer in sublayers(config):
        path = (*above, layer_name(layer))
        inner = layer["config"] if isinstance(layer["config"], Mapping) else {}
        still = frozen or not inner.get("trainable", True)
        if sublayers(layer):
            yield from _places(layer, path, frozen=still)
        for variable in _variables(layer):
            yield path, variable, still or variable.startswith("moving")


def _numbered_groups(config: Mapping[str, Any], weights: Any, above: tuple[str, ...]) -> Groups:
    """``.keras``: ``layers/conv2d_3/vars/0`` and so on; newer files name each layer as well."""
    members = _member(weights, LAYERS if LAYERS in weights else EARLY_LAYERS)
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
        group = by_name.get(path[-1]) if by_name else groups.get(key)
        if group is None:
            continue
        if sublayers(layer):
            if LAYERS in group or EARLY_LAYERS in group:
                yield from _numbered_groups(layer, group, path)
        elif "vars" in group:
            stored = _member(group, "vars")
            names = [*_variables(layer), *map(str, range(len(_variables(layer)), len(stored)))]
            yield path, {n: _member(stored, str(i)) for i, n in enumerate(names)}


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


def _member(group: Any, path: str) -> Any:
    """What the file itself holds under ``path``; links, which may lead to any file, are refused."""
    import h5py

    for name in path.split("/"):
        if not isinstance(group.get(name, getlink=True), (h5py.HardLink, type(None))):
            raise CheckpointError(f"{path} is a link, perhaps to another file, and not followed")
        group = group[name]
    if isinstance(group, h5py.Dataset) and (group.external or group.is_virtual):
        raise CheckpointError(f"{path} is kept in another file, which is not read")
    return group


def _stored_whole(dataset: Any) -> bool:
    """Whether every number is in the file: HDF5 reads what was never written as zeros."""
    if dataset.chunks is None:
        return bool(dataset.id.get_storage_size() >= dataset.nbytes)
    chunks = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
    return bool(dataset.id.get_num_chunks() == chunks)


def _snake_case(name: str) -> str:
    """Keras' own rule: ``BatchNormalization`` is ``batch_normalization``, ``Conv2D`` ``conv2d``."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
