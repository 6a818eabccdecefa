"""Plans as plain JSON values and back. Only what is listed here can be named by a file.

A plan may call functions, methods and modules of PyTorch that were not fused. Reading one must
never run anything else, so every name is looked up in the lists below, which hold operators on
tensors and nothing that reads files, imports, or evaluates. Each field is of its own type and none
is unknown or missing; names of values and paths in the source are labels, which nothing evaluates
(see docs/security.md).
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import MISSING, fields, replace
from keyword import iskeyword
from reprlib import repr as brief
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import CheckpointError
from ..graph import ir
from ..graph.ir import Call, Conv2d, Graph, Input, Node, Operation, Parameter, Ref
from ..graph.plan import Plan, Step, schedule
from ..graph.quantize import value_grids
from ..models.preprocess import Centered, Normalize
from .allowed import (
    ATTRIBUTES,
    CONSTANTS,
    DEVICE,
    FUNCTIONS,
    METHODS,
    MODULES,
    NAMES,
    OPERATIONS,
    PARTS,
    SPECIAL,
    WORDS,
)

DEEPEST = 40  # levels of nesting: Python's parser and its stack bear more

T = TypeVar("T")


def _is_whole(value: Any, least: int = -(2**31)) -> bool:
    return type(value) is int and least <= value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_grid(value: Any) -> bool:
    scaled = type(value) is ir.Grid and type(value.scale) is float and 0 < value.scale < 2.0**100
    return scaled and 0 <= value.zero <= 255


def is_text(value: Any) -> bool:
    """A string that can be shown on a terminal and in a picture."""
    return isinstance(value, str) and value.isprintable()


_IS: dict[Any, Callable[[Any], bool]] = {  # by what a dataclass says of its field
    "bool": lambda v: type(v) is bool,
    "int": _is_whole,
    "int | None": lambda v: v is None or _is_whole(v),
    "float": _is_number,
    "float | None": lambda v: v is None or _is_number(v),
    "str": is_text,
    "str | None": lambda v: v is None or is_text(v),
    "Pair": lambda v: type(v) is tuple and len(v) == 2 and all(map(_is_whole, v)),
    "tuple[int, ...]": lambda v: type(v) is tuple and all(map(_is_whole, v)),
    "tuple[str, ...]": lambda v: type(v) is tuple and all(map(is_text, v)),
    "tuple[Any, ...]": lambda v: type(v) is tuple,
    "tuple[Any, ...] | None": lambda v: v is None or type(v) is tuple,
    "dict[str, Any]": lambda v: type(v) is dict and all(is_text(k) and k.isidentifier() for k in v),
    "Callable[..., Any] | str": is_text,
    "BatchNorm2d | None": lambda v: v is None or type(v) is ir.BatchNorm2d,
    "Normalize | None": lambda v: v is None or type(v) is ir.Normalize,
    "Grid": lambda v: _is_grid(v),
    "Grid | None": lambda v: v is None or _is_grid(v),
    "Operation": lambda v: type(v) in OPERATIONS.values(),
    "Any": lambda v: True,
}


def encode_plan(plan: Plan) -> dict[str, Any]:
    """A plan as JSON values.

    Raises:
        ValueError: a step calls something that is not in the lists; the message names the step.
    """
    return {
        "parameters": [encode(p.__dict__) for p in plan.parameters],
        "steps": [_encode_step(step) for step in plan.steps],
        "output": encode(plan.output),
        "source_layout": plan.source_layout,
    }


def decode_plan(data: Any) -> Plan:
    """The plan of :func:`encode_plan`; every name that it reads is defined before.

    What may be overwritten and freed is not taken from the data: it is decided here anew.

    Raises:
        CheckpointError: the data is no plan, or names what a file must not.
    """
    members(data, "the plan", ("parameters", "steps", "output"), ("source_layout",))
    found = (decode(p) for p in _items(data["parameters"], "parameters"))
    parameters = tuple(typed(Parameter, values) for values in found)
    for parameter in parameters:
        check_identifier(parameter.name)
    nodes = [Node(parameter.name, Input()) for parameter in parameters]
    steps = map(_decode_step, _items(data["steps"], "steps"))
    nodes += [Node(step.name, step.op, step.inputs, step.where) for step in steps]
    layout = data.get("source_layout", False)
    if type(layout) is not bool or len(nodes) == len(parameters):
        raise CheckpointError(f"a plan of {len(nodes) - len(parameters)} steps, layout {layout!r}")
    graph = Graph(tuple(nodes), parameters, decode(data["output"]), layout)
    _check_names(graph)
    plan = schedule(graph)
    try:
        value_grids(plan)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return plan


def members(
    data: Any, what: str, needed: Iterable[str], optional: Iterable[str] = ()
) -> dict[str, Any]:
    """``data``, which must be a JSON object with these members and no others."""
    if type(data) is not dict:
        raise CheckpointError(f"{what} must be a JSON object; got {brief(data)}")
    wrong = {*needed} - {*data} or {*data} - {*needed, *optional}
    if wrong:
        raise CheckpointError(f"{what} lacks, or must not have, {brief(sorted(wrong))}")
    return data


def _items(data: Any, what: str) -> list[Any]:
    if type(data) is not list:
        raise CheckpointError(f"{what} must be a JSON list; got {brief(data)}")
    return data


def typed(kind: type[T], values: Any) -> T:
    """A dataclass with these values for its fields, each of the type that the field says."""
    found = fields(kind)  # type: ignore[arg-type]
    needed = [f.name for f in found if f.default is MISSING and f.default_factory is MISSING]
    members(values, kind.__name__, needed, [f.name for f in found])
    for field in found:
        if field.name in values and not _IS[field.type](values[field.name]):
            value = brief(values[field.name])
            raise CheckpointError(f"{kind.__name__}.{field.name} must be {field.type}; got {value}")
    return kind(**values)


def check_identifier(name: Any) -> None:
    """Raises CheckpointError for what Python would not take as an argument's name."""
    if not (isinstance(name, str) and name.isidentifier()) or iskeyword(name):
        raise CheckpointError(f"{brief(name)} is no name of an argument")


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
    if isinstance(value, SPECIAL):
        return {"torch": [type(value).__name__, str(value).removeprefix("torch.")]}
    if value is Ellipsis:
        return {"ellipsis": 1}
    raise ValueError(f"{value!r} ({type(value).__name__}) cannot be stored")


