"""Kernels in Triton and Gluon that a GPU would get wrong, each beside the form that is right.

The constexpr ``WRONG`` takes a barrier, a wait, a mask away, as one forgets them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

from .driver import running
from .machine import Fault

SIZE = 128
BLOCKED = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
TURNED = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))  # each warp holds all elements
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@triton.jit
def split(x, part, count, y, WRONG: tl.constexpr):
    """Four blocks' numbers, summed by the last to arrive."""
    i = tl.arange(0, 128)
    block = tl.program_id(0)
    tl.store(part + block * 128 + i, tl.load(x + block * 128 + i))
    if WRONG != "no barrier":
        tl.debug_barrier()
    if WRONG == "relaxed":
        last = tl.atomic_add(count, 1, sem="relaxed") == 3
    else:
        last = tl.atomic_add(count, 1, sem="acq_rel") == 3
    if last:
        total = tl.zeros((128,), tl.float32)
        for n in range(4):
            total += tl.load(part + n * 128 + (i ^ 32), cache_modifier=".cg")
        tl.store(y + (i ^ 32), total)


@triton.jit
def exchanged(x, part, y, WRONG: tl.constexpr):
    """Threads of two warps exchange numbers through global memory."""
    i = tl.arange(0, 128)
    tl.store(part + i, tl.load(x + i))
    if not WRONG:
        tl.debug_barrier()
    tl.store(y + (i ^ 32), tl.load(part + (i ^ 32)))


@triton.jit
def tiles(x, y, WRONG: tl.constexpr):
    """Each of two blocks copies a half of [128]; wrongly, the halves overlap."""
    i = tl.program_id(0) * (32 if WRONG else 64) + tl.arange(0, 64)
    tl.store(y + i, tl.load(x + i))


@triton.jit
def assembly(x, y, WRONG: tl.constexpr):
    """Threads of two warps exchange numbers through shared memory, which ``gather`` allocates."""
    i = tl.arange(0, 128)
    value = tl.gather(tl.load(x + i), i ^ 1, 0)
    tl.debug_barrier()
    middle: tl.constexpr = "" if WRONG else "bar.sync 0;"
    code: tl.constexpr = "st.shared.b32 [$2], $1;" + middle + "ld.shared.b32 $0, [$3];"
    value = tl.inline_asm_elementwise(
        code, "=f,f,r,r", [value, 4 * i, 4 * (i ^ 32)], dtype=tl.float32, is_pure=False, pack=1
    )
    tl.store(y + (i ^ 33), value)


@triton.jit
def copied(x, y, n, WRONG: tl.constexpr):
    """The first ``n`` numbers."""
    i = tl.arange(0, 128)
    if WRONG == "before":
        value = tl.load(x + i - 1, mask=i < n)
    elif WRONG == "no mask":
        value = tl.load(x + i)
    elif WRONG == "no other":
        value = tl.where(i < 128, tl.load(x + i, mask=i < n), 0.0)
    else:
        value = tl.load(x + i, mask=i < n, other=7.0)
    tl.store(y + i, value, mask=i < 128)


@triton.jit
def tail(x, y, start, WRONG: tl.constexpr):
    """512 numbers from ``start`` on, which is no multiple of four whatever the hint says."""
    i = tl.arange(0, 512)
    at = start + i
    if WRONG:
        at = tl.max_contiguous(tl.multiple_of(at, 4), 4)
    tl.store(y + i, tl.load(x + at))


@triton.jit
def columns(x, y, stride, WRONG: tl.constexpr):
    """The transpose of [8, 16]."""
    row, column = tl.arange(0, 8)[:, None], tl.arange(0, 16)[None, :]
    value = tl.load(x + row * stride + column)
    tl.store(y + column * (stride if WRONG else 8) + row, value)


@triton.jit
def follower(x, y, WRONG: tl.constexpr):
    """Launched before the kernels before it have ended."""
    i = tl.arange(0, 128)
    if WRONG:
        value = tl.load(x + i)
        gdc_wait()
    else:
        gdc_wait()
        value = tl.load(x + i)
    tl.store(y + i, value)


@gluon.jit
def through(x, y, WRONG: gl.constexpr):
    """Numbers through shared memory, by cp.async or by stores."""
    i = gl.arange(0, 128, BLOCKED)
    memory = gl.allocate_shared_memory(gl.float32, [128], PLAIN)
    if WRONG != "never written":
        async_copy.async_copy_global_to_shared(memory, x + i)
        async_copy.commit_group()
        async_copy.wait_group(1 if WRONG == "late" else 0)
    gl.store(y + gl.arange(0, 128, TURNED), memory.load(TURNED))


