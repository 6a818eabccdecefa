"""Each standard kernel on whole numbers, exact in any order, and compiled for a GPU by name.

Sizes are those of ResNet-50, or tiny ones for Triton's interpreter. Needs Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from ..backends.aten import conv_precision
from ..backends.triton import advice
from ..errors import one_line

kernels = import_module("fastres.kernels")
GPUS = kernels._gpu.GPUS
Tell = Callable[[int, int], object]
Outcome = tuple[str, bool, str]
"""A kernel and dtype; whether it did what it must; the figures, or the cause and the remedy."""
Case = tuple[str, Callable[[], Any], Callable[[], Any]]
"""A kernel and dtype, its call, and what is due, in float64."""


def gpu_target(architecture: str) -> GPUTarget:
    """``"sm_90"`` or ``"gfx942"`` as Triton's compiler wants it."""
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture[3:]), 32)
    return GPUTarget("hip", architecture, 32 if len(architecture) > 6 else 64)


@contextmanager
def compiling_for(gpu: GPUTarget) -> Iterator[None]:
    """Inside, Triton compiles for this GPU."""
    driver = SimpleNamespace(
        get_current_target=lambda: gpu,
        get_current_device=lambda: gpu.arch,  # Triton keeps what it compiled by the device
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)
    try:
        yield
    finally:
        triton.runtime.driver._active = None


