"""Runs a plan. One class per way of computing a step; one executor that walks the steps.

Activations are ordinary torch tensors in channels_last memory, dropped at their last use, so that
torch's allocator reuses their buffers, inside a CUDA graph's private pool as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import BackendError, FastresError
from .fold import folded_conv, folded_linear
from .ir import (
    Add,
    AvgPool2d,
    BatchNorm2d,
    Call,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    Operation,
    ReLU,
    attribute,
    substitute,
)
from .plan import Plan, Step

BACKENDS = ("auto", "triton", "torch")
CHANNELS_LAST = torch.channels_last

Weights = tuple[Tensor, Tensor | None]
Restore = Callable[[Any], Any]
Observer = Callable[[Step, list[Any], Any], None]


class InputError(FastresError, ValueError, RuntimeError):
    """An input that the model cannot take: rank, channels, size or device."""


class InputTypeError(FastresError, TypeError, RuntimeError):
    """An input of the wrong type or dtype."""


class AtenOps:
    """Every step by plain PyTorch operators: any device, any dtype."""

    name: ClassVar[str] = "torch"

    def prepare(self, op: Conv2d | Linear, weights: Weights) -> Any:
        """Weights in the form that ``conv`` and ``linear`` take them."""
        weight, bias = weights
        return weight, None if bias is None else bias.to(weight.dtype)

    def update(self, op: Conv2d | Linear, prepared: Any, weights: Weights) -> Any:
        """New values, written into the same storage where captured graphs hold its address."""
        fresh = self.prepare(op, weights)
        for old, new in zip(prepared, fresh, strict=True):
            if old is not None:
                old.copy_(new)
        return prepared

    def conv(
        self, op: Conv2d, prepared: Any, x: Tensor, residual: Tensor | None, in_place: bool
    ) -> Tensor:
        weight, bias = prepared
        y = F.conv2d(x, weight, bias, op.stride, op.padding, op.dilation, op.groups)
        if residual is not None:
            y = residual.add_(y) if in_place else y.add_(residual)
        return y.relu_() if op.relu else y

    def linear(self, op: Linear, prepared: Any, x: Tensor) -> Tensor:
        y = F.linear(x, *prepared)
        return y.relu_() if op.relu else y

    def add(self, x: Tensor, y: Tensor, relu: bool, in_place: bool) -> Tensor:
        total = x.add_(y) if in_place else x + y
        return total.relu_() if relu else total

    def relu(self, x: Tensor, in_place: bool) -> Tensor:
        return x.relu_() if in_place else x.relu()

    def max_pool(self, op: MaxPool2d, x: Tensor) -> Tensor:
        return F.max_pool2d(x, op.kernel, op.stride, op.padding, op.dilation, op.ceil_mode)

    def avg_pool(self, op: AvgPool2d, x: Tensor) -> Tensor:
        return F.avg_pool2d(
            x,
            op.kernel,
            op.stride,
            op.padding,
            op.ceil_mode,
            op.count_include_pad,
            op.divisor_override,
        )

    def global_avg_pool(self, op: GlobalAvgPool, x: Tensor) -> Tensor:
        return x.mean(op.dims, keepdim=op.keepdim)

    def serves(self, op: Operation) -> str:
        """The name of what computes a step, for the plan's table."""
        return {Conv2d: "aten conv2d", Linear: "aten linear"}.get(type(op), "aten")


class _Packed:
    """A convolution's weights, put into oneDNN's own order for the first input size they meet.

    Other sizes stay right: oneDNN reorders once more inside the call where it wants another order.
    """

    __slots__ = ("bias", "dense", "packed")

    def __init__(self, dense: Tensor, bias: Tensor | None) -> None:
        self.dense: Tensor | None = dense
        self.bias = bias
        self.packed: Tensor | None = None

    def weight(self, op: Conv2d, x: Tensor) -> Tensor:
        dense = self.dense
        if self.packed is None and dense is not None:
            geometry: Any = (list(op.padding), list(op.stride), list(op.dilation), op.groups)
            with torch.inference_mode(False):
                reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
                self.packed = reorder(dense.to_mkldnn(), *geometry, list(x.shape))
            self.dense = None
        assert self.packed is not None
        return self.packed


