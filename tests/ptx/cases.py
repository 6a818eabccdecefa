"""Every kernel and shipped configuration on odd shapes, whole numbers: what to run and what is due.

What is due is the kernel's plain reference in float64, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastres.kernels._gpu import GPUS

# The package gives some of these names to functions.
NAMES = ("conv", "elementwise", "gemm", "global_pool", "head", "pool", "b2b_gemm", "stem")
conv, elementwise, gemm, global_pool, head, pool, b2b_gemm, stem = (
    import_module(f"fastres.kernels.{name}") for name in NAMES
)
hwnc = import_module("fastres.kernels.experimental.hwnc")

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
KINDS = {"half": (HALF, "ieee"), "tf32": (FLOAT, "tf32"), "ieee": (FLOAT, "ieee")}


@dataclass(frozen=True)
class Case:
    """``call(*inputs, **shape, **options)`` must give what ``reference`` of the same gives."""

    kernel: str
    what: str
    config: Any
    call: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    options: dict[str, Any] = field(default_factory=dict)
    copies: bool = False  # by TMA of sm_90

    def name(self) -> str:
        row = "-".join(map(str, astuple(self.config))) if self.config else "chosen"
        return f"{self.kernel} {self.what} {row}"

    def given(self, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Any]]:
        torch.manual_seed(0)
        args, named = self.inputs()
        move = lambda v: v.to(device) if isinstance(v, Tensor) else v  # noqa: E731
        return tuple(map(move, args)), {name: move(v) for name, v in named.items()}

    def run(self, device: str = "cpu") -> tuple[Tensor, ...]:
        """What the kernel makes of it; memory that it leaves unwritten holds NaN."""
        args, named = self.given(device)
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN
        try:
            out = self.call(*args, **named, **self.options, config=self.config)
        finally:
            torch.use_deterministic_algorithms(False)
        return out if isinstance(out, tuple) else (out,)

    def due(self) -> tuple[Tensor, ...]:
        args, named = self.given()
        out = self.reference(*args, **named, upcast=True)
        return out if isinstance(out, tuple) else (out,)

    def wrong(self, got: tuple[Tensor, ...]) -> str:
        """What differs from what is due; empty where nothing does."""
        for mine, due in zip(got, self.due(), strict=True):
            differs = (mine.cpu() != due.to(mine.dtype)).sum().item()
            if differs:
                return f"{differs} of {due.numel()} numbers differ"
        return ""


def whole(*shape: int, dtype: torch.dtype = HALF, most: int = 2) -> Tensor:
    t = torch.randint(-most, most + 1, shape).to(dtype)
    return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t


CONVS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "3x3": ({"channels": 64, "outputs": 72, "window": 3}, {"padding": 1}),
    "1x1/2": ({"channels": 96, "outputs": 40, "window": 1}, {"stride": 2}),
    "7x7/2": ({"channels": 3, "outputs": 24, "window": 7}, {"stride": 2, "padding": 3}),
    "groups": ({"channels": 16, "outputs": 32, "window": 3}, {"padding": 1, "groups": 4}),
    "ragged": ({"channels": 20, "outputs": 17, "window": 3}, {"padding": 2, "dilation": 2}),
}


def conv_inputs(what: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    sizes, shape = CONVS[what]
    channels, outputs, window = sizes["channels"], sizes["outputs"], sizes["window"]
    x = whole(2, channels, 9, 7, dtype=dtype)
    w = whole(outputs, channels // shape.get("groups", 1), window, window, dtype=dtype)
    b = whole(outputs, dtype=FLOAT, most=5)
    like = torch.nn.functional.conv2d(x.double(), w.double(), **shape)  # type: ignore[arg-type]
    residual = whole(*like.shape, dtype=dtype, most=9)
    return (x, w, b), {"residual": residual, "relu": what != "1x1/2", **shape}


def conv_cases(target: str) -> Iterator[Case]:
    for kind, rows in conv.CONFIGS.items():
        dtype, precision = KINDS[kind]
        for index, row in enumerate(rows):
            fitted = row.fitted(kind, GPUS[target])
            if fitted is None:
                continue
            shapes = list(CONVS)
            chosen = {"3x3": 1, shapes[1 + index % 4]: 1}
            if fitted.can_split_k:
                chosen["split"] = 3
            for what, split_k in chosen.items():
                used = BFLOAT if kind == "half" and index % 2 else dtype
                shape = "3x3" if what == "split" else what
                yield Case(
                    "conv2d",
                    f"{what} {kind if kind != 'half' else str(used)[6:]}",
                    replace(fitted, split_k=split_k),
                    conv.conv2d,
                    conv.conv2d_ref,
                    lambda shape=shape, used=used: conv_inputs(shape, used),
                    {"precision": precision},
                )


def image_cases(target: str) -> Iterator[Case]:
    """The kernels that are bound by memory."""
    for dtype in (HALF, BFLOAT, FLOAT):
        short = str(dtype)[6:]
        image = lambda dtype=dtype: whole(2, 24, 9, 7, dtype=dtype, most=20)  # noqa: E731
        for row in elementwise.CONFIGS:
            both = lambda image=image: ((image(), image()), {})  # noqa: E731
            yield Case("add_relu", short, row, elementwise.add_relu, elementwise.add_relu_ref, both)
            one = lambda image=image: ((image(),), {})  # noqa: E731
            yield Case("relu", short, row, elementwise.relu, elementwise.relu_ref, one)
        shape = {"kernel_size": 3, "stride": 2, "padding": 1}
        for row in pool.CONFIGS:
            window = lambda image=image, shape=shape: ((image(),), shape)  # noqa: E731
            yield Case("max_pool2d", short, row, pool.max_pool2d, pool.max_pool2d_ref, window)
            halves = lambda image=image: ((image() * 4, 2), {})  # noqa: E731
            yield Case("avg_pool2d", short, row, pool.avg_pool2d, pool.avg_pool2d_ref, halves)
        for row in global_pool.CONFIGS:
            square = lambda dtype=dtype: ((whole(3, 40, 4, 4, dtype=dtype) * 16,), {})  # noqa: E731
            name, call = "global_avg_pool", global_pool.global_avg_pool
            yield Case(name, short, row, call, global_pool.global_avg_pool_ref, square)
        for row in head.CONFIGS:
            inputs = lambda dtype=dtype: (  # noqa: E731
                (
                    whole(3, 160, 4, 4, dtype=dtype) * 16,
                    whole(19, 160, dtype=dtype),
                    whole(19, dtype=FLOAT),
                ),
                {},
            )
            yield Case("head", short, row, head.head, head.head_ref, inputs)


def stem_cases(target: str) -> Iterator[Case]:
    for rows, kinds in (("half", ("half",)), ("single", ("tf32", "ieee"))):
        for index, row in enumerate(stem.CONFIGS[rows]):
            for kind in kinds:
                dtype, precision = KINDS[kind]
                used = BFLOAT if kind == "half" and index % 2 else dtype
                planar = index % 3 != 1

                def inputs(used=used, planar=planar):
                    x = torch.randint(-2, 3, (1, 3, 37, 35)).to(used)
                    if not planar:
                        x = x.contiguous(memory_format=torch.channels_last)
                    return (x, whole(64, 3, 7, 7, dtype=used), whole(64, dtype=FLOAT)), {}

                what = f"{'NCHW' if planar else 'NHWC'} {kind if kind != 'half' else str(used)[6:]}"
                options = {"precision": precision}
                yield Case("stem", what, row, stem.stem, stem.stem_ref, inputs, options)


def product_cases(target: str) -> Iterator[Case]:
    """Kernels that TMA feeds."""
    if target == "sm_80":
        return
    for kind, rows in gemm.CONFIGS.items():
        dtype, precision = KINDS[kind]
        for index, row in enumerate(rows):
            used = BFLOAT if kind == "half" and index % 2 else dtype
            short = kind if kind != "half" else str(used)[6:]

            def single(used=used):
                x, w = whole(200, 328, dtype=used), whole(136, 328, dtype=used)
                residual = whole(200, 136, dtype=used, most=9)
                return (x, w, whole(136, dtype=FLOAT)), {"residual": residual, "relu": True}

            def pair(used=used):
                x, w = whole(2 * 3 * 4, 328, dtype=used), whole(72, 328, dtype=used)
                x2, w2 = whole(2 * 5 * 7, 200, dtype=used), whole(72, 200, dtype=used)
                given = (x, w, x2, w2, whole(72, dtype=FLOAT))
                return given, {"images": (2, 5, 7, 1), "stride": 2, "relu": True}

            options = {"precision": precision}
            yield Case("gemm", short, row, gemm.gemm, gemm.gemm_ref, single, options, copies=True)
            if not row.persistent:
                call, reference = gemm.dual_gemm, gemm.dual_gemm_ref
                yield Case("dual_gemm", short, row, call, reference, pair, options, copies=True)
    for row in b2b_gemm.CONFIGS:
        if not b2b_gemm.fits(row, 64, 64, GPUS[target]):
            continue
        for dtype in (HALF, BFLOAT):

            def inputs(dtype=dtype):
                w1 = torch.zeros(64, 256, dtype=dtype)  # two of a row count: no sum overflows
                w1[torch.arange(64), torch.arange(64) * 7 % 256] = 1
                w1[torch.arange(64), (torch.arange(64) * 11 + 5) % 256] -= 2
                t, w3 = whole(150, 64, dtype=dtype, most=1), whole(256, 64, dtype=dtype, most=1)
                x, b3, b1 = whole(150, 256, dtype=dtype), whole(256, dtype=FLOAT), whole(64)
                return (t, w3, b3, x, w1, b1.to(dtype)), {}

            yield Case(
                "b2b_gemm",
                str(dtype)[6:],
                row,
                b2b_gemm.b2b_gemm,
                b2b_gemm.b2b_gemm_ref,
                inputs,
                copies=True,
            )


def hwnc_cases(target: str) -> Iterator[Case]:
    """The experimental layout; its Gluon kernels have shapes of their own."""
    if target == "sm_80":
        return
    for kind, rows in hwnc.CONFIGS.items():
        dtype, precision = KINDS[kind]
        for index, row in enumerate(rows):
            stride, batch = ((1, row.block_m), (1, row.block_m // 2), (2, 24))[index % 3]

            def inputs(dtype=dtype, stride=stride, batch=batch):
                x = whole(4, 5, batch, 64, dtype=dtype).contiguous()
                size = (2, 3) if stride == 2 else (4, 5)
                residual = whole(*size, batch, 72, dtype=dtype).contiguous()
                w = whole(72, 64, 3, 3, dtype=dtype)
                given = {"stride": stride, "padding": 1, "residual": residual, "relu": True}
                return (x, w, whole(72, dtype=FLOAT)), given

            yield Case(
                "conv2d_hwnc",
                f"{['pixel', 'row', 'gathered'][index % 3]} {kind}",
                row,
                hwnc.conv2d_hwnc,
                hwnc.conv2d_hwnc_ref,
                inputs,
                {"precision": precision},
                copies=True,
            )


def every(target: str) -> Iterator[Case]:
    for cases in (conv_cases, image_cases, stem_cases, product_cases, hwnc_cases):
        yield from cases(target)


def sample(target: str) -> Iterator[Case]:
    """The cheapest case of each kernel, by the elements of a tile; halves where there are any."""

    def cost(case: Case) -> tuple[bool, int]:
        tile = getattr(case.config, "block_m", 1) * getattr(case.config, "block_n", 1)
        return case.options.get("precision") == "ieee" and case.kernel == "conv2d_hwnc", tile

    found: dict[str, Case] = {}
    for case in every(target):
        found[case.kernel] = min(found.get(case.kernel, case), case, key=cost)
    yield from found.values()
