"""One function per kind of Keras layer: its configuration and weights as a PyTorch module.

Kernels go from (H, W, in, out) to (out, in, H, W). A dense layer behind a Flatten is permuted,
since Keras flattens in the order H, W, C. Padding 'same' puts the odd pixel at the end; where
PyTorch's layers pad evenly only, the zeros are added before them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from ..errors import FastresError

if TYPE_CHECKING:
    from .keras_import import Builder

Pair: TypeAlias = tuple[int, int]
Size: TypeAlias = tuple[int | None, ...]
Sides: TypeAlias = tuple[int, int, int, int]  # left, right, top, bottom, as torch pads
NO_SIDES: Sides = (0, 0, 0, 0)


class KerasImportError(FastresError, ValueError):
    """A Keras layer or option that has no exact counterpart here; the message names it."""


@dataclass(frozen=True)
class Value:
    """A tensor of the program.

    Attributes:
        node: what computes it, before ``pending``.
        channels: its channels (axis 1); None behind a Flatten of images of unknown size.
        size: (H, W) with the pending zeros, None where not known; () for (N, features).
        positive: whether it cannot be negative, having passed a ReLU.
        pending: zeros around it that the next layer may take over.
        interleaved: the C of a flattened (C, H, W), which Keras has in the order (H, W, C).
    """

    node: fx.Node
    channels: int | None
    size: Size
    positive: bool = False
    pending: Sides = NO_SIDES
    interleaved: int | None = None


@dataclass(frozen=True)
class Layer:
    """A layer's configuration and its place: the names of the enclosing models, then its own.

    ``kind`` is the name of Keras' class; of an operation, which is called on tensors one by one,
    ``ops.`` and its name; of a class that is not Keras' own, its module and name.
    """

    path: tuple[str, ...]
    kind: str
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        return "/".join(self.path)

    def refuse(self, why: str) -> KerasImportError:
        what = f"layer {self.name!r}" if self.name else "the model"
        return KerasImportError(f"{what} ({self.kind}) {why}")

    def pair(self, name: str) -> Pair:
        value = self.config[name]
        return (value, value) if isinstance(value, int) else (value[0], value[1])


Weights: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]
"""By the name of a module's tensor: Keras' variable and its shape there."""
Emit: TypeAlias = "Callable[[Builder, Layer, Sequence[Value]], Value]"


def _conv(builder: Builder, layer: Layer, operands: Sequence[Value]) -> Value:
    (value,) = operands
    config = layer.config
    kernel, stride, dilation = map(layer.pair, ("kernel_size", "strides", "dilation_rate"))
    groups, out = config.get("groups", 1), config["filters"]
    channels = _channels(layer, value)
    reach = (dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1)
    value = _grown(value, _same_sides(builder, layer, value, reach, stride))
    left, right, top, bottom = value.pending
    if (left, top) != (right, bottom):
        value = builder.padded(layer, value)
    padding = (value.pending[2], value.pending[0])
    bias = config.get("use_bias", True)
    module = nn.Conv2d(
        channels, out, kernel, stride, padding, dilation, groups, bias=bias, device="meta"
    )
    weights: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight": ("kernel", (*kernel, channels // groups, out))
    }
    if bias:
        weights["bias"] = ("bias", (out,))
    size = _windows(value.size, reach, stride)
    value = builder.emit(
        layer, module, value, weights=weights, channels=out, size=size, pending=NO_SIDES
    )
    return _activated(builder, layer, value)


def _dense(builder: Builder, layer: Layer, operands: Sequence[Value]) -> Value:
    (value,) = operands
    if value.size:
        raise layer.refuse("reads images; a Flatten or a global pooling must come first")
    units, bias = layer.config["units"], layer.config.get("use_bias", True)
    features = value.channels or sum(builder.file.shape(layer.path, "kernel")[:1])
    module = nn.Linear(features, units, bias=bias, device="meta")
    weights = {"weight": ("kernel", (features, units))} | (
        {"bias": ("bias", (units,))} if bias else {}
    )
    value = builder.emit(layer, module, value, weights=weights, channels=units, interleaved=None)
    return _activated(builder, layer, value)


def _batch_norm(builder: Builder, layer: Layer, operands: Sequence[Value]) -> Value:
    (value,) = operands
    config = layer.config
    axis = config["axis"][0] if isinstance(config["axis"], list) else config["axis"]
    if axis not in (-1, len(value.size) + 1):
        raise layer.refuse(f"normalises axis {axis}; the last one, the channels, is supported")
    value = builder.padded(layer, value)
    channels = _channels(layer, value)
    kind = nn.BatchNorm2d if value.size else nn.BatchNorm1d
    module = kind(channels, config["epsilon"], 1 - config["momentum"], device="meta")
    named = {"running_mean": "moving_mean", "running_var": "moving_variance"}
    if config.get("scale", True):
        named["weight"] = "gamma"
    if config.get("center", True):
        named["bias"] = "beta"
    weights = {k: (v, (channels,)) for k, v in named.items()}
    return builder.emit(layer, module, value, weights=weights)


def _max_pool(builder: Builder, layer: Layer, operands: Sequence[Value]) -> Value:
    (value,) = operands
    kernel, stride = _pool_window(layer)
    left, right, top, bottom = value.pending
    # Zeros around what is not negative are the maximum of no window that has a pixel in it.
    fits = value.positive and left == right <= kernel[1] // 2 and top == bottom <= kernel[0] // 2
    if not fits or layer.config["padding"] == "same":
        value = builder.padded(layer, value)
    sides = _same_sides(builder, layer, value, kernel, stride)
    positive = value.positive
    if sides != NO_SIDES:
        module: nn.Module = nn.ConstantPad2d(sides, -torch.inf)
        value = replace(builder.emit(layer, module, value, "_pad"), size=_grown(value, sides).size)
    padding = (value.pending[2], value.pending[0])
    size = _windows(value.size, kernel, stride)
    module = nn.MaxPool2d(kernel, stride, padding)
    return builder.emit(layer, module, value, size=size, pending=NO_SIDES, positive=positive)


def _average_pool(builder: Builder, layer: Layer, operands: Sequence[Value]) -> Value:
    value = builder.padded(layer, operands[0])
    kernel, stride = _pool_window(layer)
    sides = _same_sides(builder, layer, value, kernel, stride)
    if sides[::2] != sides[1::2]:
        raise layer.refuse("pads one side more than the other, which is not supported")
    size = _windows(_grown(value, sides).size, kernel, stride)
    padding = (sides[2], sides[0])
    module = nn.AvgPool2d(kernel, stride, padding, count_include_pad=False)
    return builder.emit(layer, module, value, size=size, positive=value.positive)


def _global_pool(builder: Builder, layer: Layer, operands: Sequence[Value]) -> Value:
    value = builder.padded(layer, operands[0])
    average = layer.kind == "GlobalAveragePooling2D"
    module = nn.AdaptiveAvgPool2d(1) if average else nn.AdaptiveMaxPool2d(1)
    value = builder.emit(layer, module, value, size=(1, 1), positive=value.positive)
    if layer.config.get("keepdims"):
        return value
    return builder.emit(layer, nn.Flatten(), value, "_flatten", size=(), positive=value.positive)


def _zero_padding(builder: Builder, layer: Layer, operands: Sequence[Value]) -> Value:
    (top, bottom), (left, right) = layer.config["padding"]
    return _grown(operands[0], (left, right, top, bottom))


def _flatten(builder: Builder, layer: Layer, operands: Sequence[Value]) -> Value:
    value = builder.padded(layer, operands[0])
    if not value.size:
        return value
    channels = _channels(layer, value)
    height, width = value.size
    features = None if height is None or width is None else channels * height * width
    one_pixel = value.size == (1, 1)
    return builder.emit(
        layer,
        nn.Flatten(),
        value,
        channels=features,
        size=(),
        positive=value.positive,
        interleaved=None if one_pixel or channels == 1 else channels,
    )


def _add(builder: Builder, layer: Layer, operands: Sequence[Value]) -> Value:
    first, *others = [builder.padded(layer, value) for value in operands]
    if any(other.interleaved != first.interleaved for other in others):
        first, *others = [builder.in_keras_order(value) for value in (first, *others)]
    total = replace(first, positive=False)
    for other in others:
        if (other.channels, len(other.size)) != (first.channels, len(first.size)):
            raise layer.refuse("adds tensors of different channels")
        total = replace(
            total,
            node=builder.graph.call_function(operator.add, (total.node, other.node)),
            size=tuple(b if a == 1 else a for a, b in zip(total.size, other.size, strict=True)),
        )
    return total


def _activation(builder: Builder, layer: Layer, operands: Sequence[Value]) -> Value:
    return _activated(builder, layer, builder.padded(layer, operands[0]), suffix="")


def _relu(builder: Builder, layer: Layer, operands: Sequence[Value]) -> Value:
    odd = {k: layer.config.get(k) for k in ("max_value", "negative_slope", "threshold")}
    if odd["max_value"] is not None or odd["negative_slope"] or odd["threshold"]:
        raise layer.refuse(f"has {odd}; a plain ReLU is supported")
    value = builder.padded(layer, operands[0])
    return builder.emit(layer, nn.ReLU(), value, positive=True)


def _softmax(builder: Builder, layer: Layer, operands: Sequence[Value]) -> Value:
    return _apply_softmax(builder, layer, operands[0], layer.config.get("axis", -1), "")


def _dropout(builder: Builder, layer: Layer, operands: Sequence[Value]) -> Value:
    (value,) = operands
    module = nn.Dropout(layer.config["rate"])
    return builder.emit(layer, module, value, positive=value.positive)


def _nothing(builder: Builder, layer: Layer, operands: Sequence[Value]) -> Value:
    return operands[0]


LAYERS: dict[str, Emit] = {
    "Activation": _activation,
    "Add": _add,
    "AveragePooling2D": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv2D": _conv,
    "Dense": _dense,
    "Dropout": _dropout,
    "Flatten": _flatten,
    "GlobalAveragePooling2D": _global_pool,
    "GlobalMaxPooling2D": _global_pool,
    "InputLayer": _nothing,
    "MaxPooling2D": _max_pool,
    "ReLU": _relu,
    "Relu": _relu,
    "Softmax": _softmax,
    "ZeroPadding2D": _zero_padding,
    "ops.Add": _add,
    "ops.Relu": _relu,
    "tf.__operators__.add": _add,
    "tf.math.add": _add,
    "tf.nn.relu": _relu,
}
MERGES = ("Add", "ops.Add", "tf.__operators__.add", "tf.math.add")
AUGMENTATIONS = ("AugMix", "CutMix", "Gaussian", "MixUp", "Rand")


def _activated(builder: Builder, layer: Layer, value: Value, suffix: str = "_activation") -> Value:
    """The layer's ``activation``, by its name or by Keras' configuration of a function."""
    activation = layer.config.get("activation") or "linear"
    if isinstance(activation, Mapping) and activation.get("module") in (None, "builtins"):
        activation = activation.get("config", activation)
    if activation == "linear":
        return value
    if activation == "softmax":
        return _apply_softmax(builder, layer, value, -1, suffix)
    if activation == "relu":
        return builder.emit(layer, nn.ReLU(), value, suffix, positive=True)
    raise layer.refuse(f"has activation={activation!r}; relu, softmax and linear are supported")


def _apply_softmax(builder: Builder, layer: Layer, value: Value, axis: int, suffix: str) -> Value:
    if value.size or axis not in (-1, 1):
        raise layer.refuse("applies softmax to images; (N, features) is supported")
    return builder.emit(layer, nn.Softmax(-1), value, suffix)


def filled(module: nn.Module, values: Mapping[str, Tensor], interleaved: int | None) -> nn.Module:
    """The module with Keras' values in place of its tensors; what Keras leaves out is neutral.

    Args:
        values: by the names of the module's tensors, in Keras' axes.
        interleaved: of the value that the module reads.
    """
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name in values:
            value = _in_torch_order(values[name])
            if interleaved and not (isinstance(module, nn.Linear) and name == "bias"):
                by_pixel = value.unflatten(-1, (-1, interleaved))
                value = by_pixel.transpose(-1, -2).flatten(-2)
            value = value.contiguous()
        else:
            value = torch.full(tensor.shape, float(name == "weight"), dtype=tensor.dtype)
        setattr(module, name, nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value)
    return module


def _in_torch_order(value: Tensor) -> Tensor:
    if value.dim() == 4:
        return value.permute(3, 2, 0, 1)
    return value.t() if value.dim() == 2 else value


def _channels(layer: Layer, value: Value) -> int:
    if value.channels is None:
        raise layer.refuse("needs to know the size of the flattened images: give input_size=(H, W)")
    return value.channels


def _pool_window(layer: Layer) -> tuple[Pair, Pair]:
    kernel = layer.pair("pool_size")
    return kernel, layer.pair("strides") if layer.config.get("strides") else kernel


def _same_sides(builder: Builder, layer: Layer, value: Value, reach: Pair, stride: Pair) -> Sides:
    """The zeros of padding 'same': max((ceil(n/s) - 1) * s + reach - n, 0), the odd one last."""
    if layer.config["padding"] == "valid":
        return NO_SIDES
    if layer.config["padding"] != "same":
        raise layer.refuse(
            f"has padding={layer.config['padding']!r}; 'same' and 'valid' are supported"
        )
    if stride == (1, 1):
        totals = [r - 1 for r in reach]
    else:
        sizes = builder.known_size(layer, value)
        totals = [
            max((-(n // -s) - 1) * s + r - n, 0)
            for n, s, r in zip(sizes, stride, reach, strict=True)
        ]
    top, left = (total // 2 for total in totals)
    return (left, totals[1] - left, top, totals[0] - top)


def _grown(value: Value, sides: Sides) -> Value:
    """The value with more pending zeros around it."""
    left, right, top, bottom = sides
    pending: Any = tuple(a + b for a, b in zip(value.pending, sides, strict=True))
    grown = zip(value.size, (top + bottom, left + right), strict=True)
    return replace(value, pending=pending, size=tuple(n and n + more for n, more in grown))


def _windows(size: Size, reach: Pair, stride: Pair) -> Size:
    """How many windows fit, per axis."""
    return tuple(n and (n - r) // s + 1 for n, r, s in zip(size, reach, stride, strict=True))
