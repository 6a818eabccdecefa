"""Plans as plain JSON values and back. Only what is listed here can be named by a file.

A plan may call functions, methods and modules of PyTorch that were not fused. Reading one must
never run anything else, so every name is looked up in the lists below, which hold operators on
tensors and nothing that reads files, imports, or evaluates.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import ir
from .errors import CheckpointError
from .ir import Call, Operation, Parameter, Ref
from .plan import Plan, Step
from .preprocess import Centered, Normalize


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _table(prefix: str, owner: Any, names: str) -> dict[str, Callable[..., Any]]:
    return {f"{prefix}.{name}": getattr(owner, name) for name in names.split()}


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "builtins.getattr": getattr,
    **_table(
        "operator",
        operator,
        "add sub mul truediv floordiv mod neg pow matmul getitem setitem eq ne lt le gt ge "
        "iadd isub imul itruediv and_ or_ not_",
    ),
    **_table(
        "torch",
        torch,
        "add sub mul div neg pow exp sqrt rsqrt sigmoid tanh relu clamp maximum minimum mean sum "
        "amax amin cat stack chunk split flatten reshape squeeze unsqueeze permute transpose "
        "softmax matmul bmm zeros_like ones_like _assert conv1d conv2d max_pool2d",
    ),
    **_table(
        "torch.nn.functional",
        F,
        "interpolate pad adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d max_pool2d conv1d "
        "conv2d linear batch_norm group_norm layer_norm relu relu6 silu gelu elu leaky_relu "
        "hardsigmoid hardswish mish softplus softmax log_softmax sigmoid tanh normalize dropout "
        "pixel_shuffle pixel_unshuffle",
    ),
}
METHODS = _words(
    """add add_ sub sub_ mul mul_ div div_ neg pow exp sqrt sigmoid sigmoid_ tanh relu relu_ clamp
    clamp_ clamp_min mean sum max min amax amin size dim numel view view_as reshape flatten permute
    transpose t contiguous expand expand_as repeat squeeze unsqueeze chunk split unbind narrow
    softmax log_softmax matmul bmm to float half bfloat16 double type_as masked_fill"""
)
ATTRIBUTES = _words("shape ndim dtype device T mT")
MODULES = _words(
    """AdaptiveAvgPool2d AdaptiveMaxPool2d AvgPool2d BatchNorm1d BatchNorm2d ConstantPad2d Conv1d
    Conv2d ConvTranspose2d Dropout ELU Flatten GELU GroupNorm Hardsigmoid Hardswish Hardtanh
    Identity LayerNorm LeakyReLU Linear LogSoftmax MaxPool2d Mish PReLU PixelShuffle
    ReflectionPad2d ReLU ReLU6 ReplicationPad2d SiLU Sigmoid Softmax Softplus Tanh Upsample
    UpsamplingBilinear2d UpsamplingNearest2d ZeroPad2d"""
)
_NAMES = {id(function): name for name, function in reversed(FUNCTIONS.items())}
_OPERATIONS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        ir.Conv2d,
        ir.BatchNorm2d,
        ir.Linear,
        ir.ReLU,
        ir.Add,
        ir.MaxPool2d,
        ir.AvgPool2d,
        ir.GlobalAvgPool,
        ir.Flatten,
        ir.Call,
    )
}
_PARTS: dict[str, type] = {"norm": ir.BatchNorm2d, "images": ir.Normalize}
_SPECIAL = (torch.dtype, torch.memory_format, torch.device)


def encode_plan(plan: Plan) -> dict[str, Any]:
    """A plan as JSON values.

    Raises:
        ValueError: a step calls something that is not in the lists; the message names the step.
    """
    return {
        "parameters": [encode(p.__dict__) for p in plan.parameters],
        "steps": [_encode_step(step) for step in plan.steps],
        "output": encode(plan.output),
    }


def decode_plan(data: Any) -> Plan:
    """The plan of :func:`encode_plan`; every name that it reads is defined before.

    Raises:
        CheckpointError: the data is no plan, or names what a file must not.
    """
    try:
        parameters = tuple(Parameter(**decode(p)) for p in data["parameters"])
        steps = tuple(map(_decode_step, data["steps"]))
        plan = Plan(steps, parameters, decode(data["output"]))
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"not a plan: {type(error).__name__}: {error}") from error
    _check_names(plan)
    return plan


def encode(value: Any) -> Any:
    """Arguments of calls: nests of containers, numbers, references and torch's small constants."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Ref):
        return {"ref": value.name}
    if type(value) is tuple or isinstance(value, torch.Size):
        return {"tuple": [encode(item) for item in value]}
    if type(value) is list:
        return [encode(item) for item in value]
    if type(value) in (dict, OrderedDict):
        kind = "dict" if type(value) is dict else "ordered"
        return {kind: [[encode(k), encode(v)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, _SPECIAL):
        return {"torch": [type(value).__name__, str(value).removeprefix("torch.")]}
    if value is Ellipsis:
        return {"ellipsis": 1}
    raise ValueError(f"{value!r} ({type(value).__name__}) cannot be stored")


def decode(value: Any) -> Any:
    """The value of :func:`encode`."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tuple":
        return tuple(decode(item) for item in content)
    if kind in ("dict", "ordered"):
        items = [(decode(k), decode(v)) for k, v in content]
        return dict(items) if kind == "dict" else OrderedDict(items)
    if kind == "slice":
        return slice(*(decode(v) for v in content))
    if kind == "torch":
        return _decode_special(*content)
    simple: dict[str, Callable[[Any], Any]] = {
        "ref": Ref,
        "float": float,
        "ellipsis": lambda _: Ellipsis,
    }
    if kind not in simple:
        raise CheckpointError(f"unknown kind of value {kind!r}")
    return simple[kind](content)


def _decode_special(kind: str, name: str) -> Any:
    if kind == "device":
        return torch.device(name)
    found = getattr(torch, name, None)
    if not isinstance(found, (torch.dtype, torch.memory_format)):
        raise CheckpointError(f"torch.{name} is no {kind}")
    return found


def _encode_step(step: Step) -> dict[str, Any]:
    try:
        operation = _encode_operation(step.op)
    except ValueError as error:
        where = step.where or step.name
        raise ValueError(f"step {where} cannot be stored without pickle: {error}") from error
    return {
        "name": step.name,
        "inputs": list(step.inputs),
        "where": step.where,
        "in_place": step.in_place,
        "frees": list(step.frees),
        **operation,
    }


def _decode_step(data: Mapping[str, Any]) -> Step:
    return Step(
        data["name"],
        _decode_operation(data["kind"], data["fields"]),
        tuple(data["inputs"]),
        data["where"],
        data["in_place"],
        tuple(data["frees"]),
    )


def _encode_operation(op: Operation) -> dict[str, Any]:
    values = {field.name: getattr(op, field.name) for field in fields(op)}
    if isinstance(op, Call):
        values["target"] = _encode_target(op)
    for name, part in _PARTS.items():
        if isinstance(values.get(name), part):
            values[name] = dict(vars(values[name]))
    return {"kind": type(op).__name__, "fields": {k: encode(v) for k, v in values.items()}}


def _decode_operation(kind: str, data: Mapping[str, Any]) -> Operation:
    if kind not in _OPERATIONS:
        raise CheckpointError(f"unknown operation {kind!r}")
    values = {name: decode(value) for name, value in data.items()}
    for name, part in _PARTS.items():
        if values.get(name) is not None:
            values[name] = part(**values[name])
    op: Operation = _OPERATIONS[kind](**values)
    if isinstance(op, Call):
        return _with_target(op)
    _check_geometry(op)
    return op


def _check_geometry(op: Operation) -> None:
    """Windows that PyTorch itself would refuse never reach an operator that does not look."""
    for name, least in (("kernel", 1), ("stride", 1), ("dilation", 1), ("padding", 0)):
        pair = getattr(op, name, (least, least))
        sound = isinstance(pair, tuple) and len(pair) == 2
        if not sound or not all(type(v) is int and v >= least for v in pair):
            raise CheckpointError(f"{type(op).__name__} has {name}={pair!r}")


def _encode_target(op: Call) -> str:
    if op.kind in ("call_module", "get_attr"):
        return str(op.target)
    if op.kind == "call_method":
        _check_listed(str(op.target) in METHODS, f"the method {op.target}")
        return str(op.target)
    name = _NAMES.get(id(op.target))
    _check_listed(name is not None, f"the function {getattr(op.target, '__name__', op.target)}")
    _check_getattr(op)
    return str(name)


def _with_target(op: Call) -> Call:
    """The call with its function looked up, where its target is in the lists."""
    if op.kind in ("call_module", "get_attr"):
        return op
    known = METHODS if op.kind == "call_method" else FUNCTIONS
    if op.kind not in ("call_method", "call_function") or op.target not in known:
        raise CheckpointError(f"{op.kind} of {op.target!r} is not allowed in a file")
    if op.kind == "call_method":
        return op
    function = FUNCTIONS[str(op.target)]
    found = Call(op.kind, function, op.args, op.kwargs, op.reason, op.mutates, op.any_layout)
    try:
        _check_getattr(found)
    except ValueError as error:
        raise CheckpointError(f"{error} in a file") from error
    return found


def _check_listed(listed: bool, what: str) -> None:
    if not listed:
        raise ValueError(f"{what} is not among those that a file may name")


def _check_getattr(op: Call) -> None:
    if op.target is getattr and (len(op.args) != 2 or op.args[1] not in ATTRIBUTES):
        raise ValueError(f"getattr{op.args[1:]} is not allowed")


def _check_names(plan: Plan) -> None:
    known = {parameter.name for parameter in plan.parameters}
    for step in plan.steps:
        needed = set(step.inputs)
        if isinstance(step.op, Call):
            needed |= set(ir.refs((step.op.args, step.op.kwargs)))
        if not needed <= known or step.name in known:
            raise CheckpointError(f"step {step.name!r} does not fit the steps before it")
        known.add(step.name)
    if not set(ir.refs(plan.output)) <= known:
        raise CheckpointError("the output names a step that does not exist")


def encode_module(module: nn.Module) -> dict[str, Any]:
    """A layer of torch.nn by its name and arguments.

    Raises:
        ValueError: it is another module, or has hooks or settings that its arguments do not say.
    """
    kind = type(module)
    if isinstance(module, (Normalize, Centered)):
        return {"type": kind.__name__, "arguments": _numbers(module)}
    if getattr(nn, kind.__name__, None) is not kind or kind.__name__ not in MODULES:
        raise ValueError(f"{kind.__module__}.{kind.__name__} is not among those a file may name")
    arguments = {}
    for name in inspect.signature(kind.__init__).parameters:
        if name in ("bias", "elementwise_affine", "affine") and isinstance(
            getattr(module, name, None), (torch.Tensor, type(None))
        ):
            arguments[name] = getattr(module, name) is not None
        elif hasattr(module, name):
            arguments[name] = encode(getattr(module, name))
    spec = {"type": kind.__name__, "arguments": arguments}
    twin = decode_module(spec)
    if repr(twin) != repr(module) or module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(f"this {kind.__name__} is not what its arguments say")
    return spec


def _numbers(module: Normalize | Centered) -> dict[str, Any]:
    if isinstance(module, Centered):
        return {"mean": encode(module.numbers), "layout": module.layout}
    mean, std = (encode(tuple(t.tolist())) for t in (module.mean, module.std))
    return {"mean": mean, "std": std, "layout": module.layout}


def decode_module(spec: Mapping[str, Any]) -> nn.Module:
    """The layer of :func:`encode_module`, in eval mode, its tensors still to be filled."""
    own = {"Normalize": Normalize, "Centered": Centered}
    if spec["type"] in own:
        return own[spec["type"]](**{k: decode(v) for k, v in spec["arguments"].items()}).eval()
    if spec["type"] not in MODULES:
        raise CheckpointError(f"a file must not name the module {spec['type']!r}")
    arguments = {name: decode(value) for name, value in spec["arguments"].items()}
    module: nn.Module = getattr(nn, spec["type"])(**arguments)
    return module.eval().requires_grad_(False)
