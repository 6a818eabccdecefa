"""The choice of tiles: pure, by shape and GPU, and never too large for the GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from fastres.kernels._config import (
    HOPPER,
    Gpu,
    ProblemSize,
    TileConfig,
    candidates,
    estimated_cycles,
    select_config,
)
from fastres.kernels.conv import CONFIGS

ADA = Gpu(sms=128, shared_limit=99 * 1024)
AMD = Gpu(sms=304, shared_limit=64 * 1024)
KINDS = {"half": 2, "tf32": 4, "ieee": 4}


def conv(batch: int, size: int, outputs: int, channels: int, window: int, itemsize: int = 2):
    return ProblemSize(batch * size * size, outputs, channels, window**2, 1, itemsize)


def pick(problem: ProblemSize, math_mode: str = "half", gpu: Gpu = HOPPER) -> TileConfig:
    return select_config(CONFIGS[math_mode], problem, math_mode, gpu)


@pytest.mark.fault(27)
@pytest.mark.parametrize("math_mode", KINDS)
@pytest.mark.parametrize("gpu", [HOPPER, ADA, AMD], ids=["Hopper", "Ada", "AMD"])
@pytest.mark.parametrize("batch", [1, 8, 32, 256])
@pytest.mark.parametrize(
    "layer",
    [(56, 64, 64, 3), (28, 512, 128, 1), (7, 512, 512, 3), (112, 64, 3, 7), (1, 1000, 512, 1)],
)
def test_the_choice_fits_and_repeats(math_mode, gpu, batch, layer):
    problem = conv(batch, *layer, KINDS[math_mode])
    row = pick(problem, math_mode, gpu)
    assert row.shared_bytes(problem.itemsize) <= gpu.shared_limit
    assert row == pick(problem, math_mode, gpu)
    least = min(
        estimated_cycles(r, problem, math_mode, gpu)
        for r in candidates(CONFIGS[math_mode], problem, gpu)
    )
    assert estimated_cycles(row, problem, math_mode, gpu) == least


@pytest.mark.fault(27)
def test_rows_lose_stages_before_they_are_pruned():
    row = TileConfig(128, 128, 64, 8, 4)
    assert row.fitted(2, HOPPER.shared_limit) == row
    assert row.fitted(2, 100 * 1024) == replace(row, num_stages=3)
    assert row.fitted(2, 64 * 1024) == replace(row, num_stages=2)
    assert row.fitted(2, 63 * 1024) is None
    problem = conv(1, 7, 64, 64, 3)
    with pytest.raises(RuntimeError, match="no tile fits 1024 bytes of shared memory"):
        select_config([row], problem, "half", Gpu(1, 1024))


@pytest.mark.parametrize("math_mode", KINDS)
def test_every_row_fits_a_hopper_gpu_as_written(math_mode):
    for row in CONFIGS[math_mode]:
        assert row.fitted(KINDS[math_mode], HOPPER.shared_limit) == row
    assert len(set(CONFIGS[math_mode])) == len(CONFIGS[math_mode])


def test_large_batches_take_large_tiles_and_small_ones_fill_the_gpu():
    large, small = conv(256, 14, 256, 256, 3), conv(1, 14, 256, 256, 3)
    assert pick(large).block_m * pick(large).block_n >= 128 * 128
    assert small.tiles(pick(small)) * pick(small).split_k > 40


def test_a_deep_reduction_over_few_tiles_is_split():
    problem = conv(1, 7, 512, 512, 3)
    row = pick(problem)
    assert row.split_k > 1
    assert problem.tiles(row) * row.split_k <= 2 * HOPPER.sms
    assert pick(conv(256, 7, 512, 512, 3)).split_k == 1


def test_splits_leave_each_program_a_step():
    problem = conv(1, 7, 64, 64, 1)
    for row in candidates(CONFIGS["half"], problem, HOPPER):
        assert row.split_k <= problem.steps(row.block_k)
        assert row.split_k == 1 or row.can_split_k


def test_narrow_outputs_do_not_get_wide_tiles():
    groups = ProblemSize(32 * 28 * 28, 4, 4, 9, 32, 2)
    assert pick(groups).block_n <= 32
    assert pick(conv(256, 56, 64, 64, 3)).block_n == 64


@pytest.mark.parametrize(
    ("channels", "taps", "block_k", "gathers", "steps"),
    [(64, 9, 64, False, 9), (65, 9, 64, False, 18), (3, 49, 64, True, 3), (63, 1, 64, True, 1)],
)
def test_steps_of_the_reduction(channels, taps, block_k, gathers, steps):
    problem = ProblemSize(1, 1, channels, taps, 1, 2)
    assert problem.gathers(block_k) == gathers
    assert problem.steps(block_k) == steps


def test_a_tile_names_what_is_wrong_with_it():
    with pytest.raises(ValueError, match="block_n must be a power of two of at least 16, got 24"):
        TileConfig(16, 24, 16, 4, 2)
    with pytest.raises(ValueError, match=r"num_warps must be .* got 3"):
        TileConfig(16, 16, 16, 3, 2)
    with pytest.raises(ValueError, match="num_stages must be at least 1, got 0"):
        TileConfig(16, 16, 16, 4, 0)
    with pytest.raises(ValueError, match=r"split_k must be .* got 2 for 128x256"):
        TileConfig(128, 256, 64, 8, 3, 2)
