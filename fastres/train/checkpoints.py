"""A run's folder: its options, its last checkpoint and the one before, its best weights.

A checkpoint is one safetensors file: the tensors of a nest of dicts and lists, and the nest itself
as JSON. Nothing is pickled, and every file is written whole or not at all.
"""

from __future__ import annotations

import json
import os
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import atomic_write, read_text
from ..models.pretrained import load_network
from ..models.resnet import ResNet

CONFIG, LAST, PREVIOUS, BEST, MODEL = (
    *("config.json", "last.safetensors", "last.prev.safetensors"),
    *("best.safetensors", "model.safetensors"),
)


def pack(tree: Any) -> bytes:
    """A nest of dicts, lists, tuples, tensors, numbers, strings and None as a safetensors file.

    Raises:
        TypeError: something else is in it.
    """
    tensors: dict[str, Tensor] = {}

    def encode(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value.detach().to(
                "cpu", copy=True, memory_format=torch.contiguous_format
            )
            return {"tensor": path}
        if isinstance(value, dict):
            return {"dict": [[k, encode(v, f"{path}/{k}")] for k, v in value.items()]}
        if isinstance(value, (list, tuple)):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [encode(v, f"{path}/{i}") for i, v in enumerate(value)]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"cannot save {path}: it is a {type(value).__name__}")

    state = json.dumps(encode(tree, ""))
    return safetensors.torch.save(tensors, {"fastres.train": state})


def unpack(path: Path) -> Any:
    """What :func:`pack` was given.

    Raises:
        CheckpointError: the file cannot be read, or is none of a run.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            return _decode(json.loads((file.metadata() or {})["fastres.train"]), file)
    except Exception as error:
        why = "it is no checkpoint of a run" if isinstance(error, KeyError) else error
        raise CheckpointError(f"cannot read {path}: {why}") from error


def _decode(value: Any, file: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return file.get_tensor(inner)
    if kind == "dict":
        return {key: _decode(item, file) for key, item in inner}
    items = [_decode(item, file) for item in inner]
    return tuple(items) if kind == "tuple" else items


class Folder:
    """The folder of a run.

    Args:
        path: made where it is missing.
        resume: whether it must hold a checkpoint to go on from; else it must hold no run.
        overwrite: whether a run in it may be replaced.

    Raises:
        ValueError: there is a run in it, or none to resume.
        OSError: it cannot be made or written to.
    """

    def __init__(self, path: str | os.PathLike[str], resume: bool, overwrite: bool) -> None:
        self.path = Path(path)
        held = [name for name in (LAST, PREVIOUS) if (self.path / name).exists()]
        if resume and not held:
            raise ValueError(f"there is no checkpoint to resume in {self.path}")
        if (self.path / CONFIG).exists() and not resume:
            if not overwrite:
                raise ValueError(
                    f"{self.path} holds another run: resume it, overwrite it, or choose another"
                )
            for name in (CONFIG, LAST, PREVIOUS, BEST, MODEL):
                (self.path / name).unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)

    def write_config(self, config: dict[str, Any]) -> None:
        """Options, data and versions, for a reader and for resuming."""
        atomic_write(self.path / CONFIG, (json.dumps(config, indent=1) + "\n").encode())

    def save(self, tree: Any) -> None:
        """Replace the last checkpoint and keep the one before it; at any moment one is whole."""
        data, last, previous = pack(tree), self.path / LAST, self.path / PREVIOUS
        if last.exists():
            beside = previous.with_name(f".{PREVIOUS}")
            beside.unlink(missing_ok=True)
            try:
                os.link(last, beside)
                os.replace(beside, previous)
            except OSError:  # a file system without links
                atomic_write(previous, last.read_bytes())
        atomic_write(last, data)

    def load(self) -> Any:
        """The last checkpoint, or where that cannot be read the one before it.

        Raises:
            CheckpointError: neither can be read.
        """
        try:
            return unpack(self.path / LAST)
        except CheckpointError as error:
            if not (self.path / PREVIOUS).exists():
                raise
            warnings.warn(f"fastres goes on from {PREVIOUS}: {error}", stacklevel=2)
        return unpack(self.path / PREVIOUS)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """A run's ``config.json``.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    path = Path(folder) / CONFIG
    try:
        config = json.loads(read_text(path, 2**20))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no folder of a run: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder} is no folder of a run: {CONFIG} holds no object")
    return config


def load_trained(folder: str | os.PathLike[str]) -> ResNet:
    """The network of a run of ``fastres train``, with the weights of its best epoch.

    Raises:
        ValueError, UnknownModelError, CheckpointError: the folder holds none.
    """
    held = read_config(folder)
    arguments = dict(held.get("arguments") or {})
    known = {k: arguments[k] for k in ("residual", "stem") if arguments.get(k) is not None}
    return load_network(str(held.get("model")), checkpoint=Path(folder) / BEST, **known)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of each generator that this process may draw from."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.array(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set what :func:`random_state` gave."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
