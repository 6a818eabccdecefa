"""fastres' own Triton kernels as a backend: one for each operation, and those for groups of steps.

Which groups there are, and by which kernel, is decided for each size of the inputs by
:mod:`fastres.backends.kernel_choice`; the kernels for groups are in :mod:`fastres.backends.fused`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BackendError
from ..graph.fold import Weights
from ..graph.ir import Add, AvgPool2d, Conv2d, GlobalAvgPool, Linear, MaxPool2d, Operation, ReLU
from ..graph.patterns import FusionGroup, Grouping, Pattern, candidates, group_steps, workload_of
from ..graph.plan import Plan, Shape
from .aten import AtenOps, CudnnOps, conv_precision, matmul_precision
from .fused import FUSED_KERNELS, Cudnn, FusedCall, FusedKernel, Outputs
from .kernel_choice import KernelSelector, math_mode_of, standard
from .memory_format import CHANNELS_LAST, NHWC, Layout

FAILED: dict[torch.device, str] = {}
"""Devices on which a kernel could not run, with the reason: ``backend="auto"`` avoids them."""


def give_up(why: Exception | str, device: torch.device) -> None:
    """Take our kernels on ``device`` for failed, in this process, with one warning."""
    if device in FAILED:
        return
    FAILED[device] = str(why)
    remedy = advice(why.__cause__) if isinstance(why, Exception) else ""
    warnings.warn(
        f"fastres goes on without its Triton kernels on {device}, by PyTorch's: {why}{remedy}",
        stacklevel=2,
    )


@cache
def register_fallbacks(kernels: Any) -> None:
    """``torch.ops.fastres.<name>_or_plain`` for each custom operator: where our kernel cannot run,
    PyTorch computes the same, with one warning."""
    for name, found in kernels.OPERATORS.items():
        schema = str(getattr(torch.ops.fastres, name).default._schema)
        torch.library.custom_op(
            f"fastres::{name}_or_plain",
            partial(_or_plain, kernels, found),
            mutates_args=(),
            schema="(" + schema.partition("(")[2],
        ).register_fake(found.fake)


def _or_plain(kernels: Any, found: Any, x: Tensor, *rest: Any) -> Tensor:
    if x.device not in FAILED and kernels.runs_on(x.device):
        try:
            y: Tensor = found.kernel(x, *rest)
            return y
        except kernels.KernelError as error:
            give_up(error, x.device)
    plain: Tensor = found.plain(x, *rest)
    return plain


class TritonOps(AtenOps):
    """fastres' own kernels: CUDA, or CPU tensors under Triton's interpreter.

    Args:
        cudnn: whether a convolution may go to cuDNN where that was measured to be faster.
        selector: what decides between kernels; by default what is in force on the device.

    Attributes:
        measured: how often what had been measured was looked at anew.

    Raises:
        BackendError: there is no Triton.
    """

    name = "triton"
    fused: ClassVar[tuple[FusedKernel, ...]] = FUSED_KERNELS

    def __init__(self, *, cudnn: bool = False, selector: KernelSelector | None = None) -> None:
        try:
            from .. import kernels
        except ImportError as error:
            raise BackendError(f"backend='triton' needs the package triton: {error}") from error
        self.kernels: Any = kernels
        register_fallbacks(kernels)
        self.by_name = {k.name: k for k in self.fused if cudnn or not isinstance(k, Cudnn)}
        self.selector = selector
        self._held = threading.local()
        self.measured = 0

    @property
    def workspace(self) -> Any:
        """Workspace that calls in a row share, or None."""
        return getattr(self._held, "workspace", None)

    def candidates(
        self, plan: Plan, dtype: torch.dtype, device: torch.device
    ) -> tuple[FusionGroup, ...]:
        patterns = self._patterns(device)
        return candidates(plan, patterns, lambda group: self._supports(group, dtype, device))

    def group_steps(
        self,
        plan: Plan,
        shapes: Mapping[str, Shape | None],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Grouping:
        selector = self.selector_on(device)
        math_mode = math_mode_of(dtype)

        def choose(group: FusionGroup) -> str | None:
            kernel = self.by_name[group.kernel]
            # Launching with descriptors takes tens of microseconds where no CUDA graph hides them.
            if kernel.needs_tma and plan.fallbacks and kernel.name not in selector.forced:
                return None
            if not self._supports(group, dtype, device):
                return None
            found = selector.select(kernel.name, workload_of(group, shapes, math_mode))
            return found.why if found.chosen else None

        def why_alone(group: FusionGroup) -> str:
            rival = "cudnn" in self.by_name and "cudnn" not in selector.forced
            if not rival or not isinstance(group.steps[0].op, Conv2d):
                return ""
            return selector.why_default(workload_of(group, shapes, math_mode))

        return group_steps(plan, self._patterns(device), choose, why_alone)

    def selector_on(self, device: torch.device) -> KernelSelector:
        """What decides between kernels on a device, as of now."""
        absent = frozenset(k.name for k in self.fused) - self.by_name.keys()
        return self.selector or standard(device, absent)

    def _patterns(self, device: torch.device) -> dict[str, Pattern]:
        """The pattern of each fused kernel that can run here."""
        tma = device.type == "cpu" or self.kernels.has_tma(device)
        return {k.name: k.pattern for k in self.by_name.values() if tma or not k.needs_tma}

    def _supports(self, group: FusionGroup, dtype: torch.dtype, device: torch.device) -> bool:
        return self.by_name[group.kernel].supports(self.kernels, group, dtype, device)

    def reads_any_layout(self, group: FusionGroup) -> bool:
        return bool(group.kernel) and self.by_name[group.kernel].any_layout

    def layout_of(self, inputs: list[Any]) -> Layout:
        """The memory order in which a fused kernel runs on these inputs."""
        return NHWC

    def instead(self, why: Exception | str, device: torch.device) -> AtenOps | None:
        """PyTorch and cuDNN, for this process and device, with one warning."""
        if isinstance(why, Exception) and not isinstance(why, self.kernels.KernelError):
            return None
        if not self.falls_back or _capturing() or self.kernels.COMPILING.get():
            return None
        give_up(why, device)
        return CudnnOps()

    def setting(self) -> Hashable:
        return conv_precision(), self.measured

    def compile_ahead(
        self,
        run: Callable[[], Any],
        device: torch.device,
        tell: Callable[[int, int], Any] | None = None,
    ) -> None:
        if device.type == "cuda" and not _capturing():
            self.kernels.compile_ahead(run, tell)

    def prepare_group(self, group: FusionGroup, prepared: list[Any]) -> tuple[Tensor, ...]:
        return self.by_name[group.kernel].prepare(self.kernels, group, prepared)

    def run_group(
        self, group: FusionGroup, prepared: list[Any], extra: tuple[Tensor, ...], inputs: list[Any]
    ) -> Outputs:
        kernel = self.by_name[group.kernel]
        if not kernel.accepts(inputs, prepared):
            return None
        layout = self.layout_of(inputs)
        call = FusedCall(self.kernels, group, prepared, extra, inputs, self.workspace, layout)
        return kernel.run(call)

    def group_kernel_name(self, group: FusionGroup) -> str:
        return self.by_name[group.kernel].label(group)

    @contextmanager
    def workspace_held(self, device: torch.device, held: Any = None) -> Iterator[Any]:
        self._held.workspace = self.kernels.new_workspace(device) if held is None else held
        try:
            yield self._held.workspace
        finally:
            self._held.workspace = None

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
            workspace=self.workspace,
        )

    def linear(self, op: Linear, prepared: Any, x: Tensor) -> Tensor:
        weight, bias = prepared
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = self.kernels.linear.linear(
            rows,
            weight,
            bias,
            relu=op.relu,
            precision=matmul_precision(),
            workspace=self.workspace,
        )
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

    def kernel_name(self, op: Operation) -> str:
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


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=CHANNELS_LAST))


_REMEDIES = {
    "C compiler": "install gcc or clang and Python's headers",
    "CalledProcessError": "install Python's headers (python3-dev) beside gcc",
    "libcuda": "let ldconfig find the driver's libcuda.so, or set TRITON_LIBCUDA_PATH",
    "ldconfig": "set TRITON_LIBCUDA_PATH to the folder of libcuda.so",
    "PermissionError": "set TRITON_CACHE_DIR to a folder that can be written",
    "OSError": "set TRITON_CACHE_DIR to a folder that can be written",
    "ptxas": "install a Triton that knows this GPU, or set TRITON_PTXAS_PATH",
}


def advice(cause: BaseException | None) -> str:
    """What the user may do about a failure of Triton, as far as its cause is known."""
    text = f"{type(cause).__name__}: {cause}"
    return next((f"; {remedy}" for sign, remedy in _REMEDIES.items() if sign in text), "")


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
