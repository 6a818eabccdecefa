"""Contests of kernels on the shapes of a ResNet-50, each a section of ``kernels_gpu.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_contest import (
    Call,
    Case,
    Choice,
    Operands,
    Setting,
    contest,
    normal,
    row_text,
)
from benchmarks.gpu_exact import (
    b2b_gemm,
    bottleneck_hwnc,
    conv,
    conv3x3_hwnc,
    fitted,
    gemm,
    head,
    hwnc,
    stem,
)
from fastres.kernels import (
    global_avg_pool,
    max_pool2d,
    new_workspace,
)
from fastres.kernels._config import ProblemSize, candidates, gpu_of
from fastres.kernels.linear import linear

KINDS = {torch.float16: "half", torch.bfloat16: "half", torch.float32: "ieee"}


@dataclass(frozen=True)
class Stage:
    """One of the four: ``channels`` of its 3x3s, pixels of a side of its images."""

    number: int
    channels: int
    size: int


STAGES = tuple(Stage(i + 1, 64 << i, 56 >> i) for i in range(4))
TINY = Stage(1, 64, 4)


def stages(setting: Setting, *numbers: int) -> Iterator[Stage]:
    yield from (TINY,) if setting.tiny else (s for s in STAGES if s.number in numbers)


def rows_that_fit(setting: Setting, table: Any) -> list[Any]:
    """The tiles for the setting's arithmetic as this GPU would run them."""
    fitting = (fitted(row, setting) for row in table[KINDS[setting.dtype]])
    return list(setting.rows([row for row in fitting if row is not None]))


def machine_name(kernel: str, row: Any) -> str:
    return f"{kernel} {row_text(row)}"


def on_gpu(setting: Setting, **contenders: Call) -> dict[str, Call]:
    """Contenders that need cuDNN, and so a GPU; underscores stand for spaces."""
    if setting.tiny:
        return {}
    return {name.replace("_", " "): call for name, call in contenders.items()}


def gemm_cases(setting: Setting) -> Iterator[Case]:
    """Every 1x1 of the four stages: bare against cuBLAS, with epilogue against cuBLAS + aten."""
    for batch in setting.batches(256, 32):
        for stage in stages(setting, 1, 2, 3, 4):
            for way in ("reduce", "expand"):
                for bare in (True, False) if batch != 32 else (False,):
                    title = f"stage {stage.number} {way} batch {batch}{' bare' * bare}"
                    yield Case(title, partial(_gemm, setting, stage, batch, way, bare))


def _gemm(setting: Setting, stage: Stage, batch: int, way: str, bare: bool) -> dict[str, Any]:
    c, e, rows = stage.channels, 4 * stage.channels, batch * stage.size**2
    inside, outside = (e, c) if way == "reduce" else (c, e)
    residual = way == "expand" and not bare

    def make() -> Operands:
        w, b = normal(setting, outside, inside, scale=inside**-0.5), normal(setting, outside)
        return (
            normal(setting, rows, inside),
            w,
            None if bare else b,
            normal(setting, rows, outside) if residual else None,
        )

    def ours(row: Any, x: Tensor, w: Tensor, b: Any, r: Any) -> Tensor:
        return gemm.gemm(x, w, b, residual=r, relu=not bare, config=row)

    def reference(x: Tensor, w: Tensor, b: Any, r: Any, upcast: bool = False) -> Tensor:
        return gemm.gemm_ref(x, w, b, residual=r, relu=not bare, upcast=upcast)

    def as_conv(x: Tensor, w: Tensor, b: Any, r: Any) -> Tensor:
        image = x.view(batch, stage.size, stage.size, inside).permute(0, 3, 1, 2)
        shortcut = None if r is None else _images(r, image)
        return gemm.rows_of(conv.conv2d(image, _window(w), b, residual=shortcut, relu=not bare))

    contenders: dict[str, Call] = {"cuBLAS" if bare else "cuBLAS + aten": reference}
    contenders["conv2d"] = as_conv
    for row in rows_that_fit(setting, gemm.CONFIGS):
        contenders[machine_name("gemm", row)] = partial(ours, row)
    return contest(
        setting,
        contenders,
        make,
        reference,
        flop=2 * rows * inside * outside,
        choice=None if bare else Choice("gemm", "conv2d", inside, batch),
    )


