"""Which typed operation a module or a function call is; one function for each kind.

Whatever is not recognised exactly, options included, gives None and stays a PyTorch call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import fx, nn

from .ir import (
    Add,
    AvgPool2d,
    BatchNorm2d,
    Call,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    Normalize,
    Operation,
    Pair,
    ReLU,
)
from .memory_order import Order, order_of_module

FROZEN_NORMS = ("torchvision.ops.misc.FrozenBatchNorm2d",)
NORM_ACTS = tuple(
    f"timm.layers.norm_act.{name}"
    for name in ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")
)
NORMALIZE = ("fastres.models.preprocess.Normalize",)
FUSED = ("fastres.frontends.fast_model.FastModel", "fastres.frontends.fast_shell.FastShell")
IDENTITIES = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_HARMLESS = {"__init__", "__doc__", "__module__", "__annotations__", "__annotate_func__"} | {
    *("__static_attributes__", "__firstlineno__", "__constants__", "__orig_bases__", "_version"),
    *("__dict__", "__weakref__", "__repr__", "extra_repr", "_get_name", "train", "eval"),
    *("reset_parameters", "reset_running_stats", "_apply"),
    *("_load_from_state_dict", "_save_to_state_dict", "get_extra_state", "set_extra_state"),
}


def qualified_name(kind: type) -> str:
    """``package.module.Class`` of a type."""
    return f"{kind.__module__}.{kind.__qualname__}"


def has_hooks(module: nn.Module) -> bool:
    """Whether forward hooks or pre-hooks hang on this module itself."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def base_layer(module: nn.Module) -> type | None:
    """The layer of torch's that a module computes as: its type, or one that its type extends
    without a word in what forward does; None where there is no such layer."""
    kind = type(module)
    base = next((k for k in kind.__mro__ if k in _MODULES or k in IDENTITIES), None)
    if base is None or kind is base:
        return base
    data = {*vars(module), *module._parameters, *module._buffers}
    added = (set(vars(k)) for k in kind.__mro__ if k not in base.__mro__)
    changed = {name for names in added for name in names - _HARMLESS}
    return None if any(hasattr(base, name) or name in data for name in changed) else base


def from_module(module: nn.Module, path: str) -> list[Operation] | None:
    """The operations that calling ``module`` stands for, in order, or None.

    Args:
        module: a module in eval mode without hooks.
        path: its dotted path below the traced root.
    """
    base = base_layer(module)
    if base in _MODULES:
        op = _MODULES[base](module, path)
        return None if op is None else [op]
    name = qualified_name(type(module))
    if name in FROZEN_NORMS:
        return [_frozen_norm(module, path)]
    if name in NORM_ACTS:
        return _norm_act(module, path)
    if name in NORMALIZE:
        return [Normalize(path)]
    return None


def _conv(m: Any, path: str) -> Operation | None:
    padding = _same_padding(m) if m.padding == "same" else m.padding
    padding = (0, 0) if padding == "valid" else padding
    if m.padding_mode != "zeros" or padding is None:
        return None
    if sees_only_padding(m.kernel_size, padding, m.dilation):
        return None
    bias = f"{path}.bias" if m.bias is not None else None
    return Conv2d(
        f"{path}.weight",
        bias,
        m.in_channels,
        m.out_channels,
        m.kernel_size,
        m.stride,
        padding,
        m.dilation,
        m.groups,
    )


def sees_only_padding(kernel: Sequence[int], padding: Pair, dilation: Pair) -> bool:
    """Whether a dilated window may lie outside of the image: oneDNN reads past the end of
    channels_last memory there and crashes the process (torch 2.11); in NCHW memory it does not."""
    axes = zip(kernel, padding, dilation, strict=True)
    return any(d > 1 and p > d * (k - 1) for k, p, d in axes)


