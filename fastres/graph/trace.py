"""Module to graph: torch.fx records the program, each recorded step becomes a typed operation.

A step that is not understood stays an ``ir.Call`` with the reason, never dropped.
In-place steps become functional where nobody can tell the difference and stay in place otherwise.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from threading import RLock, get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import FastresError
from .effects import hook_owners, may_store, snapshot, stored
from .ir import (
    Add,
    BatchNorm2d,
    Call,
    Conv2d,
    Flatten,
    Graph,
    Input,
    Linear,
    Node,
    Operation,
    Parameter,
    Ref,
    ReLU,
    attribute,
    refs,
)
from .match import (
    FROZEN_NORMS,
    FUSED,
    IDENTITIES,
    NORM_ACTS,
    NORMALIZE,
    Constant,
    base_layer,
    from_function,
    from_module,
    has_hooks,
    qualified_name,
)
from .memory_order import Order, function_name, order_of, order_of_module
from .modules import trace_copy


class TraceError(FastresError, RuntimeError):
    """The module's Python cannot be recorded by torch.fx; the message says where and why."""


STOCHASTIC_DEPTH = ("torchvision.ops.stochastic_depth.StochasticDepth",)
_VIEW_OR_COPY = {"contiguous", "reshape", "reshape_as", "flatten", "ravel"}


