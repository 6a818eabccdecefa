"""What every kernel file shares: argument checks, the launch itself and small device functions.

Checks raise before anything is launched or written, and name the argument, what was got and what
is wanted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._gpu import HOPPER, Gpu

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class KernelError(RuntimeError):
    """A kernel that cannot be compiled or launched, with arguments that are right."""


LAUNCHES: Counter[str] = Counter()
"""Kernel launches since the process began, by kernel name; tests read it."""

COMPILING: ContextVar[bool] = ContextVar("COMPILING", default=False)
"""Whether :func:`launch` compiles what a GPU has to run, and launches nothing."""

IntPair = int | Sequence[int]


@triton.jit
def relu_keeping_nan(x):
    """ReLU as torch computes it: NaN and -0.0 pass through (``tl.maximum`` would drop NaN)."""
    return tl.where(x < 0, 0.0, x)


INTERPRETED = not isinstance(relu_keeping_nan, triton.JITFunction)
"""Whether kernels run in Triton's interpreter, decided when triton was imported."""


@dataclass(frozen=True, slots=True)
class Host:
    """What runs kernels on tensors of ``device``, by default the CPU's, in a GPU's stead: Triton's
    interpreter, or a GPU in software.

    It shows as ``gpu``, of this compute ``capability``. ``run(kernel, grid, args, meta)`` launches.
    """

    capability: tuple[int, int]
    gpu: Gpu
    run: Callable[[Any, int, tuple[Any, ...], dict[str, Any]], None]
    gluon: bool = True  # whether it knows kernels in Gluon
    early: bool = False  # whether it launches kernels before the ones before them have ended
    findings: tuple[type[Exception], ...] = ()  # its own judgement of a kernel, passed on as it is
    device: str = "cpu"


