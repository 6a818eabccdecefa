"""The sliding 3x3 in the layout [H, W, N, C]. Without a GPU tests/ptx/test_gluon.py runs it."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from helpers import with_edit

pytest.importorskip("fastres.kernels.experimental.conv3x3_hwnc")

from fastres.kernels import LAUNCHES
from fastres.kernels._config import ProblemSize
from fastres.kernels._gpu import HOPPER
from fastres.kernels.experimental import conv3x3_hwnc as module
from fastres.kernels.experimental.conv3x3_hwnc import CONFIGS, Conv3x3Config
from fastres.kernels.experimental.hwnc import conv2d_hwnc, conv2d_hwnc_ref, select
from fastres.kernels.gemm import GemmConfig

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
FIRST = CONFIGS[0]
ROWS = (*CONFIGS, Conv3x3Config(64, 4, 2), Conv3x3Config(64, 4, 3), Conv3x3Config(128, 8, 1))

# (H, W, N), outputs. A tile is 64 or 128 images; a turn is three columns.
SHAPES = {
    "one pixel": ((1, 1, 64), 64),
    "one turn": ((2, 2, 64), 64),
    "two turns": ((3, 3, 128), 64),
    "one row": ((1, 7, 64), 64),
    "one column": ((5, 1, 64), 64),
    "ragged images": ((2, 4, 70), 64),
    "few images": ((3, 5, 3), 64),
    "ragged outputs": ((2, 4, 64), 72),
    "few outputs": ((2, 3, 20), 8),
}


on_hopper = pytest.mark.usefixtures("hopper")


def operands(integers, name, dtype=HALF):
    (h, w, n), k = SHAPES[name]
    return integers(n * h, 64, w, 1, dtype=dtype).view(h, n, 64, w).permute(
        0, 3, 1, 2
    ).contiguous(), integers(k, 64, 3, 3, dtype=dtype)


def expected(x, w, b=None, **keywords):
    """The exact result rounded once to x's dtype."""
    return conv2d_hwnc_ref(x, w, b, padding=1, upcast=True, **keywords).to(x.dtype)


@pytest.mark.sample(5)
@on_hopper
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_exact(integers, poisoned, name, dtype):
    x, w = operands(integers, name, dtype)
    want = expected(x, w)
    guarded = poisoned((want.numel(),), dtype)
    out = guarded.out.view(want.shape)
    before = x.clone(), w.clone()
    assert conv2d_hwnc(x, w, padding=1, out=out, config=FIRST) is out
    guarded.check()
    assert torch.equal(out, want)
    assert torch.equal(x, before[0])
    assert torch.equal(w, before[1])


@pytest.mark.sample(5)
@on_hopper
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", ["none", "float32", "same"])
@pytest.mark.parametrize("name", ["one turn", "ragged images", "ragged outputs"])
def test_every_epilogue_is_exact_also_in_place(integers, poisoned, name, bias, relu):
    x, w = operands(integers, name)
    k = w.shape[0]
    b = None if bias == "none" else integers(k, dtype=HALF if bias == "same" else FLOAT)
    shape = expected(x, w).shape
    residual = 16 * integers(math.prod(shape), dtype=HALF)
    want = expected(x, w, b, residual=residual.view(shape), relu=relu)
    guarded = poisoned(residual.shape, HALF, fill=residual)
    out = guarded.out.view(shape)
    conv2d_hwnc(x, w, b, padding=1, residual=out, relu=relu, out=out, config=FIRST)
    guarded.check()
    assert torch.equal(out, want)
    assert bool((want < 0).any()) != relu  # the ReLU has something to do


@pytest.mark.sample(7)
@on_hopper
@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", ["one turn", "two turns", "ragged images"])
def test_every_config_is_exact(integers, name, residual, row):
    x, w = operands(integers, name)
    # Each channel has its own bias, so that no part of the tile can land in another's.
    b = torch.arange(w.shape[0], device=x.device, dtype=FLOAT)
    added = integers(*x.shape, dtype=HALF).contiguous() if residual else None
    got = conv2d_hwnc(x, w, b, padding=1, residual=added, relu=True, config=row)
    assert torch.equal(got, expected(x, w, b, residual=added, relu=True))


@on_hopper
def test_floats_keep_the_rule_of_two(device, rule_of_two):
    x = torch.randn(4, 5, 64, 64, device=device).to(HALF)
    w = (torch.randn(64, 64, 3, 3, device=device) / 24).to(HALF, memory_format=torch.channels_last)
    b = torch.randn(64, device=device)
    rule_of_two(
        conv2d_hwnc(x, w, b, padding=1, relu=True, config=FIRST),
        conv2d_hwnc_ref(x, w, b, padding=1, relu=True),
        conv2d_hwnc_ref(x, w, b, padding=1, relu=True, upcast=True),
    )


