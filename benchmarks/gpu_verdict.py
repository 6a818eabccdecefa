"""The figures that a GPU must show, and the best row per kernel and shape, out of a run's records.

A figure that was not measured says so; nothing here measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

from fastres import create_model
from fastres.perf.roofline import Ceilings, roofline

Records = dict[tuple[str, str], dict[str, Any]]
OURS = "fastres fp16 triton"
CUDNN = "cuDNN fused fp16"
EAGER = "eager fp16 channels_last"
AUTOTUNE = "max-autotune fp16"


@dataclass(frozen=True)
class Figure:
    """One line of the table; ``less`` is better for times, memory and losses."""

    what: str
    least: float
    goal: float
    form: str
    value: Callable[[Records], float | None]
    less: bool = False

    def row(self, records: Records) -> tuple[str, ...]:
        got = self.value(records)
        if got is None:
            return (self.what, self._show(self.least), self._show(self.goal), "not measured", "-")
        good = [got <= bar if self.less else got >= bar for bar in (self.goal, self.least)]
        met = "goal" if good[0] else "at least" if good[1] else "no"
        return (self.what, self._show(self.least), self._show(self.goal), self._show(got), met)

    def _show(self, value: float) -> str:
        return self.form.format(value)


def _case(records: Records, section: str, name: str) -> dict[str, Any] | None:
    return records.get((section, name))


def _values(case: dict[str, Any] | None, contender: str) -> list[float] | None:
    """Seconds per call, one per round."""
    for timing in (case or {}).get("timings", ()):
        if timing["name"] == contender and timing["seconds"]:
            return timing["seconds"]["values"]
    return None


def _rate(section: str, name: str, batch: int) -> Callable[[Records], float | None]:
    def value(records: Records) -> float | None:
        seconds = _values(_case(records, section, name), OURS)
        return batch / median(seconds) if seconds else None

    return value


def _speedup(section: str, name: str, over: str) -> Callable[[Records], float | None]:
    """How many times faster, the median over the rounds."""

    def value(records: Records) -> float | None:
        case = _case(records, section, name)
        fast, slow = _values(case, OURS), _values(case, over)
        if not (fast and slow):
            return None
        return median(b / a for a, b in zip(fast, slow, strict=False))

    return value


def _probe(name: str, key: str, section: str = "baselines") -> Callable[[Records], float | None]:
    """Milliseconds of a single call."""

    def value(records: Records) -> float | None:
        found = (_case(records, section, name) or {}).get("probes", {}).get(OURS, {}).get(key)
        return None if found is None else found * 1e3

    return value


@cache
def _floor(model: str, fusion: str, ceilings: Ceilings) -> float:
    shape = (256, 3, 224, 224)
    found = roofline(create_model(model).eval(), shape, fusion=fusion, ceilings=ceilings)
    return found.images_per_second


def _share(model: str, fusion: str) -> Callable[[Records], float | None]:
    """Of the floor on this machine's own ceilings."""

    def value(records: Records) -> float | None:
        ceilings = _case(records, "ceilings", "copy and product")
        rate = _rate("family", f"{model} batch 256", 256)(records)
        if ceilings is None or rate is None:
            return None
        limits = ceilings["bytes_per_second"], ceilings["flop_per_second"]
        return rate / _floor(model, fusion, Ceilings("measured", *limits))

    return value


def _of(section: str, name: str, *path: str) -> Callable[[Records], float | None]:
    def value(records: Records) -> float | None:
        found: Any = _case(records, section, name)
        for key in path:
            found = None if found is None else found.get(key)
        return found

    return value


def _cold(caches: str) -> Callable[[Records], float | None]:
    def value(records: Records) -> float | None:
        starts = (_case(records, "cold", "resnet50 batch 1") or {}).get("starts", ())
        for start in starts:
            if (start["contender"], start["caches"]) == ("fastres", caches):
                return start["seconds"]
        return None

    return value


def _gemm_worst(records: Records) -> float | None:
    """The best row over cuBLAS, at the shape where that is worst."""
    ratios = [
        data["cold"]["seconds"]["cuBLAS"] / min(_ours(data["cold"]["seconds"]).values())
        for (section, name), data in records.items()
        if section == "gemm" and name.endswith("bare") and _complete(data)
    ]
    return min(ratios) if ratios else None


def _complete(data: dict[str, Any]) -> bool:
    seconds = data.get("cold", {}).get("seconds", {})
    return "cuBLAS" in seconds and bool(_ours(seconds))


def _ours(seconds: dict[str, float]) -> dict[str, float]:
    """The times of configuration rows, which are written as a call."""
    return {name: value for name, value in seconds.items() if name.endswith(")")}


