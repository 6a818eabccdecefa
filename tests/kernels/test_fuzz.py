"""Row 11: random shapes and flags through the kernels, exact on integers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("hypothesis")

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastres.kernels import (
    TileConfig,
    avg_pool2d,
    avg_pool2d_ref,
    conv2d,
    conv2d_ref,
    max_pool2d,
    max_pool2d_ref,
)

pytestmark = pytest.mark.interpreter

TILES = [TileConfig(m, n, k, 4, 2) for m in (16, 32) for n in (16, 32) for k in (16, 32)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

small = st.integers(1, 7)
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@pytest.mark.fault(11)
@settings(max_examples=30)
@given(data=st.data())
def test_convolution(data, integers):
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    c, k = draw(st.integers(1, 40 // groups)), draw(st.integers(1, 36 // groups)) * groups
    window = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    geometry = {
        "stride": draw(pairs),
        "padding": draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
        "dilation": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        "groups": groups,
    }
    size = draw(small), draw(small)
    reach = [d * (r - 1) + 1 for r, d in zip(window, geometry["dilation"], strict=True)]
    padded = [s + 2 * p for s, p in zip(size, geometry["padding"], strict=True)]
    assume(all(p >= r for p, r in zip(padded, reach, strict=True)))

    dtype = draw(st.sampled_from(DTYPES))
    x = integers(draw(st.integers(1, 2)), c * groups, *size, dtype=dtype)
    w = integers(k, c, *window, dtype=dtype)
    b = integers(k) if draw(st.booleans()) else None
    relu = draw(st.booleans())
    residual = None
    if draw(st.booleans()):
        residual = integers(*conv2d_ref(x, w, **geometry).shape, dtype=dtype)
    epilogue = {"residual": residual, "relu": relu, **geometry}
    got = conv2d(x, w, b, config=draw(st.sampled_from(TILES)), **epilogue)
    assert torch.equal(got, conv2d_ref(x, w, b, upcast=True, **epilogue).to(dtype))


@pytest.mark.fault(11)
@settings(max_examples=30)
@given(data=st.data())
def test_pooling(data, integers):
    draw = data.draw
    window = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    padding = tuple(draw(st.integers(0, k // 2)) for k in window)
    stride, ceil_mode = draw(pairs), draw(st.booleans())
    size = draw(st.tuples(small, small))
    assume(all(s + 2 * p >= k for s, p, k in zip(size, padding, window, strict=True)))
    x = integers(draw(st.integers(1, 3)), draw(st.integers(1, 70)), *size)
    common = {"stride": stride, "padding": padding, "ceil_mode": ceil_mode}
    got = max_pool2d(x, window, **common)
    assert torch.equal(got, max_pool2d_ref(x, window, **common))

    common["count_include_pad"] = draw(st.booleans())
    common["divisor_override"] = draw(st.sampled_from([None, 4]))
    got = avg_pool2d(x, window, **common)
    assert torch.equal(got, avg_pool2d_ref(x, window, upcast=True, **common).float())
