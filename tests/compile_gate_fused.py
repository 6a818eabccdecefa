"""The compile gate for the fused kernels: stem, head, flat products, rot2, HWNC convolution.

    python tests/compile_gate_fused.py [--target sm_90] [--kernel stem] [--jobs 2] [--json]

Judges as compile_gate.py does. Kernels that read through tensor descriptors are compiled where the
GPU has the copy engine for them, sm_90 and later. Exit status 1 when a case fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from compile_gate import TARGETS, Case, compile_all, show

from fastres.kernels import stem

HALVES = (torch.float16, torch.bfloat16)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def stem_run(
    row: stem.StemConfig, inputs: torch.dtype, dtype: torch.dtype, precision: str, planar: bool
) -> Callable[[], object]:
    def run() -> None:
        x = torch.empty(32, 3, 224, 224, dtype=inputs, device="cuda")
        vectors = (torch.empty(3, device="cuda"),) * 2 if inputs == torch.uint8 else (None, None)
        stem.stem(
            x if planar else x.contiguous(memory_format=torch.channels_last),
            torch.empty(64, 3, 7, 7, dtype=dtype, device="cuda"),
            torch.empty(64, device="cuda"),
            scale=vectors[0],
            shift=vectors[1],
            packed=torch.empty(128, 256, dtype=dtype, device="cuda"),
            precision=precision,
            config=row,
        )

    return run


def stem_cases() -> Iterator[Case]:
    """Each row for each target; on sm_90 from all that users have."""

    def case(row, target, inputs, dtype, precision="ieee", planar=True) -> Case:
        nvidia = TARGETS[target].gpu.backend == "cuda"
        layout = "NCHW" if planar else "NHWC"
        wgmma = target == "sm_90" and row.columns >= 64 and dtype != torch.float32
        product = "" if dtype != torch.float32 else f" {precision}"
        return Case(
            "stem",
            f"{layout} {short(inputs)}{product}",
            " ".join(map(str, astuple(row))),
            target,
            stem_run(row, inputs, dtype, precision, planar),
            wgmma=wgmma and row.num_stages == 1,
            wide=rf"(?s)(?=.*{'HGMMA' if wgmma else ''})(?=.*FMNMX\S*\.NAN)" if nvidia else "",
        )

    for target in TARGETS:
        for row in stem.CONFIGS["half"]:
            yield case(row, target, torch.float16, torch.float16)
        for row in stem.CONFIGS["single"]:
            for precision in ("ieee", "tf32"):
                yield case(row, target, torch.float32, torch.float32, precision)
    for row in stem.CONFIGS["half"]:
        for planar in (True, False):
            for inputs in (torch.float32, torch.uint8, torch.bfloat16):
                yield case(row, "sm_90", inputs, torch.bfloat16, planar=planar)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this target")
    parser.add_argument("--kernel", action="append", help="only this kernel, such as stem")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    parser.add_argument("--json", action="store_true", help="verdicts as JSON")
    options = parser.parse_args()
    cases = [
        case
        for case in stem_cases()
        if case.target in (options.target or TARGETS)
        and case.kernel in (options.kernel or [case.kernel])
    ]
    verdicts = []
    for verdict in compile_all(cases, options.jobs):
        verdicts.append(verdict)
        if not options.json:
            print(show(verdict), flush=True)
    failed = [v for v in verdicts if v.problems]
    if options.json:
        print(json.dumps([asdict(v) for v in verdicts], indent=1))
    else:
        print(f"{len(verdicts)} compiled, {len(failed)} failed")
    return 1 if failed or not verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