def conv3x3_cases(setting: Setting) -> Iterator[Case]:
    """The 3x3s: NHWC by pointers, HWNC by descriptors, cuDNN fused and not."""
    for batch in setting.batches(256, 32):
        for stride in (1, 2):
            for stage in stages(setting, *((1, 2, 3, 4) if stride == 1 else (2, 3, 4))):
                title = f"stage {stage.number} 3x3/{stride} batch {batch}"
                yield Case(title, partial(_conv3x3, setting, stage, batch, stride, False))


def _to_nchw(y: Tensor) -> Tensor:
    return y.permute(2, 3, 0, 1)


def _conv3x3(
    setting: Setting, stage: Stage, batch: int, stride: int, split_k: bool
) -> dict[str, Any]:
    c, size = stage.channels, stage.size * stride
    given = {"stride": stride, "padding": 1, "relu": True}

    def make() -> Operands:
        x = normal(setting, batch, c, size, size)
        w = normal(setting, c, c, 3, 3, scale=(9 * c) ** -0.5)
        return x, w, normal(setting, c), hwnc.to_hwnc(x)

    def reference(x: Tensor, w: Tensor, b: Tensor, _: Tensor, upcast: bool = False) -> Tensor:
        return conv.conv2d_ref(x, w, b, upcast=upcast, **given)

    def cudnn(x: Tensor, w: Tensor, b: Tensor, _: Tensor) -> Tensor:
        two = (stride, stride)
        return torch.cudnn_convolution_relu(x, w, b, two, (1, 1), (1, 1), 1)

    contenders: dict[str, Call] = {"cuDNN unfused": reference}
    contenders |= on_gpu(setting, cuDNN_fused=cudnn)
    contenders |= _conv_rows(
        setting, ProblemSize(batch * stage.size**2, c, c, 9, 1, 2), split_k, given
    )
    rows = [] if split_k else rows_that_fit(setting, hwnc.CONFIGS)
    if (c, stride, split_k) == (conv3x3_hwnc.CHANNELS, 1, False) and conv3x3_hwnc.runs_on(
        setting.device
    ):
        rows += conv3x3_hwnc.CONFIGS
    for row in rows:
        contenders[machine_name("conv2d_hwnc", row)] = lambda x, w, b, h, row=row: _to_nchw(
            hwnc.conv2d_hwnc(h, w, b, config=row, **given)
        )
    work = 2 * batch * stage.size**2 * 9 * c * c
    choice = None if split_k else Choice("conv2d_hwnc", "conv2d ", c, batch)
    return contest(setting, contenders, make, reference, flop=work, steady=split_k, choice=choice)


def _conv_rows(
    setting: Setting, problem: ProblemSize, split_k: bool, given: dict[str, Any]
) -> dict[str, Call]:
    """conv2d's tiles; with ``split_k`` all that are considered, else the larger ones unsplit."""
    table = conv.CONFIGS[KINDS[setting.dtype]]
    rows = candidates(table, problem, KINDS[setting.dtype], gpu_of(setting.device))
    if not split_k:
        rows = [r for r in rows if r.split_k == 1 and r.block_m >= 64 and r.block_n >= 64]
    workspace = new_workspace(setting.device)

    def ours(row: Any, x: Tensor, w: Tensor, b: Any, *rest: Any) -> Tensor:
        return conv.conv2d(x, w, b, config=row, workspace=workspace, **given)

    chosen = setting.rows(rows)
    return {machine_name("conv2d", row): partial(ours, row) for row in chosen}


def pair_cases(setting: Setting) -> Iterator[Case]:
    """A stage's first block: expansion and projection as one product or as two kernels."""
    for batch in setting.batches(256, 32):
        for stage in stages(setting, 1, 2, 3, 4):
            yield Case(f"stage {stage.number} batch {batch}", partial(_pair, setting, stage, batch))


