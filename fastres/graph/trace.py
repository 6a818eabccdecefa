"""Module to graph: torch.fx records the program, each recorded step becomes a typed operation.

A step that is not understood stays an ``ir.Call`` with the reason, never dropped.
In-place steps become functional where nobody can tell the difference and stay in place otherwise.
"""

from __future__ import annotations

import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import RLock, get_ident
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import FastresError
from .effects import hook_owners, may_store, snapshot, stored
from .fx_graph import ASSIGNMENTS, STOCHASTIC_DEPTH, GraphBuilder, is_mutating, opaque_reason
from .ir import Graph
from .match import (
    FROZEN_NORMS,
    NORM_ACTS,
    NORMALIZE,
    base_layer,
    qualified_name,
)
from .modules import trace_copy


class TraceError(FastresError, RuntimeError):
    """The module's Python cannot be recorded by torch.fx; the message says where and why."""


class _Constant:
    """A tensor that forward makes anew from constants, as a function of nothing."""

    __name__ = "constant tensor"

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __call__(self) -> Tensor:
        return self.tensor.clone()


class _Draws(TorchDispatchMode):
    """Notices random numbers that are drawn while a forward is recorded; those that depend on a
    tensor are not, but become steps of the record."""

    found = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.found = str(func)
        return func(*args, **(kwargs or {}))


class _Proxy(fx.Proxy):
    """Records ``x += y`` and ``x[i] = y`` as what they are: fx takes the first for ``x = x + y``,
    which hides the change from other names of ``x``, and refuses the second.

    Nothing that is computed without gradients requires one, which frozen norms ask."""

    requires_grad = False


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: fx.Proxy, *args: Any) -> Any:
        made = self.tracer.create_proxy("call_function", function, (self, *args), {})
        return None if function is operator.setitem else made

    return method


for _function in ASSIGNMENTS:
    setattr(_Proxy, f"__{_function.__name__}__", _recorded(_function))


_RECORDING = RLock()


class _Tracer(fx.Tracer):
    """torch.fx's tracer that also keeps normalisation layers and opaque modules whole.

    ``returned`` is, at the end, what forward returned: fx itself forgets the types of containers.

    While fx records, it replaces ``nn.Module.__call__`` and ``__getattr__`` for the whole process.
    What other threads call meanwhile is handed on, and only one recording runs at a time.

    A module whose own Python cannot be recorded is called whole: ``untraced`` says why, by path.
    """

    returned: Any = None

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        self.untraced: dict[str, str] = {}
        self._weights: dict[str, Any] = {}
        with _RECORDING, torch.no_grad():
            self._thread = get_ident()
            return super().trace(*args, **kwargs)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if get_ident() != self._thread:
            return forward(*args, **kwargs)
        before, stack = len(self.graph.nodes), self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            path = self.path_of_module(m)
            if path in self.untraced:
                raise
            self.untraced[path] = f"{type(m).__name__} cannot be traced: {_first_line(error)}"
        self._forget(before)
        self.module_stack = stack
        return super().call_module(m, forward, args, kwargs)

    def _forget(self, before: int) -> None:
        """Take back what was recorded since there were ``before`` nodes."""
        for node in reversed(list(self.graph.nodes)[before:]):
            self.graph.erase_node(node)
        kept = set(self.graph.nodes)
        for name in [n for n, proxy in self._weights.items() if proxy.node not in kept]:
            del self._weights[name]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if get_ident() != self._thread:
            return attr_val
        self._weights = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not self._is_weight(a):
            # fx would store it as an attribute of the user's module.
            return self.create_node("call_function", _Constant(a), (), {})
        argument = super().create_arg(a)
        self.returned = a
        return argument

    def _is_weight(self, tensor: Tensor) -> bool:
        return any(tensor is t for t in (*self.root.parameters(), *self.root.buffers()))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        name = qualified_name(type(m))
        return (
            name in FROZEN_NORMS + NORM_ACTS + NORMALIZE + STOCHASTIC_DEPTH
            or module_qualified_name in self.untraced
            or opaque_reason(m) is not None
            or base_layer(m) is not None
            or super().is_leaf_module(m, module_qualified_name)
        )


def trace(module: nn.Module, method: str = "forward", most: bool = True) -> Graph:
    """Record what a module computes as an ``ir.Graph``; the module is not changed.

    Modules inside whose own Python cannot be recorded stay calls, each with the reason.

    Args:
        module: any module whose own forward torch.fx can trace, in eval mode.
        method: name of the method to record, as its class defines it.
        most: half of the convolutions, or more, must be outside of such modules; else one.

    Raises:
        TraceError: control flow depends on data, or torch.fx fails otherwise.
    """
    for path, owner in hook_owners(module):
        raise TraceError(
            f"{type(module).__name__} is not traced whole: {path or 'it'} has a forward hook of a "
            f"{type(owner).__name__}, whose copy it would feed"
        )
    tracer = _record(module, method)
    _refuse_little(module, tracer, most)
    return GraphBuilder(module, tracer.graph, tracer.returned, tracer.untraced).run()


