"""The choice of tiles: pure, by shape and GPU, and never too large for the GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from fastres.kernels._config import (
    ProblemSize,
    TileConfig,
    candidates,
    estimated_cycles,
    select_config,
)
from fastres.kernels._gpu import GPUS, HOPPER, Gpu, record_of
from fastres.kernels.conv import CONFIGS
from fastres.kernels.gemm import GemmConfig

KINDS = {"half": 2, "tf32": 4, "ieee": 4}


def conv(batch: int, size: int, outputs: int, channels: int, window: int, itemsize: int = 2):
    return ProblemSize(batch * size * size, outputs, channels, window**2, 1, itemsize)


def pick(problem: ProblemSize, math_mode: str = "half", gpu: Gpu = HOPPER) -> TileConfig:
    return select_config(CONFIGS[math_mode], problem, math_mode, gpu)


@pytest.mark.fault(27)
@pytest.mark.parametrize("math_mode", KINDS)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90", "gfx942"])
@pytest.mark.parametrize("batch", [1, 32, 256])
@pytest.mark.parametrize(
    "layer",
    [(56, 64, 64, 3), (28, 512, 128, 1), (7, 512, 512, 3), (112, 64, 3, 7), (1, 1000, 512, 1)],
)
def test_the_choice_fits_and_repeats(math_mode, architecture, batch, layer):
    gpu = GPUS[architecture]
    problem = conv(batch, *layer, KINDS[math_mode])
    row = pick(problem, math_mode, gpu)
    assert row.shared_bytes(math_mode, gpu) <= gpu.shared_limit
    assert row == pick(problem, math_mode, gpu)
    least = min(
        estimated_cycles(r, problem, math_mode, gpu)
        for r in candidates(CONFIGS[math_mode], problem, math_mode, gpu)
    )
    assert estimated_cycles(row, problem, math_mode, gpu) == least


@pytest.mark.fault(27)
def test_rows_lose_stages_before_they_are_pruned():
    row = TileConfig(128, 128, 64, 8, 4)
    assert row.fitted("half", HOPPER) == row
    assert row.fitted("half", replace(HOPPER, shared_limit=100 * 1024)) == replace(
        row, num_stages=3
    )
    assert row.fitted("half", GPUS["gfx942"]) == replace(row, num_stages=3)
    assert row.fitted("half", replace(HOPPER, shared_limit=65 * 1024)) == replace(row, num_stages=2)
    assert row.fitted("half", replace(HOPPER, shared_limit=64 * 1024)) is None
    problem = conv(1, 7, 64, 64, 3)
    with pytest.raises(RuntimeError, match="no tile fits 1024 bytes of shared memory"):
        select_config([row], problem, "half", Gpu(1, 1024))


@pytest.mark.parametrize(
    ("architecture", "kind", "sizes", "real"),
    [  # metadata.shared of conv2d_kernel's 3x3 by Triton 3.6.0
        ("sm_80", "half", (128, 256, 64, 8, 3), 98304),
        ("sm_86", "half", (128, 128, 64, 8, 4), 98304),
        ("sm_89", "half", (256, 64, 64, 8, 3), 81920),
        ("sm_120", "tf32", (64, 32, 32, 4, 4), 36864),
        ("sm_90", "half", (128, 256, 64, 8, 3), 147456),
        ("sm_90", "half", (32, 64, 64, 4, 5), 49152),
        ("sm_90", "tf32", (64, 128, 32, 4, 4), 90112),
        ("sm_90", "ieee", (64, 64, 32, 4, 3), 32768),
        ("sm_100", "half", (256, 64, 64, 8, 4), 163856),
        ("sm_100", "tf32", (128, 128, 32, 8, 3), 81936),
    ],
)
def test_shared_memory_is_what_the_compiler_takes(architecture, kind, sizes, real):
    counted = TileConfig(*sizes).shared_bytes(kind, GPUS[architecture])
    assert real <= counted <= real + 64


@pytest.mark.parametrize(
    ("architecture", "kind", "sizes", "real"),
    [  # of gemm_kernel
        ("sm_90", "half", (128, 256, 64, 8, 3), 147480),
        ("sm_90", "half", (128, 256, 64, 8, 3, 1, True), 180264),
        ("sm_90", "tf32", (128, 64, 32, 4, 4), 81976),
        ("sm_90", "ieee", (64, 32, 16, 4, 3), 14352),
        ("sm_100", "half", (128, 128, 64, 8, 4, 1, True), 163904),
        ("sm_100", "tf32", (64, 64, 32, 4, 4), 57392),
        ("sm_120", "half", (128, 128, 64, 8, 3), 65552),
        ("sm_120", "half", (128, 64, 64, 4, 3, 1, True), 65568),
        ("sm_120", "tf32", (128, 64, 32, 4, 4), 73784),
        ("sm_120", "ieee", (128, 64, 16, 8, 3), 32776),
        ("sm_120", "ieee", (64, 32, 16, 4, 3), 14352),
    ],
)
def test_shared_memory_of_tiles_that_tma_copies(architecture, kind, sizes, real):
    counted = GemmConfig(*sizes).shared_bytes(kind, GPUS[architecture])
    assert real <= counted <= real + 64


def test_a_4090_keeps_the_stages_that_it_has_room_for():
    for row in (TileConfig(256, 64, 64, 8, 3), TileConfig(128, 128, 64, 8, 4)):
        assert row.fitted("half", GPUS["sm_89"]) == row


def test_costs_are_the_gpus_own():
    """312 TFLOP/s on 108 SMs at 1.41 GHz; 989 on 132 at 1.83; 362 on 142 at 2.52; half of that
    per SM on a GeForce."""
    stated = {"sm_80": (312, 1.41), "sm_90": (989, 1.83), "sm_89": (362, 2.52)}
    for name, (tera, clock) in stated.items():
        gpu = GPUS[name]
        assert 2 * gpu.sms * gpu.multiply_adds("half", 64) * clock / 1000 == pytest.approx(
            tera, rel=0.02
        )
    assert record_of("sm_89", "NVIDIA GeForce RTX 4090").matrix == GPUS["sm_89"].matrix / 2
    assert record_of("sm_89", "NVIDIA L4") == GPUS["sm_89"]
    assert record_of("sm_103") == GPUS["sm_100"]
    assert record_of("gfx1201") == HOPPER


def test_a_product_takes_as_long_as_the_gpu_needs():
    problem, row = conv(256, 14, 256, 256, 3), TileConfig(128, 128, 64, 8, 3)
    ours = estimated_cycles(row, problem, "half", HOPPER)
    slow, starved = replace(HOPPER, matrix=512, mma=512), replace(HOPPER, l2=7)
    assert estimated_cycles(row, problem, "half", slow) > 1.5 * ours
    assert estimated_cycles(row, problem, "half", starved) > 1.5 * ours


@pytest.mark.parametrize("math_mode", KINDS)
def test_every_row_fits_a_hopper_gpu_as_written(math_mode):
    for row in CONFIGS[math_mode]:
        assert row.fitted(math_mode, HOPPER) == row
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
    for row in candidates(CONFIGS["half"], problem, "half", HOPPER):
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
