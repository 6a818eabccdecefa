"""Provoking errors: the list of cases, what each says, and which ``raise`` of fastres said it."""

from __future__ import annotations

import ast
import os
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import fastres

ROOT = Path(__file__).parents[3]
SNAPSHOT = Path(__file__).with_name("snapshot.txt")
CASES: dict[str, Callable[[], Any]] = {}
"""By name; a case runs in an empty folder of its own."""

# What other libraries say, and what differs from machine to machine.
NORMALISED = (
    (r"port \d{5} of", "port PORT of"),
    (r"cannot be imported \(.*?\);", "cannot be imported (REASON);"),
    (r"(truncated or not a (?:checkpoint|Keras model)) \(.*\)", r"\1 (REASON)"),
    (r"(cannot read image '[^']*'): (?!there is no).*", r"\1: REASON"),
    (r"(is not JSON): .*", r"\1: REASON"),
    (r"(needs the package triton): .*", r"\1: REASON"),
    (r"torch sees \d+ CUDA devices", "torch sees N CUDA devices"),
    (r"(not what was asked for): .*?;", r"\1: REASON;"),
    (r"(PyTorch cannot export model to \S+): .*", r"\1: REASON"),
    (r"(could not be loaded|not a plan: \w+): .*", r"\1: REASON"),
    (r"(is no idx file of bytes|cannot read \S*set\.npz|last\.safetensors): .*", r"\1: REASON"),
    (r"(does not describe a fused model): .*", r"\1: REASON"),
    (r"(does not describe a Keras model) \(.*\)", r"\1 (REASON)"),
    (r"(cannot get weights from \S+): .*?;", r"\1: REASON;"),
    (r"(error|allowed) \d\S*", r"\1 NUMBER"),
    (r"RMS error \S+", "RMS error NUMBER"),
    (r" 0x[0-9a-f]+", " ADDRESS"),
    (r"\d+\.\d+( dB|%)", r"NUMBER\1"),
    (r"the worst steps (.*?) are .*: leave", r"the worst steps \1 are STEPS: leave"),
    (r"keep=\(.*?\)", "keep=(STEPS)"),
)


@dataclass(frozen=True)
class Raised:
    """What a case said, and the places in fastres that raised, as (file, line)."""

    text: str
    places: frozenset[tuple[str, int]] = field(default_factory=frozenset)


def case(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Enter a function among the cases."""

    def enter(provoke: Callable[[], Any]) -> Callable[[], Any]:
        add(name, provoke)
        return provoke

    return enter


def add(name: str, provoke: Callable[[], Any]) -> None:
    assert name not in CASES, name
    CASES[name] = provoke


def provoke_all() -> dict[str, Raised]:
    """By case: what it said. A case that raises nothing is an error."""
    return {name: provoke(name) for name in CASES}


def provoke(name: str) -> Raised:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chdir(folder)
        torch.manual_seed(0)
        try:
            said = CASES[name]()
        except Exception as error:
            text = f"{type(error).__name__}: {normalised(str(error), folder)}"
            return Raised(text, frozenset(places(error)))
        finally:
            os.chdir(before)
    if not isinstance(said, Raised):
        raise AssertionError(f"{name}: nothing was raised")
    return Raised(normalised(said.text, folder), said.places)


def normalised(text: str, folder: str) -> str:
    """The text without folders, reasons of other libraries and figures that vary."""
    text = text.replace(os.path.realpath(folder), "FOLDER").replace(folder, "FOLDER")
    text = text.replace(torch.hub.get_dir(), "HUB")
    for pattern, replacement in NORMALISED:
        text = re.sub(pattern, replacement, text)
    return text


def places(error: BaseException | None) -> Iterator[tuple[str, int]]:
    """The lines of fastres that an error passed through, and those that led to it."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        yield from ((_module(f.filename), f.lineno or 0) for f in frames if _module(f.filename))
        error = error.__cause__ or error.__context__


def _module(filename: str) -> str:
    """The path of a module of fastres below its folder, the kernels' left out, or ``""``."""
    package = Path(fastres.__file__).parent
    path = Path(filename)
    inside = package in path.parents and "kernels" not in path.parts
    return path.relative_to(package).as_posix() if inside else ""


@dataclass(frozen=True)
class Site:
    """A ``raise`` statement: its module, function, what it raises, and its lines."""

    module: str
    function: str
    raises: str
    lines: range

    def __str__(self) -> str:
        return f"{self.module} {self.function} {self.raises}"


def sites() -> Iterator[Site]:
    """The raise statements of fastres, those that pass on what was caught left out."""
    for path in sorted((ROOT / "fastres").rglob("*.py")):
        module = path.relative_to(ROOT / "fastres").as_posix()
        if not module.startswith("kernels/"):
            yield from _sites(module, ast.parse(path.read_text()), "")


def _sites(module: str, node: ast.AST, function: str) -> Iterator[Site]:
    for inner in ast.iter_child_nodes(node):
        name = function
        if isinstance(inner, ast.FunctionDef | ast.ClassDef):
            name = f"{function}.{inner.name}".lstrip(".")
        elif isinstance(inner, ast.Raise) and inner.exc is not None:
            raised = inner.exc.func if isinstance(inner.exc, ast.Call) else inner.exc
            lines = range(inner.lineno, (inner.end_lineno or inner.lineno) + 1)
            yield Site(module, function, ast.unparse(raised), lines)
        yield from _sites(module, inner, name)


UNREACHABLE = {
    "Unavailable": "the report lists the baseline with this as its reason: test_baselines.py",
    "_Leave": "the graph is left to PyTorch with this as the reason: test_compile_backend.py",
    "typer.Exit": "how --version ends",
    "frontends/dynamo.py _Folded._compare VerificationError": "a warning: test_compile_backend.py",
    "bench/baselines.py FasterOfTwo.conv RuntimeError": "of a baseline, during a capture",
    "formats/fused_file.py _encode_modules ValueError": "torch.fx makes it a constant",
    "formats/export.py export interrupt": "Ctrl-C or a signal, passed on: test_targets.py",
    "backends/fused.py FusedKernel.run NotImplementedError": "each kernel has a run of its own",
    "frontends/fast_shell.py _build_parts TraceError": "caught two lines below",
    "train/trainer.py Trainer._end_if_signalled KeyboardInterrupt": "of a signal: test_resume.py",
    "train/trainer.py Trainer._end_if_signalled SystemExit": "of a signal: test_resume.py",
}
"""By what is raised, or by the place: why no user meets this ``raise``."""


def reachable(site: Site) -> bool:
    return site.raises not in UNREACHABLE and str(site) not in UNREACHABLE


def as_text(found: dict[str, Raised]) -> str:
    """The snapshot: a case's name, and indented what it says."""
    parts = []
    for name, raised in found.items():
        said = raised.text.replace("\n", "\n    ")
        parts.append(f"{name}\n    {said}\n")
    return "\n".join(parts)


def read_snapshot() -> dict[str, str]:
    """By case: what it said when the snapshot was written."""
    found = {}
    for block in SNAPSHOT.read_text().rstrip("\n").split("\n\n"):
        name, *lines = block.split("\n")
        found[name] = "\n".join(line.removeprefix("    ") for line in lines)
    return found


def without(module: str) -> Any:
    """A context in which ``import module`` fails."""
    return mock.patch.dict("sys.modules", {module: None})
