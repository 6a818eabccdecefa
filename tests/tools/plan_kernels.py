"""The kernels that a network's default plan launches on a GPU that is not here, each compiled.

    python tests/tools/plan_kernels.py [--target sm_90] [--model resnet50] [--batch 1 32 256]
        [--dtype float16] [--size 224] [--backend auto] [--most 8] [--jobs 2] [--json]

The engine and the launchers run on fake tensors (tests/support/named_gpu.py). Launches that Triton
serves by one compiled kernel count once; a batch's seconds are the sum over its kernels, as a first
call compiles them one after the other. Each kernel is judged as in compile_gate.py. ``--most``
compiles only so many, spread over the plan. Exit status 1 when a kernel has a problem.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from math import ceil
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from compile_gate import Case, Verdict, compile_all
from named_gpu import CUDA, TARGETS, Launch, walk

import fastres
from fastres.kernels import _common

Kernels = dict[tuple[str, Hashable], Launch]  # by target and Triton's key


@dataclass
class Row:
    """One plan: how many launches, how many distinct kernels, what those cost to compile."""

    target: str
    model: str
    dtype: str
    batch: int
    launches: int
    kernels: int
    compiled: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def case_of(launch: Launch, number: int) -> Case:
    """The launch for the gate. What is due of single kernels is left to that one's own cases."""
    words = ("BLOCK", "num_", "COLUM")
    tile = " ".join(f"{k}={v}" for k, v in launch.meta.items() if k.startswith(words))
    again = partial(_common.launch, launch.kernel, launch.grid, CUDA, *launch.args, **launch.meta)
    return Case(launch.kernel.__name__, str(number), tile, launch.target.architecture, again)


def compiled(kernels: Kernels, jobs: int, most: int | None) -> dict[Hashable, Verdict]:
    """Each kernel's verdict, or those of ``most`` of them."""
    step = ceil(len(kernels) / most) if most else 1
    chosen = list(kernels)[::step]
    cases = [case_of(kernels[key], number) for number, key in enumerate(chosen)]
    return {chosen[int(v.what)]: v for v in compile_all(cases, jobs)}


def add(row: Row, verdicts: Mapping[Hashable, Verdict], keys: set[Hashable]) -> None:
    found = [verdicts[key] for key in keys if key in verdicts]
    row.compiled, row.seconds = len(found), sum(v.seconds for v in found)
    row.problems = [f"{v.kernel} {v.config}: {p}" for v in found for p in v.problems]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", choices=TARGETS, nargs="+", default=["sm_80", "sm_90"])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--dtype", nargs="+", default=["float16"])
    parser.add_argument("--size", type=int, default=224, help="of the images")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--most", type=int, help="compile only so many kernels; 0 is none")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    with torch.device("meta"):
        model = fastres.create_model(options.model).eval()
    rows, each = [], []
    kernels: Kernels = {}
    for target in options.target:
        for dtype in options.dtype:
            for batch in options.batch:
                shape = batch, 3, options.size, options.size
                kind = getattr(torch, dtype)
                launches, _ = walk(model, TARGETS[target], shape, kind, options.backend)
                found = {(target, launch.key()): launch for launch in launches}
                each.append(set(found))
                kernels |= found
                rows.append(Row(target, options.model, dtype, batch, len(launches), len(found)))
    verdicts = {} if options.most == 0 else compiled(kernels, options.jobs, options.most)
    for row, keys in zip(rows, each, strict=True):
        add(row, verdicts, keys)
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print(
            "| GPU | dtype | batch | launches | kernels | compiled | seconds |\n" + "|---" * 7 + "|"
        )
        for r in rows:
            cells = (r.target, r.dtype, r.batch, r.launches, r.kernels, r.compiled)
            print(f"| {' | '.join(map(str, cells))} | {r.seconds:.1f} |")
        for target in options.target:
            print(f"{target}: {sum(key[0] == target for key in kernels)} kernels in all")
        print(*(f"{r.target}: {p}" for r in rows for p in r.problems), sep="\n")
    return 1 if any(row.problems for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
