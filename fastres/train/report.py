"""What a run shows: progress, metrics.csv, curves.png; and several runs beside each other."""

from __future__ import annotations

import csv
import io
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ..errors import MissingDependencyError
from ..files import atomic_write, read_text
from ..models.pretrained import read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, Any]]
METRICS, CURVES = "metrics.csv", "curves.png"
EVERY = 30.0  # seconds between lines where standard error is no terminal


class Reporter:
    """Progress of a run on standard error; says nothing where ``shown`` is false."""

    def __init__(self, shown: bool, epochs: int, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.epochs, self.steps = epochs, steps
        self.console = Console(stderr=True, highlight=False, quiet=not shown)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        silent = not (shown and sys.stderr.isatty())
        self.bar = Progress(*columns, console=self.console, transient=True, disable=silent)
        self.task = self.bar.add_task("", total=steps)
        self.rates: deque[float] = deque(maxlen=50)
        self.said = time.monotonic()

    def step(self, epoch: int, step: int, images: int, seconds: float) -> None:
        """A step of ``images`` took ``seconds``."""
        self.rates.append(images / max(seconds, 1e-9))
        text = f"epoch {epoch + 1}/{self.epochs}  {median(self.rates):,.0f} images/s"
        self.bar.update(self.task, completed=step, description=text)
        if self.bar.disable and time.monotonic() - self.said > EVERY:
            self.say(f"{text}  step {step}/{self.steps}")

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch in one line."""
        text = f"epoch {row['epoch']}/{self.epochs}  train loss {row['train_loss']:.4f}"
        text += f"  accuracy {row['train_accuracy']:.2%}"
        if row["accuracy"] is not None:
            text += f"  validation loss {row['loss']:.4f} accuracy {row['accuracy']:.2%}"
        rate = f"{row['images_per_second']:,.0f} images/s"
        self.say(f"{text}  {rate}, {row['data_wait']:.0%} waiting")

    def say(self, text: str) -> None:
        """One line."""
        self.said = time.monotonic()
        self.console.print(text, markup=False)


def write_metrics(history: History, path: Path) -> None:
    """A row for each epoch as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, history[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    atomic_write(path, text.getvalue().encode())


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows that a run wrote; numbers as numbers, None for what was not measured.

    Raises:
        ValueError: the folder holds no epoch of a run.
    """
    path = Path(folder) / METRICS
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path, 2**26))))
        if not rows:
            raise ValueError(f"{path} has no row")
        history = [
            {k: v if k == "weights" else float(v) if v else None for k, v in row.items()}
            for row in rows
        ]
        return [{**row, "epoch": int(row["epoch"])} for row in history]  # type: ignore[arg-type]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder} has no epoch of a run to show: {error}") from error


def draws() -> bool:
    """Whether matplotlib is here to draw the curves."""
    return find_spec("matplotlib") is not None


def curves(runs: Mapping[str, History]) -> Figure:
    """Loss and accuracy over the epochs of one run or several; dashed of the training images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    for plot, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for number, (name, history) in enumerate(runs.items()):
            epochs = [row["epoch"] for row in history]
            for part, style in ((f"train_{what}", "--"), (what, "-")):
                values = [row[part] for row in history]
                if None not in values:
                    colour = f"C{number}" if len(runs) > 1 else None
                    label = f"{name} {part.replace('_', ' ')}".strip()
                    plot.plot(epochs, values, style, marker=".", color=colour, label=label)
        plot.set_xlabel("epoch")
        plot.set_ylabel(what)
        plot.grid(alpha=0.3)
        plot.legend()
    return figure


def write_curves(runs: Mapping[str, History], path: Path) -> None:
    """:func:`curves` as a PNG.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    if not draws():
        raise MissingDependencyError(f"{path.name} needs matplotlib: install fastres[train]")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    data = io.BytesIO()
    FigureCanvasAgg(curves(runs)).print_png(data)
    atomic_write(path, data.getvalue())


def compared(folders: Sequence[str | os.PathLike[str]]) -> dict[str, dict[str, Any]]:
    """Of each run: what it was asked for otherwise than the others, and what its epochs gave.

    Raises:
        ValueError: fewer than two folders, one twice, or one without a run.
    """
    names = [os.fspath(folder) for folder in folders]
    if len(set(names)) < max(2, len(names)):
        raise ValueError(f"give two or more folders of runs, each once; got {', '.join(names)}")
    asked = {}
    for name in names:
        held = read_run(name)
        wanted = {k: held.get(k) for k in ("model", "data", "data_hash", "world", "torch")}
        asked[name] = {**wanted, **(held.get("arguments") or {}), **held.get("options", {})}
    every = dict.fromkeys(key for one in asked.values() for key in one)
    differ = [k for k in every if len({repr(one.get(k)) for one in asked.values()}) > 1]
    found = {}
    for name in names:
        rows = read_metrics(name)
        judged = [row for row in rows if row["accuracy"] is not None]
        best = max(judged, key=lambda row: row["accuracy"], default=None)
        found[name] = {
            "differs": {key: asked[name].get(key) for key in differ},
            "last": rows[-1],
            "best": best,
            "seconds": sum(row["seconds"] for row in rows),
            "history": rows,
        }
    return found
