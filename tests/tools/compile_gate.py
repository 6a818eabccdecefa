"""Compile every shipped kernel configuration for GPUs that are not here, and judge the result.

    python tests/tools/compile_gate.py [--full] [--pdl] [--target sm_90] [--kernel conv2d] [--json]

The real launchers run on fake CUDA tensors under a stub driver, so that what is compiled is what
would be launched; nothing is executed. Each target gets the arithmetic that its users have: TF32 on
NVIDIA's GPUs. A case fails on spills, on more shared memory than a block may have or than was
counted when its row was chosen, on ptxas' warnings of serialised wgmma (C7510 to C7515), and on
sm_90 for matrix kernels without wgmma or with no more of them than waits, for others without loads
of 16 bytes. Each kernel is also compiled for programmatic dependent launch, with ``--pdl`` each
row: nothing may touch global memory before the wait. Needs no GPU and no C compiler. Ends with a
table by target; exit status 1 when a case fails.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from multiprocessing.connection import Connection, wait
from pathlib import Path

os.environ |= {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a GPU that is seen, fake tensors start a context each
if os.environ.pop("TRITON_INTERPRET", "0") == "1" and "triton" in sys.modules:
    raise RuntimeError("triton was imported with TRITON_INTERPRET=1: nothing can be compiled")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import torch
import triton
from named_gpu import TARGETS, fake_gpu
from torch._subclasses.fake_tensor import FakeTensorMode

from fastres.kernels import conv, conv_int8, elementwise, global_pool, pool
from fastres.kernels._config import ProblemSize, TileConfig, select_config
from fastres.kernels._gpu import HOPPER
from fastres.perf.kernel_check import disassembled, resources

CASE_TIMEOUT_S = 120


@dataclass(frozen=True)
class Case:
    """One launch to compile. ``config`` is shown; ``run`` calls the launcher with it."""

    kernel: str
    what: str
    config: str
    target: str
    run: Callable[[], object]
    wgmma: bool = False  # whether tensor-core instructions of sm_90 are due
    wide: str = ""  # a machine instruction that is due, as a regular expression
    product: str = ""  # another one, that multiplies
    ttir: str = ""  # an operation of Triton's IR that is due, likewise
    unusable: str = ""  # why the row cannot serve the target at all
    pdl: bool = False  # for programmatic dependent launch
    counted: int = 0  # bytes of shared memory, at most, by which the row was chosen


@dataclass
class Verdict:
    kernel: str
    what: str
    config: str
    target: str
    registers: int = 0
    spilled: int = 0  # bytes stored, or spilled vector registers on AMD
    shared: int = 0
    shared_limit: int = 0
    counted: int = 0
    wgmma: int = 0
    waits: int = 0
    seconds: float = 0.0  # of CPU time, ptxas' included
    problems: list[str] = field(default_factory=list)


TOUCHES = {
    "griddepcontrol.wait": r"\b(?:ld|st|red|atom)\.\S*global|\bcp\.async|\bcp\.reduce",
    "ACQBULK": r"\b(?:LDG|STG|LDGSTS|ATOMG|ATOM|RED|UTMALDG|UTMASTG|UTMAREDG|UBLKCP)\b",
}
"""Instructions of PTX and SASS that touch global memory, by the wait that must come first."""


def wait_problems(wait: str, code: str) -> list[str]:
    """What is wrong with where a kernel waits for those before it."""
    before, found, _ = code.partition(wait)
    if not found:
        return [f"no {wait}"]
    early = re.search(TOUCHES[wait], before)
    return [f"{early[0]} before {wait}"] if early else []


def inspect(kernel, case: Case, verdict: Verdict) -> None:
    """Fill in what the compiler made."""
    if case.pdl:
        verdict.problems += wait_problems("griddepcontrol.wait", kernel.asm["ptx"])
        sass = disassembled(kernel.asm["cubin"], "nvdisasm", "-c")
        verdict.problems += wait_problems("ACQBULK", sass)
    elif "griddepcontrol" in kernel.asm.get("ptx", ""):
        verdict.problems.append("waits although it is launched after the end of those before it")
    if not re.search(case.ttir, kernel.asm.get("ttir", "")):  # Gluon has none
        verdict.problems.append(f"no {case.ttir} in Triton's IR")
    verdict.registers, verdict.spilled, verdict.shared = resources(kernel)
    if "cubin" in kernel.asm and (case.wgmma or case.wide or case.product):
        sass = disassembled(kernel.asm["cubin"], "nvdisasm", "-c")
        verdict.wgmma = len(re.findall(r"\b[HI]GMMA\b", sass))
        verdict.waits = len(re.findall(r"\bWARPGROUP\.ARRIVE\b", sass))
        if not re.search(case.wide, sass):
            verdict.problems.append(f"no {case.wide}: memory is accessed in small pieces")
        if not re.search(case.product, sass):
            verdict.problems.append(f"no {case.product}")


KNOWN_SPILLS = {
    ("gfx1100", "conv2d", "256x128x64 w8 s2"): 56,
    ("gfx1100", "head", "16 64 64 8 8 8"): 10,
    ("gfx1100", "stem", "64 14 64 64 4 1"): 68,
    ("sm_120", "gemm", "128x128x64 w8 s3 p"): 32,
    ("sm_120", "head", "16 256 64 8 1 8"): 4,
}
"""Rows that no table chooses on the target, by what they spill there."""


def judge(case: Case, verdict: Verdict, log: str) -> None:
    """Append what is wrong with the compiled kernel."""
    stored = re.findall(r"(\d+) bytes spill stores", log)
    if nvidia(case.target):
        verdict.spilled = max(map(int, stored), default=0)
        if not stored:
            verdict.problems.append("ptxas does not say what it spilled")
    if verdict.spilled > KNOWN_SPILLS.get((case.target, case.kernel, case.config), 0):
        verdict.problems.append(f"spills {verdict.spilled}")
    if verdict.shared > verdict.shared_limit:
        verdict.problems.append(
            f"{verdict.shared} bytes of shared memory, a block may have {verdict.shared_limit}"
        )
    if verdict.counted and verdict.shared > verdict.counted:
        verdict.problems.append(
            f"{verdict.shared} bytes of shared memory, {verdict.counted} were counted"
        )
    warned = sorted(set(re.findall(r"C751[0-5]", log)))
    if warned:
        verdict.problems.append(f"ptxas warns {', '.join(warned)}: serialised wgmma")
    if case.wgmma and verdict.wgmma <= verdict.waits:
        verdict.problems.append(f"{verdict.wgmma} wgmma for {verdict.waits} waits")


def compile_case(case: Case) -> Verdict:
    """Compile one case in this process. The compiler's output is read, so it goes to a file."""
    target = TARGETS[case.target]
    verdict = Verdict(case.kernel, case.what, case.config, case.target)
    verdict.shared_limit, verdict.counted = target.record.shared_limit, case.counted
    if case.unusable:
        verdict.problems.append(case.unusable)
        return verdict
    started = sum(os.times()[:4])
    with tempfile.TemporaryFile("w+") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            with fake_gpu(target, early=case.pdl) as launches:
                case.run()
            if not launches:
                verdict.problems.append("nothing was launched")
            for launch in launches:
                inspect(launch.compiled(), case, verdict)
            sys.stdout.flush()
            log.seek(0)
            judge(case, verdict, log.read())
        except Exception:
            verdict.problems.append(traceback.format_exc(limit=-3))
    verdict.seconds = sum(os.times()[:4]) - started
    return verdict


