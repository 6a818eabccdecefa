"""What every backend is made of, and those that call PyTorch: aten, oneDNN and cuDNN.

Each is a class with one method per operation; activations are torch tensors, 4-D ones in
channels_last memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..graph.fold import Weights
from ..graph.ir import AvgPool2d, Conv2d, GlobalAvgPool, Linear, MaxPool2d, Operation
from ..graph.patterns import FusionGroup, Grouping, ungrouped
from ..graph.plan import Plan, Shape, pool_output, window_output
from .memory_format import to_contiguous, unchanged


class AtenOps:
    """Every step by plain PyTorch operators: any device, any dtype."""

    name: ClassVar[str] = "torch"
    falls_back = False  # whether others go on where it fails; else that is an error
    tuning_seconds = 0.0  # that a shape's kernels may be measured for before it is captured
    emulated = False  # the products, on a processor without instructions for the dtype
    fused_relu_drops_nan: ClassVar[bool] = False

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

    def candidates(
        self, plan: Plan, dtype: torch.dtype, device: torch.device
    ) -> tuple[FusionGroup, ...]:
        """Every group, overlapping ones too, that a kernel here may be chosen for."""
        return ()

    def group_steps(
        self,
        plan: Plan,
        shapes: Mapping[str, Shape | None],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Grouping:
        """The plan's steps in the groups that serve values of these shapes best."""
        return Grouping(ungrouped(plan.steps))

    def setting(self) -> Hashable:
        """What else than shapes a grouping depends on and may change between calls."""
        return None

    def prepare_group(self, group: FusionGroup, prepared: list[Any]) -> tuple[Tensor, ...]:
        """What the group's kernel needs beside the ``prepared`` weights of its steps."""
        return ()

    def run_group(
        self, group: FusionGroup, prepared: list[Any], extra: tuple[Tensor, ...], inputs: list[Any]
    ) -> tuple[Tensor, ...] | None:
        """The group's outputs from its inputs; None where its kernel cannot take these inputs."""
        return None

    def instead(self, why: Exception | str, device: torch.device) -> AtenOps | None:
        """What computes the steps on ``device`` from now on, after this error of one or because the
        answers are wrong; None: nothing else does."""
        return None

    def compile_ahead(
        self,
        run: Callable[[], Any],
        device: torch.device,
        tell: Callable[[int, int], Any] | None = None,
    ) -> None:
        """Compile at once what ``run`` is going to launch; its outputs are not looked at.

        Args:
            tell: called with (kernels compiled, kernels to compile).
        """

    def reads_any_layout(self, group: FusionGroup) -> bool:
        """Whether the group reads its inputs in NCHW memory as well as in NHWC."""
        return False

    def restore(self, contiguous: bool) -> Callable[[Any], Any]:
        """What gives a value the source's memory order: NCHW, or else NHWC."""
        return to_contiguous if contiguous else unchanged

    def group_kernel_name(self, group: FusionGroup) -> str:
        """The name of what computes a group, for the plan's table."""
        return f"{self.name} {group.kernel}"

    def workspace_held(self, device: torch.device, held: Any = None) -> AbstractContextManager[Any]:
        """Workspace that the calls inside share: ``held``, or new, to be kept while they run."""
        return nullcontext()

    def kernel_name(self, op: Operation) -> str:
        """The name of what computes a step, for the plan's table."""
        return {Conv2d: "aten conv2d", Linear: "aten linear"}.get(type(op), "aten")


class PackedWeight:
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
            with torch.inference_mode(False):
                self.packed = self.reordered(dense, op, x)
            self.dense = None
        assert self.packed is not None
        return self.packed

    def reordered(self, dense: Tensor, op: Conv2d, x: Tensor) -> Tensor:
        geometry: Any = (list(op.padding), list(op.stride), list(op.dilation), op.groups)
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        found: Tensor = reorder(dense.to_mkldnn(), *geometry, list(x.shape))
        return found