def _same_padding(m: nn.Conv2d) -> Pair | None:
    """torch's 'same' padding where it is symmetric; an even total per axis."""
    total = [d * (k - 1) for d, k in zip(m.dilation, m.kernel_size, strict=True)]
    if any(t % 2 for t in total):
        return None
    return (total[0] // 2, total[1] // 2)


def _batch_norm(m: Any, path: str) -> Operation | None:
    if m.training or m.running_mean is None or m.running_var is None:
        return None
    weight = f"{path}.weight" if m.weight is not None else None
    bias = f"{path}.bias" if m.bias is not None else None
    return BatchNorm2d(weight, bias, f"{path}.running_mean", f"{path}.running_var", m.eps)


def _frozen_norm(m: Any, path: str) -> Operation:
    return BatchNorm2d(
        f"{path}.weight", f"{path}.bias", f"{path}.running_mean", f"{path}.running_var", m.eps
    )


def _norm_act(m: Any, path: str) -> list[Operation] | None:
    """The norm, and what timm's modules do to its output."""
    norm = _batch_norm(m, path)
    if norm is None:
        return None
    inner = {name: getattr(m, name, None) for name in ("drop", "act")}
    return [norm, *(op for name, child in inner.items() for op in _after(child, f"{path}.{name}"))]


def _after(module: nn.Module | None, path: str) -> list[Operation]:
    """A module as the step of a chain; its operand is filled in where the chain is emitted."""
    if module is None:
        return []
    if has_hooks(module) or "forward" in vars(module):
        return [Call("call_module", path, reason="has hooks or a forward of its own")]
    if type(module) is nn.Identity:
        return []
    if type(module) is nn.ReLU:
        return [ReLU()]
    reason = f"{type(module).__name__} is not fused"
    any_layout = order_of_module(module) is not Order.READ
    return [Call("call_module", path, reason=reason, any_layout=any_layout)]


def _max_pool(m: Any, path: str) -> Operation | None:
    if m.return_indices:
        return None
    return _max_pool_op(m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode)


def _max_pool_op(
    kernel: Any, stride: Any, padding: Any = 0, dilation: Any = 1, ceil_mode: Any = False
) -> Operation | None:
    pairs = [_pair(v) for v in (kernel, stride or kernel, padding, dilation)]
    if any(p is None for p in pairs) or not isinstance(ceil_mode, bool):
        return None
    return MaxPool2d(*pairs, ceil_mode)  # type: ignore[arg-type,call-arg]


def _avg_pool(m: Any, path: str) -> Operation | None:
    return _avg_pool_op(
        m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    )


def _avg_pool_op(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: Any = False,
    count_include_pad: Any = True,
    divisor_override: Any = None,
) -> Operation | None:
    pairs = [_pair(v) for v in (kernel_size, stride or kernel_size, padding)]
    flags = isinstance(ceil_mode, bool) and isinstance(count_include_pad, bool)
    if any(p is None for p in pairs) or not flags or isinstance(divisor_override, fx.Node):
        return None
    return AvgPool2d(*pairs, ceil_mode, count_include_pad, divisor_override)  # type: ignore[arg-type,call-arg]


def _adaptive_pool(m: Any, path: str) -> Operation | None:
    return GlobalAvgPool() if _pair(m.output_size) == (1, 1) else None


def _linear(m: Any, path: str) -> Operation | None:
    bias = f"{path}.bias" if m.bias is not None else None
    return Linear(f"{path}.weight", bias, m.in_features, m.out_features)


def _flatten(m: Any, path: str) -> Operation | None:
    return Flatten() if (m.start_dim, m.end_dim) == (1, -1) else None


_MODULES: dict[type, Callable[[Any, str], Operation | None]] = {
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _batch_norm,
    nn.SyncBatchNorm: _batch_norm,
    nn.ReLU: lambda m, path: ReLU(),
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.Linear: _linear,
    nn.Flatten: _flatten,
}


Constant: TypeAlias = tuple[str, tuple[int, ...]]
FindConstant: TypeAlias = Callable[[Any], Constant | None]


def from_function(node: fx.Node, constant: FindConstant) -> list[Operation] | None:
    """The typed operation of a function or method call, or None."""
    args, kwargs = node.args, dict(node.kwargs)
    kwargs.pop("inplace", None)
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):  # as torch.export records them
        target = _ATEN.get(str(target))
        if target is F.batch_norm:
            args = (args[0], *args[3:5], *args[1:3], *args[5:8])
    op: Operation | None = None
    if target in _RELUS and not kwargs and len(args) == 1:
        op = ReLU()
    elif target in _ADDS and _adds_two_tensors(args, kwargs):
        op = Add()
    elif _flattens(target, args, kwargs):
        op = Flatten()
    elif target in (F.max_pool2d, torch.max_pool2d):
        op = _bound(_max_pool_function, args, kwargs)
    elif target is F.avg_pool2d:
        op = _bound(_avg_pool_op, args[1:], kwargs)
    elif target is F.adaptive_avg_pool2d:
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        op = GlobalAvgPool() if _pair(size) == (1, 1) else None
    elif target in ("mean", torch.mean):
        op = _bound(_spatial_mean, args[1:], kwargs)
    elif target in (F.conv2d, torch.conv2d):
        op = _bound(lambda *a, **k: _conv_function(constant, *a, **k), args[1:], kwargs)
    elif target in (F.linear, torch._C._nn.linear):
        op = _bound(lambda *a, **k: _linear_function(constant, *a, **k), args[1:], kwargs)
    elif target is F.batch_norm:
        op = _bound(lambda *a, **k: _norm_function(constant, *a, **k), args[1:], kwargs)
    return None if op is None else [op]


