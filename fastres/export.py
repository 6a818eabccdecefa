"""Fused models for other runtimes: ONNX files, and torch.export programs that need no fastres."""

from __future__ import annotations

import os
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import MissingDependencyError, VerificationError
from .fast_model import FastModel
from .verify import judge

FORMATS = (".onnx", ".pt2")
ONNX_DTYPES = (torch.float32, torch.float16)  # those whose convolutions onnxruntime can run
PROTOBUF_LIMIT = 2**31 - 2**24  # bytes that a single .onnx file can hold, some left for the graph


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how far its answers are from the fused model's.

    Attributes:
        path: the file.
        checked_by: what ran the file for the comparison; empty where onnxruntime is missing.
        max_abs: the largest difference; None if nothing could run the file.
    """

    path: str
    checked_by: str
    max_abs: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def export(model: FastModel, path: str | os.PathLike[str], images: Tensor) -> Exported:
    """Write a fused model with one input as an ONNX file or as a torch.export program.

    The batch size stays open, the image size is that of ``images``. The file is run on one and on
    all of the images and compared with the model before it takes the place of an older one.

    Args:
        model: on the CPU.
        path: ends in ``.onnx`` or ``.pt2``.
        images: at least two, (N, C, H, W).

    Raises:
        TypeError: ``model`` is not a FastModel.
        ValueError: another suffix, fewer than two images, a model not on the CPU, or for ``.onnx``
            another dtype than float32 and float16.
        MissingDependencyError: ``.onnx`` without onnxscript.
        VerificationError: the file gives other answers than the model.
    """
    path = Path(path)
    if not isinstance(model, FastModel):
        raise TypeError(f"model must be a FastModel, got {type(model).__name__}; optimize it first")
    if path.suffix not in FORMATS:
        raise ValueError(f"path must end in {' or '.join(FORMATS)}; got {str(path)!r}")
    if path.suffix == ".onnx" and model.dtype not in ONNX_DTYPES:
        raise ValueError(
            f"a .onnx file must hold a model of torch.float32 or torch.float16; got {model.dtype}"
        )
    if images.dim() != 4 or len(images) < 2:
        raise ValueError(f"images must be at least two, (N, C, H, W); got {tuple(images.shape)}")
    if any(buffer.device.type != "cpu" for buffer in model.buffers()):
        raise ValueError("model must be on the CPU to be exported; call model.cpu()")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        draft = Path(folder) / path.name
        write = _write_onnx if path.suffix == ".onnx" else _write_program
        write(model, draft, images)
        found = _check(model, draft, images)
        for part in Path(folder).iterdir():  # above the limit, the weights are a second file
            os.replace(part, path.with_name(part.name))
    return Exported(str(path), *found)


def _dynamic_batch(model: FastModel) -> dict[str, Any]:
    (name,) = model.signature.parameters
    return {name: {0: torch.export.Dim("batch")}}


def _write_program(model: FastModel, path: Path, images: Tensor) -> None:
    program = torch.export.export(model, (images,), dynamic_shapes=_dynamic_batch(model))
    torch.export.save(program, path)


def _write_onnx(model: FastModel, path: Path, images: Tensor) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"ONNX files need onnxscript, which cannot be imported ({error}); install fastres[onnx]"
        ) from error
    size = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own, about its own future
        torch.onnx.export(
            model,
            (images,),
            path,
            dynamo=True,
            dynamic_shapes=_dynamic_batch(model),
            external_data=size > PROTOBUF_LIMIT,
            verbose=False,
        )


def _check(model: FastModel, path: Path, images: Tensor) -> tuple[str, float | None]:
    """What ran the file, and the largest difference."""
    run, name = _runner(path)
    if run is None:
        return "", None
    largest = 0.0
    for batch in (images[:1], images):
        expected, actual = model.run([batch]), run(batch)
        verdict = judge([expected], [actual], None)
        if not verdict.ok:
            raise VerificationError(f"{name} gives other answers: {verdict.reason}")
        largest = max(largest, verdict.max_abs)
    return name, largest


def _runner(path: Path) -> tuple[Any, str]:
    if path.suffix == ".pt2":
        return torch.export.load(path).module(), "torch.export"
    try:
        import onnxruntime
    except ImportError:
        return None, ""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), "onnxruntime"
