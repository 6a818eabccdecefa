"""The command that answers over HTTP: serve."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from .console import ERR, OUT, AsJson, Checkpoint, DeviceName, Labels, Published, Top, print_json

SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0}
BYTES = {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20}


def serve(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A network, e.g. resnet50, a fused .safetensors file, or the folder of a "
            "training run.",
        ),
    ],
    weights: Published = "DEFAULT",
    checkpoint: Checkpoint = None,
    labels: Labels = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    device: DeviceName = "auto",
    top: Top = 5,
    host: Annotated[
        str, typer.Option(help="127.0.0.1 for this machine, 0.0.0.0 or :: for everybody.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="From 1024 on.")] = 8000,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes: by default one for each core, or each GPU."),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images at once: by default 1 on a CPU, 32 on a GPU."),
    ] = None,
    batch_wait: Annotated[str, typer.Option(help="How long a batch waits to be filled.")] = "2ms",
    deadline: Annotated[str, typer.Option(help="After so long a request gets 408 or 504.")] = "10s",
    max_queue: Annotated[
        int, typer.Option(min=1, help="Requests at once; one more gets 503.")
    ] = 128,
    max_body: Annotated[
        str, typer.Option(help="Size of a request; a larger one gets 413.")
    ] = "20MB",
    no_page: Annotated[bool, typer.Option("--no-page", help="Without the page /ui.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer photographs over HTTP with their labels, until Ctrl-C or SIGTERM.

    POST an image to /predict; a browser finds a page at /ui, Prometheus /metrics, a load balancer
    /health. What is under way when the end comes is answered.
    """
    from ..serving import serve as run

    seconds = {
        name: quantity(text, f"--{name.replace('_', '-')}", SECONDS, "a time such as 10s or 2ms")
        for name, text in (("batch_wait", batch_wait), ("deadline", deadline))
    }
    body = int(quantity(max_body, "--max-body", BYTES, "a size such as 20MB"))
    ERR.print(f"note: loading {model}", markup=False)

    def ready(state: dict[str, Any]) -> None:
        if as_json:
            return print_json(state)
        what = f"{state['dtype']}, {state['device']}, {state['workers']} workers"
        OUT.print(f"{model} ({what}) answers POST {state['url']}/predict", markup=False)
        if not no_page:
            OUT.print(f"the page is {state['url']}/ui", markup=False)
        return OUT.print("Ctrl-C ends it")

    run(
        model,
        weights=weights,
        checkpoint=checkpoint,
        labels=labels,
        dtype=dtype,
        device=device,
        top=top,
        host=host,
        port=port,
        workers=workers,
        max_batch=max_batch,
        max_queue=max_queue,
        max_body=body,
        page=not no_page,
        ready=ready,
        **seconds,
    )


def quantity(text: str, option: str, units: Mapping[str, float], wanted: str) -> float:
    """``"20MB"`` or ``"2ms"`` as a number. Raises ValueError naming the option."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text.strip())
    if found is None or found[2] not in units:
        raise ValueError(f"{option} takes {wanted} ({', '.join(units)}); got {text!r}")
    return float(found[1]) * units[found[2]]