def decode(value: Any, depth: int = 0) -> Any:
    """The value of :func:`encode`.

    Raises:
        CheckpointError: it is something else.
    """
    if depth > DEEPEST:
        raise CheckpointError(f"values are nested more than {DEEPEST} deep")
    if isinstance(value, list):
        return [decode(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise CheckpointError(f"{brief(value)} is no 64-bit integer")
        return value
    only: tuple[str, Any] = next(iter(value.items())) if len(value) == 1 else ("", [])
    kind, content = only
    if kind == "torch":
        return _decode_special(content)
    if kind == "ref" and is_text(content):
        return Ref(content)
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "ellipsis" and content == 1:
        return ...
    if kind not in ("tuple", "dict", "ordered", "slice") or not isinstance(content, list):
        raise CheckpointError(f"unknown kind of value {brief(value)}")
    items = [decode(item, depth + 1) for item in content]
    if kind == "tuple":
        return tuple(items)
    if kind == "slice" and len(items) == 3:
        return slice(*items)
    if kind == "slice" or not all(_is_entry(item) for item in items):
        raise CheckpointError(f"not a {kind}: {brief(value)}")
    return dict(items) if kind == "dict" else OrderedDict(items)


def _is_entry(item: Any) -> bool:
    """A pair whose first, the key, is a plain value."""
    pair = type(item) is list and len(item) == 2
    return pair and (item[0] is None or type(item[0]) in (bool, int, float, str))


def _decode_special(content: Any) -> Any:
    """torch's small constants, out of a table."""
    pair = type(content) is list and len(content) == 2 and all(isinstance(v, str) for v in content)
    kind, name = content if pair else ("", "")
    if kind == "device" and DEVICE.fullmatch(name):
        return torch.device(name)
    if (kind, name) not in CONSTANTS:
        raise CheckpointError(f"{brief(content)} is no dtype, device or memory format")
    return CONSTANTS[kind, name]


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


def _decode_step(data: Any) -> Step:
    names = ("name", "inputs", "where", "in_place", "frees")
    members(data, "a step", (*names, "kind", "fields"))
    values = {name: data[name] for name in names}
    for name in ("inputs", "frees"):
        values[name] = tuple(_items(data[name], name))
    return typed(Step, {**values, "op": _decode_operation(data["kind"], data["fields"])})


def _encode_operation(op: Operation) -> dict[str, Any]:
    values = {field.name: getattr(op, field.name) for field in fields(op)}
    values = {k: v for k, v in values.items() if v is not None or not k.endswith("_grid")}
    if isinstance(op, Call):
        values["target"] = _encode_target(op)
    for name, part in PARTS.items():
        if isinstance(values.get(name), part):
            values[name] = dict(vars(values[name]))
    return {"kind": type(op).__name__, "fields": {k: encode(v) for k, v in values.items()}}


def _decode_operation(kind: Any, data: Any) -> Operation:
    if not isinstance(kind, str) or kind not in OPERATIONS:
        raise CheckpointError(f"unknown operation {brief(kind)}")
    if type(data) is not dict:
        raise CheckpointError(f"{kind} must have a JSON object of fields; got {brief(data)}")
    values = {name: decode(value) for name, value in data.items()}
    for name, part in PARTS.items():
        if values.get(name) is not None:
            values[name] = typed(part, values[name])
    op: Operation = typed(OPERATIONS[kind], values)
    if isinstance(op, Call):
        return _with_target(op)
    _check_geometry(op)
    return op


def _check_geometry(op: Operation) -> None:
    """What PyTorch itself would refuse never reaches an operator that does not look."""
    for name, least in (("kernel", 1), ("stride", 1), ("dilation", 1), ("padding", 0)):
        pair = getattr(op, name, (least, least))
        if min(pair) < least:
            raise CheckpointError(f"{type(op).__name__} has {name}={pair!r}")
    if isinstance(op, Conv2d):
        sizes = (op.in_channels, op.out_channels, op.groups)
        if min(sizes) < 1 or op.in_channels % op.groups or op.out_channels % op.groups:
            raise CheckpointError(f"Conv2d has channels and groups {sizes}")


def _encode_target(op: Call) -> str:
    if op.kind in ("call_module", "get_attr"):
        return str(op.target)
    if op.kind == "call_method":
        _check_listed(str(op.target) in METHODS, f"the method {op.target}")
        return str(op.target)
    name = NAMES.get(id(op.target))
    _check_listed(name is not None, f"the function {getattr(op.target, '__name__', op.target)}")
    _check_getattr(op)
    return str(name)


def _with_target(op: Call) -> Call:
    """The call with its function looked up, where its target is in the lists."""
    if op.kind in ("call_module", "get_attr"):
        return op
    known = METHODS if op.kind == "call_method" else FUNCTIONS
    if op.kind not in ("call_method", "call_function") or op.target not in known:
        raise CheckpointError(f"{brief(op.kind)} of {brief(op.target)} is not allowed in a file")
    on_value = bool(op.args) and isinstance(op.args[0], Ref)
    if op.kind == "call_method" and not on_value:
        raise CheckpointError(f"the method {op.target} of no step's value is not allowed in a file")
    if op.kind == "call_method":
        return op
    found = replace(op, target=FUNCTIONS[str(op.target)])
    try:
        _check_getattr(found)
    except ValueError as error:
        raise CheckpointError(f"{error} in a file") from error
    return found


def _check_listed(listed: bool, what: str) -> None:
    if not listed:
        raise ValueError(f"{what} is not among those that a file may name")


def _check_getattr(op: Call) -> None:
    if op.target is not getattr:
        return
    arguments = (*op.args, *op.kwargs)
    if len(arguments) != 2 or not isinstance(arguments[0], Ref) or arguments[1] not in ATTRIBUTES:
        raise ValueError(f"getattr{brief(arguments[1:])} is not allowed")


def _check_names(graph: Graph) -> None:
    """Each step reads as many values as its operation takes, all of which exist before it."""
    known: set[str] = set()
    for node in graph.nodes:
        op, count = node.op, len(node.inputs)
        if isinstance(op, Call):
            fits = set(node.inputs) == set(ir.refs((op.args, op.kwargs)))
        elif isinstance(op, Conv2d):
            fits = count == 1 + op.residual
        else:
            fits = count == (not isinstance(op, Input)) or (isinstance(op, ir.Add) and count == 2)
        if not fits or not set(node.inputs) <= known or node.name in known:
            raise CheckpointError(f"step {brief(node.name)} does not fit the steps before it")
        known.add(node.name)
    if not set(ir.refs(graph.output)) <= known:
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
    decoded = decode_module(spec)
    if repr(decoded) != repr(module) or module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(f"this {kind.__name__} is not what its arguments say")
    return spec


def _numbers(module: Normalize | Centered) -> dict[str, Any]:
    if isinstance(module, Centered):
        as_bytes = {"as_bytes": True} if module.as_bytes else {}
        return {"mean": encode(module.numbers), "layout": module.layout, **as_bytes}
    mean, std = (encode(tuple(t.tolist())) for t in (module.mean, module.std))
    return {"mean": mean, "std": std, "layout": module.layout}


def _is_setting(value: Any) -> bool:
    """Whether a layer of torch.nn may have this argument: a number, some, or one of its words."""
    if type(value) in (tuple, list):
        return all(v is None or _is_number(v) for v in value)
    return value is None or type(value) is bool or _is_number(value) or value in WORDS


def decode_module(spec: Any) -> nn.Module:
    """The layer of :func:`encode_module`, in eval mode, its tensors without memory: to be assigned.

    Raises:
        CheckpointError: it is none of those that a file may name, or has other arguments.
    """
    members(spec, "a module", ("type", "arguments"))
    name = brief(spec["type"])
    own: dict[Any, Any] = {"Normalize": Normalize, "Centered": Centered}
    if not isinstance(spec["type"], str) or spec["type"] not in {*own, *MODULES}:
        raise CheckpointError(f"a file must not name the module {name}")
    kind = own.get(spec["type"]) or getattr(nn, spec["type"])
    taken = set(inspect.signature(kind.__init__).parameters) - {"self", "device", "dtype"}
    given = members(spec["arguments"], f"the module {name}", (), taken)
    arguments = {key: decode(value) for key, value in given.items()}
    if not all(map(_is_setting, arguments.values())):
        raise CheckpointError(f"the module {name} has the arguments {brief(arguments)}")
    try:
        with nullcontext() if spec["type"] in own else torch.device("meta"):
            module: nn.Module = kind(**arguments)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise CheckpointError(f"the module {name} cannot be built: {e}") from e
    return module.eval().requires_grad_(False)
