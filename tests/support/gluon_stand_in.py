"""Runs Gluon kernels on a CPU, as far as ours need it, and refuses what a GPU would get wrong.

Triton's interpreter does not know Gluon. Here a kernel's own source runs program by program on
torch tensors. What the hardware does in its own time counts as not done until it is waited for:
a copy's box holds NaN, a sum in flight cannot be read, memory that is still read by a product or a
copy cannot be written, and what threads have stored is not seen by a copy without a fence. A wait
that would never end is an error.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor


class Hazard(AssertionError):
    """The kernel relies on an order that nothing enforces."""


@dataclass
class Piece:
    """One allocated tile: its values and what the hardware is still doing with it."""

    values: Tensor
    arriving: bool = False  # a copy into it has not been waited for
    readers: set[int] = field(default_factory=set)  # products and copies out of it, in flight
    stored: bool = False  # by threads, and no fence since

    def check_readable(self) -> None:
        if self.arriving:
            raise Hazard("read before the copy that fills it has arrived")

    def check_writable(self) -> None:
        if self.arriving:
            raise Hazard("written while a copy is on its way")
        if self.readers:
            raise Hazard("written while a product or a copy still reads it")


@dataclass
class View:
    """A tile of shared memory as the kernel addresses it."""

    machine: Machine
    piece: Piece
    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None

    def reshape(self, shape: Sequence[int]) -> View:
        assert prod(shape) == self.piece.values.numel()
        return View(self.machine, self.piece, tuple(shape))

    def permute(self, order: Sequence[int]) -> View:
        return View(self.machine, self.piece, self.shape, tuple(order))

    def tensor(self) -> Tensor:
        self.piece.check_readable()
        values = self.piece.values.reshape(self.shape)
        return values if self.order is None else values.permute(self.order)

    def load(self, layout: Any) -> Tensor:
        return self.tensor().clone()

    def store(self, values: Tensor) -> None:
        self.piece.check_writable()
        assert tuple(values.shape) == self.shape
        self.piece.values.copy_(values.reshape(self.piece.values.shape))
        self.piece.stored = True


@dataclass
class Pieces:
    """An allocation whose first dimension numbers tiles."""

    views: list[View]

    def index(self, i: int) -> View:
        if not 0 <= i < len(self.views):
            raise Hazard(f"tile {i} of {len(self.views)}")
        return self.views[i]


@dataclass
class Barrier:
    """An mbarrier of count 1: a phase ends when its bytes are announced and all have come."""

    phases: int = 0
    announced: bool = False
    due: int = 0
    boxes: list[tuple[Piece, Tensor]] = field(default_factory=list)

    def expect(self, size: int) -> None:
        if self.announced:
            raise Hazard("announced twice in one phase")
        self.announced, self.due = True, self.due + size

    def wait(self, parity: int) -> None:
        if self.phases % 2 == parity:
            if not self.announced or self.due:
                raise Hazard(f"waits for ever: {self.due} bytes missing or none announced")
            for piece, values in self.boxes:
                piece.values.copy_(values.reshape(piece.values.shape))
                piece.arriving = False
            self.boxes, self.announced = [], False
            self.phases += 1
        elif self.boxes:
            raise Hazard("passes a wait of an earlier phase while copies are on their way")


@dataclass
class Sum:
    """An accumulator whose products may still run."""

    values: Tensor
    token: int

    def _read(self, *_: Any) -> Any:
        raise Hazard("a sum is read while products into it run")

    __add__ = __lt__ = to = _read


@dataclass
class Descriptor:
    """A tensor descriptor: boxes are zero outside of the tensor and not written there."""

    base: Tensor
    block: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    layout = "boxes"

    def _overlap(self, at: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        inside = [
            (max(0, a), max(0, min(size, a + b)))
            for a, b, size in zip(at, self.block, self.base.shape, strict=True)
        ]
        base = tuple(slice(lo, max(lo, hi)) for lo, hi in inside)
        box = tuple(slice(lo - a, max(lo, hi) - a) for (lo, hi), a in zip(inside, at, strict=True))
        return base, box

    def read(self, at: Sequence[int]) -> Tensor:
        box = torch.zeros(self.block, dtype=self.dtype)
        source, target = self._overlap(at)
        box[target] = self.base[source]
        return box

    def write(self, at: Sequence[int], box: Tensor) -> None:
        target, source = self._overlap(at)
        self.base[target] = box.reshape(self.block)[source]


class Machine:
    """One program's state; its attributes stand for what the kernel imports."""

    def __init__(self, program: int, num_warps: int) -> None:
        self.program = program
        self.warps = num_warps
        self.products: list[tuple[int, list[Piece]]] = []  # in flight, oldest first
        self.copies_out: list[Piece] = []
        self.pieces: list[Piece] = []
        self.tokens = 0
        self.gl = self._language()
        self.mbarrier = types.SimpleNamespace(
            init=lambda barrier, count: None,
            expect=lambda barrier, size: barrier.expect(size),
            wait=lambda barrier, phase: barrier.wait(phase),
            MBarrierLayout=lambda: "barriers",
        )
        self.tma = types.SimpleNamespace(store_wait=self.store_wait)

    def _language(self) -> types.SimpleNamespace:
        dtypes = {name: getattr(torch, name) for name in ("float32", "float16", "int64")}
        return types.SimpleNamespace(
            **dtypes,
            static_range=range,
            cdiv=triton.cdiv,
            program_id=lambda axis: self.program,
            num_warps=lambda: self.warps,
            allocate_shared_memory=self.allocate,
            arange=lambda start, end, layout: torch.arange(start, end),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            load=lambda pointer, mask=True, other=0.0: pointer.load(mask, other),
            SliceLayout=lambda *a: a,
            DotOperandLayout=lambda *a: a,
            NVMMADistributedLayout=lambda *a: a,
            SwizzledSharedLayout=lambda *a: a,
            convert_layout=lambda values, layout: values,
        )

    def allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
        if layout == "barriers":
            return Indexed([Barrier() for _ in range(shape[0])])
        if len(shape) == 4 and shape[0] == 1:  # one tile by itself
            return self._piece(dtype, shape)
        return Pieces([self._piece(dtype, shape[1:]) for _ in range(shape[0])])

    def _piece(self, dtype: torch.dtype, shape: Sequence[int]) -> View:
        piece = Piece(torch.full(tuple(shape), float("nan"), dtype=dtype))
        self.pieces.append(piece)
        return View(self, piece, tuple(shape))

    def copy_in(
        self, source: Descriptor, at: Sequence[int], barrier: Barrier, target: View
    ) -> None:
        target.piece.check_writable()
        target.piece.values.fill_(float("nan"))
        target.piece.arriving = True
        box = source.read(at)
        barrier.due -= box.numel() * box.element_size()
        barrier.boxes.append((target.piece, box))

    def copy_out(self, target: Descriptor, at: Sequence[int], source: View) -> None:
        if source.piece.stored:
            raise Hazard("copied out without a fence after the threads' stores")
        target.write(at, source.tensor())
        source.piece.readers.add(-1)
        self.copies_out.append(source.piece)

    def store_wait(self, pending: int) -> None:
        while len(self.copies_out) > pending:
            self.copies_out.pop(0).readers.discard(-1)

    def fence_async_shared(self) -> None:
        for piece in self.pieces:
            piece.stored = False

    def warpgroup_mma(
        self, a: Any, b: View, acc: Any, *, use_acc: bool = True, is_async: bool
    ) -> Sum:
        assert is_async
        left = a.tensor() if isinstance(a, View) else a
        start = acc.values if isinstance(acc, Sum) else acc
        values = left.float() @ b.tensor().float() + (start if use_acc else 0.0)
        self.tokens += 1
        read = [v.piece for v in (a, b) if isinstance(v, View)]
        for piece in read:
            piece.readers.add(self.tokens)
        self.products.append((self.tokens, read))
        return Sum(values, self.tokens)

    def warpgroup_mma_wait(self, pending: int, deps: Sequence[Any]) -> Any:
        while len(self.products) > pending:
            token, read = self.products.pop(0)
            for piece in read:
                piece.readers.discard(token)
        running = {token for token, _ in self.products}
        done = [d.values if isinstance(d, Sum) and d.token not in running else d for d in deps]
        return done[0] if len(done) == 1 else tuple(done)

    def check_end(self) -> None:
        """Nothing may be under way when the program's shared memory is given back."""
        if self.products or self.copies_out or any(piece.arriving for piece in self.pieces):
            raise Hazard("ends while products or copies are under way")


