"""Which consecutive steps one kernel may serve, alone or together, and what the choice may rest on.

A pattern looks at the steps from one position on and says how many of them its kernel takes. What a
group means is exactly its steps run in order, so any backend may run them one by one instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace

from .ir import Conv2d, Flatten, GlobalAvgPool, Linear, MaxPool2d, Operation, ReLU, refs
from .plan import Plan, Shape, Step

Pattern = Callable[[Sequence[Step], dict[str, int]], int]
Shapes = Mapping[str, Shape | None]


@dataclass(frozen=True)
class FusionGroup:
    """Consecutive steps that one kernel serves; ``kernel`` is empty for a step by itself.

    Attributes:
        inputs: values from outside that the steps read, in order of first use.
        outputs: values of the steps that are read outside of the group.
    """

    kernel: str
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Grouping:
    """A plan's steps in groups.

    Attributes:
        why: for each group, the reason for its kernel; empty where there was no choice.
    """

    groups: tuple[FusionGroup, ...]
    why: tuple[str, ...] = ()


@dataclass(frozen=True)
class Workload:
    """A group's work without its weights: what the choice of its kernel may rest on.

    Attributes:
        work: each step's geometry and sizes, the batch left out.
        batch: images.
        pixels: pixels of the first step's result, over all images.
        width: channels that the first step reads.
        math_mode: ``"half"``, ``"tf32"`` or ``"ieee"``.
    """

    work: tuple[str, ...]
    batch: int
    pixels: int
    width: int
    math_mode: str

    @property
    def key(self) -> str:
        """Names the work, whatever the batch."""
        return f"{'; '.join(self.work)} ({self.math_mode})"


def workload_of(group: FusionGroup, shapes: Shapes, math_mode: str) -> Workload | None:
    """The workload that a group is for values of these shapes; None where they are not known."""
    first = group.steps[0]
    source, result = _ends(first, shapes)
    work = [_work(step, shapes) for step in group.steps]
    if not source or not result or not all(work):
        return None
    pixels = result[0] * (result[2] * result[3] if len(result) == 4 else 1)
    return Workload(tuple(work), source[0], pixels, source[1], math_mode)


def _ends(step: Step, shapes: Shapes) -> tuple[Shape | None, Shape | None]:
    """What goes in first and what comes out; nothing goes into a step that reads a weight alone."""
    source = shapes.get(step.inputs[0]) if step.inputs else None
    return source, shapes.get(step.name)


def _work(step: Step, shapes: Shapes) -> str:
    """``Conv2d 64>256 k1x1 s1x1 ...``, with the sizes of what goes in and comes out."""
    source, result = _ends(step, shapes)
    others = [shapes.get(name) for name in step.inputs[1:]]
    if not source or not result or not all(others):
        return ""
    sizes = "x".join(map(str, source[1:])) + ">" + "x".join(map(str, result[1:]))
    return f"{_geometry(step.op)} {sizes}"


def _geometry(op: Operation) -> str:
    if not isinstance(op, Conv2d):
        settings = [str(v) for v in astuple(op) if isinstance(v, (int, tuple))]
        return " ".join([type(op).__name__, *settings])
    window = " ".join(
        f"{name}{pair[0]}x{pair[1]}"
        for name, pair in (("k", op.kernel), ("s", op.stride), ("p", op.padding))
    )
    more = f" d{op.dilation[0]}x{op.dilation[1]} g{op.groups}"
    ends = " residual" * op.residual + " relu" * op.relu
    return f"Conv2d {window}{'' if more == ' d1x1 g1' else more}{ends}"


def group_steps(
    plan: Plan,
    patterns: Mapping[str, Pattern],
    choose: Callable[[FusionGroup], str | None] | None = None,
    why_alone: Callable[[FusionGroup], str] | None = None,
) -> Grouping:
    """The plan's steps in order, joined greedily by the patterns, the first that fits first.

    Args:
        plan: what runs.
        patterns: by the name of their kernel, in order of preference.
        choose: the reason for a group's kernel, or None, and its steps stay by themselves; by
            default all groups are taken.
        why_alone: the reason why a step stays by itself.
    """
    readers = count_readers(plan)
    found: list[tuple[FusionGroup, str]] = []
    position = 0
    while position < len(plan.steps):
        ahead = plan.steps[position:]
        tried = (
            (group, choose(group) if choose else "")
            for group in _groups_at(ahead, patterns, readers)
        )
        single = _group("", ahead[:1], readers)
        taken = next(((g, why) for g, why in tried if why is not None), None)
        group, why = taken or (single, why_alone(single) if why_alone else "")
        found.append((group, why))
        position += len(group.steps)
    return Grouping(tuple(g for g, _ in found), tuple(why for _, why in found))


def candidates(
    plan: Plan, patterns: Mapping[str, Pattern], takes: Callable[[FusionGroup], bool]
) -> tuple[FusionGroup, ...]:
    """Every group of the plan that a pattern finds and ``takes`` admits, overlapping ones too."""
    readers = count_readers(plan)
    found = (_groups_at(plan.steps[i:], patterns, readers) for i in range(len(plan.steps)))
    return tuple(group for groups in found for group in groups if takes(group))


def _groups_at(
    ahead: tuple[Step, ...], patterns: Mapping[str, Pattern], readers: dict[str, int]
) -> Iterator[FusionGroup]:
    """The groups that begin with the first of these steps."""
    for name, pattern in patterns.items():
        if length := pattern(ahead, readers):
            yield _group(name, ahead[:length], readers)


def ungrouped(steps: Iterable[Step]) -> tuple[FusionGroup, ...]:
    """Each step by itself."""
    return tuple(FusionGroup("", (step,), step.inputs, (step.name,)) for step in steps)


def count_readers(plan: Plan) -> dict[str, int]:
    """How many steps, and the output as one more, read each value."""
    counts: dict[str, int] = {}
    for step in plan.steps:
        for name in set(step.inputs):
            counts[name] = counts.get(name, 0) + 1
    for name in set(refs(plan.output)):
        counts[name] = counts.get(name, 0) + 1
    return counts


def _group(kernel: str, steps: tuple[Step, ...], readers: dict[str, int]) -> FusionGroup:
    made = {step.name for step in steps}
    read = [name for step in steps for name in step.inputs]
    inside = {name: sum(name in step.inputs for step in steps) for name in made}
    return FusionGroup(
        kernel,
        steps,
        inputs=tuple(dict.fromkeys(name for name in read if name not in made)),
        outputs=tuple(s.name for s in steps if readers.get(s.name, 0) > inside[s.name]),
    )


def stem_pool(steps: Sequence[Step], readers: dict[str, int]) -> int:
    """A convolution with ReLU and the max pool that is its only reader."""
    if len(steps) < 2 or not _is_conv(steps[0], relu=True) or _adds(steps[0]):
        return 0
    pool = steps[1]
    chained = isinstance(pool.op, MaxPool2d) and pool.inputs == (steps[0].name,)
    return 2 if chained and readers[steps[0].name] == 1 else 0


def pool_linear(steps: Sequence[Step], readers: dict[str, int]) -> int:
    """Global average pool, flatten, classifier."""
    kinds = (GlobalAvgPool, Flatten, Linear)
    head = steps[:3]
    if len(head) < 3 or not all(isinstance(s.op, k) for s, k in zip(head, kinds, strict=True)):
        return 0
    pool, flatten, linear = head
    chained = flatten.inputs == (pool.name,) and linear.inputs == (flatten.name,)
    return 3 if chained and readers[pool.name] == readers[flatten.name] == 1 else 0


def _expand(steps: Sequence[Step], readers: dict[str, int]) -> int:
    """The end of a bottleneck: its last 1x1 with the residual, or with the projection of it."""
    if not steps or not _is_conv(steps[0], kernel=1, stride=1):
        return 0
    if _is_conv(steps[0], relu=True) and _adds(steps[0]):
        return 1
    return expand_project(steps, readers)


def expand_project(steps: Sequence[Step], readers: dict[str, int]) -> int:
    """The last 1x1 of a block and the projection that adds to it: one product of two sources."""
    if len(steps) < 2 or not _is_conv(steps[0], kernel=1, stride=1, relu=False) or _adds(steps[0]):
        return 0
    project = steps[1]
    takes = _is_conv(project, kernel=1, relu=True) and _adds(project)
    summed = takes and project.inputs[1] == steps[0].name and readers[steps[0].name] == 1
    return 2 if summed else 0


def expand_reduce(steps: Sequence[Step], readers: dict[str, int]) -> int:
    """The end of a bottleneck and the next one's first 1x1, which reads it."""
    end = _expand(steps, readers)
    if not end or len(steps) <= end:
        return 0
    reduce = steps[end]
    reads = reduce.inputs == (steps[end - 1].name,)
    return end + 1 if reads and _is_conv(reduce, kernel=1, stride=1, relu=True) else 0


