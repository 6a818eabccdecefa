"""From 8-bit images to logits: the usual normalisation as a module that fusion takes in.

    y = conv((u / 255 - mean) / std, w) + b
      = conv(u - c, w / (255 std)) + b - sum(w r / (255 std))
        with  c = round(255 mean)  and  r = 255 mean - c

The whole numbers u - c are exact in every floating-point dtype. Zero padding comes after the
normalisation, so the borders of u - c are filled with r, which is what a normalised 0 stands for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, InputTypeError

LAYOUTS = ("NCHW", "NHWC")


class Normalize(nn.Module):
    """8-bit images to normalised ones: (u / 255 - mean) / std, channel by channel.

    uint8 (N, C, H, W), or (N, H, W, C) with ``layout="NHWC"`` -> (N, C, H, W) in the module's
    dtype; in float32 bit for bit what torchvision's convert_image_dtype and normalize give, as the
    presets of its weights use them. :func:`fastres.optimize` folds it into the first convolution of
    ``nn.Sequential(Normalize(mean, std), network)``.

    Args:
        mean: mean of each channel, for images in [0, 1].
        std: standard deviation of each channel, for images in [0, 1].
        layout: memory order of the images, ``"NCHW"`` or ``"NHWC"``.

    Raises:
        TypeError: mean or std is no sequence of numbers.
        ValueError: mean and std have different lengths or none, the layout is unknown, a number is
            not finite, or a std is not positive.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], *, layout: str = "NCHW"
    ) -> None:
        super().__init__()
        mean, std = _numbers("mean", mean), _numbers("std", std)
        if len(mean) != len(std):
            raise ValueError(
                f"mean and std must be as long; got {len(mean)} and {len(std)} channels"
            )
        if min(std) <= 0:
            raise ValueError(f"std must be positive; got {std}")
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
        self.layout = layout
        self.dtype = torch.get_default_dtype()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float64), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float64), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.centered = Centered(mean, layout)

    @classmethod
    def like(cls, transforms: Any, *, layout: str = "NCHW") -> Normalize:
        """The module with the mean and std of somebody else's preprocessing.

        Args:
            transforms: torchvision's ``weights.transforms()``, timm's data configuration, or a
                processor of Hugging Face.
            layout: memory order of the images, ``"NCHW"`` or ``"NHWC"``.

        Raises:
            TypeError: there is no mean and std in it.
        """
        for names in (("mean", "std"), ("image_mean", "image_std")):
            if isinstance(transforms, Mapping):
                found = [transforms.get(name) for name in names]
            else:
                found = [getattr(transforms, name, None) for name in names]
            if found[0] is not None and found[1] is not None:
                return cls(found[0], found[1], layout=layout)
        raise TypeError(f"transforms has no mean and std; got {type(transforms).__name__}")

    def forward(self, images: Tensor) -> Tensor:
        images = as_nchw(images, self.layout, self.mean.shape[0])
        dtype = torch.promote_types(self.dtype, torch.float32)
        shape = (-1, 1, 1)
        mean, std = self.mean.to(dtype).view(shape), self.std.to(dtype).view(shape)
        return images.to(dtype).div(255).sub_(mean).div_(std).to(self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Normalize:
        """Casts change the dtype of the result, never the numbers: 0.485 is not a bfloat16."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name, buffer in self._buffers.items():
            assert buffer is not None
            self._buffers[name] = buffer.to(fn(buffer).device)
        self.centered._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        mean, std = self.mean.tolist(), self.std.tolist()
        return f"mean={mean}, std={std}, layout={self.layout!r}"


def _numbers(name: str, values: Sequence[float]) -> tuple[float, ...]:
    """Those of a list, an array or a tensor, one per channel."""
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must have a number for each channel; got {values!r}") from error
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} must have a finite number for each channel; got {values!r}")
    return numbers


class Centered(nn.Module):
    """8-bit images minus the whole part of their mean, padded with its rest (see above).

    With ``as_bytes`` the images stay as they are, and are padded with the whole part.
    """

    def __init__(self, mean: Sequence[float], layout: str, as_bytes: bool = False) -> None:
        super().__init__()
        self.numbers = tuple(mean)
        self.layout = layout
        self.as_bytes = as_bytes
        exact = 255 * torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1)
        self.register_buffer("whole", exact.round(), persistent=False)
        self.register_buffer("rest", exact - exact.round(), persistent=False)
        self.whole: Tensor
        self.rest: Tensor

    def forward(self, images: Tensor, padding: tuple[int, int]) -> Tensor:
        """(N, C, H + 2 * padding[0], W + 2 * padding[1]), channels_last."""
        images = as_nchw(images, self.layout, self.whole.shape[0])
        n, c, height, width = images.shape
        down, right = padding
        size = (n, height + 2 * down, width + 2 * right, c)
        like, edge = (images, self.whole) if self.as_bytes else (self.whole, self.rest)
        out = like.new_empty(size).permute(0, 3, 1, 2)
        inside = out[:, :, down : down + height, right : right + width]
        inside.copy_(images)
        if not self.as_bytes:
            inside.sub_(self.whole)
        for border in (
            out[:, :, :down],
            out[:, :, down + height :],
            out[:, :, :, :right],
            out[:, :, :, right + width :],
        ):
            if border.numel():
                border.copy_(edge.expand_as(border))
        return out


def as_nchw(images: Tensor, layout: str, channels: int) -> Tensor:
    """A view of 8-bit images as (N, C, H, W).

    Raises:
        InputTypeError: they are no uint8 tensor.
        InputError: another rank or number of channels.
    """
    if not isinstance(images, Tensor) or images.dtype is not torch.uint8:
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise InputTypeError(f"images must be a torch.uint8 tensor; got {got}")
    axis = layout.index("C")
    if images.dim() != 4 or images.shape[axis] != channels:
        wanted = ", ".join(str(channels) if a == "C" else a for a in layout)
        raise InputError(f"images must be ({wanted}); got shape {tuple(images.shape)}")
    return images if layout == "NCHW" else images.permute(0, 3, 1, 2)