def opaque_reason(module: nn.Module) -> str | None:
    """Why a module must be called whole, hooks and all, or None when it may be looked into."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is of torch.jit, which torch.fx cannot look into"
    if qualified_name(type(module)) in FUSED:
        return "is fused already"
    if has_hooks(module):
        return "has forward hooks"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if nn.utils.parametrize.is_parametrized(module):
        return "is parametrized"
    return None


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


_ASSIGNMENTS = (
    operator.setitem,
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.imatmul,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.ilshift,
    operator.irshift,
)
for _function in _ASSIGNMENTS:
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
    return _GraphBuilder(module, tracer.graph, tracer.returned, tracer.untraced).run()


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


def from_fx(module: nn.Module, recorded: fx.Graph) -> Graph:
    """A program that torch.fx or Dynamo recorded; ``module`` owns what its get_attr nodes name."""
    return _GraphBuilder(module, recorded, None, {}).run()


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
    recorded.eliminate_dead_code(lambda node: node.op in kept or _mutates(node))
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


class _GraphBuilder:
    """Turns torch.fx nodes into typed nodes and keeps track of which values may share memory."""

    def __init__(
        self, module: nn.Module, recorded: fx.Graph, returned: Any, untraced: Mapping[str, str]
    ) -> None:
        self.returned = returned
        self.untraced = untraced
        self.modules = dict(module.named_modules())
        self.module = module
        self.dtype = _main_dtype(module)
        self.fx_nodes = list(recorded.nodes)
        position = {node: i for i, node in enumerate(self.fx_nodes)}
        self.last_use = {
            node: max((position[user] for user in node.users), default=-1) for node in self.fx_nodes
        }
        self.in_order = self._read_in_order()
        self.value: dict[fx.Node, str] = {}
        self.shares: dict[str, set[str]] = {}
        self.op: dict[str, Operation] = {}
        self.nodes: list[Node] = []
        self.views_by_layout: set[str] = set()
        self.source_layout = False

    def run(self) -> Graph:
        parameters: list[Parameter] = []
        output: Any = None
        for index, node in enumerate(self.fx_nodes):
            if node.op == "placeholder":
                name = str(node.target)  # fx renames a node called like a builtin: input -> input_1
                default = node.args[0] if node.args else None
                parameters.append(Parameter(name, not node.args, default))
                self._emit(node, name, Input(), ())
            elif node.op == "output":
                output = self._output(self.returned, node.args[0])
            else:
                self._visit(index, node)
        graph = Graph(tuple(self.nodes), tuple(parameters), output, self.source_layout)
        return _without_dead_nodes(graph)

    def _visit(self, index: int, node: fx.Node) -> None:
        if self._passes_input_through(node):
            self.value[node] = self._name(node.all_input_nodes[0])
            return
        found, mutates = self._recognise(node)
        functional = mutates and self._may_be_functional(index, node)
        if isinstance(found, str) or (mutates and not functional):
            reason = (
                found if isinstance(found, str) else "writes in place into a value still in use"
            )
            self._emit_call(node, mutates=mutates, reason=reason)
            if self._writes_in_place(node):
                self._keep_layout_for_views(index, node)
        else:
            self._emit_chain(node, found)
            if mutates:
                self._supersede(node)

    def _recognise(self, node: fx.Node) -> tuple[list[Operation] | str, bool]:
        """The typed operations of a node, or the reason to leave it; and whether it mutates."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            reason = self.untraced.get(str(node.target)) or opaque_reason(module)
            if reason is not None:
                return reason, True
            found = self._of_main_dtype(from_module(module, str(node.target)))
            if found and not _only_first_argument(node):
                return "called with more than one argument", _is_inplace(module)
            return found or f"{type(module).__name__} is not fused", _is_inplace(module)
        if node.op == "get_attr":
            return "constant or parameter", False
        found = self._of_main_dtype(from_function(node, self._constant))
        return found or f"{_label(node)} is not fused", _mutates(node)

    def _of_main_dtype(self, found: list[Operation] | None) -> list[Operation] | str | None:
        """What is computed in the dtype of most weights, or why it is left; the engine has one."""
        for op in found or ():
            if isinstance(op, (Conv2d, Linear)):
                dtype = attribute(self.module, op.weight).dtype
                if dtype is not self.dtype:
                    return f"its weight is {dtype}, where most are {self.dtype}"
        return found

    def _writes_in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return _is_inplace(self.modules[str(node.target)])
        return _mutates(node)

    def _keep_layout_for_views(self, index: int, node: fx.Node) -> None:
        """A write must reach the caller and all views, none of which may be a reordered copy."""
        own = self.value[node]
        touched = set().union(*(self.shares[self._name(n)] for n in node.all_input_nodes))
        read_later = any(
            name in touched and name != own and self.last_use[other] > index
            for other, name in self.value.items()
        )
        call = self.op[own]
        copied = touched & self.views_by_layout or (isinstance(call, Call) and not call.any_layout)
        handed_in = any(isinstance(self.op[name], Input) for name in touched)
        if handed_in or (read_later and copied):
            self.source_layout = True

    def _passes_input_through(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if opaque_reason(module) is not None:
                return False
            base = base_layer(module)
            stochastic = qualified_name(type(module)) in STOCHASTIC_DEPTH
            idle = (base in IDENTITIES or stochastic) and not module.training
            return base is nn.Identity or idle
        dropouts = (F.dropout, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout)
        if str(node.target) == "aten.dropout.default":
            return node.args[2] is False
        return node.target in dropouts and node.kwargs.get("training") is False

    def _may_be_functional(self, index: int, node: fx.Node) -> bool:
        """Whether writing to a new tensor instead of the first operand can be told by nobody."""
        written = node.args[0] if node.args else None
        if not isinstance(written, fx.Node):
            return False
        name = self._name(written)
        group = self.shares[name]
        if any(
            isinstance(self.op[member], Input) or _is_constant(self.op[member]) for member in group
        ):
            return False
        return not any(
            self.value[other] in group
            and self.value[other] != name
            and self.last_use[other] > index
            for other in self.value
        )

    def _supersede(self, node: fx.Node) -> None:
        """From here on every reader of the overwritten tensor reads the new value."""
        old = self._name(node.args[0])
        new = self.value[node]
        for other, name in self.value.items():
            if name == old:
                self.value[other] = new

    def _emit_chain(self, node: fx.Node, ops: list[Operation] | str) -> None:
        assert not isinstance(ops, str)
        source = tuple(self._name(n) for n in _operands(node, ops[0]))
        for i, op in enumerate(ops):
            last = i == len(ops) - 1
            name = node.name if last else f"{node.name}_{type(op).__name__.lower()}"
            if isinstance(op, Call):
                op = replace(op, args=(Ref(*source),))
            self._emit(node, name, op, source)
            source = (name,)

    def _emit_call(self, node: fx.Node, *, mutates: bool, reason: str) -> None:
        target = node.target
        call = Call(
            kind=node.op,
            target=target,
            args=self._plain(node.args),
            kwargs=self._plain(dict(node.kwargs)),
            reason=reason,
            mutates=mutates,
            any_layout=node not in self.in_order,
        )
        inputs = tuple(dict.fromkeys([*refs(call.args), *refs(call.kwargs)]))
        self._emit(node, node.name, call, inputs)

    def _order_of(self, node: fx.Node) -> Order:
        """What a step makes of the memory order of its operands."""
        found, _ = self._recognise(node) if node.op.startswith("call_") else ("", False)
        if not isinstance(found, str):
            kept = all(isinstance(op, (Add, BatchNorm2d, Call, ReLU)) for op in found)
            return Order.KEPT if kept else Order.PLAIN
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            opaque = str(node.target) in self.untraced or opaque_reason(module) is not None
            return Order.READ if opaque else order_of_module(module)
        return order_of(node)

    def _read_in_order(self) -> set[fx.Node]:
        """Steps left to PyTorch whose operands must be in the source's own memory order: those that
        may read it, and those whose result, not plain, is handed to such a step or out.

        A convolution's operands too: oneDNN crashes on some images in channels_last memory, which
        would not have met them without fastres (:func:`fastres.graph.match.sees_only_padding`)."""
        wanted: set[fx.Node] = set()
        found: set[fx.Node] = set()
        for node in reversed(self.fx_nodes):
            order = self._order_of(node)
            if order is Order.READ or (order is Order.DERIVED and node in wanted):
                found.add(node)
            passed_on = order is Order.KEPT and node in wanted
            if (node in found and _label(node) != "conv2d") or passed_on or node.op == "output":
                wanted.update(node.all_input_nodes)
        return found

    def _emit(self, node: fx.Node, name: str, op: Operation, inputs: tuple[str, ...]) -> None:
        self.value[node] = name
        self.op[name] = op
        self.shares[name] = {name}
        if isinstance(op, (Call, Flatten)) and not self._allocates(node):
            for other in inputs:
                self._share(name, other)
            if isinstance(op, Flatten) or not op.any_layout or _label(node) in _VIEW_OR_COPY:
                self.views_by_layout.add(name)
        self.nodes.append(Node(name, op, inputs, _where(node)))

    def _allocates(self, node: fx.Node) -> bool:
        """Whether a step left to PyTorch is known to write its result to memory of its own."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            return type(module) in _ALLOCATING_MODULES and opaque_reason(module) is None
        return node.op == "call_function" and node.target in _ALLOCATING_FUNCTIONS

    def _share(self, a: str, b: str) -> None:
        group = self.shares[a] | self.shares[b]
        for member in group:
            self.shares[member] = group

    def _name(self, node: Any) -> str:
        return self.value[node]

    def _plain(self, value: Any) -> Any:
        """fx arguments as plain containers with :class:`Ref` in place of nodes."""
        if isinstance(value, fx.Node):
            return Ref(self.value[value])
        if isinstance(value, tuple):
            items = [self._plain(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, list):
            return [self._plain(item) for item in value]
        if isinstance(value, dict):
            return {key: self._plain(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*(self._plain(v) for v in (value.start, value.stop, value.step)))
        return value

    def _output(self, returned: Any, recorded: Any) -> Any:
        """What fx recorded as the output, in the containers that forward returned."""
        if isinstance(returned, tuple) and hasattr(returned, "_fields"):
            pairs = zip(returned, recorded.args, strict=True)
            return type(returned)(*(self._output(*pair) for pair in pairs))
        if type(returned) in (list, tuple):
            pairs = zip(returned, recorded, strict=True)
            return type(returned)([self._output(*pair) for pair in pairs])
        if type(returned) in (dict, OrderedDict):
            items = [(k, self._output(v, recorded[k])) for k, v in returned.items()]
            return type(returned)(items)
        return self._plain(recorded)

    def _constant(self, value: Any) -> Constant | None:
        """Path and shape of a parameter that reaches a function as an argument."""
        if isinstance(value, fx.Node) and value.op == "get_attr":
            path = str(value.target)
            return path, tuple(attribute(self.module, path).shape)
        return None


_ALLOCATING_MODULES = (nn.Conv1d, nn.ConvTranspose2d, nn.GroupNorm, nn.LayerNorm, nn.Sigmoid)
_ALLOCATING_FUNCTIONS = (F.group_norm, F.layer_norm, torch.sigmoid, torch.cat, torch.stack)


def _without_dead_nodes(graph: Graph) -> Graph:
    """Drop values that nobody reads; inputs and steps that may write elsewhere stay."""
    needed = set(refs(graph.output))
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        effect = isinstance(node.op, Call) and (node.op.mutates or _may_have_effects(node.op))
        if node.name in needed or effect or isinstance(node.op, Input):
            kept.append(node)
            needed.update(node.inputs)
    return replace(graph, nodes=tuple(reversed(kept)))


_ASSERTIONS = (torch._assert, torch._assert_async)


def _may_have_effects(call: Call) -> bool:
    return call.kind == "call_function" and call.target in _ASSERTIONS


def has_unknown_effect(node: fx.Node) -> bool:
    """Whether a function whose result nobody reads was called for something that is not known."""
    if node.op != "call_function" or node.users:
        return False
    return not _mutates(node) and node.target not in _ASSERTIONS


def _is_constant(op: Operation) -> bool:
    return isinstance(op, Call) and op.kind == "get_attr"


def _main_dtype(module: nn.Module) -> torch.dtype | None:
    """That of most weights of convolutions or, where there is none, of linear layers."""
    weights = [p for p in module.parameters() if p.dim() in (2, 4)]
    rank = max((p.dim() for p in weights), default=0)
    counted = Counter(p.dtype for p in weights if p.dim() == rank)
    return counted.most_common(1)[0][0] if counted else None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0].partition('. ')[0]}"


def _where(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def _label(node: fx.Node) -> str:
    """The name of a function, method or module path that a node calls."""
    return function_name(node.target)


def _only_first_argument(node: fx.Node) -> bool:
    return len(node.args) == 1 and not node.kwargs


def _mutates(node: fx.Node) -> bool:
    """Whether a function or method writes into its first operand."""
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace") is True:
        return True
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if node.target in _ASSIGNMENTS:
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = function_name(node.target)
    return name.endswith("_") and not name.endswith("__")


def _operands(node: fx.Node, op: Operation) -> list[fx.Node]:
    """The tensor operands of a recognised step, parameters left out."""
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    if isinstance(op, Add):
        other = node.kwargs.get("other")
        return operands + ([other] if isinstance(other, fx.Node) else [])
    return operands[:1] if operands else [node.kwargs["input"]]  # type: ignore[list-item]


def _is_inplace(module: nn.Module) -> bool:
    """Whether a module writes into its operand; a norm's activation writes into the norm's own."""
    if qualified_name(type(module)) in NORM_ACTS:
        return False
    act = getattr(module, "act", None)
    return bool(getattr(module, "inplace", False) or getattr(act, "inplace", False))
