"""Whole networks on a GPU: baselines, ragged batches, memory, agreement, repeats, cold start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu_contest import Case, Judge, Setting
from fastres import BasicBlock, ResNet, create_model, optimize
from fastres.backends.aten import cudnn_benchmarking
from fastres.backends.kernel_choice import FORCE_VARIABLE
from fastres.bench import run
from fastres.bench.accuracy import calibrate_, random_images
from fastres.bench.baselines import CHEAP, eager
from fastres.bench.presets import AUTOTUNED, Spec
from fastres.bench.probes import cold_starts, peak_bytes
from fastres.frontends.fast_model import FastModel
from fastres.kernels import _common
from fastres.perf.timing import Method, measure

FIRST = Method(rounds=15, budget=6.0, sample=0.03)
RAGGED = ((33, 64), (100, 128), (255, 256))
IMAGES = 1000
REPEATS = 1000


def _bench(setting: Setting, spec: Spec, method: Method) -> dict[str, Any]:
    """One case of the ordinary benchmark; raises with the reason where it could not be measured."""
    if setting.tiny:
        spec = Spec("resnet18", 1, size=32, baselines=("folded",))
        method = Method(rounds=1, budget=0.0, sample=0.0, warmup=0.0)
    report = run.run([spec], setting.device, method)
    if not report.cases:
        raise RuntimeError(report.checks[0].detail)
    case = report.cases[0]
    found = case.to_dict() | {"ceilings": [asdict(c) for c in report.ceilings]}
    return found | {"failures": case.comparison.failures}


def baseline_cases(setting: Setting) -> Iterator[Case]:
    """ResNet-50 against everything that PyTorch holds, by ``fastres.bench.run``."""
    for batch in setting.batches(256, 1, 32):
        probes = 0.0 if batch == 32 else 0.5
        spec = Spec("resnet50", batch, dtypes=("float16",), baselines=CHEAP, probes=probes)
        yield Case(f"resnet50 batch {batch}", partial(_bench, setting, spec, FIRST))


def family_cases(setting: Setting) -> Iterator[Case]:
    """The other depths at batch 256, ResNet-18 also at 1."""
    shapes = [("resnet18", 1)]
    shapes += [(name, 256) for name in ("resnet18", "resnet34", "resnet101", "resnet152")]
    for name, batch in shapes[:1] if setting.tiny else shapes:
        probes = 0.2 if batch == 1 else 0.0
        spec = Spec(name, batch, dtypes=("float16",), baselines=("cuDNN fused",), probes=probes)
        yield Case(f"{name} batch {batch}", partial(_bench, setting, spec, Method(10, 2.0)))


def compiled_cases(setting: Setting) -> Iterator[Case]:
    """torch.compile with CUDA graphs, which takes most of a minute to build."""
    for batch in setting.batches(256, 1, 32):
        baselines = ("cuDNN fused", "compile CUDA graphs")
        spec = Spec("resnet50", batch, dtypes=("float16",), baselines=baselines)
        yield Case(f"resnet50 batch {batch}", partial(_bench, setting, spec, Method(10, 3.0)))


def autotune_cases(setting: Setting) -> Iterator[Case]:
    """torch.compile's max-autotune; last, since it may take all the time that is left."""
    for batch in setting.batches(256, 1):
        spec = Spec("resnet50", batch, dtypes=("float16",), baselines=AUTOTUNED)
        yield Case(f"resnet50 batch {batch}", partial(_bench, setting, spec, Method(10, 3.0)))


def _network(setting: Setting, name: str = "resnet50") -> ResNet:
    if setting.tiny:
        model = ResNet(BasicBlock, [1, 1], num_classes=5, stem="cifar", planes=8).eval()
        calibrate_(model, random_images(8, 3, 16)[0])
        return model
    model = create_model(name).eval()
    calibrate_(model)
    return model.to(setting.device)


def _images(setting: Setting, batch: int) -> Tensor:
    return random_images(batch, 3, 16 if setting.tiny else 224)[0].to(setting.device)


def _fast(setting: Setting, model: ResNet, x: Tensor) -> FastModel:
    """In half precision by Triton alone; float32 where only the interpreter is there."""
    dtype = torch.float32 if setting.tiny else setting.dtype
    with torch.no_grad():
        return optimize(model, example_input=x, dtype=dtype, backend="triton")


