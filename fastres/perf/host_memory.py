"""The CPU's memory between calls: glibc's malloc is told to keep what it would return.

glibc takes blocks over 32 MB from the system by ``mmap`` and returns each as it is freed, so that
every call of a large batch pays a page fault for each 4 KiB of its activations.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

# malloc.h: M_MMAP_MAX, no block by mmap; M_TRIM_THRESHOLD, no memory given back; M_TOP_PAD, growth
# by so much at least; M_ARENA_MAX, one heap, since those of threads hold no block over 64 MB.
GLIBC_SETTINGS = {-4: 0, -1: -1, -2: 2**26, -8: 1}
_kept: list[bool] = []


class HostMemory(NamedTuple):
    """What becomes of the CPU's memory between two calls.

    Attributes:
        allocator: the library whose ``malloc`` is called, as ``"libc.so.6"``, or the system.
        kept: whether :func:`keep_memory` is in force.
        detail: one line for people.
    """

    allocator: str
    kept: bool
    detail: str


def keep_memory() -> HostMemory:
    """Keep this process' freed memory for its next calls, instead of returning it to the system.

    For large batches on a CPU: batch 32 of a ResNet-50 has activations over 32 MB, which glibc
    returns at once, and each call then faults its pages in anew. The setting (``mallopt``) is of
    the whole process, lasts until it ends, and the process stays as large as it ever was; call it
    before threads are started. After some calls nothing is faulted. A second one changes nothing.

    Where ``malloc`` is not glibc's (jemalloc, tcmalloc, musl, macOS, Windows) nothing is done, and
    the result says so. The ``fastres`` command keeps memory by itself.

    Returns:
        What is in force now.
    """
    if _is_glibc(_allocator()) and not _kept:
        libc: Any = ctypes.CDLL(None)
        _kept.append(all(libc.mallopt(*setting) for setting in GLIBC_SETTINGS.items()))
    return host_memory()


def host_memory() -> HostMemory:
    """What is in force, without changing it."""
    if not _is_glibc(allocator := _allocator()):
        return HostMemory(allocator, False, f"left to {allocator}: only glibc's malloc can be told")
    if not _kept:
        lost = "glibc returns blocks over 32 MB at once; fastres.keep_memory() keeps them"
        return HostMemory(allocator, False, lost)
    kept, refused = "kept between calls (fastres.keep_memory)", "glibc's mallopt refused to keep it"
    return HostMemory(allocator, _kept[0], kept if _kept[0] else refused)


def _is_glibc(allocator: str) -> bool:
    return allocator.startswith(("libc.so.6", "libc-2."))


def _allocator() -> str:
    """The file name of the library that ``malloc`` comes from, preloaded ones included."""
    if os.name != "posix" or sys.platform == "darwin":
        return sys.platform
    program: Any = ctypes.CDLL(None)
    found = (ctypes.c_char_p * 4)()  # dlfcn.h: Dl_info, whose first field is the file's name
    known = program.dladdr(ctypes.cast(program.malloc, ctypes.c_void_p), found) and found[0]
    return Path(os.fsdecode(known)).name if known else "an unknown malloc"
