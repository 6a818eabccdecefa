"""The commands that look at a network or at this machine: verify, summary, plan, roofline, env."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

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
    print_json,
    table,
)

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ..forecast import Forecast
    from ..resnet import ResNet


def verify(
    model: ModelName,
    dtype: Dtype = "float32",
    batch: Annotated[int, typer.Option(min=1, help="Images to compare on.")] = 8,
    size: Size = 224,
    device: DeviceName = "auto",
    backend: Backend = "auto",
    weights: Weights = None,
    checkpoint: Checkpoint = None,
    as_json: AsJson = False,
) -> int:
    """Measure how far the optimised network's logits are from PyTorch's; exit code 1 if too far.

    Each convolution and linear step is judged on its own inputs as well. Without weights or a
    checkpoint the parameters are random, with batch norms that matter.
    """
    from ..bench import Plain, calibrate_, parse_device, parse_dtype, random_images
    from ..optimize import optimize
    from ..verify import verify as compare
    from ..verify import verify_steps

    where, kind = parse_device(device), parse_dtype(dtype)
    network = _network(model, weights, checkpoint)
    images = random_images(batch, network.conv1.in_channels, size)[0]
    if weights is None and checkpoint is None:
        calibrate_(network)
    network, images = network.to(where), images.to(where)
    fast = optimize(network, dtype=kind, backend=backend, verify=False)
    rounded = Plain(copy.deepcopy(network)).to(kind)
    verdict = compare(rounded, fast, images.to(kind))
    wrong = [s for s in verify_steps(fast.executor(), network, [images.to(kind)]) if not s.ok]
    ok = verdict.ok and not wrong
    found = verdict.to_dict() | {"ok": ok, "wrong_steps": [asdict(step) for step in wrong]}
    if as_json:
        print_json({"model": model, "device": str(where), **found})
        return 0 if ok else 1
    OUT.print("[green]right[/]" if ok else "[red]WRONG[/]")
    OUT.print(table(("", ""), [(key, _text(value)) for key, value in found.items()], "left"))
    return 0 if ok else 1


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
    from ..describe import summary as describe
    from ..fast_model import FastModel
    from .files import image_shape, read_network

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
    from ..bench import parse_device, parse_dtype
    from ..optimize import optimize

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
    from ..bench import parse_device, parse_dtype
    from ..probes import measured_ceilings
    from ..roofline import FUSIONS, H200
    from ..roofline import roofline as floors

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
        OUT.print(table(("from step", "served by", "floor us", "predicted us", "why"), lines))


def _planned(network: ResNet, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Forecast, ...]:
    """The kernels that the planner chooses; none in float32 or where Triton is missing."""
    from ..errors import BackendError
    from ..forecast import forecast

    if dtype.itemsize != 2:
        return ()
    try:
        return forecast(network.eval(), shape, dtype)
    except BackendError:
        return ()


def env(as_json: AsJson = False) -> None:
    """Versions, processors and the switches of torch that change numbers or speed."""
    from ..environment import environment
    from ..report_html import flatten

    found = environment()
    if as_json:
        print_json(found.to_dict())
    else:
        OUT.print(table(("", ""), flatten(found.to_dict()), justify="left"))


def _network(model: str, weights: str | None, checkpoint: Path | None) -> ResNet:
    from ..pretrained import load_network

    return load_network(model, weights=weights, checkpoint=checkpoint)


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
