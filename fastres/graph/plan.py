"""Graph to plan: fuse epilogues, order the steps, decide what may be overwritten and freed.

A plan is immutable and holds neither weights nor sizes: one plan serves every batch and image size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, TypeAlias

from torch import nn

from .fold import fold
from .ir import (
    Add,
    AvgPool2d,
    BatchNorm2d,
    Call,
    Conv2d,
    Dequantize,
    Flatten,
    GlobalAvgPool,
    Graph,
    Input,
    Linear,
    MaxPool2d,
    Node,
    Operation,
    Pair,
    Parameter,
    Quantize,
    ReLU,
    refs,
)
from .trace import trace

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """``name = op(*inputs)``.

    Attributes:
        in_place: the residual is dead afterwards and may be overwritten by the result.
        frees: values that nobody reads after this step.
        where: path of the source module that the step stands for.
    """

    name: str
    op: Operation
    inputs: tuple[str, ...]
    where: str = ""
    in_place: bool = False
    frees: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What runs, in order. ``str(plan)`` is a table.

    Attributes:
        steps: each with its operands.
        parameters: what the caller hands in.
        output: a nest of references to values.
        kernels: names each step's kernel.
        reasons: why that kernel, where there was a choice.
        chosen_for: the input shapes that the choice was made for.
        source_layout: whether values stay in the memory format of the source's own.
    """

    steps: tuple[Step, ...]
    parameters: tuple[Parameter, ...]
    output: Any
    kernels: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    chosen_for: tuple[Shape, ...] = ()
    source_layout: bool = False

    @property
    def fused(self) -> tuple[Step, ...]:
        """The steps that fastres runs itself."""
        return tuple(step for step in self.steps if not fallback_reason(step.op))

    @property
    def fallbacks(self) -> tuple[tuple[Step, str], ...]:
        """The steps that stay PyTorch calls, each with the reason."""
        return tuple((s, fallback_reason(s.op)) for s in self.steps if fallback_reason(s.op))

    @property
    def eight_bit(self) -> tuple[int, int]:
        """How many convolutions compute in 8 bits, and how many there are."""
        convolutions = [step.op for step in self.steps if isinstance(step.op, Conv2d)]
        return sum(op.x_grid is not None for op in convolutions), len(convolutions)

    @property
    def fuses(self) -> bool:
        """Whether a step stands for a layer with weights and at least one more."""
        linear = (s.op.relu for s in self.steps if isinstance(s.op, Linear))
        return self.fuses_convolutions or any(linear)

    @property
    def fuses_convolutions(self) -> bool:
        """As :attr:`fuses`, by a step with a convolution."""
        convolutions = [s.op for s in self.steps if isinstance(s.op, Conv2d)]
        return any(op.norm or op.residual or op.relu or op.images for op in convolutions)

    def shapes(self, *inputs: Shape | None) -> dict[str, Shape | None]:
        """Each value's shape for these input shapes; None behind one that is not known."""
        known: dict[str, Shape | None] = dict(
            zip((p.name for p in self.parameters), inputs, strict=False)
        )
        for step in self.steps:
            known[step.name] = output_shape(step.op, [known.get(name) for name in step.inputs])
        return known

    def peak_activation_bytes(self, shape: Shape, itemsize: int) -> int | None:
        """Most bytes alive at once, the input and the weights excluded; None if not known."""
        shapes = self.shapes(shape)
        alive: dict[str, int] = {}
        peak = 0
        for step in self.steps:
            result = shapes[step.name]
            if result is None:
                return None
            view = isinstance(step.op, Flatten) or step.in_place
            alive[step.name] = 0 if view else prod(result) * itemsize
            if view:
                replaced = step.inputs[-1] if isinstance(step.op, Conv2d) else step.inputs[0]
                alive[step.name] = alive.pop(replaced, 0)
            peak = max(peak, sum(alive.values()))
            for name in step.frees:
                alive.pop(name, None)
        return peak

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: one row per step."""
        return {
            "steps": [
                _row(step, self._kernel_name(i)) | {"reason": self._reason(i)}
                for i, step in enumerate(self.steps)
            ],
            "chosen_for": [list(shape) for shape in self.chosen_for],
            "fused": len(self.fused),
            "left_to_pytorch": [
                {"step": s.where or s.name, "reason": r} for s, r in self.fallbacks
            ],
        }

    def _kernel_name(self, index: int) -> str:
        return self.kernels[index] if self.kernels else ""

    def _reason(self, index: int) -> str:
        return self.reasons[index] if self.reasons else ""

    def __str__(self) -> str:
        header: tuple[str, ...] = ("step", "what", "kernel", "in place", "source", "why")
        steps = enumerate(self.steps)
        rows = [header] + [(*_cells(s, self._kernel_name(i)), self._reason(i)) for i, s in steps]
        if not self.reasons:
            header, rows = header[:-1], [row[:-1] for row in rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        left = [f"  {s.where or s.name}: {reason}" for s, reason in self.fallbacks]
        lines.append(f"{len(self.steps)} steps, {len(left)} left to PyTorch" + ":" * bool(left))
        if not self.fuses:
            left.append("nothing is fused: each step is one layer")
        if self.eight_bit[0]:
            left.append("{} of {} convolutions in 8 bits".format(*self.eight_bit))
        if self.chosen_for:
            shapes = ", ".join("x".join(map(str, shape)) for shape in self.chosen_for)
            left.append(f"kernels chosen for {shapes}")
        return "\n".join(line.rstrip() for line in lines + left)


def of_module(module: nn.Module, method: str = "forward", most: bool = True) -> Plan:
    """The plan of what a module computes in eval mode; ``most`` as :func:`trace.trace`.

    Raises:
        TraceError: torch.fx cannot trace the method.
    """
    return build(fold(trace(module, method, most)))


def build(graph: Graph) -> Plan:
    """Fuse a folded graph and turn it into a plan."""
    return schedule(fuse(graph))


def schedule(graph: Graph) -> Plan:
    """A fused graph as a plan: only here is decided what may be overwritten or freed."""
    owned = _exclusive_values(graph)
    last = _last_uses(graph)
    steps = []
    for index, node in enumerate(graph.nodes):
        if isinstance(node.op, Input):
            continue
        frees = tuple(n for n in last if last[n] == index and (n in node.inputs or n == node.name))
        steps.append(
            Step(
                node.name,
                node.op,
                node.inputs,
                node.where,
                in_place=_may_overwrite(node, frees, owned),
                frees=frees,
            )
        )
    return Plan(tuple(steps), graph.parameters, graph.output, source_layout=graph.source_layout)


def fuse(graph: Graph) -> Graph:
    """conv + add, then anything + ReLU: each pair becomes one node at the later one's place."""
    return _fuse_pairs(_fuse_pairs(graph, _conv_add), _relu_epilogue)


