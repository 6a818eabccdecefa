"""Every configuration row of every kernel on whole numbers, where results are exact.

Outputs start as NaN, so that an element nobody wrote is seen. Rows that are wrong or that kill the
process are named; one row is one case, so that the others still get their turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_contest import Case, Setting, compile_ahead, integers, row_text, tensors
from fastres.backends.aten import cudnn_benchmarking
from fastres.kernels import b2b_gemm, conv, elementwise, gemm, global_pool, head, pool, stem
from fastres.kernels._config import gpu_of
from fastres.kernels.experimental import bottleneck_hwnc, conv3x3_hwnc, hwnc

Pairs = Iterator[tuple[Any, Any]]  # of each launch, what it gives and what is exact
Trial = Callable[[Setting], Pairs]
FLOAT = torch.float32
DTYPES = {
    "half": (torch.float16, torch.bfloat16),
    "tf32": (FLOAT,),
    "ieee": (FLOAT,),
    "single": (FLOAT,),
}


class NotExact(AssertionError):
    """A kernel's output differs from the exact one."""


def agree(got: Any, want: Any) -> None:
    """Raises NotExact unless the tensors are equal, ``want`` rounded once."""
    for out, exact in zip(tensors(got), tensors(want), strict=True):
        wrong = out != exact.to(out.dtype)
        if bool(wrong.any()):
            raise NotExact(f"{int(wrong.sum())} of {out.numel()} elements differ")


def poison(like: Tensor) -> Tensor:
    return torch.full_like(like, float("nan"))


def fitted(row: Any, setting: Setting) -> Any:
    """The row as this GPU would run it, or None."""
    return row.fitted("half" if setting.dtype.itemsize == 2 else "tf32", gpu_of(setting.device))


def precision(kind: str) -> str:
    return "tf32" if kind == "tf32" else "ieee"


def conv_trial(kind: str, row: Any, split_k: int) -> Trial:
    def run(setting: Setting) -> Pairs:
        used = replace(fitted(row, setting), split_k=split_k)
        channels, outputs = row.block_k + 8, 72
        x, w = integers(setting, 3, channels, 9, 7), integers(setting, outputs, channels, 3, 3)
        b, residual = integers(setting, outputs, dtype=FLOAT), integers(setting, 3, outputs, 9, 7)
        given = {"padding": 1, "residual": residual, "relu": True}
        want = conv.conv2d_ref(x, w, b, upcast=True, **given)
        out = poison(residual)
        yield conv.conv2d(x, w, b, precision=precision(kind), config=used, out=out, **given), want

    return run


def gemm_trial(kind: str, row: Any) -> Trial:
    def run(setting: Setting) -> Pairs:
        used = fitted(row, setting)
        rows, channels, outputs = row.block_m + 5, row.block_k + 8, row.block_n + 8
        x, w = integers(setting, rows, channels), integers(setting, outputs, channels)
        b, residual = integers(setting, outputs, dtype=FLOAT), integers(setting, rows, outputs)
        want = gemm.gemm_ref(x, w, b, residual=residual, relu=True, upcast=True)
        given = {"relu": True, "precision": precision(kind), "config": used}
        yield gemm.gemm(x, w, b, residual=residual, out=poison(residual), **given), want
        if row.persistent:
            return
        for stride in (1, 2):
            images = (rows, stride, stride, 1)
            x2 = integers(setting, rows * stride**2, 40)
            w2 = integers(setting, outputs, 40)
            where = {"images": images, "stride": stride}
            want = gemm.dual_gemm_ref(x, w, x2, w2, b, relu=True, upcast=True, **where)
            yield gemm.dual_gemm(x, w, x2, w2, b, out=poison(residual), **where, **given), want

    return run


def sparse(setting: Setting, outputs: int, channels: int) -> Tensor:
    """Weights of which two in a row count, so that no sum leaves float16's whole numbers."""
    w = torch.zeros(outputs, channels, device=setting.device)
    i = torch.arange(outputs, device=setting.device)
    w[i, (7 * i) % channels] = 1.0
    w[i, (11 * i + 5) % channels] -= 2.0
    return w.to(setting.dtype)


def b2b_gemm_trial(row: Any, channels: int, reduced: int) -> Trial:
    def run(setting: Setting) -> Pairs:
        rows, wide = row.block_m + 3, 4 * channels
        inputs = (
            integers(setting, rows, channels),
            integers(setting, wide, channels),
            integers(setting, wide, dtype=FLOAT),
            integers(setting, rows, wide),
            sparse(setting, reduced, wide),
            integers(setting, reduced, dtype=FLOAT),
        )
        want = b2b_gemm.b2b_gemm_ref(*inputs, upcast=True)
        out = tuple(poison(t.to(setting.dtype)) for t in want)
        yield b2b_gemm.b2b_gemm(*inputs, out=out, config=row), want

    return run