class Indexed(list):
    """Barriers, by number."""

    def index(self, i: int) -> Any:  # type: ignore[override]
        return self[i]


class Pointer:
    """The first element of a vector."""

    def __init__(self, values: Tensor, offset: Any = 0) -> None:
        self.values, self.offset = values, offset

    def __add__(self, offset: Tensor) -> Pointer:
        return Pointer(self.values, self.offset + offset)

    def load(self, mask: Tensor | bool, other: float) -> Tensor:
        where = torch.as_tensor(mask).expand_as(self.offset)
        return torch.where(where, self.values[torch.where(where, self.offset, 0)], other)


def _function(machine: Machine, kernel: Any) -> Callable[..., Any]:
    """The kernel's Python function over the stand-ins of what its module imports."""
    module = kernel.fn.__globals__
    names: dict[str, Any] = dict(module)
    for name, value in module.items():
        if hasattr(value, "fn"):
            names[name] = types.FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
    names |= {
        "gl": machine.gl,
        "mbarrier": machine.mbarrier,
        "tma": machine.tma,
        "copy_in": machine.copy_in,
        "copy_out": machine.copy_out,
        "fence_async_shared": machine.fence_async_shared,
        "warpgroup_mma": machine.warpgroup_mma,
        "warpgroup_mma_wait": machine.warpgroup_mma_wait,
        "await_producers": lambda early: None,
        "relu_keeping_nan": lambda x: torch.where(x < 0, 0.0, x),
    }
    return names[kernel.fn.__name__]


def launch(kernel: Any, grid: int, device: torch.device, /, *args: Any, **meta: Any) -> None:
    """As ``kernels._common.launch``, on CPU tensors."""
    num_warps = meta.pop("num_warps")
    for program in range(grid):
        machine = Machine(program, num_warps)
        _function(machine, kernel)(*map(_argument, args), **meta)
        machine.check_end()


def with_edit(module: types.ModuleType, old: str, new: str, folder: Path) -> types.ModuleType:
    """A kernels' module anew, with ``new`` in its source for ``old``, which stands there once."""
    assert module.__file__ is not None
    text = Path(module.__file__).read_text()
    assert text.count(old) == 1
    path = folder / "broken.py"  # a file, because Triton reads the source of what it compiles
    path.write_text(text.replace(old, new))
    name = f"{module.__name__}_broken"  # in the module's own package, as its relative imports need
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {spec.name: broken}):  # dataclasses look it up
        spec.loader.exec_module(broken)
    return broken


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer(value)
    if hasattr(value, "block_shape"):
        return Descriptor(value.base, tuple(value.block_shape))
    return value
