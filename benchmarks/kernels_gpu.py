"""All that waits for a GPU, measured in one call of at most nine minutes.

    python benchmarks/kernels_gpu.py --output out/gpu [--budget 525] [--sections conv3x3 b2b_gemm]
    python benchmarks/kernels_gpu.py --dry            the plan, and its checks on tiny shapes
    python benchmarks/kernels_gpu.py --output out/gpu --report      the tables of an earlier run

Records are appended to ``raw.jsonl`` as they come. The measuring runs in a process of its own: one
that hangs or breaks its CUDA context is replaced and goes on behind the case that did it. At the
end ``summary.md`` holds the figures that a GPU must show and the best row per kernel and shape.
Called again with the same folder, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BUDGET = 525.0
LAST = ("family", "cold", "compiled", "autotune")  # with what time is left, or in a second call
BROKEN = 75  # exit status of a worker whose CUDA context is lost
MOST_WORKERS = 12
POLL = 0.5
TARGET = "sm_90"
LEFT_OUT = "left out"

PLAN: tuple[tuple[str, str, float, str, float], ...] = (
    ("environment", "versions, clocks, commit", 5, "kernels_gpu:environment_cases", 20),
    ("compile", "registers and shared memory of every row", 40, "kernels_gpu:gate_cases", 90),
    ("ceilings", "copy, product, L2 to SM", 12, "gpu_micro:ceiling_cases", 30),
    ("baselines", "ResNet-50 against PyTorch", 115, "gpu_networks:baseline_cases", 90),
    ("exact", "every row on whole numbers", 40, "gpu_exact:cases", 60),
    ("conv3x3", "3x3 convolutions", 120, "gpu_kernels:conv3x3_cases", 45),
    ("gemm", "1x1 convolutions", 35, "gpu_kernels:gemm_cases", 45),
    ("b2b_gemm", "expansion + next reduction", 30, "gpu_kernels:b2b_gemm_cases", 45),
    ("layouts", "the network in NHWC and HWNC", 15, "gpu_networks:layout_cases", 60),
    ("stem", "stem and pool", 15, "gpu_kernels:stem_cases", 45),
    ("split", "split reductions at batch 1", 15, "gpu_kernels:split_cases", 45),
    ("launches", "50 dependent kernels", 5, "gpu_micro:launch_cases", 20),
    ("early", "the network with dependent launch", 12, "gpu_networks:early_cases", 45),
    ("pair", "expansion + projection", 15, "gpu_kernels:pair_cases", 45),
    ("head", "pool + classifier", 8, "gpu_kernels:head_cases", 45),
    ("repeats", "1,000 calls, bit by bit", 8, "gpu_networks:repeat_cases", 45),
    ("agreement", "top-1 against float32", 12, "gpu_networks:agreement_cases", 45),
    ("memory", "peak of a call", 8, "gpu_networks:memory_cases", 45),
    ("ragged", "33, 100, 255 images", 20, "gpu_networks:ragged_cases", 60),
    ("family", "ResNet-18 to 152", 30, "gpu_networks:family_cases", 60),
    ("cold", "process start to first answer", 55, "gpu_networks:cold_cases", 120),
    ("compiled", "torch.compile with CUDA graphs", 100, "gpu_networks:compiled_cases", 150),
    ("autotune", "torch.compile max-autotune", 500, "gpu_networks:autotune_cases", 300),
)
"""(section, what, seconds it may take, where its cases are, seconds after which a case hangs), by
what is to be learnt first."""
NAMES = tuple(name for name, *_ in PLAN)


class Log:
    """The records of a run, one JSON object per line: ``began``, then ``done`` or ``failed``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: list[dict[str, Any]] = []
        self._read = 0  # bytes
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            with path.open("a") as file:
                file.write("\n")  # a kill cut the last line short

    def add(self, section: str, case: str, state: str, **data: Any) -> None:
        record = {"section": section, "case": case, "state": state, "at": time.time(), **data}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Every whole record so far, those of other processes included."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._read)
            fresh = file.read()
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                self._records.append(json.loads(line))
        return self._records

    def states(self) -> dict[tuple[str, str], str]:
        return {(r["section"], r["case"]): r["state"] for r in self.read()}

    def done(self) -> dict[tuple[str, str], dict[str, Any]]:
        """What the finished cases found."""
        return {(r["section"], r["case"]): r["data"] for r in self.read() if r["state"] == "done"}

    def spent(self, section: str, since: float) -> float:
        """Seconds of the section's cases, in all processes."""
        mine = (r for r in self.read() if r["section"] == section and r["at"] >= since)
        return sum(r.get("seconds", 0.0) for r in mine)


