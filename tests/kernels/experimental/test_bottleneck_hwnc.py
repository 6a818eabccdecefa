"""The sliding block in the layout [H, W, N, C]. Without a GPU tests/ptx/test_gluon.py runs it."""

from __future__ import annotations

import pytest
import torch
from helpers import on, refused, with_edit

pytest.importorskip("triton")
pytest.importorskip("fastres.kernels.experimental.bottleneck_hwnc")

from fastres.kernels import LAUNCHES
from fastres.kernels._gpu import HOPPER
from fastres.kernels.experimental import bottleneck_hwnc as module
from fastres.kernels.experimental.bottleneck_hwnc import (
    CONFIGS,
    BottleneckConfig,
    bottleneck_hwnc,
    bottleneck_hwnc_ref,
    estimated_cycles,
    fits,
    select_config,
    supports,
)

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32

# (H, W, N), E, R. A tile is 64 images; two buffers take turns over parts of 64 channels.
SHAPES = {
    "stage 1": ((2, 4, 64), 256, 64),
    "into stage 2": ((3, 3, 70), 256, 128),
    "tail": ((2, 2, 64), 256, 0),
    "one pixel": ((1, 1, 5), 256, 64),
    "one part": ((2, 3, 64), 64, 64),
    "odd parts": ((2, 3, 64), 192, 64),
    "odd parts, two reductions": ((2, 2, 3), 192, 128),
    "one row": ((1, 6, 64), 128, 64),
}


on_hopper = pytest.mark.usefixtures("hopper")


@pytest.fixture
def offered(monkeypatch):
    monkeypatch.setattr(module, "runs_on", lambda device: True)


def sparse(device, rows, columns, dtype):
    """A matrix with few small numbers in a row, so that what follows it stays a whole number."""
    w = torch.zeros(rows, columns)
    for _ in range(3):
        w[torch.arange(rows), torch.randint(columns, (rows,))] = torch.randint(
            -1, 2, (rows,)
        ).float()
    return w.to(device, dtype)


def operands(integers, device, name, dtype=HALF, bias=True):
    (h, w, n), e, r = SHAPES[name]

    def pixels(channels):
        return integers(h * w, n * channels, dtype=dtype).view(h, w, n, channels)

    def vector(size):
        return integers(size) if bias and size else None

    window = sparse(device, 64, 9 * 64, dtype).view(64, 3, 3, 64).permute(0, 3, 1, 2)
    last = (sparse(device, r, e, dtype), vector(r)) if r else (None, None)
    expand = sparse(device, e, 64, dtype)
    return (pixels(64), window, vector(64), expand, vector(e), 4 * pixels(e), *last)


def expected(operands):
    """The exact results, each rounded once."""
    dtype = operands[0].dtype
    results = bottleneck_hwnc_ref(*operands, upcast=True)
    return [None if y is None else y.to(dtype) for y in results]


def equal(got, want):
    return all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b))
        for a, b in zip(got, want, strict=True)
    )


@pytest.mark.sample(7)
@on_hopper
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_exact(integers, poisoned, device, name, dtype, bias):
    inputs = operands(integers, device, name, dtype, bias)
    want = expected(inputs)
    guarded = [None if y is None else poisoned((y.numel(),), dtype) for y in want]
    out = tuple(
        None if g is None else g.out.view(y.shape) for g, y in zip(guarded, want, strict=True)
    )
    before = [None if t is None else t.clone() for t in inputs]
    got = bottleneck_hwnc(*inputs, out=out)
    assert all(a is b for a, b in zip(got, out, strict=True))
    for guard in guarded:
        if guard is not None:
            guard.check()
    assert equal(got, want)
    assert equal(inputs, before)
    assert bool((want[0] == 0).any()), "the ReLU has something to do"


@on_hopper
@pytest.mark.parametrize("row", [*CONFIGS, BottleneckConfig(3)], ids=str)
@pytest.mark.parametrize("name", ["stage 1", "tail", "one part"])
def test_every_config_is_exact_also_in_place(integers, device, name, row):
    if not fits(row, *SHAPES[name][1:], HOPPER):
        pytest.skip("more weights than shared memory holds")
    inputs = operands(integers, device, name)
    want = expected(inputs)
    x = inputs[5]
    narrow = None if want[1] is None else torch.empty_like(want[1])
    assert equal(bottleneck_hwnc(*inputs, out=(x, narrow), config=row), want)