def ragged_cases(setting: Setting) -> Iterator[Case]:
    """Batches that are no multiple of a tile, per image against the next full one."""
    for ragged, full in ((3, 4),) if setting.tiny else RAGGED:
        yield Case(f"{ragged} against {full}", partial(_ragged, setting, ragged, full))


@torch.no_grad()
def _ragged(setting: Setting, ragged: int, full: int) -> dict[str, Any]:
    model = _network(setting)
    inputs = {str(n): _images(setting, n) for n in (ragged, full)}
    fast = _fast(setting, model, inputs[str(ragged)][:2])
    judges = {name: _judge(model, fast.dtype, x) for name, x in inputs.items()}
    halves = {name: x.to(fast.dtype) for name, x in inputs.items()}
    calls = {name: lambda _, x=x: fast(x) for name, x in halves.items()}
    if setting.tiny:
        found = {name: judges[name](name, 0, call(0)) for name, call in calls.items()}
        return {"checked": list(found), "failures": {k: v for k, v in found.items() if v}}

    def check(name: str, index: int, output: Tensor) -> str | None:
        return judges[name](name, index, output)

    comparison = measure(calls, [0], check=check, device="cuda", method=Method(10, 3.0, 0.02, 0.1))
    found = {"comparison": comparison.to_dict(), "failures": comparison.failures}
    if not comparison.failures:
        pace = {n: comparison[n].seconds.median / int(n) for n in calls}
        found["ratio"] = pace[str(ragged)] / pace[str(full)]
    return found


def _judge(model: ResNet, dtype: torch.dtype, x: Tensor) -> Judge:
    exact = eager(model, torch.float64, torch.contiguous_format)
    same = eager(model, dtype, torch.channels_last)
    with cudnn_benchmarking(False):
        return Judge([torch.cat([exact(part) for part in x.split(16)])], [same(x)])


LAYOUTS = {
    "NHWC": "-conv2d_hwnc",
    "HWNC": "conv2d_hwnc,-bottleneck_hwnc",
    "HWNC, whole blocks": "conv2d_hwnc,bottleneck_hwnc",
    "NHWC, no b2b_gemm": "-conv2d_hwnc,-b2b_gemm",
}
"""What FASTRES_KERNELS asks for, by what it is."""


def layout_cases(setting: Setting) -> Iterator[Case]:
    """Whole networks by the layouts and fusions that concern all of them."""
    for name in ("resnet50",) if setting.tiny else ("resnet50", "resnet18"):
        yield Case(f"{name} batch 256", partial(_layouts, setting, name))


@torch.no_grad()
def _layouts(setting: Setting, name: str) -> dict[str, Any]:
    model = _network(setting, name)
    x = _images(setting, 4 if setting.tiny else 256)
    calls = {}
    for what, kernels in LAYOUTS.items():
        with patch.dict(os.environ, {FORCE_VARIABLE: kernels}):
            calls[what] = _fast(setting, model, x[:2])
            for _ in range(0 if setting.tiny else 3):  # compiles, captures, replays
                calls[what](x.to(calls[what].dtype))
    dtype = calls["NHWC"].dtype
    judge = _judge(model, dtype, x)
    if setting.tiny:
        found = {what: judge(what, 0, call(x.to(dtype))) for what, call in calls.items()}
        return {"checked": list(found), "failures": {k: v for k, v in found.items() if v}}
    comparison = measure(
        calls, [x.to(dtype)], check=judge, device="cuda", method=Method(10, 4.0, 0.05, 0.1)
    )
    return {"comparison": comparison.to_dict(), "failures": comparison.failures}


def early_cases(setting: Setting) -> Iterator[Case]:
    """The whole network with and without programmatic dependent launch: equal bits, and times."""
    for batch in setting.batches(1, 8, 256):
        yield Case(f"resnet50 batch {batch}", partial(_early, setting, batch))


@contextmanager
def dependent_launch() -> Iterator[None]:
    """Kernels launched inside start before those before them have ended."""
    original = _common.launches_early
    _common.launches_early = lambda device: True
    try:
        yield
    finally:
        _common.launches_early = original


