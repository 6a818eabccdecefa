"""The ``fastres`` command: it parses, calls the library and prints; nothing is computed here.

Exit codes: 0 all is well, 1 a check failed (a wrong answer; no speed is given for it), 2 a mistake
in the command or its files, said in one line, 130 interrupted, 143 ended by SIGTERM.
FASTRES_TRACEBACK=1 shows where a mistake was noticed.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, NoReturn

import typer

from ..errors import FastresError, WeightsError
from ..files import exiting_on_signals
from ..perf.host_memory import keep_memory
from . import batch as batching
from . import files, models, runs
from . import quantize as quantizing
from . import serve as serving
from . import train as training
from . import tune as tuning
from .console import ERR

USER_ERRORS = (FastresError, ValueError, TypeError, RuntimeError, OSError)

app = typer.Typer(
    name="fastres",
    help="ResNets from PyTorch, folded, fused and checked.",
    epilog="Exit codes: 0 all is well; 1 a check failed; 2 a mistake in the command or its files; "
    "130 interrupted; 143 ended by SIGTERM.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from ..version import __version__

        typer.echo(f"fastres {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


COMMANDS: dict[str, tuple[Callable[..., int | None], str]] = {
    "demo": (runs.demo, "fastres demo --report report.html"),
    "bench": (runs.bench, "fastres bench resnet18 resnet50 --batch 1,8 --dtype float32,bfloat16"),
    "verify": (models.verify, "fastres verify resnet50 --dtype bfloat16 --batch 4"),
    "classify": (runs.classify, "fastres classify cat.jpg dog.jpg --model resnet50 --top 5"),
    "batch": (batching.batch, "fastres batch photos labels --model resnet50 --top 5"),
    "summary": (models.summary, "fastres summary resnet50 --size 224"),
    "plan": (models.plan, "fastres plan resnet50 --json"),
    "roofline": (models.roofline, "fastres roofline resnet50 --batch 256"),
    "tune": (tuning.tune, "fastres tune resnet50 --batch 1,32,256 --dtype float16"),
    "train": (training.train, "fastres train fashion-mnist:DIR --model resnet18 --epochs 10"),
    "quantize": (
        quantizing.quantize,
        "fastres quantize resnet50 --checkpoint w.pth --data DIR -o int8.safetensors",
    ),
    "convert": (files.convert, "fastres convert resnet50.h5 fused.safetensors"),
    "export": (files.export, "fastres export resnet50 resnet50.onnx --checkpoint resnet50.pth"),
    "serve": (serving.serve, "fastres serve resnet50 --port 8000"),
    "plot": (files.plot, "fastres plot resnet50 resnet50.svg --size 224"),
    "doctor": (models.doctor, "fastres doctor --output doctor.json"),
    "env": (models.env, "fastres env --json"),
}
for _name, (_command, _example) in COMMANDS.items():
    app.command(_name, epilog=f"Example: {_example}")(_command)


reports = typer.Typer(help="Compare reports, and training runs.")
reports.command("compare", epilog="Example: fastres report compare old.json new.json")(
    runs.compare_reports
)
reports.command("runs", epilog="Example: fastres report runs with without --plot both.png")(
    training.compare_runs
)
app.add_typer(reports, name="report")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line, print what it has to say, return its exit code."""
    try:
        code = app(args=arguments, prog_name="fastres", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        ERR.print("interrupted")
        return 130
    except Exception as error:
        # click's own errors, which typer may carry under another name, say it in format_message.
        usage = getattr(error, "format_message", None)
        if os.environ.get("FASTRES_TRACEBACK") or not (usage or isinstance(error, USER_ERRORS)):
            raise
        message = one_line(usage() if usage else str(error))
        if isinstance(error, WeightsError):
            message += " (here: with --checkpoint FILE)"
        ERR.print(f"error: {message}", markup=False)
        return 2
    return int(code or 0)


def one_line(message: str) -> str:
    """A message with its lines joined."""
    lines = [line.strip() for line in message.strip().splitlines()]
    return "; ".join(line for line in lines if line) or "no further message"


def _warned(message: Warning | str, *_: object) -> None:
    """A warning in one line, without the place in our source that it comes from."""
    ERR.print(f"warning: {one_line(str(message))}", markup=False)


def main() -> NoReturn:
    """The entry point."""
    keep_memory()
    warnings.showwarning = _warned  # type: ignore[assignment]
    with exiting_on_signals():
        sys.exit(run())
