"""fastres against PyTorch: the contenders of a case, timed where their outputs are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.aten import cudnn_benchmarking
from ..errors import UnknownModelError, one_line
from ..frontends.fast_model import FastModel
from ..frontends.optimize import optimize
from ..frontends.quantize import quantize
from ..models.pretrained import is_run, load_network
from ..models.resnet import ResNet
from ..perf.ceilings import measured_ceilings
from ..perf.environment import native_bf16
from ..perf.roofline import Ceilings, roofline
from ..perf.timing import DEFAULT_METHOD, Method, Progress, measure
from .accuracy import AccuracyCheck, calibrate_, random_images
from .baselines import SHORT, Lazy, Model, check_names, contenders, eager
from .eight_bits import calibration_images
from .presets import Spec
from .probes import SUSTAINED_SECONDS, cold_starts, layers, probe, python_seconds
from .report import Report
from .results import Case, Check, Probe

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TIMED_DTYPES = {**DTYPES, "int8": torch.int8}
BASELINE = "eager fp32"
SMALL = 32  # pixels of a side where only the number of steps counts


def benchmark(
    models: str | Sequence[str] = ("resnet50",),
    *,
    batches: Sequence[int] = (1, 8),
    dtypes: Sequence[str] | None = None,
    size: int = 224,
    device: torch.device | str = "cpu",
    method: Method = DEFAULT_METHOD,
    weights: str | None = None,
    baselines: Sequence[str] = (),
    probes: float = 0.0,
    progress: Callable[[str], Progress] | None = None,
    on_case: Callable[[Case], None] | None = None,
    **kwargs: Any,
) -> Report:
    """Time models against eager PyTorch, one interleaved run for each model and batch size.

    Args:
        models: names that :func:`fastres.create_model` knows, or folders of training runs; or one.
        batches: batch sizes.
        dtypes: any of ``"float32"``, ``"float16"``, ``"bfloat16"``; by default what is fast on the
            device. On a CPU also ``"int8"``: quantised, all on the same images. On CUDA also
            ``"tf32"`` and ``"ieee"``: float32 with all products made so, in a run of its own; plain
            ``"float32"`` does what torch's flags say. Plain eager float32 is the baseline in any
            case.
        size: height and width of the images.
        device: ``"cpu"`` or ``"cuda"``.
        method: how often and how long.
        weights: name of pretrained weights; by default random ones with lively batch norms.
        baselines: names of contenders besides eager PyTorch: ``"folded"``, ``"onnxruntime"``,
            ``"inductor freezing"`` and others; an unknown name is answered by the list.
        probes: seconds per contender for the latency of up to 1,000 single calls, with which come
            memory and sustained throughput; 0 leaves them out.
        progress: called with the title of each case; returns the callback for its rounds.
        on_case: called with each case when it is done.
        kwargs: arguments of the network, such as ``num_classes``.

    Raises:
        ValueError: for an unknown dtype or device, a size or batch below 1, or if no model is
            known.
    """
    specs = [
        Spec(name, batch, size, tuple(dtypes or ()), tuple(baselines), probes, sustained=True)
        for name in ([models] if isinstance(models, str) else models)
        for batch in batches
    ]
    return run(specs, device, method, weights, progress, on_case, **kwargs)


def run(
    specs: Sequence[Spec],
    device: torch.device | str = "cpu",
    method: Method = DEFAULT_METHOD,
    weights: str | None = None,
    progress: Callable[[str], Progress] | None = None,
    on_case: Callable[[Case], None] | None = None,
    cold: bool = False,
    **kwargs: Any,
) -> Report:
    """Measure cases one after another; one that fails is listed and the rest goes on.

    Args and raises: as :func:`benchmark`; ``cold`` also times fresh processes of the first model.
    """
    device = parse_device(device)
    specs = [part for spec in specs for part in spec.by_products()]
    for spec in specs:
        _check_spec(spec, device)
    ceilings: dict[torch.dtype, Ceilings] = {}
    cases: list[Case] = []
    lost: list[Check] = []
    unknown: list[UnknownModelError] = []
    built: tuple[str, ResNet] | None = None
    for spec in specs:
        try:
            if built is None or built[0] != spec.model:
                built = (spec.model, _network(spec.model, weights, device, **kwargs))
            follow = progress(spec.title) if progress else None
            case = _measure(spec, built[1], device, method, weights, ceilings, follow)
        except UnknownModelError as error:
            unknown.append(error)
            lost.append(Check(spec.title, False, f"not measured: {error}"))
        except (RuntimeError, MemoryError) as error:
            lost.append(Check(spec.title, False, f"not measured: {one_line(error)}"))
        else:
            cases.append(case)
            if on_case:
                on_case(case)
    if unknown and len(unknown) == len(specs):
        raise unknown[0]
    known = dict.fromkeys(case.model for case in cases)
    return Report.now(
        f"fastres against PyTorch: {', '.join(known)}",
        checks=tuple(lost),
        cases=tuple(cases),
        cold_starts=cold_starts(next(iter(known)), device) if cold and known else (),
        ceilings=tuple(ceilings.values()),
    )


def _check_spec(spec: Spec, device: torch.device) -> None:
    for name, value in (("batch", spec.batch), ("size", spec.size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name in spec.dtypes:
        if parse_dtype(name, TIMED_DTYPES) is torch.int8 and device.type != "cpu":
            raise ValueError(f"dtype 'int8' is timed on a CPU alone, got {device.type!r}")
    if spec.products and device.type != "cuda":
        raise ValueError(f"dtype {spec.products!r} needs a CUDA device, got {device.type!r}")
    check_names(spec.baselines)


def _network(name: str, weights: str | None, device: torch.device, **kwargs: Any) -> ResNet:
    model = load_network(name, weights=weights, **kwargs)
    if weights is None and not is_run(name):
        calibrate_(model)
    return model.to(device)


def _measure(
    spec: Spec,
    model: ResNet,
    device: torch.device,
    method: Method,
    weights: str | None,
    ceilings: dict[torch.dtype, Ceilings],
    progress: Progress | None,
) -> Case:
    """One case; ceilings that it needs are measured once and kept in ``ceilings``."""
    dtypes = [parse_dtype(name, TIMED_DTYPES) for name in spec.dtypes] or fast_dtypes(device)
    images = [x.to(device) for x in random_images(spec.batch, model.conv1.in_channels, spec.size)]
    source = weights or "random, with batch norms calibrated on random images"
    source = "of the run's best epoch" if is_run(spec.model) else source
    method = replace(method, cold_cache=spec.cold_cache or method.cold_cache)
    with float32_products(spec.products):
        case = compare(
            spec.model,
            model,
            images,
            dtypes,
            source,
            method,
            progress,
            spec.baselines,
            spec.probes,
            SUSTAINED_SECONDS * spec.sustained,
        )
    case = replace(case, form=replace(spec, cold_cache=method.cold_cache).form)
    if not (spec.probes or spec.layers):
        return case
    if device.type == "cpu":
        case = replace(case, probes=_with_python(case.probes, model, dtypes, images[0]))
    floors, steps = {}, {}
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]  # bytes have no ceiling here
    with torch.inference_mode(), float32_products(spec.products):
        for dtype in floats:
            if dtype not in ceilings:
                ceilings[dtype] = measured_ceilings(device, dtype)
            floor = roofline(
                model, images[0].shape, itemsize=dtype.itemsize, ceilings=ceilings[dtype]
            )
            floors[SHORT[dtype]] = floor.seconds
            if spec.layers:
                steps[f"fastres {SHORT[dtype]}"] = layers(model, dtype, images[0], ceilings[dtype])
    return replace(case, floors=floors, layers=steps)


def _with_python(
    probes: Mapping[str, Probe], model: nn.Module, dtypes: Sequence[torch.dtype], x: Tensor
) -> dict[str, Probe]:
    """The probes, ours with the engine's own seconds, which do not depend on the images' size."""
    found = dict(probes)
    small = x[:1, :, :SMALL, :SMALL]
    for dtype in dtypes:
        name = f"fastres {SHORT[dtype]}"
        if name in found and dtype.is_floating_point:
            with torch.inference_mode(False), torch.no_grad():
                fast = optimize(model, dtype=dtype, verify=False)
            assert isinstance(fast, FastModel)
            with torch.inference_mode():
                seconds = python_seconds(fast, small.to(dtype))
            found[name] = replace(found[name], python=seconds)
    return found


def compare(
    name: str,
    model: nn.Module,
    images: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    weights: str,
    method: Method,
    progress: Progress | None = None,
    baselines: Sequence[str] = (),
    probes: float = 0.0,
    sustained_seconds: float = 0.0,
) -> Case:
    """Time one model, in eval mode, on float32 NCHW batches of images that take turns.

    Every contender gets the same float32 NCHW input and converts it inside the timed region.
    """
    device = images[0].device
    calls: dict[str, Model] = {BASELINE: eager(model, torch.float32, torch.contiguous_format)}
    for dtype in dtypes:
        calls |= contenders_for(model, dtype, images[0])
        calls |= contenders(model, dtype, images[0], baselines)
    with torch.inference_mode(), cudnn_benchmarking():
        judge = AccuracyCheck(model, calls, images, torch.int8 in dtypes)
        comparison = measure(
            calls, images, check=judge, device=device, method=method, progress=progress
        )
        right = {n: call for n, call in calls.items() if n not in comparison.failures}
        found = (
            probe(right, images, budget=probes, sustained_seconds=sustained_seconds)
            if probes
            else {}
        )
    if baselines:
        torch.compiler.reset()  # dynamo keeps only a few variants of one piece of code
    n, c, h, w = images[0].shape
    return Case(name, (n, c, h, w), weights, comparison, judge.errors, found)


@contextmanager
def float32_products(kind: str) -> Iterator[None]:
    """Inside, float32 is multiplied in ``"tf32"`` or ``"ieee"``; for ``""`` as torch's flags say.

    The flags are the process', and are put back.
    """
    cudnn: Any = torch.backends.cudnn
    holders = (cudnn.conv, torch.backends.cuda.matmul) if kind else ()
    before = [holder.fp32_precision for holder in holders]
    try:
        for holder in holders:
            holder.fp32_precision = kind
        yield
    finally:
        for holder, value in zip(holders, before, strict=True):
            holder.fp32_precision = value


def contenders_for(model: nn.Module, dtype: torch.dtype, example: Tensor) -> dict[str, Model]:
    """Eager channels_last and fastres in one dtype; on CUDA with Triton alone and with cuDNN."""
    kind = SHORT[dtype]
    if dtype is torch.int8:
        return {"fastres int8": ours_in_8_bits(model, example)}
    found = {f"eager {kind} channels_last": eager(model, dtype, torch.channels_last)}
    backends = ("triton", "auto") if example.is_cuda else ("auto",)
    for backend in backends:
        label = f"fastres {kind}" + f" {backend}" * (len(backends) > 1)
        found[label] = ours(model, dtype, backend, example)
    return found


def ours(model: nn.Module, dtype: torch.dtype, backend: str, example: Tensor) -> Model:
    """The optimised model, built and verified at its first call."""

    def build() -> Model:
        with torch.inference_mode(False), torch.no_grad():
            fast = optimize(model, example_input=example, dtype=dtype, backend=backend)
        return lambda x: fast(x.to(dtype))

    return Lazy(build)


def ours_in_8_bits(model: nn.Module, example: Tensor) -> Model:
    """The quantised model, built at its first call; of random weights agreement says nothing."""

    def build() -> Model:
        images = calibration_images(example)
        with torch.inference_mode(False), torch.no_grad():
            return quantize(model, images, images=len(images), min_agreement=None)

    return Lazy(build)


def fast_dtypes(device: torch.device) -> list[torch.dtype]:
    """What is worth timing: float16 on CUDA; on a CPU float32, and bfloat16 if it multiplies it."""
    if device.type == "cuda":
        return [torch.float16]
    return [torch.float32, torch.bfloat16] if native_bf16() else [torch.float32]


def parse_dtype(name: str, known: Mapping[str, torch.dtype] = DTYPES) -> torch.dtype:
    """The dtype of a name. Raises ValueError listing the known names."""
    if name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}; got {name!r}")
    return known[name]


def parse_device(name: torch.device | str) -> torch.device:
    """The device of a name; ``"auto"`` is CUDA where there is one, else the CPU.

    Raises ValueError for anything but a CPU or a CUDA device that is present.
    """
    present = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if present else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu or cuda; got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!s} is not here: torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return device
