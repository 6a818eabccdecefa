"""Fused models in one safetensors file: :func:`save` and :func:`load`.

The tensors are the folded weights; the plan is JSON in the file's metadata. There is no pickle, and
reading a file runs nothing that it could name (see :mod:`fastres.plan_json`).
"""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import plan_json
from .checkpoint import check_target, read_metadata, save_checkpoint, state_dict_from_file
from .errors import CheckpointError
from .fast_model import FastModel, with_signature
from .ir import BatchNorm2d, Call, Conv2d, Linear, attribute
from .plan import Plan, parameter_paths
from .shell import FastShell
from .verify import Verification

FORMAT = 1
SUFFIXES = (".safetensors",)
KEY = "fastres"

PathLike = str | os.PathLike[str]


def save(model: FastModel, path: PathLike) -> None:
    """Write a fused model to a ``.safetensors`` file, whole or not at all.

    Raises:
        TypeError: ``model`` is not a FastModel.
        ValueError: another suffix, or a step left to PyTorch that needs code which no file can
            carry; the message names it.
        OSError: the file cannot be written.
    """
    kind: type = type(model)
    if issubclass(kind, FastShell):
        raise TypeError(
            "a FastShell's own Python cannot be stored; save the source's state_dict instead"
        )
    if not issubclass(kind, FastModel):
        raise TypeError(
            f"model must be a FastModel, as fastres.optimize makes it; got {kind.__name__}"
        )
    check_target(path, SUFFIXES)
    metadata = {KEY: json.dumps(_describe(model), allow_nan=False)}
    save_checkpoint(model, path, metadata=metadata)


def load(path: PathLike, *, device: torch.device | str = "cpu") -> FastModel:
    """Read a fused model that :func:`save` has written.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is truncated, no fused model, of a later format, names what a file must
            not, or its tensors do not fit its plan.
    """
    path = Path(path)
    description = _description(path)
    tensors = state_dict_from_file(path)
    try:
        model = _assemble(description, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} does not describe a fused model: {reason}") from error
    return model.to(device)


def _describe(model: FastModel) -> dict[str, Any]:
    verification = model.verification
    return {
        "format": FORMAT,
        "backend": model.backend,
        "dtype": plan_json.encode(model.dtype),
        "source_dtype": plan_json.encode(model.source_dtype),
        "signature": _encode_signature(model.signature),
        "plan": plan_json.encode_plan(model.traced),
        "modules": _encode_modules(model),
        "described": _storable(model.described),
        "verification": None if verification is None else verification.to_dict(),
    }


def _description(path: Path) -> dict[str, Any]:
    text = read_metadata(path).get(KEY)
    if text is None:
        raise CheckpointError(
            f"{path} holds weights but no fused model; load it by fastres.load_checkpoint"
        )
    try:
        description: dict[str, Any] = json.loads(text)
        version = description["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not describe a fused model: {error}") from error
    if version != FORMAT:
        raise CheckpointError(f"{path} is of format {version}; this fastres reads format {FORMAT}")
    return description


def _assemble(description: dict[str, Any], tensors: dict[str, Tensor]) -> FastModel:
    plan = plan_json.decode_plan(description["plan"])
    dtype = plan_json.decode(description["dtype"])
    _check_tensors(plan, tensors, dtype)
    folded = {}
    for index, step in enumerate(plan.steps):
        if isinstance(step.op, (Conv2d, Linear)):
            weight = tensors[f"folded.weight{index}"]
            if weight.dim() == 4:
                weight = weight.contiguous(memory_format=torch.channels_last)
            folded[index] = (weight, tensors.get(f"folded.bias{index}"))
    model = with_signature(_decode_signature(description["signature"]))(
        plan,
        folded,
        _kept(plan, description["modules"], tensors, dtype),
        dtype=dtype,
        source_dtype=plan_json.decode(description["source_dtype"]),
        backend=description["backend"],
        described=plan_json.decode(description["described"]),
    )
    if description["verification"] is not None:
        found = {**description["verification"]}
        model.verification = Verification(**{**found, "shape": tuple(found["shape"])})
    return model