PDL_TARGETS = ("sm_90", "sm_100")


def with_pdl(cases: Iterable[Case], every: bool) -> Iterator[Case]:
    """The cases, and for programmatic dependent launch the first of each kernel, or every one."""
    seen = set()
    for case in cases:
        yield case
        kind = case.kernel, case.target
        if case.target in PDL_TARGETS and not case.unusable and (every or kind not in seen):
            seen.add(kind)
            yield replace(case, what=f"{case.what} pdl", pdl=True)


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
    split_k: int = 1

    def problem(self, itemsize: int) -> ProblemSize:
        pixels = self.batch * (self.size // self.stride) ** 2
        outputs, channels = self.outputs // self.groups, self.channels // self.groups
        return ProblemSize(pixels, outputs, channels, self.window**2, self.groups, itemsize)

    def run(self, dtype: torch.dtype, precision: str, config: TileConfig) -> None:
        padding = self.window // 2
        size = (self.size + 2 * padding - self.window) // self.stride + 1
        y = fake(self.batch, self.outputs, size, size, dtype=dtype)
        if dtype is torch.uint8:
            return self.run_bytes(y, padding, config)
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
        return None

    def run_bytes(self, y: torch.Tensor, padding: int, config: TileConfig) -> None:
        window = self.outputs, self.channels // self.groups, self.window, self.window
        column = fake(self.outputs, dtype=torch.float32)
        conv_int8.conv2d_int8(
            fake(self.batch, self.channels, self.size, self.size, dtype=torch.uint8),
            fake(*window, dtype=torch.int8),
            column,
            column,
            x_zero=6,
            shift=fake(self.outputs, dtype=torch.int32),
            stride=self.stride,
            padding=padding,
            groups=self.groups,
            residual=y if self.residual else None,
            relu=True,
            y_grid=(0.5, 0),
            config=config,
        )


CONV_SHAPES = {
    "3x3": ConvShape(256, 256, 3),
    "1x1": ConvShape(256, 1024, 1),
    "1x1/2": ConvShape(256, 512, 1, stride=2, residual=False),
    "stem": ConvShape(3, 64, 7, stride=2, residual=False, size=224),
    "stem4": ConvShape(4, 64, 7, stride=2, residual=False, size=224),
    "ragged": ConvShape(272, 80, 3),
    "groups": ConvShape(128, 128, 3, groups=32, residual=False),
    "int64": ConvShape(256, 256, 3, batch=2**31 // (14 * 14 * 256) + 1),
    "split": ConvShape(256, 256, 3, batch=1, split_k=4),
}
COPY_CHANNELS = {"stem": 0, "stem4": 4, "groups": 4}  # neighbours in memory, elsewhere plenty

DTYPES = {
    "half": (torch.float16, torch.bfloat16),
    "tf32": (torch.float32,),
    "ieee": (torch.float32,),
    "int8": (torch.uint8,),
}


INT64 = r"arith\.muli %\S+ %\S+ : tensor<\d+xi64>"
ROUNDED = r"tt\.bitcast %\S+ : tensor<\S+xi32> -> tensor<\S+xf32>"  # as TF32 operands must be


def conv_case(
    kind: str, row: TileConfig, dtype: torch.dtype, shape: str, target: str
) -> Case | None:
    """The row as the launcher would use it there; None where it is pruned."""
    gpu = TARGETS[target].record
    fitted = row.fitted(kind, gpu)
    unusable = ""
    if fitted != row and target == "sm_90":
        unusable = f"{row.shared_bytes(kind, gpu)} bytes of shared memory: never as written"
    elif fitted is None or (CONV_SHAPES[shape].split_k > 1 and not row.can_split_k):
        return None
    used = replace(fitted or row, split_k=CONV_SHAPES[shape].split_k)
    bits = min(128, 8 * dtype.itemsize * COPY_CHANNELS.get(shape, 16))
    wgmma = kind != "ieee" and target == "sm_90" and row.block_m >= 64
    product = "IGMMA" if wgmma else r"IMMA\.16832"
    return Case(
        "conv2d",
        f"{shape} {kind if kind != 'half' else str(dtype).removeprefix('torch.')}",
        f"{used.block_m}x{used.block_n}x{used.block_k} w{used.num_warps} s{used.num_stages}",
        target,
        lambda: CONV_SHAPES[shape].run(dtype, "ieee" if kind == "half" else kind, used),
        wgmma=wgmma and shape != "stem",
        wide=rf"LDGSTS\.E\S*\.{bits}" if target == "sm_90" and bits > 32 else "",
        product=product if kind == "int8" else "",
        ttir=INT64 if shape == "int64" else ROUNDED if kind == "tf32" else "",
        unusable=unusable,
        counted=used.shared_bytes(kind, gpu) if nvidia(target) else 0,
    )


def nvidia(target: str) -> bool:
    return target.startswith("sm_")


def kinds(target: str) -> tuple[str, ...]:
    """Arithmetic that users have there: AMD's GPUs are not asked for TF32."""
    return ("half", "tf32", "ieee", "int8") if nvidia(target) else ("half", "ieee", "int8")


def conv_cases(full: bool) -> Iterator[Case | None]:
    """Each row for each target; rare paths through the kernel for the row that they would get."""
    for kind, rows in {**conv.CONFIGS, "int8": conv_int8.CONFIGS}.items():
        first, last = DTYPES[kind][0], DTYPES[kind][-1]
        for index, row in enumerate(rows):
            targets = [target for target in TARGETS if kind in kinds(target)]
            for number, target in enumerate(targets):
                yield conv_case(kind, row, (first, last)[number % 2], "3x3", target)
            split = None if index % 2 else conv_case(kind, row, last, "split", "sm_90")
            yield split or conv_case(kind, row, last, "1x1", "sm_90")
            if full:
                for dtype, shape, target in product(DTYPES[kind], CONV_SHAPES, targets):
                    yield conv_case(kind, row, dtype, shape, target)
        for shape in ("1x1/2", "stem", "stem4", "ragged", "groups", "int64"):
            problem = CONV_SHAPES[shape].problem(first.itemsize)
            row = select_config(rows, problem, kind, HOPPER)
            yield conv_case(kind, replace(row, split_k=1), first, shape, "sm_90")


def image_case(
    kernel: str, what: str, config: object, target: str, run: Callable[[torch.Tensor], object]
) -> Case:
    """A memory-bound kernel on (32, 64, 56, 56), which must move 16 bytes at a time."""
    dtype = torch.float16
    return Case(
        kernel,
        f"{what} float16",
        " ".join(str(v) for v in asdict(config).values()),
        target,
        lambda: run(fake(32, 64, 56, 56, dtype=dtype)),
        wide=r"LDG\.E\S*\.128" if target == "sm_90" else "",
    )


def image_cases() -> Iterator[Case]:
    for target in TARGETS:
        for row in elementwise.CONFIGS:
            run = partial(lambda row, x: elementwise.add_relu(x, x, config=row), row)
            yield image_case("add_relu", "sum", row, target, run)
            run = partial(lambda row, x: elementwise.relu(x, config=row), row)
            yield image_case("relu", "", row, target, run)
            run = partial(lambda row, x: elementwise.to_bytes(x, 0.5, 6, config=row), row)
            yield image_case("to_bytes", "", row, target, run)
        for row in pool.CONFIGS:
            run = partial(
                lambda row, x: pool.max_pool2d(x, 3, stride=2, padding=1, config=row), row
            )
            yield image_case("max_pool2d", "3x3/2", row, target, run)
            run = partial(lambda row, x: pool.avg_pool2d(x, 2, config=row), row)
            yield image_case("avg_pool2d", "2x2", row, target, run)
        for row in global_pool.CONFIGS:
            run = partial(lambda row, x: global_pool.global_avg_pool(x, config=row), row)
            yield image_case("global_avg_pool", "", row, target, run)


def show(verdict: Verdict) -> str:
    shared = f"{verdict.shared / 1024:.0f}/{verdict.shared_limit // 1024}K"
    line = (
        f"{verdict.target:7} {verdict.kernel:15} {verdict.what:17} {verdict.config:19}"
        f"{verdict.registers:4} {shared:>9} {verdict.wgmma:4}/{verdict.waits:<3}"
        f"{verdict.seconds:5.1f}  "
    )
    return line + ("; ".join(verdict.problems) or "ok")


def summary(verdicts: list[Verdict]) -> str:
    """A table in Markdown, a line for each target."""
    lines = ["| target | compiled | failed | spilling | most registers | most shared memory |"]
    lines.append("|---" * 6 + "|")
    for target in TARGETS:
        found = [v for v in verdicts if v.target == target]
        if found:
            limit = TARGETS[target].record.shared_limit
            cells = (
                f"{target} | {len(found)} | {sum(bool(v.problems) for v in found)} | "
                f"{sum(bool(v.spilled) for v in found)} | {max(v.registers for v in found)} | "
                f"{max(v.shared for v in found):,} of {limit:,}"
            )
            lines.append(f"| {cells} |")
    return "\n".join(lines)


def arguments(about: str, full: str, example: str) -> argparse.ArgumentParser:
    """The options that both gates have."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--full", action="store_true", help=full)
    parser.add_argument("--pdl", action="store_true", help="each row with dependent launch as well")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this target")
    parser.add_argument("--kernel", action="append", help=f"only this kernel, such as {example}")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    parser.add_argument("--json", action="store_true", help="verdicts as JSON")
    return parser


def run(cases: Iterable[Case | None], options: argparse.Namespace) -> int:
    """Judge the cases that the options leave, print each; 1 where one fails or none is left."""
    chosen = [
        case
        for case in cases
        if case is not None
        and case.target in (options.target or TARGETS)
        and case.kernel in (options.kernel or [case.kernel])
    ]
    verdicts = []
    if not options.json:
        print(
            "target  kernel          case              config            registers shared  wgmma  s"
        )
    for verdict in compile_all(chosen, options.jobs):
        verdicts.append(verdict)
        if not options.json:
            print(show(verdict), flush=True)
    failed = [v for v in verdicts if v.problems]
    if options.json:
        print(json.dumps([asdict(v) for v in verdicts], indent=1))
    else:
        print(summary(verdicts))
        print(f"{len(verdicts)} compiled, {len(failed)} failed (triton {triton.__version__})")
    return 1 if failed or not verdicts else 0


def main() -> int:
    about = __doc__.partition("\n")[0]
    parser = arguments(about, "every shape and dtype: 20 minutes", "conv2d")
    parser.add_argument(
        "--row",
        nargs=6,
        action="append",
        metavar=("KIND", "M", "N", "K", "WARPS", "STAGES"),
        help="judge this conv2d tile instead of the shipped ones, such as half 128 128 64 8 3; "
        "repeat",
    )
    options = parser.parse_args()
    if options.row:
        cases = [
            conv_case(kind, TileConfig(*map(int, sizes)), DTYPES[kind][0], "3x3", target)
            for (kind, *sizes), target in product(options.row, TARGETS)
            if kind in kinds(target)
        ]
        return run(cases, options)
    every = [*conv_cases(options.full), *image_cases()]
    return run(with_pdl((case for case in every if case is not None), options.pdl), options)


if __name__ == "__main__":
    sys.exit(main())
