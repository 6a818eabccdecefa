"""``torch.compile(model, backend="fastres")``: Dynamo records, fastres folds, fuses and runs.

Dynamo hands over parameters and buffers as inputs of its graph. They are folded when the graph is
compiled and checked at every call by identity, version and address; what changed is folded again
(:func:`refresh` is for changes that none of these shows).
A graph that wants gradients, trains a batch norm, runs under autocast or holds no convolution runs
as ordinary PyTorch; the logger ``fastres`` says so at level INFO.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ..backends.select import check_backend, select_ops
from ..errors import FoldError, VerificationError
from ..graph import fold, fx_graph, plan
from ..graph.ir import Call, Conv2d, Ref, attribute
from ..graph.modules import duplicate, unwrapped
from ..graph.plan import Plan
from ..runtime.cuda_graph import GraphRunner
from ..runtime.executor import Executor
from ..runtime.guards import WEIGHT_GUARDS, Change, WeightGuard
from ..runtime.live import LiveModule
from ..runtime.verify import Recast, compare, undisturbed
from ..runtime.verify_steps import check_steps
from .fast_model import FastModel
from .fast_shell import FastShell

Compiled: TypeAlias = Callable[..., Any]
_MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

LOG = logging.getLogger("fastres")


class _Leave(Exception):
    """Why a graph runs as ordinary PyTorch."""


def fastres(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The backend, as torch.compile calls it.

    Args:
        graph_module: what Dynamo recorded.
        example_inputs: its inputs, parameters and buffers among them.
        mode: one of torch.compile's own, all of which mean the same here: kernels that were chosen
            by measurements, and CUDA graphs.
        options: ``{"backend": "auto" | "triton" | "torch"}``.

    Raises:
        ValueError: another mode, another option or another backend.
        BackendError: the backend asked for cannot run here.
    """
    options = dict(options or {})
    backend = check_backend(options.pop("backend", "auto"))
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, _MODES[1:]))}; got {mode!r}")
    if options:
        raise ValueError(f"options of backend='fastres' has one key, 'backend'; got {options}")
    try:
        _check_context(graph_module, example_inputs)
        return _Folded(graph_module, example_inputs, backend)
    except FoldError as error:
        warnings.warn(f"fastres runs this graph as ordinary PyTorch: {error}", stacklevel=2)
    except _Leave as reason:
        LOG.info("graph left to PyTorch: %s", reason)
    trained = _trained(graph_module)
    return _told(graph_module.forward, trained) if trained else graph_module.forward


