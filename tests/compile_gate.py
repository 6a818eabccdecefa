"""Compile every shipped kernel configuration for GPUs that are not here, and judge the result.

    python tests/compile_gate.py [--full] [--target sm_90] [--kernel conv2d] [--jobs 2] [--json]

The real launchers run on fake CUDA tensors under a stub driver, so that what is compiled is what
would be launched; nothing is executed. A case fails on spills, on more shared memory than a block
may have, on ptxas' warnings of serialised wgmma (C7510 to C7515), and, for float16 and bfloat16
matrix kernels on sm_90, without wgmma or with fewer of them than waits. Needs Triton, not its
interpreter, and a C compiler is not needed. Exit status 1 when a case fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

os.environ |= {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
if os.environ.pop("TRITON_INTERPRET", "0") == "1" and "triton" in sys.modules:
    raise RuntimeError("triton was imported with TRITON_INTERPRET=1: nothing can be compiled")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from fastres.kernels import conv
from fastres.kernels._config import TileConfig

NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CASE_TIMEOUT_S = 120


@dataclass(frozen=True)
class Target:
    gpu: GPUTarget
    shared_limit: int  # bytes of shared memory that one block may have


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


@dataclass(frozen=True)
class Case:
    """One launch to compile. ``config`` is shown; ``run`` calls the launcher with it."""

    kernel: str
    what: str
    config: str
    target: str
    run: Callable[[], object]
    wgmma: bool = False  # whether tensor-core instructions of sm_90 are due
    unusable: str = ""  # why the row cannot serve the target at all


@dataclass
class Verdict:
    kernel: str
    what: str
    config: str
    target: str
    registers: int = 0
    spilled: int = 0  # bytes of stack, or spilled vector registers on AMD
    shared: int = 0
    shared_limit: int = 0
    wgmma: int = 0
    waits: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


class StubDriver:
    """As much of a GPU driver as compiling takes."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(target: GPUTarget) -> Iterator[list]:
    """Launches inside compile for ``target`` and are collected instead of run."""
    compiled = []

    def compile_only(kernel, grid):
        def call(*args, **meta):
            dtypes = [a.dtype if isinstance(a, torch.Tensor) else a for a in args]
            compiled.append(kernel.warmup(*dtypes, grid=grid, **meta))

        return call

    original = triton.JITFunction.__getitem__, torch.cuda.current_device
    triton.runtime.driver.set_active(StubDriver(target))
    triton.JITFunction.__getitem__ = compile_only
    torch.cuda.current_device = lambda: 0
    try:
        with FakeTensorMode():
            yield compiled
    finally:
        triton.JITFunction.__getitem__, torch.cuda.current_device = original
        triton.runtime.driver._active = None


def disassemble(cubin: bytes, tool: str, *flags: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [NVIDIA_BIN / tool, *flags, file.name], capture_output=True, text=True, check=True
        )
    return done.stdout


def inspect(kernel, verdict: Verdict) -> None:
    """Fill in what the compiler made."""
    verdict.shared = kernel.metadata.shared
    if "cubin" in kernel.asm:
        usage = disassemble(kernel.asm["cubin"], "cuobjdump", "--dump-resource-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        verdict.registers, verdict.spilled = int(found[1]), int(found[2])
        sass = disassemble(kernel.asm["cubin"], "nvdisasm", "-c")
        verdict.wgmma = len(re.findall(r"\bHGMMA\b", sass))
        verdict.waits = len(re.findall(r"\bWARPGROUP\.ARRIVE\b", sass))
    else:
        code = kernel.asm["amdgcn"]
        verdict.registers = int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1])
        verdict.spilled = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", code)[1])


def judge(case: Case, verdict: Verdict, log: str) -> None:
    """Append what is wrong with the compiled kernel."""
    if verdict.spilled:
        verdict.problems.append(f"spills {verdict.spilled}")
    if verdict.shared > verdict.shared_limit:
        verdict.problems.append(
            f"{verdict.shared} bytes of shared memory, a block may have {verdict.shared_limit}"
        )
    warned = sorted(set(re.findall(r"C751[0-5]", log)))
    if warned:
        verdict.problems.append(f"ptxas warns {', '.join(warned)}: serialised wgmma")
    if case.wgmma and verdict.wgmma <= verdict.waits:
        verdict.problems.append(f"{verdict.wgmma} wgmma for {verdict.waits} waits")