POOLED_BYTES = 2**20
"""A max pool takes about so much at a time: PyTorch's makes indices of 8 bytes an output, which for
bfloat16 images are as large as its input, and are freed at once."""
BANDS = 3  # of a single image


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
        return PackedWeight(weight, bias) if isinstance(op, Conv2d) else (weight, bias)

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

    def max_pool(self, op: MaxPool2d, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.nbytes <= POOLED_BYTES:
            return super().max_pool(op, x)
        if len(x) == 1:
            return torch.cat([*self._pooled_bands(op, x)], 2)
        images = max(1, POOLED_BYTES * len(x) // x.nbytes)
        return torch.cat([super(OneDNNOps, self).max_pool(op, part) for part in x.split(images)])

    def _pooled_bands(self, op: MaxPool2d, x: Tensor) -> Iterator[Tensor]:
        """The pooled rows of one image, top to bottom, each band from the rows that it needs."""
        vertical = (op.kernel[0], op.stride[0], op.padding[0], op.dilation[0])
        kernel, stride, padding, dilation = vertical
        rows = pool_output(x.shape[2], *vertical, op.ceil_mode)
        above = -(-padding // stride)  # windows that would reach into the padding of a band
        band = -(-rows // BANDS)
        for first in range(0, rows, band):
            last, start = min(first + band, rows), max(0, first - above)
            end = (last - 1) * stride - padding + dilation * (kernel - 1) + 1
            pooled = super().max_pool(op, x[:, :, start * stride : end])
            yield pooled[:, :, first - start : last - start]

    def _unpacked(self, prepared: PackedWeight, op: Conv2d, x: Tensor) -> Weights:
        """Any weights of the right shape: an empty batch never reads them."""
        shape = (op.out_channels, op.in_channels // op.groups, *op.kernel)
        return x.new_zeros(shape), prepared.bias

    def kernel_name(self, op: Operation) -> str:
        return "oneDNN conv" if isinstance(op, Conv2d) else super().kernel_name(op)


class CudnnOps(AtenOps):
    """CUDA without Triton: cuDNN's own fused operators where it has them."""

    name = "cudnn"

    def conv(
        self, op: Conv2d, prepared: Any, x: Tensor, residual: Tensor | None, in_place: bool
    ) -> Tensor:
        weight, bias = prepared
        served = op.relu and bias is not None and x.is_cuda and _has_cudnn()
        if not served or x.dtype is torch.float64:
            return super().conv(op, prepared, x, residual, in_place)
        geometry = (op.stride, op.padding, op.dilation, op.groups)
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)

    def kernel_name(self, op: Operation) -> str:
        fused = isinstance(op, Conv2d) and op.relu and _has_cudnn()
        return "cuDNN fused conv" if fused else super().kernel_name(op)


def _has_cudnn() -> bool:
    """Not on ROCm, whose tensors say that they are CUDA's."""
    return torch.version.hip is None and torch.backends.cudnn.enabled


def residual_fits(op: Conv2d, x: Tensor, residual: Any) -> bool:
    """Whether the sum neither broadcasts nor promotes, so that it can be fused."""
    return is_result(residual, x, op.out_channels, op.kernel, op.stride, op.padding, op.dilation)


def is_result(y: Any, x: Tensor, channels: int, *geometry: Sequence[int]) -> bool:
    """Whether ``y`` has the shape and dtype of a convolution's result on ``x`` (N, C, H, W).

    ``geometry`` is kernel, stride, padding and dilation, a pair of each.
    """
    if not isinstance(y, Tensor) or y.dtype is not x.dtype or y.dim() != 4:
        return False
    windows = zip(x.shape[2:], *geometry, strict=True)
    wanted = (x.shape[0], channels, *(window_output(*window) for window in windows))
    return all(a == b for a, b in zip(y.shape, wanted, strict=True))


def conv_precision() -> str:
    """``"tf32"`` or ``"ieee"``: what torch's flags allow fp32 convolutions on CUDA."""
    cudnn: Any = torch.backends.cudnn
    return _first_set(cudnn.conv.fp32_precision, cudnn.fp32_precision)


def matmul_precision() -> str:
    """``"tf32"`` or ``"ieee"``: what torch's flags allow fp32 matrix products on CUDA."""
    cuda: Any = torch.backends.cuda
    return _first_set(cuda.matmul.fp32_precision)


@contextmanager
def cudnn_benchmarking(wanted: bool = True) -> Iterator[None]:
    """cuDNN measures its algorithms for each new shape, as every baseline on it deserves; or does
    not, where nobody waits for the fastest one."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.benchmark
    if before == wanted:
        yield
        return
    cudnn.benchmark = wanted
    try:
        yield
    finally:
        cudnn.benchmark = before


def _first_set(*levels: str) -> str:
    everywhere: Any = torch.backends
    if torch.version.hip is not None:  # of AMD's GPUs one alone has TF32, and the flags are on
        return "ieee"
    for level in (*levels, everywhere.fp32_precision):
        if level != "none":
            return "tf32" if level == "tf32" else "ieee"
    return "ieee"