@gluon.jit
def engine(x, y, WRONG: gl.constexpr):
    """[16, 32] by TMA to shared memory, twice, and out again with one added."""
    memory = gl.allocate_shared_memory(gl.float32, [16, 32], x.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    SPREAD: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    mbarrier.init(ready, count=1)
    fence_async_shared()
    for turn in gl.static_range(2):
        mbarrier.expect(ready, 16 * 32 * (2 if WRONG == "bytes" else 4))
        tma.async_copy_global_to_shared(x, [16 * turn, 0], ready, memory)
        if WRONG != "no wait":
            mbarrier.wait(ready, 0 if WRONG == "phase" else turn)
        memory.store(memory.load(SPREAD) + 1)
        if WRONG != "no fence":
            fence_async_shared()
        tma.async_copy_shared_to_global(y, [16 * turn, 0], memory)
        if WRONG != "no store wait":
            tma.store_wait(0)
    tma.store_wait(0)


@gluon.jit
def product(x, y, WRONG: gl.constexpr):
    """x @ x.T of [64, 64]."""
    SPREAD: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    row = gl.arange(0, 64, gl.SliceLayout(1, SPREAD))[:, None]
    column = gl.arange(0, 64, gl.SliceLayout(0, SPREAD))[None, :]
    memory = gl.allocate_shared_memory(gl.float16, [64, 64], gl.NVMMASharedLayout(128, 16, 2))
    memory.store(gl.load(x + row * 64 + column))
    if WRONG != "no fence":
        fence_async_shared()
    total = gl.zeros((64, 64), gl.float32, SUM)
    total = warpgroup_mma(memory, memory.permute((1, 0)), total, is_async=True)
    total = warpgroup_mma_wait(1 if WRONG == "no wait" else 0, deps=(total,))
    row = gl.arange(0, 64, gl.SliceLayout(1, SUM))[:, None]
    column = gl.arange(0, 64, gl.SliceLayout(0, SUM))[None, :]
    gl.store(y + row * 64 + column, total)


Tensors = tuple[tuple[Any, ...], Tensor, Tensor]  # arguments, what is written, what is due


def numbers(*shape: int) -> Tensor:
    return torch.arange(1.0, 1.0 + torch.Size(shape).numel()).view(shape)


def plain(*more: int) -> Tensors:
    x, y = numbers(SIZE), torch.full((SIZE,), float("nan"))
    return (x, y, *more), y, x


def of_split() -> Tensors:
    x, y = numbers(4 * SIZE), torch.full((SIZE,), float("nan"))
    count = torch.zeros(1, dtype=torch.int32)
    return (x, torch.empty(4 * SIZE), count, y), y, x.view(4, SIZE).sum(0)


def of_exchanged() -> Tensors:
    x, y = numbers(SIZE), torch.full((SIZE,), float("nan"))
    return (x, torch.empty(SIZE), y), y, x


def of_copied() -> Tensors:
    x, y = numbers(101), torch.full((SIZE,), float("nan"))
    return (x, y, 101), y, torch.cat([x, torch.full((27,), 7.0)])


def of_tail() -> Tensors:
    x, y = numbers(517), torch.full((512,), float("nan"))
    return (x, y, 5), y, x[5:]


def of_columns() -> Tensors:
    x, y = numbers(8, 17)[:, :16], torch.full((16, 8), float("nan"))
    return (x, y, 17), y, x.T


def of_engine() -> Tensors:
    x, y = numbers(32, 32), torch.full((32, 32), float("nan"))
    layout = gl.NVMMASharedLayout.get_default_for([16, 32], gl.float32)
    maps = (TensorDescriptor.from_tensor(t, [16, 32], layout) for t in (x, y))
    return tuple(maps), y, x + 1


def of_product() -> Tensors:
    x, y = numbers(64, 64).remainder(7).half(), torch.full((64, 64), float("nan"))
    return (x, y), y, x.float() @ x.float().T


@dataclass(frozen=True)
class Bad:
    """``kernel`` with ``WRONG=wrong`` is refused for a reason that holds ``message``."""

    kind: str
    kernel: Any
    wrong: str | bool
    message: str
    given: Callable[[], Tensors] = plain
    grid: int = 1
    target: str = "sm_90"

    def problem(self, wrong: str | bool) -> str:
        """What the machine says of it; empty where all is right."""
        args, out, due = self.given()
        try:
            with running(self.target) as gpu:
                gpu.run(self.kernel, self.grid, args, {"WRONG": wrong, "num_warps": 4})
        except Fault as fault:
            return str(fault)
        return "" if torch.equal(out, due) else "numbers differ"

    def verdict(self) -> str:
        """What is wrong with what the machine says; empty where it tells right from wrong."""
        if right := self.problem(False):
            return f"the right form is refused: {right}"
        found = self.problem(self.wrong)
        return "" if self.message in found else f"not noticed: {found or 'equal'}"


BAD = (
    Bad("blocks race", split, "relaxed", "did not release", of_split, 4, "sm_80"),
    Bad("warps race to an atomic", split, "no barrier", "did not release", of_split, 4, "sm_80"),
    Bad("warps race in global memory", exchanged, True, "did not release", of_exchanged),
    Bad("blocks write one place", tiles, True, "by two warps at once", grid=2),
    Bad("warps race in shared memory", assembly, True, "without a barrier"),
    Bad("outside, no mask", copied, "no mask", "of x, which has 404", of_copied, target="sm_80"),
    Bad("outside, in front", copied, "before", "of x, which has 404", of_copied, target="sm_80"),
    Bad("masked, no other", copied, "no other", "numbers differ", of_copied, target="sm_80"),
    Bad("misaligned vector", tail, True, "not aligned", of_tail),
    Bad("wrong stride", columns, True, "of y, which has 512", of_columns),
    Bad("before its producers", follower, True, "before the kernels before"),
    Bad("late wait", through, "late", "before the copy", target="sm_80"),
    Bad("never written", through, "never written", "nothing has written", target="sm_80"),
    Bad("TMA, no wait", engine, "no wait", "before the copy", of_engine),
    Bad("TMA, other phase", engine, "phase", "before the copy", of_engine),
    Bad("TMA, bytes miscounted", engine, "bytes", "for ever", of_engine),
    Bad("TMA, no proxy fence", engine, "no fence", "proxy fence", of_engine),
    Bad("product, no proxy fence", product, "no fence", "proxy fence", of_product),
    Bad("product, no wait", product, "no wait", "belongs to a wgmma", of_product),
    Bad("TMA, no store wait", engine, "no store wait", "may still be read", of_engine),
)
