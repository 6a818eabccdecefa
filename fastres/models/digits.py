"""scikit-learn's real handwritten digits, and a ResNet-20 that learnt three quarters of them."""

import json
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from ..errors import MissingDependencyError
from .checkpoint import load_checkpoint, read_metadata
from .registry import create_model
from .resnet import ResNet

__all__ = ["digits_split", "load_digits_model"]

_HELDOUT_EVERY = 4


def digits_split(part: str = "heldout") -> tuple[Tensor, Tensor]:
    """The images (N, 1, 8, 8), float32 in [0, 1], and labels (N,), int64, of one part.

    part: "heldout" (every fourth image of each digit, in the dataset's order: 445 images) or
        "train" (all others: 1352). The parts are disjoint and both have every digit in proportion.

    Raises ValueError for another part and MissingDependencyError without scikit-learn.
    """
    if part not in ("heldout", "train"):
        raise ValueError(f"part must be 'heldout' or 'train', got {part!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            f"the digits come from scikit-learn, which cannot be imported ({error}); "
            "install fastres[train]"
        ) from error
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(data.target).long()
    chosen = _heldout(labels) == (part == "heldout")
    return images[chosen], labels[chosen]


def _heldout(labels: Tensor) -> Tensor:
    """(N,) bool: whether an image is the fourth, eighth, twelfth ... of its digit."""
    nth = torch.nn.functional.one_hot(labels).cumsum(0).gather(1, labels[:, None]).squeeze(1)
    return nth % _HELDOUT_EVERY == 0


def load_digits_model(**kwargs: Any) -> ResNet:
    """The shipped network in eval mode; ``kwargs`` go to its builder, e.g. ``backend="triton"``.

    (N, 1, 8, 8) images in [0, 1] -> (N, 10) logits. Trained by examples/train_digits.py. Its
    state dict's metadata says on which seed and with what accuracy.
    """
    with resources.as_file(resources.files("fastres") / "assets" / "digits.safetensors") as path:
        architecture = json.loads(read_metadata(path)["architecture"])
        model = create_model(**{**architecture, **kwargs})
        load_checkpoint(model, path)
    return model.eval()