def sections(names: Sequence[str]) -> Iterator[Any]:
    from benchmarks.gpu_contest import Section

    for name, what, limit, where, case_limit in PLAN:
        if name in names:
            module, function = where.split(":")
            cases: Callable[..., Any] = getattr(
                importlib.import_module(f"benchmarks.{module}"), function
            )
            yield Section(name, what, limit, cases, case_limit)


def environment_cases(setting: Any) -> Iterator[Any]:
    from benchmarks.gpu_contest import Case
    from fastres.perf.environment import environment

    yield Case("environment", lambda: environment().to_dict())


def gate_cases(setting: Any) -> Iterator[Any]:
    """What the compiler of this machine makes of every row; by the gate, in its own process."""
    from benchmarks.gpu_contest import Case

    for script in ("compile_gate", "compile_gate_fused"):
        yield Case(script, partial(_gate, script, setting.tiny))


def _gate(script: str, tiny: bool) -> dict[str, Any]:
    if tiny:
        return {"checked": [], "failures": {}}
    command = [
        sys.executable,
        str(ROOT / "tests" / "tools" / f"{script}.py"),
        "--target",
        TARGET,
        "--json",
    ]
    cores = len(os.sched_getaffinity(0))  # of a container, not of its host
    command += ["--jobs", str(min(16, cores))]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=80)
    verdicts = json.loads(done.stdout)
    failed = {f"{v['kernel']} {v['what']} {v['config']}": v["problems"] for v in verdicts}
    failed = {name: "; ".join(problems) for name, problems in failed.items() if problems}
    return {"verdicts": verdicts, "failures": failed}


def work(log: Log, names: Sequence[str], began: float, until: float) -> int:
    """Run what is not yet done; the exit status tells whether the CUDA context survived."""
    import torch

    from benchmarks.gpu_contest import Setting
    from fastres.backends.aten import cudnn_benchmarking

    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device; --dry needs none")
    setting = Setting(torch.device("cuda", 0))
    with torch.no_grad(), cudnn_benchmarking():
        for section in sections(names):
            for case in section.cases(setting):
                key = (section.name, case.name)
                if log.states().get(key, LEFT_OUT) != LEFT_OUT:
                    continue
                if time.time() > until or log.spent(section.name, began) > section.limit:
                    log.add(*key, LEFT_OUT, reason="no time left")
                elif not attempt(log, key, case.run):
                    return BROKEN
    return 0


def attempt(log: Log, key: tuple[str, str], run: Callable[[], dict[str, Any]]) -> bool:
    """One case into the log; False when the device no longer answers."""
    import torch

    from fastres.errors import one_line

    log.add(*key, "began")
    started = time.perf_counter()
    try:
        data = run()
        torch.cuda.synchronize()
    except Exception as error:
        log.add(*key, "failed", reason=one_line(error), seconds=time.perf_counter() - started)
    else:
        log.add(*key, "done", data=data, seconds=time.perf_counter() - started)
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # raises where a capture was broken off
    except Exception:
        return False
    return True


