"""Fused models in one safetensors file: :func:`save` and :func:`load`.

The tensors are the folded weights; the plan is JSON in the file's metadata. There is no pickle, and
reading a file runs nothing that it could name (see ``plan_json`` and docs/security.md).
"""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from reprlib import repr as brief
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.select import check_backend
from ..errors import CheckpointError
from ..files import check_target
from ..frontends.fast_model import FastModel, with_signature
from ..frontends.fast_shell import FastShell
from ..frontends.quantize import Quantization
from ..graph.ir import Call, Conv2d, Linear, Parameter
from ..graph.plan import Plan, kept_names
from ..models.checkpoint import read_metadata, save_checkpoint, state_dict_from_file
from ..runtime.verify import Verification
from . import plan_json

FORMATS = (1, 2)  # the second has 8-bit steps
SUFFIXES = (".safetensors",)
KEY = "fastres"
LONGEST = 2**24  # characters of the JSON, which takes some twenty times as many bytes once read
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

PathLike = str | os.PathLike[str]


def save(model: FastModel | FastShell, path: PathLike) -> None:
    """Write a fused model to a ``.safetensors`` file, whole or not at all.

    Args:
        model: made by :func:`optimize` from a module that could be recorded as a whole.
        path: ends in ``.safetensors``.

    Raises:
        TypeError: ``model`` is not a FastModel.
        ValueError: another suffix, or a step left to PyTorch that needs code which no file can
            carry; the message names it.
        OSError: the file cannot be written.
    """
    if isinstance(model, FastShell):
        raise TypeError(
            "a FastShell's own Python cannot be stored; save the source, by its save_pretrained "
            "or state_dict, and optimize it again when it is loaded"
        )
    kind: type = type(model)
    if not issubclass(kind, FastModel):
        raise TypeError(
            f"model must be a FastModel, as fastres.optimize makes it; got {kind.__name__}"
        )
    check_target(path, SUFFIXES)
    text = json.dumps(_describe(model), allow_nan=False)
    try:
        _parse(text)
    except CheckpointError as error:
        raise ValueError(f"model cannot be stored: {error}") from error
    stored = {f"kept.{name}": f"kept.{path}" for path, name in kept_names(model.traced).items()}
    tensors = {}
    for name, tensor in model.state_dict().items():
        own = next((n for n in stored if name == n or name.startswith(f"{n}.")), name)
        tensors[stored.get(own, own) + name[len(own) :]] = tensor
    save_checkpoint(tensors, path, metadata={KEY: text})


def load(path: PathLike, *, device: torch.device | str = "cpu") -> FastModel:
    """Read a fused model that :func:`save` has written. Nothing in the file is run.

    Args:
        path: the file.
        device: where the weights go.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is truncated, no fused model, of a later format, names what a file must
            not, or its tensors do not fit its plan.
    """
    path = Path(path)
    text = read_metadata(path).get(KEY)
    if text is None:
        raise CheckpointError(
            f"{path} holds weights but no fused model; load it by fastres.load_checkpoint"
        )
    try:
        described = _parse(text)  # before memory is taken for tensors
        model = _assemble(described, state_dict_from_file(path))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return model.to(device)


class _Description(NamedTuple):
    """What the JSON says, checked."""

    plan: Plan
    dtype: torch.dtype
    source_dtype: torch.dtype
    signature: inspect.Signature
    modules: dict[str, nn.Module]
    described: dict[str, Any]
    backend: str
    verification: Verification | None
    report: Quantization | None


def _describe(model: FastModel) -> dict[str, Any]:
    verification, report = model.verification, model.report
    return {
        "format": FORMATS[report is not None],
        **({} if report is None else {"report": plan_json.encode(report.to_dict())}),
        "backend": model.backend,
        "dtype": plan_json.encode(model.dtype),
        "source_dtype": plan_json.encode(model.source_dtype),
        "signature": _encode_signature(model.signature),
        "plan": plan_json.encode_plan(model.traced),
        "modules": _encode_modules(model),
        "described": _storable(model.described),
        "verification": None if verification is None else verification.to_dict(),
    }


def _parse(text: str) -> _Description:
    """Raises CheckpointError for anything that :func:`_describe` would not have said."""
    if len(text) > LONGEST:
        raise CheckpointError(f"its description has {len(text)} characters; at most {LONGEST}")
    try:
        data = json.loads(text)
        version = data["format"]
        if version in FORMATS:
            return _decode(data)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"it does not describe a fused model: {reason}") from error
    raise CheckpointError(f"it is of format {brief(version)}; this fastres reads 1 and 2")


def _decode(data: Any) -> _Description:
    names = ("backend", "dtype", "source_dtype", "signature", "plan", "modules", "described")
    plan_json.members(data, "a fused model", ("format", *names, "verification"), ["report"])
    plan = plan_json.decode_plan(data["plan"])
    signature = _decode_signature(data["signature"])
    if str(_parameters(signature)) != str(plan.parameters):
        raise CheckpointError("its signature and its plan have other parameters")
    dtype, source_dtype = (plan_json.decode(data[name]) for name in ("dtype", "source_dtype"))
    for found in (dtype, source_dtype):
        if not any(found is known for known in DTYPES):
            raise CheckpointError(f"a dtype must be floating point; got {brief(found)}")
    calls = [s.op for s in plan.steps if isinstance(s.op, Call) and s.op.kind == "call_module"]
    modules = plan_json.members(data["modules"], "modules", {str(op.target) for op in calls})
    described = plan_json.decode(data["described"])
    if type(described) is not dict or not all(map(_is_public, described)):
        raise CheckpointError(f"described must have public names; got {brief(described)}")
    verification = data["verification"]
    if verification is not None:
        shape = {"shape": tuple(verification["shape"])}
        verification = plan_json.typed(Verification, {**verification, **shape})
    report = plan_json.decode(data.get("report"))
    return _Description(
        plan,
        dtype,
        source_dtype,
        signature,
        {path: plan_json.decode_module(spec) for path, spec in modules.items()},
        described,
        check_backend(data["backend"]),
        verification,
        None if report is None else plan_json.typed(Quantization, report),
    )