def disassembled(cubin: bytes, tool: str, *flags: str) -> str:
    """What one of the tools that come with Triton says of an object for NVIDIA's GPUs."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(folder / tool), *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(compiled: Any) -> tuple[int, int, int]:
    """Registers of a thread, bytes of stack (AMD: spilled registers), shared memory of a block."""
    if "cubin" in compiled.asm:
        text = disassembled(compiled.asm["cubin"], "cuobjdump", "--dump-resource-usage")
        found = re.findall(r"REG:(\d+) STACK:(\d+)", text)[0]
    else:
        found = re.findall(r"\.vgpr_(?:spill_)?count:\s+(\d+)", compiled.asm["amdgcn"])
    registers, spilled = map(int, found)
    return registers, spilled, compiled.metadata.shared


def cases(
    device: torch.device, dtype: torch.dtype, precision: str, *, tma: bool, tiny: bool = False
) -> Iterator[Case]:
    """The standard kernels that take this dtype; those that copy by TMA where ``tma``."""
    images, side, few, many = (1, 4, 64, 128) if tiny else (32, 14, 256, 1024)
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        t = torch.randint(-2, 3, shape, generator=generator, device="cpu").to(device, kind)
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    def case(what: str, *args: Tensor, **given: Any) -> Case:
        module, name = what.split()[0].split(".")
        module = getattr(kernels, module)
        call, reference = getattr(module, name), getattr(module, f"{name}_ref")
        options = {"precision": precision} if "precision" in signature(call).parameters else {}
        title = f"{what.partition('.')[2]}, {str(dtype).removeprefix('torch.')}"
        exactly = given | {"upcast": True}
        return title, partial(call, *args, **given, **options), partial(reference, *args, **exactly)

    x, rows = whole(images, few, side, side), whole(images * side**2, few)
    weights, bias = whole(many, few), whole(many, kind=torch.float32)
    small = bias[:64]
    given: dict[str, Any] = {"residual": whole(*x.shape), "relu": True, "padding": 1}
    yield case("conv.conv2d 3x3", x, whole(few, few, 3, 3), bias[:few], **given)
    yield case("conv.conv2d 1x1", x, whole(many, few, 1, 1), bias)
    if tma:
        given = {"residual": whole(len(rows), many), "relu": True}
        yield case("gemm.gemm", rows, weights, bias, **given)
        second = whole(*rows.shape), whole(many, few)
        yield case("gemm.dual_gemm", rows, weights, *second, bias, relu=True)
    if tma and dtype is not torch.float32:
        wide = whole(256, 64), bias[:256] if many > 256 else bias.repeat(2), whole(len(rows), 256)
        yield case("b2b_gemm.b2b_gemm", whole(len(rows), 64), *wide, whole(64, 256), small)
    photos = whole(images, 3, 16 * side, 16 * side)
    yield case("stem.stem", photos, whole(64, 3, 7, 7), small)
    last = whole(images, few, 8, 8)  # of which the mean is exact
    yield case("head.head", last, weights, bias)
    yield case("linear.linear", rows[:images], weights, bias, relu=True)
    yield case("elementwise.add_relu", x, whole(*x.shape))
    yield case("elementwise.relu", x)
    yield case("pool.max_pool2d", x, kernel_size=3, stride=2, padding=1)
    yield case("pool.avg_pool2d", x, kernel_size=2, stride=2)
    yield case("global_pool.global_avg_pool", last)


def _judged(
    chosen: Sequence[str],
    device: torch.device,
    precision: str,
    tma: bool,
    judge: Callable[[Case], tuple[bool, str]],
    tell: Tell | None,
) -> list[Outcome]:
    """What ``judge`` says of each kernel, or of those ``chosen`` by name; an error is the cause,
    with a remedy where one is known."""
    how: dict[str, Any] = {"tma": tma, "tiny": kernels.INTERPRETED}
    kinds = (torch.float16, torch.float32)
    found = [case for kind in kinds for case in cases(device, kind, precision, **how)]
    names = dict.fromkeys(re.split(r"\W", case[0])[0] for case in found)
    for name in chosen:
        if name not in names:
            raise ValueError(f"kernel must be one of {', '.join(names)}; got {name!r}")
    found = [case for case in found if not chosen or re.split(r"\W", case[0])[0] in chosen]
    if device.type == "cuda":
        kernels.compile_ahead(lambda: [run() for _, run, _ in found], tell)
    outcomes = []
    for done, case in enumerate(found, 1):
        try:
            outcomes.append((case[0], *judge(case)))
        except Exception as error:
            remedy = advice(error.__cause__ or error)
            outcomes.append((case[0], False, f"{one_line(error)}{remedy}"))
        if tell is not None:
            tell(done, len(found))
    return outcomes


def check_kernels(
    device: torch.device, chosen: Sequence[str] = (), tell: Tell | None = None
) -> list[Outcome]:
    """Run each standard kernel, or those ``chosen`` by name, and compare all bits.

    Raises:
        ValueError: a name is no standard kernel's.
    """

    def judge(case: Case) -> tuple[bool, str]:
        _, run, due = case
        pairs = [(run(), due())]
        if isinstance(pairs[0][0], tuple):
            pairs = list(zip(*pairs[0], strict=True))
        wrong = sum(int((y != exact.to(y.dtype)).sum()) for y, exact in pairs)
        return not wrong, f"{wrong} numbers are wrong" if wrong else "exact on whole numbers"

    return _judged(chosen, device, conv_precision(), kernels.has_tma(device), judge, tell)


def compile_kernels(
    architecture: str, chosen: Sequence[str] = (), tell: Tell | None = None
) -> list[Outcome]:
    """Compile them for a GPU that is not here, with the tiles that they would get there.

    Raises:
        ValueError: an architecture or a name that nobody knows, or TRITON_INTERPRET=1.
    """
    if architecture not in GPUS:
        raise ValueError(f"target must be one of {', '.join(GPUS)}; got {architecture!r}")
    if kernels.INTERPRETED:
        raise ValueError("a target is compiled for, which TRITON_INTERPRET=1 rules out; unset it")
    gpu, compiled, settings = gpu_target(architecture), [], triton.knobs.compilation
    capability = divmod(gpu.arch, 10) if isinstance(gpu.arch, int) else (0, 0)

    def collect(kernel: Any, grid: int, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        compiled.append(kernel.warmup(*args, grid=(grid,), **meta))

    def judge(case: Case) -> tuple[bool, str]:
        case[1]()
        registers, spilled, shared = resources(compiled.pop())
        spills = f"{spilled} on the stack" if spilled else "no spills"
        fits = shared <= GPUS[architecture].shared_limit
        return fits, f"{registers} registers, {spills}, {shared:,} bytes of shared memory"

    host = kernels._common.Host(capability, GPUS[architecture], collect)
    precision = conv_precision() if capability[0] else "ieee"
    with compiling_for(gpu), kernels._common.hosted(host), settings.scope():
        settings.always_compile = True
        tma = kernels.has_tma(torch.device("cpu"))
        return _judged(chosen, torch.device("cpu"), precision, tma, judge, tell)
