"""What else runs a ResNet: PyTorch in each of its modes, torch.compile, cuDNN, other runtimes.

A baseline is built at its first call, so that its first call shows what starting it costs. One that
cannot run raises :class:`Unavailable` with the reason, which reports show in place of a time.
"""

from __future__ import annotations

import copy
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from statistics import median_high
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..backends.select import AtenOps, CudnnOps
from ..errors import FastresError, one_line
from ..graph import plan
from ..graph.ir import Conv2d
from ..perf.ceilings import SHORT
from ..runtime.clocks import call_seconds
from ..runtime.cuda_graph import GraphRunner
from ..runtime.executor import Executor
from . import eight_bits

Model: TypeAlias = Callable[[Tensor], Tensor]

BUILD_SECONDS = 120.0
AUTOTUNE_SECONDS = 240.0
INT8_SECONDS = 600.0
TRIALS = 10
OPENVINO_TYPES = {  # the hint, and what a processor must be capable of
    torch.float32: ("f32", "FP32"),
    torch.bfloat16: ("bf16", "BF16"),
    torch.float16: ("f16", "FP16"),
    torch.int8: ("f32", "INT8"),
}


class Unavailable(FastresError):
    """A baseline cannot run here; the message says why."""


@dataclass(frozen=True)
class Baseline:
    """One way of running a model that fastres is compared with.

    Attributes:
        what: one line for a reader.
        devices: the device types that it is meant for.
        build: makes it from a model in eval mode, a dtype and an example input (float32 NCHW on
            the device); raises Unavailable where it cannot.
        limit: seconds that building may take.
        int8: whether it has a form in 8 bits, which torch.int8 stands for; it may take
            ``INT8_SECONDS`` to be calibrated.
    """

    name: str
    what: str
    devices: tuple[str, ...]
    build: Callable[[nn.Module, torch.dtype, Tensor], Model]
    limit: float = BUILD_SECONDS
    int8: bool = False

    def contender(self, model: nn.Module, dtype: torch.dtype, example: Tensor) -> Model:
        """A callable of float32 NCHW images that builds itself at its first call."""
        return Lazy(lambda: self._built(model, dtype, example))

    def label(self, dtype: torch.dtype) -> str:
        """The contender's name in reports."""
        return f"{self.name} {SHORT[dtype]}"

    def _built(self, model: nn.Module, dtype: torch.dtype, example: Tensor) -> Model:
        # Weights made in inference mode could not be compiled or exported.
        limit = INT8_SECONDS if dtype is torch.int8 else self.limit
        with time_limit(limit, self.name), torch.inference_mode(False), torch.no_grad():
            return self.build(model, dtype, example)


@dataclass
class Lazy:
    """Calls what ``build`` returns, built at the first call."""

    build: Callable[[], Model]
    _model: Model | None = field(default=None, init=False)

    def __call__(self, x: Tensor) -> Tensor:
        if self._model is None:
            self._model = self.build()
        return self._model(x)