def _fuse_pairs(graph: Graph, rule: Any) -> Graph:
    users = graph.users()
    kept: dict[str, Node] = {}
    for node in graph.nodes:
        merged = rule(node, kept, users)
        if merged is not None:
            absorbed, node = merged
            del kept[absorbed]
        kept[node.name] = node
    return replace(graph, nodes=tuple(kept.values()))


def _conv_add(
    node: Node, before: dict[str, Node], users: dict[str, list[str]]
) -> tuple[str, Node] | None:
    """The sum is taken in by the convolution with the larger window, or else the later one.

    A 3x3 computes long enough to hide the reading of the residual, which a 1x1 does not.
    """
    if not isinstance(node.op, Add) or len(set(node.inputs)) != 2:
        return None
    order = list(before)

    def preference(name: str) -> tuple[int, int]:
        op = before[name].op
        return (prod(op.kernel) if isinstance(op, Conv2d) else 0, order.index(name))

    for name in sorted(node.inputs, key=preference, reverse=True):
        conv = before[name]
        if not isinstance(conv.op, Conv2d) or conv.op.residual:
            continue
        if users[name] != [node.name] or _mutation_since(name, before):
            continue
        (other,) = (n for n in node.inputs if n != name)
        op = replace(conv.op, residual=True)
        return name, Node(node.name, op, (*conv.inputs, other), conv.where)
    return None


