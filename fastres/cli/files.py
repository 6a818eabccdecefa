"""The commands that turn a network into a file: convert, export, plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import ERR, OUT, AsJson, Checkpoint, OwnSize, Weights, print_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..frontends.fast_model import FastModel

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A network, e.g. resnet50, a .h5, .keras or fused .safetensors file, or the folder "
        "of a training run.",
    ),
]
Target = Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")]
LARGEST = 2**26  # numbers in one image that is made up for a check


def convert(
    source: Source,
    target: Target,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, float16 or bfloat16: by default the source's own."),
    ] = None,
    size: OwnSize = None,
    weights: Weights = None,
    checkpoint: Checkpoint = None,
    as_json: AsJson = False,
) -> None:
    """Fold and fuse a network and save it, for fastres.load: one .safetensors file, no pickle."""
    from ..files import check_target
    from ..formats.fused_file import SUFFIXES, save

    check_target(target, SUFFIXES)
    fast = _fused(source, dtype, size, weights, checkpoint)
    save(fast, target)
    plan = fast.plan()
    found = {"path": str(target), "fused": len(plan.fused), "left_to_pytorch": len(plan.fallbacks)}
    steps = f"{len(plan.fused)} fused steps, {len(plan.fallbacks)} left to PyTorch"
    _say(found, f"wrote {target}: {steps}", as_json)


def export(
    source: Source,
    target: Target,
    size: OwnSize = None,
    weights: Weights = None,
    checkpoint: Checkpoint = None,
    triton_repo: Annotated[
        bool,
        typer.Option(
            "--triton-repo",
            help="FILE is a model repository of NVIDIA's Triton Inference Server instead.",
        ),
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="Of the model in the repository: by default SOURCE's.")
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(min=1, help="The most images that Triton puts together: by default 32."),
    ] = None,
    triton_backend: Annotated[
        str | None,
        typer.Option(
            help="Triton's: onnxruntime, the default, or python for the kernels of fastres."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a fused network as .onnx, or as .pt2 for PyTorch without fastres, and check the file.

    The batch size stays open; height and width are fixed by --size. With --triton-repo a model of a
    repository is written, its config.pbtxt too; the format is checked, the server is not run.
    """
    from ..formats import triton_repo as triton
    from ..formats.export import check_before
    from ..formats.export import export as write

    if not triton_repo and (name or max_batch or triton_backend):
        raise ValueError("--name, --max-batch and --triton-backend go with --triton-repo")
    backend, most = triton_backend or triton.BACKENDS[0], max_batch or 32
    name = name or Path(source).stem
    if triton_repo:
        triton.check_before(target, name, most, backend)
    else:
        check_before(target)
    fast = _fused(source, None, size, weights, checkpoint)
    images = _images(2, fast, size)
    if triton_repo:
        found = triton.export_repository(
            fast, target, images, name=name, max_batch=most, backend=backend
        )
    else:
        found = write(fast, target, images)
    if triton_repo and backend == "python":
        text = "the container needs fastres"
    elif found.max_abs is None:
        text = "not run: install onnxruntime to have it checked"
    else:
        text = f"{found.checked_by} gives the same logits to {found.max_abs:.1g}"
    _say(found.to_dict(), f"wrote {found.path}; {text}", as_json)


def plot(
    source: Source,
    target: Target,
    unfused: Annotated[bool, typer.Option("--unfused", help="The modules as written.")] = False,
    size: OwnSize = None,
    checkpoint: Checkpoint = None,
    as_json: AsJson = False,
) -> None:
    """Draw a network as .svg, .png or .dot, by the steps that inference runs."""
    from ..batch.network import read_network
    from ..graph.diagram import check_before, plot_model

    check_before(target)
    network = read_network(source, size, checkpoint=checkpoint)
    shape = (1, *image_shape(network, size))
    path = plot_model(network, target, fused=not unfused, input_size=shape)
    _say({"path": str(path)}, f"wrote {path}", as_json)


def image_shape(network: nn.Module, size: int | None) -> tuple[int, int, int]:
    """(C, H, W) of its images: what a Keras file says, else by its first convolution.

    Raises:
        ValueError: a file says of them what no image can be, or there is no convolution.
    """
    own = getattr(network, "input_size", (None, None)) if size is None else (size, size)
    channels = _channels(network)
    sides = tuple(side or 224 for side in own) if isinstance(own, (tuple, list)) else ()
    if len(sides) != 2 or not all(type(v) is int and v > 0 for v in (channels, *sides)):
        raise ValueError(f"the file speaks of {channels} channels and images of size {own!r}")
    if channels * max(sides) ** 2 > LARGEST:
        shape = (channels, *sides)
        raise ValueError(f"images of {shape} are too large to be made up; give a smaller --size")
    if size is not None:
        _refuse_size(network, (channels, size, size))
    return channels, *sides


def _refuse_size(network: nn.Module, shape: tuple[int, int, int]) -> None:
    """Raises ValueError where the network cannot take one image of the size asked for."""
    import torch

    try:
        with torch.inference_mode():
            network(torch.zeros(1, *shape, dtype=getattr(network, "dtype", None)))
    except TypeError:
        return  # several inputs, or bytes: a size says too little of those
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--size {shape[1]} does not fit the network: {reason}") from error


def _images(count: int, network: nn.Module, size: int | None) -> Tensor:
    from ..bench.accuracy import random_images

    channels, height, width = image_shape(network, size)
    images = random_images(count, channels, max(height, width))[0][:, :, :height, :width]
    if getattr(network, "takes_bytes", False):
        return (images * 64 + 128).clamp(0, 255).byte()
    return images


def _fused(
    source: str, dtype: str | None, size: int | None, weights: str | None, checkpoint: Path | None
) -> FastModel:
    """The network, folded in ``dtype`` and compared with its source on images of this size."""
    from ..batch.network import read_network
    from ..bench.accuracy import calibrate_
    from ..bench.run import parse_dtype
    from ..frontends.fast_model import FastModel
    from ..frontends.optimize import optimize
    from ..models.registry import VARIANTS
    from ..models.resnet import ResNet

    kind = None if dtype is None else parse_dtype(dtype)
    network = read_network(source, size, weights, checkpoint)
    if isinstance(network, FastModel):
        if size is not None:
            image_shape(network, size)
        if kind not in (None, network.dtype):
            raise ValueError(f"{source} is folded in {network.dtype} already; got --dtype {dtype}")
        return network
    images = _images(4, network, size)
    if isinstance(network, ResNet) and source in VARIANTS and not (weights or checkpoint):
        ERR.print("note: the parameters are random; give --weights or --checkpoint", markup=False)
        calibrate_(network, images)
    fast = optimize(network, example_input=images, dtype=kind)
    assert isinstance(fast, FastModel)
    return fast


def _channels(network: nn.Module) -> int:
    from torch import nn

    from ..graph.ir import Conv2d
    from ..graph.plan import Plan

    stated = getattr(network, "input_channels", None)
    if isinstance(stated, int):
        return stated
    traced = getattr(network, "traced", None)
    if isinstance(traced, Plan):
        steps = (step.op for step in traced.steps)
        return next((op.in_channels for op in steps if isinstance(op, Conv2d)), 0)
    return next((m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d)), 0)


def _say(found: dict[str, object], text: str, as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        OUT.print(text, markup=False)
