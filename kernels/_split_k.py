"""Split reductions: the workspace that programs of one tile share, and the sum of their parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import check_contiguous, describe
from ._config import ProblemSize, TileConfig, gpu_of, split_elements

WORKSPACE_COUNTS = tl.constexpr(4096)  # the most tiles whose reduction can be split


@triton.jit
def sum_split_k(acc, workspace_ptr, tile, split, SPLIT_K):
    """Leave ``acc`` in the workspace; (sum over the splits, whether this program, the last of
    its tile to arrive, holds it). The sum runs in the order of the splits, so it is always the
    same. ``workspace_ptr`` begins with a count per tile, 0 before and after."""
    SIZE: tl.constexpr = acc.shape[0] * acc.shape[1]
    i = tl.arange(0, acc.shape[0])[:, None] * acc.shape[1] + tl.arange(0, acc.shape[1])[None, :]
    sums_ptr = workspace_ptr.to(tl.pointer_type(acc.dtype))  # float32 or int32
    first = sums_ptr + WORKSPACE_COUNTS + tile * SPLIT_K * SIZE + i
    tl.store(first + split * SIZE, acc)
    tl.debug_barrier()  # all of the partial sum is written before the arrival is announced
    count_ptr = workspace_ptr.to(tl.pointer_type(tl.int32)) + tile
    last = tl.atomic_add(count_ptr, 1, sem="acq_rel") == SPLIT_K - 1
    acc = tl.zeros_like(acc)
    if last:
        for other in range(SPLIT_K):
            acc += tl.load(first + other * SIZE, cache_modifier=".cg")
        tl.store(count_ptr, 0)
    return acc, last


def workspace_size(problem: ProblemSize, config: TileConfig) -> int:
    """Elements of float32 that this tile needs as ``workspace``; 0 without a split reduction."""
    return _workspace_size(problem.tiles(config), config.split_k, config.block_m * config.block_n)


def _workspace_size(tiles: int, split_k: int, block: int) -> int:
    return WORKSPACE_COUNTS.value + tiles * split_k * block if split_k > 1 else 0


def new_workspace(device: torch.device) -> Tensor:
    """To be passed as ``workspace`` to any number of calls in a row, whatever tiles they select."""
    size = WORKSPACE_COUNTS.value + split_elements(gpu_of(device))
    return torch.zeros(size, dtype=torch.float32, device=device)


def split_workspace(
    given: Tensor | None, tiles: int, split_k: int, block: int, device: torch.device
) -> Tensor | None:
    """Workspace for ``tiles`` of ``block`` elements in ``split_k`` parts: ``given``, or new."""
    size = _workspace_size(tiles, split_k, block)
    if not size:
        return None
    if tiles > WORKSPACE_COUNTS.value:
        raise ValueError(
            f"config splits the reduction of {tiles} tiles; at most "
            f"{WORKSPACE_COUNTS.value} can be split"
        )
    if given is None:
        given = torch.empty(size, dtype=torch.float32, device=device)
        given[:tiles].zero_()
    elif given.dtype != torch.float32 or given.device != device or given.numel() < size:
        raise ValueError(
            f"workspace must be {size} or more elements of float32 on {device}, "
            f"got {describe(given)}"
        )
    else:
        check_contiguous("workspace", given)
    return given