def _pair(setting: Setting, stage: Stage, batch: int) -> dict[str, Any]:
    c, e = stage.channels, 4 * stage.channels
    stride, wide = (1, 64) if stage.number == 1 else (2, 2 * c)
    size = stage.size * stride

    def make() -> Operands:
        return (
            normal(setting, batch, c, stage.size, stage.size),
            normal(setting, e, c, scale=c**-0.5),
            normal(setting, batch, wide, size, size),
            normal(setting, e, wide, scale=wide**-0.5),
            normal(setting, e),
        )

    def reference(t: Tensor, w: Tensor, x: Tensor, w2: Tensor, b: Tensor, upcast: bool = False):
        y = conv.conv2d_ref(x, w2[:, :, None, None], None, stride=stride, upcast=upcast)
        w = w[:, :, None, None]
        return conv.conv2d_ref(t, w, b, residual=y.to(_float(t, upcast)), relu=True, upcast=upcast)

    def cudnn(t: Tensor, w: Tensor, x: Tensor, w2: Tensor, b: Tensor) -> Tensor:
        y = F.conv2d(x, w2[:, :, None, None], None, stride)
        ones = (1, 1)
        return torch.cudnn_convolution_add_relu(
            t, w[:, :, None, None], y, 1.0, b, ones, (0, 0), ones, 1
        )

    def single(t: Tensor, w: Tensor, x: Tensor, w2: Tensor, b: Tensor) -> Tensor:
        y = conv.conv2d(x, _window(w2), None, stride=stride)
        return conv.conv2d(t, _window(w), b, residual=y, relu=True, out=y)

    def ours(row: Any, t: Tensor, w: Tensor, x: Tensor, w2: Tensor, b: Tensor) -> Tensor:
        y = gemm.dual_gemm(
            gemm.rows_of(t),
            w,
            gemm.rows_of(x),
            w2,
            b,
            images=(batch, size, size, 1),
            stride=stride,
            relu=True,
            config=row,
        )
        return y.view(batch, stage.size, stage.size, e).permute(0, 3, 1, 2)

    contenders: dict[str, Call] = {"cuDNN unfused": reference}
    contenders |= on_gpu(setting, cuDNN_fused=cudnn)
    contenders["two of conv2d"] = single
    for row in rows_that_fit(setting, gemm.CONFIGS):
        if not row.persistent:
            contenders[machine_name("dual_gemm", row)] = partial(ours, row)
    work = 2 * batch * stage.size**2 * e * (c + wide)
    choice = Choice("dual_gemm", "two of conv2d", c, batch)
    return contest(setting, contenders, make, reference, flop=work, choice=choice)


def _float(t: Tensor, upcast: bool) -> torch.dtype:
    return torch.float64 if upcast else t.dtype


def _window(w: Tensor) -> Tensor:
    """A matrix as the weights of a 1x1 convolution."""
    return w[:, :, None, None].contiguous(memory_format=torch.channels_last)


SEAMS = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1))
"""Stage, and by how much the next block's first convolution is wider than this one's 3x3."""


def b2b_gemm_cases(setting: Setting) -> Iterator[Case]:
    """Expansion + residual + next reduction: in one kernel, as two products, by cuDNN."""
    for batch in setting.batches(256, 32):
        for number, times in SEAMS[:1] if setting.tiny else SEAMS:
            for stage in stages(setting, number):
                title = f"stage {number} to {times * stage.channels} channels batch {batch}"
                yield Case(title, partial(_b2b_gemm, setting, stage, batch, times))
    if bottleneck_hwnc.runs_on(setting.device):
        yield from _sliding_cases(setting)


def _block_operands(setting: Setting, stage: Stage, batch: int, reduced: int) -> Operands:
    """t, w2, b2, w3, b3, x, w1, b1 of a block of a block, in NHWC."""
    c, e, size = stage.channels, 4 * stage.channels, stage.size
    return (
        normal(setting, batch, c, size, size),
        normal(setting, c, c, 3, 3, scale=(9 * c) ** -0.5),
        normal(setting, c),
        normal(setting, e, c, scale=c**-0.5),
        normal(setting, e),
        normal(setting, batch, e, size, size),
        normal(setting, reduced, e, scale=e**-0.5),
        normal(setting, reduced),
    )


def _images(rows: Tensor, like: Tensor) -> Tensor:
    """Rows of pixels as channels_last images of ``like``'s size; a view."""
    n, _, h, w = like.shape
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)


def _seam(t: Tensor, w3: Tensor, b3: Tensor, x: Tensor, w1: Tensor, b1: Tensor, **given: Any):
    """b2b_gemm on images."""
    wide, narrow = b2b_gemm.b2b_gemm(gemm.rows_of(t), w3, b3, gemm.rows_of(x), w1, b1, **given)
    return _images(wide, t), _images(narrow, t)


def _two_products(t: Tensor, w3: Tensor, b3: Tensor, x: Tensor, w1: Tensor, b1: Tensor):
    wide = gemm.gemm(gemm.rows_of(t), w3, b3, residual=gemm.rows_of(x), relu=True)
    narrow = gemm.gemm(wide, w1, b1, relu=True)
    return _images(wide, t), _images(narrow, t)


