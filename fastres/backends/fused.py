"""Triton kernels for several steps at once, or for one step in place of ``conv2d``: a class each.

A class owns all that is to be known of its kernel: the steps that it takes, what it supports, what
it prepares, its launch, its cost. The first line of its docstring is its line in the documentation.
To add one: the kernel's file, a class here in :data:`FUSED_KERNELS`, its test, its benchmark and,
once it was measured to be faster, a rule of :mod:`fastres.backends.kernel_table`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..graph.ir import Conv2d, Linear, MaxPool2d, Operation
from ..graph.patterns import (
    FusionGroup,
    Shapes,
    convolution,
    expand_project,
    expand_reduce,
    flat,
    pool_linear,
    stem_pool,
)
from ..graph.plan import Shape, Step
from .aten import CudnnOps, conv_precision, matmul_precision, residual_fits
from .memory_format import CHANNELS_LAST, NHWC, Layout

Outputs = tuple[Tensor, ...] | None


@dataclass(frozen=True)
class FusedCall:
    """One call of a fused kernel.

    Attributes:
        kernels: the package ``fastres.kernels``.
        group: the steps.
        weights: weight and bias of each step, None for steps without.
        extra: what the kernel's ``prepare`` has made.
        inputs: the values of ``group.inputs``.
        workspace: memory that consecutive calls share, or None.
        layout: the memory order of the activations.
    """

    kernels: Any
    group: FusionGroup
    weights: list[Any]
    extra: tuple[Tensor, ...]
    inputs: list[Tensor]
    workspace: Tensor | None
    layout: Layout = NHWC

    def operands(self, step: Step) -> list[Tensor]:
        """What a step reads, all from outside of the group."""
        return [self.inputs[self.group.inputs.index(name)] for name in step.inputs]


class FusedKernel:
    """What the planner, the executor and the forecast ask a fused kernel.

    Attributes:
        name: in the plan, the tables and FASTRES_KERNELS.
        pattern: finds the steps that the kernel takes.
        needs_tma: whether it needs a GPU with TMA (sm_90 and later) and operands on 16 bytes.
        any_layout: whether it reads images in NCHW memory as well as in NHWC.
    """

    name: ClassVar[str]
    pattern: ClassVar[staticmethod[[Sequence[Step], dict[str, int]], int]]
    needs_tma: ClassVar[bool] = True
    any_layout: ClassVar[bool] = False

    def label(self, group: FusionGroup) -> str:
        """What the plan shows."""
        return f"triton {self.name}"

    def supports(
        self, kernels: Any, group: FusionGroup, dtype: torch.dtype, device: torch.device
    ) -> bool:
        """Whether the kernel can run the group in this dtype, whatever the sizes of images.

        On a CPU without Triton's interpreter nothing runs, and any GPU is meant.
        """
        return True

    def prepare(self, kernels: Any, group: FusionGroup, weights: list[Any]) -> tuple[Tensor, ...]:
        """What :meth:`run` needs beside the steps' weights."""
        return ()

    def accepts(self, inputs: list[Any], weights: list[Any]) -> bool:
        """Whether the inputs are images of the weights' dtype, where the kernel can read them."""
        dtype = next(pair[0].dtype for pair in weights if pair is not None)
        if not all(isinstance(x, Tensor) and x.dim() == 4 and x.dtype is dtype for x in inputs):
            return False
        read = [*inputs, *(pair[0] for pair in weights if pair is not None)]
        return not self.needs_tma or not any(t.data_ptr() % 16 for t in read)

    def run(self, call: FusedCall) -> Outputs:
        """The group's outputs; None where the inputs are not what the kernel takes."""
        raise NotImplementedError

    def cycles(self, kernels: Any, group: FusionGroup, sizes: Sizes) -> float:
        """Predicted cycles on the chip, by the model with which the kernel picks its tile."""
        return 0.0


