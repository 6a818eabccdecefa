"""fastres' own Triton kernels as a backend: one for each operation, and those for groups of steps.

Which groups there are, and by which kernel, is decided for each size of the inputs by
:mod:`fastres.choices`; the kernels for groups are in :mod:`fastres.group_kernels`.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .aten_ops import CHANNELS_LAST, AtenOps, conv_precision, matmul_precision
from .choices import Choices, Decision, standard
from .errors import BackendError
from .fold import Weights
from .group_kernels import (
    BY_NAME,
    GROUP_KERNELS,
    ConvHwnc,
    Cudnn,
    Launch,
    Outputs,
    SlidingBlock,
    Stem,
    StemHwnc,
    from_rows,
    is_flat,
    layout_of,
    rows,
)
from .ir import Add, AvgPool2d, Conv2d, GlobalAvgPool, Linear, MaxPool2d, Operation, ReLU
from .plan import Plan, Shape
from .tuning import Arrangement, Case, Group, arrange, candidates, case_of, network_case


class TritonOps(AtenOps):
    """fastres' own kernels: CUDA, or CPU tensors under Triton's interpreter.

    Args:
        cudnn: whether a convolution may go to cuDNN where that was measured to be faster.
        choices: what decides between kernels; by default what is in force on the device.

    Raises:
        BackendError: there is no Triton.
    """

    name = "triton"
    take_any_layout = frozenset((Stem.name, StemHwnc.name))

    def __init__(self, *, cudnn: bool = False, choices: Choices | None = None) -> None:
        try:
            from . import kernels
        except ImportError as error:
            raise BackendError(f"backend='triton' needs the package triton: {error}") from error
        self.kernels: Any = kernels
        self.cudnn = cudnn
        self.choices = choices
        self._held = threading.local()

    @property
    def scratch(self) -> Any:
        """Scratch memory that calls in a row share, or None."""
        return getattr(self._held, "scratch", None)

    def candidates(self, plan: Plan, dtype: torch.dtype, device: torch.device) -> tuple[Group, ...]:
        rules = self._rules(device)
        return candidates(plan, rules, lambda group: self._takes(group, dtype, device))

    def arrange(
        self,
        plan: Plan,
        shapes: Mapping[str, Shape | None],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Arrangement:
        barred = frozenset() if self.cudnn else frozenset((Cudnn.name,))
        choices = self.choices or standard(device, barred)
        kind = conv_precision() if dtype is torch.float32 else "half"
        case = network_case(plan, shapes, kind)
        layouts = self._hwnc(plan, choices, case, dtype, device)
        rules = self._rules(device, "hwnc" if layouts else "nhwc")
        layout = "hwnc" if ConvHwnc.name in rules else "nhwc"
        reasons: dict[int, str] = {}

        def chosen(group: Group) -> bool:
            if not self._takes(group, dtype, device):
                return False
            kernel = BY_NAME[group.kernel]
            # Launching with descriptors takes tens of microseconds where no CUDA graph hides them.
            if kernel.copy_engine and plan.left and kernel.name not in choices.forced:
                return False
            found = choices.decide(kernel.choice or kernel.name, case_of(group, shapes, kind))
            if isinstance(kernel, ConvHwnc):
                found = Decision(not is_flat(group.steps[0].op), layouts[0].why)
            if isinstance(kernel, SlidingBlock):
                found = choices.decide(kernel.name, case)
            if found.chosen:
                reasons[id(group.steps[0])] = found.why
            return found.chosen

        groups = arrange(plan, rules, chosen)
        return Arrangement(groups, tuple(reasons.get(id(g.steps[0]), "") for g in groups), layout)

    def _hwnc(
        self,
        plan: Plan,
        choices: Choices,
        case: Case | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[Decision]:
        """The decisions for the layout HWNC: its own, or one for a kernel that needs it."""
        if plan.left or choices.forced.get(ConvHwnc.name) is False:
            return []
        rule = {SlidingBlock.name: SlidingBlock.rule}
        found = [choices.decide(name, case) for name in (ConvHwnc.name, SlidingBlock.name)]
        if found[1].chosen and not candidates(plan, rule, lambda g: self._takes(g, dtype, device)):
            del found[1]
        return [decision for decision in found if decision.chosen]

    def _rules(self, device: torch.device, layout: str | None = None) -> dict[str, str]:
        """The rule of each kernel that runs here, in networks of this or of any layout."""
        copies = device.type == "cpu" or self.kernels.has_copy_engine(device)
        return {
            kernel.name: kernel.rule
            for kernel in GROUP_KERNELS
            if (layout is None or layout in kernel.layouts)
            and (copies or not kernel.copy_engine)
            and (self.cudnn or not isinstance(kernel, Cudnn))
        }

    def _takes(self, group: Group, dtype: torch.dtype, device: torch.device) -> bool:
        return BY_NAME[group.kernel].takes(self.kernels, group, dtype, device)

    def setting(self) -> Hashable:
        return conv_precision()

    def prepare_group(self, group: Group, prepared: list[Any]) -> tuple[Tensor, ...]:
        return BY_NAME[group.kernel].prepare(self.kernels, group, prepared)

    def run_group(
        self, group: Group, prepared: list[Any], extra: tuple[Tensor, ...], inputs: list[Any]
    ) -> Outputs:
        kernel = BY_NAME[group.kernel]
        if not kernel.fits(inputs, prepared):
            return None
        return kernel.run(Launch(self.kernels, group, prepared, extra, inputs, self.scratch))

    def serves_group(self, group: Group) -> str:
        return BY_NAME[group.kernel].label(group)

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
        if is_flat(op) and layout_of(x) == "hwnc":
            return self._rows_conv(op, prepared, x, residual, in_place)
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
            scratch=self.scratch,
        )

    def _rows_conv(
        self, op: Conv2d, prepared: Any, x: Tensor, residual: Tensor | None, in_place: bool
    ) -> Tensor:
        """A 1x1 convolution of HWNC images: their pixels are as many images of one pixel."""
        columns = rows(x, "hwnc")[:, :, None, None]
        other = None if residual is None else rows(residual, "hwnc")[:, :, None, None]
        y = self.conv(op, prepared, columns, other, in_place)
        return from_rows(y.flatten(1), x, "hwnc")

    def linear(self, op: Linear, prepared: Any, x: Tensor) -> Tensor:
        weight, bias = prepared
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = self.kernels.linear(
            rows,
            weight,
            bias,
            relu=op.relu,
            precision=matmul_precision(),
            scratch=self.scratch,
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


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=CHANNELS_LAST))
