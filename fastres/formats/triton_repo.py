"""A model repository for NVIDIA's Triton Inference Server, which this project has not run."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..files import PathLike, atomic_write, check_target, exiting_on_signals
from ..frontends.fast_model import FastModel
from .export import Exported, export
from .export import check_before as check_onnx
from .fused_file import save
from .triton_model import data_type

BACKENDS = ("onnxruntime", "python")
MODEL_PY = '''"""Needs fastres in the container, where Triton's Python backend runs this."""

from fastres.formats.triton_model import TritonPythonModel  # noqa: F401
'''
CONFIG = """name: "{name}"
backend: "{backend}"
max_batch_size: {max_batch}
{tensors}dynamic_batching {{ max_queue_delay_microseconds: 2000 }}
"""


class _Spec(NamedTuple):
    name: str
    dtype: str  # as numpy and torch call it
    shape: list[int]  # without the batch; -1 where it is open

    def text(self, kind: str) -> str:
        shape = f"dims: {self.shape}" if self.shape else "dims: [1] reshape: { shape: [] }"
        return f'{kind} {{ name: "{self.name}" data_type: {data_type(self.dtype)} {shape} }}\n'


def export_repository(
    model: FastModel,
    repository: PathLike,
    images: Tensor,
    *,
    name: str,
    max_batch: int = 32,
    backend: str = "onnxruntime",
) -> Exported:
    """Write ``repository/name``: config.pbtxt and, as version 1, the network.

    It is written whole or not at all, and takes the place of nothing.

    Args:
        model: on the CPU, of tensors in and out.
        repository: a folder; it is made where it is missing.
        images: at least two, (N, C, H, W): they fix the shapes; the file is run on them.
        name: the model's in the repository.
        max_batch: the most images that the server puts together; of one request too.
        backend: ``"onnxruntime"`` for a ``model.onnx`` that needs nothing of fastres, ``"python"``
            for a fused file and the kernels of fastres, which the container must have.

    Raises:
        ValueError: an odd name or backend, ``max_batch`` below 1, and what :func:`export` says.
        FileExistsError: the repository has a model of that name.
        OSError, MissingDependencyError, VerificationError: as :func:`export` says.
    """
    target = check_before(repository, name, max_batch, backend)
    target.parent.mkdir(parents=True, exist_ok=True)
    with exiting_on_signals(), tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as draft:
        version = Path(draft) / name / "1"
        version.mkdir(parents=True)
        if backend == "python":
            save(model, version / "fused.safetensors")
            atomic_write(version / "model.py", MODEL_PY.encode())
            specs, found = _read_model(model, images), Exported(str(target), "", None)
        else:
            found = replace(export(model, version / "model.onnx", images), path=str(target))
            specs = _read_onnx(version)
        tensors = "".join(spec.text(kind) for kind in specs for spec in specs[kind])
        config = CONFIG.format(name=name, backend=backend, max_batch=max_batch, tensors=tensors)
        atomic_write(version.parent / "config.pbtxt", config.encode())
        os.rename(version.parent, target)
    return found


def check_before(repository: PathLike, name: str, max_batch: int, backend: str) -> Path:
    """The folder to write. Raises what :func:`export_repository` says of all but the model."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ValueError(f"name must be letters, digits, _, - and . only; got {name!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if max_batch < 1:
        raise ValueError(f"max_batch must be at least 1; got {max_batch}")
    target = Path(repository) / name
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists and is kept; remove it or give another name")
    check_target(target / "config.pbtxt", makes_folder=True)
    if backend == "onnxruntime":
        check_onnx(Path("model.onnx"))
    return target


def _read_onnx(folder: Path) -> dict[str, list[_Spec]]:
    """Inputs and outputs as the file that was written states them."""
    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph

    def spec(value: onnx.ValueInfoProto) -> _Spec:
        tensor = value.type.tensor_type
        shape = [side.dim_value or -1 for side in tensor.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        return _Spec(value.name, dtype.name, shape[1:])

    return {"input": list(map(spec, graph.input)), "output": list(map(spec, graph.output))}


def _read_model(model: FastModel, images: Tensor) -> dict[str, list[_Spec]]:
    """Inputs and outputs as a call has them; numbers come out as float32, see triton_model."""
    with torch.inference_mode():
        outputs = [v.float() if v.is_floating_point() else v for v in tree_leaves(model(images))]

    def spec(name: str, value: Tensor) -> _Spec:
        return _Spec(name, str(value.dtype), list(value.shape[1:]))

    names = [f"output_{n}" if n else "output" for n in range(len(outputs))]
    first = next(iter(model.signature.parameters))
    return {"input": [spec(first, images)], "output": list(map(spec, names, outputs))}
