"""Memory orders of images (N, C, H, W): the one module that knows them.

Between kernels activations lie in NHWC, which PyTorch calls ``channels_last``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHANNELS_LAST = torch.channels_last


def is_channels_last(value: Any) -> bool:
    """A 4-D tensor in NHWC memory that is not NCHW contiguous as well."""
    return (
        isinstance(value, Tensor)
        and value.dim() == 4
        and not value.is_contiguous()
        and value.is_contiguous(memory_format=CHANNELS_LAST)
    )


def to_contiguous(value: Any) -> Any:
    """NCHW memory for NHWC images; anything else as it is."""
    return value.contiguous() if is_channels_last(value) else value


def images_to_channels_last(value: Any) -> Any:
    """NHWC memory for 4-D tensors of any dtype; anything else as it is."""
    is_image = isinstance(value, Tensor) and value.dim() == 4
    return value.contiguous(memory_format=CHANNELS_LAST) if is_image else value


def to_channels_last(value: Any) -> Any:
    """NHWC memory for 4-D floating-point tensors; anything else as it is."""
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return images_to_channels_last(value) if floating else value


def unchanged(value: Any) -> Any:
    """Any value as it is."""
    return value


@dataclass(frozen=True)
class Layout:
    """A memory order of images in which the channels of a pixel lie side by side.

    Attributes:
        pixels_first: the dimensions of (N, C, H, W) in memory order.
        images_first: the inverse permutation.
    """

    pixels_first: tuple[int, int, int, int]
    images_first: tuple[int, int, int, int]

    def pixels(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) as a contiguous tensor in this order; a view if they lie so."""
        return x.permute(self.pixels_first).contiguous()

    def images(self, y: Tensor) -> Tensor:
        """A view of what :meth:`pixels` gives as (N, C, H, W) again."""
        return y.permute(self.images_first)

    def rows(self, x: Tensor) -> Tensor:
        """The pixels of images (N, C, H, W) in this order as a matrix (pixels, C)."""
        return self.pixels(x).view(-1, x.shape[1])

    def from_rows(self, y: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`rows`, for as many pixels as the images ``like`` have."""
        sizes = [like.shape[i] for i in self.pixels_first[:3]]
        return self.images(y.view(*sizes, y.shape[1]))

    def grid(self, x: Tensor) -> tuple[int, int, int, int]:
        """(outer, H, W, inner): how the rows of the images ``x`` follow each other."""
        n, _, h, w = x.shape
        return (n, h, w, 1) if self.pixels_first[0] == 0 else (1, h, w, n)


NHWC = Layout((0, 2, 3, 1), (0, 3, 1, 2))
