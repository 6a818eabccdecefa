"""Writes docs/models.md: every model of the zoo, measured in this run.

    python tests/tools/models_page.py [--only NAME] [--resume] [--images 4] [--budget 20]

Finished rows are kept in out/models.json, where ``--resume`` finds them. Exit code 1 if a copy is
wrong, or slower than 0.95 of eager PyTorch.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from zoo import CASES, KERAS_CASES, Case, left_names

import fastres
from fastres.bench.baselines import Plain
from fastres.perf.environment import environment
from fastres.perf.timing import Method, Samples, measure
from fastres.runtime.verify import Verification

KEPT = Path(__file__).parents[2] / "out" / "models.json"
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
LEAST_SPEED = 0.95
ALL = (*CASES, *KERAS_CASES)
HEADER = ("model", "fused", "left to PyTorch", "error", "eager's", "top-1", "speed-up")


@dataclass(frozen=True)
class Row:
    """One line of the table: its first cells, and one ratio to eager PyTorch per round.

    ``noise`` are the ratios of eager PyTorch to itself in the same rounds.
    """

    cells: tuple[str, ...]
    speedup: Samples
    noise: Samples
    failure: str

    @staticmethod
    def read(saved: dict[str, Any]) -> Row:
        """The row that ``asdict`` wrote."""
        samples = {name: Samples(tuple(saved[name]["values"])) for name in ("speedup", "noise")}
        return Row(tuple(saved["cells"]), failure=saved["failure"], **samples)

    @property
    def ok(self) -> bool:
        """Whether the output was right, and no slower than noise explains."""
        return not self.failure and self.speedup.median >= LEAST_SPEED

    def line(self) -> str:
        found = self.speedup
        speed = f"{found.median:.2f}x ({found.p20:.2f} to {found.p80:.2f})" if found else ""
        return _line([*self.cells, self.failure or speed])


def errors(found: Verification | None) -> tuple[str, str, str]:
    """The error against float64, eager's own, and the share of equal classes; empty if unknown."""
    if found is None:
        return "", "", ""
    own = "" if found.reference_rms is None else f"{found.reference_rms / found.scale:.1e}"
    top1 = "" if found.agreement is None else f"{found.agreement:.0%}"
    return f"{found.rms / found.scale:.1e}", own, top1


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
        (case.name, str(len(fast.plan().fused)), left_text(fast), *errors(fast.verification)),
        found.speedup("fused"),
        found.noise,
        found.failures.get("fused", ""),
    )


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


def page(rows: Mapping[str, Row], images: int) -> str:
    """The whole file."""
    cpu = environment().cpu["name"]
    lines = [
        "# Models",
        "",
        "Written by `python tests/tools/models_page.py`. Each model has adversarial weights",
        "(negative and zero gammas, spread variances, another eps in each layer) and photographs.",
        "A model is timed only if its outputs are PyTorch's within 1e-4 before and after; of",
        "detectors, whose boxes may change places, this run compares the form alone.",
        "`tests/frontends/test_models_zoo.py` compares all of them, boxes included, in float64.",
        "",
        "- **fused**: steps that fastres runs; **left to PyTorch**: calls that stay PyTorch's.",
        "- **error**: root mean square against float64, over that of the outputs, in float32;",
        "  **eager's**: the same for PyTorch. For models that cannot be traced whole, the fused",
        "  part with the largest error.",
        "- **top-1**: share of images with the same most probable class.",
        "- **speed-up**: median (20th to 80th percentile) of the ratio to eager PyTorch, timed",
        f"  turn by turn; {images} images at 224x224 (detectors, small networks: at the size of",
        "  the tests).",
        "",
        f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}.",
        f"Noise, the same ratio of eager PyTorch to itself: {noise(rows.values())}.",
    ]
    for family in dict.fromkeys(case.family for case in ALL):
        lines += [
            "",
            f"## {family}",
            "",
            _line(HEADER),
            _line(["---"] * 2 + ["---"] + ["---:"] * 4),
        ]
        lines += [rows[str(c)].line() for c in ALL if c.family == family]
    return "\n".join([*lines, ""])


def noise(rows: Iterable[Row]) -> str:
    """The least and the greatest median among the rows."""
    medians = [row.noise.median for row in rows if row.noise]
    return f"{min(medians):.2f}x to {max(medians):.2f}x" if medians else "not measured"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def kept() -> dict[str, Row]:
    """The rows of the run before."""
    saved = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    return {name: Row.read(fields) for name, fields in saved.items()}


def keep(rows: Mapping[str, Row]) -> None:
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps({name: asdict(row) for name, row in rows.items()}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models whose name contains this; no file")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds per model")
    parser.add_argument("--resume", action="store_true", help="go on where the last run stopped")
    options = parser.parse_args()
    method = Method(rounds=15, budget=options.budget, sample=0.2, warmup=0.5)
    rows = kept() if options.resume else {}
    for case in ALL:
        if options.only in str(case) and str(case) not in rows:
            rows[str(case)] = row(case, options.images, method)
            print(rows[str(case)].line(), flush=True)
            keep(rows)
    if not options.only:
        PAGE.write_text(page(rows, options.images))
    bad = [name for name, found in rows.items() if not found.ok]
    print(f"not ok: {', '.join(bad)}" if bad else "all ok", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
