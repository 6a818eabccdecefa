"""The commands that look at a network or a machine: verify, summary, plan, roofline, doctor."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import (
    OUT,
    AsJson,
    Backend,
    Checkpoint,
    DeviceName,
    Dtype,
    ModelName,
    OwnSize,
    Size,
    Weights,
    following,
    print_json,
    table,
)
from .quantize import Tested, verify_file
from .runs import deliver

if TYPE_CHECKING:
    import torch

    from ..models.resnet import ResNet
    from ..perf.forecast import Forecast


def verify(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A network, e.g. resnet50, a .h5, .keras or 8-bit file, or the folder of a run.",
        ),
    ],
    dtype: Dtype = "float32",
    batch: Annotated[int, typer.Option(min=1, help="Images to compare on.")] = 8,
    size: OwnSize = None,
    device: DeviceName = "auto",
    backend: Backend = "auto",
    weights: Weights = None,
    checkpoint: Checkpoint = None,
    images: Annotated[
        list[Path] | None,
        typer.Option("--images", help="A photograph for a Keras file, as pixels 0 to 255; repeat."),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Of an 8-bit file: images, as `quantize` takes.")
    ] = None,
    test: Tested = 1_000,
    as_json: AsJson = False,
) -> int:
    """Measure how far the optimised network's logits are from PyTorch's; exit code 1 if too far.

    Each convolution and linear step is judged on its own inputs as well. Without weights or a
    checkpoint the parameters are random, with batch norms that matter. A Keras file is compared
    with Keras itself, which must be installed and loads it with safe_mode=True; a file of
    ``fastres quantize`` with its definition in float64, on the images of --data.
    """
    from ..batch.network import FUSED, KERAS

    if Path(model).suffix == FUSED:
        return verify_file(model, data, test, size, as_json)
    if Path(model).suffix in KERAS:
        if dtype != "float32" or weights or checkpoint:
            raise ValueError(f"{model} has weights of its own and is compared in float32")
        return _verify_keras(model, batch, size, device, backend, images, as_json)
    if images:
        raise ValueError(f"--images go with a Keras file; got {model!r}")
    from ..bench.accuracy import calibrate_, random_images
    from ..bench.baselines import Plain
    from ..bench.run import parse_device, parse_dtype
    from ..frontends.optimize import optimize
    from ..models.pretrained import is_run
    from ..runtime.verify import verify as compare
    from ..runtime.verify_steps import verify_steps

    where, kind = parse_device(device), parse_dtype(dtype)
    network = _network(model, weights, checkpoint)
    inputs = random_images(batch, network.conv1.in_channels, size or 224)[0]
    if weights is None and checkpoint is None and not is_run(model):
        calibrate_(network)
    network, inputs = network.to(where), inputs.to(where)
    fast = optimize(network, dtype=kind, backend=backend, verify=False)
    rounded = Plain(copy.deepcopy(network)).to(kind)
    verdict = compare(rounded, fast, inputs.to(kind))
    wrong = [s for s in verify_steps(fast.executor(), network, [inputs.to(kind)]) if not s.ok]
    ok = verdict.ok and not wrong
    found = verdict.to_dict() | {"ok": ok, "wrong_steps": [asdict(step) for step in wrong]}
    if as_json:
        print_json({"model": model, "device": str(where), **found})
        return 0 if ok else 1
    OUT.print("[green]right[/]" if ok else "[red]WRONG[/]")
    OUT.print(table(("", ""), [(key, _text(value)) for key, value in found.items()], "left"))
    return 0 if ok else 1


def _verify_keras(
    path: str,
    batch: int,
    size: int | None,
    device: str,
    backend: str,
    photographs: list[Path] | None,
    as_json: bool,
) -> int:
    from ..bench.accuracy import random_images
    from ..bench.run import parse_device
    from ..formats.keras_check import compare_with_keras, input_shapes

    shapes = input_shapes(path, size, batch)
    if photographs:
        batches = [_pixels(photographs, shape[1:]) for shape in shapes[:1]]
    else:
        batches = [
            random_images(n, channels, max(height, width))[0][:, :, :height, :width]
            for n, channels, height, width in shapes
        ]
    where = parse_device(device)
    version, found = compare_with_keras(path, batches, device=where, backend=backend)
    ok = all(one.ok for one in found)
    if as_json:
        rows = [asdict(one) for one in found]
        print_json({"model": path, "device": str(where), "keras": version, "ok": ok, "runs": rows})
        return int(not ok)
    OUT.print("[green]right[/]" if ok else "[red]WRONG[/]", f"against Keras {version}")
    numbers = [(one.max_abs, one.allowed, one.scale) for one in found]
    lines = [
        (one.what, "x".join(map(str, one.shape)), *map(_text, three), "" if one.ok else "WRONG")
        for one, three in zip(found, numbers, strict=True)
    ]
    OUT.print(table(("run", "images", "largest error", "allowed", "largest output", ""), lines))
    return int(not ok)


def _pixels(paths: list[Path], shape: tuple[int, int, int]) -> torch.Tensor:
    """Photographs as Keras' own loaders give them: resized, float32, from 0 to 255."""
    import numpy as np
    import torch

    from ..models.classify import read_image

    channels, height, width = shape
    if channels not in (1, 3):
        raise ValueError(f"--images have 3 channels or, in grey, 1; the model takes {channels}")

    def pixels(image: Any) -> torch.Tensor:
        image = image.convert("L" if channels == 1 else "RGB").resize((width, height))
        return torch.from_numpy(np.array(image, "float32")).reshape(height, width, channels)

    return torch.stack([read_image(path, pixels) for path in paths]).permute(0, 3, 1, 2)


