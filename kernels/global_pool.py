"""Global average pooling.

    y[n, 0, 0, c] = sum of x[n, h, w, c] over all pixels (h, w) / (H * W)

Memory is dense NHWC (``channels_last``); float32, float16 or bfloat16, the sum in float32 and in
one fixed order, rounded once. Rejected: other layouts and dtypes, images without pixels, an
``out`` that overlaps x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._common import Operator, await_producers, launch, needs_int64, register, store_rounded
from .pool import PoolConfig, check_image, pooled_output

CONFIGS: tuple[PoolConfig, ...] = (
    PoolConfig(16, 64, 4),
    PoolConfig(32, 32, 4),
    PoolConfig(64, 16, 4),
)
"""A program makes ``block_c`` channels of one image and reads ``block_m`` pixels at a time."""


def select_config(channels: int) -> PoolConfig:
    """The widest row that does not reach beyond the channels, or the narrowest."""
    return next((config for config in CONFIGS if config.block_c <= channels), CONFIGS[-1])


@triton.jit(do_not_specialize=["PIXELS"])
def global_avg_pool_kernel(
    x_ptr,  # [N, PIXELS, C]
    y_ptr,  # [N, C]
    PIXELS,
    C,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    await_producers(PDL)
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    n = pid // tiles_c
    if INT64:
        n, PIXELS = n.to(tl.int64), PIXELS.to(tl.int64)
    c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    # Masked addresses stay inside too; a remainder, unlike a choice, keeps neighbours adjacent.
    c_in = (c % C)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, PIXELS, BLOCK_M):
        pixel = start + tl.arange(0, BLOCK_M)
        ok = (pixel < PIXELS)[:, None] & c_ok[None, :]  # [BM, BC]
        row = n * PIXELS + tl.where(pixel < PIXELS, pixel, 0)
        total += tl.load(x_ptr + row[:, None] * C + c_in, mask=ok, other=0.0).to(tl.float32)
    total = tl.sum(total, axis=0)
    mean = tl.div_rn(total, tl.broadcast_to(PIXELS.to(tl.float32), total.shape))
    store_rounded(y_ptr + n * C + c, mean, c_ok)


def global_avg_pool_ref(x: Tensor, *, upcast: bool = False) -> Tensor:
    """The same in plain PyTorch; in float64 with ``upcast``."""
    y = F.adaptive_avg_pool2d(x.double() if upcast else x, 1)
    return y.contiguous(memory_format=torch.channels_last)


def global_avg_pool(
    x: Tensor, *, out: Tensor | None = None, config: PoolConfig | None = None
) -> Tensor:
    """Mean of each channel of each image.

    Args:
        x: (N, C, H, W), channels_last, float32, float16 or bfloat16.
        out: where to write; must not overlap x.

    Returns:
        (N, C, 1, 1) of x's dtype. A batch of 0 launches nothing.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not what is wanted (named in the text).
    """
    check_image(x)
    batch, channels, height, width = x.shape
    out = pooled_output(x, (batch, channels, 1, 1), out)
    if not out.numel():
        return out
    config = config or select_config(channels)
    launch(
        global_avg_pool_kernel,
        batch * triton.cdiv(channels, config.block_c),
        x.device,
        x,
        out,
        height * width,
        channels,
        INT64=needs_int64(x),
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
    )
    return out


def _global_avg_pool_ours(x: Tensor) -> Tensor:
    """:func:`global_avg_pool` as a functional operator."""
    return global_avg_pool(x)


def _global_avg_pool_fake(x):
    check_image(x)
    return torch.empty_like(global_avg_pool_ref(x))


def _global_avg_pool_plain(x):
    check_image(x)
    return global_avg_pool_ref(x)


global_avg_pool_op = register(
    "global_avg_pool",
    Operator(_global_avg_pool_ours, _global_avg_pool_plain, _global_avg_pool_fake),
)
