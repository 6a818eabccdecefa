"""What a profiler would count, for the default kernels of ResNet-50 at their real tile sizes.

A few blocks of each launch run; the figures are ratios, which the others share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import b2b_gemm, conv, gemm, global_pool, head, stem, whole
from .driver import running


@dataclass(frozen=True)
class Counts:
    step: str
    kernel: str
    load: float  # sectors of 32 bytes read, of those that the bytes asked for fill
    store: float
    banks: float  # wavefronts of a request to shared memory, of those that it needs
    others: float  # instructions beside each matrix instruction
    wavefronts: int  # of a block
    moved: float  # MiB that the whole launch asks L2 for, in sectors and boxes
    least: float  # MiB of the step's own tensors


Step = Callable[[], tuple[Callable[..., Tensor], tuple[Tensor, ...], dict[str, Any]]]


def convolution(channels: int, outputs: int, window: int, size: int, stride: int = 1) -> Step:
    """A convolution of ResNet-50 at batch 1."""

    def make():
        x, w = whole(1, channels, size, size), whole(outputs, channels, window, window)
        given = {"stride": stride, "padding": window // 2, "relu": True}
        return conv.conv2d, (x, w, whole(outputs, dtype=torch.float32)), given

    return make


def product(rows: int, channels: int, outputs: int):
    x, w, b = whole(rows, channels), whole(outputs, channels), whole(outputs, dtype=torch.float32)
    return gemm.gemm, (x, w, b), {"residual": whole(rows, outputs), "relu": True}


def seam(rows: int, channels: int):
    t, x, wide = whole(rows, channels), whole(rows, 4 * channels), 4 * channels
    b3, b1 = whole(wide, dtype=torch.float32), whole(channels, dtype=torch.float32)
    return b2b_gemm.b2b_gemm, (t, whole(wide, channels), b3, x, whole(channels, wide), b1), {}


STEPS: dict[str, Step] = {
    "stem": lambda: (stem.stem, (whole(1, 3, 224, 224), whole(64, 3, 7, 7), None), {}),
    "stage 1 3x3": convolution(64, 64, 3, 56),
    "stage 1 expand": convolution(64, 256, 1, 56),
    "stage 2 reduce": convolution(512, 128, 1, 28),
    "stage 2 3x3": convolution(128, 128, 3, 28),
    "stage 3 3x3": convolution(256, 256, 3, 14),
    "stage 3 expand": convolution(256, 1024, 1, 14),
    "stage 4 project": convolution(1024, 2048, 1, 14, 2),
    "stage 4 3x3": convolution(512, 512, 3, 7),
    "average pool": lambda: (global_pool.global_avg_pool, (whole(1, 2048, 7, 7),), {}),
    "head": lambda: (head.head, (whole(1, 2048, 7, 7), whole(1000, 2048), None), {}),
}
COPIED: dict[str, Step] = {
    "stage 2 expand, copied": lambda: product(784, 128, 512),
    "stage 1 seam, b2b_gemm": lambda: seam(3136, 64),
}
COLUMNS = "sectors read | written | wavefronts | a block | others | MiB moved | least | ratio"


def counted(step: str, target: str, blocks: int = 8) -> Counts:
    """The counters of a step, of which at most so many ``blocks`` run."""
    call, tensors, given = (STEPS | COPIED)[step]()
    p: Counter[str] = Counter()
    with running(target, profile=p, blocks=blocks) as gpu:
        out = call(*tensors, **given)
    results = out if isinstance(out, tuple) else (out,)
    own = [t for t in (*tensors, *given.values(), *results) if isinstance(t, Tensor)]
    units = sum(n for op, n in gpu.executed.items() if op.startswith(("mma.", "wgmma.mma")))
    units = units or sum(n for op, n in gpu.executed.items() if op.startswith("fma."))
    ratio = lambda a, b: a / b if b else 0.0  # noqa: E731
    return Counts(
        step,
        "+".join(gpu.launches),
        ratio(p["load sectors"] * 32, p["load bytes"]),
        ratio(p["store sectors"] * 32, p["store bytes"]),
        ratio(p["shared wavefronts"], p["shared ideal"]),
        ratio(gpu.executed.total() - units, units),
        p["shared wavefronts"] // gpu.blocks_run,
        gpu.moved / 2**20,
        sum(t.numel() * t.element_size() for t in own) / 2**20,
    )


def table(target: str) -> str:
    lines = [
        f"| step ({target}, batch 1, float16) | kernel | {COLUMNS} |",
        "|---|---" + "|---:" * 8 + "|",
    ]
    for step in STEPS | (COPIED if target != "sm_80" else {}):
        row = counted(step, target)
        lines.append(
            f"| {row.step} | `{row.kernel}` | {row.load:.2f} | {row.store:.2f} | {row.banks:.2f} "
            f"| {row.wavefronts} | {row.others:.1f} | {row.moved:.2f} | {row.least:.2f} "
            f"| {row.moved / row.least:.1f} |"
        )
    return "\n".join(lines)
