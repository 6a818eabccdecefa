"""Batch norm into convolution, on the graph and on the numbers. Pure functions, float64 inside.

    y = gamma * (conv(x, w) + b - mean) / sqrt(var + eps) + beta
      = conv(x, w * s) + (b - mean) * s + beta        with  s = gamma / sqrt(var + eps)

(Jacob et al., "Quantization and Training of Neural Networks", 2018, section 3.2.) The normalisation
of 8-bit images goes into the first convolution: see :mod:`fastres.models.preprocess`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import FoldError
from .ir import (
    BatchNorm2d,
    Call,
    Conv2d,
    Graph,
    Linear,
    Node,
    Normalize,
    Operation,
    Ref,
    substitute,
)

Lookup = Callable[[str], Tensor]
Weights = tuple[Tensor, Tensor | None]


def fold(graph: Graph) -> Graph:
    """Attach each batch norm to the convolution before it, where it is that one's only reader."""
    users = graph.users()
    by_name = {node.name: node for node in graph.nodes}
    renamed: dict[str, str] = {}
    folded: dict[str, Node] = {}
    for node in graph.nodes:
        if isinstance(node.op, BatchNorm2d):
            conv = by_name[node.inputs[0]]
            if isinstance(conv.op, Conv2d) and users[conv.name] == [node.name]:
                folded[conv.name] = replace(conv, op=replace(conv.op, norm=node.op))
                renamed[node.name] = conv.name
    return _fold_images(_rewrite(graph, folded, renamed))


def _fold_images(graph: Graph) -> Graph:
    """Normalisation into the convolution that is its only reader; else it stays a PyTorch call."""
    users = graph.users()
    nodes = {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        if not isinstance(node.op, Normalize):
            continue
        (source,) = node.inputs
        readers = users[node.name]
        conv = nodes.get(readers[0]) if len(readers) == 1 else None
        if conv is not None and isinstance(conv.op, Conv2d):
            target, arguments = f"{node.op.module}.centered", (Ref(source), conv.op.padding)
            op = replace(conv.op, padding=(0, 0), images=node.op)
            nodes[conv.name] = replace(conv, op=op)
            call = Call("call_module", target, arguments, any_layout=True)
        else:
            reason = "normalisation that does not directly precede a convolution of its own"
            call = Call("call_module", node.op.module, (Ref(source),), {}, reason, any_layout=True)
        nodes[node.name] = replace(node, op=call)
    return replace(graph, nodes=tuple(nodes.values()))


def _rewrite(graph: Graph, changed: dict[str, Node], renamed: dict[str, str]) -> Graph:
    def name(old: str) -> str:
        return renamed.get(old, old)

    nodes = []
    for node in graph.nodes:
        if node.name in renamed:
            continue
        node = changed.get(node.name, node)
        op = node.op
        if isinstance(op, Call):
            op = replace(
                op,
                args=substitute(op.args, lambda n: Ref(name(n))),
                kwargs=substitute(op.kwargs, lambda n: Ref(name(n))),
            )
        nodes.append(replace(node, op=op, inputs=tuple(name(n) for n in node.inputs)))
    output = substitute(graph.output, lambda n: Ref(name(n)))
    return replace(graph, nodes=tuple(nodes), output=output)


def folded_conv(op: Conv2d, lookup: Lookup, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Copies: the weight (K, C/groups, R, S) in ``dtype`` and the bias (K,) in float32 or wider.

    Everything is computed in float64 and cast once at the end. The bias is None where the layer has
    neither a bias nor a batch norm.

    Raises:
        FoldError: a variance is negative or not finite, or the result overflows ``dtype``.
    """
    with torch.no_grad():
        weight, bias = unnormalised_conv(op, lookup)
        if op.norm is not None:
            scale, shift = _affine(op.norm, lookup, weight.shape[0], weight.device)
            weight = weight * scale.reshape(-1, 1, 1, 1)
            bias = shift if bias is None else bias * scale + shift
        cast = weight.to(dtype, memory_format=torch.channels_last, copy=True)
        refuse_overflow(op.weight, weight, dtype)
        if bias is None:
            return cast, None
        refuse_overflow(op.norm.mean if op.norm else op.bias or op.weight, bias, dtype)
        return cast, bias.to(_bias_dtype(dtype), copy=True)


def unnormalised_conv(op: Conv2d, lookup: Lookup) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in float64, of the images as they come in, before any batch norm."""
    weight = lookup(op.weight).detach().double()
    bias = lookup(op.bias).detach().double() if op.bias else None
    if op.images is None:
        return weight, bias
    mean, std = (lookup(f"{op.images.module}.{name}").double() for name in ("mean", "std"))
    rest = 255 * mean - (255 * mean).round()
    scale = 1 / (255 * std)
    # Input channel c of the weight of output channel k is channel c of k's group.
    per_group = (op.groups, op.out_channels // op.groups)
    scale, rest = (
        v.view(op.groups, 1, -1).expand(*per_group, -1).reshape(op.out_channels, -1, 1, 1)
        for v in (scale, rest)
    )
    weight = weight * scale
    shift = -(weight * rest).sum((1, 2, 3))
    return weight, shift if bias is None else bias + shift


def folded_linear(op: Linear, lookup: Lookup, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Copies: the weight (K, C) in ``dtype`` and the bias (K,) in float32 or wider."""
    with torch.no_grad():
        weight = lookup(op.weight).detach()
        bias = lookup(op.bias).detach() if op.bias else None
        cast = weight.to(dtype, memory_format=torch.contiguous_format, copy=True)
        refuse_overflow(op.weight, weight, dtype)
        return cast, None if bias is None else bias.to(_bias_dtype(dtype), copy=True)


def _bias_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _affine(
    norm: BatchNorm2d, lookup: Lookup, channels: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Scale and shift (K,) in float64 such that the norm is ``x * scale + shift``."""
    mean = lookup(norm.mean).detach().double()
    var = lookup(norm.var).detach().double()
    _refuse_variance(norm, var)
    one = torch.ones(channels, dtype=torch.float64, device=device)
    gamma = lookup(norm.weight).detach().double() if norm.weight else one
    beta = lookup(norm.bias).detach().double() if norm.bias else torch.zeros_like(one)
    scale = gamma / torch.sqrt(var + norm.eps)
    return scale, beta - mean * scale


def _refuse_variance(norm: BatchNorm2d, var: Tensor) -> None:
    bad = ~(torch.isfinite(var) & (var + norm.eps > 0) & (var >= 0))
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise FoldError(
            f"{norm.var}[{index}] is {float(var[index]):g}; "
            "a variance must be finite and not negative"
        )


def refuse_overflow(path: str, exact: Tensor, dtype: torch.dtype) -> None:
    """FoldError, by the path, where a finite weight is none in ``dtype``."""
    overflow = torch.isfinite(exact) & ~torch.isfinite(exact.to(dtype))
    if bool(overflow.any()):
        largest = float(exact[overflow].abs().max())
        raise FoldError(
            f"{path}: folded, a value of {largest:g} does not fit {dtype}; "
            "use torch.bfloat16 or torch.float32"
        )


def fold_step(op: Operation, lookup: Callable[[str], Tensor], dtype: torch.dtype) -> Weights:
    """Folded weight and bias of a convolution or linear step."""
    if isinstance(op, Conv2d):
        return folded_conv(op, lookup, dtype)
    assert isinstance(op, Linear)
    return folded_linear(op, lookup, dtype)
