"""Compiling the kernels of a run ahead of it, several at a time.

The run itself happens once without launching: the launchers choose tiles and arguments as always,
and each kernel that is not compiled yet goes to a thread. Method: ``triton.AsyncCompileMode``. The
compiler's passes and the assembler run side by side; Python's part of it takes turns.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from contextvars import copy_context
from typing import Any

import triton

from ._common import COMPILING

MOST_THREADS = 16


def compile_ahead(run: Callable[[], Any], tell: Callable[[int, int], Any] | None = None) -> None:
    """Compile the kernels that ``run`` launches; it is called once, and launches none of them.

    What it makes of kernels' outputs is worth nothing, so it must not look at them. Nothing is
    raised but what interrupts: a kernel that cannot be compiled, and an error of ``run``, is left
    for the real run to meet. Inside another pass nothing happens, as Triton refuses a second one.

    Args:
        tell: called here with (kernels compiled, kernels to compile).
    """
    # In a context of its own, for Triton's mode would stay on after Ctrl-C.
    copy_context().run(_compile, run, tell)


def _compile(run: Callable[[], Any], tell: Callable[[int, int], Any] | None) -> None:
    COMPILING.set(True)
    pool = _Compilers(_threads())
    try:
        with suppress(Exception), triton.AsyncCompileMode(pool, ignore_errors=True):
            run()
            for done, _ in enumerate(as_completed(pool.jobs), 1):
                if tell is not None:
                    tell(done, len(pool.jobs))
    finally:
        pool.shutdown(cancel_futures=True)


class _Compilers(ThreadPoolExecutor):
    """Threads that compile kernels, and the C code that launches each."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads, "fastres-compile")
        self.jobs: list[Future[Any]] = []

    def submit(self, compile_kernel: Callable[[], Any]) -> Future[Any]:  # type: ignore[override]
        job = super().submit(_with_launcher, compile_kernel)
        self.jobs.append(job)
        return job


def _with_launcher(compile_kernel: Callable[[], Any]) -> Any:
    kernel = compile_kernel()
    with suppress(Exception):  # the launch comes to it again
        triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)
    return kernel


def _threads() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(cores, MOST_THREADS)
