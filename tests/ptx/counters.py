"""What a profiler would count, for the default kernels of ResNet-50 at their real tile sizes.

A few blocks of each launch run; the figures are ratios, which the others share.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

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
    kibibytes: float  # that a block's threads ask global memory for


def conv_step(channels: int, outputs: int, window: int, size: int, stride: int = 1):
    """A convolution of ResNet-50 at batch 1."""
    x = whole(1, channels, size, size)
    w, b = whole(outputs, channels, window, window), whole(outputs, dtype=torch.float32)
    return lambda: conv.conv2d(x, w, b, stride=stride, padding=window // 2, relu=True)


def gemm_step(rows: int, channels: int, outputs: int):
    x, w = whole(rows, channels), whole(outputs, channels)
    residual, b = whole(rows, outputs), whole(outputs, dtype=torch.float32)
    return lambda: gemm.gemm(x, w, b, residual=residual, relu=True)


def b2b_gemm_step(rows: int, channels: int):
    t, w3, x = whole(rows, channels), whole(4 * channels, channels), whole(rows, 4 * channels)
    w1, b3 = whole(channels, 4 * channels), whole(4 * channels, dtype=torch.float32)
    return lambda: b2b_gemm.b2b_gemm(t, w3, b3, x, w1, whole(channels, dtype=torch.float32))


STEPS = {
    "stem": lambda: stem.stem(whole(1, 3, 224, 224), whole(64, 3, 7, 7), None),
    "stage 1 3x3": conv_step(64, 64, 3, 56),
    "stage 1 expand": conv_step(64, 256, 1, 56),
    "stage 2 reduce": conv_step(512, 128, 1, 28),
    "stage 2 3x3": conv_step(128, 128, 3, 28),
    "stage 3 3x3": conv_step(256, 256, 3, 14),
    "stage 3 expand": conv_step(256, 1024, 1, 14),
    "stage 4 project": conv_step(1024, 2048, 1, 14, 2),
    "stage 4 3x3": conv_step(512, 512, 3, 7),
    "average pool": lambda: global_pool.global_avg_pool(whole(1, 2048, 7, 7)),
    "head": lambda: head.head(whole(1, 2048, 7, 7), whole(1000, 2048), None),
}
COPIED = {
    "stage 2 expand, copied": gemm_step(784, 128, 512),
    "stage 1 seam, b2b_gemm": b2b_gemm_step(3136, 64),
}


def counted(target: str, blocks: int = 2) -> list[Counts]:
    """The counters of each step."""
    rows = []
    for step, call in (STEPS | (COPIED if target != "sm_80" else {})).items():
        profile: Counter[str] = Counter()
        with running(target, profile=profile, blocks=blocks) as gpu:
            call()
        p, ran = profile, gpu.executed
        units = sum(n for op, n in ran.items() if op.startswith(("mma.", "wgmma.mma")))
        vector = sum(n for op, n in ran.items() if op.startswith("fma."))
        ratio = lambda a, b: a / b if b else 0.0  # noqa: E731
        rows.append(
            Counts(
                step,
                "+".join(gpu.launches),
                ratio(p["load sectors"] * 32, p["load bytes"]),
                ratio(p["store sectors"] * 32, p["store bytes"]),
                ratio(p["shared wavefronts"], p["shared ideal"]),
                ratio(sum(ran.values()) - (units or vector), units or vector),
                p["load bytes"] / blocks / 1024,
            )
        )
    return rows


def table(target: str) -> str:
    lines = [
        f"| step ({target}, batch 1, float16) | kernel | sectors read | written | wavefronts "
        "| others | KiB a block |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in counted(target):
        lines.append(
            f"| {row.step} | `{row.kernel}` | {row.load:.2f} | {row.store:.2f} | {row.banks:.2f} "
            f"| {row.others:.1f} | {row.kibibytes:.0f} |"
        )
    return "\n".join(lines)
