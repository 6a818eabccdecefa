"""The command that measures which kernels are the fastest on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import ERR, OUT, AsJson, DeviceName, Size, following, numbers, print_json, table

if TYPE_CHECKING:
    import torch

    from ..perf.autotune import Candidate, Tuned


def tune(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Networks.")],
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,32,256",
    dtype: Annotated[
        str, typer.Option(help="Of float16, bfloat16, float32, separated by commas.")
    ] = "float16",
    size: Size = 224,
    device: DeviceName = "auto",
    cache: Annotated[
        Path | None,
        typer.Option(
            help="The file to keep results in; by default FASTRES_TUNED or the user's cache folder."
        ),
    ] = None,
    dry: Annotated[bool, typer.Option("--dry", help="List what would be measured.")] = False,
    as_json: AsJson = False,
) -> int:
    """Measure the kernels that could serve each piece of a network, for the planner to choose by.

    Wrong answers are reported, get no time and end with exit code 1. What is found holds for this
    GPU and these versions, and for batch sizes within a factor of two.
    """
    from ..backends.kernel_choice import cache_path
    from ..bench.run import parse_device, parse_dtype
    from ..files import check_target
    from ..models.pretrained import load_network
    from ..perf.autotune import tune as run

    kinds = [parse_dtype(name) for name in dtype.split(",")]
    batches = numbers(batch, "--batch")
    if min(batches) < 1:
        raise ValueError(f"--batch takes sizes of at least 1; got {batch!r}")
    if not dry:
        check_target(cache or cache_path(), makes_folder=True)
    networks = {name: load_network(name, weights=None, checkpoint=None).eval() for name in models}
    shapes = {
        name: [(n, network.conv1.in_channels, size, size) for n in batches]
        for name, network in networks.items()
    }
    if dry:
        return _list(
            [t for name in models for t in _trials(networks[name], shapes[name], kinds)], as_json
        )
    where = parse_device(device)
    found: list[Tuned] = []
    with following() as follow:
        for name, network in networks.items():
            found.append(
                run(
                    network.to(where),
                    shapes[name],
                    kinds,
                    where,
                    cache=cache,
                    progress=lambda title, name=name: follow(f"{name}, {title}"),  # type: ignore[misc]
                )
            )
    if as_json:
        print_json([result.to_dict() for result in found])
    else:
        for result in found:
            _show(result)
    return 1 if any(result.wrong for result in found) else 0


def _trials(
    network: torch.nn.Module, shapes: list[tuple[int, int, int, int]], kinds: list[torch.dtype]
) -> list[Candidate]:
    import torch

    from ..backends.triton import TritonOps
    from ..graph.plan import of_module
    from ..perf.autotune import candidates_of

    whole, ops = of_module(network.eval()), TritonOps(cudnn=True)
    found = [
        candidate
        for kind in kinds
        for shape in shapes
        for candidate in candidates_of(whole, shape, ops, kind, torch.device("cpu"))
    ]
    return [candidate for candidate in found if len(candidate.kernels) > 1]


def _list(candidates: list[Candidate], as_json: bool) -> int:
    if as_json:
        print_json([candidate.to_dict() for candidate in candidates])
        return 0
    rows = [
        (" + ".join(row["work"]), str(row["batch"]), row["dtype"], ", ".join(row["kernels"]))
        for row in (candidate.to_dict() for candidate in candidates)
    ]
    OUT.print(table(("piece", "batch", "dtype", "kernels"), rows, justify="left"))
    OUT.print(f"{len(rows)} pieces to choose for")
    return 0


def _show(result: Tuned) -> None:
    """Times in microseconds, the fastest first."""
    rows = []
    for candidate, found in result.results:
        if len(candidate.kernels) > 1 and found.seconds:
            order = sorted(found.seconds, key=found.seconds.__getitem__)
            times = ", ".join(f"{name} {found.seconds[name] * 1e6:.1f}" for name in order)
            row = candidate.to_dict()
            rows.append((" + ".join(row["work"]), str(row["batch"]), row["dtype"], times))
    OUT.print(table(("piece", "batch", "dtype", "us"), rows, justify="left"))
    for sentence in result.wrong:
        OUT.print(f"excluded: {sentence}", style="red", markup=False)
    ERR.print(f"kept in {result.path} for {result.machine}", markup=False)
