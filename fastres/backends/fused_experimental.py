"""Networks in the layout [H, W, N, C], by the kernels in ``kernels/experimental``.

Loaded only where FASTRES_KERNELS, or whoever chooses kernels, names one of them. A network that
PyTorch runs a part of stays in NHWC.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..graph.ir import Conv2d
from ..graph.patterns import FusionGroup, Grouping, bottleneck_tail, convolution, flat
from ..graph.plan import Plan, Shape
from .aten import conv_precision, residual_fits
from .fused import (
    EXPERIMENTAL,
    B2bGemm,
    Cudnn,
    DualGemm,
    FusedCall,
    FusedKernel,
    Gemm,
    Head,
    Outputs,
    Sizes,
    Stem,
    conv_of,
    least,
    outputs,
    same_pixels,
)
from .memory_format import CHANNELS_LAST, NHWC, Layout
from .triton import TritonOps

HWNC = Layout((2, 3, 0, 1), (2, 3, 0, 1))


class StemHwnc(Stem):
    """7x7 convolution and max pool, whose result is put into HWNC"""

    def run(self, call: FusedCall) -> Outputs:
        (pooled,) = super().run(call) or ()
        return (HWNC.images(HWNC.pixels(pooled)),)


class ConvHwnc(FusedKernel):
    """convolution of several pixels, or of strided ones"""

    name = "conv2d_hwnc"
    pattern = staticmethod(convolution)

    def supports(
        self, kernels: Any, group: FusionGroup, dtype: torch.dtype, device: torch.device
    ) -> bool:
        from ..kernels.experimental import hwnc

        op = conv_of(group.steps[0])
        square = op.stride[0] == op.stride[1] and op.padding[0] == op.padding[1] < min(op.kernel)
        plain = (op.dilation, op.groups) == ((1, 1), 1) and square and not flat(group.steps, {})
        return plain and bool(hwnc.supports(op.in_channels, op.out_channels, dtype))

    def run(self, call: FusedCall) -> Outputs:
        from ..kernels.experimental import hwnc

        (step,) = call.group.steps
        (weight, bias), op = call.weights[0], conv_of(step)
        x, *others = call.operands(step)
        if others and not residual_fits(op, x, others[0]):
            return None
        residual = HWNC.pixels(others[0]) if others else None
        y = hwnc.conv2d_hwnc(
            HWNC.pixels(x),
            weight,
            bias,
            stride=op.stride[0],
            padding=op.padding[0],
            residual=residual,
            relu=op.relu,
            precision=conv_precision(),
            out=residual if step.in_place else None,
        )
        return (HWNC.images(y),)

    def cycles(self, kernels: Any, group: FusionGroup, sizes: Sizes) -> float:
        from ..kernels.experimental import hwnc

        (step,) = group.steps
        op, (n, k, p, q) = conv_of(step), sizes.of(step.name)
        tiles = sizes.matrix_cycles(kernels, step, hwnc.CONFIGS["half"])
        slides = hwnc.conv3x3_hwnc
        given = (op.in_channels, op.kernel, op.stride[0], op.padding[0], torch.half)
        if slides is None or not slides.supports(*given):
            return tiles
        return min(tiles, least(slides.estimated_cycles, slides.CONFIGS, (p, q, n, k), sizes.gpu))


class BottleneckHwnc(FusedKernel):
    """3x3 of 64 channels, expansion, sum and the next block's reduction"""

    name = "bottleneck_hwnc"
    pattern = staticmethod(bottleneck_tail)

    def supports(
        self, kernels: Any, group: FusionGroup, dtype: torch.dtype, device: torch.device
    ) -> bool:
        try:
            from ..kernels.experimental import bottleneck_hwnc as block
        except ImportError:  # a Triton whose Gluon has another form
            return False
        conv, expand, *reduce = map(conv_of, group.steps)
        if (conv.stride, conv.padding, conv.dilation) != ((1, 1), (1, 1), (1, 1)):
            return False
        reduced = sum(op.out_channels for op in reduce)
        widths = conv.in_channels, conv.out_channels, expand.out_channels, reduced
        anywhere = device.type == "cpu" and not kernels.INTERPRETED
        gpu = kernels._gpu.HOPPER if anywhere else kernels.gpu_of(device)
        runs = expand.residual and (anywhere or block.runs_on(device))
        return bool(runs and block.supports(*widths, dtype, gpu))

    def run(self, call: FusedCall) -> Outputs:
        from ..kernels.experimental.bottleneck_hwnc import bottleneck_hwnc

        conv, expand, *reduce = call.group.steps
        (t,) = call.operands(conv)
        x = call.inputs[call.group.inputs.index(expand.inputs[1])]
        (w2, b2), (w3, b3), *last = call.weights
        if not same_pixels(t, x, w3.shape[0]):
            return None
        w1, b1 = (last[0][0].flatten(1), last[0][1]) if last else (None, None)
        narrow, wide = HWNC.pixels(t), HWNC.pixels(x)
        reduced = None if w1 is None else narrow.new_empty(*narrow.shape[:3], w1.shape[0])
        out = (wide if expand.in_place else torch.empty_like(wide), reduced)
        made = bottleneck_hwnc(narrow, w2, b2, w3.flatten(1), b3, wide, w1, b1, out=out)
        named = dict(zip((s.name for s in (expand, *reduce)), made, strict=False))
        return tuple(HWNC.images(named[name]) for name in call.group.outputs)  # type: ignore[arg-type]

    def cycles(self, kernels: Any, group: FusionGroup, sizes: Sizes) -> float:
        from ..kernels.experimental import bottleneck_hwnc as block

        conv, expand, *reduce = group.steps
        n, _, p, q = sizes.of(conv.name)
        reduced = sum(outputs(step.op) for step in reduce)
        problem = ((p, q, n), outputs(expand.op), reduced, sizes.gpu)
        tile = block.select_config(block.CONFIGS, *problem)
        return float(block.estimated_cycles(tile, *problem))