class Plain(nn.Module):
    """A model as PyTorch runs it: a ResNet of fastres would dispatch to its engine in eval mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = getattr(self.model, "_forward_impl", self.model)(x)
        return output


def eager(model: nn.Module, dtype: torch.dtype, memory_format: torch.memory_format) -> Model:
    """PyTorch as it comes, from a copy of the model."""
    copied = _copied(model, dtype, memory_format)
    return lambda x: copied(x.to(dtype=dtype, memory_format=memory_format))


def contenders(
    model: nn.Module, dtype: torch.dtype, example: Tensor, names: Sequence[str]
) -> dict[str, Model]:
    """The named baselines in one dtype, by label.

    Those meant for other devices are left out, and in 8 bits those without a form in 8 bits.
    """
    check_names(names)
    chosen = [b for name in names if example.device.type in (b := BASELINES[name]).devices]
    if dtype is torch.int8:
        chosen = [b for b in chosen if b.int8]
    return {b.label(dtype): b.contender(model, dtype, example) for b in chosen}


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for names that are none of :data:`BASELINES`."""
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise ValueError(
            f"baselines must be of {', '.join(BASELINES)}; got {', '.join(map(repr, unknown))}"
        )


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raises Unavailable inside the block once it has taken this long.

    Where there is no alarm clock, on Windows and outside of the main thread, the block runs on.
    """
    main = threading.current_thread() is threading.main_thread()
    if not (main and hasattr(signal, "setitimer")):
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise Unavailable(f"{what} was not ready after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class FasterOfTwo(CudnnOps):
    """Each convolution by cuDNN's fused operator or unfused, whichever was faster when first met.

    The fused operator is not always the faster one: pytorch#68506 shows a channels_last 7x7 that is
    17 times slower. Layers are timed outside of graph capture, which comes with a later call.
    """

    name = "cudnn, measured"

    def __init__(self) -> None:
        self.choices: dict[Any, bool] = {}

    def conv(
        self, op: Conv2d, prepared: Any, x: Tensor, residual: Tensor | None, in_place: bool
    ) -> Tensor:
        key = (op, tuple(x.shape))
        if key not in self.choices and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{op.weight} was not timed before the graph's capture")
        if key not in self.choices:
            fused = _seconds(lambda: CudnnOps.conv(self, op, prepared, x, residual, False))
            plain = _seconds(lambda: AtenOps.conv(self, op, prepared, x, residual, False))
            self.choices[key] = fused < plain
        form = CudnnOps if self.choices[key] else AtenOps
        return form.conv(self, op, prepared, x, residual, in_place)


def _seconds(call: Callable[[], Any]) -> float:
    """Median GPU time of a call, after one that lets cuDNN choose its algorithm."""
    return median_high(call_seconds(call, torch.device("cuda"), TRIALS))


def _copied(model: nn.Module, dtype: torch.dtype, memory_format: torch.memory_format) -> Any:
    """A copy as PyTorch runs it."""
    copied: Any = Plain(copy.deepcopy(model))
    return copied.eval().to(dtype=dtype, memory_format=memory_format)


def _executor(model: nn.Module, dtype: torch.dtype, ops: AtenOps) -> Executor:
    return Executor(plan.of_module(model), model, ops, dtype)


def _folded(model: nn.Module, dtype: torch.dtype, example: Tensor) -> Model:
    executor = _executor(copy.deepcopy(model), dtype, AtenOps())
    return lambda x: executor.run([x.to(dtype)])


def _cudnn_fused(model: nn.Module, dtype: torch.dtype, example: Tensor) -> Model:
    runner = GraphRunner(_executor(copy.deepcopy(model), dtype, FasterOfTwo()))
    return lambda x: runner(x.to(dtype))


def _inductor(
    backend: str = "inductor", /, **settings: Any
) -> Callable[[nn.Module, torch.dtype, Tensor], Model]:
    def build(model: nn.Module, dtype: torch.dtype, example: Tensor) -> Model:
        from torch._inductor import config

        form: Any = {"dtype": dtype, "memory_format": torch.channels_last}
        copied = _copied(model, dtype, torch.channels_last)
        # fullgraph also refuses to fall back to eager once dynamo's limit of variants is reached.
        compiled = torch.compile(copied, backend=backend, dynamic=False, fullgraph=True)
        # Freezing is looked up while dynamo traces, so that torch.compile(options=) is too late.
        with config.patch(settings), torch.inference_mode():
            compiled(example.to(**form))
        graphs = settings.get("triton.cudagraphs", False)

        def call(x: Tensor) -> Tensor:
            if not graphs:
                return compiled(x.to(**form))
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(x.to(**form)).clone()  # the graph's own output lives until its next run

        return call

    return build


def _zentorch(model: nn.Module, dtype: torch.dtype, example: Tensor) -> Model:
    _require("zentorch", "zentorch")
    try:
        import zentorch  # registers its backend
    except Exception as error:  # each release is built for one of torch
        reason = f"zentorch does not import beside torch {torch.__version__}: {one_line(error)}"
        raise Unavailable(reason) from error
    if not torch.cpu._is_avx512_supported():
        version = zentorch.__version__
        raise Unavailable(f"zentorch {version} leaves graphs as they are without AVX-512")
    return _inductor("zentorch", freezing=True)(model, dtype, example)


def _tensorrt(model: nn.Module, dtype: torch.dtype, example: Tensor) -> Model:
    _require("torch_tensorrt", "torch-tensorrt")
    import torch_tensorrt

    copied = _copied(model, dtype, torch.contiguous_format)
    built = torch_tensorrt.compile(
        copied, ir="dynamo", inputs=[example.to(dtype)], enabled_precisions={dtype}
    )
    return lambda x: built(x.to(dtype))


def _onnxruntime(model: nn.Module, dtype: torch.dtype, example: Tensor) -> Model:
    for module, package in (("onnxruntime", "onnxruntime"), ("onnxscript", "onnxscript")):
        _require(module, package)
    import onnxruntime

    cuda = example.is_cuda
    provider = "CUDAExecutionProvider" if cuda else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise Unavailable(f"the installed onnxruntime has no {provider} (onnxruntime-gpu has it)")
    if dtype is torch.bfloat16 or (dtype is torch.float16 and not cuda):
        raise Unavailable(f"onnxruntime has no {SHORT[dtype]} convolution for {provider}")
    dtype, int8 = (torch.float32, True) if dtype is torch.int8 else (dtype, False)
    copied = _copied(model, dtype, torch.contiguous_format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        exported: Any = torch.onnx.export(copied, (example.to(dtype),), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    proto = exported.model_proto
    written = eight_bits.of_onnx(proto, example) if int8 else proto.SerializeToString()
    session = onnxruntime.InferenceSession(written, options, providers=[provider])
    name = session.get_inputs()[0].name
    if cuda:
        return _bound(session, name, dtype)
    return lambda x: torch.from_numpy(session.run(None, {name: x.to(dtype).numpy()})[0])


def _bound(session: Any, name: str, dtype: torch.dtype) -> Model:
    """onnxruntime on GPU memory that torch owns, both ways."""
    import numpy as np

    kind = np.float16 if dtype is torch.float16 else np.float32
    result = session.get_outputs()[0]

    def call(x: Tensor) -> Tensor:
        x = x.to(dtype).contiguous()
        y = torch.empty(x.shape[0], result.shape[-1], dtype=dtype, device=x.device)
        binding = session.io_binding()
        where = ("cuda", x.device.index or 0, kind)
        binding.bind_input(name, *where, tuple(x.shape), x.data_ptr())
        binding.bind_output(result.name, *where, tuple(y.shape), y.data_ptr())
        torch.cuda.current_stream().synchronize()  # onnxruntime has a stream of its own
        session.run_with_iobinding(binding)
        return y

    return call


def _openvino(model: nn.Module, dtype: torch.dtype, example: Tensor) -> Model:
    packages = ("openvino", "nncf") if dtype is torch.int8 else ("openvino",)
    for package in packages:
        _require(package, package)
    import openvino

    hint, capability = OPENVINO_TYPES[dtype]
    able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if capability not in able:  # it would compute in float32 without a word
        raise Unavailable(f"OpenVINO has no {capability} on this processor")
    int8 = dtype is torch.int8
    copied = _copied(model, torch.float32, torch.contiguous_format)
    converted = openvino.convert_model(copied, example_input=example)
    if int8:
        converted = eight_bits.by_nncf(converted, example)
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    hints = [hint] + ["bf16"] * (int8 and "BF16" in able)  # of what is not in 8 bits
    forms = [
        openvino.compile_model(converted, "CPU", {**settings, "INFERENCE_PRECISION_HINT": each})
        for each in hints
    ]

    def seconds(form: Any) -> float:
        return median_high(call_seconds(lambda: form(example.numpy()), example.device, TRIALS))

    compiled = min(forms, key=seconds) if len(forms) > 1 else forms[0]
    result = torch.float32 if int8 else dtype
    return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy()).to(result)


def _require(module: str, package: str) -> None:
    if find_spec(module) is None:
        raise Unavailable(f"{package} is not installed")


_ALL: tuple[Baseline, ...] = (
    Baseline("folded", "batch norm folded by fastres, plain F.conv2d", ("cpu", "cuda"), _folded),
    Baseline(
        "cuDNN fused",
        "folded, cuDNN's fused operators or unfused ones by measurement, in a CUDA graph",
        ("cuda",),
        _cudnn_fused,
    ),
    Baseline(
        "compile CUDA graphs",
        "torch.compile, channels_last, as mode reduce-overhead",
        ("cuda",),
        _inductor(**{"triton.cudagraphs": True}),
    ),
    Baseline(
        "inductor freezing",
        "torch.compile, channels_last, weights frozen",
        ("cpu",),
        _inductor(freezing=True),
    ),
    Baseline(
        "max-autotune",
        "torch.compile, channels_last, weights frozen, as mode max-autotune",
        ("cpu", "cuda"),
        _inductor(
            **{
                "freezing": True,
                "max_autotune": True,
                "coordinate_descent_tuning": True,
                "triton.cudagraphs": True,
            }
        ),
        AUTOTUNE_SECONDS,
    ),
    Baseline("TensorRT", "torch-tensorrt", ("cuda",), _tensorrt),
    Baseline(
        "zentorch",
        "torch.compile by AMD's plug-in, channels_last, weights frozen",
        ("cpu",),
        _zentorch,
    ),
    Baseline(
        "onnxruntime",
        "the ONNX export in onnxruntime; int8: its static quantisation, QDQ, by channel",
        ("cpu", "cuda"),
        _onnxruntime,
        int8=True,
    ),
    Baseline(
        "OpenVINO",
        "OpenVINO on the CPU; int8: by NNCF, the rest in float32 or bfloat16, which is faster",
        ("cpu",),
        _openvino,
        int8=True,
    ),
)
BASELINES: Mapping[str, Baseline] = {baseline.name: baseline for baseline in _ALL}
"""By name. Eager float32, which all ratios refer to, and eager channels_last are always there."""

CHEAP = ("folded", "cuDNN fused", "TensorRT", "onnxruntime", "OpenVINO")
STANDARD = (*CHEAP[:2], "compile CUDA graphs", "inductor freezing", "zentorch", *CHEAP[2:])
