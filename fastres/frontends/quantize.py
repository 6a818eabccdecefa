"""A trained network in 8 bits: calibrated on images, and compared with itself on others."""

from __future__ import annotations

import copy
import hashlib
import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..backends.select import check_backend
from ..errors import QuantizationError
from ..runtime.verify import undisturbed
from .calibrate import Calibration, decibels
from .fast_model import FastModel
from .fast_shell import FastShell
from .optimize import optimize

BATCH = 32
FEW = 32  # images: with fewer the digits network lost 2 dB and more
CALIBRATORS = re.compile(r"mse|max|percentile:\d+(\.\d+)?")
COLUMNS = ("step", "kernel", "scale", "zero", "clipped", "weight dB", "own dB", "so far dB")

Batches = list[tuple[Tensor, Tensor | None]]  # images, and labels where there are some
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Quantization:
    """What :func:`quantize` measured, on images that were held back; ``str()`` is a table.

    Attributes:
        steps: a row for each 8-bit convolution: path, kernel, scale and zero of its result (None
            for floats), share of values outside of them, and the signal to noise in dB of its
            weights, of its result on its own inputs, and of its result in the whole.
        left: the convolutions that stay in floating point, each with the reason.
        db: signal to noise of the outputs.
        agreement: share of images with the float network's largest logit; None without logits.
        interval: of 95 % for the agreement, Wilson's.
        accuracy: in floats and in 8 bits; None without labels.
        images: how many were calibrated on.
        held_out: how many were compared.
        calibrator: what the scales are by: what was asked for, or ``"max"`` where that was better.
        digest: SHA-256 of all images.
        version: PyTorch's.
        seconds: that all took.
    """

    steps: tuple[Any, ...]
    left: tuple[Any, ...]
    db: float
    agreement: float | None
    interval: tuple[Any, ...]
    accuracy: tuple[Any, ...] | None
    images: int
    held_out: int
    calibrator: str
    digest: str
    version: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [COLUMNS, *(tuple(map(_cell, row)) for row in self.steps)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join(
            [*lines, *(f"in floats: {s}: {why}" for s, why in self.left), self.summary()]
        )

    def summary(self) -> str:
        """The figures of the whole network in a line."""
        text = f"{len(self.steps)} of {len(self.steps) + len(self.left)} convolutions in 8 bits, "
        text += f"calibrated on {self.images} images; on {self.held_out} others {self.db:.1f} dB"
        if self.agreement is not None:
            low, high = self.interval
            text += f", agreement {self.agreement:.2%} ({low:.2%} to {high:.2%})"
        if self.accuracy is not None:
            text += ", accuracy {:.2%} in floats, {:.2%} in 8 bits".format(*self.accuracy)
        return text


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@undisturbed()
@torch.no_grad()
def quantize(
    model: nn.Module,
    calibration: Tensor | Iterable[Any],
    *,
    calibrator: str = "mse",
    images: int = 512,
    keep: str | Sequence[str] = (),
    holdout: float = 0.25,
    min_agreement: float | None = 0.98,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    progress: Progress | None = None,
) -> FastModel | FastShell:
    """A fused copy whose convolutions compute in 8 bits; the model itself is left as it is.

    Weights are int8 with a scale for each output channel; activations uint8 with a scale for each
    tensor, from 0 behind a ReLU. Residuals and pooled images stay bytes, linear layers ``dtype``.
    The scales are compared with those of the largest values, one by one and all together, on images
    that were not calibrated on. (Jacob et al., 2018; Krishnamoorthi, arXiv 1806.08342.)

    Args:
        model: trained, in eval mode; or what :func:`optimize` made of it in float32.
        calibration: real images as the model takes them: (N, C, H, W); a pair of that and labels
            (N,); or an iterable of images (C, H, W), of batches, or of pairs of either with labels.
            Of a tensor an even choice is taken, of an iterable the first: it should be shuffled.
        calibrator: ``"mse"``, for each tensor the clip of least squared error; ``"max"``; or
            ``"percentile:99.99"``.
        images: how many are taken at most.
        keep: steps that stay in ``dtype``, by path in the source or name; ``*`` is anything.
        holdout: share of the images that are compared, not calibrated on.
        min_agreement: least share of held out images with the float network's largest logit; None
            for any. Outputs that are not (N, classes) are measured in dB alone.
        dtype: of what is not in 8 bits, and of the outputs: float32, float16 or bfloat16.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``, as :func:`optimize` takes it.
        progress: called with the images that are done, and those to be done.

    Returns:
        A FastModel, or a FastShell where :func:`optimize` makes one; ``report`` is its
        :class:`Quantization`.

    Raises:
        TypeError, ValueError: an argument, an image or a label is not what it must be.
        QuantizationError: no convolution can be in 8 bits, or the agreement is too low; the message
            names the worst steps. Besides these, what :func:`optimize` raises.
    """
    start = time.perf_counter()
    patterns = (keep,) if isinstance(keep, str) else tuple(keep)
    _check(calibrator, images, holdout, dtype)
    check_backend(backend)
    seen, unseen, digest = _split(_pairs(calibration, images), holdout)
    fast = _fused(model, seen[0][0][:4], backend)
    if isinstance(fast, FastShell) and dtype is not torch.float32:
        raise ValueError(f"dtype must be torch.float32 where PyTorch runs some parts; got {dtype}")
    passes = 2 + (calibrator != "max")
    count = _Count(progress, sum(len(x) for x, _ in (*seen, *unseen * passes)))
    parts = [Calibration(path, part) for path, part in _parts(fast).items()]
    _check_keep(patterns, parts)
    _answers(fast, parts, seen, count)
    for part in parts:
        part.unseen = True
    answers = _answers(fast, parts, unseen, count)

    def trial(calibrator: str) -> tuple[Quantization, list[FastModel]]:
        made = [Calibration(p.path, p.quantized(calibrator, patterns, dtype), p) for p in parts]
        left = tuple(item for part in parts for item in part.left.items())
        if not any(part.eights for part in made):
            why = "; ".join(f"{step}: {reason}" for step, reason in left) or "the model has none"
            raise QuantizationError(f"no convolution can be in 8 bits: {why}")
        report = Quantization(
            **_compared(answers, _answers(fast, made, unseen, count), unseen),
            steps=tuple(row for part in made for row in part.rows()),
            left=left,
            images=sum(len(x) for x, _ in seen),
            calibrator=calibrator,
            digest=digest,
            version=torch.__version__,
            seconds=time.perf_counter() - start,
        )
        return report, [part.model for part in made]

    trials = map(trial, dict.fromkeys((calibrator, "max")))
    report, found = max(trials, key=lambda done: done[0].db)
    agreement = report.agreement
    if None not in (agreement, min_agreement) and agreement < min_agreement:  # type: ignore[operator]
        raise QuantizationError(_too_low(report, min_agreement))
    quantized = _replaced(fast, found)
    quantized.report = report
    return quantized


def _check(calibrator: str, images: int, holdout: float, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be float32, float16 or bfloat16 of torch; got {dtype}")
    percent = str(calibrator).partition(":")[2]
    known = isinstance(calibrator, str) and CALIBRATORS.fullmatch(calibrator)
    if not known or (percent and not 50 < float(percent) <= 100):
        raise ValueError(f"calibrator must be mse, max or percentile:99.99; got {calibrator!r}")
    if not isinstance(images, int) or images < 2:
        raise ValueError(f"images must be at least 2; got {images!r}")
    if not 0 < holdout < 1:
        raise ValueError(f"holdout must be between 0 and 1; got {holdout!r}")


def _fused(model: nn.Module, example: Tensor, backend: str) -> FastModel | FastShell:
    """The model's fused copy in float32, checked; never the model itself."""
    if not isinstance(model, (FastModel, FastShell)):
        return optimize(model, example_input=example, dtype=torch.float32, backend=backend)
    if model.report is not None:
        raise TypeError("model is in 8 bits already; quantize its source")
    if model.dtype is not torch.float32:
        raise ValueError(f"model must be folded in torch.float32; got {model.dtype}")
    model(example)  # which compares it with its source, if that is still to be done
    return copy.deepcopy(model)


def _pairs(calibration: Any, images: int) -> Iterator[tuple[Tensor, int | None]]:
    """At most so many images (1, C, H, W), each with its label."""
    whole = calibration if isinstance(calibration, tuple) else (calibration, None)
    if isinstance(whole[0], Tensor) and len(whole) == 2:
        x, labels = whole
        if x.dim() != 4 or (labels is not None and labels.shape != x.shape[:1]):
            shapes = " and ".join(str(tuple(t.shape)) for t in whole if t is not None)
            raise ValueError(f"calibration must be (N, C, H, W), with labels (N,); got {shapes}")
        places = torch.linspace(0, len(x) - 1, min(images, len(x))).round().long()
        calibration = [(x[places], None if labels is None else labels[places])]
    if isinstance(calibration, (str, bytes, dict)) or not isinstance(calibration, Iterable):
        kind = type(calibration).__name__
        raise TypeError(f"calibration must be a tensor or an iterable of images; got {kind}")
    yield from islice((pair for item in calibration for pair in _singles(item)), images)


def _singles(item: Any) -> Iterator[tuple[Tensor, int | None]]:
    pair = isinstance(item, (tuple, list)) and len(item) == 2
    x, labels = item if pair else (item, None)
    if not isinstance(x, Tensor) or x.dim() not in (3, 4):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"calibration must give images (C, H, W) or batches of them; got {got}")
    batch = x if x.dim() == 4 else x[None]
    known = [None] * len(batch) if labels is None else torch.as_tensor(labels).reshape(-1).tolist()
    if len(known) != len(batch) or not all(v is None or type(v) is int for v in known):
        got = f"{len(known)} for {len(batch)}, the first {known[:1]}"
        raise ValueError(f"labels must be whole numbers, one for an image; got {got}")
    return zip(batch.split(1), known, strict=True)


def _split(
    pairs: Iterable[tuple[Tensor, int | None]], holdout: float
) -> tuple[Batches, Batches, str]:
    """Batches to calibrate on, batches that are held out, and what names all of them."""
    digest, count = hashlib.sha256(), 0
    groups: dict[tuple[bool, Any], list[tuple[Tensor, int | None]]] = {}
    for count, (x, label) in enumerate(pairs, 1):
        held = count > 1 and math.floor(count * holdout) > math.floor((count - 1) * holdout)
        groups.setdefault((held, (x.shape, label is None)), []).append((x, label))
        digest.update(x.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    if len({held for held, _ in groups}) < 2:
        raise ValueError(
            f"calibration gave {count} images, too few to calibrate on some and to compare others"
        )
    if count < FEW:
        warnings.warn(
            f"calibration gave {count} images; in a network of digits 1 lost 20 dB of what 512 "
            "kept, 8 lost 8 dB and 32 lost 2 dB",
            stacklevel=5,
        )
    found: tuple[Batches, Batches] = ([], [])
    for (held, _), group in groups.items():
        for first in range(0, len(group), BATCH):
            xs, labels = zip(*group[first : first + BATCH], strict=True)
            known = None if labels[0] is None else torch.tensor(labels)
            found[held].append((torch.cat(xs), known))
    return *found, digest.hexdigest()


class _Count:
    """Tells how many of the images are done."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, images: int) -> None:
        self._done += images
        if self._progress is not None:
            self._progress(self._done, self._total)


def _parts(model: FastModel | FastShell) -> dict[str, FastModel]:
    return {"": model} if isinstance(model, FastModel) else model.parts


def _replaced(model: FastModel | FastShell, parts: Sequence[Any]) -> FastModel | FastShell:
    """The shell with other models in its parts' places, or the only one of them."""
    if isinstance(model, FastModel):
        return parts[0]
    for part, fast in zip(model._parts, parts, strict=True):
        part.fast = fast
    return model


def _answers(
    model: FastModel | FastShell, parts: Sequence[Calibration], batches: Batches, count: _Count
) -> list[Tensor]:
    """The first floating-point output for each batch, while the parts are observed."""
    own = list(_parts(model).values())
    shell = isinstance(model, FastShell)
    found = []
    _replaced(model, parts)
    try:
        for x, _ in batches:
            x = x.to(next(part.model.device for part in parts))
            output = model.body(x) if shell else parts[0](x)
            leaves = tree_leaves(dict(output) if isinstance(output, dict) else output)
            floats = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
            if not floats:
                raise ValueError("model must return floating-point tensors to be compared")
            found.append(floats[0].cpu())
            count.add(len(x))
    finally:
        if shell:
            _replaced(model, own)
    return found


def _check_keep(patterns: Sequence[str], parts: Sequence[Calibration]) -> None:
    names = [
        n
        for part in parts
        for step in part.model.traced.steps
        for n in (part.where(step.name), step.name, step.where)
    ]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"keep names no step: {pattern!r}; plan() lists them")


def _compared(exact: list[Tensor], found: list[Tensor], batches: Batches) -> dict[str, Any]:
    """The figures of the whole network."""
    count = sum(len(x) for x, _ in batches)
    flat = (torch.cat([t.flatten() for t in outputs]) for outputs in (exact, found))
    figures: dict[str, Any] = {"db": decibels(*flat), "held_out": count}
    if any(t.dim() != 2 or t.shape[1] < 2 for t in exact):
        return {**figures, "agreement": None, "interval": (), "accuracy": None}
    before, after = (torch.cat([t.argmax(1) for t in outputs]) for outputs in (exact, found))
    labels = [y for _, y in batches if y is not None]
    accuracy = None
    if len(labels) == len(batches):
        known = torch.cat(labels)
        if int(known.min()) < 0 or int(known.max()) >= exact[0].shape[1]:
            ends = f"{int(known.min())} to {int(known.max())}"
            raise ValueError(f"labels must be below {exact[0].shape[1]}, the classes; got {ends}")
        accuracy = tuple(float((y == known).double().mean()) for y in (before, after))
    right = int((before == after).sum())
    agreement = {"agreement": right / count, "interval": wilson(right, count)}
    return {**figures, **agreement, "accuracy": accuracy}


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's interval of 95 % for a share that was found as ``right`` of ``count``."""
    z2, share = 1.959964**2 / count, right / count
    half = math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    return (share + z2 / 2 - half) / (1 + z2), (share + z2 / 2 + half) / (1 + z2)


def _too_low(report: Quantization, wanted: float | None) -> str:
    worst = sorted(report.steps, key=lambda row: row[6])[:5]
    steps = ", ".join(f"{row[0]} ({row[6]:.1f} dB)" for row in worst)
    return (
        f"8 bits agree with floats on {report.agreement:.2%} of {report.held_out} images, and "
        f"min_agreement is {wanted:.2%}; the worst steps on their own inputs are {steps}: leave "
        f"them in floats, keep={tuple(row[0] for row in worst)!r}, or calibrate on more images"
    )
