"""What a plan in a file may name: functions, methods, modules, operations and words, by lists."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..graph import ir


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _table(prefix: str, owner: Any, names: str) -> dict[str, Callable[..., Any]]:
    return {f"{prefix}.{name}": getattr(owner, name) for name in names.split()}


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "builtins.getattr": getattr,
    **_table(
        "operator",
        operator,
        "add sub mul truediv floordiv mod neg pow matmul getitem setitem eq ne lt le gt ge "
        "iadd isub imul itruediv and_ or_ not_",
    ),
    **_table(
        "torch",
        torch,
        "add sub mul div neg pow exp sqrt rsqrt sigmoid tanh relu clamp maximum minimum mean sum "
        "amax amin cat stack chunk split flatten reshape squeeze unsqueeze permute transpose "
        "softmax matmul bmm zeros_like ones_like _assert conv1d conv2d max_pool2d",
    ),
    **_table(
        "torch.nn.functional",
        F,
        "interpolate pad adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d max_pool2d conv1d "
        "conv2d linear batch_norm group_norm layer_norm relu relu6 silu gelu elu leaky_relu "
        "hardsigmoid hardswish mish softplus softmax log_softmax sigmoid tanh normalize dropout "
        "pixel_shuffle pixel_unshuffle",
    ),
}
METHODS = _words(
    """add add_ sub sub_ mul mul_ div div_ neg pow exp sqrt sigmoid sigmoid_ tanh relu relu_ clamp
    clamp_ clamp_min mean sum max min amax amin size dim numel view view_as reshape flatten permute
    transpose t contiguous expand expand_as repeat squeeze unsqueeze chunk split unbind narrow
    softmax log_softmax matmul bmm to float half bfloat16 double type_as masked_fill"""
)
ATTRIBUTES = _words("shape ndim dtype device T mT")
MODULES = _words(
    """AdaptiveAvgPool2d AdaptiveMaxPool2d AvgPool2d BatchNorm1d BatchNorm2d ConstantPad2d Conv1d
    Conv2d ConvTranspose2d Dropout ELU Flatten GELU GroupNorm Hardsigmoid Hardswish Hardtanh
    Identity LayerNorm LeakyReLU Linear LogSoftmax MaxPool2d Mish PReLU PixelShuffle
    ReflectionPad2d ReLU ReLU6 ReplicationPad2d SiLU Sigmoid Softmax Softplus Tanh Upsample
    UpsamplingBilinear2d UpsamplingNearest2d ZeroPad2d"""
)
NAMES = {id(function): name for name, function in reversed(FUNCTIONS.items())}
OPERATIONS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        ir.Conv2d,
        ir.Quantize,
        ir.Dequantize,
        ir.BatchNorm2d,
        ir.Linear,
        ir.ReLU,
        ir.Add,
        ir.MaxPool2d,
        ir.AvgPool2d,
        ir.GlobalAvgPool,
        ir.Flatten,
        ir.Call,
    )
}
GRIDS = dict.fromkeys(("grid", "x_grid", "y_grid", "residual_grid"), ir.Grid)
PARTS: dict[str, type] = {"norm": ir.BatchNorm2d, "images": ir.Normalize, **GRIDS}
SPECIAL = (torch.dtype, torch.memory_format, torch.device)
CONSTANTS = {
    (kind.__name__, str(value).removeprefix("torch.")): value
    for value in vars(torch).values()
    for kind in SPECIAL[:2]
    if isinstance(value, kind)
}
WORDS = _words(
    """zeros reflect replicate circular same valid nearest nearest-exact linear bilinear bicubic
    trilinear none tanh NCHW NHWC"""
)  # that layers' arguments may be
DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:[0-9]{1,3})?")