class _Folded:
    """One graph: its plan, its folded weights, and what they were folded from."""

    def __init__(
        self, graph_module: fx.GraphModule, example_inputs: Sequence[Any], backend: str
    ) -> None:
        self.eager: Compiled = graph_module.forward
        self.backend = backend
        self.program = _Program(graph_module, example_inputs)
        graph = fx_graph.from_fx(self.program.holder, self.program.graph)
        self.plan, self.single = _single_output(plan.build(fold.fold(graph)))
        _check_plan(self.plan)
        self.paths = [path for step in self.plan.steps for path in plan.parameter_paths(step.op)]
        self.verified = self.wrong = False
        self._fold()
        LOG.info(
            "graph of %d steps, %d left to PyTorch", len(self.plan.steps), len(self.plan.fallbacks)
        )

    def __call__(self, *arguments: Any) -> Any:
        program = self.program
        if self.wrong or any(arguments[i].item() != v for i, v in program.scalars.items()):
            return self.eager(*arguments)
        program.bind(arguments)
        if self._guard.check() is not Change.NONE:
            self._refold()
        dynamic = [arguments[i] for i in program.dynamic]
        if not self.verified:
            self.wrong = self._is_wrong(arguments)
            if self.wrong:
                return self.eager(*arguments)
        return self._run(dynamic)

    def _run(self, arguments: list[Any]) -> Any:
        with torch.no_grad():
            if len(arguments) == 1 and isinstance(arguments[0], Tensor):
                output = self._runner(arguments[0])
            else:
                output = self._runner.executor.run(arguments)
        return (output,) if self.single else output

    def _is_wrong(self, arguments: Sequence[Any]) -> bool:
        """The first call compares both, as :func:`fastres.optimize` does; a graph whose answers
        differ is left to PyTorch."""
        executor = self._runner.executor
        dynamic = [arguments[i] for i in self.program.dynamic]
        try:
            with undisturbed(), torch.no_grad():
                self.verified = self._compare(executor, self._eager_with(arguments), dynamic)
                check_steps(executor, executor.module, dynamic)
                if executor.dtype in (torch.float16, torch.bfloat16):
                    self._compare_in_float32(executor.dtype, dynamic)
        except VerificationError as error:
            warnings.warn(f"fastres leaves this graph to PyTorch: {error}", stacklevel=3)
            return True
        return False

    def _eager_with(self, arguments: Sequence[Any]) -> Compiled:
        """What Dynamo recorded, as a function of the inputs that are no weights."""

        def eager(*dynamic: Any) -> Any:
            whole = list(arguments)
            for index, value in zip(self.program.dynamic, dynamic, strict=True):
                whole[index] = value
            return self.eager(*whole)

        return eager

    def _compare(self, executor: Executor, reference: Compiled, inputs: Sequence[Any]) -> bool:
        """The rule of two for the floating-point outputs; False if there are none to compare.

        Raises:
            VerificationError: the answers differ.
        """
        expected = _Floats(reference)
        if not expected(*inputs):
            return False
        less = torch.float32 if executor.dtype is torch.float64 else torch.float64
        exact = Recast(_Floats(fx.GraphModule(executor.module, self.program.graph)), less)
        found = compare(
            expected, _Floats(lambda *values: executor.run(values)), exact, tuple(inputs)
        )
        if not found.ok:
            raise VerificationError(found.reason)
        return True

    def _compare_in_float32(self, dtype: torch.dtype, inputs: Sequence[Any]) -> None:
        """The same plan, of which half precision hides what its rounding is larger than."""
        holder = duplicate(self.program.holder).float()
        ops = select_ops("torch", self._home, torch.float32)
        cast = [v.float() if isinstance(v, Tensor) and v.dtype is dtype else v for v in inputs]
        try:
            executor = Executor(self.plan, holder, ops, torch.float32)
            self._compare(executor, fx.GraphModule(holder, self.program.graph), cast)
        except VerificationError:
            raise
        except RuntimeError:  # of code between the steps that needs its own dtype
            pass

    def _fold(self) -> None:
        weight = attribute(self.program.holder, self.paths[0])
        ops = select_ops(self.backend, weight.device, weight.dtype)
        self._home = weight.device
        executor = Executor(self.plan, self.program.holder, ops, weight.dtype)
        self._runner = GraphRunner(executor)
        self._guard, self._norms = WeightGuard(self.program.holder, self.paths), self._statistics()

    def _refold(self) -> None:
        """Fold what reads a changed tensor. A norm that was trained by itself shows in no version,
        so that its statistics are compared."""
        executor = self._runner.executor
        weight = attribute(self.program.holder, self.paths[0])
        if weight.dtype is not executor.dtype or weight.device != self._home:
            self._fold()
            return
        # The new guard comes first: a step meanwhile is then seen by it, by both at worst.
        guard, norms = WeightGuard(self.program.holder, self.paths), self._statistics()
        trained = {p for p, value in norms.items() if not torch.equal(value, self._norms[p])}
        self._runner.refold(self._guard.changed() | trained)
        self._guard, self._norms = guard, norms

    def _statistics(self) -> dict[str, Tensor]:
        """Copies of what the folded norms have counted, by path."""
        convolutions = [s.op for s in self.plan.steps if isinstance(s.op, Conv2d)]
        norms = [op.norm for op in convolutions if op.norm is not None]
        paths = [path for norm in norms for path in (norm.mean, norm.var)]
        return {path: attribute(self.program.holder, path).detach().clone() for path in paths}


class _Floats(nn.Module):
    """The floating-point outputs of a function."""

    def __init__(self, function: Compiled) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Any) -> list[Tensor]:
        outputs = tree_leaves(self.function(*arguments))
        floats = (t for t in outputs if isinstance(t, Tensor) and t.is_floating_point())
        return [t for t in floats if t.numel()]


class _Program:
    """Dynamo's graph with parameters and buffers as attributes of a module instead of inputs.

    Attributes:
        holder: owns them as ``w{index of the input}``.
        graph: the rest, to be read by :func:`fastres.graph.fx_graph.from_fx`.
        dynamic: indices of the inputs that are left.
        scalars: values of the inputs that are numbers of the modules (eps and the like), by index;
            with ``dynamic=True`` Dynamo passes them on in tensors.
    """

    def __init__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self.holder = nn.Module().eval()
        self.graph = fx.Graph()
        self.dynamic: list[int] = []
        self.scalars: dict[int, float] = {}
        self._slots: list[tuple[dict[str, Any], str, int]] = []
        self._env: dict[fx.Node, Any] = {}
        examples = iter(enumerate(example_inputs))
        for node in graph_module.graph.nodes:
            if node.op == "placeholder":
                self._input(node, *next(examples))
            elif node.op == "get_attr":
                self._attribute(node, attribute(graph_module, str(node.target)))
            elif node.target == "item" and isinstance(self._env[node.args[0]], float):
                self._env[node] = self._env[node.args[0]]
            else:
                self._env[node] = self.graph.node_copy(node, self._env.__getitem__)
                _clean_stack(self._env[node])

    def bind(self, arguments: Sequence[Any]) -> None:
        """Put the parameters and buffers of this call where the guard looks for them."""
        for owner, name, index in self._slots:
            owner[name] = arguments[index]

    def _input(self, node: fx.Node, index: int, example: Any) -> None:
        if _is_static(example):
            self._env[node] = self._own(f"w{index}", example)
            is_parameter = isinstance(example, nn.Parameter)
            owner: Any = self.holder._parameters if is_parameter else self.holder._buffers
            self._slots.append((owner, f"w{index}", index))
        elif _is_scalar(node, example):
            self.scalars[index] = self._env[node] = example.item()
        else:
            self.dynamic.append(index)
            self._env[node] = self.graph.placeholder(node.name)

    def _attribute(self, node: fx.Node, value: Any) -> None:
        if type(value) is not Tensor:
            raise _Leave(f"{node.target} is a {type(value).__name__}")
        self._env[node] = self._own(f"constant_{node.name}", value)

    def _own(self, name: str, tensor: Tensor) -> fx.Node:
        if type(tensor) not in (Tensor, nn.Parameter):
            raise _Leave(f"a weight is a {type(tensor).__name__}")
        if isinstance(tensor, nn.Parameter):
            self.holder.register_parameter(name, tensor)
        else:
            self.holder.register_buffer(name, tensor)
        return self.graph.get_attr(name)


