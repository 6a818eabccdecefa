"""Which PyTorch calls give the same values in any memory order, and what becomes of the order.

The engine holds images in channels_last memory where the source holds them row-major. Whatever is
not listed here gets its operands as the source would hand them over.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import fx, nn


class Order(Enum):
    """What a call makes of the memory order of its operands; its values are the same in any.

    A result is plain where it is dense and row-major or, being an image, channels_last.
    """

    PLAIN = "the result is plain in any case"
    KEPT = "the result is plain where the operands are"
    DERIVED = "axes are moved, merged, split or dropped, so that the result is not plain"
    READ = "not known: the order may be read"


def order_of(node: fx.Node) -> Order:
    """What a call of a function or a method makes of memory order."""
    if node.op not in ("call_function", "call_method"):
        return Order.PLAIN
    target: Any = node.target
    if target is getattr:
        return _ATTRIBUTES.get(str(node.args[1]), Order.READ)
    if node.op == "call_function" and not _is_torchs(target):
        return Order.READ
    name = function_name(target)
    return _FUNCTIONS.get(name) or _FUNCTIONS.get(name.strip("_"), Order.READ)


def order_of_module(module: nn.Module) -> Order:
    """What calling a module, without hooks, makes of memory order."""
    kind = type(module)
    torchs = kind.__module__.startswith("torch.nn.modules.")
    return _MODULES.get(kind.__name__, Order.READ) if torchs else Order.READ


def function_name(target: Any) -> str:
    """The name of a function or method, without what tells its overloads apart."""
    if isinstance(target, str):
        return target
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return str(schema.name).rpartition(":")[2]
    return str(getattr(target, "__name__", target))


def _is_torchs(function: Any) -> bool:
    """Whether a function is torch's own, or Python's on numbers; no operator that users add."""
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(function).startswith("aten.")
    package = str(getattr(function, "__module__", None)).partition(".")[0]
    return package in ("torch", "_operator", "math")


def _table(**names: str) -> dict[str, Order]:
    return {name: Order[order] for order, text in names.items() for name in text.split()}


_ATTRIBUTES = _table(PLAIN="shape ndim dtype device is_cuda requires_grad", DERIVED="T mT H mH")

_FUNCTIONS = _table(
    PLAIN="""
        size dim ndimension numel nelement element_size is_floating_point item len
        arange zeros ones full empty linspace tensor
        cat concat concatenate stack conv1d conv_transpose1d conv_transpose2d
        linear matmul bmm mm addmm baddbmm einsum bilinear scaled_dot_product_attention
        batch_norm group_norm layer_norm instance_norm rms_norm
        max_pool1d max_pool2d avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d
        adaptive_max_pool1d adaptive_max_pool2d interpolate upsample grid_sample pad
        pixel_shuffle pixel_unshuffle channel_shuffle fold contiguous
        roll flip repeat tile repeat_interleave embedding one_hot
        _assert _assert_async""",
    KEPT="""
        add radd iadd sub rsub subtract isub mul rmul multiply imul div divide truediv true_divide
        itruediv floordiv floor_divide ifloordiv mod remainder fmod imod pow ipow square neg
        negative pos abs absolute sign sqrt ceil floor exp exp2 expm1 log log1p log2 rsqrt
        reciprocal sin cos tan tanh atan erf round trunc frac clamp clip
        clamp_min clamp_max maximum minimum where lerp
        addcmul addcdiv nan_to_num masked_fill eq ne lt le gt ge isnan isinf isfinite invert not
        and or xor iand ior ixor logical_and logical_or logical_not bitwise_and bitwise_or
        bitwise_not sigmoid relu relu6 leaky_relu prelu elu selu celu gelu silu mish softplus
        softsign logsigmoid log_sigmoid hardswish hardsigmoid hardtanh hardshrink softshrink
        tanhshrink threshold glu softmax log_softmax softmin normalize cumsum
        dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout
        to type type_as float half bfloat16 double int long bool cpu cuda clone detach setitem
        zeros_like ones_like full_like empty_like""",
    DERIVED="""
        getitem permute transpose t swapaxes swapdims movedim moveaxis reshape reshape_as flatten
        unflatten ravel squeeze unsqueeze expand expand_as broadcast_to narrow select chunk split
        split_with_sizes tensor_split unbind diagonal index_select gather take_along_dim
        mean sum amax amin max min argmax argmin var std var_mean std_mean norm any all
        logsumexp median topk sort count_nonzero nansum nanmean""",
)

_MODULES = _table(
    PLAIN="""
        BatchNorm1d BatchNorm2d SyncBatchNorm GroupNorm LayerNorm RMSNorm InstanceNorm1d
        InstanceNorm2d Linear Embedding Conv1d ConvTranspose1d ConvTranspose2d LSTM GRU RNN
        MultiheadAttention MaxPool1d MaxPool2d AvgPool1d AvgPool2d AdaptiveAvgPool1d
        AdaptiveAvgPool2d AdaptiveMaxPool1d AdaptiveMaxPool2d Upsample UpsamplingNearest2d
        UpsamplingBilinear2d ConstantPad1d ConstantPad2d ZeroPad1d ZeroPad2d ReflectionPad1d
        ReflectionPad2d ReplicationPad1d ReplicationPad2d PixelShuffle PixelUnshuffle
        ChannelShuffle Fold Unfold""",
    KEPT="""
        ReLU ReLU6 LeakyReLU PReLU ELU SELU CELU GELU GLU SiLU Mish Softplus Softsign Sigmoid
        LogSigmoid Tanh Hardswish Hardsigmoid Hardtanh Hardshrink Softshrink Tanhshrink Threshold
        Softmax LogSoftmax Softmin Softmax2d Identity Dropout Dropout1d Dropout2d Dropout3d
        AlphaDropout FeatureAlphaDropout""",
    DERIVED="Flatten Unflatten",
)