_ATEN: dict[str, Any] = {
    "aten.conv2d.default": F.conv2d,
    "aten.batch_norm.default": F.batch_norm,
    "aten.linear.default": F.linear,
    "aten.relu.default": F.relu,
    "aten.relu_.default": F.relu_,
    "aten.add.Tensor": torch.add,
    "aten.add_.Tensor": "add_",
    "aten.max_pool2d.default": F.max_pool2d,
    "aten.avg_pool2d.default": F.avg_pool2d,
    "aten.adaptive_avg_pool2d.default": F.adaptive_avg_pool2d,
    "aten.mean.dim": torch.mean,
    "aten.flatten.using_ints": torch.flatten,
    "aten.dropout.default": F.dropout,
}
_RELUS = (F.relu, torch.relu, F.relu_, torch.relu_, "relu", "relu_")
_FLATTENS = (torch.flatten, "flatten")
_VIEWS = (torch.reshape, "reshape", "view")
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__")


def _bound(build: Callable[..., Operation | None], args: Any, kwargs: Any) -> Operation | None:
    try:
        return build(*args, **kwargs)
    except TypeError:
        return None


def _adds_two_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    operands = [*args, *([kwargs["other"]] if "other" in kwargs else [])]
    only = set(kwargs) <= {"other"}
    return only and len(operands) == 2 and all(isinstance(a, fx.Node) for a in operands)


def _flattens(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if target in _VIEWS:
        return _views_as_rows(args)
    return target in _FLATTENS and _flattens_all(args, kwargs)


def _flattens_all(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    bounds = {"start_dim": 0, "end_dim": -1, **kwargs}
    bounds.update(zip(("start_dim", "end_dim"), args[1:], strict=False))
    return bounds == {"start_dim": 1, "end_dim": -1}


def _views_as_rows(args: tuple[Any, ...]) -> bool:
    """``x.view(x.size(0), -1)`` and its spellings."""
    shape = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    return len(shape) == 2 and shape[1] == -1 and _is_batch_size(shape[0], args[0])


def _is_batch_size(value: Any, x: Any) -> bool:
    if not isinstance(value, fx.Node):
        return False
    if value.target == "size":
        return value.args == (x, 0)
    if value.target is operator.getitem and value.args[1] == 0:
        source: Any = value.args[0]
        is_shape = source.target is getattr and source.args == (x, "shape")
        return is_shape or (source.target == "size" and source.args == (x,))
    return False


def _spatial_mean(dim: Any, keepdim: bool = False) -> Operation | None:
    if isinstance(dim, (tuple, list)) and set(dim) in ({2, 3}, {-1, -2}) and len(dim) == 2:
        return GlobalAvgPool(keepdim, (dim[0], dim[1]))
    return None


def _max_pool_function(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Operation | None:
    if return_indices:
        return None
    return _max_pool_op(kernel_size, stride, padding, dilation, ceil_mode)


def _conv_function(
    constant: FindConstant,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Operation | None:
    pairs = [_pair(v) for v in (stride, padding, dilation)]
    w, b = constant(weight), constant(bias)
    if w is None or (bias is not None and b is None) or any(p is None for p in pairs):
        return None
    k, c, *kernel = w[1]
    if sees_only_padding(kernel, *pairs[1:]):  # type: ignore[arg-type]
        return None
    bias_path = b[0] if b else None
    return Conv2d(w[0], bias_path, c * groups, k, tuple(kernel), *pairs, groups)  # type: ignore[arg-type,call-arg]


def _linear_function(constant: FindConstant, weight: Any, bias: Any = None) -> Operation | None:
    w, b = constant(weight), constant(bias)
    if w is None or (bias is not None and b is None):
        return None
    return Linear(w[0], b[0] if b else None, w[1][1], w[1][0])


def _norm_function(
    constant: FindConstant,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: Any = False,
    momentum: Any = 0.1,
    eps: Any = 1e-5,
) -> Operation | None:
    if training is not False or not isinstance(eps, float):
        return None
    w, b, mean, var = (constant(value) for value in (weight, bias, running_mean, running_var))
    if mean is None or var is None or (weight is not None and w is None):
        return None
    if bias is not None and b is None:
        return None
    return BatchNorm2d(w[0] if w else None, b[0] if b else None, mean[0], var[0], eps)


def _pair(value: Any) -> Pair | None:
    if isinstance(value, int):
        return (value, value)
    if isinstance(value, (tuple, list)) and all(isinstance(v, int) for v in value):
        if len(value) == 2:
            return (value[0], value[1])
        if len(value) == 1:
            return (value[0], value[0])
    return None
