"""Images and labels, where they come from, and the order and augmentation of a run.

Images in memory are uint8, or floating-point and then taken as they are; those of a folder are
decoded as they are needed. Small sets live on the device. Nothing is downloaded.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import warnings
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..models.classify import Crop, read_image
from ..models.digits import digits_split

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
IDX = {"train": "train", "validation": "t10k"}
ON_DEVICE = 2**31  # bytes of images that are held there
MOST_CLASSES = 1_000_000  # beyond are hashes and other numbers that are no labels
SOURCES = "digits, mnist:DIR, fashion-mnist:DIR, cifar10:DIR, a .npz file or a folder of images"


@dataclass(frozen=True)
class Split:
    """One part of a data set.

    Attributes:
        images: (N, C, H, W), uint8 or floating-point; None where they are decoded from ``source``.
        labels: (N,), int64.
        source: the files that hold the images instead.
    """

    images: Tensor | None
    labels: Tensor
    source: ImageFiles | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def on(self, device: torch.device) -> Split:
        """The labels, and images in memory of less than 2 GiB, on the device."""
        images = self.images
        if images is not None and images.nbytes < ON_DEVICE:
            images = images.to(device)
        return replace(self, images=images, labels=self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """What a run trains on and is judged by.

    Attributes:
        name: as the user gave it.
        classes: their names.
        mean: of each channel of uint8 images in [0, 1], and their ``std``; None for images that
            are taken as they are.
        skipped: files of its folders that are no images and were left out.
    """

    name: str
    train: Split
    validation: Split | None
    classes: tuple[str, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    skipped: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for images in memory that the mean and deviation are not of."""
        wanted = "floating-point" if self.mean is None else f"uint8 of {len(self.mean)} channels"
        for name, part in (("training", self.train), ("validation", self.validation)):
            if part is None or (x := part.images) is None:
                continue
            bytes_of = x.shape[1] if x.dtype is torch.uint8 else None
            if bytes_of != (None if self.mean is None else len(self.mean)):
                raise ValueError(
                    f"{name} images must be {wanted}, as those that the network is trained on; "
                    f"got {x.dtype} of {x.shape[1]} channels"
                )

    def on(self, device: torch.device) -> Data:
        """Its parts there, see :meth:`Split.on`."""
        validation = None if self.validation is None else self.validation.on(device)
        return replace(self, train=self.train.on(device), validation=validation)

    def digest(self) -> str:
        """A hash of the training images and labels; of files their names and sizes."""
        found = hashlib.sha256(self.train.labels.cpu().numpy().tobytes())
        if self.train.images is not None:
            found.update(self.train.images.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        for path in self.train.source.paths if self.train.source else ():
            found.update(f"{path.name} {path.stat().st_size}\n".encode())
        return found.hexdigest()[:16]


def open_data(spec: str, on_bad_file: str = "raise") -> Data:
    """The data set that a command names.

    Args:
        spec: ``digits``, ``mnist:DIR``, ``fashion-mnist:DIR`` (idx files, gzipped or not),
            ``cifar10:DIR`` (its Python version), a ``.npz`` file (``x_train``, ``y_train`` and
            perhaps ``x_test``, ``y_test``, as Keras' own), or a folder with ``train/CLASS/*`` and
            perhaps ``val/CLASS/*``.
        on_bad_file: of a folder, ``"raise"``, or ``"skip"`` what is no image, with a warning.

    Raises:
        ValueError: no such data set, files that are missing or damaged; the message says which.
    """
    name, _, folder = spec.partition(":")
    if spec == "digits":
        return _normalised(spec, [split_of(spec, *digits_split(p)) for p in ("train", "heldout")])
    if name in ("mnist", "fashion-mnist") and folder:
        return _normalised(spec, [_idx(Path(folder), part) for part in IDX])
    if name == "cifar10" and folder:
        return _normalised(spec, _cifar10(Path(folder)))
    if spec.endswith(".npz"):
        return _normalised(spec, _npz(Path(spec)))
    if Path(spec).is_dir():
        return _folder(Path(spec), on_bad_file)
    raise ValueError(f"there is no data set {spec!r}; give {SOURCES}")


def from_tensors(
    images: Any, labels: Any, validation: tuple[Any, Any] | None = None, name: str = "tensors"
) -> Data:
    """Data of tensors or arrays: images (N, C, H, W) or (N, H, W, C), labels (N,) or one-hot.

    Raises:
        ValueError: their shapes do not fit.
    """
    parts = [split_of("train", images, labels)]
    if validation is not None:
        parts.append(split_of("validation", *validation))
    return _normalised(name, parts)


def split_of(name: str, images: Any, labels: Any) -> Split:
    """Images and labels of any of the forms that :func:`from_tensors` takes."""
    x, y = _tensor(f"{name} images", images), _tensor(f"{name} labels", labels)
    if x.dim() == 3:
        x = x[:, None]
    if x.dim() == 4 and x.shape[1] not in (1, 3, 4) and x.shape[3] in (1, 3, 4):
        x = x.permute(0, 3, 1, 2)
    if x.dim() != 4 or not (x.dtype is torch.uint8 or x.is_floating_point()):
        raise ValueError(
            f"{name} images must be (N, C, H, W), uint8 or floating-point; "
            f"got {x.dtype} of shape {tuple(x.shape)}"
        )
    if y.dim() == 2 and y.shape[1] != 1:
        if not (((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all()):
            raise ValueError(f"{name} labels of shape {tuple(y.shape)} must be one-hot")
        y = y.argmax(1)
    y = y[:, 0] if y.dim() == 2 else y
    if y.dim() != 1 or y.is_floating_point() or len(y) != len(x) or not len(y):
        raise ValueError(
            f"{name} labels must be one integer for each of the {len(x)} images; "
            f"got {y.dtype} of shape {tuple(y.shape)}"
        )
    y = y.long()
    wrong = ((y < 0) | (y >= MOST_CLASSES)).nonzero().flatten()
    if len(wrong):
        raise ValueError(
            f"{name} labels must be integers from 0 to {MOST_CLASSES - 1:,}; "
            f"got {int(y[wrong[0]])} at index {int(wrong[0])}"
        )
    return Split(x.contiguous(), y)


def _tensor(name: str, values: Any) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        what = type(values).__name__
        raise ValueError(f"{name} must be a tensor or an array; got a {what}: {error}") from error


def _normalised(name: str, parts: Sequence[Split]) -> Data:
    train, *others = parts
    assert train.images is not None
    classes = tuple(map(str, range(int(train.labels.max()) + 1)))
    validation = others[0] if others else None
    if train.images.dtype is not torch.uint8:
        return Data(name, train, validation, classes)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in train.images.unbind(1):
        shares = torch.bincount(channel.flatten(), minlength=256) / channel.numel()
        mean.append(float((shares * values).sum()))
        std.append(float((shares * (values - mean[-1]) ** 2).sum().sqrt()) or 1.0)
    return Data(name, train, validation, classes, tuple(mean), tuple(std))


def _idx(folder: Path, part: str) -> Split:
    """An idx pair, http://yann.lecun.com/exdb/mnist: big-endian magic, sizes, bytes."""
    images = _idx_array(folder, f"{IDX[part]}-images-idx3-ubyte")
    labels = _idx_array(folder, f"{IDX[part]}-labels-idx1-ubyte")
    return split_of(part, torch.from_numpy(images), torch.from_numpy(labels).long())


def _idx_array(folder: Path, name: str) -> np.ndarray[Any, Any]:
    for path, opened in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        if path.is_file():
            try:
                with opened(path, "rb") as file:
                    data = file.read()
                sizes = np.frombuffer(data, ">i4", data[3], 4)
                values = np.frombuffer(data, np.uint8, offset=4 + 4 * len(sizes))
                return values.reshape(sizes).copy()
            except (OSError, EOFError, IndexError, ValueError) as error:
                raise ValueError(f"{path} is no idx file of bytes: {error}") from error
    raise ValueError(f"there is no {name} nor {name}.gz in {folder}: download it and put it there")


def _cifar10(folder: Path) -> list[Split]:
    from torchvision.datasets import CIFAR10

    try:  # which compares the files with their hashes before it reads them
        parts = [CIFAR10(str(folder), train=train) for train in (True, False)]
    except RuntimeError as error:
        raise ValueError(
            f"there is no whole CIFAR-10 in {folder}: unpack cifar-10-python.tar.gz there ({error})"
        ) from error
    return [split_of("cifar10", part.data, part.targets) for part in parts]


def _npz(path: Path) -> list[Split]:
    if path.is_file() and not zipfile.is_zipfile(path):
        raise ValueError(f"cannot read {path}: it is no .npz file, or half of one")
    try:
        with np.load(path, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not {"x_train", "y_train"} <= arrays.keys():
        raise ValueError(f"{path} must hold x_train and y_train; got {', '.join(arrays) or 'none'}")
    if len({"x_test", "y_test"} & arrays.keys()) == 1:
        raise ValueError(f"{path} must hold x_test and y_test, or neither")
    parts = [split_of("x_train", arrays["x_train"], arrays["y_train"])]
    if "x_test" in arrays:
        parts.append(split_of("x_test", arrays["x_test"], arrays["y_test"]))
    return parts


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Images of class folders. ``self[epoch, index]`` depends on nothing but these and the seed.

    Args:
        paths: the files, and their ``labels``.
        size: height and width.
        seed: of the augmentation; None for none: the middle of the resized image.
    """

    def __init__(
        self, paths: list[Path], labels: list[int], size: int = 224, seed: int | None = None
    ) -> None:
        self.paths, self.labels, self.seed = paths, labels, seed
        from torchvision.transforms import v2
        from torchvision.transforms._presets import ImageClassification

        self.transform: Any
        if seed is None:
            middle = ImageClassification(crop_size=size, resize_size=round(size / 0.875))
            self.transform = Crop(middle)
        else:
            parts = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()]
            self.transform = v2.Compose(parts)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        if self.seed is None:
            return read_image(self.paths[index], self.transform), self.labels[index]
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(mixed(self.seed, epoch, index))
            return read_image(self.paths[index], self.transform), self.labels[index]


def _folder(root: Path, on_bad_file: str) -> Data:
    if not (root / "train").is_dir():
        raise ValueError(f"{root} must hold train/CLASS/*.jpg and perhaps val/CLASS/*.jpg")
    train = image_files(root / "train", on_bad_file)
    if not (root / "val").is_dir():
        return replace(train, name=str(root))
    val = image_files(root / "val", on_bad_file)
    if val.classes != train.classes:
        odd = ", ".join(sorted(set(train.classes) ^ set(val.classes)))
        raise ValueError(
            f"{root}/train and {root}/val must have the same classes; not in both: {odd}"
        )
    skipped = train.skipped + val.skipped
    return replace(train, name=str(root), validation=val.train, skipped=skipped)


def image_files(folder: Path, on_bad_file: str = "raise") -> Data:
    """The images of ``folder/CLASS/*`` to train on, each looked at.

    Raises:
        ValueError: a class without images, or files that are none where those are not skipped.
    """
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:  # a class without images, or no class
        raise ValueError(f"{folder} is no folder of classes: {error}") from error
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        faults = list(threads.map(_fault, (path for path, _ in found.samples)))
    bad = [f"{p} ({f})" for (p, _), f in zip(found.samples, faults, strict=True) if f]
    if bad:
        listed = "; ".join(bad[:10]) + ("; ..." if len(bad) > 10 else "")
        text = f"{len(bad)} of {len(faults)} files are no images: {listed}"
        if on_bad_file != "skip":
            raise ValueError(f"{text}; on_bad_file=skip leaves them out")
        warnings.warn(f"left out, {text}", stacklevel=2)
    kept = [sample for sample, fault in zip(found.samples, faults, strict=True) if not fault]
    labels = [label for _, label in kept]
    if empty := [name for name, label in found.class_to_idx.items() if label not in {*labels}]:
        raise ValueError(f"{folder} has no image that can be read of {', '.join(empty)}")
    source = ImageFiles([Path(path) for path, _ in kept], labels)
    split, classes = Split(None, torch.tensor(labels), source), tuple(found.classes)
    return Data(str(folder), split, None, classes, *IMAGENET, skipped=len(bad))


def _fault(path: str) -> str:
    """What is wrong with an image that cannot be decoded whole; empty for others."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.draft(None, (1, 1))  # a JPEG at an eighth of its size
            image.load()
    except Exception as error:  # damaged files raise nearly anything in Pillow
        return type(error).__name__
    return ""


def mixed(*numbers: int) -> int:
    """A seed made of several numbers, of which no two lists have the same in practice."""
    text = " ".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")


def generator(*numbers: int) -> torch.Generator:
    """A generator on the CPU, seeded by :func:`mixed`."""
    return torch.Generator().manual_seed(mixed(*numbers))