def supervise(log: Log, names: Sequence[str], budget: float) -> None:
    """Keep a worker at work until all is done or the budget is spent."""
    limits = {name: case_limit for name, _, _, _, case_limit in PLAN}
    started = time.time()
    until = started + budget
    for _ in range(MOST_WORKERS):
        command = [sys.executable, __file__, "--worker", str(started), str(until)]
        command += ["--output", str(log.path.parent), "--sections", *names]
        worker = subprocess.Popen(command)
        while worker.poll() is None:
            time.sleep(POLL)
            last = (log.read() or [None])[-1]
            began = last if last and last["state"] == "began" else None
            late = began and time.time() - began["at"] > limits[began["section"]]
            if late or time.time() > until + 5:
                worker.kill()
                worker.wait()
        lost = [key for key, state in log.states().items() if state == "began"]
        for key in lost:
            reason = f"the process ended with status {worker.returncode}"
            seconds = time.time() - log.read()[-1]["at"]
            log.add(*key, "failed", reason=reason, seconds=seconds)
        if worker.returncode == 0 or time.time() > until:
            return
        if not lost and worker.returncode != BROKEN:
            return  # it cannot even start


def dry(names: Sequence[str]) -> int:
    """Print the plan and run each section's checks on tiny shapes; 1 when one of them fails."""
    import torch

    from benchmarks.gpu_contest import Setting
    from fastres.errors import one_line

    bad = 0
    real = Setting(torch.device("cpu"))
    tiny = Setting(torch.device("cpu"), tiny=True)
    for section in sections(names):
        planned = [case.name for case in section.cases(real)]
        print(f"{section.name}: {len(planned)} cases, {section.limit:g} s: {section.what}")
        for name in planned:
            print(f"    {name}")
        for case in section.cases(tiny):
            try:
                with torch.no_grad():
                    wrong = case.run().get("failures", {})
            except Exception as error:
                wrong = {case.name: one_line(error)}
            bad += len(wrong)
            for name, reason in wrong.items():
                print(f"    failed: {case.name}: {name}: {reason}")
    limits = sum(limit for name, _, limit, _, _ in PLAN if name in names and name not in LAST)
    print(f"{bad} failed; limits of all but the compilers: {limits:g} s")
    return 1 if bad else 0


def report(log: Log, as_json: bool) -> None:
    """``summary.md`` beside the log; the figures, or everything as JSON, on standard output."""
    from benchmarks import gpu_verdict as verdict

    records, states = log.done(), {(r["section"], r["case"]): r for r in log.read()}
    lost = [(*key, r["state"], r.get("reason", "")) for key, r in states.items() if "reason" in r]
    figures = verdict.figure_rows(records)
    parts = [
        "# Figures\n\n" + verdict.table(verdict.HEADER, figures),
        "# Best rows\n\n" + verdict.table(verdict.BEST_HEADER, verdict.best_rows(records)),
        "# Rows for fastres/backends/kernel_table.py\n\n```\n"
        + "\n".join(verdict.choice_rows(records))
        + "\n```",
        "# Wrong or without a time\n\n"
        + verdict.table(("section", "case", "contender", "reason"), verdict.failures(records)),
        "# Not finished\n\n" + verdict.table(("section", "case", "state", "reason"), lost),
    ]
    (log.path.parent / "summary.md").write_text("\n\n".join(parts) + "\n")
    if as_json:
        print(json.dumps({"figures": figures, "best": verdict.best_rows(records), "lost": lost}))
    else:
        print(parts[0])
        print(f"{len(records)} cases done, {len(lost)} not; see {log.path.parent}/summary.md")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="folder for raw.jsonl and summary.md")
    parser.add_argument("--sections", nargs="+", choices=NAMES, default=NAMES, metavar="SECTION")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--json", action="store_true", help="the tables as JSON")
    parser.add_argument("--dry", action="store_true", help="the plan and its checks, no GPU needed")
    parser.add_argument("--report", action="store_true", help="only the tables of what is there")
    parser.add_argument("--worker", type=float, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        return dry(options.sections)
    if options.output is None:
        parser.error("--output is needed: a folder for the records")
    options.output.mkdir(parents=True, exist_ok=True)
    log = Log(options.output / "raw.jsonl")
    if options.worker is not None:
        return work(log, options.sections, *options.worker)
    if not options.report:
        supervise(log, options.sections, options.budget)
    report(log, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
