"""What the commands share: consoles, progress, JSON, tables, and the types of their options."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

OUT = Console(highlight=False)
ERR = Console(stderr=True, highlight=False, soft_wrap=True)

ModelName = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A network, e.g. resnet50, or the folder of a run."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16.")]
Backend = Annotated[str, typer.Option("--backend", help="auto, triton or torch.")]
Size = Annotated[int, typer.Option("--size", min=1, help="Height and width of the images.")]
OwnSize = Annotated[
    int | None,
    typer.Option(
        "--size", min=1, help="Height and width of the images: by default a file's own, else 224."
    ),
]
Weights = Annotated[
    str | None, typer.Option("--weights", help="Pretrained weights to download, e.g. DEFAULT.")
]
Published = Annotated[
    str,
    typer.Option("--weights", help="Published weights; they name preprocessing and labels too."),
]
Labels = Annotated[
    Path | None,
    typer.Option("--labels", help="A text file with the name of each class, one to a line."),
]
Top = Annotated[int, typer.Option("--top", min=1, help="Labels for each photograph.")]
Checkpoint = Annotated[
    Path | None, typer.Option("--checkpoint", help="A file of weights: .safetensors or .pth.")
]

DATA = (
    "digits, mnist:DIR, fashion-mnist:DIR, cifar10:DIR, a .npz file, or a folder with "
    "train/CLASS/*.jpg and val/CLASS/*.jpg"
)
"""What ``--data`` and DATA may name."""

Follow = Callable[[str], Callable[[int, int], None]]


@contextmanager
def following() -> Iterator[Follow]:
    """Progress on standard error, where that is a terminal.

    Yields a function that takes the title of a piece of work and returns the callback for it, to be
    called with (done, wanted).
    """
    columns = (*Progress.get_default_columns()[:2], TimeElapsedColumn())
    with Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as bar:

        def follow(title: str) -> Callable[[int, int], None]:
            task = bar.add_task(title, total=None)
            return lambda done, wanted: bar.update(task, completed=done, total=wanted)

        yield follow


def print_json(value: Any) -> None:
    """Indented JSON on standard output."""
    typer.echo(json.dumps(value, indent=1))


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    justify: Literal["left", "right"] = "right",
) -> Table:
    """A table whose first column is left-aligned; empty headings are not shown."""
    built = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="bold",
        show_header=any(header),
    )
    for index, name in enumerate(header):
        built.add_column(name, justify=justify if index else "left", overflow="fold")
    for row in rows:
        built.add_row(*map(escape, row))
    return built


def numbers(text: str, option: str) -> list[int]:
    """``"1,8,32"`` as integers. Raises ValueError naming the option."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} takes integers such as 1,8,32; got {text!r}") from None
