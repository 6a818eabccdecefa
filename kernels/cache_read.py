"""Reads a small set over and over: the bandwidth from the L2 cache to the multiprocessors.

    y[p] = sum of the `reads` blocks of x from block p * reads on, past the end from the start again

x is one vector of float32 whose size is a multiple of a block. Where it fits in the L2 cache and is
read many times in all, but never twice by one program in a row, every read is served by that cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import await_producers, check_device, check_tensor, launch

BLOCK = 4096


@triton.jit(do_not_specialize=["BLOCKS", "READS"])
def cache_read_kernel(
    x_ptr,  # [BLOCKS * BLOCK]
    y_ptr,  # [programs]
    BLOCKS,
    READS,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    await_producers(PDL)
    pid = tl.program_id(0)
    first = pid.to(tl.int64) * READS % BLOCKS
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(READS):
        block = (first + i) % BLOCKS
        # .cg: past the first-level cache, which programs on one multiprocessor would share.
        total += tl.load(x_ptr + block * BLOCK + tl.arange(0, BLOCK), cache_modifier=".cg")
    tl.store(y_ptr + pid, tl.sum(total))


def cache_read_ref(x: Tensor, programs: int, reads: int) -> Tensor:
    """The same in plain PyTorch."""
    sums = x.view(-1, BLOCK).sum(1)
    index = torch.arange(programs * reads, device=x.device) % len(sums)
    return sums[index].view(programs, reads).sum(1)


def cache_read(x: Tensor, programs: int, reads: int) -> Tensor:
    """Sums of what each program reads; ``4 * BLOCK * programs * reads`` bytes are read in all.

    Args:
        x: (n,), float32, n a multiple of :data:`BLOCK`.
        programs: how many read side by side.
        reads: blocks that each reads.

    Returns:
        (programs,), float32.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not what is wanted (named in the text).
    """
    check_tensor("x", x, 1)
    check_device(x)
    if x.dtype != torch.float32 or not x.numel() or x.numel() % BLOCK or not x.is_contiguous():
        raise ValueError(
            f"x must be a dense vector of float32 whose size is a multiple of {BLOCK}, "
            f"got {x.dtype} of shape {tuple(x.shape)}"
        )
    for name, value in (("programs", programs), ("reads", reads)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    y = x.new_empty(programs)
    blocks = x.numel() // BLOCK
    launch(cache_read_kernel, programs, x.device, x, y, blocks, reads, BLOCK=BLOCK, num_warps=8)
    return y
