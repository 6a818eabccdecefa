"""Writes docs/models.md: every model of the zoo, measured in this run.

    python tests/models_page.py [--only NAME] [--resume] [--images 4] [--budget 20]

Finished rows are kept in out/models.json, where ``--resume`` finds them. Exit code 1 if a copy is
wrong, or slower than 0.95 of eager PyTorch.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from zoo import CASES, KERAS_CASES, Case, left_names

import fastres
from fastres.baselines import Plain
from fastres.environment import environment
from fastres.shell import FastShell
from fastres.timing import Method, Samples, measure
from fastres.verify import Verification

KEPT = Path(__file__).parents[1] / "out" / "models.json"
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
LEAST_SPEED = 0.95
ALL = (*CASES, *KERAS_CASES)
Cells = Sequence[str]
HEADER = ("model", "fused", "left to PyTorch", "error", "eager's", "top-1", "speed-up")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: Case
    fused: int
    left: str
    verification: Verification | None
    speedup: Samples
    failure: str

    def cells(self) -> tuple[str, ...]:
        found = self.verification
        if found is None:
            error = own = top1 = ""
        else:
            error = f"{found.rms / found.scale:.1e}"
            own = "" if found.reference_rms is None else f"{found.reference_rms / found.scale:.1e}"
            top1 = "" if found.agreement is None else f"{found.agreement:.0%}"
        speed = self.failure or f"{self.speedup.median:.2f}x"
        return (self.case.name, str(self.fused), self.left, error, own, top1, speed)


def left_text(fast) -> str:
    """What a plan leaves to PyTorch, most frequent first."""
    counts = left_names(fast.plan()).most_common()
    return ", ".join(f"{count} {name}" for name, count in counts)


def row(case: Case, images: int, method: Method) -> Row:
    """Optimize one model, check it and time it against its source, turn by turn."""
    source = case.model()
    eager = Plain(source) if isinstance(source, fastres.ResNet) else source
    arguments = case.inputs(images, case.size if case.fixed or case.size < 64 else 224)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a detector's boxes may change places: see the page
        fast = fastres.optimize(source, example_input=arguments)

    def check(name: str, index: int, output: object) -> str | None:
        return wrong(case, expected, output)

    with torch.inference_mode():
        expected = eager(*arguments)
        found = measure(
            {"eager": lambda x: eager(*x), "fused": lambda x: fast(*x)},
            [arguments],
            check=check,
            method=method,
        )
    return Row(
        case,
        len(fast.plan().fused),
        left_text(fast),
        verification(fast),
        found.speedup("fused"),
        found.failures.get("fused", ""),
    )


def verification(fast) -> Verification | None:
    """The model's own; of a shell, that of the part with the largest error."""
    if not isinstance(fast, FastShell):
        return fast.verification
    found = [part.verification for part in fast.parts.values() if part.verification]
    whole = fast.verification
    worst = max(found, key=lambda v: v.rms / v.scale)
    return whole if whole is not None and whole.ok and whole.rms / whole.scale > 0 else worst


def wrong(case: Case, expected: object, output: object) -> str | None:
    """Of detectors only the form: boxes whose scores tie may come in another order."""
    (wanted, form), (got, other) = tree_flatten(expected), tree_flatten(output)
    if form != other:
        return "another form"
    if "rcnn" in case.name or "retina" in case.name:
        return None
    for a, b in zip(wanted, got, strict=True):
        if isinstance(a, Tensor) and float((a - b).norm()) > 1e-4 * float(a.norm()):
            return "wrong"
    return None


def page(rows: Mapping[str, Cells], images: int) -> str:
    """The whole file."""
    machine = environment()
    lines = [
        "# Models",
        "",
        "Written by `python tests/models_page.py`. Each model has hostile weights (negative and",
        "zero gammas, spread variances, another eps in each layer) and real photographs as input;",
        "`tests/test_models_zoo.py` compares the same models in float64.",
        "",
        "- **fused**: steps that fastres runs; **left to PyTorch**: calls that stay PyTorch's.",
        "- **error**: root mean square against float64, over that of the outputs, in float32;",
        "  **eager's**: the same for PyTorch. For models that cannot be traced whole, the fused",
        "  part with the largest error, or the whole against PyTorch.",
        "- **top-1**: share of images with the same most probable class.",
        f"- **speed-up**: median over eager PyTorch, both timed in turns in one run, {images}",
        "  images at 224x224 (detectors, small networks: at the size of the tests).",
        "",
        f"{machine.cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}.",
        "Ratios within some 5 % of each other are the same: eager against itself differs as much.",
    ]
    for family in dict.fromkeys(case.family for case in ALL):
        lines += [
            "",
            f"## {family}",
            "",
            _line(HEADER),
            _line(["---"] * 2 + ["---"] + ["---:"] * 4),
        ]
        lines += [_line(rows[str(c)]) for c in ALL if c.family == family]
    return "\n".join([*lines, ""])


def _line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models whose name contains this; no file")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds per model")
    parser.add_argument("--resume", action="store_true", help="go on where the last run stopped")
    options = parser.parse_args()
    method = Method(rounds=15, budget=options.budget, sample=0.2, warmup=0.5)
    rows: dict[str, Cells] = json.loads(KEPT.read_text()) if options.resume else {}
    for case in ALL:
        if options.only in str(case) and str(case) not in rows:
            rows[str(case)] = row(case, options.images, method).cells()
            print(f"{case}: {' | '.join(rows[str(case)][1:])}", flush=True)
            KEPT.parent.mkdir(exist_ok=True)
            KEPT.write_text(json.dumps(rows, indent=1))
    if not options.only:
        PAGE.write_text(page(rows, options.images))
    bad = [name for name, cells in rows.items() if not fast_enough(cells[-1])]
    print(f"not ok: {', '.join(bad)}" if bad else "all ok", file=sys.stderr)
    return 1 if bad else 0


def fast_enough(speed: str) -> bool:
    """Whether the last cell is a speed, not a failure, and no loss beyond noise."""
    return speed.endswith("x") and float(speed[:-1]) >= LEAST_SPEED


if __name__ == "__main__":
    sys.exit(main())
