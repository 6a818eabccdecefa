"""A network by name, with weights from the table of published ones or from a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import read_text
from .checkpoint import load_state_dict, odd_form, state_dict_from_file
from .registry import create_model
from .resnet import ResNet

PREFIXES = ("module.", "_orig_mod.")
RUN, BEST = "config.json", "best.safetensors"


def load_network(
    name: str,
    *,
    weights: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> ResNet:
    """Build ``name`` in eval mode.

    Args:
        name: as :func:`fastres.create_model` knows it, or the folder of a run of
            ``fastres train``, of which the best epoch's weights are taken.
        weights: published weights, to be downloaded.
        checkpoint: a file that holds the weights instead; the number of classes, the input channels
            and the stem are read off its shapes.
        progress: show a bar while downloading.
        kwargs: further arguments of the model.

    Raises:
        ValueError: both weights and a checkpoint, or either of them with a run.
        UnknownModelError, WeightsError, CheckpointError, FileNotFoundError: as they say.
    """
    if weights is not None and checkpoint is not None:
        raise ValueError(f"give weights or checkpoint, not both; got {weights} and {checkpoint}")
    if is_run(name):
        if weights is not None or checkpoint is not None:
            raise ValueError(f"weights and checkpoint do not go with {name}, which has weights")
        held, checkpoint = read_run(name), Path(name) / BEST
        arguments = dict(held.get("arguments") or {})
        known = {k: arguments[k] for k in ("residual", "stem") if arguments.get(k) is not None}
        name, kwargs = str(held.get("model")), {**known, **kwargs}
    if checkpoint is None:
        return create_model(name, weights=weights, progress=progress, **kwargs).eval()
    state = state_dict_from_file(checkpoint)
    model = create_model(name, **{**arguments_from(state), **kwargs})
    load_state_dict(model, state, source=str(checkpoint), strip=PREFIXES)
    return model.eval()


def is_run(name: str) -> bool:
    """Whether it is the folder of a run of ``fastres train``."""
    return (Path(name) / RUN).is_file()


def read_run(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The options, network, data and versions of a run, as its ``config.json`` has them.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    try:
        config = json.loads(read_text(Path(folder) / RUN, 2**20))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no folder of a run: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder} is no folder of a run: {RUN} holds no object")
    return config


def arguments_from(state: Mapping[str, Any]) -> dict[str, Any]:
    """The model arguments that the shapes of a state dict tell: classes, channels and stem."""
    found: dict[str, Any] = {}
    conv1, fc = _outermost(state, "conv1.weight"), _outermost(state, "fc.weight")
    if conv1 is not None and conv1.dim() == 4:
        found["in_chans"] = conv1.shape[1]
        found["stem"] = "cifar" if conv1.shape[-1] == 3 else "imagenet"
    if fc is not None and fc.dim() == 2:
        found["num_classes"] = fc.shape[0]
    return found


def _outermost(state: Mapping[str, Any], name: str) -> Tensor | None:
    """The tensor called ``name`` under the fewest prefixes, if it has the values of its shape."""
    names = [key for key in state if key == name or key.endswith(f".{name}")]
    value = state[min(names, key=len)] if names else None
    if not isinstance(value, Tensor) or odd_form(value):
        return None
    stored = value.untyped_storage().nbytes() // value.itemsize
    return value if stored >= value.numel() else None
