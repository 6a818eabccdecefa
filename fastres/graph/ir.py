"""The vocabulary of the graph: typed operations, nodes and the graph itself.

Tensors are named, parameters are dotted paths into the traced module, and nothing here holds data,
so a graph stays valid while the module's weights change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, TypeAlias

Pair: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Input:
    """A tensor (or other value) handed in by the caller."""


@dataclass(frozen=True)
class BatchNorm2d:
    """Inference batch norm; ``None`` for weight or bias means 1 or 0."""

    weight: str | None
    bias: str | None
    mean: str
    var: str
    eps: float


@dataclass(frozen=True)
class Normalize:
    """8-bit images to normalised ones, by the :class:`fastres.Normalize` at a path."""

    module: str


@dataclass(frozen=True)
class Grid:
    """The numbers that a tensor of bytes stands for: q for (q - zero) * scale.

    ``scale`` is positive and a float32 number, ``zero`` from 0 to 255 and even: halves then go to
    the same neighbour whether zero is added before rounding, as oneDNN does, or after, as ONNX.
    """

    scale: float
    zero: int


@dataclass(frozen=True)
class Quantize:
    """float32 to bytes: round(x / scale) + zero, halves to even, clamped to 0 to 255."""

    grid: Grid


@dataclass(frozen=True)
class Dequantize:
    """Bytes to float32."""

    grid: Grid


@dataclass(frozen=True)
class Conv2d:
    """Convolution, with the batch norm folded into it and the epilogue fused behind it.

    With ``residual`` the node's second input is added before the ReLU. With ``images`` the first
    input are centred and padded 8-bit images, and the rest of their normalisation is folded in.
    With ``x_grid`` it reads bytes and has 8-bit weights; with ``y_grid`` its result are bytes too,
    and its residual are bytes on ``residual_grid``.
    """

    weight: str
    bias: str | None
    in_channels: int
    out_channels: int
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    norm: BatchNorm2d | None = None
    residual: bool = False
    relu: bool = False
    images: Normalize | None = None
    x_grid: Grid | None = None
    y_grid: Grid | None = None
    residual_grid: Grid | None = None


@dataclass(frozen=True)
class Linear:
    """Fully connected layer on the last axis."""

    weight: str
    bias: str | None
    in_features: int
    out_features: int
    relu: bool = False


@dataclass(frozen=True)
class ReLU:
    """max(x, 0) as torch computes it: NaN and -0.0 are kept."""


@dataclass(frozen=True)
class Add:
    """Sum of two tensors, with an optional ReLU behind it."""

    relu: bool = False


@dataclass(frozen=True)
class MaxPool2d:
    """Windowed maximum; the padding counts as -inf."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool


@dataclass(frozen=True)
class AvgPool2d:
    """Windowed mean, with torch's rules for what the divisor counts."""

    kernel: Pair
    stride: Pair
    padding: Pair
    ceil_mode: bool
    count_include_pad: bool
    divisor_override: int | None


@dataclass(frozen=True)
class GlobalAvgPool:
    """Mean over H and W, to (N, C, 1, 1) or, without ``keepdim``, to (N, C).

    With ``x_grid`` it reads bytes; its result is floating point.
    """

    keepdim: bool = True
    dims: Pair = (-2, -1)
    x_grid: Grid | None = None


@dataclass(frozen=True)
class Flatten:
    """(N, C, H, W) to (N, C*H*W) in NCHW order."""


@dataclass(frozen=True)
class Ref:
    """Stands for another node's value inside the arguments of a :class:`Call`."""

    name: str


@dataclass(frozen=True)
class Call:
    """Anything not understood: run by PyTorch exactly as the source would.

    ``kind`` is torch.fx's opcode; ``reason`` says why it was left to PyTorch, ``mutates`` that it
    may write into its operands, ``any_layout`` that its result is the same in any memory format.
    """

    kind: str
    target: Callable[..., Any] | str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    reason: str = ""
    mutates: bool = False
    any_layout: bool = False


Operation: TypeAlias = (
    Input
    | Normalize
    | Quantize
    | Dequantize
    | Conv2d
    | BatchNorm2d
    | Linear
    | ReLU
    | Add
    | MaxPool2d
    | AvgPool2d
    | GlobalAvgPool
    | Flatten
    | Call
)


@dataclass(frozen=True)
class Node:
    """One value of the graph: ``name = op(*inputs)``; ``where`` is the source module's path."""

    name: str
    op: Operation
    inputs: tuple[str, ...] = ()
    where: str = ""


@dataclass(frozen=True)
class Parameter:
    """A placeholder of the traced forward: its name and, when it has one, its default."""

    name: str
    required: bool
    default: Any = None


@dataclass(frozen=True)
class Graph:
    """Nodes in program order; ``output`` is any nest of tuples, lists and dicts of :class:`Ref`.

    ``source_layout``: a step writes in place into memory that others see by way of their layout, so
    that no value may be held in another memory format than the source's.
    """

    nodes: tuple[Node, ...]
    parameters: tuple[Parameter, ...]
    output: Any
    source_layout: bool = False

    def users(self) -> dict[str, list[str]]:
        """The names of the nodes (and ``"output"``) that read each node, in program order."""
        found: dict[str, list[str]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found[name].append(node.name)
        for name in dict.fromkeys(refs(self.output)):
            found[name].append("output")
        return found


def attribute(module: Any, path: str) -> Any:
    """The object at a dotted path below ``module``."""
    return reduce(getattr, path.split("."), module)


def refs(value: Any) -> Iterator[str]:
    """The names of all :class:`Ref` inside a nest of tuples, lists, dicts and slices."""
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from refs(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from refs(item)
    elif isinstance(value, slice):
        yield from refs((value.start, value.stop, value.step))


def substitute(value: Any, lookup: Callable[[str], Any]) -> Any:
    """A copy of ``value`` in which each :class:`Ref` is replaced by ``lookup(name)``."""
    if isinstance(value, Ref):
        return lookup(value.name)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(substitute(item, lookup) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(substitute(item, lookup) for item in value)
    if isinstance(value, dict):
        return type(value)((key, substitute(item, lookup)) for key, item in value.items())
    if isinstance(value, slice):
        return slice(*(substitute(item, lookup) for item in (value.start, value.stop, value.step)))
    return value
