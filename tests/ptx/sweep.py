"""The command: cases, networks and counters through the machine, and against a GPU."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from . import bad_kernels, cases, counters, mutants, networks
from .driver import TARGETS, running
from .machine import Fault
from .parse import Unknown


@dataclass
class Result:
    kernel: str
    case: str
    target: str
    problem: str
    seconds: float
    config: str = ""


def judge(case: cases.Case, target: str, seed: int = 0, early: bool = False) -> Result:
    """Run one case on the machine."""
    started = time.process_time()
    try:
        with running(target, early=early, seed=seed):
            problem = case.wrong(case.run())
    except Exception as error:
        frames = "" if isinstance(error, (Fault, Unknown)) else traceback.format_exc(limit=-2)
        problem = f"{type(error).__name__}: {error} {frames}".strip()
    seconds = time.process_time() - started
    return Result(case.kernel, case.name(), target, problem, round(seconds, 2), str(case.config))


def sweep(options: argparse.Namespace) -> Iterator[Result]:
    for target in options.target or TARGETS:
        chosen = cases.sample(target) if options.sample else cases.every(target)
        for case in chosen:
            if case.kernel in (options.kernel or [case.kernel]):
                for seed in range(options.seeds):
                    yield judge(case, target, seed, options.pdl and target != "sm_80")


def of_bad_kernels(options: argparse.Namespace) -> Iterator[Result]:
    """Kernels that are wrong on purpose; a failure is one that comes through."""
    for bad in bad_kernels.BAD:
        started = time.process_time()
        problem = bad.verdict()
        seconds = time.process_time() - started
        yield Result(bad.kind, f"{bad.kind}: refused", bad.target, problem, round(seconds, 2))


def against_gpu(options: argparse.Namespace) -> Iterator[Result]:
    """Each case on the GPU that is here and on the machine, bit for bit."""
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: there is nothing to compare the machine with")
    target = "sm_90" if torch.cuda.get_device_capability() >= (9, 0) else "sm_80"
    chosen = list(cases.sample(target) if options.sample else cases.every(target))
    real = [[out.cpu() for out in case.run("cuda")] for case in chosen]
    for case, there in zip(chosen, real, strict=True):
        started = time.process_time()
        try:
            with running(target):
                here = case.run()
            same = all(map(torch.equal, here, there))
            problem = "" if same else "the machine and the GPU differ"
        except (Fault, Unknown) as error:
            problem = str(error)
        seconds = time.process_time() - started
        yield Result(case.kernel, case.name(), target, problem, round(seconds, 2))


def of_mutants(options: argparse.Namespace) -> Iterator[Result]:
    """Mutants of real kernels; what passes without a reason is a failure."""
    for target in options.target or TARGETS:
        started = time.process_time()
        for mutant, noticed in mutants.judged(target, options.mutants):
            reason = mutants.HARMLESS.get(mutant.kind, "")
            problem = "" if noticed or reason else "nothing notices it"
            case = f"{mutant.kind}, line {mutant.line} of {mutant.kernel}"
            case += f": {noticed}" if noticed else f": harmless, {reason}"
            seconds, started = time.process_time() - started, time.process_time()
            kind = mutant.kind if noticed else f"{mutant.kind} (harmless)"
            yield Result(kind, case, target, problem, round(seconds, 2))


def of_networks(options: argparse.Namespace) -> Iterator[Result]:
    """ResNet-18 at 32 and ResNet-50 at 64, as planned and with the fused kernels forced."""
    for target in options.target or TARGETS:
        for name, dtype, forced in networks.cases(target):
            if name not in (options.network or name) or options.dtype not in str(dtype):
                continue
            found = networks.judged(name, networks.SIZES[name], dtype, target, forced)
            shown = f"{name} {dtype} {'forced' if forced else 'as planned'}"
            case = f"{shown}: error {found.error:.2g}, allowed {found.allowed:.2g}"
            problem = "" if found.error <= found.allowed else "more than twice PyTorch's error"
            yield Result(name, case, target, problem, round(found.seconds, 1))


def table(results: list[Result]) -> str:
    """Kernel x target: cases that came out right of those run, and their time."""
    rows: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        rows[result.kernel, result.target].append(result)
    lines = ["| kernel | target | configurations | cases | right | CPU s |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for (kernel, target), found in rows.items():
        good, seconds = sum(not r.problem for r in found), sum(r.seconds for r in found)
        rows_run = len({r.config for r in found})
        lines.append(
            f"| `{kernel}` | {target} | {rows_run} | {len(found)} | {good} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the kernels' PTX on the CPU.")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this target")
    parser.add_argument("--kernel", action="append", help="only this kernel, such as conv2d")
    parser.add_argument("--sample", action="store_true", help="one case of each kernel")
    parser.add_argument("--seeds", type=int, default=1, help="orders of the blocks to try")
    parser.add_argument("--pdl", action="store_true", help="for programmatic dependent launch")
    parser.add_argument("--json", action="store_true", help="results as JSON")
    parser.add_argument("--gpu", action="store_true", help="compare the machine with the GPU here")
    parser.add_argument("--bad", action="store_true", help="kernels that are wrong on purpose")
    parser.add_argument("--mutants", type=int, metavar="N", help="N of each kind, of real kernels")
    parser.add_argument("--networks", action="store_true", help="whole networks")
    parser.add_argument("--network", help="only this one of them")
    parser.add_argument("--dtype", default="", help="only this dtype of them")
    parser.add_argument("--counters", action="store_true", help="what a profiler would count")
    options = parser.parse_args()
    if options.counters:
        print("\n\n".join(counters.table(target) for target in options.target or TARGETS))
        return 0
    chosen = sweep
    for wanted, other in (
        (options.gpu, against_gpu),
        (options.bad, of_bad_kernels),
        (options.mutants, of_mutants),
        (options.networks, of_networks),
    ):
        chosen = other if wanted else chosen
    results = []
    for result in chosen(options):
        results.append(result)
        if not options.json:
            shown = result.problem or "right"
            print(f"{result.target} {result.seconds:6.2f} s  {result.case}: {shown}", flush=True)
    failed = [r for r in results if r.problem]
    if options.json:
        print(json.dumps([asdict(r) for r in results], indent=1))
    else:
        print(f"\n{table(results)}\n\n{len(results)} run, {len(failed)} failed")
    return 1 if failed or not results else 0
