"""Kernels on the CPU that fail or compute wrong answers, and auto that takes kernels there."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from fastres.backends import select, triton
from fastres.kernels import _common


@contextmanager
def auto_with_kernels() -> Iterator[None]:
    """Inside, ``backend="auto"`` takes our kernels on the CPU, and none has failed yet."""
    gpus = mock.patch.object(select, "GPUS", {"cuda", "cpu"})
    with gpus, mock.patch.dict(triton.FAILED, clear=True):
        yield


def around(launch: Callable[..., None]) -> AbstractContextManager[None]:
    """A host that calls ``launch(run, kernel, grid, args, meta)``; ``run()`` is the launch."""
    before = _common.host(torch.device("cpu"))
    assert before is not None

    def run(kernel: Any, grid: int, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        launch(lambda: before.run(kernel, grid, args, meta), kernel, args)

    return _common.hosted(replace(before, run=run))


def failing(error: Exception, at: int = 0) -> AbstractContextManager[None]:
    """A host whose launches raise from the ``at``-th one on."""
    launched = []

    def launch(run: Callable[[], None], kernel: Any, args: tuple[Any, ...]) -> None:
        launched.append(kernel.__name__)
        if len(launched) > at:
            raise error
        run()

    return around(launch)


def spoiling(factor: float, seen: list[str] | None = None) -> AbstractContextManager[None]:
    """A host whose convolutions are ``factor`` times what they should be."""

    def launch(run: Callable[[], None], kernel: Any, args: tuple[Any, ...]) -> None:
        run()
        if seen is not None:
            seen.append(kernel.__name__)
        if kernel.__name__ == "conv2d_kernel":
            args[kernel.arg_names.index("y_ptr")].mul_(factor)

    return around(launch)
