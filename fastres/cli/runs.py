"""The commands that run a network on something: demo, bench, classify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from .console import (
    ERR,
    OUT,
    AsJson,
    Checkpoint,
    DeviceName,
    Size,
    following,
    numbers,
    print_json,
    table,
)

if TYPE_CHECKING:
    from ..report import Report
    from ..results import Picture

SHADES = " ░▒▓█" if OUT.encoding.startswith("utf") else " .:*#"
NARROW = ("contender", "ms", "images/s", "speed-up", "error", "top-1")


def demo(
    report: Annotated[Path, typer.Option(help="Where the HTML report goes.")] = Path("report.html"),
    device: DeviceName = "auto",
    as_json: AsJson = False,
) -> int:
    """Classify real digits in PyTorch and in fastres, time both, write report.html.

    Wrong answers end with exit code 1 and no speed.
    """
    from ..demo import demo as run_demo
    from ..report import check_output

    check_output(report)
    with following() as follow:
        result = run_demo(device=device, follow=follow)
    return deliver(result, as_json, [report])


def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="One or more networks.")],
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of float32, float16, bfloat16, separated by commas; by default what is fast here."
        ),
    ] = None,
    size: Size = 224,
    device: DeviceName = "auto",
    weights: Annotated[str | None, typer.Option(help="Pretrained weights to download.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each contender.")] = 20,
    seconds: Annotated[float, typer.Option(min=0, help="Time for one case, roughly.")] = 20.0,
    output: Annotated[
        Path | None, typer.Option(help="Write this path with .json, .md and .html behind it.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Time fastres against eager PyTorch, interleaved; outputs are checked first.

    A contender with a wrong output gets no time, and the exit code is 1.
    """
    from ..bench import benchmark
    from ..report import SUFFIXES, check_output
    from ..timing import Method

    paths = [output.with_name(output.name + suffix) for suffix in SUFFIXES] if output else []
    for path in paths:
        check_output(path)
    with following() as follow:
        result = benchmark(
            models,
            batches=numbers(batch, "--batch"),
            dtypes=dtype.split(",") if dtype else None,
            size=size,
            device=device,
            method=Method(rounds=rounds, budget=seconds),
            weights=weights,
            progress=follow,
        )
    return deliver(result, as_json, paths)


def classify(
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="Image files.")],
    model: Annotated[str, typer.Option(help="A network with ImageNet weights.")] = "resnet50",
    weights: Annotated[
        str, typer.Option(help="Which of its weights; they name preprocessing and labels too.")
    ] = "DEFAULT",
    checkpoint: Checkpoint = None,
    device: DeviceName = "auto",
    top: Annotated[int, typer.Option(min=1, help="Labels for each photograph.")] = 5,
    as_json: AsJson = False,
) -> int:
    """Name what is in photographs, with pretrained weights and torchvision's preprocessing."""
    from ..bench import parse_device
    from ..classify import classify as run_classify

    found = run_classify(
        photos,
        model=model,
        weights=weights,
        checkpoint=checkpoint,
        device=parse_device(device),
        top=top,
        progress=ERR.is_terminal,
    )
    if as_json:
        print_json([photo.to_dict() for photo in found])
        return 0
    for photo in found:
        OUT.print(photo.path, style="bold", markup=False)
        OUT.print(table(("", ""), [(label, f"{p:.1%}") for label, p in photo.top]))
    return 0


def deliver(report: Report, as_json: bool, paths: list[Path]) -> int:
    """Print a report and write it to files; the exit code says whether all answers are right."""
    if as_json:
        OUT.out(report.to_json(), end="")
    else:
        show(report)
    for path in paths:
        report.write(path)
        ERR.print(f"wrote {path}", markup=False)
    return 0 if report.ok else 1


def show(report: Report) -> None:
    """A report on the terminal."""
    from ..results import case_rows, footnote

    for check in report.checks:
        mark = "[green]ok   [/]" if check.ok else "[red]WRONG[/]"
        OUT.print(f"{mark} {escape(check.name)}: {escape(check.detail)}")
    if report.pictures:
        OUT.print(gallery(report.pictures, OUT.width), markup=False)
    for case in report.cases:
        OUT.print(f"\n[bold]{escape(case.title)}[/]")
        OUT.print(table(NARROW, [narrow(row) for row in case_rows(case)]))
        for name, failure in case.comparison.failures.items():
            OUT.print(f"{name} has no time: {failure}", style="red", markup=False)
        OUT.print(footnote(case), style="dim", markup=False)
    for note in report.notes:
        OUT.print(note, markup=False)


def narrow(cells: tuple[str, ...]) -> tuple[str, ...]:
    """A row of a case's table in 80 columns: the time's spread and a failure's reason left out."""
    name, milliseconds, *others = cells
    median = "-" if milliseconds.startswith("no time") else milliseconds.partition(" ")[0]
    return (name, median, *others)


def gallery(pictures: tuple[Picture, ...], width: int) -> str:
    """Grey images as shaded text, side by side, each with its prediction."""
    drawn = [_draw(picture) for picture in pictures]
    columns = max(1, (width + 2) // (max(len(lines[0]) for lines in drawn) + 2))
    rows = []
    for start in range(0, len(drawn), columns):
        lines = zip(*drawn[start : start + columns], strict=True)
        rows.append("\n".join("  ".join(line).rstrip() for line in lines))
    return "\n" + "\n\n".join(rows)


def _draw(picture: Picture) -> list[str]:
    """The lines of one picture, two characters to a pixel, above its caption; all of one width."""
    verdict = "" if picture.correct else f", is {picture.label}"
    caption = f"{picture.predicted} ({picture.probability:.0%}){verdict}"
    lines = ["".join(2 * _shade(value) for value in row) for row in picture.pixels]
    width = max(len(caption), len(lines[0]))
    return [line.ljust(width) for line in (*lines, caption)]


def _shade(value: float) -> str:
    return SHADES[min(int(value * len(SHADES)), len(SHADES) - 1)]
