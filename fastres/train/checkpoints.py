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
from ..files import atomic_write, check_target
from ..models.pretrained import BEST, RUN
from .report import CURVES, METRICS

LAST, PREVIOUS, MODEL = "last.safetensors", "last.prev.safetensors", "model.safetensors"
NAN, EPOCH = "nan.safetensors", "epoch{}.safetensors"
FILES = (LAST, PREVIOUS, BEST, MODEL, NAN, METRICS, CURVES, EPOCH.format("[0-9]*"), RUN)


def pack(tree: Any) -> bytes:
    """A nest of dicts, lists, tuples, tensors, numbers, strings and None as a safetensors file.

    Raises:
        TypeError: something else is in it.
    """
    tensors: dict[str, Tensor] = {}

    def encode(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            form = torch.contiguous_format
            tensors[path] = value.detach().to("cpu", copy=True, memory_format=form)
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

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, inner),) = value.items()
        if kind == "tensor":
            return file.get_tensor(inner)
        if kind == "dict":
            return {key: decode(item) for key, item in inner}
        return (tuple if kind == "tuple" else list)(map(decode, inner))

    try:
        with safetensors.safe_open(path, "pt") as file:
            return decode(json.loads((file.metadata() or {})["fastres.train"]))
    except Exception as error:
        why = "it is no checkpoint of a run" if isinstance(error, KeyError) else error
        raise CheckpointError(f"cannot read {path}: {why}") from error


class Folder:
    """The folder of a run; nothing is changed in it before :meth:`begin` or :meth:`save`.

    Args:
        path: where it is.
        resume: whether it must hold a checkpoint to go on from; else it must hold no run.
        overwrite: whether a run in it may be replaced.

    Raises:
        ValueError: there is a run in it, or none to resume.
        OSError: it cannot be made or written to.
    """

    def __init__(self, path: str | os.PathLike[str], resume: bool, overwrite: bool) -> None:
        self.path = Path(path)
        if resume and not any((self.path / name).exists() for name in (LAST, PREVIOUS)):
            raise ValueError(f"there is no checkpoint to resume in {self.path}")
        if (self.path / RUN).exists() and not (resume or overwrite):
            raise ValueError(
                f"{self.path} holds another run: resume it, overwrite it, or choose another"
            )
        check_target(self.path / RUN, makes_folder=True)

    def begin(self) -> None:
        """Make the folder where it is missing, and remove what another run has left in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / RUN).exists():
            for pattern in FILES:
                for path in self.path.glob(pattern):
                    path.unlink()

    def save(self, tree: Any) -> None:
        """Replace the last checkpoint and keep the one before it; at any moment one is whole."""
        data, last, beside = pack(tree), self.path / LAST, self.path / f".{PREVIOUS}"
        if last.exists():  # whoever looks meanwhile finds it there
            beside.unlink(missing_ok=True)
            try:
                os.link(last, beside)
                os.replace(beside, self.path / PREVIOUS)
            except OSError:  # a file system without links
                atomic_write(self.path / PREVIOUS, last.read_bytes())
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


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of each generator that this process may draw from."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set what :func:`random_state` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