def _start(kernel: Any, grid: int, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    kernel[(grid,)](*args, **meta)


# The interpreter plays TMA, and counts as one wide SM, so that it gets large tiles.
_INTERPRETER = Host((9, 0), replace(HOPPER, sms=1), run=_start, gluon=False)
_host = _INTERPRETER if INTERPRETED else None


def host(device: torch.device) -> Host | None:
    """What runs kernels on ``device`` in a GPU's stead; None where a GPU does, or nothing."""
    return _host if _host is not None and device.type == _host.device else None


@contextmanager
def hosted(by: Host) -> Iterator[None]:
    """Inside, ``by`` runs the kernels on tensors of its device, in every thread."""
    global _host
    before, _host = _host, by
    try:
        yield
    finally:
        _host = before


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability behind ``device``; (0, 0) where it is not NVIDIA's or none."""
    if (stand_in := host(device)) is not None:
        return stand_in.capability
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


# The interpreter neither multiplies nor rounds bfloat16, and multiplies float32 in full.
_EMULATED = tl.constexpr(INTERPRETED)


@triton.jit
def _to_tf32(x):
    """float32 ``x`` rounded to the nearest TF32, ties away from zero; NaN stays."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32; in int32 of int8."""
    if not _EMULATED and PRECISION == "tf32" and a.dtype == tl.float32:
        # Matrix units cut operands off, which makes all products smaller alike: through the layers
        # of a network that adds up to ten times the error of rounded operands.
        a = _to_tf32(a)
        b = _to_tf32(b)
    if _EMULATED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if a.dtype == tl.int8:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """float32 ``value`` in ``DTYPE``, rounded to nearest, ties to even."""
    if _EMULATED and tl.bfloat16 == DTYPE:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(DTYPE)


@triton.jit
def store_rounded(pointer, value, mask):
    """Store float32 ``value`` in the pointer's dtype, rounded to nearest, ties to even."""
    tl.store(pointer, rounded(value, pointer.dtype.element_ty), mask=mask)


@triton.jit
def await_producers(PDL: tl.constexpr):
    """The first statement of every kernel: under programmatic dependent launch, wait until the
    kernels before this one are through, then let the next one come and wait likewise.

    Nothing may be read or written before it, weights neither: what made them may still run.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def launches_early(device: torch.device) -> bool:
    """Whether kernels on ``device`` are launched before the ones before them have ended, which is
    asked for by FASTRES_PDL=1 and takes a GPU of compute capability 9.0 or newer."""
    if (stand_in := host(device)) is not None:
        return stand_in.early
    return _gpu_launches_early(device)


@cache
def _gpu_launches_early(device: torch.device) -> bool:
    if os.environ.get("FASTRES_PDL") != "1" or INTERPRETED:
        return False
    return capability(device) >= (9, 0)


def launch(kernel, grid: int, device: torch.device, /, *args: Any, **meta: Any) -> None:
    """Launch ``kernel`` on ``grid`` programs (axis x: y and z stop at 65,535) on ``device``.

    A kernel without the parameter PDL is always launched after the end of those before it, so it
    may stand among others.

    Raises:
        KernelError: Triton cannot compile or launch it; its own errors have no type in common.
    """
    compiling = COMPILING.get()
    if not compiling:
        LAUNCHES[kernel.__name__] += 1
    if launches_early(device) and "PDL" in kernel.arg_names:
        meta |= {"PDL": True, "launch_pdl": True}
    stand_in = host(device)
    try:
        if stand_in is not None:
            if not compiling:
                stand_in.run(kernel, grid, args, meta)
            return
        start = partial(kernel.warmup, grid=(grid,)) if compiling else kernel[(grid,)]
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                start(*args, **meta)
        else:
            start(*args, **meta)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if stand_in is not None and isinstance(error, stand_in.findings):
            raise
        why = (str(error).strip() or "no message").splitlines()[0]
        message = f"{kernel.__name__} cannot run: {type(error).__name__}: {why}"
        raise KernelError(message) from error


@dataclass(frozen=True)
class Operator:
    """What a custom operator computes by our kernel and by PyTorch, and its result on fake tensors,
    all of the same arguments."""

    kernel: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    fake: Callable[..., Tensor]


OPERATORS: dict[str, Operator] = {}
"""The custom operators ``torch.ops.fastres.*`` by name: on CUDA our kernels, on the CPU PyTorch."""


def register(name: str, found: Operator) -> Any:
    """Make ``torch.ops.fastres.<name>``, for torch.compile and torch.export."""
    OPERATORS[name] = found
    made = torch.library.custom_op(
        f"fastres::{name}", found.kernel, mutates_args=(), device_types="cuda"
    )
    made.register_fake(found.fake)
    made.register_kernel("cpu", found.plain)
    return made


def needs_int64(*tensors: Tensor | None) -> bool:
    """Whether an element offset can pass 2^31; the margin covers the tail of the last tile."""
    return any(t is not None and t.numel() > 2**31 - 2**16 for t in tensors)


def int_pair(name: str, value: IntPair, minimum: int) -> tuple[int, int]:
    """``value`` as (height, width), each at least ``minimum``."""
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, (int, torch.SymInt)) for v in pair):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    if min(pair) < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    return pair


def describe(t: Tensor) -> str:
    """Dtype, shape, strides and device of a tensor, for error messages."""
    return f"{t.dtype} of shape {tuple(t.shape)}, strides {t.stride()}, on {t.device}"


def check_tensor(
    name: str, t: Tensor, ndim: int | None = None, dtypes: Sequence[torch.dtype] = FLOATS
) -> None:
    """A tensor of one of the dtypes and of rank ``ndim``, whose gradient nobody wants."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
    if t.dtype not in dtypes:
        *others, last = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        wanted = f"{', '.join(others)} or {last}" if others else last
        raise TypeError(f"{name} must be {wanted}, got {t.dtype}")
    if ndim is not None and t.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(t.shape)}")
    if t.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} requires a gradient and this kernel has none: use torch.no_grad()"
        )


