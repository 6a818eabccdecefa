"""Copies of a user's module: what is computed on them leaves the module itself as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from threading import Lock, RLock
from typing import Any, TypeVar

from torch import Tensor, fx, nn

Module = TypeVar("Module", bound=nn.Module)
_LOCKS = (type(Lock()), type(RLock()))


def duplicate(module: Module, replaced: Mapping[int, Any] | None = None) -> Module:
    """A deep copy, in which objects given by their ``id`` are replaced.

    Results of autograd, which deepcopy refuses, are copied as constants: pruning and the old
    weight_norm keep them on modules, and their hooks compute them anew at each call. Process
    groups and locks, which it refuses too, are shared.
    """
    results = {
        id(value): value.detach().clone()
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    synchronised = [part for part in module.modules() if isinstance(part, nn.SyncBatchNorm)]
    groups = {id(norm.process_group): norm.process_group for norm in synchronised}
    values = [value for part in module.modules() for value in vars(part).values()]
    locks = {id(value): value for value in values if isinstance(value, _LOCKS)}
    return copy.deepcopy(module, {**results, **groups, **locks, **(replaced or {})})


def trace_copy(module: Module) -> Module:
    """A copy that shares the parameters, for a forward to be recorded on: one that assigns to its
    attributes would leave the recorder's values there. The module itself if it cannot be copied."""
    try:
        return duplicate(module, {id(p): p for p in module.parameters()})
    except Exception:
        return module


def uncopiable(module: nn.Module, error: Exception) -> str:
    """What to say of a module that cannot be copied, with the attribute that cannot."""
    culprit = next(_uncopiable(module), "")
    return (
        f"{type(module).__name__} cannot be copied ({culprit}{type(error).__name__}: {error}), so "
        "a check would have to run, and could change, itself; verify=False takes a copy unchecked"
    )


def _uncopiable(module: nn.Module) -> Iterator[str]:
    for path, part in module.named_modules():
        for name in vars(part).keys() - vars(nn.Module()).keys():
            value = vars(part)[name]
            try:
                isinstance(value, (Tensor, *_LOCKS)) or copy.deepcopy(value)
            except Exception:
                yield f"attribute {path}.{name}: " if path else f"attribute {name}: "


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile's wrapper; and
    torch.export's module as one of torch.fx, without hooks and with a mode."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrapped(model.module)
    if any(kind.__name__ == "_StatefulGraphModule" for kind in type(model).__mro__):
        return _of_export(model)
    inner = model._modules.get("_orig_mod")
    return model if inner is None else unwrapped(inner)


def _of_export(model: Any) -> nn.Module:
    plain = fx.GraphModule(model, copy.deepcopy(model.graph))
    guards = plain._modules.get("_guards_fn")
    if guards is not None:  # the shapes that the program was exported for
        plain._modules["_guards_fn"] = duplicate(guards).eval()
    return plain