@on_hopper
def test_floats_keep_the_rule_of_two(device, rule_of_two):
    t, x = (torch.randn(3, 4, 64, c, device=device).to(HALF) for c in (64, 256))
    w2 = (torch.randn(64, 64, 3, 3, device=device) / 24).to(HALF, memory_format=torch.channels_last)
    w3, w1 = (torch.randn(256, 64, device=device) / 8, torch.randn(64, 256, device=device) / 16)
    biases = (torch.randn(n, device=device) for n in (64, 256, 64))
    b2, b3, b1 = biases
    inputs = (t, w2, b2, w3.to(HALF), b3, x, w1.to(HALF), b1)
    for got, same, exact in zip(
        bottleneck_hwnc(*inputs),
        bottleneck_hwnc_ref(*inputs),
        bottleneck_hwnc_ref(*inputs, upcast=True),
        strict=True,
    ):
        rule_of_two(got, same, exact)


@on_hopper
def test_nan_stays_in_its_image(integers, device):
    inputs = operands(integers, device, "into stage 2")
    clean = bottleneck_hwnc(*inputs)
    inputs[0][:, :, 1] = float("nan")
    others = torch.arange(70, device=device) != 1
    for dirty, y in zip(bottleneck_hwnc(*inputs), clean, strict=True):
        assert torch.equal(dirty[:, :, others], y[:, :, others])
        assert bool(dirty[:, :, 1].isnan().any())


@pytest.mark.fault(1)
def test_an_empty_batch_launches_nothing(device, offered):
    before = LAUNCHES.total()
    t = torch.empty(4, 5, 0, 64, device=device, dtype=HALF)
    w2 = torch.randn(64, 64, 3, 3, device=device).to(HALF, memory_format=torch.channels_last)
    w3, w1 = (torch.randn(*s, device=device).to(HALF) for s in ((256, 64), (64, 256)))
    wide, narrow = bottleneck_hwnc(t, w2, None, w3, None, t.new_empty(4, 5, 0, 256), w1)
    assert (wide.shape, narrow.shape) == ((4, 5, 0, 256), (4, 5, 0, 64))
    assert LAUNCHES.total() == before


def test_what_fits_a_hopper():
    assert supports(64, 64, 256, 128, HALF, HOPPER)
    assert supports(64, 64, 256, 0, BFLOAT, HOPPER)
    assert not supports(64, 64, 256, 64, FLOAT, HOPPER)
    assert not supports(128, 128, 512, 128, HALF, HOPPER)
    assert not supports(64, 64, 256, 256, HALF, HOPPER)
    assert not supports(64, 64, 512, 128, HALF, HOPPER), "the weights alone take 270 KB"
    for reduced in (0, 64, 128):
        row = select_config(CONFIGS, (56, 56, 256), 256, reduced, HOPPER)
        assert row.shared_bytes(256, reduced) <= HOPPER.shared_limit
        assert estimated_cycles(row, (56, 56, 256), 256, reduced, HOPPER) > 0


def test_wrong_rows_are_refused():
    with pytest.raises(ValueError, match="num_stages must be 1 to 3, got 4"):
        BottleneckConfig(4)


