"""The compile gate for the fused kernels: stem, head, products, b2b_gemm, HWNC.

    python tests/tools/compile_gate_fused.py [--full] [--pdl] [--target sm_90] [--kernel stem]
        [--json]

Judges as compile_gate.py does. Kernels that read through tensor descriptors are compiled where the
GPU has TMA for them, sm_90 and later. Exit status 1 when a case fails.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple
from functools import partial
from itertools import product
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from compile_gate import ROUNDED, TARGETS, Case, arguments, kinds, nvidia, run, with_pdl

from fastres.kernels import b2b_gemm, gemm, head, stem
from fastres.kernels._config import TileConfig
from fastres.kernels._gpu import HOPPER
from fastres.kernels.experimental import bottleneck_hwnc, conv3x3_hwnc, hwnc

HALVES = (torch.float16, torch.bfloat16)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def stem_run(
    row: object, inputs: torch.dtype, dtype: torch.dtype, precision: str, planar: bool
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


def stem_cases(full: bool) -> Iterator[Case]:
    """Each row for each target; on sm_90 from all that users have."""

    def case(row, target, inputs, dtype, precision="ieee", planar=True) -> Case:
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
            wide=rf"(?s)(?=.*{'HGMMA' if wgmma else ''})(?=.*FMNMX\S*\.NAN)"
            if nvidia(target)
            else "",
        )

    for target in TARGETS:
        for row in stem.CONFIGS["half"]:
            yield case(row, target, torch.float16, torch.float16)
        for row in stem.CONFIGS["single"]:
            found = kinds(target)[1:]  # of float32, the usual one first
            for precision in found if full or target == "sm_90" else found[:1]:
                yield case(row, target, torch.float32, torch.float32, precision)
    for row in stem.CONFIGS["half"] if full else stem.CONFIGS["half"][:1]:
        for planar in (True, False):
            for inputs in (torch.float32, torch.uint8, torch.bfloat16):
                yield case(row, "sm_90", inputs, torch.bfloat16, planar=planar)


TMA_TARGETS = ("sm_90", "sm_100", "sm_120")
PRECISIONS = {
    "half": ((torch.float16, "ieee"), (torch.bfloat16, "ieee")),
    "tf32": ((torch.float32, "tf32"),),
    "ieee": ((torch.float32, "ieee"),),
}


def fake(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def tile_name(row: TileConfig) -> str:
    name = f"{row.block_m}x{row.block_n}x{row.block_k} w{row.num_warps} s{row.num_stages}"
    return f"{name} p" if getattr(row, "persistent", False) else name


def tile_case(
    kernel: str,
    what: str,
    row: TileConfig,
    target: str,
    kind: str,
    run: Callable[[TileConfig], object],
) -> Case | None:
    """A matrix kernel whose tiles TMA moves; None where the target has no room for the row."""
    gpu = TARGETS[target].record
    fitted = row.fitted(kind, gpu)
    if fitted is None and target != "sm_90":
        return None
    used = fitted or row
    return Case(
        kernel,
        what,
        tile_name(used),
        target,
        partial(run, used),
        wgmma=kind == "half" and target == "sm_90" and row.block_m >= 64,
        wide="UTMALDG",
        ttir=ROUNDED if kind == "tf32" else "",
        unusable="" if fitted == row or target != "sm_90" else "too much shared memory",
        counted=used.shared_bytes(kind, gpu) if kernel == "gemm" else 0,
    )


def gemm_run(row: TileConfig, dtype: torch.dtype, precision: str, stride: int) -> None:
    """A product with residual, or a pair of them where ``stride`` is not 0."""
    x, w, b = fake(6272, 256, dtype=dtype), fake(1024, 256, dtype=dtype), fake(1024)
    if not stride:
        residual = fake(6272, 1024, dtype=dtype)
        gemm.gemm(x, w, b, residual=residual, relu=True, precision=precision, config=row)
        return
    images = (32, 14 * stride, 14 * stride, 1)
    x2, w2 = fake(6272 * stride**2, 512, dtype=dtype), fake(1024, 512, dtype=dtype)
    gemm.dual_gemm(
        x, w, x2, w2, b, images=images, stride=stride, relu=True, precision=precision, config=row
    )


def gemm_cases(full: bool) -> Iterator[Case | None]:
    for kind, rows in gemm.CONFIGS.items():
        first, last = PRECISIONS[kind][0], PRECISIONS[kind][-1]
        for row in rows:
            strides = (0,) if row.persistent else (0, 1, 2)
            shown = {(target, first, 0) for target in TMA_TARGETS}
            shown.add(("sm_90", last, strides[-1]))
            every = product(TMA_TARGETS, PRECISIONS[kind], strides)
            for target, (dtype, precision), stride in every if full else sorted(shown, key=str):
                what = f"{('single', 'pair', 'pair/2')[stride]} {short(dtype)} {precision}"
                run = partial(gemm_run, dtype=dtype, precision=precision, stride=stride)
                yield tile_case("gemm", what, row, target, kind, run)


Width = TypeVar("Width")


def shown(fitting: Sequence[Width], index: int, full: bool) -> Sequence[Width]:
    """The widths at which the row of this index is compiled: every one, or two of them.

    At its widest, where a row spills first, and at one more, another for each row.
    """
    return fitting if full else sorted({fitting[-1], fitting[index % len(fitting)]})


SEAMS = ((64, 64), (64, 128), (128, 128), (128, 256), (256, 256))
"""Widths of the 3x3s on both sides of a seam, stages 1 to 3."""


def b2b_gemm_run(row: object, channels: int, reduced: int, dtype: torch.dtype) -> None:
    wide = 4 * channels
    b2b_gemm.b2b_gemm(
        fake(6272, channels, dtype=dtype),
        fake(wide, channels, dtype=dtype),
        fake(wide),
        fake(6272, wide, dtype=dtype),
        fake(reduced, wide, dtype=dtype),
        fake(reduced),
        config=row,
    )


def b2b_gemm_cases(full: bool) -> Iterator[Case]:
    for (index, row), target in product(enumerate(b2b_gemm.CONFIGS), TMA_TARGETS):
        gpu = TARGETS[target].record
        fitting = [seam for seam in SEAMS if b2b_gemm.fits(row, *seam, gpu)]
        if not fitting or (target != "sm_90" and not full):
            continue
        widths = shown(fitting, index, full)
        for (channels, reduced), dtype in product(widths, HALVES if full else HALVES[:1]):
            yield Case(
                "b2b_gemm",
                f"{channels}>{reduced} {short(dtype)}",
                " ".join(map(str, astuple(row))),
                target,
                partial(b2b_gemm_run, row, channels, reduced, dtype),
                wgmma=target == "sm_90",
                wide="UTMALDG",
            )


def head_run(row: object, dtype: torch.dtype) -> None:
    x = fake(32, 2048, 7, 7, dtype=dtype).contiguous(memory_format=torch.channels_last)
    head.head(x, fake(1000, 2048, dtype=dtype), fake(1000), config=row)


def head_cases(full: bool) -> Iterator[Case]:
    for row, target, dtype in product(head.CONFIGS, TARGETS, (*HALVES, torch.float32)):
        if full or dtype == torch.float16 or (target == "sm_90" and dtype == torch.float32):
            yield Case(
                "head",
                short(dtype),
                " ".join(map(str, astuple(row))),
                target,
                partial(head_run, row, dtype),
                wide=r"(LDG|LDGSTS)\.E\S*\.128" if nvidia(target) else "",
            )


HWNC_PATHS = {"pixel": (256, 1), "row": (32, 1), "gathered": (32, 2)}
"""Batch and stride that bring out each of the three ways to find a tile's input."""


