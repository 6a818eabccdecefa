"""Kernels compile ahead of a run, several at a time; what fails is left for the run to meet."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.runtime._async_compile import active_mode

from fastres.kernels import LAUNCHES, KernelError, _ahead, _common, compile_ahead

GPU = torch.device("cuda", 0)


class Kernel:
    """As much of a compiled function as a launch takes, whose compiler is ``make``."""

    arg_names = ()

    def __init__(self, name, make=lambda: None):
        self.__name__, self.make, self.kernel = name, make, None

    def warmup(self, *args, grid, **meta):
        def keep(kernel):
            self.kernel = kernel

        active_mode.get().submit(self.__name__, self.make, keep)

    def __getitem__(self, grid):
        return lambda *args, **meta: self.make()


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_ahead, "_threads", lambda: 2)


def launches(*kernels):
    def run():
        for kernel in kernels:
            _common.launch(kernel, 1, GPU)

    return run


def test_kernels_compile_side_by_side_and_none_is_launched():
    meeting = threading.Barrier(2, timeout=10)

    def compiled():
        meeting.wait()  # each waits for the other
        return SimpleNamespace(src=None, metadata=None)

    pair, told = [Kernel("a", compiled), Kernel("b", compiled)], []
    before = LAUNCHES.total()
    compile_ahead(launches(*pair), lambda *state: told.append(state))
    assert all(kernel.kernel for kernel in pair)
    assert told == [(1, 2), (2, 2)]
    assert LAUNCHES.total() == before
    assert not _common.COMPILING.get()


@pytest.mark.fault(88)
def test_one_that_fails_stops_no_other_and_fails_at_its_launch():
    def fails():
        raise RuntimeError("PassManager::run failed")

    good = [Kernel(f"good {i}", lambda: SimpleNamespace(src=0, metadata=0)) for i in range(20)]
    bad = Kernel("bad", fails)
    compile_ahead(launches(bad, *good))
    assert all(kernel.kernel for kernel in good)
    assert active_mode.get() is None
    with pytest.raises(KernelError, match="bad cannot run: RuntimeError: PassManager"):
        _common.launch(bad, 1, GPU)


@pytest.mark.fault(88)
@pytest.mark.parametrize("error", [ValueError("sizes"), torch.OutOfMemoryError("full")])
def test_an_error_of_the_run_is_left_to_the_run(error):
    kernel = Kernel("a", lambda: SimpleNamespace(src=0, metadata=0))

    def run():
        launches(kernel)()
        raise error

    compile_ahead(run)
    assert kernel.kernel, "what was met before is compiled"
    assert active_mode.get() is None


def test_an_interrupted_pass_leaves_triton_as_it_was():
    """Else every later launch would go to threads that are gone."""

    def interrupted(done, wanted):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_ahead(launches(Kernel("a"), Kernel("b", lambda: time.sleep(0.1))), interrupted)
    assert active_mode.get() is None
    assert not _common.COMPILING.get()
    left = [t.name for t in threading.enumerate() if t.name.startswith("fastres-compile")]
    assert not left


def test_inside_another_pass_nothing_is_run_twice():
    ran = []

    def outer():
        ran.append("outer")
        compile_ahead(lambda: ran.append("inner"))

    compile_ahead(outer)
    assert ran == ["outer"]


def test_each_launchers_c_code_is_compiled_along(monkeypatch):
    made = []

    class Driver:
        @staticmethod
        def launcher_cls(src, metadata):
            made.append((src, metadata))
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver)
    kernel = Kernel("a", lambda: SimpleNamespace(src="source", metadata="options"))
    compile_ahead(launches(kernel))
    assert made == [("source", "options")]
    assert kernel.kernel, "whose failure is the launch's to tell"


def test_triton_itself_compiles_in_threads_for_a_named_gpu():
    code = f"""
import sys, threading, torch, triton
sys.path.insert(0, {str(Path(__file__).parents[1] / "support")!r})
from named_gpu import TARGETS, compiling_for
from triton import knobs
from fastres.kernels import _common, compile_ahead, elementwise
torch.cuda.current_device = lambda: 0
met = []
knobs.compilation.listener = lambda **_: met.append(threading.current_thread().name)
kernel = elementwise.elementwise_kernel

half = torch.float16

def run():
    for block in (256, 512):
        _common.launch(
            kernel, 1, torch.device("cuda", 0), half, None, half, 1024,
            RELU=True, INT64=False, BLOCK=block, num_warps=4,
        )

with compiling_for(TARGETS["sm_90"]):
    compile_ahead(run)
    print(len(met), all(name.startswith("fastres-compile") for name in met))
    compile_ahead(run)
    print(len(met), len(kernel.device_caches[90][0]))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_ALWAYS_COMPILE"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split()[-4:] == ["2", "True", "2", "2"], done.stdout + done.stderr
