"""The command that trains a network."""

from __future__ import annotations

import inspect
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..train.config import Config
from .console import DATA, ERR, OUT, AsJson, Checkpoint, DeviceName, print_json, table

if TYPE_CHECKING:
    from ..models.resnet import ResNet
    from ..train.data import Data


def train(
    data: Annotated[
        str | None,
        typer.Argument(metavar="DATA", help=f"{DATA}."),
    ] = None,
    model: Annotated[str, typer.Option(help="A network, e.g. resnet18.")] = "resnet18",
    stem: Annotated[str | None, typer.Option(help="imagenet, or cifar for small images.")] = None,
    residual: Annotated[bool, typer.Option(help="Add the shortcuts.")] = True,
    checkpoint: Checkpoint = None,
    output_dir: Annotated[Path, typer.Option(help="The folder of the run.")] = Path("run"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run in it.")] = False,
    resume: Annotated[Path | None, typer.Option(help="The folder of a run to go on with.")] = None,
    allow_change: Annotated[
        str, typer.Option(help="Options that a resumed run may have otherwise, by commas.")
    ] = "",
    device: DeviceName = "auto",
    dry: Annotated[bool, typer.Option("--dry", help="Say what would run, after 3 steps.")] = False,
    test_only: Annotated[
        bool,
        typer.Option("--test-only", help="Judge the best epoch of --resume, or --checkpoint."),
    ] = False,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Train a network and keep its options, metrics, curves and checkpoints in a folder.

    A first Ctrl-C or SIGTERM ends after the step and saves; the run that goes on from there ends
    with the same bits as one that was never cut. torchrun starts one process for each GPU.
    """
    from ..bench.run import parse_device
    from ..models.pretrained import read_run
    from ..train.data import open_data
    from ..train.loop import fit

    given = {name: value for name, value in options.items() if value is not None}
    described: dict[str, Any] = {"model": model, "arguments": {"residual": residual, "stem": stem}}
    if resume is not None:
        held = read_run(resume)
        described = {"model": held.get("model"), "arguments": held.get("arguments")}
        data, given = data or held.get("data"), {**held.get("options", {}), **given}
    if data is None:
        raise ValueError("give DATA to train on, or --resume FOLDER")
    config = Config.of(given)
    try:
        opened = open_data(data, config.on_bad_file)
    except ValueError as error:
        if resume is None:
            raise
        hint = f"; if the data has moved: fastres train DATA --resume {resume}"
        raise ValueError(f"{error}{hint}") from error
    if test_only and resume is not None:
        _judge(None, resume, opened, config, device, as_json)
        return
    network = build(described, opened, config.seed)
    if checkpoint is not None:
        from ..models.checkpoint import load_checkpoint

        load_checkpoint(network, checkpoint, num_classes_mismatch="reinit")
    if test_only:
        if checkpoint is None:
            raise ValueError("give --test-only the --resume FOLDER of a run, or a --checkpoint")
        _judge(network, None, opened, config, device, as_json)
        return
    if dry:
        _dry(network, opened, config, as_json)
        return
    run = fit(
        network,
        opened,
        folder=resume or output_dir,
        resume=resume is not None,
        overwrite=overwrite,
        allow_change=tuple(filter(None, allow_change.split(","))),
        device=parse_device(device),
        described=described,
        **given,
    )
    if as_json:
        print_json({"folder": run.folder, "best": run.best, "history": run.history})
    elif run.best is not None:
        OUT.print(table(("", "best epoch"), [(k, f"{v}") for k, v in run.best.items()], "left"))
        ERR.print(f"kept in {run.folder}", markup=False)


def build(described: dict[str, Any], data: Data, seed: int) -> ResNet:
    """The network of a run, for the data's channels and classes, with random weights."""
    import torch

    from ..models.registry import create_model

    torch.manual_seed(seed)
    channels = 3 if data.train.images is None else data.train.images.shape[1]
    arguments = {k: v for k, v in (described["arguments"] or {}).items() if v is not None}
    arguments |= {"in_chans": channels, "num_classes": len(data.classes)}
    return create_model(described["model"], **arguments)


def _judge(
    network: ResNet | None, run: Path | None, data: Data, config: Config, device: str, as_json: bool
) -> None:
    """Print what a network, or a run's of its best epoch, is on the validation images."""
    from dataclasses import replace

    from ..bench.run import parse_device
    from ..models.pretrained import load_network, read_run
    from ..train.loop import evaluate

    if network is None:
        held = read_run(str(run))
        network = load_network(str(run))
        data = replace(data, mean=held.get("mean"), std=held.get("std"))
    found = evaluate(network, data, config, parse_device(device))
    if as_json:
        print_json(found)
    else:
        OUT.print(table(("", ""), [(k, f"{v:.4f}") for k, v in found.items()]))


def compare_runs(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    plot: Annotated[Path | None, typer.Option(help="Draw their curves in this .png.")] = None,
    as_json: AsJson = False,
) -> None:
    """Set training runs beside each other: what they were asked for, and what came of it."""
    from ..files import check_target
    from ..train.report import compared, write_curves

    if plot is not None:
        check_target(plot, (".png",))
    found = compared(runs)
    short = [run.name for run in runs]
    names = short if len(set(short)) == len(short) else list(found)
    if plot is not None:
        histories = (run["history"] for run in found.values())
        write_curves(dict(zip(names, histories, strict=True)), plot)
    if as_json:
        print_json(found)
        return
    asked = next(iter(found.values()))["differs"]
    lines = [(key, *(str(run["differs"][key]) for run in found.values())) for key in asked]
    lines.append(("epochs run", *(str(run["last"]["epoch"]) for run in found.values())))
    shown = {"loss": "{:.4f}", "accuracy": "{:.2%}"}
    for row in ("last", "best"):
        for part in ("train_loss", "train_accuracy", "loss", "accuracy"):
            values = [(run[row] or {}).get(part) for run in found.values()]
            form = shown[part.removeprefix("train_")]
            cells = ("-" if value is None else form.format(value) for value in values)
            lines.append((f"{row} epoch: {part.replace('_', ' ')}", *cells))
    lines.append(("seconds", *(f"{run['seconds']:,.0f}" for run in found.values())))
    OUT.print(table(("", *names), lines))
    if plot is not None:
        ERR.print(f"wrote {plot}", markup=False)


def _dry(network: ResNet, data: Data, config: Config, as_json: bool) -> None:
    """What would run, with the time of three steps on a copy."""
    from dataclasses import replace

    from ..train.loop import fit

    n = len(data.train)
    few = min(n, 3 * config.batch_size * config.accumulate)
    part = replace(data.train, labels=data.train.labels[:few])
    if part.images is not None:
        part = replace(part, images=part.images[:few])
    tried = {**asdict(config), "epochs": 1, "lr_warmup_epochs": 0}
    run = fit(network, replace(data, train=part, validation=None), progress=False, **tried)
    rate = run.history[0]["images_per_second"]
    found = {
        "training images": n,
        "validation images": 0 if data.validation is None else len(data.validation),
        "classes": len(data.classes),
        "parameters": sum(p.numel() for p in network.parameters()),
        "steps of an epoch": -(-n // (config.batch_size * config.accumulate)),
        "images per second, 3 steps": round(rate, 1),
        "seconds of an epoch, predicted": round(n / rate, 1),
        "seconds of the run, predicted": round(config.epochs * n / rate, 1),
    }
    if as_json:
        print_json(found)
    else:
        OUT.print(table(("", ""), [(k, f"{v:,}") for k, v in found.items()]))


def _with_options() -> None:
    """Give the command an option for each field of Config, None where it was not given."""
    own = inspect.signature(train, eval_str=True)
    kinds = {"int": int, "float": float, "bool": bool, "str": str}
    added = []
    for option in fields(Config):
        kind = kinds[str(option.type).partition(" ")[0]]
        choices = option.metadata["choices"]
        text = f"{option.metadata['help']} {', '.join(choices) + '; ' if choices else ''}"
        text += f"[default: {option.default}]"
        annotation = Annotated[kind | None, typer.Option(help=text, show_default=False)]  # type: ignore[valid-type]
        keyword = inspect.Parameter.KEYWORD_ONLY
        added.append(inspect.Parameter(option.name, keyword, default=None, annotation=annotation))
    kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    train.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    train.__annotations__ = {p.name: p.annotation for p in (*kept, *added)} | {"return": None}


_with_options()
