"""Memory kept between calls: page faults fall, other allocators are left alone, states are said."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import fastres
from fastres.perf import host_memory
from fastres.perf.environment import environment

glibc = pytest.mark.skipif(
    not host_memory._is_glibc(host_memory._allocator()), reason="needs glibc's malloc"
)
# 64 maps of 520x520 in float32 are 69 MB, more than the heap of a thread can hold.
FAULTS = """
import itertools, json, resource, statistics, threading, torch, fastres
net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 1), torch.nn.ReLU(), torch.nn.Conv2d(64, 2, 1))
fast, x = fastres.optimize(net.eval(), verify=False), torch.randn(1, 3, 520, 520)
def faults(calls):
    counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
    for _ in range(calls):
        fast(x)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    found.append(statistics.median(b - a for a, b in itertools.pairwise(counts)))
found = []
faults(2)
states = [fastres.keep_memory(), fastres.keep_memory()]
faults(12)
thread = threading.Thread(target=faults, args=(12,))
thread.start()
thread.join()
print(json.dumps([found, states]))
"""


@glibc
def test_large_activations_are_not_faulted_anew_in_any_thread():
    """The median call: the heap may still grow in one or two."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    (before, kept, in_thread), (first, again) = json.loads(done.stdout)
    assert before > 10_000  # 69 MB in pages of 4 KiB
    assert max(kept, in_thread) < before / 100
    assert first == again
    assert first[1:] == [True, "kept between calls (fastres.keep_memory)"]


class Libc:
    """Stands for the C library, so that the tests' own process keeps its settings."""

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def mallopt(self, name, value):
        self.calls.append((name, value))
        return self.answer


@pytest.fixture
def libc(monkeypatch):
    stand_in = Libc(1)
    monkeypatch.setattr(host_memory, "_kept", [])
    monkeypatch.setattr(host_memory, "_allocator", lambda: "libc.so.6")
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: stand_in)
    return stand_in


@pytest.mark.parametrize(
    "allocator",
    ["libjemalloc.so.2", "libtcmalloc.so.4", "libc.musl-x86_64.so.1", "darwin", "win32"],
)
def test_other_allocators_are_left_alone_and_that_is_said(allocator, libc, monkeypatch):
    monkeypatch.setattr(host_memory, "_allocator", lambda: allocator)
    found = fastres.keep_memory()
    assert not libc.calls
    assert found == (allocator, False, f"left to {allocator}: only glibc's malloc can be told")


@glibc
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_a_preloaded_malloc_is_seen(tmp_path):
    """As jemalloc and tcmalloc come: a library that defines malloc before glibc does."""
    source, library = tmp_path / "malloc.c", tmp_path / "libjemalloc.so.2"
    source.write_text(
        "#include <stddef.h>\nvoid *__libc_malloc(size_t);\n"
        "void *malloc(size_t n) { return __libc_malloc(n); }\n"
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    code = f"import runpy; print(*runpy.run_path({host_memory.__file__!r})['keep_memory']())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("libjemalloc.so.2 False left to libjemalloc.so.2"), done.stderr


def test_a_second_call_changes_nothing(libc):
    assert fastres.keep_memory().kept
    once = list(libc.calls)
    assert len(once) == len(host_memory.GLIBC_SETTINGS)
    assert fastres.keep_memory().kept
    assert libc.calls == once


def test_a_refusal_is_said(libc):
    libc.answer = 0
    assert fastres.keep_memory()[1:] == (False, "glibc's mallopt refused to keep it")


def test_the_environment_tells_the_state(libc):
    assert "fastres.keep_memory() keeps them" in environment().flags["host_memory"]
    fastres.keep_memory()
    assert environment().flags["host_memory"] == "kept between calls (fastres.keep_memory)"


@glibc
def test_the_command_keeps_memory():
    done = subprocess.run(
        [sys.executable, "-m", "fastres", "env", "--json"], capture_output=True, text=True
    )
    assert "kept between calls" in json.loads(done.stdout)["flags"]["host_memory"]
