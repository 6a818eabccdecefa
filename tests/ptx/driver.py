"""Triton without a GPU: kernels are compiled for a named target and run by the machine.

    with running("sm_90") as gpu:
        y = conv2d(x, w, b)  # tensors of the CPU

ptxas does not run: what it makes is the compile gate's. Must not share a process with Triton's
interpreter.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
from named_gpu import TARGETS, compiling_for
from triton import knobs
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.kernels import _common

from .copies import PLACE, TensorMap
from .global_memory import Memory
from .launch import launch
from .machine import Fault
from .parse import Unknown


@dataclass
class Gpu:
    """A GPU in software. ``edit`` may change the PTX; launches are counted by kernel."""

    target: str
    seed: int = 0
    edit: Callable[[str], str] | None = None
    profile: Counter[str] | None = None
    blocks: int | None = None  # at most so many of each launch, for counting
    launches: Counter[str] = field(default_factory=Counter)
    executed: Counter[str] = field(default_factory=Counter)
    blocks_run: int = 0
    moved: float = 0.0  # bytes of sectors and boxes, as if all blocks had run

    def host(self, early: bool = False) -> _common.Host:
        gpu, findings = TARGETS[self.target], (Fault, Unknown)
        return _common.Host(gpu.capability, gpu.record, self.run, early=early, findings=findings)

    def run(self, kernel: Any, grid: int, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        compiled = kernel.warmup(*args, grid=(grid,), **meta)
        wanted = triton.runtime.driver.active.get_current_target()
        assert compiled.metadata.target == wanted, "another GPU's code"
        self.launches[kernel.__name__] += 1
        memory = Memory(self.profile)
        values = list(arguments(memory, compiled, kernel, args))
        text = compiled.asm["ptx"] if self.edit is None else self.edit(compiled.asm["ptx"])
        shared, before = compiled.metadata.shared, self.traffic()
        self.executed += launch(
            text, memory, values, grid=grid, shared=shared, seed=self.seed, blocks=self.blocks
        )
        some = min(grid, self.blocks or grid)
        self.blocks_run += some
        self.moved += (self.traffic() - before) * grid / some

    def traffic(self) -> int:
        """Bytes that blocks have asked L2 for so far."""
        p = self.profile or {}
        sectors = p.get("load sectors", 0) + p.get("store sectors", 0)
        return 32 * sectors + p.get("copied bytes", 0)


def arguments(memory: Memory, compiled: Any, kernel: Any, args: tuple[Any, ...]) -> Iterator[int]:
    """What the launcher would pass, a tensor map as its place in ``memory.maps``."""
    metas = iter(compiled.metadata.tensordesc_meta or [])
    for name, value in zip(kernel.arg_names, args, strict=False):
        if compiled.src.signature.get(name) == "constexpr":
            continue
        if isinstance(value, (TensorDescriptor, GluonDescriptor)):
            meta = next(metas)
            place = PLACE + 128 * len(memory.maps)
            memory.maps[place] = tensor_map(value, meta)
            memory.kept.append(value.base)
            yield from (place, *map(int, value.shape), *map(int, value.strides))
        elif isinstance(value, torch.Tensor):
            yield memory.add(name, value)
        elif isinstance(value, float):
            yield int(np.float32(value).view(np.uint32))
        elif value is not None:
            yield int(value)


def tensor_map(value: TensorDescriptor, meta: dict[str, Any]) -> TensorMap:
    """The map that the driver makes of a descriptor: boxes are no wider than the swizzle."""
    base, mode, box = value.base, meta["swizzle"], list(meta["block_size"])
    if base.data_ptr() % 16:
        raise Fault("tensor map: the base must be aligned to 16 bytes")
    bits = base.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[base.element_size()])
    flat = bits.as_strided((base.untyped_storage().nbytes() // base.element_size(),), (1,), 0)
    values = flat.numpy()[base.storage_offset() :]
    return TensorMap(values, list(value.shape), list(value.strides), box, mode)


def only_ptx(backend: Any, stages: dict[str, Any], *rest: Any) -> None:
    stages["cubin"] = lambda source, metadata: b""


@contextlib.contextmanager
def running(target: str, early: bool = False, **options: Any) -> Iterator[Gpu]:
    """Inside, a GPU of this ``target`` runs our kernels on tensors of the CPU."""
    gpu = Gpu(target, **options)
    before, cache = knobs.runtime.add_stages_inspection_hook, knobs.cache.dir
    knobs.runtime.add_stages_inspection_hook = only_ptx
    knobs.cache.dir = f"{cache}-ptx"  # a real GPU must not find kernels without machine code
    try:
        with compiling_for(TARGETS[target]), _common.hosted(gpu.host(early)):
            yield gpu
    finally:
        knobs.runtime.add_stages_inspection_hook = before
        knobs.cache.dir = cache