@dataclass(frozen=True)
class Sizes:
    """What the predicted cost of a group rests on.

    Attributes:
        shapes: of the group's values, all known.
        itemsize: bytes of an element.
        gpu: the GPU, as the kernels know it.
    """

    shapes: Shapes
    itemsize: int
    gpu: Any

    def of(self, name: str) -> Shape:
        """The shape of a value.

        Raises:
            ValueError: it is not known.
        """
        found = self.shapes.get(name)
        if found is None:
            raise ValueError(f"the size of {name} is not known")
        return found

    def pixels(self, step: Step) -> int:
        """Pixels of a step's result, over all images."""
        shape = self.of(step.name)
        return prod(shape) // shape[1]

    def matrix_cycles(
        self, kernels: Any, step: Step, table: Any, channels: int | None = None
    ) -> float:
        """Cycles of a convolution or product by the best tile of a table.

        Args:
            channels: products of a sum; by default the channels that the step reads.
        """
        op, config = step.op, kernels._config
        taps, groups = (prod(op.kernel), op.groups) if isinstance(op, Conv2d) else (1, 1)
        reduced = channels or self.of(step.inputs[0])[1]
        problem = config.ProblemSize(
            self.pixels(step), outputs(op) // groups, reduced // groups, taps, groups, self.itemsize
        )
        tile = config.select_config(table, problem, "half", self.gpu)
        return float(config.estimated_cycles(tile, problem, "half", self.gpu))


class Stem(FusedKernel):
    """7x7 convolution and max pool"""

    name = "stem"
    pattern = staticmethod(stem_pool)
    needs_tma = False
    any_layout = True

    def supports(
        self, kernels: Any, group: FusionGroup, dtype: torch.dtype, device: torch.device
    ) -> bool:
        conv, pool = group.steps[0].op, group.steps[-1].op
        return (
            isinstance(conv, Conv2d)
            and (conv.kernel, conv.stride, conv.padding) == ((7, 7), (2, 2), (3, 3))
            and (conv.dilation, conv.groups) == ((1, 1), 1)
            and pool == MaxPool2d((3, 3), (2, 2), (1, 1), (1, 1), ceil_mode=False)
        )

    def prepare(self, kernels: Any, group: FusionGroup, weights: list[Any]) -> tuple[Tensor, ...]:
        weight, _ = weights[0]
        return tuple(kernels.stem.pack_stem_weight(weight, planar=p) for p in (True, False))

    def run(self, call: FusedCall) -> Outputs:
        weight, bias = call.weights[0]
        (x,) = call.inputs
        if not x.is_contiguous():
            x = x.contiguous(memory_format=CHANNELS_LAST)
        packed = call.extra[0] if x.is_contiguous() else call.extra[1]  # a single pixel is both
        precision = conv_precision()
        return (call.kernels.stem.stem(x, weight, bias, packed=packed, precision=precision),)

    def cycles(self, kernels: Any, group: FusionGroup, sizes: Sizes) -> float:
        stem, pooled = kernels.stem, sizes.of(group.steps[-1].name)
        problem = stem._ProblemSize(pooled[0], pooled[1], pooled[2], pooled[3])
        return least(stem.estimated_cycles, stem.CONFIGS["half"], problem, sizes.gpu)


class Head(FusedKernel):
    """average pool and classifier"""

    name = "head"
    pattern = staticmethod(pool_linear)
    needs_tma = False

    def supports(
        self, kernels: Any, group: FusionGroup, dtype: torch.dtype, device: torch.device
    ) -> bool:
        linear = group.steps[-1].op
        return isinstance(linear, Linear) and not linear.relu

    def run(self, call: FusedCall) -> Outputs:
        (x,) = call.inputs
        x = x.contiguous(memory_format=CHANNELS_LAST)
        weight, bias = call.weights[-1]
        precision, workspace = matmul_precision(), call.workspace
        return (call.kernels.head.head(x, weight, bias, precision=precision, workspace=workspace),)

    def cycles(self, kernels: Any, group: FusionGroup, sizes: Sizes) -> float:
        head, linear, x = kernels.head, group.steps[-1].op, sizes.of(group.inputs[0])
        problem = head._ProblemSize(x[0], outputs(linear), x[1], prod(x[2:]), sizes.itemsize)
        tile = head.select_config(problem, sizes.gpu)
        return float(head.estimated_cycles(tile, problem, sizes.gpu))


