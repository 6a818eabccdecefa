"""The first answer of our kernels on a device, judged against PyTorch's on a few of its images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import VerificationError
from .executor import Executor
from .verify import Recast, compare, copied, undisturbed


def can_show_errors(arguments: Sequence[Any]) -> bool:
    """Whether there is something to compare: all tensors hold elements, and finite ones only."""
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    return all(t.numel() > 0 and bool(torch.isfinite(t).all()) for t in tensors)


class FirstCall:
    """A call of an executor, about to be made, whose answer is to be that of its module.

    Four images of the batch are compared by the rule of two, with a copy of the module, so that
    nothing of it changes. Not judged are modules that cannot be copied, those that answer
    differently each time or not image by image, and all where the memory does not suffice.

    Args:
        executor: of a module with ``_forward_impl``.
        x: the batch, not empty and finite, in the executor's dtype.
    """

    def __init__(self, executor: Executor, x: Tensor) -> None:
        self.executor, self.x, n = executor, x, len(x)
        self.places = sorted({0, n // 3, 2 * n // 3, n - 1})
        self.images = x[self.places]  # a model may write into its input
        self.reference: nn.Module | None = None
        with suppress(VerificationError, torch.OutOfMemoryError):
            self.reference = _Plain(copied(executor.module).to(executor.dtype))

    @undisturbed()
    def wrong(self, output: Any) -> str | None:
        """Why ``output`` is not the module's answer to the batch; None where it is."""
        few = self._few(output)
        if self.reference is None or few is None:
            return None
        answers = [few]

        def answer(images: Tensor) -> Any:
            if answers:
                return answers.pop()
            batch = self.x.clone()  # varied inputs, where outputs are too few to judge by
            batch[self.places] = images
            return self._few(self.executor.run([batch]))

        try:
            exact = Recast(self.reference, torch.float64)
            found = compare(self.reference, answer, exact, (self.images,))
        except (VerificationError, torch.OutOfMemoryError):
            return None
        return None if found.ok else f"up to {found.max_abs:.3g} off PyTorch's, {found.reason}"

    def _few(self, output: Any) -> Any:
        """What belongs to the images; None where it cannot be told."""
        n = len(self.x)
        tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        if not all(t.dim() > 0 and len(t) == n for t in tensors):
            return None
        return tree_map(lambda t: t[self.places] if isinstance(t, Tensor) else t, output)


class _Plain(nn.Module):
    """A live module without what its own call adds."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module._forward_impl(x)  # type: ignore[operator]
