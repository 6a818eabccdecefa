"""What the library decides, as text: the proof that a refactoring changed nothing.

    python tests/tools/replay.py before.json    # on the old code
    python tests/tools/replay.py after.json --against before.json  # the differences, exit code 1

For each model of the zoo: the plan, the hash of the folded weights and the output on the CPU in
float32 and bfloat16, and the kernels that the shipped tables choose for four GPUs at batch 1, 32
and 256; for our ResNets the predicted times too. Then the public names with their signatures, and
the help of every command.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from zoo import CASES, Case

import fastres
from fastres import cli
from fastres.backends.kernel_choice import KernelSelector
from fastres.backends.triton import TritonOps
from fastres.frontends.optimize import optimize
from fastres.graph import plan
from fastres.graph.fold import fold_step
from fastres.graph.ir import Conv2d, Linear, attribute
from fastres.perf.forecast import forecast

DTYPES = (torch.float32, torch.bfloat16)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
BATCHES = (1, 32, 256)
CPU = torch.device("cpu")


def digest(tensors: list[Tensor]) -> str:
    """A hash of the tensors' bits, shapes and dtypes."""
    found = hashlib.sha256()
    for t in tensors:
        found.update(f"{tuple(t.shape)} {t.dtype}".encode())
        found.update(t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def of_model(case: Case) -> Iterator[tuple[str, Any]]:
    model, inputs = case.model(), case.inputs()
    for dtype in DTYPES[:1] if case.shell else DTYPES:  # detectors' own steps have no bfloat16
        key = f"{case}, {dtype}"
        fast = optimize(model, dtype=dtype, verify=False)
        with torch.inference_mode():
            output = tree_leaves(fast(*inputs))
        yield f"{key}, plan", fast.plan().to_dict()
        yield f"{key}, weights", digest([b for b in fast.buffers() if b.is_floating_point()])
        yield f"{key}, output", digest([t for t in output if isinstance(t, Tensor)])
    if not case.shell and len(inputs) == 1:
        yield from of_kernels(str(case), model, tuple(inputs[0].shape[1:]))


def of_kernels(name: str, model: torch.nn.Module, image: tuple[int, ...]) -> Iterator[Any]:
    whole = plan.of_module(model)
    folded = [
        fold_step(s.op, lambda path: attribute(model, path), torch.float64)
        for s in whole.steps
        if isinstance(s.op, (Conv2d, Linear))
    ]
    yield f"{name}, folded", digest([t for pair in folded for t in pair if t is not None])
    for architecture in ARCHITECTURES:
        ops = TritonOps(selector=KernelSelector(architecture))
        for batch in BATCHES:
            shapes = whole.shapes((batch, *image))
            for dtype in (torch.float16, torch.float32):
                found = ops.group_steps(whole, shapes, dtype, CPU)
                groups = [
                    f"{group.kernel or 'single'}: {' '.join(s.name for s in group.steps)}; {why}"
                    for group, why in zip(found.groups, found.why, strict=True)
                ]
                yield f"{name}, {architecture}, batch {batch}, {dtype}", groups


def of_predictions() -> Iterator[tuple[str, Any]]:
    for name in ("resnet18", "resnet50"):
        network = fastres.create_model(name).eval()
        for batch in BATCHES:
            rows = forecast(network, (batch, 3, 224, 224), torch.float16)
            yield f"{name}, predicted, batch {batch}", [[r.name, r.what, r.seconds] for r in rows]


def of_api() -> Iterator[tuple[str, Any]]:
    for name in sorted(fastres.__all__):
        value = getattr(fastres, name)
        plain = isinstance(value, type) and issubclass(value, Exception)
        shown = repr(value.__mro__) if plain else str(inspect.signature(value))
        yield f"fastres.{name}", re.sub(r"\bfastres\.(?:\w+\.)*(\w+)", r"\1", shown)


def of_commands() -> Iterator[tuple[str, Any]]:
    from typer.main import get_command
    from typer.testing import CliRunner

    for name in ("", *sorted(get_command(cli.app).commands)):  # type: ignore[attr-defined]
        arguments = [*([name] if name else []), "--help"]
        shown = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "100"})
        yield f"fastres {name} --help", shown.output


def everything(only: str) -> Iterator[tuple[str, Any]]:
    yield from of_api()
    yield from of_commands()
    yield from of_predictions()
    for case in CASES:
        if only in str(case):
            print(case, file=sys.stderr, flush=True)
            yield from of_model(case)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="the JSON file to write")
    parser.add_argument("--against", type=Path, help="an earlier one to compare with")
    parser.add_argument("--only", default="", help="models whose name contains this")
    arguments = parser.parse_args()
    found = json.loads(json.dumps(dict(everything(arguments.only))))
    arguments.output.write_text(json.dumps(found, indent=1))
    if arguments.against is None:
        return 0
    before = json.loads(arguments.against.read_text())
    differ = [key for key in {**before, **found} if before.get(key) != found.get(key)]
    for key in differ:
        print(f"{key}\n  was {before.get(key)}\n  is  {found.get(key)}")
    print(f"{len(differ)} of {len({**before, **found})} entries differ")
    return 1 if differ else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