def _relu_epilogue(
    node: Node, before: dict[str, Node], users: dict[str, list[str]]
) -> tuple[str, Node] | None:
    if not isinstance(node.op, ReLU):
        return None
    (name,) = node.inputs
    producer = before[name]
    if not isinstance(producer.op, (Conv2d, Linear, Add)) or producer.op.relu:
        return None
    if users[name] != [node.name] or _mutation_since(name, before):
        return None
    op = replace(producer.op, relu=True)
    return name, Node(node.name, op, producer.inputs, producer.where)


def _mutation_since(name: str, before: dict[str, Node]) -> bool:
    """Whether a step after ``name`` may write into memory that ``name``, delayed, would read."""
    later = list(before).index(name) + 1
    return any(isinstance(n.op, Call) and n.op.mutates for n in list(before.values())[later:])


def _exclusive_values(graph: Graph) -> set[str]:
    """Values whose memory no other value, input or module can share."""
    shared = set(refs(graph.output))
    for node in graph.nodes:
        if isinstance(node.op, (Call, Flatten)):
            shared.update((node.name, *node.inputs))
        elif isinstance(node.op, Input):
            shared.add(node.name)
    return {node.name for node in graph.nodes} - shared


def _last_uses(graph: Graph) -> dict[str, int]:
    """Index of the last reader of each value; values of the output are never freed."""
    last = {node.name: index for index, node in enumerate(graph.nodes)}
    for index, node in enumerate(graph.nodes):
        for name in node.inputs:
            last[name] = index
    for name in refs(graph.output):
        last.pop(name, None)
    return last


def _may_overwrite(node: Node, frees: tuple[str, ...], owned: set[str]) -> bool:
    if isinstance(node.op, Conv2d) and node.op.residual:
        x, residual = node.inputs
        return residual in frees and residual in owned and residual != x
    if isinstance(node.op, (Add, ReLU)):
        return node.inputs[0] in frees and node.inputs[0] in owned
    return False


def fallback_reason(op: Operation) -> str:
    """Why a step stays a PyTorch call; empty for the steps that fastres runs."""
    if isinstance(op, Call):
        return "" if op.kind == "get_attr" else op.reason
    if isinstance(op, BatchNorm2d):
        return "batch norm that does not directly follow a convolution of its own"
    return ""


def describe(op: Operation) -> str:
    """A step in a few words, such as ``conv 3x3/2 + bias + residual + ReLU``."""
    if isinstance(op, Conv2d):
        biased = op.bias is not None or op.norm is not None
        stride = f"/{max(op.stride)}" if max(op.stride) > 1 else ""
        groups = f" groups {op.groups}" if op.groups > 1 else ""
        kernel = "x".join(map(str, op.kernel))
        channels = f"{op.in_channels}->{op.out_channels}"
        words = [
            f"conv {kernel}{stride} {channels}{groups}",
            "bias" * biased,
            "residual" * op.residual,
            "ReLU" * op.relu,
        ]
        return " + ".join(w for w in words if w) + ", 8 bits" * (op.x_grid is not None)
    if isinstance(op, Linear):
        return f"linear {op.in_features}->{op.out_features}" + " + ReLU" * op.relu
    if isinstance(op, Add):
        return "add" + " + ReLU" * op.relu
    if isinstance(op, Call):
        target = op.target if isinstance(op.target, str) else getattr(op.target, "__name__", "?")
        return f"PyTorch {target}"
    return _NAMES[type(op)]


_NAMES: dict[type, str] = {
    Input: "input",
    BatchNorm2d: "PyTorch batch norm",
    ReLU: "ReLU",
    MaxPool2d: "max pool",
    AvgPool2d: "average pool",
    GlobalAvgPool: "global average pool",
    Flatten: "flatten (view)",
    Quantize: "to 8 bits",
    Dequantize: "to float32",
}


