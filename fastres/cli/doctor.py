"""The command for bug reports: what is here, do the kernels work, how fast is a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import AsJson, DeviceName, following
from .runs import deliver


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