class HwncOps(TritonOps):
    """The Triton backend with the layout [H, W, N, C] for networks that it runs whole."""

    fused: ClassVar[tuple[FusedKernel, ...]] = (
        BottleneckHwnc(),
        B2bGemm(),
        DualGemm(),
        StemHwnc(),
        Head(),
        ConvHwnc(),
        Gemm(),
        Cudnn(),
    )

    def group_steps(
        self,
        plan: Plan,
        shapes: Mapping[str, Shape | None],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Grouping:
        nhwc = TritonOps(cudnn=Cudnn.name in self.by_name, selector=self.selector)
        wanted = {name for name in EXPERIMENTAL if self.selector_on(device).forced.get(name)}
        found = self.candidates(plan, dtype, device)
        if plan.fallbacks or not any(group.kernel in wanted for group in found):
            return nhwc.group_steps(plan, shapes, dtype, device)
        return super().group_steps(plan, shapes, dtype, device)

    def layout_of(self, inputs: list[Any]) -> Layout:
        return HWNC if any(map(_is_hwnc, inputs)) else NHWC

    def restore(self, contiguous: bool) -> Callable[[Any], Any]:
        plain = super().restore(contiguous)
        order = torch.contiguous_format if contiguous else CHANNELS_LAST
        return lambda v: v.contiguous(memory_format=order) if _is_hwnc(v) else plain(v)

    def conv(
        self, op: Conv2d, prepared: Any, x: Tensor, residual: Tensor | None, in_place: bool
    ) -> Tensor:
        """A 1x1 convolution of HWNC images takes their pixels as images of one pixel."""
        one = (op.kernel, op.stride, op.padding, op.groups) == ((1, 1), (1, 1), (0, 0), 1)
        if not (one and _is_hwnc(x)):
            return super().conv(op, prepared, x, residual, in_place)
        pixels = [None if v is None else HWNC.rows(v)[:, :, None, None] for v in (x, residual)]
        y = super().conv(op, prepared, pixels[0], pixels[1], in_place)  # type: ignore[arg-type]
        return HWNC.from_rows(y.flatten(1), x)


def _is_hwnc(value: Any) -> bool:
    """A 4-D tensor in [H, W, N, C] memory and in neither of the common orders."""
    if not isinstance(value, Tensor) or value.dim() != 4 or value.is_contiguous():
        return False
    hwnc = value.permute(HWNC.pixels_first).is_contiguous()
    return hwnc and not value.is_contiguous(memory_format=CHANNELS_LAST)