class Gemm(FusedKernel):
    """1x1 convolution as a product of rows moved by TMA"""

    name = "gemm"
    pattern = staticmethod(flat)

    def supports(
        self, kernels: Any, group: FusionGroup, dtype: torch.dtype, device: torch.device
    ) -> bool:
        return _fills_rows(kernels, group, dtype)

    def run(self, call: FusedCall) -> Outputs:
        (step,) = call.group.steps
        (weight, bias), op = call.weights[0], conv_of(step)
        x, *others = call.operands(step)
        if others and not same_pixels(x, others[0], op.out_channels):
            return None
        layout = call.layout
        residual = layout.rows(others[0]) if others else None
        y = call.kernels.gemm.gemm(
            layout.rows(x),
            weight.flatten(1),
            bias,
            residual=residual,
            relu=op.relu,
            precision=conv_precision(),
            out=residual if step.in_place else None,
        )
        return (layout.from_rows(y, x),)

    def cycles(self, kernels: Any, group: FusionGroup, sizes: Sizes) -> float:
        return sizes.matrix_cycles(kernels, group.steps[0], kernels.gemm.CONFIGS["half"])


class DualGemm(FusedKernel):
    """expansion and projection of a block's first sum"""

    name = "dual_gemm"
    pattern = staticmethod(expand_project)

    def supports(
        self, kernels: Any, group: FusionGroup, dtype: torch.dtype, device: torch.device
    ) -> bool:
        project = conv_of(group.steps[1])
        return project.stride[0] == project.stride[1] and _fills_rows(kernels, group, dtype)

    def prepare(self, kernels: Any, group: FusionGroup, weights: list[Any]) -> tuple[Tensor, ...]:
        """The sum of the biases."""
        biases = [bias.float() for _, bias in weights if bias is not None]
        return (torch.stack(biases).sum(0),) if biases else ()

    def run(self, call: FusedCall) -> Outputs:
        expand, project = call.group.steps
        op = conv_of(project)
        (t,) = call.operands(expand)
        x = call.inputs[call.group.inputs.index(project.inputs[0])]
        stride = op.stride[0]
        if tuple(t.shape[2:]) != tuple(-(-size // stride) for size in x.shape[2:]):
            return None
        layout = call.layout
        y = call.kernels.gemm.dual_gemm(
            layout.rows(t),
            call.weights[0][0].flatten(1),
            layout.rows(x),
            call.weights[1][0].flatten(1),
            *call.extra,
            images=layout.grid(x),
            stride=stride,
            relu=op.relu,
            precision=conv_precision(),
        )
        return (layout.from_rows(y, t),)

    def cycles(self, kernels: Any, group: FusionGroup, sizes: Sizes) -> float:
        expand, project = group.steps
        channels = sizes.of(expand.inputs[0])[1] + sizes.of(project.inputs[0])[1]
        tiles = [tile for tile in kernels.gemm.CONFIGS["half"] if not tile.persistent]
        return sizes.matrix_cycles(kernels, expand, tiles, channels)


class B2bGemm(FusedKernel):
    """expansion, sum and the next block's reduction"""

    name = "b2b_gemm"
    pattern = staticmethod(expand_reduce)

    def supports(
        self, kernels: Any, group: FusionGroup, dtype: torch.dtype, device: torch.device
    ) -> bool:
        if len(group.steps) != 2:
            return False
        expand, reduce = map(conv_of, group.steps)
        widths = (expand.in_channels, expand.out_channels, reduce.out_channels)
        return bool(kernels.b2b_gemm.supports(*widths, dtype))

    def run(self, call: FusedCall) -> Outputs:
        expand = call.group.steps[0]
        t, x = call.operands(expand)
        (w3, b3), (w1, b1) = call.weights
        if not same_pixels(t, x, w3.shape[0]):
            return None
        layout = call.layout
        narrow, wide = layout.rows(t), layout.rows(x)
        reduced = narrow.new_empty(narrow.shape[0], w1.shape[0])
        out = (wide if expand.in_place else torch.empty_like(wide), reduced)
        made = call.kernels.b2b_gemm.b2b_gemm(
            narrow, w3.flatten(1), b3, wide, w1.flatten(1), b1, out=out
        )
        named = dict(zip((s.name for s in call.group.steps), made, strict=True))
        return tuple(layout.from_rows(named[name], t) for name in call.group.outputs)

    def cycles(self, kernels: Any, group: FusionGroup, sizes: Sizes) -> float:
        b2b_gemm, (expand, reduce) = kernels.b2b_gemm, group.steps
        widths = sizes.of(expand.inputs[0])[1], outputs(expand.op), outputs(reduce.op)
        problem = (sizes.pixels(expand), *widths, sizes.gpu)
        tile = b2b_gemm.select_config(b2b_gemm.CONFIGS, *problem)
        return float(b2b_gemm.estimated_cycles(tile, *problem))


class Cudnn(FusedKernel):
    """one convolution by cuDNN; never with backend='triton'"""

    name = "cudnn"
    pattern = staticmethod(convolution)
    needs_tma = False
    _ops = CudnnOps()

    def label(self, group: FusionGroup) -> str:
        return self._ops.kernel_name(group.steps[0].op).replace("aten conv2d", "cuDNN conv")

    def prepare(self, kernels: Any, group: FusionGroup, weights: list[Any]) -> tuple[Tensor, ...]:
        """The bias in the weights' dtype."""
        weight, bias = weights[0]
        return () if bias is None else (bias.to(weight.dtype, copy=True),)

    def run(self, call: FusedCall) -> Outputs:
        (step,) = call.group.steps
        op = conv_of(step)
        x, *others = (t.contiguous(memory_format=CHANNELS_LAST) for t in call.operands(step))
        if others and not residual_fits(op, x, others[0]):
            return None
        residual = others[0] if others else None
        prepared = (call.weights[0][0], call.extra[0] if call.extra else None)
        return (self._ops.conv(op, prepared, x, residual, step.in_place),)


FUSED_KERNELS: tuple[FusedKernel, ...] = (B2bGemm(), DualGemm(), Stem(), Head(), Gemm(), Cudnn())
"""By preference: of the kernels that are chosen for steps from one on, the first runs them."""

KERNELS: dict[str, str] = {kernel.name: str(kernel.__doc__) for kernel in FUSED_KERNELS}
"""What each is, by the name in the tables and in FASTRES_KERNELS."""

EXPERIMENTAL: dict[str, str] = {
    "bottleneck_hwnc": "3x3 of 64 channels, expansion, sum and the next reduction, in [H, W, N, C]",
    "conv2d_hwnc": "convolution in the layout [H, W, N, C], and that layout for the whole network",
}
"""Kernels of ``fused_experimental``, which run only where FASTRES_KERNELS names them."""


def conv_of(step: Step) -> Conv2d:
    """The operation of a step that is a convolution."""
    assert isinstance(step.op, Conv2d)
    return step.op


def outputs(op: Operation) -> int:
    """Channels or features that a convolution or linear step makes."""
    assert isinstance(op, (Conv2d, Linear))
    return op.out_channels if isinstance(op, Conv2d) else op.out_features


def same_pixels(x: Tensor, residual: Tensor, channels: int) -> bool:
    """Whether images to be added to a result have its size: as many pixels as ``x``."""
    n, _, h, w = x.shape
    return tuple(residual.shape) == (n, channels, h, w)


def least(cycles: Any, tiles: Iterable[Any], problem: Any, gpu: Any) -> float:
    """The cycles of the tile that takes least."""
    return float(min(cycles(tile, problem, gpu) for tile in tiles))


def _fills_rows(kernels: Any, group: FusionGroup, dtype: torch.dtype) -> bool:
    """Whether TMA can move the rows that the group's convolutions read and write."""
    ops = map(conv_of, group.steps)
    return all(kernels.gemm.supports(op.in_channels, op.out_channels, dtype) for op in ops)