T = torch.randn(2, 2, 3, 64).half()
X = torch.randn(2, 2, 3, 256).half()
W2 = torch.randn(64, 64, 3, 3).half().contiguous(memory_format=torch.channels_last)
W3, W1 = torch.randn(256, 64).half(), torch.randn(64, 256).half()
GOOD = {"t": T, "w2": W2, "b2": None, "w3": W3, "b3": None, "x": X, "w1": W1, "b1": None}
BAD = {
    "t float32": (
        {k: v.float() for k, v in GOOD.items() if v is not None},
        TypeError,
        "t must be float16 or bfloat16",
    ),
    "t permuted": ({"t": T.transpose(0, 1)}, ValueError, r"t must be contiguous \(H, W, N, C\)"),
    "t narrow": ({"t": T[..., :32].clone()}, ValueError, r"t must have shape \(2, 2, 3, 64\)"),
    "t without pixels": ({"t": T[:0], "x": X[:0]}, ValueError, "t of 0x2 has no pixels"),
    "w2 NCHW": ({"w2": W2.contiguous()}, ValueError, "w2 must be dense in channels_last"),
    "w2 5x5": ({"w2": torch.randn(64, 64, 5, 5).half()}, ValueError, "w2 must have shape"),
    "w3 strided": ({"w3": W3.repeat(1, 2)[:, ::2]}, ValueError, "w3 must be contiguous"),
    "w3 ragged": (
        {"w3": W3[:40], "x": X[..., :40].clone(), "w1": W1[:, :40].contiguous()},
        ValueError,
        "w3 must have a multiple of 64 rows",
    ),
    "w1 other": ({"w1": W1[:, :128].contiguous()}, ValueError, r"w1 must have shape \(64, 256\)"),
    "w1 short": ({"w1": W1[:32]}, ValueError, "w1 64 or 128, .* got 256 and 32 rows"),
    "b1 alone": ({"w1": None, "b1": torch.randn(64)}, ValueError, "b1 is given without w1"),
    "b2 long": ({"b2": torch.randn(65)}, ValueError, r"b2 must have shape \(64,\)"),
    "x narrow": ({"x": T}, ValueError, r"x must have shape \(2, 2, 3, 256\)"),
    "out one": ({"out": (torch.empty_like(X), None)}, ValueError, r"out\[1\] must be a Tensor"),
    "out over t": (
        {"out": (torch.empty_like(X), T)},
        ValueError,
        r"out\[?1?\]? overlaps t",
    ),
    "config": (
        {"config": BottleneckConfig(3)},
        ValueError,
        "config needs more than 232448 bytes",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_name_themselves_and_launch_nothing(device, offered, name):
    change, error, message = BAD[name]
    call = on(device, GOOD | change)
    with refused(error, message):
        bottleneck_hwnc(**call)


def test_other_gpus_are_refused(device, monkeypatch):
    monkeypatch.setattr(module, "runs_on", lambda device: False)
    call = {k: v if v is None else v.to(device) for k, v in GOOD.items()}
    with pytest.raises(RuntimeError, match="needs a GPU of compute capability 9 .* conv2d_hwnc"):
        bottleneck_hwnc(**call)


BROKEN = {
    "a buffer of x read before it has arrived": (
        "        mbarrier.wait(\n            arrived.index(part % 2), "
        "(q * ((PARTS + 1 - part % 2) // 2) + part // 2) % 2\n        )\n",
        "",
    ),
    "a result overwritten while it is copied": (
        "tma.store_wait(1 if turn > 0 else 0)",
        "tma.store_wait(1)",
    ),
    "stores not seen by the copy": ("    fence_async_shared()\n    copy_out", "    copy_out"),
    "a product not waited for": (
        "            0, deps=(wide, narrow0",
        "            1, deps=(wide, narrow0",
    ),
    "the last reduction not waited for": (
        "warpgroup_mma_wait(0, deps=(narrow0, narrow1, operand))",
        "warpgroup_mma_wait(1, deps=(narrow0, narrow1, operand))",
    ),
    "parts of the reduction swapped": (
        "reduce.index(half * PARTS + part)",
        "reduce.index(part * NARROW + half)",
    ),
    "x of the next pixel": (
        "_load_shortcut(x, shortcuts, arrived, p, q - 1, n0, part + 2)",
        "_load_shortcut(x, shortcuts, arrived, p, q, n0, part + 2)",
    ),
    "a bias of another part": ("_bias(biases, 1 + part, SUM)", "_bias(biases, part, SUM)"),
    "weights used before they arrive": ("    mbarrier.wait(loaded, 0)\n", ""),
    "ends while copies run": ("    tma.store_wait(0)\n\n\ndef _check", "\n\ndef _check"),
}


@on_hopper
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_noticed(device, integers, monkeypatch, tmp_path, name):
    if device.type != "cpu":
        pytest.skip("a GPU would hang or be right by luck")
    old, new = BROKEN[name]
    broken = with_edit(module, old, new, tmp_path)
    monkeypatch.setattr(module, "bottleneck_hwnc_kernel", broken.bottleneck_hwnc_kernel)
    assert not all(
        right(operands(integers, device, shape)) for shape in ("stage 1", "into stage 2")
    )


def right(inputs):
    from ptx.machine import Fault

    try:
        return equal(bottleneck_hwnc(*inputs), expected(inputs))
    except Fault:
        return False