def _cells(step: Step, kernel: str) -> tuple[str, ...]:
    in_place = "yes" if step.in_place else ""
    return (step.name, describe(step.op), kernel, in_place, step.where)


def _row(step: Step, kernel: str) -> dict[str, Any]:
    op = {} if isinstance(step.op, Call) else asdict(step.op)
    return {
        "name": step.name,
        "what": describe(step.op),
        "served_by": kernel,
        "inputs": list(step.inputs),
        "in_place": step.in_place,
        "frees": list(step.frees),
        "where": step.where,
        **{k: v for k, v in op.items() if isinstance(v, (int, bool, tuple))},
    }


def window_output(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """Number of windows along one axis, rounded down (torch.nn.Conv2d's formula)."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def pool_output(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> int:
    """As :func:`window_output`; ``ceil_mode`` rounds up unless the last window starts outside."""
    if not ceil_mode:
        return window_output(size, kernel, stride, padding, dilation)
    out = -((size + 2 * padding - dilation * (kernel - 1) - 1) // -stride) + 1
    return out - ((out - 1) * stride >= size + padding)


def output_shape(op: Operation, inputs: list[Shape | None]) -> Shape | None:
    """Shape of a step's result, or None where it is not known without running."""
    x = inputs[0] if inputs else None
    if x is None or isinstance(op, (Call, Input)):
        return None
    if isinstance(op, (Conv2d, MaxPool2d, AvgPool2d)) and len(x) == 4:
        channels = op.out_channels if isinstance(op, Conv2d) else x[1]
        return (x[0], channels, *_window_outputs(op, x))
    if isinstance(op, Linear):
        return (*x[:-1], op.out_features)
    if isinstance(op, GlobalAvgPool):
        return (*x[:2], 1, 1) if op.keepdim else x[:2]
    if isinstance(op, Flatten) and x:
        return (x[0], prod(x[1:]))
    if isinstance(op, (ReLU, Add, BatchNorm2d, Quantize, Dequantize)):
        return x
    return None


def _window_outputs(op: Conv2d | MaxPool2d | AvgPool2d, x: Shape) -> Pair:
    dilation = (1, 1) if isinstance(op, AvgPool2d) else op.dilation
    ceil_mode = not isinstance(op, Conv2d) and op.ceil_mode
    height, width = (
        pool_output(x[2 + i], op.kernel[i], op.stride[i], op.padding[i], dilation[i], ceil_mode)
        for i in (0, 1)
    )
    return (height, width)


def parameter_paths(op: Operation) -> Iterable[str]:
    """Dotted paths of the parameters and buffers that a step reads by name."""
    if isinstance(op, Conv2d):
        own: list[str | None] = [op.weight, op.bias]
        if op.images is not None:
            own += [f"{op.images.module}.mean", f"{op.images.module}.std"]
        if op.norm is not None:
            own += [op.norm.weight, op.norm.bias, op.norm.mean, op.norm.var]
    elif isinstance(op, BatchNorm2d):
        own = [op.weight, op.bias, op.mean, op.var]
    elif isinstance(op, Linear):
        own = [op.weight, op.bias]
    else:
        own = []
    return [path for path in own if path is not None]


def kept_names(plan: Plan) -> dict[str, str]:
    """By path in the source: the names, of our own, under which a fused copy keeps what the steps
    left to PyTorch need. A source may call its modules by Python's words, a file by anything."""
    found: dict[str, str] = {}
    for step in plan.steps:
        if isinstance(step.op, Call):
            named = step.op.kind in ("call_module", "get_attr")
            paths: Iterable[str] = (str(step.op.target),) if named else ()
        else:
            paths = parameter_paths(step.op) if isinstance(step.op, BatchNorm2d) else ()
        for path in paths:
            found.setdefault(path, f"m{len(found)}")
    return found