def bottleneck_tail(steps: Sequence[Step], readers: dict[str, int]) -> int:
    """A bottleneck's 3x3, its end, and the next one's first 1x1 where there is one."""
    if not steps or not _is_conv(steps[0], kernel=3, relu=True) or _adds(steps[0]):
        return 0
    rest = steps[1:]
    end = expand_reduce(rest, readers) or _expand(rest, readers)
    chained = bool(end) and rest[0].inputs[0] == steps[0].name and readers[steps[0].name] == 1
    return 1 + end if chained else 0


def flat(steps: Sequence[Step], readers: dict[str, int]) -> int:
    """A 1x1 convolution that keeps all pixels: a matrix product of rows."""
    return int(bool(steps) and _is_conv(steps[0], kernel=1, stride=1))


def convolution(steps: Sequence[Step], readers: dict[str, int]) -> int:
    """Any convolution by itself."""
    return int(bool(steps) and isinstance(steps[0].op, Conv2d))


def _is_conv(
    step: Step, *, kernel: int | None = None, stride: int | None = None, relu: bool | None = None
) -> bool:
    op = step.op
    if not isinstance(op, Conv2d) or op.groups != 1:
        return False
    sizes_fit = kernel is None or (op.kernel == (kernel, kernel))
    pads = (0, 0) if kernel == 1 else op.padding
    strides_fit = stride is None or op.stride == (stride, stride)
    return sizes_fit and strides_fit and op.padding == pads and relu in (None, op.relu)


def _adds(step: Step) -> bool:
    return isinstance(step.op, Conv2d) and step.op.residual


def relu_apart(steps: Sequence[Step]) -> Iterator[Step]:
    """Each convolution with ReLU as two steps, the second in place; bytes know no NaN to keep."""
    for step in steps:
        if isinstance(step.op, Conv2d) and step.op.relu and step.op.x_grid is None:
            yield replace(step, op=replace(step.op, relu=False), frees=())
            yield replace(step, op=ReLU(), inputs=(step.name,), in_place=True)
        else:
            yield step