def summary(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A network, e.g. resnet50, or a .h5 or .keras file."),
    ],
    size: OwnSize = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size of the table.")] = 1,
    checkpoint: Checkpoint = None,
    as_json: AsJson = False,
) -> None:
    """Modules, shapes, parameters and operations of the network before it is folded."""
    from ..batch.network import read_network
    from ..frontends.fast_model import FastModel
    from ..models.summary import summary as describe
    from .files import image_shape

    network = read_network(source, size, checkpoint=checkpoint)
    if isinstance(network, FastModel):
        raise ValueError(f"{source} is fused: its modules are gone; summarise its source")
    found = describe(network, (batch, *image_shape(network, size)))
    if as_json:
        print_json({"model": source, **found.to_dict()})
        return
    typer.echo(found.table)
    typer.echo(f"{found.flop / 1e9:.2f} GFLOP, a multiply-add counted as two")


def plan(
    model: ModelName,
    dtype: Dtype = "float32",
    device: DeviceName = "auto",
    backend: Backend = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Images that kernels are chosen for.")] = 1,
    size: Size = 224,
    checkpoint: Checkpoint = None,
    as_json: AsJson = False,
) -> None:
    """The steps that inference runs: what is fused, what is left to PyTorch and why."""
    from ..bench.run import parse_device, parse_dtype
    from ..frontends.optimize import optimize

    network = _network(model, None, checkpoint).to(parse_device(device))
    fast = optimize(network, dtype=parse_dtype(dtype), backend=backend, verify=False)
    found = fast.executor().plan_for((batch, network.conv1.in_channels, size, size))
    if as_json:
        print_json({"model": model, **found.to_dict()})
    else:
        typer.echo(str(found))