def _encode_modules(model: FastModel) -> dict[str, Any]:
    """The modules that steps left to PyTorch call, by path."""
    found = {}
    for step in model.traced.steps:
        path = str(step.op.target) if isinstance(step.op, Call) else ""
        if isinstance(step.op, Call) and step.op.kind == "call_module":
            try:
                found[path] = plan_json.encode_module(attribute(model.kept, path))
            except ValueError as error:
                raise ValueError(f"{path} cannot be stored without pickle: {error}") from error
        elif path in found or not isinstance(step.op, Call) or step.op.kind != "get_attr":
            continue
        elif not isinstance(attribute(model.kept, path), Tensor):
            raise ValueError(f"{path} cannot be stored without pickle: it is no tensor")
    return found


def _kept(
    plan: Plan, modules: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype
) -> nn.Module:
    """What the steps left to PyTorch need: modules, parameters and buffers, under their paths."""
    kept = nn.Module()
    for step in plan.steps:
        if isinstance(step.op, Call) and step.op.kind == "call_module":
            path = str(step.op.target)
            module = plan_json.decode_module(modules[path])
            prefix = f"kept.{path}."
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            module.load_state_dict(own, assign=True)
            module.to(dtype)
            _holder(kept, path).add_module(path.rpartition(".")[2], module)
        else:
            for path in _paths(step.op):
                holder, name = _holder(kept, path), path.rpartition(".")[2]
                if name not in holder._buffers:
                    holder.register_buffer(name, tensors[f"kept.{path}"])
    return kept.eval()


def _paths(op: Any) -> list[str]:
    """The tensors that a step reads from what was kept."""
    if isinstance(op, Call):
        return [str(op.target)] if op.kind == "get_attr" else []
    return list(parameter_paths(op)) if isinstance(op, BatchNorm2d) else []


def _holder(root: nn.Module, path: str) -> nn.Module:
    for name in path.split(".")[:-1]:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    return root


def _check_tensors(plan: Plan, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Each step's weights are there, of the shape and dtype that its operation says."""
    for index, step in enumerate(plan.steps):
        op = step.op
        if isinstance(op, Conv2d):
            shape: tuple[int, ...] = (op.out_channels, op.in_channels // op.groups, *op.kernel)
            biased = op.bias is not None or op.norm is not None
        elif isinstance(op, Linear):
            shape, biased = (op.out_features, op.in_features), op.bias is not None
        else:
            continue
        _check_tensor(tensors, f"folded.weight{index}", shape, dtype)
        if biased:
            wide = torch.promote_types(dtype, torch.float32)
            _check_tensor(tensors, f"folded.bias{index}", shape[:1], wide)


def _check_tensor(
    tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    found = tensors.get(name)
    if found is None or tuple(found.shape) != shape or found.dtype is not dtype:
        got = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}"
        raise CheckpointError(f"{name} must be {dtype} {shape}; got {got}")


def _encode_signature(signature: inspect.Signature) -> list[dict[str, Any]]:
    return [
        {
            "name": p.name,
            "kind": int(p.kind),
            "default": None if p.default is p.empty else [plan_json.encode(p.default)],
        }
        for p in signature.parameters.values()
    ]


def _decode_signature(data: list[dict[str, Any]]) -> inspect.Signature:
    empty = inspect.Parameter.empty
    kinds = {int(kind): kind for kind in inspect._ParameterKind}
    return inspect.Signature(
        [
            inspect.Parameter(
                entry["name"],
                kinds[entry["kind"]],
                default=plan_json.decode(entry["default"][0]) if entry["default"] else empty,
            )
            for entry in data
        ]
    )


def _storable(described: dict[str, Any]) -> Any:
    """Those of the source's plain attributes that JSON can carry."""
    found = {}
    for name, value in described.items():
        try:
            found[name] = plan_json.encode(value)
        except ValueError:
            continue
    return {"dict": [[name, value] for name, value in found.items()]}