def hwnc_trial(kind: str, row: Any) -> Trial:
    def run(setting: Setting) -> Pairs:
        used = fitted(row, setting)
        w, b = integers(setting, 72, 64, 3, 3), integers(setting, 72, dtype=FLOAT)
        for batch, stride in ((row.block_m, 1), (20, 1), (20, 2)):
            x = integers(setting, batch, 64, 4, 3).permute(2, 3, 0, 1).contiguous()
            given = {"stride": stride, "padding": 1, "relu": True}
            want = hwnc.conv2d_hwnc_ref(x, w, b, upcast=True, **given)
            out = poison(want.to(setting.dtype))
            how = {"precision": precision(kind), "config": used, "out": out}
            yield hwnc.conv2d_hwnc(x, w, b, **how, **given), want

    return run


def sliding_trial(row: Any) -> Trial:
    def run(setting: Setting) -> Pairs:
        w, b = integers(setting, 72, 64, 3, 3), integers(setting, 72, dtype=FLOAT)
        for batch, width in ((row.images, 5), (20, 4)):
            x = integers(setting, batch, 64, 6, width).permute(2, 3, 0, 1).contiguous()
            for residual in (None, integers(setting, 6, width, batch * 72).view(6, width, -1, 72)):
                given = {"padding": 1, "residual": residual, "relu": True}
                want = hwnc.conv2d_hwnc_ref(x, w, b, upcast=True, **given)
                out = poison(want.to(setting.dtype))
                yield hwnc.conv2d_hwnc(x, w, b, config=row, out=out, **given), want

    return run


def block_trial(row: Any, reduced: int) -> Trial:
    def run(setting: Setting) -> Pairs:
        t, x = (integers(setting, 6, 5, 70, c).contiguous() for c in (64, 256))
        w2 = sparse(setting, 64, 9 * 64).view(64, 3, 3, 64).permute(0, 3, 1, 2)
        w3, w1 = sparse(setting, 256, 64), sparse(setting, reduced, 256) if reduced else None
        b2, b3, b1 = (integers(setting, n, dtype=FLOAT) for n in (64, 256, max(1, reduced)))
        inputs = (t, w2, b2, w3, b3, x, w1, b1 if reduced else None)
        want = bottleneck_hwnc.bottleneck_hwnc_ref(*inputs, upcast=True)
        out = tuple(None if y is None else poison(y.to(setting.dtype)) for y in want)
        yield bottleneck_hwnc.bottleneck_hwnc(*inputs, out=out, config=row), want

    return run


def stem_trial(row: Any) -> Trial:
    def run(setting: Setting) -> Pairs:
        w, b = integers(setting, 64, 3, 7, 7), integers(setting, 64, dtype=FLOAT)
        for x in (
            integers(setting, 2, 3, 37, 41).contiguous(),
            integers(setting, 2, 3, 37, 41),
            integers(setting, 2, 3, 37, 41, dtype=FLOAT).contiguous(),
        ):
            want = stem.stem_ref(x, w, b, upcast=True)
            yield stem.stem(x, w, b, out=poison(want.to(w.dtype)), config=row), want

    return run


def head_trial(row: Any) -> Trial:
    def run(setting: Setting) -> Pairs:
        # Sums of 64 pixels, in multiples of it: the means are whole numbers.
        x = 64 * integers(setting, 5, 256, 1, 1).expand(-1, -1, 8, 8)
        x = torch.where(torch.arange(64, device=x.device).view(8, 8) == 9, x, 0 * x)
        x = x.contiguous(memory_format=torch.channels_last)
        w, b = sparse(setting, 72, 256), integers(setting, 72, dtype=FLOAT)
        want = head.head_ref(x, w, b, upcast=True)
        yield head.head(x, w, b, out=poison(want.to(w.dtype)), config=row), want

    return run


def image_trial(call: Callable[..., Any], ref: Callable[..., Any], row: Any) -> Trial:
    """A kernel on one image batch; the pixels are few enough for a mean to be exact."""

    def run(setting: Setting) -> Pairs:
        x = 4 * integers(setting, 3, 40, 8, 8)
        yield call(x, config=row), ref(x)

    return run