def check_like(name: str, t: Tensor, x: Tensor) -> None:
    """``t`` has the dtype and the device of the input ``x``."""
    if t.dtype != x.dtype:
        raise TypeError(f"{name} must be {x.dtype} as the input is, got {t.dtype}")
    check_same_device(name, t, x)


def check_same_device(name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name} must be on {x.device} as the input is, got {t.device}")


def check_shape(name: str, t: Tensor, shape: Sequence[int]) -> None:
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")


def check_channels_last(name: str, t: Tensor) -> None:
    """Dense NHWC memory. Dimensions of size 1 have no say, nor has an empty tensor."""
    _, c, h, w = t.shape
    dense = t.is_contiguous(memory_format=torch.channels_last)
    # Of sizes that torch.compile keeps open, a dimension may be of size 1: only this is certain.
    if t.numel() and not dense and t.stride() != (c * h * w, 1, c * w, c):
        raise ValueError(
            f"{name} must be dense in channels_last order, got {describe(t)}; "
            "use .contiguous(memory_format=torch.channels_last)"
        )


def check_contiguous(name: str, t: Tensor) -> None:
    """Dense row-major memory."""
    if not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got {describe(t)}")


def check_matrix(name: str, w: Tensor, shape: Sequence[int], x: Tensor) -> None:
    """A dense row-major matrix of ``shape``, of the dtype and on the device of the input ``x``."""
    check_tensor(name, w, 2)
    check_like(name, w, x)
    check_shape(name, w, shape)
    check_contiguous(name, w)


def check_activation(name: str, t: Tensor, shape: Sequence[int], x: Tensor) -> None:
    """A dense NHWC tensor of ``shape``, of the dtype and on the device of the input ``x``."""
    check_tensor(name, t, 4, (*FLOATS, torch.uint8))
    check_like(name, t, x)
    check_shape(name, t, shape)
    check_channels_last(name, t)


def check_vector(name: str, t: Tensor, size: int, x: Tensor) -> None:
    """A dense vector, float32 or of the dtype of the input ``x``."""
    check_tensor(name, t, 1)
    if t.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"{name} must be float32 or {x.dtype} as the input is, got {t.dtype}")
    check_same_device(name, t, x)
    check_shape(name, t, (size,))
    check_contiguous(name, t)


def check_precision(precision: str) -> None:
    """How products of float32 are rounded: not at all, or to TF32."""
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"precision must be 'ieee' or 'tf32', got {precision!r}")


def product_precision(dtype: torch.dtype, precision: str) -> str:
    """``precision`` as :func:`dot` takes it: a matter of float32, which is refused for others on
    AMD's GPUs and would compile a second kernel elsewhere."""
    return precision if dtype is torch.float32 else "ieee"


def runs_on(device: torch.device) -> bool:
    """Kernels run on CUDA tensors, or on the CPU where something runs them there."""
    return device.type == "cuda" or host(device) is not None


def check_device(x: Tensor) -> None:
    if not runs_on(x.device):
        raise RuntimeError(
            f"x is on {x.device}; Triton kernels take CUDA tensors, or CPU tensors when "
            "TRITON_INTERPRET=1 was set before triton was imported"
        )


def check_out_memory(
    out: Tensor, apart: dict[str, Tensor | None], same: dict[str, Tensor | None]
) -> None:
    """``out`` shares no byte with the tensors of ``apart``, and with each of ``same`` either no
    byte or, element by element, all of them. All are dense, ``same`` of out's shape and layout."""
    start, size = out.data_ptr(), out.numel() * out.element_size()
    for name, t in (apart | same).items():
        if t is None or (name in same and t.data_ptr() == start):
            continue
        other = t.data_ptr()
        if start < other + t.numel() * t.element_size() and other < start + size:
            raise ValueError(f"out overlaps {name} in memory; give it memory of its own")


def window_count(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How many windows of a convolution or pooling fit along one dimension."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