def _is_public(name: Any) -> bool:
    return plan_json.is_text(name) and not name.startswith("_")


def _parameters(signature: inspect.Signature) -> tuple[Parameter, ...]:
    """A plan's parameters by the signature, which must be one list."""
    parameters = signature.parameters.values()
    required = [p.default is p.empty for p in parameters]
    return tuple(
        Parameter(p.name, r, None if r else p.default)
        for p, r in zip(parameters, required, strict=True)
    )


def _assemble(described: _Description, tensors: dict[str, Tensor]) -> FastModel:
    plan, dtype = described.plan, described.dtype
    _check_tensors(plan, tensors, dtype)
    folded: dict[int, Any] = {}
    for index, step in enumerate(plan.steps):
        if isinstance(step.op, (Conv2d, Linear)):
            weight = tensors[f"folded.weight{index}"]
            if weight.dim() == 4:
                weight = weight.contiguous(memory_format=torch.channels_last)
            scale = tensors.get(f"folded.scale{index}")
            bias = tensors.get(f"folded.bias{index}")
            folded[index] = (weight, bias) if scale is None else (weight, bias, scale)
    model = with_signature(described.signature)(
        plan,
        folded,
        _kept(plan, described.modules, tensors, dtype),
        dtype=dtype,
        source_dtype=described.source_dtype,
        backend=described.backend,
        described=described.described,
    )
    model.verification, model.report = described.verification, described.report
    return model


def _encode_modules(model: FastModel) -> dict[str, Any]:
    """The modules that steps left to PyTorch call, by path."""
    found = {}
    for path, name in kept_names(model.traced).items():
        value = getattr(model.kept, name)
        try:
            if isinstance(value, nn.Module):
                found[path] = plan_json.encode_module(value)
            elif not isinstance(value, Tensor):
                raise ValueError("it is no tensor")
        except ValueError as error:
            raise ValueError(f"{path} cannot be stored without pickle: {error}") from error
    return found


def _kept(
    plan: Plan, modules: dict[str, nn.Module], tensors: dict[str, Tensor], dtype: torch.dtype
) -> nn.Module:
    """What the steps left to PyTorch need: modules, parameters and buffers."""
    kept = nn.Module()
    for path, name in kept_names(plan).items():
        module = modules.get(path)
        if module is None:
            kept.register_buffer(name, _checked(tensors, f"kept.{path}"))
            continue
        own = {}
        for key, value in module.state_dict().items():
            wanted = None if value.is_floating_point() else value.dtype
            own[key] = _checked(tensors, f"kept.{path}.{key}", tuple(value.shape), wanted)
        module.to(dtype)  # what a file does not hold: the numbers of a normalisation
        module.load_state_dict(own, assign=True)
        kept.add_module(name, module)
    return kept.eval()


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
        wide = torch.promote_types(dtype, torch.float32)
        in_8_bits = isinstance(op, Conv2d) and op.x_grid is not None
        _checked(tensors, f"folded.weight{index}", shape, torch.int8 if in_8_bits else dtype)
        if biased or in_8_bits:
            _checked(tensors, f"folded.bias{index}", shape[:1], wide)
        if in_8_bits != (f"folded.scale{index}" in tensors):
            raise CheckpointError(f"step {step.name} has a scale too few or too many")
        if in_8_bits:
            _checked(tensors, f"folded.scale{index}", shape[:1], wide)


def _checked(
    tensors: dict[str, Tensor],
    name: str,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The tensor of this name, which must be of this shape; without a dtype, of any for floats."""
    found = tensors.get(name)
    fits = found is not None and shape in (None, tuple(found.shape))
    floats = found is not None and (shape is None or found.is_floating_point())
    if found is None or not fits or not (found.dtype is dtype if dtype else floats):
        got = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}"
        wanted = f"{dtype or 'floating point'} {'' if shape is None else shape}".strip()
        raise CheckpointError(f"{brief(name)} must be {wanted}; got {got}")
    return found


def _encode_signature(signature: inspect.Signature) -> list[dict[str, Any]]:
    return [
        {
            "name": p.name,
            "kind": int(p.kind),
            "default": None if p.default is p.empty else [plan_json.encode(p.default)],
        }
        for p in signature.parameters.values()
    ]


def _decode_signature(data: Any) -> inspect.Signature:
    found = []
    for entry in data if type(data) is list else [data]:
        plan_json.members(entry, "a parameter", ("name", "kind", "default"))
        plan_json.check_identifier(entry["name"])
        kind, default = entry["kind"], entry["default"]
        stored = default is None or (type(default) is list and len(default) == 1)
        if type(kind) is not int or kind not in _KINDS or not stored:
            raise CheckpointError(f"{brief(entry)} is no parameter")
        value = inspect.Parameter.empty if default is None else plan_json.decode(default[0])
        found.append(inspect.Parameter(entry["name"], _KINDS[kind], default=value))
    return inspect.Signature(found)


_KINDS = {
    int(kind): kind
    for kind in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
}


def _storable(described: dict[str, Any]) -> Any:
    """Those of the source's plain attributes that JSON can carry."""
    found = {}
    for name, value in described.items():
        try:
            found[name] = plan_json.encode(value)
        except ValueError:
            continue
    return {"dict": [[name, value] for name, value in found.items()]}
