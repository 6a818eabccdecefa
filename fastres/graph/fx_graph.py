"""torch.fx's graph as ours: what is recognised, and what PyTorch does, in order and layout."""

from __future__ import annotations

import operator
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

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
    FUSED,
    IDENTITIES,
    NORM_ACTS,
    Constant,
    base_layer,
    from_function,
    from_module,
    has_hooks,
    qualified_name,
)
from .memory_order import Order, function_name, order_of, order_of_module

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


ASSIGNMENTS = (
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


def from_fx(module: nn.Module, recorded: fx.Graph) -> Graph:
    """A program that torch.fx or Dynamo recorded; ``module`` owns what its get_attr nodes name."""
    return GraphBuilder(module, recorded, None, {}).run()


class GraphBuilder:
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
        return found or f"{_label(node)} is not fused", is_mutating(node)

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
        return is_mutating(node)

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
    return not is_mutating(node) and node.target not in _ASSERTIONS


def _is_constant(op: Operation) -> bool:
    return isinstance(op, Call) and op.kind == "get_attr"


def _main_dtype(module: nn.Module) -> torch.dtype | None:
    """That of most weights of convolutions or, where there is none, of linear layers."""
    weights = [p for p in module.parameters() if p.dim() in (2, 4)]
    rank = max((p.dim() for p in weights), default=0)
    counted = Counter(p.dtype for p in weights if p.dim() == rank)
    return counted.most_common(1)[0][0] if counted else None


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


def is_mutating(node: fx.Node) -> bool:
    """Whether a function or method writes into its first operand."""
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace") is True:
        return True
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if node.target in ASSIGNMENTS:
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
