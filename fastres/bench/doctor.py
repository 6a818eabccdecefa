"""What a bug report needs: the machine, each kernel checked, the network beside PyTorch."""

from __future__ import annotations

import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..backends.kernel_choice import architecture_of, machine
from ..backends.kernel_table import family
from ..backends.select import select_ops
from ..errors import VerificationError, one_line
from ..frontends.optimize import optimize
from ..models.registry import create_model
from ..perf.timing import Progress
from .accuracy import calibrate_, random_images
from .presets import Spec, preset
from .report import Report
from .results import Check
from .run import run

COMPILED = "compile CUDA graphs"


def doctor(
    model: str,
    device: torch.device,
    target: str | None = None,
    kernels: Sequence[str] = (),
    compiled: bool = False,
    follow: Callable[[str], Progress] | None = None,
) -> Report:
    """Look at the machine, check each kernel of those named, or of all, and time the network.

    With ``target``, such as ``"sm_90"``, kernels are compiled for that GPU instead. Without a GPU
    they run where TRITON_INTERPRET=1, and nothing is timed. ``compiled`` times torch.compile too,
    which takes minutes where it finds no cache.

    Raises:
        ValueError: an unknown model, target or kernel.
    """
    with torch.device("meta"):
        create_model(model)
    tell, on_gpu = follow("kernels") if follow else None, device.type == "cuda"
    found = list(_machine(device))
    if target:
        found += _outcomes("compile_kernels", target, kernels, tell)
    elif on_gpu or os.environ.get("TRITON_INTERPRET") == "1":
        found += _outcomes("check_kernels", device, kernels, tell)
    if not target and not on_gpu:
        found += _cpu()
    report = Report.now("fastres doctor", checks=tuple(found))
    if target or not on_gpu:
        return report
    contenders = ("cuDNN fused", *((COMPILED,) if compiled else ()))
    specs = [Spec(model, n, dtypes=("float16",), baselines=contenders) for n in (1, 32)]
    timed = run(specs, device, preset("quick", "cuda").method, progress=follow)
    return replace(timed, title=report.title, checks=(*report.checks, *timed.checks))


def _outcomes(function: str, *args: Any) -> Iterator[Check]:
    """The checks of kernels; one that failed where Triton cannot be imported."""
    try:
        judge = getattr(import_module("fastres.perf.kernel_check"), function)
        yield from (Check(*outcome) for outcome in judge(*args))
    except ImportError as error:
        yield Check("triton", False, f"cannot be imported: {one_line(error)}")


def _machine(device: torch.device) -> Iterator[Check]:
    """What was found, and what kernels on a GPU would miss."""
    needed = device.type == "cuda"
    yield Check("versions", True, machine(device))
    yield Check("GPU", True, _gpu(device) if needed else "none that torch sees")
    for name, look, remedy in (
        ("C compiler", _compiler, "install gcc or clang"),
        ("Python.h", _header, "install Python's headers, such as python3-dev"),
        ("libcuda", _libcuda, "let ldconfig find libcuda.so, or set TRITON_LIBCUDA_PATH"),
        ("Triton's cache", _cache, "set TRITON_CACHE_DIR to a folder that can be written"),
    ):
        try:
            place = look()
        except Exception:  # Triton looks for libcuda in ways that fail variously
            place = ""
        missing = f"none; {remedy}" if needed else "none; only a GPU needs it"
        yield Check(name, bool(place) or not needed, place or missing)


def _gpu(device: torch.device) -> str:
    found, name = torch.cuda.get_device_properties(device), architecture_of(device)
    table = f"kernels by the table of {family(name)}" if family(name) else "no table: cuDNN runs"
    size = f"{found.multi_processor_count} SMs, {found.total_memory / 2**30:.0f} GiB"
    return f"{name}, {size}; {table}"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang")


def _header() -> str:
    return str(Path(sysconfig.get_paths()["include"], "Python.h").resolve(strict=True))


def _libcuda() -> str:
    return ", ".join(import_module("triton.backends.nvidia.driver").libcuda_dirs())


def _cache() -> str:
    folder = Path(import_module("triton").knobs.cache.dir)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return str(folder)


def _cpu() -> Iterator[Check]:
    """A small network folded and fused, in what the processor multiplies."""
    network = create_model("resnet18").eval()
    calibrate_(network)
    images = random_images(2, 3, 64)[0]
    for dtype in (torch.float32, torch.bfloat16):
        name = f"resnet18 on the CPU, {str(dtype).removeprefix('torch.')}"
        ops = select_ops("auto", images.device, dtype)
        by = f"{ops.name}, emulated" if ops.emulated else ops.name
        try:
            found = optimize(network, example_input=images, dtype=dtype).verification
            yield Check(name, True, f"by {by}: {found.reason if found else 'not verified'}")
        except VerificationError as error:
            yield Check(name, False, one_line(error))
