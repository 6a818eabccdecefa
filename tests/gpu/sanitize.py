"""Row 29: every kernel a few times on odd shapes, small enough for compute-sanitizer.

``make gpu-sanitize`` runs this under memcheck, racecheck, initcheck and synccheck. Operands are
small whole numbers, so each result must be exact, and those of the convolution start at addresses
that are no multiple of 16 bytes as well. In Triton's interpreter it runs too (``TRITON_INTERPRET=1
python tests/gpu/sanitize.py``), which the ordinary tests do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from fastres import kernels as k
from fastres.kernels import _tma, b2b_gemm, cache_read, gemm, head
from fastres.kernels._common import INTERPRETED
from fastres.kernels.conv import CONFIGS, math_mode_of
from fastres.kernels.experimental import bottleneck_hwnc, conv3x3_hwnc, hwnc

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
NHWC = torch.channels_last
PIXELS = gemm.GemmConfig(16, 16, 16, 4, 2)  # 16 images of one pixel to a tile
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Call = tuple[str, Callable[..., Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def whole(*shape: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """Whole numbers from -2 to 2, channels_last where 4-D, ``offset`` elements after its memory."""
    values = torch.randint(-2, 3, shape)
    order = (0, 2, 3, 1) if len(shape) == 4 else tuple(range(len(shape)))
    flat = torch.empty(values.numel() + offset, dtype=dtype, device=DEVICE)[offset:]
    dense = flat.view([shape[i] for i in order])
    view = dense.permute(0, 3, 1, 2) if len(shape) == 4 else dense
    return view.copy_(values)


def convolutions(dtype: torch.dtype) -> Iterator[Call]:
    def case(name: str, x: Tensor, w: Tensor, residual: bool = False, **kwargs: Any) -> Call:
        b = whole(w.shape[0], dtype=torch.float32)
        plain = {n: v for n, v in kwargs.items() if n != "config"}
        if residual:
            added = torch.empty_like(k.conv2d_ref(x, w, **plain), memory_format=torch.channels_last)
            kwargs["residual"] = plain["residual"] = added.copy_(torch.randint(-2, 3, added.shape))
        return f"conv2d {name}", k.conv2d, k.conv2d_ref, (x, w, b), {"ours": kwargs, "ref": plain}

    def tensor(*shape: int, offset: int = 0) -> Tensor:
        return whole(*shape, dtype=dtype, offset=offset)

    kind = math_mode_of(dtype, "ieee")
    smallest = min(CONFIGS[kind], key=lambda row: row.block_m * row.block_n * row.block_k)
    yield case("3x3", tensor(2, 17, 7, 5), tensor(9, 17, 3, 3), True, padding=1, relu=True)
    yield case("7x7/2", tensor(1, 3, 13, 9), tensor(20, 3, 7, 7), stride=2, padding=3)
    yield case("groups", tensor(1, 12, 6, 6), tensor(8, 3, 3, 3), groups=4, dilation=2, padding=2)
    yield case("unaligned", tensor(1, 8, 5, 5, offset=1), tensor(6, 8, 1, 1, offset=3), relu=True)
    yield case("smallest tile", tensor(1, 40, 4, 4), tensor(33, 40, 1, 1), config=smallest)
    deep = k.TileConfig(16, 16, 16, 2, 2, split_k=3)
    yield case("split sum", tensor(1, 64, 3, 3), tensor(17, 64, 3, 3), padding=1, config=deep)


def others(dtype: torch.dtype) -> Iterator[Call]:
    x, flat = whole(2, 19, 7, 5, dtype=dtype), whole(5, 37, dtype=dtype)
    weight, bias = whole(21, 37, dtype=dtype), whole(21, dtype=torch.float32)
    window = {"ours": {"stride": 2, "padding": 1}, "ref": {"stride": 2, "padding": 1}}
    yield "linear", k.linear.linear, k.linear.linear_ref, (flat, weight, bias), {}
    yield "add_relu", k.add_relu, k.add_relu_ref, (x, x.flip(0).contiguous(memory_format=NHWC)), {}
    yield "relu", k.relu, k.relu_ref, (x,), {}
    yield "max_pool2d", k.max_pool2d, k.max_pool2d_ref, (x, 3), window
    yield "avg_pool2d", k.avg_pool2d, k.avg_pool2d_ref, (x, 4), window
    square = whole(2, 19, 4, 8, dtype=dtype)
    yield "global_avg_pool", k.global_avg_pool, k.global_avg_pool_ref, (square,), {}
    classifier = whole(21, 19, dtype=dtype)
    yield "head", head.head, head.head_ref, (square, classifier, bias), {}
    first = whole(10, 3, 7, 7, dtype=dtype)
    shift = whole(10, dtype=torch.float32)
    image = whole(1, 3, 13, 18, dtype=dtype)
    yield "stem NHWC", k.stem.stem, k.stem.stem_ref, (image, first, shift), {}
    planar = torch.randint(0, 256, (1, 3, 11, 9), dtype=torch.uint8, device=DEVICE)
    yield "stem, bytes", k.stem.stem, k.stem.stem_ref, (planar, first, shift), {}


def cache_reads() -> Iterator[Call]:
    x = whole(3 * cache_read.BLOCK, dtype=torch.float32)
    yield "cache_read", cache_read.cache_read, read_ref, (x, 2, 4), {}


def read_ref(x: Tensor, programs: int, reads: int, upcast: bool = False) -> Tensor:
    return cache_read.cache_read_ref(x.double() if upcast else x, programs, reads)


def by_tma(dtype: torch.dtype) -> Iterator[Call]:
    a, w = whole(37, 32, dtype=dtype), whole(24, 32, dtype=dtype)
    a2, w2 = whole(37, 16, dtype=dtype), whole(24, 16, dtype=dtype)
    residual, bias = whole(37, 24, dtype=dtype), whole(24, dtype=torch.float32)
    added = {"residual": residual, "relu": True}
    yield "gemm", gemm.gemm, gemm.gemm_ref, (a, w, bias), {"ours": added, "ref": added}
    yield "dual_gemm", gemm.dual_gemm, gemm.dual_gemm_ref, (a, w, a2, w2, bias), {}
    x = whole(4, 3, 16, 16, dtype=dtype).contiguous()
    window = whole(8, 16, 3, 3, dtype=dtype)
    keywords = {"ours": {"padding": 1, "config": PIXELS}, "ref": {"padding": 1}}
    yield "conv2d_hwnc", hwnc.conv2d_hwnc, hwnc.conv2d_hwnc_ref, (x, window), keywords
    if conv3x3_hwnc.runs_on(DEVICE) and dtype is not torch.float32:
        x, window = whole(2, 3, 70, 64, dtype=dtype).contiguous(), whole(64, 64, 3, 3, dtype=dtype)
        keywords = {
            "ours": {"padding": 1, "config": conv3x3_hwnc.CONFIGS[0]},
            "ref": {"padding": 1},
        }
        yield "conv3x3_hwnc", hwnc.conv2d_hwnc, hwnc.conv2d_hwnc_ref, (x, window), keywords
        w3, w1 = torch.eye(256, 64, device=DEVICE).to(dtype), torch.eye(64, 256, device=DEVICE)
        thin = torch.zeros_like(window)
        thin[:, :, 1, 1] = torch.eye(64, device=DEVICE).to(dtype)
        wide = whole(2, 3, 70, 256, dtype=dtype).contiguous()
        block = (x, thin, None, w3, None, wide, w1.to(dtype))
        yield (
            "bottleneck_hwnc",
            bottleneck_hwnc.bottleneck_hwnc,
            bottleneck_hwnc.bottleneck_hwnc_ref,
            block,
            {},
        )
    if dtype is torch.float32:
        return
    t, x2 = whole(37, 16, dtype=dtype), whole(37, 64, dtype=dtype)
    w3, w1 = whole(64, 16, dtype=dtype), torch.eye(16, 64, dtype=dtype, device=DEVICE)
    b3, b1 = whole(64, dtype=torch.float32), whole(16, dtype=torch.float32)
    yield "b2b_gemm", b2b_gemm.b2b_gemm, b2b_gemm.b2b_gemm_ref, (t, w3, b3, x2, w1, b1), {}


def calls(dtype: torch.dtype) -> Iterator[Call]:
    yield from convolutions(dtype)
    yield from others(dtype)
    if dtype is torch.float32:
        yield from cache_reads()
    if _tma.has_tma(DEVICE):
        yield from by_tma(dtype)


def check(call: Call, dtype: torch.dtype) -> None:
    """One launch, compared with float64 rounded once."""
    name, kernel, reference, operands, kwargs = call
    got = kernel(*operands, **kwargs.get("ours", {}))
    want = reference(*operands, upcast=True, **kwargs.get("ref", {}))
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
    if not all(torch.equal(g, w.to(dtype)) for g, w in pairs):
        raise AssertionError(f"{name} in {dtype} is wrong")


def main() -> None:
    torch.manual_seed(29)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for dtype in DTYPES:
        for call in calls(dtype):
            check(call, dtype)
            print(f"{call[0]}, {dtype}: exact", flush=True)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print(f"{sum(k.LAUNCHES.values())} launches of {', '.join(sorted(k.LAUNCHES))}")


if __name__ == "__main__":
    main()