@torch.no_grad()
def _early(setting: Setting, batch: int) -> dict[str, Any]:
    model = _network(setting)
    x = _images(setting, batch)
    plain = _fast(setting, model, x)
    want = plain(x.to(plain.dtype))
    if setting.tiny:
        return {"checked": ["plain"], "failures": {}}
    with dependent_launch():
        early = _fast(setting, model, x)
        for _ in range(3):  # compiles, captures, replays
            early(x.to(early.dtype))

    def check(name: str, index: int, output: Tensor) -> str | None:
        return None if torch.equal(output, want) else "other bits than without it"

    calls = {"plain": plain, "early": early}
    method = Method(15, 2.0, 0.01, 0.1)
    comparison = measure(calls, [x.to(plain.dtype)], check=check, device="cuda", method=method)
    return {"comparison": comparison.to_dict(), "failures": comparison.failures}


def memory_cases(setting: Setting) -> Iterator[Case]:
    """The most that one call takes beyond weights and input; step by step, without a graph."""
    for batch in setting.batches(256):
        yield Case(f"batch {batch}", partial(_memory, setting, batch))


@torch.no_grad()
def _memory(setting: Setting, batch: int) -> dict[str, Any]:
    model = _network(setting)
    x = _images(setting, batch)
    fast = _fast(setting, model, x[:2])
    executor = fast.executor()
    twin = eager(model, fast.dtype, torch.channels_last)
    x = x.to(fast.dtype, memory_format=torch.channels_last)
    calls = {"fastres": lambda v: executor.run([v]), "eager": twin}
    for call in calls.values():
        call(x)  # compiles, and lets cuDNN choose
    peaks = {name: peak_bytes(call, x) for name, call in calls.items()}
    return {"peak_bytes": peaks, "ratio": peaks["fastres"] / peaks["eager"]}


def agreement_cases(setting: Setting) -> Iterator[Case]:
    """Top-1 against eager float32 on images with the spectrum of natural ones."""
    yield Case(f"{IMAGES} images", partial(_agreement, setting))


def natural_images(count: int, size: int, seed: int, device: torch.device) -> Tensor:
    """Random images whose amplitude falls with the frequency as in photographs (Field, 1987).

    (count, 3, size, size) float32 of unit variance; the colours are correlated.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    noise = torch.randn(count, 3, size, size, generator=generator).to(device)
    grey = noise.mean(1, keepdim=True) * 3**0.5
    noise = 0.9 * grey + (1 - 0.9**2) ** 0.5 * noise
    rows = torch.fft.fftfreq(size, device=device)[:, None]
    columns = torch.fft.rfftfreq(size, device=device)[None, :]
    amplitude = 1 / (rows**2 + columns**2).sqrt().clamp(min=1 / size)
    shaped = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=(size, size))
    return shaped / shaped.std(dim=(1, 2, 3), keepdim=True)


@torch.no_grad()
def _agreement(setting: Setting) -> dict[str, Any]:
    model = _network(setting)
    count, size, part = (8, 16, 4) if setting.tiny else (IMAGES, 224, 100)
    fast = _fast(setting, model, _images(setting, 2))
    exact = eager(model, torch.float32, torch.contiguous_format)
    same = eager(model, fast.dtype, torch.channels_last)
    right = {"fastres": 0, "eager in the same dtype": 0}
    with run.float32_products("ieee"):
        for seed in range(count // part):
            x = natural_images(part, size, seed, setting.device)
            want = exact(x).argmax(1)
            right["fastres"] += int((fast(x.to(fast.dtype)).argmax(1) == want).sum())
            right["eager in the same dtype"] += int((same(x).argmax(1) == want).sum())
    return {"images": count, "agreement": {name: n / count for name, n in right.items()}}


def repeat_cases(setting: Setting) -> Iterator[Case]:
    """The same call 1,000 times, bit by bit."""
    for batch in setting.batches(1, 8):
        yield Case(f"batch {batch}", partial(_repeats, setting, batch))


@torch.no_grad()
def _repeats(setting: Setting, batch: int) -> dict[str, Any]:
    model = _network(setting)
    x = _images(setting, batch)
    fast = _fast(setting, model, x)
    x = x.to(fast.dtype)
    first = fast(x)
    differ = torch.zeros((), dtype=torch.int64, device=setting.device)
    calls = 3 if setting.tiny else REPEATS
    for _ in range(calls):
        differ += (fast(x) != first).any()
    return {"calls": calls, "different": int(differ)}


def cold_cases(setting: Setting) -> Iterator[Case]:
    """Process start to the first answer, with empty and with filled caches."""

    def run() -> dict[str, Any]:
        if setting.tiny:
            return {"checked": [], "failures": {}}
        return {"starts": [asdict(s) for s in cold_starts("resnet50", setting.device)]}

    yield Case("resnet50 batch 1", run)
