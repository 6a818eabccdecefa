"""2-D convolution of bytes by int8 weights, as a mode of the kernel of :mod:`.conv`.

    v[n, p, q, k] = sum_{r, s, c} (x[...] - x_zero) * w[k, r, s, c] * scale[k] + b[k]
                    + (residual[n, p, q, k] - residual_zero) * residual_scale
    y[n, p, q, k] = clamp(round(relu(v) / y_scale) + y_zero, 0, 255), or relu(v)

x, w, residual and y as there; x, residual and y uint8, w int8; scale and b float32 (K,). Sums are
int32 and exact; what follows is float32, halves are rounded to even. Padding stands for 0.
Matrix units multiply int8 by int8, so that the kernel multiplies x - 128 and adds
(128 - x_zero) * sum(w[k]) to the sum, see :func:`shift_of`. Method: Jacob et al., 2018.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ._bytes import Grid, check_grid, check_zero
from ._common import (
    FLOATS,
    IntPair,
    check_activation,
    check_channels_last,
    check_contiguous,
    check_device,
    check_out_memory,
    check_same_device,
    check_shape,
    check_tensor,
)
from ._config import Gpu, ProblemSize, TileConfig, gpu_of, select_config
from .conv import Geometry, geometry_of, launch_conv2d

CONFIGS = (
    TileConfig(128, 256, 64, 8, 4),
    TileConfig(256, 64, 128, 8, 4),
    TileConfig(128, 128, 128, 8, 4),
    TileConfig(128, 64, 64, 4, 4),
    TileConfig(64, 128, 128, 4, 4),
    TileConfig(64, 64, 128, 4, 4),
    TileConfig(64, 64, 64, 4, 4),
    TileConfig(128, 32, 64, 4, 4),
    TileConfig(64, 32, 128, 4, 4),
    TileConfig(128, 32, 32, 4, 4),
    TileConfig(32, 64, 128, 4, 4),
    TileConfig(16, 64, 256, 4, 4),
    TileConfig(16, 32, 256, 4, 4),
)
"""Tiles; an instruction multiplies 32 bytes of a row."""


def shift_of(w: Tensor, x_zero: int) -> Tensor:
    """(K,) int32: what each sum of products of x - 128 lacks."""
    return (w.sum((1, 2, 3), dtype=torch.int32) * (128 - x_zero)).contiguous()


def conv2d_int8_ref(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    b: Tensor | None = None,
    *,
    x_zero: int = 0,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    residual_grid: Grid = (1.0, 0),
    relu: bool = False,
    y_grid: Grid | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The same in plain PyTorch, in float64 and rounded once."""
    geometry = stride, padding, dilation, groups
    y = F.conv2d(x.double() - x_zero, w.double(), None, *geometry)
    y = y * scale.double().view(-1, 1, 1)
    if b is not None:
        y = y + b.double().view(-1, 1, 1)
    if residual is not None:
        y = y + (residual.double() - residual_grid[1]) * residual_grid[0]
    y = y.relu() if relu else y
    if y_grid is None:
        y = y.to(dtype)
    else:
        y = ((y / y_grid[0]).round() + y_grid[1]).clamp(0, 255).to(torch.uint8)
    return y.contiguous(memory_format=torch.channels_last)


def _check(
    x: Tensor,
    w: Tensor,
    columns: dict[str, Tensor | None],
    residual: Tensor | None,
    window: tuple[IntPair, IntPair, IntPair, int],
) -> Geometry:
    """Refuse what the kernel does not take; otherwise the sizes of the convolution."""
    check_tensor("x", x, 4, (torch.uint8,))
    check_tensor("w", w, 4, (torch.int8,))
    check_same_device("w", w, x)
    geometry = geometry_of(x, w, *window)
    for name, t in columns.items():
        if t is not None:
            check_tensor(name, t, 1, (torch.int32 if name == "shift" else torch.float32,))
            check_same_device(name, t, x)
            check_shape(name, t, w.shape[:1])
            check_contiguous(name, t)
    if residual is not None:
        check_activation("residual", residual, geometry.shape, x)
    return geometry


@lru_cache(maxsize=4096)
def _select(problem: ProblemSize, gpu: Gpu) -> TileConfig:
    return select_config(CONFIGS, problem, "int8", gpu)


def conv2d_int8(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    b: Tensor | None = None,
    *,
    x_zero: int = 0,
    shift: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    residual_grid: Grid = (1.0, 0),
    relu: bool = False,
    y_grid: Grid | None = None,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    config: TileConfig | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Convolution of bytes, scale, bias, residual, ReLU and rounding to bytes in one kernel.

    Args:
        x: (N, C, H, W), channels_last, uint8; the byte ``x_zero`` stands for 0.
        w: (K, C / groups, R, S), channels_last, int8.
        scale: (K,), float32: x's scale times that of each channel's weights.
        b: (K,), float32.
        shift: (K,), int32, :func:`shift_of` these weights and ``x_zero``; computed where missing.
        residual: (N, K, P, Q), channels_last, uint8 on ``residual_grid``; added before the ReLU.
        y_grid: of the result, bytes; without it the result is of ``dtype``.
        dtype: float32, float16 or bfloat16.
        out: where to write; may be ``residual`` itself, as in :func:`.conv.conv2d`.
        config: the tile to use instead of the selected one, ``block_k`` at least 32.
        workspace: as in :func:`.conv.conv2d`, and the same memory may serve both.

    Returns:
        (N, K, P, Q), channels_last, uint8 or ``dtype``. A batch of 0 launches nothing.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not what is wanted (named in the text).
    """
    columns = {"scale": scale, "b": b, "shift": shift}
    geometry = _check(x, w, columns, residual, (stride, padding, dilation, groups))
    check_zero("x_zero", x_zero)
    check_grid("residual_grid", residual_grid)
    if y_grid is not None:
        check_grid("y_grid", y_grid)
    elif dtype not in FLOATS:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    if config is not None and config.block_k < 32:
        raise ValueError(f"config must have block_k of at least 32, got {config.block_k}")
    check_device(x)
    kind = dtype if y_grid is None else torch.uint8
    if out is None:
        out = torch.empty(
            geometry.shape, dtype=kind, device=x.device, memory_format=torch.channels_last
        )
    else:
        check_tensor("out", out, 4, (kind,))
        check_same_device("out", out, x)
        check_shape("out", out, geometry.shape)
        check_channels_last("out", out)
        apart, like = {"x": x, "w": w, **columns}, {"residual": residual}
        check_out_memory(out, apart | like if y_grid is None else apart, like if y_grid else {})
    if not out.numel():
        return out
    problem = geometry.problem(x, w)
    y_scale, y_zero = y_grid or (1.0, 0)
    how = {
        "RELU": relu,
        "PRECISION": "ieee",
        "scale_ptr": scale,
        "shift_ptr": shift_of(w, x_zero) if shift is None else shift,
        "x_zero": x_zero if x_zero and any(geometry.padding) else None,
        "residual_scale": float(residual_grid[0]),
        "residual_zero": float(residual_grid[1]),
        "y_inverse": 1.0 / y_scale,
        "y_zero": float(y_zero),
    }
    config = config or _select(problem, gpu_of(x.device))
    launch_conv2d((x, w, b, residual, out), geometry, problem, config, workspace, how)
    return out
