"""What a forward and its hooks leave behind beside their result, which no program records."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import partial
from inspect import getclosurevars
from itertools import chain
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, fx, nn

_OWN = vars(nn.Module()).keys()


def snapshot(module: nn.Module) -> dict[str, list[Any]]:
    """What the attributes and buffers of a module and of those inside it hold, by their paths."""
    return {
        f"{path}.{name}" if path else name: list(_leaves(value))
        for path, part in module.named_modules()
        for name, value in chain(vars(part).items(), part._buffers.items())
        if name not in _OWN
    }


def stored(module: nn.Module, before: dict[str, list[Any]]) -> str | None:
    """The path of an attribute that a recorded forward has left something of its input in, or
    another number; what it keeps of its weights alone is a cache."""
    for path, now in snapshot(module).items():
        old = before.get(path, [])
        counted = len(old) == len(now) and _numbers(old) != _numbers(now)
        if counted or any(isinstance(v, fx.Proxy) and _is_of_input(v.node) for v in now):
            return path
    return None


def _is_of_input(node: fx.Node) -> bool:
    seen, todo = set[fx.Node](), [node]
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            return True
        todo += [n for n in node.all_input_nodes if n not in seen]
        seen.update(todo)
    return False


def _leaves(value: Any, depth: int = 4) -> Iterator[Any]:
    """What containers and plain objects hold; a tensor and how often it was written."""
    inside: Any = ()
    if isinstance(value, dict):
        inside = chain(value.keys(), value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        inside = value
    elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor, fx.Proxy, type)):
        inside = vars(value).values()
    if depth:
        for item in inside:
            yield from _leaves(item, depth - 1)
    yield value
    if isinstance(value, Tensor) and not value.is_inference():
        yield value._version


def _numbers(values: list[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, (int, float, str))]


def may_store(module: nn.Module) -> bool:
    """Whether the code of forward, here or inside, sets attributes."""
    kinds = {type(part) for part in module.modules()}
    return any(map(_sets_attributes, (k for k in kinds if not _is_torchs(k))))


def _sets_attributes(kind: type) -> bool:
    code = getattr(getattr(kind, "forward", None), "__code__", None)
    return code is not None and any(i.opname == "STORE_ATTR" for i in dis.get_instructions(code))


def hook_owners(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The objects whose methods are forward hooks, each with the path of the module hooked."""
    for path, hook in _hooks(module):
        method, _ = _unpacked(hook)
        owner = method.__self__ if isinstance(method, MethodType) else method
        if not isinstance(owner, FunctionType) and not _is_torchs(type(owner)):
            yield path, owner


def outside_owners(module: nn.Module) -> list[Any]:
    """Those of :func:`hook_owners` that belong to the user alone: no attribute leads to them."""
    parts = list(module.modules())
    held = [leaf for part in parts for name, v in vars(part).items() for leaf in _held(name, v)]
    inside = {id(value) for value in chain(parts, held)}
    return [owner for _, owner in hook_owners(module) if id(owner) not in inside]


def _held(name: str, value: Any) -> Iterator[Any]:
    return iter(()) if name in _OWN else _leaves(value)


def hooks_into(module: nn.Module) -> str | None:
    """The path of a module whose forward hook, a function, refers to one of these modules."""
    parts = {id(part) for part in module.modules()}
    for path, hook in _hooks(module):
        function, given = _unpacked(hook)
        known = getclosurevars(function).nonlocals if isinstance(function, FunctionType) else {}
        if any(id(value) in parts for value in (*given, *known.values())):
            return path
    return None


def _hooks(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, part in module.named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            yield from ((path, hook) for hook in vars(part).get(kind, {}).values())


def _unpacked(hook: Any) -> tuple[Any, list[Any]]:
    """The function inside of partials, and the arguments given with them."""
    given: list[Any] = []
    while isinstance(hook, partial):
        given += [*hook.args, *hook.keywords.values()]
        hook = hook.func
    return hook, given


def _is_torchs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"
