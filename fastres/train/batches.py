"""The batches of a run: their order, augmentation and preparation, on this process' device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from .config import Config
from .data import Data, ImageFiles, Split, generator, mixed


@dataclass(frozen=True)
class Batches:
    """The batches of a run on this process.

    Args:
        data: what they are of.
        config: the options.
        device: where they go.
        rank: of this process among ``world``.
        dtype: of the network's weights, which its images get.
    """

    data: Data
    config: Config
    device: torch.device
    rank: int = 0
    world: int = 1
    dtype: torch.dtype = torch.float32

    def share(self, epoch: int) -> Tensor:
        """The indices of this process' images in the epoch's order."""
        n = len(self.data.train)
        order = torch.randperm(n, generator=generator(self.config.seed, epoch))
        return order[: n - n % self.world][self.rank :: self.world]

    def order(self, epoch: int) -> list[Tensor]:
        """The indices of each batch of a training epoch.

        Processes get equally many; a last batch of one image, on which a batch norm can fail, is
        left out.
        """
        batches = list(self.share(epoch).split(self.config.batch_size))
        alone = len(batches[-1]) == 1 < len(batches[0])
        return batches[:-1] if alone else batches

    def train(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented images and labels of an epoch, from its ``start``-th batch on."""
        order = self.order(epoch)[start:]
        images = self._images(self.data.train, order, epoch)
        flips, moves = self._drawn(epoch)
        for number, (batch, x) in enumerate(zip(order, images, strict=True), start):
            y = self.data.train.labels[batch.to(self.device)]
            if flips is not None:
                x = torch.where(flips[batch].to(x.device)[:, None, None, None], x.flip(3), x)
            if moves is not None:
                x = _moved(x, moves[batch].to(x.device), self.config.shift)
            yield self._blended(self._prepared(x), y, epoch, number)

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The validation images of this process, none twice."""
        part = self.data.validation
        assert part is not None
        order = list(torch.arange(self.rank, len(part), self.world).split(self.config.batch_size))
        for batch, x in zip(order, self._images(part, order, 0), strict=True):
            yield self._prepared(x), part.labels[batch.to(self.device)]

    def sample(self) -> Tensor:
        """One training image as the network gets it."""
        first = [torch.zeros(1, dtype=torch.long)]
        return self._prepared(next(iter(self._images(self.data.train, first, 0))))

    def _images(self, part: Split, order: Sequence[Tensor], epoch: int) -> Iterator[Tensor]:
        """The batches' images on the device, as they are stored or decoded."""
        if part.images is not None:
            for batch in order:
                yield part.images[batch.to(part.images.device)].to(self.device)
            return
        assert part.source is not None
        seed = self.config.seed if part is self.data.train else None
        paths, labels = part.source.paths, part.source.labels
        source = ImageFiles(paths, labels, self.config.resize or 224, seed)
        keys = [[(epoch, int(index)) for index in batch] for batch in order]
        state = torch.get_rng_state()  # which a loader draws from
        loader = iter(DataLoader(source, batch_sampler=keys, num_workers=self.config.workers))
        torch.set_rng_state(state)
        for x, _ in loader:
            yield x.to(self.device, non_blocking=True)

    def _drawn(self, epoch: int) -> tuple[Tensor | None, Tensor | None]:
        """Which images in memory an epoch mirrors, and how far it moves each."""
        n, s = len(self.data.train), self.config.shift
        if self.data.train.images is None:
            return None, None
        flips = torch.rand(n, generator=generator(self.config.seed, epoch, 1)) < 0.5
        moves = torch.randint(0, 2 * s + 1, (n, 2), generator=generator(self.config.seed, epoch, 2))
        return flips if self.config.flip else None, moves if s else None

    @cached_property
    def _normalisation(self) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation of each channel, (C, 1, 1)."""
        if self.data.mean is None or self.data.std is None:
            return None
        mean, std = (torch.tensor(v, device=self.device) for v in (self.data.mean, self.data.std))
        return mean[:, None, None], std[:, None, None]

    @cached_property
    def _blends(self) -> list[Any]:
        """torchvision's MixUp and CutMix, as far as they are wanted."""
        config = self.config
        if not (config.mixup_alpha or config.cutmix_alpha):
            return []
        from torchvision.transforms import v2

        kinds = ((v2.MixUp, config.mixup_alpha), (v2.CutMix, config.cutmix_alpha))
        classes = len(self.data.classes)
        return [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]

    def _prepared(self, x: Tensor) -> Tensor:
        """Resized, normalised images in the network's dtype and the run's memory format."""
        wide = x.to(torch.promote_types(self.dtype, torch.float32))
        size = self.config.resize
        if size is not None and wide.shape[2:] != (size, size):
            wide = F.interpolate(wide, (size, size), mode="bilinear", antialias=True)
        if x.dtype is torch.uint8 and self._normalisation is not None:
            mean, std = self._normalisation
            wide = (wide / 255 - mean) / std
        order = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return wide.to(self.dtype).contiguous(memory_format=order)

    def _blended(self, x: Tensor, y: Tensor, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        """Images and labels of a batch mixed in one of the ways that are wanted."""
        if not self._blends:
            return x, y
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(mixed(self.config.seed, epoch, number, self.rank, 3))
            return self._blends[int(torch.randint(len(self._blends), ()))](x, y)


def _moved(x: Tensor, moves: Tensor, most: int) -> Tensor:
    """(N, C, H, W) images moved by ``moves`` - ``most`` pixels up and left, zeros behind."""
    windows = F.pad(x, [most] * 4).unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)
    return windows[torch.arange(len(x), device=x.device), :, moves[:, 0], moves[:, 1]]