class OneDNNOps(AtenOps):
    """The CPU: convolution, bias, residual and ReLU in one oneDNN primitive, weights pre-packed."""

    name = "onednn"

    def __init__(self) -> None:
        mkldnn = torch.ops.mkldnn
        self._plain = mkldnn._convolution_pointwise.default
        self._add = mkldnn._convolution_pointwise.binary
        self._add_in_place = mkldnn._convolution_pointwise_.binary

    def prepare(self, op: Conv2d | Linear, weights: Weights) -> Any:
        weight, bias = super().prepare(op, weights)
        return _Packed(weight, bias) if isinstance(op, Conv2d) else (weight, bias)

    def update(self, op: Conv2d | Linear, prepared: Any, weights: Weights) -> Any:
        return self.prepare(op, weights)

    def conv(
        self, op: Conv2d, prepared: Any, x: Tensor, residual: Tensor | None, in_place: bool
    ) -> Tensor:
        if x.shape[0] == 0:
            return super().conv(op, self._unpacked(prepared, op, x), x, residual, in_place)
        weight, bias = prepared.weight(op, x), prepared.bias
        geometry = (op.padding, op.stride, op.dilation, op.groups)
        if residual is None:
            unary = "relu" if op.relu else "none"
            return self._plain(x, weight, bias, *geometry, unary, [], "")
        epilogue: Any = ("add", 1.0, "relu" if op.relu else None, [], None)
        if in_place:
            return self._add_in_place(residual, x, weight, bias, *geometry, *epilogue)
        return self._add(x, residual, weight, bias, *geometry, *epilogue)

    def _unpacked(self, prepared: _Packed, op: Conv2d, x: Tensor) -> Weights:
        """Any weights of the right shape: an empty batch never reads them."""
        shape = (op.out_channels, op.in_channels // op.groups, *op.kernel)
        return x.new_zeros(shape), prepared.bias

    def serves(self, op: Operation) -> str:
        return "oneDNN conv" if isinstance(op, Conv2d) else super().serves(op)


class CudnnOps(AtenOps):
    """CUDA without Triton: cuDNN's own fused operators where it has them."""

    name = "cudnn"

    def conv(
        self, op: Conv2d, prepared: Any, x: Tensor, residual: Tensor | None, in_place: bool
    ) -> Tensor:
        weight, bias = prepared
        if not op.relu or bias is None or x.dtype is torch.float64:
            return super().conv(op, prepared, x, residual, in_place)
        geometry = (op.stride, op.padding, op.dilation, op.groups)
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)

    def serves(self, op: Operation) -> str:
        fused = isinstance(op, Conv2d) and op.relu
        return "cuDNN fused conv" if fused else super().serves(op)


class TritonOps(AtenOps):
    """fastres' own kernels: CUDA, or CPU tensors under Triton's interpreter."""

    name = "triton"

    def __init__(self) -> None:
        try:
            from . import kernels
        except ImportError as error:
            raise BackendError(f"backend='triton' needs the package triton: {error}") from error
        self.kernels: Any = kernels

    def prepare(self, op: Conv2d | Linear, weights: Weights) -> Any:
        return weights

    def conv(
        self, op: Conv2d, prepared: Any, x: Tensor, residual: Tensor | None, in_place: bool
    ) -> Tensor:
        weight, bias = prepared
        if residual is not None:
            residual = residual.contiguous(memory_format=CHANNELS_LAST)
        return self.kernels.conv2d(
            x.contiguous(memory_format=CHANNELS_LAST),
            weight,
            bias,
            stride=op.stride,
            padding=op.padding,
            dilation=op.dilation,
            groups=op.groups,
            residual=residual,
            relu=op.relu,
            precision=conv_precision(),
            out=residual if in_place else None,
        )

    def linear(self, op: Linear, prepared: Any, x: Tensor) -> Tensor:
        weight, bias = prepared
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = self.kernels.linear(rows, weight, bias, relu=op.relu, precision=matmul_precision())
        return y.view(*x.shape[:-1], op.out_features)

    def add(self, x: Tensor, y: Tensor, relu: bool, in_place: bool) -> Tensor:
        alike = x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride()
        if not alike or not _is_dense(x):
            return super().add(x, y, relu, in_place)
        return self.kernels.add_relu(x, y, relu=relu, out=x if in_place else None)

    def relu(self, x: Tensor, in_place: bool) -> Tensor:
        if not _is_dense(x):
            return super().relu(x, in_place)
        return self.kernels.relu(x, out=x if in_place else None)

    def max_pool(self, op: MaxPool2d, x: Tensor) -> Tensor:
        return self.kernels.max_pool2d(
            x.contiguous(memory_format=CHANNELS_LAST),
            op.kernel,
            stride=op.stride,
            padding=op.padding,
            dilation=op.dilation,
            ceil_mode=op.ceil_mode,
        )

    def avg_pool(self, op: AvgPool2d, x: Tensor) -> Tensor:
        return self.kernels.avg_pool2d(
            x.contiguous(memory_format=CHANNELS_LAST),
            op.kernel,
            stride=op.stride,
            padding=op.padding,
            ceil_mode=op.ceil_mode,
            count_include_pad=op.count_include_pad,
            divisor_override=op.divisor_override,
        )

    def global_avg_pool(self, op: GlobalAvgPool, x: Tensor) -> Tensor:
        if x.dim() != 4:
            return super().global_avg_pool(op, x)
        y: Tensor = self.kernels.global_avg_pool(x.contiguous(memory_format=CHANNELS_LAST))
        return y if op.keepdim else y.flatten(1)

    def serves(self, op: Operation) -> str:
        return f"triton {_TRITON_NAMES[type(op)]}" if type(op) in _TRITON_NAMES else "view"