def trials() -> Iterator[tuple[str, torch.dtype, Any, Trial]]:
    """(kernel, dtype, row, trial) of every row that ships."""
    for kind, rows in conv.CONFIGS.items():
        for dtype in DTYPES[kind]:
            for row in rows:
                yield f"conv2d {kind}", dtype, row, conv_trial(kind, row, 1)
                if row.can_split_k:
                    yield f"conv2d {kind} split", dtype, row, conv_trial(kind, row, 4)
    for kind, rows in gemm.CONFIGS.items():
        for dtype in DTYPES[kind]:
            yield from ((f"gemm {kind}", dtype, row, gemm_trial(kind, row)) for row in rows)
    for kind, rows in hwnc.CONFIGS.items():
        for dtype in DTYPES[kind]:
            yield from ((f"conv2d_hwnc {kind}", dtype, row, hwnc_trial(kind, row)) for row in rows)
    for dtype in DTYPES["half"]:
        for row in conv3x3_hwnc.CONFIGS:
            yield "conv2d_hwnc sliding", dtype, row, sliding_trial(row)
        for row in bottleneck_hwnc.CONFIGS:
            for reduced in (0, 64, 128):
                yield f"bottleneck_hwnc {reduced}", dtype, row, block_trial(row, reduced)
        for row in b2b_gemm.CONFIGS:
            yield "b2b_gemm", dtype, row, b2b_gemm_trial(row, 64, 64)
    for kind, rows in stem.CONFIGS.items():
        for dtype in DTYPES[kind]:
            yield from ((f"stem {kind}", dtype, row, stem_trial(row)) for row in rows)
    for dtype in (*DTYPES["half"], FLOAT):
        yield from (("head", dtype, row, head_trial(row)) for row in head.CONFIGS)
    yield from image_trials()


def image_trials() -> Iterator[tuple[str, torch.dtype, Any, Trial]]:
    def max_pool(x: Tensor, **given: Any) -> Tensor:
        return pool.max_pool2d(x, 3, stride=2, padding=1, **given)

    def avg_pool(x: Tensor, **given: Any) -> Tensor:
        return pool.avg_pool2d(x, 2, **given)

    def avg_pool_ref(x: Tensor) -> Tensor:
        return pool.avg_pool2d_ref(x, 2)

    def max_pool_ref(x: Tensor) -> Tensor:
        return pool.max_pool2d_ref(x, 3, stride=2, padding=1)

    def add(x: Tensor, **given: Any) -> Tensor:
        return elementwise.add_relu(x, x, **given)

    def add_ref(x: Tensor) -> Tensor:
        return (x + x).relu()

    pairs: Sequence[tuple[str, Any, Any, Any]] = (
        ("max_pool2d", max_pool, max_pool_ref, pool.CONFIGS),
        ("avg_pool2d", avg_pool, avg_pool_ref, pool.CONFIGS),
        ("add_relu", add, add_ref, elementwise.CONFIGS),
        (
            "global_avg_pool",
            global_pool.global_avg_pool,
            global_pool.global_avg_pool_ref,
            global_pool.CONFIGS,
        ),
    )
    for name, call, ref, rows in pairs:
        for row in rows:
            yield name, torch.float16, row, image_trial(call, ref, row)


def usable(name: str, row: Any, setting: Setting) -> bool:
    """Whether this GPU is offered the row at all."""
    gpu = gpu_of(setting.device)
    if name.startswith("b2b_gemm"):
        return bool(b2b_gemm.fits(row, 64, 64, gpu))
    if name.startswith("bottleneck_hwnc"):
        reduced = int(name.split()[1])
        fits = bottleneck_hwnc.fits(row, 256, reduced, gpu)
        return fits and bottleneck_hwnc.runs_on(setting.device)
    if isinstance(row, conv3x3_hwnc.Conv3x3Config):
        return bool(conv3x3_hwnc.runs_on(setting.device))
    return not hasattr(row, "fitted") or fitted(row, setting) is not None


def title(name: str, dtype: torch.dtype, row: Any) -> str:
    return f"{name} {str(dtype).removeprefix('torch.')} {row_text(row)}"


def cases(setting: Setting) -> Iterator[Case]:
    """One case compiles all rows side by side, then each row is one; the first of each if tiny."""
    every, seen = [], set()
    for name, dtype, row, trial in trials():
        if setting.tiny and (name in seen or dtype == torch.bfloat16):
            continue
        seen.add(name)
        every.append((title(name, dtype, row), replace(setting, dtype=dtype), name, row, trial))

    def attempt(here: Setting, name: str, row: Any, trial: Trial) -> dict[str, Any]:
        if not usable(name, row, here):
            return {"exact": None, "reason": f"not offered here: {astuple(row)}"}
        torch.manual_seed(0)
        with cudnn_benchmarking(False):
            for got, want in trial(here):
                agree(got, want)
        return {"exact": True}

    def compile_all() -> dict[str, Any]:
        chosen = [(here, trial) for _, here, name, row, trial in every if usable(name, row, here)]
        with cudnn_benchmarking(False):
            return compile_ahead(setting, [lambda h=h, t=t: list(t(h)) for h, t in chosen])

    yield Case("compile all rows", compile_all)
    for text, here, name, row, trial in every:
        yield Case(text, lambda a=(here, name, row, trial): attempt(*a))