def roofline(
    model: ModelName,
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = 256,
    size: Size = 224,
    dtype: Dtype = "float16",
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine instead of taking an H200.")
    ] = False,
    device: DeviceName = "auto",
    as_json: AsJson = False,
) -> None:
    """The least time that each step and the whole can take, for every way of fusing them.

    Needs no GPU: operations and bytes are counted, and the ceilings are an H200's or, with
    --measure, this machine's.
    """
    from ..bench.run import parse_device, parse_dtype
    from ..perf.ceilings import measured_ceilings
    from ..perf.roofline import FUSIONS, H200
    from ..perf.roofline import roofline as floors

    kind = parse_dtype(dtype)
    ceilings = measured_ceilings(parse_device(device), kind) if measure else H200
    network = _network(model, None, None)
    shape = (batch, network.conv1.in_channels, size, size)
    found = {
        fusion: floors(network, shape, fusion=fusion, itemsize=kind.itemsize, ceilings=ceilings)
        for fusion in ("none", *FUSIONS)
    }
    planned = _planned(network, shape, kind)
    if as_json:
        floors_of = {n: f.to_dict() for n, f in found.items()}
        as_planned = {"as planned": [asdict(kernel) for kernel in planned]}
        print_json({"model": model, "shape": shape} | floors_of | as_planned)
        return
    steps = found["epilogue per convolution"].kernels
    rows = [
        (k.name, k.what, f"{k.flop / 1e9:,.2f}", f"{k.bytes / 1e6:,.1f}", f"{k.seconds * 1e6:,.1f}")
        + (k.bound,)
        for k in steps
    ]
    OUT.print(table(("step", "what", "GFLOP", "MB", "floor us", "bound by"), rows))
    OUT.print(
        f"\n{ceilings.name}: {ceilings.bytes_per_second / 1e12:.3g} TB/s, "
        f"{ceilings.flop_per_second / 1e12:.3g} TFLOP/s; batch {batch}",
        markup=False,
    )
    whole = [
        (n, str(len(f.kernels)), f"{f.seconds * 1e6:,.0f}", f"{f.images_per_second:,.0f}")
        for n, f in found.items()
    ]
    OUT.print(table(("fused", "kernels", "floor us", "images/s at most"), whole))
    if planned:
        OUT.print("\nAs planned for an H200, and what the model of tiles and waves predicts")
        lines = [
            (k.name, k.what, f"{k.floor * 1e6:,.1f}", f"{k.seconds * 1e6:,.1f}", k.why)
            for k in planned
        ]
        OUT.print(table(("from step", "kernel", "floor us", "predicted us", "why"), lines))


def _planned(network: ResNet, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Forecast, ...]:
    """The kernels that the planner chooses; none in float32 or where Triton is missing."""
    from ..errors import BackendError
    from ..perf.forecast import forecast

    if dtype.itemsize != 2:
        return ()
    try:
        return forecast(network.eval(), shape, dtype)
    except BackendError:
        return ()


def env(as_json: AsJson = False) -> None:
    """Versions, processors and the switches of torch that change numbers or speed."""
    from ..bench.html import flatten
    from ..perf.environment import environment

    found = environment()
    if as_json:
        print_json(found.to_dict())
    else:
        OUT.print(table(("", ""), flatten(found.to_dict()), justify="left"))


def doctor(
    model: Annotated[str, typer.Option(help="The network to time on a GPU.")] = "resnet50",
    target: Annotated[
        str | None,
        typer.Option(help="Compile for this GPU, such as sm_90 or gfx942, and run nothing."),
    ] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help="Only this kernel, such as conv2d; repeat.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Time torch.compile too; minutes without a cache.")
    ] = False,
    device: DeviceName = "auto",
    output: Annotated[
        Path | None, typer.Option(help="Also write it here: .json, .md or .html.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Say what was found, check each kernel on whole numbers, time a network; for a bug report.

    A kernel that fails is named with the cause and what helps, and the exit code is 1.
    """
    from ..bench.doctor import doctor as run
    from ..bench.report import check_output
    from ..bench.run import parse_device

    if output:
        check_output(output)
    where = parse_device("cpu" if target else device)
    with following() as follow:
        found = run(model, where, target, kernel or (), compiled, follow)
    return deliver(found, as_json, [output] if output else [])


def _network(model: str, weights: str | None, checkpoint: Path | None) -> ResNet:
    from ..models.pretrained import load_network

    return load_network(model, weights=weights, checkpoint=checkpoint)


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
