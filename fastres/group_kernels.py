"""The Triton kernels that serve groups of steps, or single steps in place of ``conv2d``.

To add one: a rule in :mod:`fastres.tuning` that finds the steps, a class here in
:data:`GROUP_KERNELS`, its name in :data:`fastres.tables.KERNELS` and, once it is known to be
faster, a row of the table. Activations are logically (N, C, H, W) throughout; in memory they are
NHWC (``channels_last``) or, where the whole network runs in that layout, HWNC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .aten_ops import (
    CHANNELS_LAST,
    CudnnOps,
    conv_precision,
    matmul_precision,
    residual_fits,
)
from .ir import Conv2d, Linear, MaxPool2d, Operation
from .plan import Step
from .tables import KERNELS
from .tuning import Group

Outputs = tuple[Tensor, ...] | None

_TO_PIXELS = {"nhwc": (0, 2, 3, 1), "hwnc": (2, 3, 0, 1)}
_TO_IMAGES = {"nhwc": (0, 3, 1, 2), "hwnc": (2, 3, 0, 1)}


def layout_of(x: Tensor) -> str:
    """``"hwnc"`` for images (N, C, H, W) in that memory order and in no other; else ``"nhwc"``."""
    if x.is_contiguous(memory_format=CHANNELS_LAST):
        return "nhwc"
    return "hwnc" if x.permute(_TO_PIXELS["hwnc"]).is_contiguous() else "nhwc"


def pixels(x: Tensor, layout: str) -> Tensor:
    """Images (N, C, H, W) with their dimensions in the layout's order; a view if they lie so."""
    return x.permute(_TO_PIXELS[layout]).contiguous()


def images(x: Tensor, layout: str) -> Tensor:
    """A view of what :func:`pixels` gives as (N, C, H, W) again."""
    return x.permute(_TO_IMAGES[layout])


def rows(x: Tensor, layout: str) -> Tensor:
    """The pixels of images (N, C, H, W) in the layout's order as a matrix (pixels, C)."""
    return pixels(x, layout).view(-1, x.shape[1])


def from_rows(y: Tensor, like: Tensor, layout: str) -> Tensor:
    """The inverse of :func:`rows`, for as many pixels as ``like`` has."""
    sizes = [like.shape[i] for i in _TO_PIXELS[layout][:3]]
    return images(y.view(*sizes, y.shape[1]), layout)


@dataclass(frozen=True)
class Launch:
    """One run of a group's kernel.

    Attributes:
        kernels: the package ``fastres.kernels``.
        weights: of each step, None for those that have none.
        extra: what the kernel's ``prepare`` has made.
        inputs: the group's.
        scratch: memory that calls in a row share, or None.
    """

    kernels: Any
    group: Group
    weights: list[Any]
    extra: tuple[Tensor, ...]
    inputs: list[Tensor]
    scratch: Tensor | None

    def operands(self, step: Step) -> list[Tensor]:
        """What a step reads, all from outside of the group."""
        return [self.inputs[self.group.inputs.index(name)] for name in step.inputs]


