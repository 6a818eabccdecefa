"""The command that turns a trained network into one of 8 bits, and the check of its file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import (
    DATA,
    ERR,
    OUT,
    AsJson,
    Checkpoint,
    OwnSize,
    Weights,
    following,
    print_json,
    table,
)
from .files import Source

if TYPE_CHECKING:
    from torch import Tensor

    from ..train.data import Split

DataName = Annotated[str, typer.Option("--data", help=f"{DATA}, or with CLASS/*.jpg.")]
Tested = Annotated[int, typer.Option("--test", min=0, help="Images to be right about, at most.")]


def quantize(
    source: Source,
    data: DataName,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .safetensors file to write.")],
    images: Annotated[int, typer.Option(min=2, help="Images to calibrate on, at most.")] = 512,
    test: Tested = 10_000,
    calibrator: Annotated[str, typer.Option(help="mse, max or percentile:99.99.")] = "mse",
    keep: Annotated[
        list[str] | None, typer.Option(help="A step that stays in floats, or layer4.*; repeat.")
    ] = None,
    min_agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Share of equal answers below which it fails.")
    ] = 0.98,
    dtype: Annotated[
        str, typer.Option(help="Of what stays in floats: float32, float16 or bfloat16.")
    ] = "float32",
    size: OwnSize = None,
    weights: Weights = None,
    checkpoint: Checkpoint = None,
    as_json: AsJson = False,
) -> None:
    """Calibrate a trained network to 8 bits, print what it loses, and write it for fastres.load.

    It is calibrated on training images, a quarter of which are held out and compared. The accuracy
    is that of the validation images, or of the images that calibration did not see.
    """
    from ..batch.network import read_network
    from ..bench.run import parse_dtype
    from ..files import check_target
    from ..formats.fused_file import SUFFIXES, save
    from ..frontends.fast_model import FastModel
    from ..frontends.quantize import quantize as run
    from ..models.pretrained import is_run

    check_target(output, SUFFIXES)
    kind = parse_dtype(dtype)
    trained = weights or checkpoint or Path(source).suffix or is_run(source)
    if not trained:
        raise ValueError(
            f"{source} has random weights, of which 8 bits say nothing: give --checkpoint"
        )
    network = read_network(source, size, weights, checkpoint)
    labelled = _Labelled(data, images, size)
    with following() as follow:
        report_to = follow("calibrate and compare")
        found = run(
            network,
            labelled.calibration(),
            calibrator=calibrator,
            images=images,
            keep=keep or (),
            min_agreement=min_agreement,
            dtype=kind,
            progress=report_to,
        )
        rows = labelled.accuracies({"float32": network, "8 bits": found}, test, follow("test"))
    assert isinstance(found, FastModel)
    save(found, output)
    if as_json:
        print_json({"path": str(output), **found.report.to_dict(), "test": rows})
        return
    OUT.print(str(found.report), markup=False)
    _show(rows)
    ERR.print(f"wrote {output}", markup=False)


def verify_file(path: str, data: str | None, test: int, size: int | None, as_json: bool) -> int:
    """Compare what this machine makes of an 8-bit file with its definition in float64."""
    from ..formats.fused_file import load
    from ..frontends.fast_model import in_float64

    model = load(path)
    if data is None or model.report is None or not test:
        why = "it has none" if model.report is None else "give --data, and --test from 1 on"
        raise ValueError(f"of {path} 8 bits can be verified, on images: {why}")
    models = {"float64": in_float64(model), "8 bits": model}
    with following() as follow:
        rows = _Labelled(data, 0, size).accuracies(models, test, follow("test"))
    ok = rows["8 bits"]["agreement"] >= 0.99
    if as_json:
        print_json({"model": path, "ok": ok, "test": rows})
    else:
        OUT.print("[green]right[/]" if ok else "[red]WRONG[/]")
        _show(rows)
    return 0 if ok else 1


def _show(rows: dict[str, dict[str, Any]]) -> None:
    if not rows:
        ERR.print("note: no image was left to tell the accuracy by", markup=False)
        return
    lines = [
        (name, *(f"{r[k]:.2%}" for k in ("accuracy", "low", "high", "agreement")), str(r["images"]))
        for name, r in rows.items()
    ]
    OUT.print(table(("", "accuracy", "from", "to", "agreement", "images"), lines))


class _Labelled:
    """A data set, of whose training images some are calibrated on.

    Without validation images the others are tested on.
    """

    def __init__(self, name: str, images: int, size: int | None) -> None:
        import torch

        from ..train.config import Config
        from ..train.data import image_files, open_data

        root = Path(name)
        if root.is_dir() and not (root / "train").is_dir():
            self.data = image_files(root)
        else:
            self.data = open_data(name)
        self.config = Config.of({"batch_size": 32, "resize": size})
        n = len(self.data.train)
        self.places = torch.linspace(0, n - 1, min(images, n)).round().long().unique()

    def calibration(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._batches(self.data.train, self.places)

    def _batches(self, split: Split, places: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Images as the network takes them, without augmentation, and their labels."""
        import torch

        from ..train.batches import Batches
        from ..train.data import ImageFiles, Split

        images, source, labels = split.images, split.source, split.labels[places]
        if source is not None:
            source = ImageFiles([source.paths[int(i)] for i in places], labels.tolist())
        part = Split(None if images is None else images[places], labels, source)
        data = replace(self.data, validation=part)
        return Batches(data, self.config, torch.device("cpu")).validation()

    def accuracies(
        self, models: dict[str, Any], most: int, progress: Callable[[int, int], None]
    ) -> dict[str, dict[str, Any]]:
        """Of each model, on at most so many images; agreement is that with the first."""
        import torch

        from ..frontends.quantize import wilson

        split = self.data.validation
        left = torch.ones(len(self.data.train if split is None else split), dtype=torch.bool)
        if split is None:
            split, left[self.places] = self.data.train, False
        rest = left.nonzero().flatten()
        if not most or not len(rest):
            return {}
        rest = rest[torch.linspace(0, len(rest) - 1, min(most, len(rest))).round().long()]
        answers: dict[str, list[Tensor]] = {name: [] for name in models}
        labels: list[Tensor] = []
        with torch.inference_mode():
            for x, y in self._batches(split, rest):
                for name, model in models.items():
                    dtype = getattr(model, "dtype", torch.float32)
                    answers[name].append(model(x.to(dtype)).argmax(1))
                labels.append(y)
                progress(sum(map(len, labels)), len(rest))
        known, first = torch.cat(labels), torch.cat(next(iter(answers.values())))
        found = {}
        for name, parts in answers.items():
            right, same = (int((torch.cat(parts) == other).sum()) for other in (known, first))
            low, high = wilson(right, len(known))
            row = {"accuracy": right / len(known), "low": low, "high": high}
            found[name] = {**row, "agreement": same / len(known), "images": len(known)}
        return found