B256, B1, B32 = "resnet50 batch 256", "resnet50 batch 1", "resnet50 batch 32"
MEMORY = ("memory", "batch 256")
FIGURES: Sequence[Figure] = (
    Figure("rn50 fp16 b256, images/s", 4e4, 5e4, "{:,.0f}", _rate("baselines", B256, 256)),
    Figure("over cuDNN fused, b256", 1.1, 1.3, "{:.2f}x", _speedup("baselines", B256, CUDNN)),
    Figure("over max-autotune, b256", 1.3, 1.7, "{:.2f}x", _speedup("autotune", B256, AUTOTUNE)),
    Figure("over eager fp16, b256", 2, 2.8, "{:.2f}x", _speedup("baselines", B256, EAGER)),
    Figure("over eager fp32, b256", 5, 6.5, "{:.2f}x", _speedup("baselines", B256, "eager fp32")),
    Figure("rn101, share of its floor", 0.45, 0.6, "{:.0%}", _share("resnet101", "shifted block")),
    Figure("rn152, share of its floor", 0.45, 0.6, "{:.0%}", _share("resnet152", "shifted block")),
    Figure("rn18, share of its floor", 0.4, 0.5, "{:.0%}", _share("resnet18", "fused stem")),
    Figure("rn34, share of its floor", 0.4, 0.5, "{:.0%}", _share("resnet34", "fused stem")),
    Figure("over cuDNN fused, b32", 1.1, 1.4, "{:.2f}x", _speedup("baselines", B32, CUDNN)),
    Figure("peak memory over eager", 0.5, 0.4, "{:.2f}x", _of(*MEMORY, "ratio"), True),
    Figure(
        "top-1 agreement",
        0.995,
        0.999,
        "{:.1%}",
        _of("agreement", "1000 images", "agreement", "fastres"),
    ),
    Figure("1x1s over cuBLAS, worst shape", 0.9, 1.0, "{:.2f}x", _gemm_worst),
    *(
        Figure(
            f"batch {a} per image over {b}", 1.15, 1.0, "{:.2f}x",
            _of("ragged", f"{a} against {b}", "ratio"), True,
        )
        for a, b in ((33, 64), (100, 128), (255, 256))
    ),
    Figure("rn50 fp16 b1, GPU ms", 0.20, 0.12, "{:.3f}", _probe(B1, "gpu"), True),
    Figure("rn50 fp16 b1, host p50 ms", 0.28, 0.16, "{:.3f}", _probe(B1, "p50"), True),
    Figure("over cuDNN fused, b1", 1.5, 3, "{:.2f}x", _speedup("baselines", B1, CUDNN)),
    Figure("over max-autotune, b1", 2, 5, "{:.2f}x", _speedup("autotune", B1, AUTOTUNE)),
    Figure("over eager fp16, b1", 10, 25, "{:.2f}x", _speedup("baselines", B1, EAGER)),
    Figure(
        "rn18 fp16 b1, GPU ms", 0.09, 0.06, "{:.3f}",
        _probe("resnet18 batch 1", "gpu", "family"), True,
    ),
    Figure("first answer, filled caches, s", 6, 4, "{:.1f}", _cold("filled"), True),
    Figure("first answer, empty caches, s", 60, 20, "{:.1f}", _cold("empty"), True),
    Figure("1,000 calls that differ", 0, 0, "{:.0f}", _of("repeats", "batch 1", "different"), True),
)  # fmt: skip
HEADER = ("figure", "at least", "goal", "got", "met")
BEST_HEADER = ("section", "case", "L2", "best", "us", "TFLOP/s", "best row of ours", "us", "ratio")


def figure_rows(records: Records) -> list[tuple[str, ...]]:
    """The table's lines. "goal", "at least" or "no" says which bar was met."""
    return [figure.row(records) for figure in FIGURES]


def best_rows(records: Records) -> list[tuple[str, ...]]:
    """The fastest contender of each contest and the fastest row of ours beside it."""
    rows = []
    for (section, name), data in records.items():
        for form in ("cold", "steady"):
            seconds = data.get(form, {}).get("seconds")
            if not seconds:
                continue
            best = min(seconds, key=lambda n: seconds[n])
            ours = _ours(seconds)
            row = min(ours, key=lambda n: ours[n]) if ours else "-"
            rate = data[form].get("best_tflops")
            mine = (f"{ours[row] * 1e6:.1f}", f"{seconds[best] / ours[row]:.2f}") if ours else "--"
            shown = (f"{seconds[best] * 1e6:.1f}", f"{rate:.0f}" if rate else "-")
            rows.append((section, name, form, best, *shown, row, *mine))
    return rows


def choice_rows(records: Records) -> list[str]:
    """Rows for ``fastres/backends/kernel_table.py``: where a kernel beat the others."""
    gpus = records.get(("environment", "environment"), {}).get("gpus") or [{}]
    rows = []
    for data in records.values():
        choice, seconds = data.get("choice"), data.get("cold", {}).get("seconds", {})
        if not choice:
            continue
        ours = [t for name, t in seconds.items() if name.startswith(f"{choice['kernel']} ")]
        others = [t for name, t in seconds.items() if name.startswith(choice["over"])]
        if ours and others and min(ours) < min(others):
            evidence = f"measured on {gpus[0].get('name')}: {min(others) / min(ours):.2f}x"
            width, batch = choice["width"], choice["batch"]
            rows.append(
                f'Row("{choice["kernel"]}", "{evidence}", HALF, ({width},), '
                f"batch=({batch}, {batch})),"
            )
    return rows


def failures(records: Records) -> list[tuple[str, ...]]:
    """(section, case, contender, reason) of whatever was wrong inside a finished case."""
    found = []
    for (section, name), data in records.items():
        for part in (data, data.get("cold", {}), data.get("steady", {})):
            found += [(section, name, *item) for item in part.get("failures", {}).items()]
    return found


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    cells = [list(header), *(list(row) for row in rows)]
    cells.insert(1, ["---"] * len(cells[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
