"""A part of a user's module: its forward runs the plan, or the source's own where that is due."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from itertools import chain
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import VerificationError
from ..runtime.guards import Change, WeightGuard
from .fast_model import FastModel


class Part:
    """What is called as a part's ``forward``: its fused copy, as long as that is the same function.

    Everything else about the part stays as it was. Its own forward runs, with one warning, if the
    fused copy failed its check, if arguments are of other types than those of the check, if
    gradients are wanted, and after anything in the part was changed.

    Args:
        module: the part.
        path: where it is in the source.
        fast: the fused copy.
    """

    def __init__(self, module: nn.Module, path: str, fast: FastModel) -> None:
        self.module, self.path, self.fast = module, path, fast
        self._refused = ""
        self._types: tuple[type, ...] | None = None
        self._guard: _PartGuard | None = None
        self._has_warned = False

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._own())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._own()(*args, **kwargs) if self._refused else self.fast(*args, **kwargs)
        reason = self.reason() or self._other_call(args, kwargs)
        if not reason:
            try:
                output = self.fast(*args, **kwargs)
                self._types = _types(args, kwargs)
                return output
            except VerificationError as error:
                reason = self._refused = str(error)
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(f"{self.path} runs as ordinary PyTorch: {reason}", stacklevel=2)
        return self._own()(*args, **kwargs)

    def reason(self) -> str:
        """Why the part's own forward runs, whatever it is called with; or nothing."""
        return self._refused or self.guard().reason()

    def guard(self) -> _PartGuard:
        """What notices changes from now on."""
        self._guard = self._guard or _PartGuard(self.module)
        return self._guard

    def settle(self) -> None:
        """Take the part for what was folded; what was changed before stays noticed."""
        self._refused, self._guard = self.reason(), None

    def _own(self) -> Callable[..., Any]:
        method: Callable[..., Any] = type(self.module).forward.__get__(self.module)
        return method

    def _other_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        if self._types is not None and _types(args, kwargs) != self._types:
            return "its arguments are of other types than those it was checked with"
        if torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad
            for value in chain(args, kwargs.values(), self.module.parameters())
        ):
            return "gradients are wanted"
        return ""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_refused": self.reason(), "_guard": None}


def _types(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[type, ...]:
    return tuple(map(type, chain(args, kwargs.values())))


class _PartGuard:
    """Notices what is changed in a module: tensors, modules, hooks, any attribute, training."""

    def __init__(self, module: nn.Module) -> None:
        tensors = chain(module.named_parameters(), module.named_buffers())
        self._guard = WeightGuard(module, [path for path, _ in tensors])
        below = list(module.modules())[1:]  # the hooks of the root run anyway, around its forward
        hooks = [hooks for m in below for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._attributes = [*map(vars, module.modules()), *hooks]
        self._values = self._now()

    def reason(self) -> str:
        try:
            same = self._now() == self._values
        except (RuntimeError, ValueError):  # tensors and arrays that are not the same object
            same = False
        same = same and self._guard.check() is Change.NONE
        return "" if same else "it was changed; change the source and optimize that again"

    def _now(self) -> list[tuple[Any, ...]]:
        return list(map(tuple, map(_VALUES, self._attributes)))


_VALUES = methodcaller("values")