def hwnc_run(row: TileConfig, batch: int, stride: int, dtype: torch.dtype, precision: str) -> None:
    batch = batch if batch == 256 else row.block_m // 2  # a tile holds more than a pixel's images
    w = fake(256, 256, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    hwnc.conv2d_hwnc(
        fake(14, 14, batch, 256, dtype=dtype),
        w,
        fake(256),
        stride=stride,
        padding=1,
        residual=fake(14 // stride, 14 // stride, batch, 256, dtype=dtype),
        relu=True,
        precision=precision,
        config=row,
    )


def hwnc_cases(full: bool) -> Iterator[Case | None]:
    for kind, rows in hwnc.CONFIGS.items():
        first = PRECISIONS[kind][0]
        paths = HWNC_PATHS.items()
        for (index, row), target, (path, sizes) in product(enumerate(rows), TMA_TARGETS[:2], paths):
            due = list(HWNC_PATHS)[index % 3] if target == "sm_90" else "pixel"
            if not full and path != due:
                continue
            for dtype, precision in PRECISIONS[kind] if full else (first,):
                what = f"{path} {short(dtype)} {precision}"
                batch, stride = sizes
                run = partial(
                    hwnc_run, batch=batch, stride=stride, dtype=dtype, precision=precision
                )
                yield tile_case("conv2d_hwnc", what, row, target, kind, run)


def sliding_run(
    row: conv3x3_hwnc.SlidingConfig, batch: int, bias: bool, residual: bool, dtype: torch.dtype
) -> None:
    w = fake(64, 64, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    hwnc.conv2d_hwnc(
        fake(56, 56, batch, 64, dtype=dtype),
        w,
        fake(64) if bias else None,
        padding=1,
        residual=fake(56, 56, batch, 64, dtype=dtype) if residual else None,
        relu=True,
        config=row,
    )


SLIDING_PATHS = {
    "plain": (256, True, False),
    "residual": (256, True, True),
    "ragged": (200, False, True),
}


def sliding_cases(full: bool) -> Iterator[Case]:
    for row, (path, sizes) in product(conv3x3_hwnc.CONFIGS, SLIDING_PATHS.items()):
        for dtype in HALVES if full else HALVES[:1]:
            yield Case(
                "conv3x3_hwnc",
                f"{path} {short(dtype)}",
                " ".join(map(str, astuple(row))),
                "sm_90",
                partial(sliding_run, row, *sizes, dtype),
                wgmma=True,
                unusable=""
                if row.shared_bytes() <= HOPPER.shared_limit
                else "too much shared memory",
            )


def block_run(row: bottleneck_hwnc.SlidingBlockConfig, reduced: int, dtype: torch.dtype) -> None:
    w2 = fake(64, 64, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    bottleneck_hwnc.bottleneck_hwnc(
        fake(56, 56, 256, 64, dtype=dtype),
        w2,
        fake(64),
        fake(256, 64, dtype=dtype),
        fake(256),
        fake(56, 56, 256, 256, dtype=dtype),
        fake(reduced, 256, dtype=dtype) if reduced else None,
        fake(reduced) if reduced else None,
        config=row,
    )


def block_cases(full: bool) -> Iterator[Case]:
    for row, reduced in product(bottleneck_hwnc.CONFIGS, (0, 64, 128)):
        if not bottleneck_hwnc.fits(row, 256, reduced, HOPPER):
            continue
        for dtype in HALVES if full else HALVES[:1]:
            yield Case(
                "bottleneck_hwnc",
                f"64>{reduced} {short(dtype)}",
                f"s{row.num_stages}",
                "sm_90",
                partial(block_run, row, reduced, dtype),
                wgmma=True,
            )


def all_cases(full: bool) -> Iterable[Case | None]:
    yield from stem_cases(full)
    yield from gemm_cases(full)
    yield from b2b_gemm_cases(full)
    yield from head_cases(full)
    yield from hwnc_cases(full)
    yield from sliding_cases(full)
    yield from block_cases(full)


def main() -> int:
    parser = arguments(__doc__.partition("\n")[0], "every dtype and path of every row", "stem")
    options = parser.parse_args()
    cases = (case for case in all_cases(options.full) if case is not None)
    return run(with_pdl(cases, options.pdl), options)


if __name__ == "__main__":
    sys.exit(main())
