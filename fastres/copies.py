"""Copies of a user's module: what is computed on them leaves the module itself as it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def duplicate(module: Module, replaced: Mapping[int, Any] | None = None) -> Module:
    """A deep copy, in which objects given by their ``id`` are replaced.

    Results of autograd, which deepcopy refuses, are copied as constants: pruning and the old
    weight_norm keep them on modules, and their hooks compute them anew at each call. Process
    groups, which it refuses too, are shared.
    """
    results = {
        id(value): value.detach().clone()
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    synchronised = [part for part in module.modules() if isinstance(part, nn.SyncBatchNorm)]
    groups = {id(norm.process_group): norm.process_group for norm in synchronised}
    return copy.deepcopy(module, {**results, **groups, **(replaced or {})})


def sketch(module: Module) -> Module:
    """A copy that shares the weights, for a forward to be recorded on: one that assigns to its
    attributes would leave the recorder's values there. The module itself if it cannot be copied."""
    weights = {id(t): t for t in (*module.parameters(), *module.buffers())}
    try:
        return duplicate(module, weights)
    except Exception:
        return module