def compile_case(case: Case) -> Verdict:
    """Compile one case in this process. The compiler's output is read, so it goes to a file."""
    target = TARGETS[case.target]
    verdict = Verdict(
        case.kernel, case.what, case.config, case.target, shared_limit=target.shared_limit
    )
    if case.unusable:
        verdict.problems.append(case.unusable)
        return verdict
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            with compiling(target.gpu) as kernels:
                case.run()
            if not kernels:
                verdict.problems.append("nothing was launched")
            for kernel in kernels:
                inspect(kernel, verdict)
            sys.stdout.flush()
            log.seek(0)
            judge(case, verdict, log.read())
        except Exception:
            verdict.problems.append(traceback.format_exc(limit=-3))
    verdict.seconds = time.perf_counter() - started
    return verdict


def worker(case: Case, sender: Connection) -> None:
    sender.send(compile_case(case))
    sender.close()


def compile_all(cases: Iterable[Case], jobs: int) -> Iterator[Verdict]:
    """A forked process per case, ``jobs`` at a time: some failures of the compiler end it."""
    fork = multiprocessing.get_context("fork")
    with FakeTensorMode():  # imports once what every child would import
        torch.empty(1)
    waiting = list(cases)[::-1]
    running: dict[Connection, tuple[Case, multiprocessing.Process, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            receiver, sender = fork.Pipe(duplex=False)
            case = waiting.pop()
            process = fork.Process(target=worker, args=(case, sender))
            process.start()
            sender.close()
            running[receiver] = case, process, time.monotonic()
        for receiver in wait(list(running), timeout=1.0):
            case, process, _ = running.pop(receiver)
            try:
                verdict = receiver.recv()
            except EOFError:
                process.join()
                problem = f"the compiler died with status {process.exitcode}"
                verdict = Verdict(case.kernel, case.what, case.config, case.target)
                verdict.problems.append(problem)
            process.join()
            yield verdict
        for _, process, started in running.values():
            if time.monotonic() - started > CASE_TIMEOUT_S:
                process.kill()


def fake(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on a GPU that is not there; 4-D ones in channels_last order."""
    t = torch.empty(shape, dtype=dtype, device="cuda")
    return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t


@dataclass(frozen=True)
class ConvShape:
    """A convolution that brings out one path through the kernel."""

    channels: int
    outputs: int
    window: int
    stride: int = 1
    groups: int = 1
    residual: bool = True
    batch: int = 32
    size: int = 14

    def run(self, dtype: torch.dtype, precision: str, config: TileConfig) -> None:
        padding = self.window // 2
        size = (self.size + 2 * padding - self.window) // self.stride + 1
        y = fake(self.batch, self.outputs, size, size, dtype=dtype)
        conv.conv2d(
            fake(self.batch, self.channels, self.size, self.size, dtype=dtype),
            fake(self.outputs, self.channels // self.groups, self.window, self.window, dtype=dtype),
            fake(self.outputs, dtype=torch.float32),
            stride=self.stride,
            padding=padding,
            groups=self.groups,
            residual=y if self.residual else None,
            relu=True,
            precision=precision,
            config=config,
        )


CONV_SHAPES = {
    "3x3": ConvShape(256, 256, 3),
    "1x1": ConvShape(256, 1024, 1),
    "1x1/2": ConvShape(256, 512, 1, stride=2, residual=False),
    "stem4": ConvShape(4, 64, 7, stride=2, residual=False, size=224),
    "stem": ConvShape(3, 64, 7, stride=2, residual=False, size=224),
    "ragged": ConvShape(272, 80, 3),
    "groups": ConvShape(128, 128, 3, groups=32, residual=False),
    "int64": ConvShape(256, 256, 3, batch=2**31 // (14 * 14 * 256) + 1),
}

DTYPES = {
    "half": (torch.float16, torch.bfloat16),
    "tf32": (torch.float32,),
    "ieee": (torch.float32,),
}


def conv_case(
    kind: str, row: TileConfig, dtype: torch.dtype, shape: str, target: str, *, shipped: bool = True
) -> Case | None:
    """The row as the launcher would use it there; None where it is pruned."""
    fitted = row.fitted(dtype.itemsize, TARGETS[target].shared_limit)
    unusable = ""
    if fitted != row and target == "sm_90":
        unusable = f"{row.shared_bytes(dtype.itemsize)} bytes of shared memory: never as written"
    elif fitted is None:
        return None
    used = fitted or row
    tile = f"{used.block_m}x{used.block_n}x{used.block_k} w{used.num_warps} s{used.num_stages}"
    name = str(dtype).removeprefix("torch.") if kind == "half" else kind
    return Case(
        "conv2d",
        f"{shape} {name}",
        tile,
        target,
        lambda: CONV_SHAPES[shape].run(dtype, "ieee" if kind == "half" else kind, used),
        wgmma=kind == "half" and target == "sm_90" and row.block_m >= 64 and shape != "stem",
        unusable=unusable,
    )