_TRITON_NAMES: dict[type, str] = {
    Conv2d: "conv2d",
    Linear: "linear",
    Add: "add_relu",
    ReLU: "relu",
    MaxPool2d: "max_pool2d",
    AvgPool2d: "avg_pool2d",
    GlobalAvgPool: "global_avg_pool",
}


def conv_precision() -> str:
    """``"tf32"`` or ``"ieee"``: what torch's flags allow fp32 convolutions on CUDA."""
    cudnn: Any = torch.backends.cudnn
    return _first_set(cudnn.conv.fp32_precision, cudnn.fp32_precision)


def matmul_precision() -> str:
    """``"tf32"`` or ``"ieee"``: what torch's flags allow fp32 matrix products on CUDA."""
    cuda: Any = torch.backends.cuda
    return _first_set(cuda.matmul.fp32_precision)


def _first_set(*levels: str) -> str:
    everywhere: Any = torch.backends
    for level in (*levels, everywhere.fp32_precision):
        if level != "none":
            return "tf32" if level == "tf32" else "ieee"
    return "ieee"


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=CHANNELS_LAST))


def check_backend(backend: str) -> str:
    """``backend`` itself, or ValueError when it is none of :data:`BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend


def select_ops(backend: str, device: torch.device, dtype: torch.dtype) -> AtenOps:
    """What computes the steps on this device in this dtype.

    Raises:
        BackendError: ``backend="triton"`` where Triton cannot run.
    """
    check_backend(backend)
    if backend == "triton":
        if device.type == "cpu" and not _interpreting():
            raise BackendError(
                "backend='triton' needs a CUDA device, got a CPU tensor "
                "(or set TRITON_INTERPRET=1 before triton is imported)"
            )
        return TritonOps()
    if device.type == "cuda":
        triton = backend == "auto" and dtype in (torch.float16, torch.bfloat16, torch.float32)
        return TritonOps() if triton and _has_triton() else CudnnOps()
    return OneDNNOps() if device.type == "cpu" and _onednn_takes(dtype) else AtenOps()


def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None


def _interpreting() -> bool:
    if not _has_triton():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _onednn_takes(dtype: torch.dtype) -> bool:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype is torch.float32


class Executor:
    """A plan with weights: ``run`` computes it.

    Args:
        plan: what to run.
        module: where parameters, buffers and called submodules are looked up by path.
        ops: what computes the steps.
        dtype: dtype of weights and activations.
        weights: gives a step's folded weights; by default they are folded from ``module``.
    """

    def __init__(
        self,
        plan: Plan,
        module: nn.Module,
        ops: AtenOps,
        dtype: torch.dtype,
        weights: Callable[[Step], Weights] | None = None,
    ) -> None:
        self.module = module
        self.ops = ops
        self.dtype = dtype
        self._weights = weights or self._fold
        self.plan = replace(plan, served_by=tuple(_server(ops, step.op) for step in plan.steps))
        self._prepared: dict[str, Any] = {}
        self._checked: set[Any] = set()
        self.refold()

    def refold(self) -> None:
        """Read the module's parameters again, into the same storage.

        Raises:
            FoldError: the numbers of a layer cannot be folded.
        """
        with torch.inference_mode(False), torch.no_grad():
            folded = {
                step.name: self._weights(step)
                for step in self.plan.steps
                if isinstance(step.op, (Conv2d, Linear))
            }
            for step in self.plan.steps:
                if isinstance(step.op, (Conv2d, Linear)):
                    self._prepared[step.name] = self._prepare(step, folded[step.name])

    def _fold(self, step: Step) -> Weights:
        return fold_step(step.op, self._lookup, self.dtype)

    def _prepare(self, step: Step, weights: Weights) -> Any:
        assert isinstance(step.op, (Conv2d, Linear))
        if step.name in self._prepared:
            return self.ops.update(step.op, self._prepared[step.name], weights)
        return self.ops.prepare(step.op, weights)

    def run(self, arguments: Sequence[Any], observe: Observer | None = None) -> Any:
        """The plan's output for these arguments, one per parameter of the plan.

        Args:
            observe: called after each step with the step, its inputs and its result; nothing is
                computed in place then.

        Raises:
            InputError, InputTypeError: an argument does not fit; nothing was computed.
        """
        names = [parameter.name for parameter in self.plan.parameters]
        values: dict[str, Any] = dict(zip(names, arguments, strict=True))
        self._check(values)
        contiguous = not any(_is_channels_last(v) for v in arguments)
        for name, value in values.items():
            if isinstance(value, Tensor) and value.dim() == 4:
                values[name] = value.contiguous(memory_format=CHANNELS_LAST)
        restore = _to_contiguous if contiguous else _unchanged
        for step in self.plan.steps:
            if observe is not None:
                step = replace(step, in_place=False)
            result = _RUN[type(step.op)](self, step, values, restore)
            if observe is not None:
                observe(step, [values[name] for name in step.inputs], result)
            values[step.name] = result
            for name in step.frees:
                values.pop(name, None)
        return substitute(self.plan.output, lambda name: restore(values[name]))

    def _check(self, values: Mapping[str, Any]) -> None:
        key = tuple(
            (tuple(v.shape), v.dtype, v.device) if isinstance(v, Tensor) else None
            for v in values.values()
        )
        if key not in self._checked:
            check_inputs(self.plan, values, self.dtype)
            if len(self._checked) > 256:
                self._checked.clear()
            self._checked.add(key)

    def _lookup(self, path: str) -> Tensor:
        return attribute(self.module, path)

    def _conv(self, step: Step, values: dict[str, Any], restore: Restore) -> Tensor:
        op: Any = step.op
        x = self._autocast(values[step.inputs[0]])
        prepared = self._prepared[step.name]
        if not op.residual:
            return self.ops.conv(op, prepared, x, None, False)
        residual = values[step.inputs[1]]
        if _fits(op, x, residual):
            return self.ops.conv(op, prepared, x, residual, step.in_place)
        bare = self.ops.conv(replace(op, relu=False, residual=False), prepared, x, None, False)
        return self._sum(bare, residual, op.relu, False)

    def _linear(self, step: Step, values: dict[str, Any], restore: Restore) -> Tensor:
        op: Any = step.op
        x = self._autocast(values[step.inputs[0]])
        return self.ops.linear(op, self._prepared[step.name], x)

    def _autocast(self, x: Tensor) -> Tensor:
        """Under autocast a PyTorch step may have widened ``x``; weights come in the plan's dtype."""
        if x.dtype is self.dtype or not torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(self.dtype)

    def _batch_norm(self, step: Step, values: dict[str, Any], restore: Restore) -> Tensor:
        op: Any = step.op
        weight, bias = (self._lookup(p) if p else None for p in (op.weight, op.bias))
        mean, var = self._lookup(op.mean), self._lookup(op.var)
        return F.batch_norm(values[step.inputs[0]], mean, var, weight, bias, False, 0.0, op.eps)

    def _relu(self, step: Step, values: dict[str, Any], restore: Restore) -> Tensor:
        return self.ops.relu(values[step.inputs[0]], step.in_place)

    def _add(self, step: Step, values: dict[str, Any], restore: Restore) -> Any:
        op: Any = step.op
        return self._sum(values[step.inputs[0]], values[step.inputs[-1]], op.relu, step.in_place)

    def _sum(self, x: Any, y: Any, relu: bool, in_place: bool) -> Any:
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            return (x + y).relu() if relu else x + y
        alike = x.shape == y.shape and x.dtype == y.dtype
        return self.ops.add(x, y, relu, in_place and alike)

    def _max_pool(self, step: Step, values: dict[str, Any], restore: Restore) -> Tensor:
        op: Any = step.op
        return self.ops.max_pool(op, values[step.inputs[0]])

    def _avg_pool(self, step: Step, values: dict[str, Any], restore: Restore) -> Tensor:
        op: Any = step.op
        return self.ops.avg_pool(op, values[step.inputs[0]])

    def _global_avg_pool(self, step: Step, values: dict[str, Any], restore: Restore) -> Tensor:
        op: Any = step.op
        return self.ops.global_avg_pool(op, values[step.inputs[0]])

    def _flatten(self, step: Step, values: dict[str, Any], restore: Restore) -> Tensor:
        return restore(values[step.inputs[0]]).flatten(1)

    def _call(self, step: Step, values: dict[str, Any], restore: Restore) -> Any:
        op: Any = step.op
        if op.kind == "get_attr":
            return self._lookup(op.target)
        fetch = values.__getitem__ if op.any_layout else lambda name: restore(values[name])
        args, kwargs = substitute(op.args, fetch), substitute(op.kwargs, fetch)
        if op.kind == "call_module":
            return attribute(self.module, op.target)(*args, **kwargs)
        if op.kind == "call_method":
            return getattr(args[0], op.target)(*args[1:], **kwargs)
        return op.target(*args, **kwargs)