def _record(module: nn.Module, method: str) -> _Tracer:
    """A tracer that has recorded a method."""
    tracer = _Tracer()
    tracer.traced_func_name = method
    _refuse_signature(module, method)
    draws, drawn = _Draws(), _sketch(module)
    before = snapshot(drawn)
    try:
        with draws:
            tracer.trace(drawn)
    except Exception as error:
        raise TraceError(
            f"{type(module).__name__} cannot be traced by torch.fx: {type(error).__name__}: {error}"
        ) from error
    if draws.found:
        raise TraceError(
            f"{type(module).__name__} cannot be traced: its {method} draws random numbers "
            f"({draws.found}), of which a record would keep one draw for ever"
        )
    called = {str(node.target) for node in tracer.graph.nodes if node.op == "call_module"}
    untraced = (path for path in tracer.untraced if path in called)
    may = (path for path in untraced if may_store(module.get_submodule(path)))
    name = stored(drawn, before) or next(may, None)
    if name is not None:
        raise TraceError(
            f"{type(module).__name__} is not traced whole: its forward stores {name}, which only "
            "the source's own Python does"
        )
    return tracer


def _sketch(module: nn.Module) -> nn.Module:
    """A copy to record on, in which torch's own norms do not look at the rank of their input."""
    drawn = trace_copy(module)
    norms = (m for m in drawn.modules() if isinstance(m, nn.BatchNorm2d) and drawn is not module)
    for norm in norms:
        if type(norm)._check_input_dim is nn.BatchNorm2d._check_input_dim:
            norm.__dict__["_check_input_dim"] = lambda x: None
    return drawn


def _refuse_little(module: nn.Module, tracer: _Tracer, most: bool) -> None:
    """A program that leaves its convolutions to PyTorch, inside of modules called whole."""
    every = {m for m in module.modules() if isinstance(m, nn.Conv2d)}
    called = {str(n.target) for n in tracer.graph.nodes if n.op == "call_module"}
    lost = {
        path: [m for m in module.get_submodule(path).modules() if m in every]
        for path in tracer.untraced
        if path in called
    }
    inside = {m for found in lost.values() for m in found}
    if every and (2 * len(inside) > len(every) if most else inside == every):
        path = max(lost, key=lambda path: len(lost[path]))
        raise TraceError(
            f"{type(module).__name__} cannot be traced whole: {path}, with {len(lost[path])} of "
            f"its {len(every)} convolutions: {tracer.untraced[path]}"
        )


def truncated(module: nn.Module, names: Sequence[str], keys: Sequence[str] | None) -> fx.Graph:
    """``module.forward`` up to the named submodules, as a torch.fx program over the module.

    The program returns their last outputs, in a list or, with ``keys``, in an OrderedDict.

    Raises:
        TraceError: torch.fx cannot record the module, or a submodule is never called.
    """
    recorded = _record(module, "forward").graph
    outputs = [_output_of(recorded, name) for name in names]
    for node in reversed(list(recorded.nodes)):
        if node in outputs:
            break
        recorded.erase_node(node)
    if keys is None:
        recorded.output(outputs)
    else:
        pairs = list(zip(keys, outputs, strict=True))
        recorded.output(recorded.call_function(OrderedDict, (pairs,)))
    for node in recorded.nodes:
        node.type = None  # an annotation that is a string would keep the program from pickling
    kept = ("placeholder", "output")
    recorded.eliminate_dead_code(lambda node: node.op in kept or is_mutating(node))
    return recorded


def _output_of(recorded: fx.Graph, name: str) -> fx.Node:
    """The last value that was computed inside a submodule: what its last call returned."""
    inside = [node for node in recorded.nodes if name in _scopes(node)]
    if not inside:
        raise TraceError(f"{name} is never called, or only inside a module that is kept whole")
    return inside[-1]


def _scopes(node: fx.Node) -> set[str]:
    """Paths of the modules that a node was recorded in, and of the one that it calls."""
    stack = node.meta.get("nn_module_stack") or {}
    called = {str(node.target)} if node.op == "call_module" else set()
    return called | {str(path) for path, _ in stack.values()}


def _refuse_signature(module: nn.Module, method: str) -> None:
    """Arguments that fx records wrongly: stars, and ``y=None``, whose check it takes for False."""
    star = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for parameter in inspect.signature(getattr(module, method)).parameters.values():
        if parameter.kind in star or parameter.default is None:
            raise TraceError(
                f"{type(module).__name__} cannot be traced: its {method} takes {parameter}"
            )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0].partition('. ')[0]}"
