"""What the machine can do: copies, L2 to SM by TMA, products, launches in a graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.gpu_contest import Case, Graphed, Setting
from fastres.bench.probes import sustained
from fastres.kernels._config import gpu_of
from fastres.kernels._gpu import HOPPER
from fastres.kernels._tma import descriptor
from fastres.perf.ceilings import measured_ceilings
from fastres.perf.timing import measure

ROWS, COLUMNS, DEPTH = 128, 64, 6  # of a tile; tiles in flight
MEGABYTES = (8, 16, 32)
CHAIN = 50


@triton.jit
def read_tiles_kernel(
    x,  # descriptor of [TILES * BLOCK_M, BLOCK_K], tiles [BLOCK_M, BLOCK_K]
    y_ptr,  # [programs]
    TILES,
    STEPS,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    pid = tl.program_id(0)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        tile = (pid + step * tl.num_programs(0)) % TILES
        acc += x.load([tile * BLOCK_M, 0]).to(tl.float32)
    tl.store(y_ptr + pid, tl.sum(acc))


@triton.jit
def link_kernel(x_ptr, PDL: tl.constexpr) -> None:
    """One of a chain: adds 1 to what the one before left."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at = x_ptr + tl.program_id(0)
    tl.store(at, tl.load(at) + 1)


def ceiling_cases(setting: Setting) -> Iterator[Case]:
    """Copy and matrix product, in a burst and over 3 s; L2 to SM over three working sets."""
    yield Case("copy and product", partial(_ceilings, setting))
    for megabytes in (1,) if setting.tiny else MEGABYTES:
        yield Case(f"L2 to SM over {megabytes} MB", partial(_l2, setting, megabytes))


def _ceilings(setting: Setting) -> dict[str, Any]:
    if setting.tiny:
        return {"checked": [], "failures": {}}
    found = asdict(measured_ceilings(setting.device, setting.dtype))
    a, b = (torch.randn(8192, 8192, device=setting.device).to(setting.dtype) for _ in range(2))
    rate, clock = sustained(lambda x: x @ b, [a])
    found |= {"sustained_flop_per_second": rate * 2 * 8192**2, "sm_clock": clock}
    return found


def _l2(setting: Setting, megabytes: int) -> dict[str, Any]:
    """Every SM reads distinct tiles of one working set over and over."""
    tiles = megabytes * 2**20 // (ROWS * COLUMNS * 2)
    x = torch.randint(-3, 4, (tiles * ROWS, COLUMNS), device=setting.device).half()
    programs = 2 if setting.tiny else 2 * gpu_of(setting.device).sms
    steps = 3 if setting.tiny else 400
    y = torch.empty(programs, device=setting.device)

    def call() -> torch.Tensor:
        read_tiles_kernel[(programs,)](
            descriptor(x, ROWS, COLUMNS), y, tiles, steps, ROWS, COLUMNS, DEPTH, num_warps=4
        )
        return y

    each = x.view(tiles, -1).float().sum(1)
    turns = torch.arange(programs)[:, None] + programs * torch.arange(steps)[None, :]
    want = each[(turns % tiles).to(setting.device)].sum(1)
    got = call()
    if not torch.equal(got, want):
        raise RuntimeError("the sums of the tiles are wrong")
    if setting.tiny:
        return {"checked": ["read_tiles_kernel"], "failures": {}}
    comparison = measure(
        {"TMA": Graphed(call, [()])},
        [0],
        check=lambda *_: None,
        device="cuda",
        method=setting.method,
    )
    seconds = comparison["TMA"].seconds
    moved = programs * steps * ROWS * COLUMNS * 2
    rate = moved / seconds.median if seconds else None
    return {"bytes": moved, "bytes_per_second": rate, "comparison": comparison.to_dict()}


def launch_cases(setting: Setting) -> Iterator[Case]:
    """A graph of 50 dependent kernels of nearly no work, with and without early launch."""
    yield Case("chain", partial(_chain, setting))


def _chain(setting: Setting) -> dict[str, Any]:
    programs = 2 if setting.tiny else HOPPER.sms
    x = torch.zeros(programs, device=setting.device)

    def call(pdl: bool) -> torch.Tensor:
        option = {"launch_pdl": True} if pdl else {}
        for _ in range(CHAIN):
            link_kernel[(programs,)](x, PDL=pdl, num_warps=4, **option)
        return x

    def check(name: str, index: int, output: torch.Tensor) -> str | None:
        counts = output.unique().tolist()
        right = len(counts) == 1 and counts[0] % CHAIN == 0
        return None if right else f"a link was lost: {counts[:4]}"

    if setting.tiny:
        reason = check("plain", 0, call(False))
        return {"checked": ["plain"], "failures": {"plain": reason} if reason else {}}
    calls = {"plain": Graphed(call, [(False,)]), "PDL": Graphed(call, [(True,)])}
    comparison = measure(calls, [0], check=check, device="cuda", method=setting.method)
    times = {t.name: t.seconds.median / CHAIN for t in comparison.timings if t.seconds}
    return {
        "seconds": times,
        "failures": comparison.failures,
        "comparison": comparison.to_dict(),
    }