class GroupKernel:
    """What a kernel for a group of steps must tell: which it takes, what it needs, how it runs.

    Attributes:
        name: in the plan.
        choice: in the tables, where that is not the name.
        rule: finds its groups; see :data:`fastres.tuning.RULES`.
        layouts: memory orders of a network in which it may be chosen.
        copy_engine: whether it needs one, as GPUs have from sm_90 on, and operands on 16 bytes.
    """

    name: ClassVar[str]
    choice: ClassVar[str] = ""
    rule: ClassVar[str]
    layouts: ClassVar[tuple[str, ...]] = ("nhwc", "hwnc")
    copy_engine: ClassVar[bool] = True

    def label(self, group: Group) -> str:
        """What the plan shows."""
        return f"triton {self.name}"

    def takes(self, kernels: Any, group: Group, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the kernel can serve the group in this dtype, whatever the sizes of images.

        On a CPU without Triton's interpreter nothing runs, and any GPU is meant.
        """
        return True

    def prepare(self, kernels: Any, group: Group, weights: list[Any]) -> tuple[Tensor, ...]:
        """What :meth:`run` needs beside the steps' weights."""
        return ()

    def run(self, call: Launch) -> Outputs:
        """The group's outputs; None where the inputs are not what the kernel takes."""
        raise NotImplementedError

    def fits(self, inputs: list[Any], weights: list[Any]) -> bool:
        """Whether the inputs are images of the weights' dtype, where the kernel can read them."""
        dtype = next(pair[0].dtype for pair in weights if pair is not None)
        if not all(isinstance(x, Tensor) and x.dim() == 4 and x.dtype is dtype for x in inputs):
            return False
        read = [*inputs, *(pair[0] for pair in weights if pair is not None)]
        return not self.copy_engine or not any(t.data_ptr() % 16 for t in read)


class Stem(GroupKernel):
    """7x7/2 convolution with ReLU and the 3x3/2 max pool behind it, from images as they come."""

    name = "stem"
    rule = "stem_pool"
    layouts = ("nhwc",)
    copy_engine = False
    hwnc = False

    def takes(self, kernels: Any, group: Group, dtype: torch.dtype, device: torch.device) -> bool:
        conv, pool = group.steps[0].op, group.steps[-1].op
        return (
            isinstance(conv, Conv2d)
            and (conv.kernel, conv.stride, conv.padding) == ((7, 7), (2, 2), (3, 3))
            and (conv.dilation, conv.groups) == ((1, 1), 1)
            and pool == MaxPool2d((3, 3), (2, 2), (1, 1), (1, 1), ceil_mode=False)
        )

    def prepare(self, kernels: Any, group: Group, weights: list[Any]) -> tuple[Tensor, ...]:
        weight, _ = weights[0]
        return tuple(kernels.pack_stem_weight(weight, planar=p) for p in (True, False))

    def run(self, call: Launch) -> Outputs:
        weight, bias = call.weights[0]
        (x,) = call.inputs
        if not x.is_contiguous():
            x = x.contiguous(memory_format=CHANNELS_LAST)
        packed = call.extra[0] if x.is_contiguous() else call.extra[1]  # a single pixel is both
        settings = {"packed": packed, "precision": conv_precision(), "hwnc": self.hwnc}
        return (call.kernels.stem(x, weight, bias, **settings),)


class StemHwnc(Stem):
    """The same for a network in HWNC, which writes the pooled images in that layout."""

    name = "stem_hwnc"
    choice = Stem.name
    layouts = ("hwnc",)
    hwnc = True


class Head(GroupKernel):
    """Global average pool and classifier."""

    name = "head"
    rule = "pool_linear"
    copy_engine = False

    def takes(self, kernels: Any, group: Group, dtype: torch.dtype, device: torch.device) -> bool:
        linear = group.steps[-1].op
        return isinstance(linear, Linear) and not linear.relu

    def run(self, call: Launch) -> Outputs:
        (x,) = call.inputs
        if layout_of(x) == "nhwc":
            x = x.contiguous(memory_format=CHANNELS_LAST)
        precision = matmul_precision()
        return (call.kernels.head(x, *call.weights[-1], precision=precision, scratch=call.scratch),)


class Gemm(GroupKernel):
    """A 1x1 convolution that keeps all pixels."""

    name = "gemm"
    rule = "flat"

    def takes(self, kernels: Any, group: Group, dtype: torch.dtype, device: torch.device) -> bool:
        return _fills_rows(kernels, group, dtype)

    def run(self, call: Launch) -> Outputs:
        (step,) = call.group.steps
        (weight, bias), op = call.weights[0], step.op
        x, *others = call.operands(step)
        assert isinstance(op, Conv2d)
        if others and not _same_pixels(x, others[0], op.out_channels):
            return None
        layout = layout_of(x)
        residual = rows(others[0], layout) if others else None
        y = call.kernels.gemm(
            rows(x, layout),
            weight.flatten(1),
            bias,
            residual=residual,
            relu=op.relu,
            precision=conv_precision(),
            out=residual if step.in_place else None,
        )
        return (from_rows(y, x, layout),)


class GemmPair(GroupKernel):
    """A block's expansion and projection as one product of two sources."""

    name = "gemm_pair"
    rule = "expand_project"

    def takes(self, kernels: Any, group: Group, dtype: torch.dtype, device: torch.device) -> bool:
        project = group.steps[1].op
        assert isinstance(project, Conv2d)
        return project.stride[0] == project.stride[1] and _fills_rows(kernels, group, dtype)

    def prepare(self, kernels: Any, group: Group, weights: list[Any]) -> tuple[Tensor, ...]:
        """The sum of the biases."""
        biases = [bias.float() for _, bias in weights if bias is not None]
        return (torch.stack(biases).sum(0),) if biases else ()

    def run(self, call: Launch) -> Outputs:
        expand, project = call.group.steps
        op = project.op
        (t,) = call.operands(expand)
        x = call.inputs[call.group.inputs.index(project.inputs[0])]
        assert isinstance(op, Conv2d)
        stride = op.stride[0]
        if tuple(t.shape[2:]) != tuple(-(-size // stride) for size in x.shape[2:]):
            return None
        layout = layout_of(t)
        n, _, h, w = x.shape
        y = call.kernels.gemm_pair(
            rows(t, layout),
            call.weights[0][0].flatten(1),
            rows(x, layout),
            call.weights[1][0].flatten(1),
            *call.extra,
            images=(n, h, w, 1) if layout == "nhwc" else (1, h, w, n),
            stride=stride,
            relu=op.relu,
            precision=conv_precision(),
        )
        return (from_rows(y, t, layout),)


class Rot2(GroupKernel):
    """A block's expansion with its sum, and the next block's reduction."""

    name = "rot2"
    rule = "expand_reduce"

    def takes(self, kernels: Any, group: Group, dtype: torch.dtype, device: torch.device) -> bool:
        if len(group.steps) != 2:
            return False
        expand, reduce = (step.op for step in group.steps)
        assert isinstance(expand, Conv2d)
        assert isinstance(reduce, Conv2d)
        widths = (expand.in_channels, expand.out_channels, reduce.out_channels)
        return bool(kernels.rot2_supports(*widths, dtype))

    def run(self, call: Launch) -> Outputs:
        expand = call.group.steps[0]
        t, x = call.operands(expand)
        (w3, b3), (w1, b1) = call.weights
        if not _same_pixels(t, x, w3.shape[0]):
            return None
        layout = layout_of(t)
        narrow, wide = rows(t, layout), rows(x, layout)
        reduced = narrow.new_empty(narrow.shape[0], w1.shape[0])
        out = (wide if expand.in_place else torch.empty_like(wide), reduced)
        made = call.kernels.rot2(narrow, w3.flatten(1), b3, wide, w1.flatten(1), b1, out=out)
        named = dict(zip((s.name for s in call.group.steps), made, strict=True))
        return tuple(from_rows(named[name], t, layout) for name in call.group.outputs)


class SlidingBlock(GroupKernel):
    """A bottleneck of 64 channels from its 3x3 on, and the next one's reduction, in HWNC."""

    name = "sliding_block"
    rule = "bottleneck_tail"
    layouts = ("hwnc",)

    def takes(self, kernels: Any, group: Group, dtype: torch.dtype, device: torch.device) -> bool:
        conv, expand, *reduce = (step.op for step in group.steps)
        assert isinstance(conv, Conv2d)
        assert isinstance(expand, Conv2d)
        fused = kernels.sliding_fused
        plain = (conv.stride, conv.padding, conv.dilation) == ((1, 1), (1, 1), (1, 1))
        if fused is None or not (plain and expand.residual):
            return False
        reduced = sum(op.out_channels for op in reduce if isinstance(op, Conv2d))
        widths = conv.in_channels, conv.out_channels, expand.out_channels, reduced
        anywhere = device.type == "cpu" and not kernels.INTERPRETED
        machine = fused.HOPPER if anywhere else kernels.machine_of(device)
        runs = anywhere or fused.runs_on(device)
        return bool(runs and fused.supports(*widths, dtype, machine))

    def run(self, call: Launch) -> Outputs:
        conv, expand, *reduce = call.group.steps
        (t,) = call.operands(conv)
        x = call.inputs[call.group.inputs.index(expand.inputs[1])]
        (w2, b2), (w3, b3), *last = call.weights
        if not _same_pixels(t, x, w3.shape[0]):
            return None
        w1, b1 = (last[0][0].flatten(1), last[0][1]) if last else (None, None)
        narrow, wide = pixels(t, "hwnc"), pixels(x, "hwnc")
        made = call.kernels.sliding_fused.sliding_block(
            narrow,
            w2,
            b2,
            w3.flatten(1),
            b3,
            wide,
            w1,
            b1,
            out=(
                wide if expand.in_place else torch.empty_like(wide),
                None if w1 is None else narrow.new_empty(*narrow.shape[:3], w1.shape[0]),
            ),
        )
        named = dict(zip((s.name for s in (expand, *reduce)), made, strict=False))
        return tuple(images(named[name], "hwnc") for name in call.group.outputs)


class ConvHwnc(GroupKernel):
    """A convolution of a network in HWNC."""

    name = "conv2d_hwnc"
    rule = "convolution"
    layouts = ("hwnc",)

    def takes(self, kernels: Any, group: Group, dtype: torch.dtype, device: torch.device) -> bool:
        op = group.steps[0].op
        assert isinstance(op, Conv2d)
        square = op.stride[0] == op.stride[1] and op.padding[0] == op.padding[1] < min(op.kernel)
        plain = (op.dilation, op.groups) == ((1, 1), 1) and square
        return plain and bool(kernels.hwnc_supports(op.in_channels, op.out_channels, dtype))

    def run(self, call: Launch) -> Outputs:
        (step,) = call.group.steps
        (weight, bias), op = call.weights[0], step.op
        x, *others = call.operands(step)
        assert isinstance(op, Conv2d)
        if others and not residual_fits(op, x, others[0]):
            return None
        residual = pixels(others[0], "hwnc") if others else None
        y = call.kernels.conv2d_hwnc(
            pixels(x, "hwnc"),
            weight,
            bias,
            stride=op.stride[0],
            padding=op.padding[0],
            residual=residual,
            relu=op.relu,
            precision=conv_precision(),
            out=residual if step.in_place else None,
        )
        return (images(y, "hwnc"),)


class Cudnn(GroupKernel):
    """One convolution by cuDNN, with its fused epilogues where it has them."""

    name = "cudnn"
    rule = "convolution"
    layouts = ("nhwc",)
    copy_engine = False
    _ops = CudnnOps()

    def label(self, group: Group) -> str:
        return self._ops.serves(group.steps[0].op).replace("aten conv2d", "cuDNN conv")

    def prepare(self, kernels: Any, group: Group, weights: list[Any]) -> tuple[Tensor, ...]:
        """The bias in the weights' dtype."""
        weight, bias = weights[0]
        return () if bias is None else (bias.to(weight.dtype, copy=True),)

    def run(self, call: Launch) -> Outputs:
        (step,) = call.group.steps
        op = step.op
        x, *others = (t.contiguous(memory_format=CHANNELS_LAST) for t in call.operands(step))
        assert isinstance(op, Conv2d)
        if others and not residual_fits(op, x, others[0]):
            return None
        residual = others[0] if others else None
        prepared = (call.weights[0][0], call.extra[0] if call.extra else None)
        return (self._ops.conv(op, prepared, x, residual, step.in_place),)


GROUP_KERNELS: tuple[GroupKernel, ...] = tuple(
    sorted(
        (
            Stem(),
            StemHwnc(),
            Head(),
            Gemm(),
            GemmPair(),
            Rot2(),
            SlidingBlock(),
            ConvHwnc(),
            Cudnn(),
        ),
        key=lambda kernel: list(KERNELS).index(kernel.choice or kernel.name),
    )
)
"""By preference: of the kernels that are chosen for steps from one on, the first serves them."""

BY_NAME = {kernel.name: kernel for kernel in GROUP_KERNELS}


def _fills_rows(kernels: Any, group: Group, dtype: torch.dtype) -> bool:
    """Whether the copy engine can move the rows that the group's convolutions read and write."""
    ops = [step.op for step in group.steps]
    return all(
        isinstance(op, Conv2d) and kernels.gemm_supports(op.in_channels, op.out_channels, dtype)
        for op in ops
    )


def is_flat(op: Operation) -> bool:
    """A 1x1 convolution that keeps all pixels."""
    if not isinstance(op, Conv2d):
        return False
    return (op.kernel, op.stride, op.padding, op.groups) == ((1, 1), (1, 1), (0, 0), 1)


def _same_pixels(x: Tensor, residual: Tensor, channels: int) -> bool:
    """Whether images to be added to a result have its size: as many pixels as ``x``."""
    n, _, h, w = x.shape
    return tuple(residual.shape) == (n, channels, h, w)