@on_hopper
def test_nan_stays_in_its_image(integers):
    x, w = operands(integers, "ragged images")
    clean = conv2d_hwnc(x, w, padding=1, relu=True, config=FIRST)
    x[:, :, 1] = math.nan
    y = conv2d_hwnc(x, w, padding=1, relu=True, config=FIRST)
    assert bool(y[:, :, 1].isnan().all())
    others = torch.arange(x.shape[2], device=x.device) != 1
    assert torch.equal(y[:, :, others], clean[:, :, others])


W = torch.randn(64, 64, 3, 3).half().contiguous(memory_format=torch.channels_last)
OTHERS = {
    "stride 2": (W, {"stride": 2, "padding": 1}),
    "no padding": (W, {}),
    "1x1": (W[:, :, :1, :1].contiguous(memory_format=torch.channels_last), {}),
    "float32": (W.float(), {"padding": 1}),
    "32 channels": (W[:, :32].contiguous(memory_format=torch.channels_last), {"padding": 1}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions_are_refused_and_nothing_is_launched(device, name):
    w, geometry = OTHERS[name]
    x = torch.randn(4, 4, 64, w.shape[1], device=device, dtype=w.dtype)
    before = LAUNCHES.total()
    with pytest.raises(ValueError, match="must be a GemmConfig for this convolution, got Conv3x3"):
        conv2d_hwnc(x, w.to(device), config=FIRST, **geometry)
    assert LAUNCHES.total() == before


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((32, 2, 1), "images must be 64 or 128"),
        ((64, 8, 1), "num_warps a sixteenth of it, got 64 and 8"),
        ((64, 4, 0), "num_stages must be 1 to 3, got 0"),
        ((64, 4, 4), "num_stages must be 1 to 3, got 4"),
    ],
)
def test_wrong_rows_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        Conv3x3Config(*numbers)


def test_it_is_chosen_for_large_images_and_batches_alone():
    def chosen(p, q, n, slides=True):
        size = (p, q, n, 64)
        problem = ProblemSize(p * q * n, 64, 64, 9, 1, 2)
        return select(problem, "half", HOPPER, size if slides else None)

    assert isinstance(chosen(56, 56, 256), Conv3x3Config)
    assert isinstance(chosen(56, 56, 256, slides=False), GemmConfig)
    assert isinstance(chosen(7, 7, 2), GemmConfig), "few rows of pixels keep few SMs busy"


def test_the_shipped_rows_fit_hopper():
    assert all(row.shared_bytes() <= HOPPER.shared_limit for row in CONFIGS)
    assert 2 * (FIRST.shared_bytes() + 1024) <= 228 * 1024, "two blocks on an SM"


BROKEN = {
    "columns used before they arrive": ("    mbarrier.wait(ready.index(slot), q // STAGES % 2)\n",),
    "weights used before they arrive": ("    mbarrier.wait(ready.index(STAGES), 0)\n",),
    "the residual used before it arrives": (
        "        mbarrier.wait(ready.index(STAGES + 1), q % 2)\n",
    ),
    "a sum read while products run": ("warpgroup_mma_wait(6, deps", "warpgroup_mma_wait(7, deps"),
    "stores not seen by the copy": ("    fence_async_shared()\n    copy", "    copy"),
    "a result overwritten while it is copied": ("    tma.store_wait(0)\n    result", "    result"),
    "ends while copies run": ("    tma.store_wait(0)\n\n\ndef run", "\n\ndef run"),
    "a column too many": ("if q + STAGES < columns", "if q + STAGES <= columns"),
    "a column too few": ("if q + STAGES < columns", "if q + STAGES + 1 < columns"),
    "bytes miscounted": ("3 * IMAGES * 64 * 2", "3 * IMAGES * 64"),
    "rows of the window shifted": ("[p + r - 1, q * N", "[p + r, q * N"),
    "columns of the window mirrored": (
        "weights, left, zero, 2, False",
        "weights, left, zero, 0, False",
    ),
    "a sum not begun anew": ("weights, right, zero, 0, True", "weights, right, zero, 0, False"),
    "images of the next pixel": ("tile // H * IMAGES", "tile // H * IMAGES + 1"),
}


@on_hopper
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_noticed(device, integers, monkeypatch, tmp_path, name):
    if device.type != "cpu":
        pytest.skip("a GPU would hang or be right by luck")
    old, new = (*BROKEN[name], "")[:2]
    broken = with_edit(module, old, new, tmp_path)
    monkeypatch.setattr(module, "conv3x3_hwnc_kernel", broken.conv3x3_hwnc_kernel)
    assert not all(
        right(*operands(integers, shape), row, integers)
        for shape, row in product(("two turns", "ragged images"), (FIRST, ROWS[2]))
    )


def right(x, w, row, integers):
    """Whether the kernel gives exact results, with a residual and without."""
    from ptx.machine import Fault

    residual = integers(*x.shape, dtype=HALF).contiguous()
    try:
        return all(
            torch.equal(
                conv2d_hwnc(x, w, padding=1, residual=added, relu=True, config=row),
                expected(x, w, residual=added, relu=True),
            )
            for added in (residual, None)
        )
    except Fault:
        return False
