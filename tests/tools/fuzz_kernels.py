"""Row 11: random calls of every kernel on small integers, where float32 sums are exact.

A case is plain data, so that one that fails can be kept as JSON. The output is full of NaN before
the call and lies between guards; the operands may begin anywhere in memory.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from fastres import kernels
from fastres.kernels import TileConfig, conv, elementwise, global_pool, pool
from fastres.kernels.conv import math_mode_of

Case = dict[str, Any]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GUARD = 64

few, small = st.integers(1, 3), st.integers(1, 9)
pairs = st.lists(few, min_size=2, max_size=2)
dtypes = st.sampled_from(list(DTYPES))
flags = st.booleans()
seeds = st.integers(0, 2**16)
offsets = st.sampled_from([0, 0, 1, 3])  # elements: 1 and 3 break alignment


class Operands:
    """Integer tensors of one case, drawn in order from its seed."""

    def __init__(self, case: Case) -> None:
        self.generator = torch.Generator().manual_seed(case["seed"])
        self.dtype = DTYPES[case["dtype"]]
        self.offset = case["offset"]
        self.made: list[tuple[Tensor, Tensor]] = []

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Whole numbers from -3 to 3; channels_last where 4-D."""
        values = torch.randint(-3, 4, shape, generator=self.generator)
        t = self.place(shape, dtype or self.dtype).copy_(values)
        self.made.append((t, t.clone()))
        return t

    def place(self, shape: Any, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory that begins ``offset`` elements behind an aligned address."""
        size = torch.Size(shape).numel()
        flat = torch.empty(size + self.offset, dtype=dtype, device=DEVICE)[self.offset :]
        return as_image(flat, shape)

    def unchanged(self, *but: Tensor | None) -> bool:
        return all(torch.equal(t, copy) or any(t is b for b in but) for t, copy in self.made)


def as_image(flat: Tensor, shape: Any) -> Tensor:
    """``flat`` as a tensor of ``shape``, in channels_last memory where 4-D."""
    if len(shape) != 4:
        return flat.view(shape)
    n, c, h, w = shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def exact(want: Tensor, operands: Operands, call: Any, out: Tensor | None = None) -> None:
    """``call(out)`` writes exactly ``want`` into a poisoned, guarded output, and nothing else."""
    want = want.to(operands.dtype)
    size = want.numel()
    buffer = torch.full((size + 2 * GUARD,), 77.0, dtype=want.dtype, device=DEVICE)
    if out is None:
        out = as_image(buffer[GUARD : GUARD + size].fill_(float("nan")), want.shape)
    got = call(out)
    assert got is out
    assert torch.equal(got, want), f"{int((got != want).sum())} of {size} elements are wrong"
    assert bool((buffer[:GUARD] == 77).all() and (buffer[GUARD + size :] == 77).all())
    assert operands.unchanged(out), "an operand was written to"


def fits(case: Case) -> bool:
    """Whether the image, padded, holds a window."""
    sides = zip(case["size"], case["window"], case["padding"], case["dilation"], strict=True)
    return all(s + 2 * p >= d * (r - 1) + 1 for s, r, p, d in sides)


@st.composite
def conv_cases(draw: Any) -> Case:
    dtype, precision = draw(dtypes), draw(st.sampled_from(["ieee", "tf32"]))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    kind = math_mode_of(DTYPES[dtype], precision)
    row = draw(st.sampled_from([None, *conv.CONFIGS[kind], TileConfig(16, 16, 16, 4, 2)]))
    split_k = draw(st.integers(1, 5)) if row and row.can_split_k else 1
    case = {
        "dtype": dtype,
        "precision": precision,
        "n": draw(st.integers(0, 3)),
        "groups": groups,
        "c": draw(st.integers(1, 70 // groups)),
        "k": draw(st.integers(1, 40 // groups)),
        "window": draw(st.lists(st.integers(1, 4), min_size=2, max_size=2)),
        "size": draw(st.lists(small, min_size=2, max_size=2)),
        "stride": draw(pairs),
        "padding": draw(st.lists(st.integers(0, 3), min_size=2, max_size=2)),
        "dilation": draw(st.lists(st.integers(1, 2), min_size=2, max_size=2)),
        "bias": draw(st.sampled_from(["none", "float32", "same"])),
        "residual": draw(st.sampled_from(["none", "apart", "in place"])),
        "relu": draw(flags),
        "config": [*astuple(row)[:5], split_k] if row else None,
        "offset": draw(offsets),
        "seed": draw(seeds),
    }
    assume(fits(case))
    return case


def check_conv(case: Case) -> None:
    operands = Operands(case)
    geometry = {name: case[name] for name in ("stride", "padding", "dilation", "groups")}
    k = case["k"] * case["groups"]
    x = operands(case["n"], case["c"] * case["groups"], *case["size"])
    w = operands(k, case["c"], *case["window"])
    b = None
    if case["bias"] != "none":
        b = operands(k, dtype=operands.dtype if case["bias"] == "same" else torch.float32)
    residual = None
    if case["residual"] != "none":
        # In float64, since oneDNN crashes where a dilated window sees nothing but padding.
        residual = operands(*kernels.conv2d_ref(x, w, upcast=True, **geometry).shape)
    epilogue = {"residual": residual, "relu": case["relu"], **geometry}
    want = kernels.conv2d_ref(x, w, b, upcast=True, **epilogue)
    config = TileConfig(*case["config"]) if case["config"] else None
    options = {**epilogue, "precision": case["precision"], "config": config}
    out = residual if case["residual"] == "in place" else None
    exact(want, operands, lambda out: kernels.conv2d(x, w, b, out=out, **options), out)


@st.composite
def linear_cases(draw: Any) -> Case:
    return {
        "dtype": draw(dtypes),
        "n": draw(st.integers(0, 40)),
        "c": draw(st.integers(1, 150)),
        "k": draw(st.integers(1, 40)),
        "bias": draw(st.sampled_from(["none", "float32", "same"])),
        "relu": draw(flags),
        "offset": draw(offsets),
        "seed": draw(seeds),
    }


def check_linear(case: Case) -> None:
    operands = Operands(case)
    x, w = operands(case["n"], case["c"]), operands(case["k"], case["c"])
    b = None
    if case["bias"] != "none":
        b = operands(case["k"], dtype=operands.dtype if case["bias"] == "same" else torch.float32)
    want = kernels.linear.linear_ref(x, w, b, relu=case["relu"], upcast=True)
    exact(want, operands, lambda out: kernels.linear.linear(x, w, b, relu=case["relu"], out=out))


@st.composite
def pool_cases(draw: Any) -> Case:
    maximum = draw(flags)
    window = draw(st.lists(st.integers(1, 4), min_size=2, max_size=2))
    case = {
        "maximum": maximum,
        "dtype": draw(dtypes) if maximum else "float32",
        "n": draw(st.integers(0, 3)),
        "c": draw(st.integers(1, 70)),
        "size": draw(st.lists(small, min_size=2, max_size=2)),
        "window": window,
        "stride": draw(pairs),
        "padding": [draw(st.integers(0, r // 2)) for r in window],
        "dilation": draw(pairs) if maximum else [1, 1],
        "ceil_mode": draw(flags),
        "count_include_pad": draw(flags),
        "divisor_override": draw(st.sampled_from([None, 4])),
        "config": list(astuple(draw(st.sampled_from(pool.CONFIGS)))),
        "offset": draw(offsets),
        "seed": draw(seeds),
    }
    assume(fits(case))
    return case


def check_pool(case: Case) -> None:
    """A mean of integers is one division, whose correct rounding float64 shows as well."""
    operands = Operands(case)
    x = operands(case["n"], case["c"], *case["size"])
    names = ["stride", "padding", "ceil_mode"]
    names += ["dilation"] if case["maximum"] else ["count_include_pad", "divisor_override"]
    options = {name: case[name] for name in names}
    config = pool.PoolConfig(*case["config"])
    op, ref = (
        (kernels.max_pool2d, kernels.max_pool2d_ref)
        if case["maximum"]
        else (kernels.avg_pool2d, kernels.avg_pool2d_ref)
    )
    if x.numel():
        want = ref(x, case["window"], **options, upcast=True)
    else:  # torch refuses to pool an empty batch
        ones = torch.ones(1, *x.shape[1:], device=DEVICE)
        want = ref(ones, case["window"], **options)[:0]
    exact(want, operands, lambda out: op(x, case["window"], **options, out=out, config=config))


@st.composite
def global_pool_cases(draw: Any) -> Case:
    return {
        "dtype": draw(dtypes),
        "n": draw(st.integers(0, 3)),
        "c": draw(st.integers(1, 130)),
        "size": draw(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=2, max_size=2)),
        "config": list(astuple(draw(st.sampled_from(global_pool.CONFIGS)))),
        "offset": draw(offsets),
        "seed": draw(seeds),
    }


def check_global_pool(case: Case) -> None:
    """Powers of two for sizes, so that the mean is exact but for one rounding to half."""
    operands = Operands(case)
    x = operands(case["n"], case["c"], *case["size"])
    want = x.double().mean((2, 3), keepdim=True)
    config = pool.PoolConfig(*case["config"])
    exact(want, operands, lambda out: kernels.global_avg_pool(x, out=out, config=config))


@st.composite
def elementwise_cases(draw: Any) -> Case:
    return {
        "dtype": draw(dtypes),
        "shape": draw(st.lists(st.integers(0, 20), min_size=1, max_size=4)),
        "add": draw(flags),
        "relu": draw(flags),
        "out": draw(st.sampled_from(["new", "first", "second"])),
        "config": list(astuple(draw(st.sampled_from(elementwise.CONFIGS)))),
        "offset": draw(offsets),
        "seed": draw(seeds),
    }


def check_elementwise(case: Case) -> None:
    operands = Operands(case)
    a, b = operands(*case["shape"]), operands(*case["shape"])
    config = elementwise.FlatConfig(*case["config"])
    out = {"new": None, "first": a, "second": b}[case["out"]]
    if case["add"]:
        relu = case["relu"]
        want = kernels.add_relu_ref(a, b, relu=relu, upcast=True)
        exact(
            want,
            operands,
            lambda out: kernels.add_relu(a, b, relu=relu, out=out, config=config),
            out,
        )
    else:
        out = None if out is b else out
        want = kernels.relu_ref(a, upcast=True)
        exact(want, operands, lambda out: kernels.relu(a, out=out, config=config), out)


PROPERTIES = {
    "conv2d": (conv_cases(), check_conv),
    "linear": (linear_cases(), check_linear),
    "pool": (pool_cases(), check_pool),
    "global_pool": (global_pool_cases(), check_global_pool),
    "elementwise": (elementwise_cases(), check_elementwise),
}