_RUN: dict[type, Callable[[Executor, Step, dict[str, Any], Restore], Any]] = {
    Conv2d: Executor._conv,
    Linear: Executor._linear,
    BatchNorm2d: Executor._batch_norm,
    ReLU: Executor._relu,
    Add: Executor._add,
    MaxPool2d: Executor._max_pool,
    AvgPool2d: Executor._avg_pool,
    GlobalAvgPool: Executor._global_avg_pool,
    Flatten: Executor._flatten,
    Call: Executor._call,
}


def fold_step(op: Operation, lookup: Callable[[str], Tensor], dtype: torch.dtype) -> Weights:
    """Folded weight and bias of a convolution or linear step."""
    if isinstance(op, Conv2d):
        return folded_conv(op, lookup, dtype)
    assert isinstance(op, Linear)
    return folded_linear(op, lookup, dtype)


def check_inputs(plan: Plan, values: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Refuse, before anything runs, what the plan's convolutions cannot take.

    Raises:
        InputTypeError: not a tensor where a convolution reads it, or another dtype.
        InputError: wrong rank or channel count, or an image too small for a window.
    """
    names = {parameter.name for parameter in plan.parameters}
    for step in plan.steps:
        for name in set(step.inputs[:1]) & names:
            if isinstance(step.op, Conv2d):
                _check_image(name, values[name], step.op, dtype)
    shapes = plan.shapes(
        *(tuple(v.shape) if isinstance(v, Tensor) else () for v in values.values())
    )
    for step in plan.steps:
        shape = shapes[step.name]
        if shape is not None and any(size <= 0 for size in shape[2:]):
            source = next(tuple(v.shape) for v in values.values() if isinstance(v, Tensor))
            raise InputError(
                f"the image is too small: input {source} leaves {tuple(shape[2:])} pixels "
                f"at {step.where or step.name}"
            )


def _check_image(name: str, x: Any, op: Conv2d, dtype: torch.dtype) -> None:
    if not isinstance(x, Tensor):
        raise InputTypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}")
    if x.dim() != 4:
        raise InputError(f"{name} must be 4-D (N, C, H, W); got shape {tuple(x.shape)}")
    if x.shape[1] != op.in_channels:
        raise InputError(
            f"{name} must have {op.in_channels} channels (axis 1); got shape {tuple(x.shape)}"
        )
    if x.dtype is not dtype:
        raise InputTypeError(f"{name} must be {dtype}, the dtype of the weights; got {x.dtype}")


def _fits(op: Conv2d, x: Tensor, residual: Any) -> bool:
    """Whether the sum neither broadcasts nor promotes, so that it can be fused."""
    if not isinstance(residual, Tensor) or residual.dtype is not x.dtype or residual.dim() != 4:
        return False
    same_images = residual.shape[0] == x.shape[0] and residual.shape[1] == op.out_channels
    return same_images and all(
        (x.shape[i + 2] + 2 * op.padding[i] - op.dilation[i] * (op.kernel[i] - 1) - 1)
        // op.stride[i]
        + 1
        == residual.shape[i + 2]
        for i in (0, 1)
    )


def _server(ops: AtenOps, op: Operation) -> str:
    return "" if isinstance(op, (Call, BatchNorm2d)) else ops.serves(op)


def _is_channels_last(value: Any) -> bool:
    """A 4-D tensor in NHWC memory that is not NCHW contiguous as well."""
    return (
        isinstance(value, Tensor)
        and value.dim() == 4
        and not value.is_contiguous()
        and value.is_contiguous(memory_format=CHANNELS_LAST)
    )


def _to_contiguous(value: Any) -> Any:
    return value.contiguous() if _is_channels_last(value) else value


def _unchanged(value: Any) -> Any:
    return value
