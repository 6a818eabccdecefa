"""Photographs to labels, with torchvision's own preprocessing and class names."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import MissingDependencyError
from .preprocess import Normalize
from .pretrained import load_network
from .weights import get_weights

BATCH = 32
LONGEST = 16  # times the shorter side, beyond which an image is not resized as a whole
ORIENTATION = 0x0112  # the EXIF tag of how a camera was held


@dataclass(frozen=True)
class Classified:
    """One photograph and its most probable labels, best first, each with its probability."""

    path: str
    top: tuple[tuple[str, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        top = [{"label": label, "probability": value} for label, value in self.top]
        return {"path": self.path, "top": top}


def classify(
    paths: Sequence[str | os.PathLike[str]],
    *,
    model: str = "resnet50",
    weights: str = "DEFAULT",
    checkpoint: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    top: int = 5,
    progress: bool = True,
) -> list[Classified]:
    """Classify image files, in their order.

    Args:
        paths: files that Pillow can read.
        model: a network with published ImageNet weights.
        weights: which of them; they also decide the preprocessing and the labels.
        checkpoint: a local file to take the parameters from instead of downloading them. With
            another number of classes than the labels', classes are numbered.
        device: where the network runs.
        top: how many labels for each photograph.
        progress: show a bar while downloading.

    Raises:
        ValueError: for an unreadable image, unknown weights or a ``top`` below 1; nothing has been
            downloaded by then.
        UnknownModelError, WeightsError, CheckpointError, FileNotFoundError: as they say.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    source = get_weights(model, weights)
    preset, names = source.transforms(), source.categories()
    crop, normalize = Crop(preset), Normalize.like(preset).to(device)
    images = [read_image(path, crop) for path in paths]
    network = load_network(
        model,
        weights=None if checkpoint else source,
        checkpoint=checkpoint,
        progress=progress,
    ).to(device)
    with torch.inference_mode():
        batches = torch.stack(images).split(BATCH)
        logits = torch.cat([network(normalize(batch.to(device))).cpu() for batch in batches])
    if logits.shape[1] != len(names):
        names = [f"class {index}" for index in range(logits.shape[1])]
    best = logits.float().softmax(1).topk(min(top, len(names)))
    return [
        Classified(str(path), tuple((names[i], p) for i, p in zip(chosen, values, strict=True)))
        for path, chosen, values in zip(
            paths, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]


class Crop:
    """torchvision's preset before it normalises: an RGB image of Pillow -> uint8 (3, crop, crop).

    Args:
        preset: torchvision's ``weights.transforms()``.
    """

    def __init__(self, preset: Any) -> None:
        self.preset = preset

    def __call__(self, image: Any) -> Tensor:
        from torchvision.transforms import functional as F

        how = {"interpolation": self.preset.interpolation, "antialias": self.preset.antialias}
        (resized,), (side,) = self.preset.resize_size, self.preset.crop_size
        if max(image.size) > LONGEST * min(image.size) and side <= resized:
            return F.pil_to_tensor(_middle(image, resized, side, self.preset.interpolation))
        image = F.resize(image, self.preset.resize_size, **how)
        return F.pil_to_tensor(F.center_crop(image, self.preset.crop_size))


def _middle(image: Any, resized: int, side: int, interpolation: Any) -> Any:
    """The middle of a resized image, without the rest, which can be millions of times larger."""
    from torchvision.transforms import functional as F

    axis = int(image.height > image.width)
    length = int(resized * image.size[axis] / image.size[1 - axis])
    scale = image.size[axis] / length
    begin, end = (round((length - side) / 2.0) * scale + part * scale for part in (0, side))
    # Whole pixels with a margin first: Pillow's box is of float32, exact enough near zero only.
    margin = 2 * max(1.0, scale) + 1
    low, high = max(0, int(begin - margin)), min(image.size[axis], math.ceil(end + margin))
    crop, box, size = [0, 0, *image.size], [0.0, 0.0, *map(float, image.size)], [resized] * 2
    crop[axis], crop[axis + 2] = low, high
    box[axis], box[axis + 2], size[axis] = begin - low, end - low, side
    strip = image.crop(crop).resize(size, F.pil_modes_mapping[interpolation], tuple(box))
    return F.center_crop(strip, [side])


def read_image(path: str | os.PathLike[str], preprocess: Callable[[Any], Tensor]) -> Tensor:
    """The preprocessed RGB image of a file, upright, (3, H, W). Raises ValueError if it is none."""
    return decode(path, preprocess)[0]


def decode(
    source: str | os.PathLike[str] | bytes,
    preprocess: Callable[[Any], Tensor],
    at_least: int | None = None,
) -> tuple[Tensor, int, int]:
    """The preprocessed RGB image, upright, with its own width and height.

    Args:
        source: a file, or what is in it.
        preprocess: gets an RGB image of Pillow.
        at_least: a JPEG may be decoded at a half, a quarter or an eighth of its size, as long as no
            side gets shorter than so many pixels; that is faster, and its pixels differ slightly.

    Raises:
        ValueError: it is no image that Pillow can read, or one of more than twice
            ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingDependencyError(
            f"reading images needs Pillow, which cannot be imported ({error}); "
            "install fastres[vision]"
        ) from error
    name = "" if isinstance(source, bytes) else f" {os.fspath(source)!r}"
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            if image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8):  # of a camera held upright
                width, height = height, width
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            return preprocess(_rgb(ImageOps.exif_transpose(image))), width, height
    except FileNotFoundError:
        raise ValueError(f"cannot read image{name}: there is no such file") from None
    except Exception as error:
        # Damaged files raise nearly anything in Pillow: OSError, SyntaxError, struct.error.
        reason = str(error).partition("\n")[0].partition(" <_io")[0] or type(error).__name__
        raise ValueError(f"cannot read image{name}: {reason}") from error


def _rgb(image: Any) -> Any:
    """8-bit RGB of any image; of more than 8 bits, Pillow would cut off what is above 255."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers of no known range (mode {image.mode})")
    return image.convert("RGB")
