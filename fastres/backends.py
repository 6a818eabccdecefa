"""Ways of computing a step: aten, oneDNN, cuDNN and fastres' own Triton kernels.

Each is a class with one method per operation; activations are torch tensors, 4-D ones in
channels_last memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import BackendError
from .fold import Weights
from .ir import (
    Add,
    AvgPool2d,
    Conv2d,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    Operation,
    ReLU,
)
from .tuning import Group

BACKENDS = ("auto", "triton", "torch")
CHANNELS_LAST = torch.channels_last


class AtenOps:
    """Every step by plain PyTorch operators: any device, any dtype."""

    name: ClassVar[str] = "torch"
    fused_relu_drops_nan: ClassVar[bool] = False
    rules: ClassVar[tuple[str, ...]] = ()
    take_any_layout: ClassVar[frozenset[str]] = frozenset()

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

    def takes(self, group: Group) -> bool:
        """Whether a kernel here serves a group that one of ``rules`` has found."""
        return False

    def prepare_group(self, group: Group, prepared: list[Any]) -> tuple[Tensor, ...]:
        """What the group's kernel needs beside the ``prepared`` weights of its steps."""
        return ()

    def run_group(
        self, group: Group, prepared: list[Any], extra: tuple[Tensor, ...], inputs: list[Tensor]
    ) -> tuple[Tensor, ...] | None:
        """The group's outputs from its inputs; None where its kernel cannot take these inputs."""
        return None

    def scratch_held(self, device: torch.device) -> AbstractContextManager[Any]:
        """Scratch memory that the calls inside share, handed out to be kept as long as they run."""
        return nullcontext()

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
    """The CPU: convolution, bias, residual and ReLU in one oneDNN primitive, weights pre-packed.

    oneDNN's fused ReLU makes 0 of NaN. The executor keeps a NaN that comes in with an image or a
    weight; one born in between, by float32 overflow or in a PyTorch step, ends at the next ReLU.
    """

    name = "onednn"
    fused_relu_drops_nan = True

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
        if not in_place and (residual.shape[1] == 1 or residual.shape[2:] == (1, 1)):
            # Memory that is dense in both orders at once is only taken by the in-place form.
            residual, in_place = residual.clone(), True
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
    rules = ("stem_pool",)
    take_any_layout = frozenset(("stem_pool",))

    def __init__(self) -> None:
        try:
            from . import kernels
        except ImportError as error:
            raise BackendError(f"backend='triton' needs the package triton: {error}") from error
        self.kernels: Any = kernels
        self._held = threading.local()

    def takes(self, group: Group) -> bool:
        conv, pool = group.steps[0].op, group.steps[-1].op
        return (
            isinstance(conv, Conv2d)
            and (conv.kernel, conv.stride, conv.padding) == ((7, 7), (2, 2), (3, 3))
            and (conv.dilation, conv.groups) == ((1, 1), 1)
            and pool == MaxPool2d((3, 3), (2, 2), (1, 1), (1, 1), ceil_mode=False)
        )

    def prepare_group(self, group: Group, prepared: list[Any]) -> tuple[Tensor, ...]:
        weight, _ = prepared[0]
        return tuple(self.kernels.pack_stem_weight(weight, planar=p) for p in (True, False))

    def run_group(
        self, group: Group, prepared: list[Any], extra: tuple[Tensor, ...], inputs: list[Tensor]
    ) -> tuple[Tensor, ...] | None:
        weight, bias = prepared[0]
        (x,) = inputs
        if not x.is_contiguous():
            x = x.contiguous(memory_format=CHANNELS_LAST)
        packed = extra[0] if x.is_contiguous() else extra[1]  # a single pixel is both
        return (self.kernels.stem(x, weight, bias, packed=packed, precision=conv_precision()),)

    @contextmanager
    def scratch_held(self, device: torch.device) -> Iterator[Any]:
        self._held.scratch = self.kernels.new_scratch(device)
        try:
            yield self._held.scratch
        finally:
            self._held.scratch = None

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
            scratch=getattr(self._held, "scratch", None),
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
        known = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"backend must be one of {known}, got {backend!r}")
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