def _is_static(example: Any) -> bool:
    """Parameters, and what Dynamo marks as living as long as its module: the buffers."""
    marked = getattr(example, "_dynamo_static_input_type", None) is not None
    return isinstance(example, nn.Parameter) or marked


def _is_scalar(node: fx.Node, example: Any) -> bool:
    is_number = isinstance(example, Tensor) and example.dim() == 0 and example.device.type == "cpu"
    return is_number and all(user.target == "item" for user in node.users)


def _clean_stack(node: fx.Node) -> None:
    """``L['self']._modules['layer1']`` as ``layer1``, for the plan's table."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        node.meta["nn_module_stack"] = {
            key: (".".join(_NAMES.findall(str(path))), kind) for key, (path, kind) in stack.items()
        }


_NAMES = re.compile(r"_modules\['(\w+)'\]")


def _check_context(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    tensors = [value for value in example_inputs if isinstance(value, Tensor)]
    devices = {tensor.device.type for tensor in tensors if tensor.dim()}
    if not devices <= {"cpu", "cuda"}:
        raise _Leave(f"it is on {', '.join(sorted(devices))}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise _Leave("gradients are wanted")
    if any(torch.is_autocast_enabled(device) for device in devices):
        raise _Leave("autocast is on")
    for node in graph_module.graph.nodes:
        if fx_graph.has_unknown_effect(node):
            raise _Leave(f"{node.target} may have a side effect")


def _check_plan(fused: Plan) -> None:
    if not any(isinstance(step.op, Conv2d) for step in fused.steps):
        raise _Leave("it has no convolution")
    for step, reason in fused.fallbacks:
        if isinstance(step.op, Call) and step.op.mutates:
            raise _Leave(f"{step.name} {reason}")


def _single_output(fused: Plan) -> tuple[Plan, bool]:
    """A 1-tuple of a tensor as the tensor itself, which a CUDA graph can return."""
    output = fused.output
    if isinstance(output, tuple) and len(output) == 1 and isinstance(output[0], Ref):
        return replace(fused, output=output[0]), True
    return fused, False


def _trained(graph_module: fx.GraphModule) -> list[int]:
    """Indices of the graph's inputs that batch norms in training read, their statistics included:
    these change without a version."""
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    norms = [node for node in graph_module.graph.nodes if node.target is F.batch_norm]
    read = {
        source
        for node in norms
        if (node.args[5] if len(node.args) > 5 else node.kwargs.get("training"))
        for source in node.all_input_nodes
    }
    return [index for index, node in enumerate(inputs) if node in read]


def _told(forward: Compiled, trained: Sequence[int]) -> Compiled:
    """``forward`` that tells all weight guards of the inputs that it trains."""

    def run(*arguments: Any) -> Any:
        output = forward(*arguments)
        WEIGHT_GUARDS.tell([arguments[index] for index in trained], frozenset())
        return output

    return run


def refresh(model: nn.Module) -> None:
    """Fold a module's weights again at the next call, wherever they were folded.

    For live networks and for modules under ``torch.compile(model, backend="fastres")``. Needed only
    after changes that PyTorch cannot see: through ``.data``, numpy views or raw collectives.

    Args:
        model: a module, compiled or not, on its own or around others; of a compiled function, the
            module that it calls.

    Raises:
        TypeError: not a module, or a frozen copy, which :func:`fastres.optimize` makes anew.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(unwrapped(model), (FastModel, FastShell)):
        kind = type(unwrapped(model)).__name__
        raise TypeError(f"model is a {kind}, a frozen copy: optimize its source again")
    for module in model.modules():
        if isinstance(module, LiveModule):
            module.refresh()
    WEIGHT_GUARDS.tell((*model.parameters(), *model.buffers()), frozenset())