def _two_cudnn(t: Tensor, w3: Tensor, b3: Tensor, x: Tensor, w1: Tensor, b1: Tensor):
    ones, none = (1, 1), (0, 0)
    wide = torch.cudnn_convolution_add_relu(
        t, w3[:, :, None, None], x, 1.0, b3, ones, none, ones, 1
    )
    return wide, torch.cudnn_convolution_relu(wide, w1[:, :, None, None], b1, ones, none, ones, 1)


def _seam_ref(
    t: Tensor, w3: Tensor, b3: Tensor, x: Tensor, w1: Tensor, b1: Tensor, upcast: bool = False
) -> tuple[Tensor, Tensor]:
    wide, narrow = b2b_gemm.b2b_gemm_ref(
        gemm.rows_of(t), w3, b3, gemm.rows_of(x), w1, b1, upcast=upcast
    )
    return _images(wide, t), _images(narrow, t)


def _b2b_gemm(setting: Setting, stage: Stage, batch: int, times: int) -> dict[str, Any]:
    c, reduced = stage.channels, times * stage.channels

    def make() -> Operands:
        t, _, _, *rest = _block_operands(setting, stage, batch, reduced)
        return (t, *rest)

    contenders: dict[str, Call] = {"PyTorch": _seam_ref}
    contenders |= on_gpu(setting, cuDNN_fused=_two_cudnn)
    contenders["two of gemm"] = _two_products
    for row in setting.rows(b2b_gemm.CONFIGS):
        if b2b_gemm.fits(row, c, reduced, gpu_of(setting.device)):
            contenders[machine_name("b2b_gemm", row)] = partial(_seam, config=row)
    work = 2 * batch * stage.size**2 * 4 * c * (c + reduced)
    choice = Choice("b2b_gemm", "two of gemm", c, batch)
    return contest(setting, contenders, make, _seam_ref, flop=work, choice=choice)


def _sliding_cases(setting: Setting) -> Iterator[Case]:
    """The 3x3 of stage 1 as well, in HWNC: in one kernel, or as conv2d_hwnc + b2b_gemm."""
    for batch in setting.batches(256, 64):
        for _, times in SEAMS[:2]:
            for stage in stages(setting, 1):
                title = f"HWNC stage 1 to {times * stage.channels} channels batch {batch}"
                yield Case(title, partial(_sliding, setting, stage, batch, times))


def _sliding(setting: Setting, stage: Stage, batch: int, times: int) -> dict[str, Any]:
    c, reduced = stage.channels, times * stage.channels

    def make() -> Operands:
        t, w2, b2, w3, b3, x, w1, b1 = _block_operands(setting, stage, batch, reduced)
        return hwnc.to_hwnc(t), w2, b2, w3, b3, hwnc.to_hwnc(x), w1, b1

    def parts(t: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor, x: Tensor, *rest: Tensor):
        middle = hwnc.conv2d_hwnc(t, w2, b2, padding=1, relu=True)
        wide, narrow = b2b_gemm.b2b_gemm(middle.view(-1, c), w3, b3, x.view(-1, 4 * c), *rest)
        return wide.view(x.shape), narrow.view(*x.shape[:3], -1)

    contenders: dict[str, Call] = {"PyTorch": bottleneck_hwnc.bottleneck_hwnc_ref}
    contenders["conv2d_hwnc + b2b_gemm"] = parts
    for row in setting.rows(bottleneck_hwnc.CONFIGS):
        if bottleneck_hwnc.fits(row, 4 * c, reduced, gpu_of(setting.device)):
            contenders[machine_name("bottleneck_hwnc", row)] = partial(
                bottleneck_hwnc.bottleneck_hwnc, config=row
            )
    work = 2 * batch * stage.size**2 * c * (9 * c + 4 * c + 4 * reduced)
    choice = Choice("bottleneck_hwnc", "conv2d_hwnc + ", c, batch)
    return contest(
        setting, contenders, make, bottleneck_hwnc.bottleneck_hwnc_ref, flop=work, choice=choice
    )


