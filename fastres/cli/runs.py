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
    Published,
    Size,
    Top,
    following,
    numbers,
    print_json,
    table,
)

if TYPE_CHECKING:
    from ..bench.report import Report
    from ..bench.results import Picture
    from ..models.classify import Classified

SHADES = " ░▒▓█" if OUT.encoding.startswith("utf") else " .:*#"
LATENCY_SECONDS = 60.0
NARROW = ("contender", "ms", "CPU ms", "images/s", "speed-up", "error", "top-1")


def demo(
    report: Annotated[Path, typer.Option(help="Where the HTML report goes.")] = Path("report.html"),
    device: DeviceName = "auto",
    as_json: AsJson = False,
) -> int:
    """Classify real digits in PyTorch and in fastres, time both, write report.html.

    Wrong answers end with exit code 1 and no speed.
    """
    from ..bench.demo import demo as run_demo
    from ..bench.report import check_output

    check_output(report)
    with following() as follow:
        result = run_demo(device=device, follow=follow)
    return deliver(result, as_json, [report])


def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL...]", help="Networks or folders of training runs, without a preset."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Preset: under a minute.")] = False,
    standard: Annotated[
        bool, typer.Option("--standard", help="Preset: under eight minutes, six on a CPU.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Preset: everything, hours.")] = False,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of float32, float16, bfloat16, separated by commas; on a CPU also int8; on a GPU "
            "also tf32 and ieee: float32 multiplied so. By default what is fast here."
        ),
    ] = None,
    size: Size = 224,
    device: DeviceName = "auto",
    weights: Annotated[str | None, typer.Option(help="Pretrained weights to download.")] = None,
    baselines: Annotated[
        str, typer.Option(help="Besides eager PyTorch: names separated by commas, or all.")
    ] = "",
    latency: Annotated[
        bool, typer.Option("--latency", help="Also 1,000 single calls (p50, p90, p99), and memory.")
    ] = False,
    cold_cache: Annotated[
        bool, typer.Option("--cold-cache", help="Empty the caches before each timed call.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each contender.")] = 20,
    seconds: Annotated[float, typer.Option(min=0, help="Time for one case, roughly.")] = 20.0,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Write this path with .json, .md and .html behind it; .jsonl as it goes."
        ),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Time fastres against PyTorch and other runtimes, interleaved; outputs are checked first.

    A contender with a wrong output gets no time, and the exit code is 1. A baseline that cannot run
    is listed with the reason.
    """
    from ..bench.baselines import BASELINES
    from ..bench.presets import Preset, Spec, preset
    from ..bench.report import SUFFIXES, check_output, started
    from ..bench.run import parse_device, run
    from ..perf.timing import Method

    chosen = [n for n, on in (("quick", quick), ("standard", standard), ("full", full)) if on]
    if len(chosen) + bool(models) != 1:
        raise ValueError("give either networks or one of --quick, --standard, --full")
    where = parse_device(device)
    if chosen:
        plan = preset(chosen[0], where.type)
    else:
        names = (
            tuple(BASELINES) if baselines == "all" else tuple(filter(None, baselines.split(",")))
        )
        kinds = tuple(dtype.split(",")) if dtype else ()
        specs = tuple(
            Spec(model, n, size, kinds, names, LATENCY_SECONDS * latency, sustained=latency)
            for model in models or ()
            for n in numbers(batch, "--batch")
        )
        plan = Preset(specs, Method(rounds=rounds, budget=seconds, cold_cache=cold_cache))
    paths = [output.with_name(output.name + suffix) for suffix in SUFFIXES] if output else []
    for path in paths:
        check_output(path)
    append = started(output.with_name(output.name + ".jsonl")) if output else None
    with following() as follow:
        result = run(plan.specs, where, plan.method, weights, follow, append, cold=plan.cold)
    return deliver(result, as_json, paths)


def classify(
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="Image files.")],
    model: Annotated[
        str,
        typer.Option(help="A network, a fused .safetensors file, or the folder of a training run."),
    ] = "resnet50",
    weights: Published = "DEFAULT",
    checkpoint: Checkpoint = None,
    device: DeviceName = "auto",
    top: Top = 5,
    as_json: AsJson = False,
) -> int:
    """Name what is in photographs, with pretrained weights and torchvision's preprocessing.

    A network of one's own is a fused .safetensors file or the folder of a training run.
    """
    from ..batch.network import FUSED
    from ..bench.run import parse_device
    from ..models.classify import classify as run_classify
    from ..models.pretrained import is_run

    if is_run(model) or Path(model).suffix == FUSED:
        found = _of_ones_own(photos, model, weights, checkpoint, device, top)
    else:
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


def _of_ones_own(
    photos: list[Path], model: str, weights: str, checkpoint: Path | None, device: str, top: int
) -> list[Classified]:
    """As :func:`fastres.models.classify.classify`, by a fused file or a training run."""
    from ..batch.classifier import Classifier
    from ..models.classify import Classified

    network = Classifier(model, weights=weights, checkpoint=checkpoint, device=device, top=top)
    found = []
    for photo, row in zip(photos, network.rows([p.read_bytes for p in photos]), strict=True):
        if row.names is None or row.probabilities is None:
            raise ValueError(f"{photo}: {row.error}")
        best = zip(row.names, row.probabilities, strict=True)
        found.append(Classified(str(photo), tuple(best)))
    return found


def compare_reports(
    old: Annotated[Path, typer.Argument(help="The earlier report, .json.")],
    new: Annotated[Path, typer.Argument(help="The later report, .json.")],
    as_json: AsJson = False,
) -> int:
    """Tell what got faster or slower beyond the spread; exit code 1 if fastres got slower."""
    from ..bench.compare import compare, load

    found = compare(load(old), load(new))
    if as_json:
        print_json([change.to_dict() for change in found])
    else:
        rows = [
            (c.case, c.contender, f"{c.ratio:.2f}x" if c.ratio else "-", c.verdict) for c in found
        ]
        OUT.print(table(("case", "contender", "new over old speed", ""), rows))
    return 1 if any(c.verdict == "slower" and c.ours for c in found) else 0


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
    from ..bench.results import (
        case_rows,
        ceiling_table,
        cold_table,
        footnote,
        layer_table,
        probe_table,
    )

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
        if case.probes:
            OUT.print(table(*probe_table(case)))
        for name, layers in case.layers.items():
            OUT.print(f"\n{name}, step by step", markup=False)
            OUT.print(table(*layer_table(layers)))
    if report.cold_starts:
        OUT.print("\n[bold]Process start to first answer[/]")
        OUT.print(table(*cold_table(report.cold_starts)))
    if report.ceilings:
        OUT.print("\n[bold]What this machine can do[/]")
        OUT.print(table(*ceiling_table(report.ceilings)))
    for note in report.notes:
        OUT.print(note, markup=False)


def narrow(cells: tuple[str, ...]) -> tuple[str, ...]:
    """A row of a case's table in 80 columns: spreads and a failure's reason are left out."""
    name, milliseconds, *others = cells
    median = "-" if milliseconds.startswith("no time") else milliseconds.partition(" ")[0]
    return (name, median, *(cell.partition(" ")[0] for cell in others))


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
