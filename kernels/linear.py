"""Linear layer with bias and ReLU: the 1x1 convolution of 1x1 images.

    y[n, k] = relu(sum_c x[n, c] * w[k, c] + b[k])

x (N, C), w (K, C) and y (N, K) are dense and row-major, float32 (``ieee`` or ``tf32`` products),
float16 or bfloat16; b may be float32. Sums are float32, rounded once. Rejected: other ranks,
layouts and dtypes, an ``out`` that overlaps an input. Method and tiles: conv.py, whose kernel
runs here on M = N, since a row-major matrix is an NHWC image of one pixel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import (
    Operator,
    check_contiguous,
    check_like,
    check_shape,
    check_tensor,
    check_vector,
    register,
)
from ._config import TileConfig
from .conv import CONFIGS as CONFIGS
from .conv import conv2d


def linear_ref(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, relu: bool = False, upcast: bool = False
) -> Tensor:
    """The same in plain PyTorch, rounded after each step; in float64 throughout with ``upcast``."""
    dtype = torch.float64 if upcast else x.dtype
    y = F.linear(x.to(dtype), w.to(dtype), None if b is None else b.to(dtype))
    return y.relu() if relu else y


def _check(x: Tensor, w: Tensor, b: Tensor | None) -> None:
    """Refuse what the kernel does not take."""
    check_tensor("x", x, 2)
    check_tensor("w", w, 2)
    check_like("w", w, x)
    if x.shape[1] != w.shape[1] or not x.shape[1]:
        raise ValueError(
            f"x of shape {tuple(x.shape)} and w of shape {tuple(w.shape)} must agree in their "
            "second dimension, and it must be at least 1"
        )
    check_contiguous("x", x)
    check_contiguous("w", w)
    if b is not None:
        check_vector("b", b, w.shape[0], x)


def _pixels(t: Tensor) -> Tensor:
    """A matrix as images of one pixel."""
    return t.view(*t.shape, 1, 1)


def linear(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    relu: bool = False,
    precision: str = "ieee",
    out: Tensor | None = None,
    config: TileConfig | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """``relu(x @ w.T + b)`` in one kernel.

    Args:
        x: (N, C), contiguous, float32, float16 or bfloat16.
        w: (K, C), contiguous, of x's dtype.
        b: (K,), float32 or x's dtype.
        precision: products of float32: ``"ieee"`` in full, ``"tf32"`` on tensor cores.
        out: where to write; must not overlap an input.
        config: the tile to use instead of the selected one.
        workspace: as for :func:`conv2d`.

    Returns:
        (N, K) of x's dtype. A batch of 0 launches nothing.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not what is wanted (named in the text).
    """
    _check(x, w, b)
    if out is not None:
        check_tensor("out", out, 2)
        check_like("out", out, x)
        check_shape("out", out, (x.shape[0], w.shape[0]))
        check_contiguous("out", out)
    y = conv2d(
        _pixels(x),
        _pixels(w),
        b,
        relu=relu,
        precision=precision,
        out=None if out is None else _pixels(out),
        config=config,
        workspace=workspace,
    )
    return y.view(y.shape[:2]) if out is None else out


def _linear_ours(x: Tensor, w: Tensor, b: Tensor | None, relu: bool, precision: str) -> Tensor:
    """:func:`linear` as a functional operator."""
    return linear(x, w, b, relu=relu, precision=precision)


def _linear_fake(x, w, b, relu, precision):
    _check(x, w, b)
    return x.new_empty(x.shape[0], w.shape[0])


def _linear_plain(x, w, b, relu, precision):
    _check(x, w, b)
    return linear_ref(x, w, b, relu=relu)


linear_op = register("linear", Operator(_linear_ours, _linear_plain, _linear_fake))