def stem_cases(setting: Setting) -> Iterator[Case]:
    """7x7/2 + pool: one kernel from what users have, conv2d + pool, cuDNN + pool."""
    inputs = (("NCHW", setting.dtype), ("NCHW", torch.float32), ("NHWC", setting.dtype))
    for batch in setting.batches(256, 32, 1):
        for layout, dtype in inputs[:1] if setting.tiny else inputs:
            title = f"{layout} {str(dtype).removeprefix('torch.')} batch {batch}"
            yield Case(title, partial(_stem, setting, batch, layout == "NCHW", dtype))


def _stem(setting: Setting, batch: int, planar: bool, dtype: torch.dtype) -> dict[str, Any]:
    size = 32 if setting.tiny else 224

    def make() -> Operands:
        x = torch.randn(batch, 3, size, size, device=setting.device).to(dtype)
        x = x if planar else x.contiguous(memory_format=torch.channels_last)
        w = normal(setting, 64, 3, 7, 7, scale=147**-0.5)
        return x, w, normal(setting, 64), stem.pack_stem_weight(w, planar=planar)

    def reference(x: Tensor, w: Tensor, b: Tensor, _: Tensor, upcast: bool = False) -> Tensor:
        return stem.stem_ref(x.to(setting.dtype), w, b, upcast=upcast)

    def cudnn(x: Tensor, w: Tensor, b: Tensor, _: Tensor) -> Tensor:
        x = x.to(setting.dtype, memory_format=torch.channels_last)
        two, three = (2, 2), (3, 3)
        return F.max_pool2d(torch.cudnn_convolution_relu(x, w, b, two, three, (1, 1), 1), 3, 2, 1)

    def apart(x: Tensor, w: Tensor, b: Tensor, _: Tensor) -> Tensor:
        x = x.to(setting.dtype, memory_format=torch.channels_last)
        y = conv.conv2d(x, w, b, stride=2, padding=3, relu=True)
        return max_pool2d(y, 3, stride=2, padding=1)

    def ours(row: Any, x: Tensor, w: Tensor, b: Tensor, packed: Tensor) -> Tensor:
        return stem.stem(x, w, b, packed=packed, config=row)

    kind = "single" if setting.dtype == torch.float32 else "half"
    contenders: dict[str, Call] = {"cuDNN unfused + pool": reference}
    contenders |= on_gpu(setting, cuDNN_fused_and_pool=cudnn)
    contenders["conv2d + max_pool2d"] = apart
    for row in setting.rows(stem.CONFIGS[kind]):
        contenders[machine_name("stem", row)] = partial(ours, row)
    work = 2 * batch * (size // 2) ** 2 * 64 * 147
    choice = Choice("stem", "conv2d + max_pool2d", 3, batch)
    return contest(setting, contenders, make, reference, flop=work, steady=True, choice=choice)


HEAD_WORKSPACE = 1 << 23  # elements, for every row at every batch here


def head_cases(setting: Setting) -> Iterator[Case]:
    """Average pool + classifier: one kernel, two of ours, PyTorch."""
    for batch in setting.batches(1, 8, 32, 256):
        yield Case(f"batch {batch}", partial(_head, setting, batch))


def _head(setting: Setting, batch: int) -> dict[str, Any]:
    channels, outputs = (128, 40) if setting.tiny else (2048, 1000)
    workspace = torch.zeros(HEAD_WORKSPACE, device=setting.device)

    def make() -> Operands:
        w = normal(setting, outputs, channels, scale=channels**-0.5)
        return normal(setting, batch, channels, 7, 7), w, normal(setting, outputs)

    def apart(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear(global_avg_pool(x).flatten(1), w, b)

    def ours(row: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return head.head(x, w, b, config=row, workspace=workspace if row.split_k > 1 else None)

    contenders: dict[str, Call] = {"PyTorch": head.head_ref, "pool + linear": apart}
    for row in setting.rows(head.CONFIGS):
        contenders[machine_name("head", row)] = partial(ours, row)
    work = 2 * batch * outputs * channels
    choice = Choice("head", "pool + linear", channels, batch)
    return contest(setting, contenders, make, head.head_ref, flop=work, steady=True, choice=choice)


def split_cases(setting: Setting) -> Iterator[Case]:
    """Batch 1: every tile and split of conv2d on the 3x3s, deep stages first."""
    for batch in setting.batches(1):
        for stage in list(stages(setting, 1, 2, 3, 4))[::-1]:
            title = f"stage {stage.number} 3x3/1 batch {batch}"
            yield Case(title, partial(_conv3x3, setting, stage, batch, 1, True))
