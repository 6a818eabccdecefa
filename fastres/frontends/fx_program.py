"""A plan as straight-line code of functional operators, for compilers, exporters and transforms.

Eager calls go through the engine. Under torch.compile, torch.export, jit tracing, dispatch modes
and functorch the same plan runs as a torch.fx program instead: plain aten operators, or fastres'
custom operators where Triton serves. Nothing in it is written in place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..backends.aten import is_result
from ..backends.memory_format import is_channels_last, to_channels_last, to_contiguous
from ..backends.select import conv_precision, matmul_precision
from ..graph.ir import (
    Add,
    AvgPool2d,
    BatchNorm2d,
    Call,
    Conv2d,
    Dequantize,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    Pair,
    Quantize,
    ReLU,
    substitute,
)
from ..graph.plan import Plan, Step, kept_names
from ..graph.quantize import value_grids

Program: TypeAlias = Callable[..., Any]

# What torch.compiler.assume_constant_result sets, which would import Dynamo here: the flags, whose
# getters Dynamo cannot look into, are read when a graph is compiled.
conv_precision.__dict__["_dynamo_marked_constant"] = True
matmul_precision.__dict__["_dynamo_marked_constant"] = True


class Aten:
    """The steps as plain PyTorch operators, which every compiler and exporter takes."""

    def nhwc(self, value: Any) -> Any:
        """A 4-D tensor in channels_last memory; everything else as it is."""
        return to_channels_last(value)

    def wants_nchw(self, *arguments: Any) -> bool:
        """Whether 4-D results go back in NCHW: unless an argument came in channels_last."""
        return not any(is_channels_last(value) for value in arguments)

    def restored(self, value: Any, nchw: bool) -> Any:
        """A value in the memory format that the source would have given it."""
        return to_contiguous(value) if nchw else value

    def flatten(self, value: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C*H*W) in NCHW order."""
        return value.flatten(1)

    def conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
        relu: bool,
    ) -> Tensor:
        bias = None if bias is None else bias.to(weight.dtype)
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return self.add(y, residual, relu) if residual is not None else self.relu(y, relu)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        bias = None if bias is None else bias.to(weight.dtype)
        return self.relu(F.linear(x, weight, bias), relu)

    def quantize(self, x: Tensor, scale: float, zero: int) -> Tensor:
        wide = self.cast(x, torch.promote_types(x.dtype, torch.float32))
        return (wide / scale).round().add(zero).clamp(0, 255).to(torch.uint8)

    def dequantize(self, x: Tensor, scale: float, zero: int) -> Tensor:
        return (x.to(torch.float32) - zero) * scale

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x if x.dtype is dtype else x.to(dtype)

    def int8_weight(self, weight: Tensor, scale: Tensor) -> Tensor:
        return weight.to(scale.dtype) * scale.view(-1, 1, 1, 1)

    def add(self, x: Any, y: Any, relu: bool) -> Any:
        return self.relu(x + y, relu)

    def relu(self, x: Tensor, relu: bool = True) -> Tensor:
        return x.relu() if relu else x

    def max_pool(
        self,
        x: Tensor,
        kernel: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        ceil_mode: bool,
    ) -> Tensor:
        return F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)

    def avg_pool(
        self,
        x: Tensor,
        kernel: Pair,
        stride: Pair,
        padding: Pair,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> Tensor:
        rest = (ceil_mode, count_include_pad, divisor_override)
        return F.avg_pool2d(x, kernel, stride, padding, *rest)

    def global_avg_pool(self, x: Tensor, dims: Pair, keepdim: bool) -> Tensor:
        return x.mean(dims, keepdim=keepdim)


class Onnx(Aten):
    """As :class:`Aten`, with ONNX's own operators to bytes and back, which runtimes fuse."""

    def quantize(self, x: Tensor, scale: float, zero: int) -> Tensor:
        wide = self.cast(x, torch.float32)
        return self._linear("Quantize", wide, torch.tensor(scale), zero, torch.uint8)

    def dequantize(self, x: Tensor, scale: float, zero: int) -> Tensor:
        return self._linear("Dequantize", x, torch.tensor(scale), zero, torch.float32)

    def int8_weight(self, weight: Tensor, scale: Tensor) -> Tensor:
        kind: Any = {"dtype": scale.dtype, "shape": weight.shape, "attrs": {"axis": 0}}
        return torch.onnx.ops.symbolic("DequantizeLinear", (weight, scale), **kind)

    def _linear(self, kind: str, x: Tensor, scale: Tensor, zero: int, to: torch.dtype) -> Tensor:
        inputs = (x, scale, torch.tensor(zero, dtype=torch.uint8))
        return torch.onnx.ops.symbolic(f"{kind}Linear", inputs, dtype=to, shape=x.shape)


class AnyLayout(Aten):
    """As :class:`Aten`, for transforms that cannot tell memory formats, such as vmap."""

    def nhwc(self, value: Any) -> Any:
        return value

    def wants_nchw(self, *arguments: Any) -> bool:
        return True

    def restored(self, value: Any, nchw: bool) -> Any:
        return value.contiguous() if isinstance(value, Tensor) else value


class CustomOps(Aten):
    """The steps as fastres' custom operators around its Triton kernels.

    Args:
        suffix: of the operators' names: ``"_or_plain"`` for those that PyTorch stands in for.
    """

    def __init__(self, suffix: str = "") -> None:
        self.suffix = suffix

    def _op(self, name: str, *arguments: Any) -> Tensor:
        found: Tensor = getattr(torch.ops.fastres, name + self.suffix)(*arguments)
        return found

    def conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
        relu: bool,
    ) -> Tensor:
        channels, _, *kernel = weight.shape
        geometry = kernel, stride, padding, dilation
        fits = residual is None or is_result(residual, x, channels, *geometry)
        y = self._op(
            "conv2d",
            self.nhwc(x),
            weight,
            bias,
            self.nhwc(residual) if fits else None,
            stride,
            padding,
            dilation,
            groups,
            relu and fits,
            conv_precision(),
        )
        return y if fits else self.add(y, residual, relu)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = self._op("linear", rows, weight, bias, relu, matmul_precision())
        return y.view(*x.shape[:-1], weight.shape[0])

    def max_pool(
        self,
        x: Tensor,
        kernel: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        ceil_mode: bool,
    ) -> Tensor:
        rest = (kernel, stride, padding, dilation, ceil_mode)
        return self._op("max_pool2d", self.nhwc(x), *rest)

    def avg_pool(
        self,
        x: Tensor,
        kernel: Pair,
        stride: Pair,
        padding: Pair,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> Tensor:
        rest = (ceil_mode, count_include_pad, divisor_override)
        return self._op("avg_pool2d", self.nhwc(x), kernel, stride, padding, *rest)

    def global_avg_pool(self, x: Tensor, dims: Pair, keepdim: bool) -> Tensor:
        if x.dim() != 4:
            return super().global_avg_pool(x, dims, keepdim)
        y = self._op("global_avg_pool", self.nhwc(x))
        return y if keepdim else y.flatten(1)


def lower(plan: Plan) -> Program:
    """The plan as a function of ``(model, ops, *arguments)``.

    ``model`` is what has ``dtype``, ``folded.weight{i}`` and ``folded.bias{i}`` for step i, and
    under ``kept`` what the steps left to PyTorch need; ``ops`` is an :class:`Aten`. Arguments that
    are given by keyword go by :func:`argument_names`.

    All names in the source that is generated here are our own: a plan's may come from a file, or be
    words of Python. What else a plan says is rendered by ``repr`` as a constant.
    """
    code = _Lowering(plan).run().python_code("self")
    namespace = dict(code.globals)
    exec(code.src, namespace)  # torch.fx's own rendering of the graph, as fx.GraphModule runs it
    program: Program = namespace["forward"]
    return program


def argument_names(plan: Plan) -> dict[str, str]:
    """What the program of :func:`lower` calls the plan's parameters."""
    return {parameter.name: f"a{index}" for index, parameter in enumerate(plan.parameters)}


def _by_position(op: Call) -> Program:
    """What a step calls, with its keywords' values behind the others: a keyword is a name, too."""
    target, is_method, names = op.target, op.kind == "call_method", tuple(op.kwargs)
    has_function = op.kind == "call_function"

    def call(*values: Any) -> Any:
        first = len(values) - len(names)
        named = dict(zip(names, values[first:], strict=True))
        if has_function:
            return target(*values[:first], **named)  # type: ignore[operator]
        called = getattr(values[0], target) if is_method else values[0]  # type: ignore[arg-type]
        return called(*values[1:first], **named)

    return call


class _Lowering:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.kept = {path: f"kept.{name}" for path, name in kept_names(plan).items()}
        self.graph = fx.Graph()
        self.values: dict[str, fx.Node] = {}
        self.grids = value_grids(plan)

    def run(self) -> fx.Graph:
        graph = self.graph
        self.ops = graph.placeholder("ops")
        names = argument_names(self.plan)
        inputs = []
        for parameter in self.plan.parameters:
            default = () if parameter.required else (parameter.default,)
            inputs.append(graph.create_node("placeholder", names[parameter.name], default))
        self.nchw = self._ops("wants_nchw", *inputs)
        keep = self.plan.source_layout
        for parameter, node in zip(self.plan.parameters, inputs, strict=True):
            self.values[parameter.name] = node if keep else self._ops("nhwc", node)
        for index, step in enumerate(self.plan.steps):
            self.values[step.name] = self._step(index, step)
            if keep:
                self.values[step.name] = self._restored(step.name)
        graph.output(self._arguments(self.plan.output, self._restored))
        return graph

    def _step(self, index: int, step: Step) -> fx.Node:
        op = step.op
        if isinstance(op, Call):
            return self._call(op)
        x: Any = self._number(step.inputs[0])
        if isinstance(op, Dequantize):
            return self._cast(x)
        if isinstance(op, Quantize):
            return self._ops("quantize", x, op.grid.scale, op.grid.zero)
        if isinstance(op, Conv2d):
            residual = self._number(step.inputs[1]) if op.residual else None
            geometry = (op.stride, op.padding, op.dilation, op.groups, op.relu)
            y = self._ops("conv", x, *self._weights(index, step), residual, *geometry)
            return self._cast(y) if op.x_grid and not op.y_grid else self._on_grid(step.name, y)
        if isinstance(op, Linear):
            return self._ops("linear", x, *self._weights(index, step), op.relu)
        if isinstance(op, Add):
            return self._ops("add", x, self.values[step.inputs[-1]], op.relu)
        if isinstance(op, ReLU):
            return self._ops("relu", x)
        if isinstance(op, MaxPool2d):
            window = (op.kernel, op.stride, op.padding, op.dilation, op.ceil_mode)
            return self._on_grid(step.name, self._ops("max_pool", x, *window))
        if isinstance(op, AvgPool2d):
            divisor = (op.ceil_mode, op.count_include_pad, op.divisor_override)
            return self._ops("avg_pool", x, op.kernel, op.stride, op.padding, *divisor)
        if isinstance(op, GlobalAvgPool):
            y = self._ops("global_avg_pool", x, op.dims, op.keepdim)
            return self._cast(y) if op.x_grid else y
        if isinstance(op, Flatten):
            return self._ops("flatten", self._restored(step.inputs[0]))
        assert isinstance(op, BatchNorm2d)
        return self._batch_norm(op, x)

    def _ops(self, method: str, *arguments: Any) -> fx.Node:
        return self.graph.call_method(method, (self.ops, *arguments))

    def _cast(self, value: fx.Node) -> fx.Node:
        """What 8-bit steps have computed in float32, in the model's dtype."""
        return self._ops("cast", value, self.graph.get_attr("dtype"))

    def _number(self, name: str) -> fx.Node:
        """A value in floating point, float32 of bytes."""
        value, grid = self.values[name], self.grids.get(name)
        return value if grid is None else self._ops("dequantize", value, grid.scale, grid.zero)

    def _on_grid(self, name: str, value: fx.Node) -> fx.Node:
        """The number that a step has computed as what its readers take."""
        grid = self.grids.get(name)
        return value if grid is None else self._ops("quantize", value, grid.scale, grid.zero)

    def _weights(self, index: int, step: Step) -> tuple[fx.Node, fx.Node | None]:
        op: Any = step.op
        in_8_bits = getattr(op, "x_grid", None) is not None
        biased = op.bias is not None or getattr(op, "norm", None) is not None or in_8_bits
        bias = self.graph.get_attr(f"folded.bias{index}") if biased else None
        weight = self.graph.get_attr(f"folded.weight{index}")
        if in_8_bits:
            scale = self.graph.get_attr(f"folded.scale{index}")
            weight = self._ops("int8_weight", weight, scale)
        return weight, bias

    def _batch_norm(self, op: BatchNorm2d, x: fx.Node) -> fx.Node:
        paths = (op.mean, op.var, op.weight, op.bias)
        tensors = [None if p is None else self.graph.get_attr(self.kept[p]) for p in paths]
        return self.graph.call_function(F.batch_norm, (x, *tensors, False, 0.0, op.eps))

    def _call(self, op: Call) -> fx.Node:
        target: Any = self.kept.get(str(op.target), op.target)
        if op.kind == "get_attr":
            return self.graph.get_attr(target)
        fetch = self.values.__getitem__ if op.any_layout else self._restored
        args = self._arguments(op.args, fetch)
        if not op.kwargs:
            return self.graph.create_node(op.kind, target, args)
        if op.kind == "call_module":
            args = (self.graph.get_attr(target), *args)
        values = self._arguments(tuple(op.kwargs.values()), fetch)
        return self.graph.call_function(_by_position(op), (*args, *values))

    def _restored(self, name: str) -> fx.Node:
        return self._ops("restored", self.values[name], self.nchw)

    def _arguments(self, value: Any, fetch: Callable[[str], fx.Node]) -> Any:
        return self._containers(substitute(value, fetch))

    def _containers(self, value: Any) -> Any:
        """torch.fx's arguments know plain containers only: others are made by a call."""
        if isinstance(value, OrderedDict):
            items = [(key, self._containers(item)) for key, item in value.items()]
            return self.graph.call_function(OrderedDict, (items,))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self.graph.call_function(type(value), tuple(map(self._containers, value)))
        if isinstance(value, (tuple, list)):
            return type(value)(self._containers(item) for item in value)
        if isinstance(value, dict):
            return {key: self._containers(item) for key, item in value.items()}
        return value
