"""What a worker holds: a fused network, and images in bytes to rows with labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..bench.run import parse_device, parse_dtype
from ..errors import MissingDependencyError
from ..files import read_text
from ..frontends.fast_model import FastModel
from ..frontends.optimize import optimize
from ..models.checkpoint import digest
from ..models.classify import Crop, decode
from ..models.preprocess import Normalize
from .network import open_classifier

if TYPE_CHECKING:
    import pyarrow as pa

EMBEDDINGS = ("avgpool", "layer4")
Image = bytes | Callable[[], bytes]


@dataclass(frozen=True)
class Row:
    """One image's answer.

    Attributes:
        labels: indices of the most probable classes, best first; None beside an error.
        names: theirs.
        probabilities: theirs, by softmax over all classes.
        embedding: (D,) numbers, float16 of a float16 network and else float32; None unless asked.
        error: why there is no answer; None where there is one.
        width: of the image, upright, in pixels; None beside an error.
        height: likewise.
    """

    labels: list[int] | None = None
    names: list[str] | None = None
    probabilities: list[float] | None = None
    embedding: np.ndarray[Any, Any] | None = None
    error: str | None = None
    width: int | None = None
    height: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        embedding = None if self.embedding is None else self.embedding.tolist()
        return {**asdict(self), "embedding": embedding}


class Classifier:
    """Images to labels, with the preprocessing of :func:`fastres.models.classify.classify`.

    The arguments are plain data, so that a worker on another machine can build one, as Ray Data
    does: ``dataset.map_batches(Classifier, fn_constructor_kwargs={"model": ...})``.

    Args:
        model: a network with published weights, a fused ``.safetensors`` file (8-bit ones too), or
            the folder of a training run on images in folders.
        weights: which published weights; they decide the preprocessing and the names too. With a
            fused file ``"ResNet50_Weights.IMAGENET1K_V2"`` names those it was made of; by default
            it gets a side of 256 pixels cut to 224.
        checkpoint: a file to take a network's parameters from instead of downloading them. With
            another number of classes than the names', classes are numbered.
        labels: a text file with the name of each class, one to a line.
        dtype: ``"auto"`` is a file's own, else bfloat16 on CUDA and float32 on a CPU.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        top: how many labels for each image.
        embeddings: ``"avgpool"`` (pooled features) or ``"layer4"`` (the last map, flattened).
        fast_decode: decode large JPEGs at reduced size; the pixels differ slightly.
        batch_size: images that the network takes at once; by default 8 on a CPU, 64 on CUDA.
        threads: of torch, set for the whole process; None leaves them.
        decode_threads: that read and decode images, beside the one of the network.

    Raises:
        ValueError: an argument out of its range, or names that do not fit the number of classes.
        UnknownModelError, WeightsError, CheckpointError, OSError: as they say.
    """

    def __init__(
        self,
        model: str = "resnet50",
        *,
        weights: str = "DEFAULT",
        checkpoint: str | os.PathLike[str] | None = None,
        labels: str | os.PathLike[str] | None = None,
        dtype: str = "auto",
        device: str = "auto",
        top: int = 5,
        embeddings: str | None = None,
        fast_decode: bool = False,
        batch_size: int | None = None,
        threads: int | None = None,
        decode_threads: int | None = None,
    ) -> None:
        check_counts(top=top, batch_size=batch_size, threads=threads, decode_threads=decode_threads)
        if embeddings not in (None, *EMBEDDINGS):
            raise ValueError(
                f"embeddings must be one of {', '.join(EMBEDDINGS)}; got {embeddings!r}"
            )
        self.device = parse_device(device)
        kind = None if dtype == "auto" else parse_dtype(dtype)
        named = None if labels is None else read_text(labels, 2**24).splitlines()
        if threads is not None:
            torch.set_num_threads(threads)
        source = open_classifier(os.fspath(model), weights, checkpoint)
        self.crop, self.top, self.embeddings = Crop(source.preset), top, embeddings
        self.batch_size = batch_size or (64 if self.device.type == "cuda" else 8)
        self.at_least = 2 * source.preset.resize_size[0] if fast_decode else None
        self.weights_hash = digest(source.network.state_dict())
        self.network, self.dtype = self._fused(source.network, kind)
        classes = self._classes()
        self.names = named or source.names or []
        if named is not None and len(named) != classes:
            raise ValueError(
                f"labels must have a line for each of the {classes} classes; {labels} has "
                f"{len(named)}"
            )
        if len(self.names) != classes:
            self.names = [f"class {index}" for index in range(classes)]
        self._threads = ThreadPoolExecutor(decode_threads) if decode_threads else None

    def rows(self, images: Sequence[Image]) -> list[Row]:
        """The answers for image files in bytes, in their order; a bad image is a row with an error.

        images: what is in each file, or a function that reads it; its OSError is the row's error.
        """
        left, found = iter(images), []
        while batch := list(islice(left, self.batch_size)):
            decoded = list((self._threads.map if self._threads else map)(self._decode, batch))
            good = [image for image, _ in decoded if image is not None]
            answers = self._answers(torch.stack(good)) if good else iter(())
            for image, row in decoded:
                answer = row if image is None else next(answers)
                found.append(replace(answer, width=row.width, height=row.height))
        return found

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        """A batch of Ray Data with columns ``bytes`` and ``id`` -> a table of :meth:`table`."""
        return self.table(list(batch["id"]), self.rows(list(batch["bytes"])))

    def schema(self) -> pa.Schema:
        """The columns of :meth:`table`, whatever is in them."""
        pa = pyarrow()
        number = pa.float16() if self.dtype is torch.float16 else pa.float32()
        columns = {
            "id": pa.string(),
            "labels": pa.list_(pa.int32()),
            "names": pa.list_(pa.string()),
            "probabilities": pa.list_(pa.float32()),
            "embedding": pa.list_(number, self.width) if self.embeddings else None,
            "error": pa.string(),
            "width": pa.int32(),
            "height": pa.int32(),
        }
        return pa.schema({name: kind for name, kind in columns.items() if kind is not None})

    def table(self, ids: Sequence[str], rows: Sequence[Row]) -> pa.Table:
        """Rows with their ids as an Arrow table; ``embedding`` is a column where it was asked."""
        columns = {"id": ids, **{n: [getattr(r, n) for r in rows] for n in Row.__annotations__}}
        schema = self.schema()
        return pyarrow().table({name: columns[name] for name in schema.names}, schema=schema)

    def to_dict(self) -> dict[str, Any]:
        """What its answers depend on, as plain data for JSON."""
        preset = self.crop.preset
        return {
            "weights_sha256": self.weights_hash,
            "names_sha256": hashlib.sha256("\n".join(self.names).encode()).hexdigest(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "preprocessing": {
                "resize": preset.resize_size[0],
                "crop": preset.crop_size[0],
                "mean": list(preset.mean),
                "std": list(preset.std),
                "fast_decode": self.at_least is not None,
            },
            "top": self.top,
            "embeddings": self.embeddings,
        }

    def _fused(self, network: nn.Module, kind: torch.dtype | None) -> tuple[nn.Module, torch.dtype]:
        """From uint8 images to logits, on the device."""
        normalize: nn.Module = Normalize.like(self.crop.preset)
        if isinstance(network, FastModel):
            if self.embeddings:
                raise ValueError("embeddings need the network itself; a fused file gives logits")
            if kind not in (None, network.dtype):
                raise ValueError(f"dtype must be the file's own, {network.dtype}; got {kind}")
            if network.takes_bytes:
                return network.to(self.device), network.dtype
            both = nn.Sequential(normalize.to(network.dtype), network)
            return both.to(self.device).eval(), network.dtype
        kind = kind or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        whole = _WithEmbedding(network, self.embeddings) if self.embeddings else network
        source = nn.Sequential(normalize, whole).eval().to(self.device)
        side = self.crop.preset.crop_size[0]
        drawn = torch.Generator().manual_seed(0)
        example = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=drawn)
        return optimize(source, example.to(self.device), dtype=kind), kind

    def _classes(self) -> int:
        """Their number, from one image."""
        side = self.crop.preset.crop_size[0]
        found = self._run(torch.zeros(1, 3, side, side, dtype=torch.uint8))
        logits, self.width = found[0], found[1].shape[1] if self.embeddings else 0
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise ValueError("model must give logits (N, classes); it gives something else")
        return logits.shape[1]

    def _run(self, images: Tensor) -> Sequence[Tensor]:
        with torch.inference_mode():
            found = self.network(images.to(self.device, non_blocking=True))
        return found if isinstance(found, (tuple, list)) else (found,)

    def _decode(self, image: Image) -> tuple[Tensor | None, Row]:
        try:
            data = image if isinstance(image, bytes) else image()
            pixels, width, height = decode(data, self.crop, self.at_least)
        except FileNotFoundError:
            return None, Row(error="there is no such file")
        except (OSError, ValueError) as error:
            return None, Row(error=str(error).partition("\n")[0])
        return pixels, Row(width=width, height=height)

    def _answers(self, images: Tensor) -> Iterator[Row]:
        count = len(images)
        if self.device.type == "cuda" and count < self.batch_size:  # a new shape is a new graph
            images = torch.cat([images, images[:1].expand(self.batch_size - count, -1, -1, -1)])
        logits, *embedding = (value[:count].float().cpu() for value in self._run(images))
        best = logits.softmax(1).topk(min(self.top, len(self.names)))
        for i, (labels, values) in enumerate(
            zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ):
            vector = embedding[0][i].numpy() if embedding else None
            if vector is not None and self.dtype is torch.float16:
                vector = vector.astype(np.float16)
            yield Row(labels, [self.names[label] for label in labels], values, vector)


class _WithEmbedding(nn.Module):
    """Images -> logits, and (N, D) of what one of the network's modules gives."""

    def __init__(self, network: Any, name: str) -> None:
        super().__init__()
        self.network, self.name = network, name

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.network.forward_features(x)
        pooled = self.network.forward_head(maps, pre_logits=True)
        return self.network.fc(pooled), pooled if self.name == "avgpool" else maps.flatten(1)


def check_counts(*, optional: bool = True, **counts: int | None) -> None:
    """Raises ValueError for what is no integer from 1 on, nor None where that is ``optional``."""
    for name, value in counts.items():
        if not (optional and value is None) and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be an integer from 1 on; got {value!r}")


def pyarrow() -> Any:
    """The package. Raises MissingDependencyError with advice."""
    try:
        import pyarrow
    except ImportError as error:
        raise MissingDependencyError(
            f"batch jobs need pyarrow, which cannot be imported ({error}); install fastres[batch]"
        ) from error
    return pyarrow
