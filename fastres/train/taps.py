"""Convolutions without the taps that only ever meet padding.

A 3x3 convolution of one pixel multiplies its middle tap alone; the libraries of a CPU compute the
other eight as well, and their gradients. A ResNet has such layers at 28x28 or 32x32 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class ReachedTaps(TorchFunctionMode):
    """In here the convolutions of ``nn.Conv2d`` leave out the taps that no pixel reaches.

    Attributes:
        found: whether there was such a convolution.
    """

    found = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        pairs = args[3:6]  # stride, padding, dilation
        written = len(args) == 7 and all(isinstance(pair, tuple) for pair in pairs)
        if func is torch.conv2d and written and args[0].dim() == 4:
            x, weight, bias, stride, _, dilation, groups = args
            sides = [
                _reached(x.shape[2 + i], weight.shape[2 + i], *(pair[i] for pair in pairs))
                for i in (0, 1)
            ]
            if any(sides):
                self.found = True
                whole = [(0, weight.shape[2 + i], pairs[1][i]) for i in (0, 1)]
                (top, bottom, rows), (left, right, columns) = (
                    side or all_of for side, all_of in zip(sides, whole, strict=True)
                )
                part = weight[:, :, top:bottom, left:right]
                return func(x, part, bias, stride, (rows, columns), dilation, groups)
        return func(*args, **(kwargs or {}))


def _reached(
    size: int, taps: int, stride: int, padding: int, dilation: int
) -> tuple[int, int, int] | None:
    """The first tap that meets a pixel, the last plus 1, their padding; None for all of them."""
    outputs = (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
    starts = range(-padding, outputs * stride - padding, stride)
    met = [k for k in range(taps) if any(0 <= start + k * dilation < size for start in starts)]
    if not met or len(met) == taps:
        return None
    first, last = met[0], met[-1] + 1
    inner = padding - first * dilation
    same = (size + 2 * inner - dilation * (last - first - 1) - 1) // stride + 1 == outputs
    return (first, last, inner) if inner >= 0 and same else None
