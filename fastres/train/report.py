"""What a run shows: progress on standard error, metrics.csv and curves.png."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ..files import atomic_write

COLUMNS = (
    *("epoch", "lr", "train_loss", "train_accuracy", "loss", "accuracy", "top5"),
    *("images_per_second", "data_wait", "seconds", "weights"),
)
EVERY = 30.0  # seconds between lines where standard error is no terminal


class Reporter:
    """Progress of a run; says nothing where ``shown`` is false."""

    def __init__(self, shown: bool, epochs: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

        self.epochs = epochs
        self.console = Console(stderr=True, highlight=False, quiet=not shown)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self.bar = Progress(
            *columns,
            console=self.console,
            transient=True,
            disable=not (shown and sys.stderr.isatty()),
        )
        self.task: TaskID | None = None
        self.rates: deque[float] = deque(maxlen=50)
        self.said = time.monotonic()

    def begin(self, epoch: int, steps: int, done: int) -> None:
        """An epoch begins, ``done`` of its steps having been taken before."""
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(f"epoch {epoch}/{self.epochs}", total=steps, completed=done)

    def step(self, epoch: int, step: int, steps: int, images: int, seconds: float) -> None:
        """A step of ``images`` took ``seconds``."""
        self.rates.append(images / max(seconds, 1e-9))
        text = f"epoch {epoch}/{self.epochs}  {median(self.rates):,.0f} images/s"
        assert self.task is not None
        self.bar.update(self.task, completed=step, description=text)
        if self.bar.disable and time.monotonic() - self.said > EVERY:
            self.say(f"{text}  step {step}/{steps}")

    def say(self, text: str) -> None:
        """One line."""
        self.said = time.monotonic()
        self.console.print(text, markup=False)


def line(row: dict[str, Any], epochs: int) -> str:
    """An epoch in one line."""
    parts = [f"epoch {row['epoch']}/{epochs}", f"train loss {row['train_loss']:.4f}"]
    parts.append(f"accuracy {row['train_accuracy']:.2%}")
    if row["accuracy"] is not None:
        parts.append(f"validation loss {row['loss']:.4f} accuracy {row['accuracy']:.2%}")
    parts.append(f"{row['images_per_second']:,.0f} images/s, {row['data_wait']:.0%} waiting")
    return "  ".join(parts)


def write_metrics(history: Sequence[dict[str, Any]], path: Path) -> None:
    """A row for each epoch as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    atomic_write(path, text.getvalue().encode())


def draws() -> bool:
    """Whether matplotlib is here to draw the curves."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def write_curves(runs: dict[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """Loss and accuracy over the epochs of one run or several, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    for plot, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for name, history in runs.items():
            epochs = [row["epoch"] for row in history]
            for part, style in ((f"train_{what}", "--"), (what, "-")):
                values = [row[part] for row in history]
                if None not in values:
                    label = " ".join((name, part.replace("_", " "))).strip()
                    plot.plot(epochs, values, style, label=label)
        plot.set_xlabel("epoch")
        plot.set_ylabel(what)
        plot.grid(alpha=0.3)
        plot.legend()
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    atomic_write(path, data.getvalue())
