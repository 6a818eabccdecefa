"""Which consecutive steps one kernel may serve together.

A rule looks at the steps from one position on and says how many of them its kernel takes. What a
group means is exactly its steps run in order, so any backend may run them one by one instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .ir import Conv2d, Flatten, GlobalAvgPool, Linear, MaxPool2d, refs
from .plan import Plan, Step

Rule = Callable[[Sequence[Step], dict[str, int]], int]


@dataclass(frozen=True)
class Group:
    """Consecutive steps that one kernel serves; ``kernel`` is empty for a step by itself.

    Attributes:
        inputs: values from outside that the steps read, in order of first use.
        outputs: values of the steps that are read outside of the group.
    """

    kernel: str
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def arrange(
    plan: Plan, rules: Iterable[str], takes: Callable[[Group], bool] | None = None
) -> tuple[Group, ...]:
    """The plan's steps in order, joined greedily by the named rules, the first that fits first.

    Args:
        plan: what runs.
        rules: names out of :data:`RULES`, by preference.
        takes: may refuse a group, whose steps then stay by themselves; by default all are taken.
    """
    chosen = [(name, RULES[name]) for name in rules]
    readers = count_readers(plan)
    groups: list[Group] = []
    position = 0
    while position < len(plan.steps):
        ahead = plan.steps[position:]
        lengths = ((name, rule(ahead, readers)) for name, rule in chosen)
        found = (_group(name, ahead[:length], readers) for name, length in lengths if length)
        single = _group("", ahead[:1], readers)
        group = next((g for g in found if takes is None or takes(g)), single)
        groups.append(group)
        position += len(group.steps)
    return tuple(groups)


def singly(steps: Iterable[Step]) -> tuple[Group, ...]:
    """Each step by itself."""
    return tuple(Group("", (step,), step.inputs, (step.name,)) for step in steps)


def count_readers(plan: Plan) -> dict[str, int]:
    """How many steps, and the output as one more, read each value."""
    counts: dict[str, int] = {}
    for step in plan.steps:
        for name in set(step.inputs):
            counts[name] = counts.get(name, 0) + 1
    for name in set(refs(plan.output)):
        counts[name] = counts.get(name, 0) + 1
    return counts


def _group(kernel: str, steps: tuple[Step, ...], readers: dict[str, int]) -> Group:
    made = {step.name for step in steps}
    read = [name for step in steps for name in step.inputs]
    inside = {name: sum(name in step.inputs for step in steps) for name in made}
    return Group(
        kernel,
        steps,
        inputs=tuple(dict.fromkeys(name for name in read if name not in made)),
        outputs=tuple(s.name for s in steps if readers.get(s.name, 0) > inside[s.name]),
    )


def _stem_pool(steps: Sequence[Step], readers: dict[str, int]) -> int:
    """A convolution with ReLU and the max pool that is its only reader."""
    if len(steps) < 2 or not _is_conv(steps[0], relu=True) or _adds(steps[0]):
        return 0
    pool = steps[1]
    chained = isinstance(pool.op, MaxPool2d) and pool.inputs == (steps[0].name,)
    return 2 if chained and readers[steps[0].name] == 1 else 0


def _pool_linear(steps: Sequence[Step], readers: dict[str, int]) -> int:
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
    return _expand_project(steps, readers)


def _expand_project(steps: Sequence[Step], readers: dict[str, int]) -> int:
    """The last 1x1 of a block and the projection that adds to it: one product of two sources."""
    if len(steps) < 2 or not _is_conv(steps[0], kernel=1, stride=1, relu=False) or _adds(steps[0]):
        return 0
    project = steps[1]
    takes = _is_conv(project, kernel=1, relu=True) and _adds(project)
    summed = takes and project.inputs[1] == steps[0].name and readers[steps[0].name] == 1
    return 2 if summed else 0


def _expand_reduce(steps: Sequence[Step], readers: dict[str, int]) -> int:
    """The end of a bottleneck and the next one's first 1x1, which reads it."""
    end = _expand(steps, readers)
    if not end or len(steps) <= end:
        return 0
    reduce = steps[end]
    reads = reduce.inputs == (steps[end - 1].name,)
    return end + 1 if reads and _is_conv(reduce, kernel=1, stride=1, relu=True) else 0


def _shifted_block(steps: Sequence[Step], readers: dict[str, int]) -> int:
    """A bottleneck's 3x3, its end, and the next one's first 1x1 where there is one."""
    if not steps or not _is_conv(steps[0], kernel=3, relu=True) or _adds(steps[0]):
        return 0
    rest = steps[1:]
    end = _expand_reduce(rest, readers) or _expand(rest, readers)
    chained = bool(end) and rest[0].inputs[0] == steps[0].name and readers[steps[0].name] == 1
    return 1 + end if chained else 0


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


RULES: dict[str, Rule] = {
    "stem_pool": _stem_pool,
    "pool_linear": _pool_linear,
    "expand_project": _expand_project,
    "expand_reduce": _expand_reduce,
    "shifted_block": _shifted_block,
}
