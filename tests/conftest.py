"""Test-wide setup: Triton's interpreter where there is no GPU, fixed seeds, guarded outputs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from tolerance import allowed_error

COMPILED_FOR = os.environ.get("FASTRES_PTX")  # kernels are compiled for it, and run by tests/ptx
if not torch.cuda.is_available() and COMPILED_FOR is None:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
os.environ.setdefault("FASTRES_TUNE", "0")  # what is chosen is no matter of this machine's speed

try:
    from hypothesis import HealthCheck, Phase, settings

    settings.register_profile(  # nothing rests on the time that a busy machine takes
        "fastres",
        derandomize=True,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.register_profile(  # for mutants.py, which asks only whether a test fails
        "unshrunk", settings.get_profile("fastres"), phases=[Phase.explicit, Phase.generate]
    )
    settings.load_profile("fastres")
except ImportError:  # the property tests skip themselves
    pass

with contextlib.suppress(FileExistsError):  # an unpacked source distribution has no links
    Path(__file__).parents[1].joinpath("fastres", "kernels").symlink_to("../kernels")

torch.set_num_threads(1)
torch.backends.cuda.matmul.allow_tf32 = False  # references are full float32
torch.backends.cudnn.allow_tf32 = False

SECONDS = 10.0  # of CPU time that a test without one of these marks may take
LONG = ("slow", "sweep", "gpu")  # those on a GPU compile their kernels
GIGABYTES = 2.0  # that a test process may take; make test starts no more than memory holds
GUARD = 64  # elements on each side of a guarded tensor


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault", type=int, help="only tests of this row of docs/fault-matrix.md")
    parser.addoption("--sweep", action="store_true", help="tests with the mark sweep too")
    parser.addoption("--used", type=int, default=0, help="list so many of the heaviest tests")


@pytest.hookimpl(tryfirst=True)  # before -m, which may ask for the marks given here
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_sweeps(items)
    row, sweeps = config.getoption("--fault"), config.getoption("--sweep")

    def wanted(item: pytest.Item) -> bool:
        fault = item.get_closest_marker("fault")
        serves = not row or (fault is not None and row in fault.args)
        return serves and (sweeps or not item.get_closest_marker("sweep"))

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Half of the interpreter's time goes into overflows of whole numbers, of which kernels on
    small tensors have none: only the sweep and the mutants are looked at so. A quarter of the rest
    goes into the functions of triton.language, which each call of each function replaces anew."""
    gc.collect()
    gc.freeze()  # the 400,000 objects of the imports: a collection takes 0.4 s with them
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or session.config.getoption("--sweep"):
        return
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function: Callable) -> object:
        """For good: no process of these tests also compiles kernels."""
        if function.__module__ not in patched:
            patched.add(function.__module__)
            patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once


def mark_sweeps(items: list[pytest.Item]) -> None:
    """``@pytest.mark.sample(5)``: of a test's cases all but each fifth are of the sweep."""
    seen: Counter[str] = Counter()
    for item in items:
        if mark := item.get_closest_marker("sample"):
            test = item.nodeid.partition("[")[0]
            if seen[test] % mark.args[0]:
                item.add_marker("sweep")
            seen[test] += 1


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The interpreter is off where there is a GPU, so kernels take no CPU tensors there."""
    on_cpu = "device" not in getattr(item, "fixturenames", ())
    if torch.cuda.is_available() and on_cpu and item.get_closest_marker("interpreter"):
        pytest.skip("runs kernels on CPU tensors, which takes a machine without a GPU")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For ``-n auto``: a process per core, as many as the free memory holds, eight at most."""
    return max(1, min(core_count(), int(free_gigabytes() // GIGABYTES), 8))


def free_gigabytes() -> float:
    """Memory that new processes may take; no limit where the system does not tell."""
    free = float("inf")
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) / 2**20
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        return min(free, (int(limit) - int(used)) / 2**30)
    except (OSError, KeyError, ValueError):  # not Linux, no limit ("max"), or no such controller
        return free


def cpu_seconds() -> float:
    """CPU time of this process and of the children that it has waited for."""
    who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, who))


def peak_gigabytes() -> float:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def slowness() -> float:
    """How much slower this machine is now than an idle one of 2020; never below 1.

    Processes that share a core, its caches and its memory lose more than a short loop shows: up to
    half as much again on an AMD EPYC whose cache other machines share.
    """
    started = time.process_time()
    for _ in range(10_000_000):
        pass
    loop = (time.process_time() - started) / 0.25
    return max(1.0, 1.5 * loop, os.getloadavg()[0] / core_count())


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """A test that is not marked as long fails where it takes too much CPU time, on any machine."""
    global _phase
    report: pytest.TestReport = yield
    (seconds, peak), _phase = _phase, (cpu_seconds(), peak_gigabytes())
    report.user_properties.append(("used", (_phase[0] - seconds, _phase[1] - peak)))
    if call.when == "setup":
        item.stash[STARTED] = cpu_seconds()
    elif call.when == "call" and report.passed and not any(map(item.get_closest_marker, LONG)):
        taken = cpu_seconds() - item.stash[STARTED]
        if taken > SECONDS and taken > SECONDS * (slower := slowness()):
            report.outcome = "failed"
            report.longrepr = (
                f"{item.nodeid} took {taken:.1f} s of CPU time, {SECONDS * slower:.0f} s are "
                "allowed here: make it lighter, or mark it slow"
            )
    return report


STARTED = pytest.StashKey[float]()
_phase = cpu_seconds(), peak_gigabytes()  # at the end of the phase before, first of collection


@pytest.fixture(autouse=True)
def _frees_memory() -> Iterator[None]:
    """What a test leaves goes at once where it is much: torch.fx's graphs refer to themselves."""
    yield
    global _kept
    held = held_gigabytes()
    if held > _kept + 0.2:
        gc.collect()
        if hasattr(ctypes.CDLL(None), "malloc_trim"):  # glibc
            ctypes.CDLL(None).malloc_trim(0)
        _kept = held_gigabytes()


def held_gigabytes() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux
        return peak_gigabytes()
    return pages * resource.getpagesize() / 2**30


_kept = held_gigabytes()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if output := getattr(session.config, "workeroutput", None):
        output["used"] = peak_gigabytes(), cpu_seconds()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    USED[node.gateway.id] = getattr(node, "workeroutput", {}).get("used", (0.0, 0.0))


USED: dict[str, tuple[float, float]] = {}


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    used = USED or {"tests": (peak_gigabytes(), cpu_seconds())}
    each = ", ".join(
        f"{name} {peak:.1f} GB {seconds:.0f} s" for name, (peak, seconds) in used.items()
    )
    terminalreporter.write_line(f"peak memory and CPU time: {each}")
    for line in heaviest(terminalreporter.stats, config.getoption("--used")):
        terminalreporter.write_line(line)


def heaviest(reports: dict[str, list[pytest.TestReport]], count: int) -> list[str]:
    """The ``count`` tests that took the most CPU time, and those that raised the peak the most."""
    tests: dict[str, tuple[float, float]] = {}
    for report in chain.from_iterable(reports.values()):
        for _, (seconds, peak) in getattr(report, "user_properties", ()):
            before = tests.get(report.nodeid, (0.0, 0.0))
            tests[report.nodeid] = before[0] + seconds, before[1] + peak
    chosen = dict.fromkeys(
        test for by in (0, 1) for test in sorted(tests, key=lambda t: -tests[t][by])[:count]
    )
    return [f"{tests[test][0]:6.1f} s {tests[test][1]:+.2f} GB {test}" for test in chosen]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU in the interpreter, or in tests/ptx."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _compiled() -> Iterator[None]:
    if COMPILED_FOR is None:
        yield
        return
    from ptx.driver import running

    with running(COMPILED_FOR):
        yield


@pytest.fixture
def hopper(device: torch.device) -> None:
    """Skips where no kernel in Gluon runs, which Triton's interpreter does not know."""
    module = pytest.importorskip("fastres.kernels.experimental.conv3x3_hwnc")
    if not module.runs_on(device):
        pytest.skip("Gluon takes a GPU of sm_90, or FASTRES_PTX=sm_90: tests/ptx/test_gluon.py")


@pytest.fixture(scope="session")
def integers(device: torch.device) -> Callable[..., torch.Tensor]:
    """``integers(*shape, dtype=...)``: whole numbers from -3 to 3, channels_last if 4-D.

    Their products and sums are exact in float32 in any order, so results compare with
    ``torch.equal`` against a float64 reference rounded once.
    """

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        t = torch.randint(-3, 4, shape).to(device, dtype)
        return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t

    return make


@pytest.fixture(scope="session")
def numbers(device: torch.device, integers: Callable[..., torch.Tensor]) -> Callable:
    """``numbers(*shape)``: float32 as ``integers`` lays it out, with fractions only on a GPU.

    The interpreter leaves a tile's product to numpy, whose BLAS may round a row by its place in
    the tile: there only whole numbers give the same bits in every place.
    """
    if device.type == "cpu":
        return integers
    return lambda *shape: integers(*shape).normal_()


@dataclass(frozen=True)
class Guarded:
    """A tensor full of NaN inside a larger buffer full of a known pattern."""

    out: torch.Tensor
    _buffer: torch.Tensor

    def check(self) -> None:
        """Every element was written and nothing around them."""
        size = self.out.numel()
        guards = torch.cat([self._buffer[:GUARD], self._buffer[GUARD + size :]])
        assert torch.equal(guards, torch.full_like(guards, 77.0)), "wrote outside its output"
        poison = self._buffer[GUARD : GUARD + size].view(_BITS[self.out.dtype])
        unwritten = int((poison == _POISON[self.out.dtype]).sum())
        assert not unwritten, f"left {unwritten} of {size} elements unwritten"


_BITS = {
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
_POISON = {  # NaNs with a payload that no arithmetic makes
    torch.float32: 0x7FEDCBA9,
    torch.float16: 0x7EDC,
    torch.bfloat16: 0x7FED,
}


@pytest.fixture
def poisoned(device: torch.device) -> Callable[..., Guarded]:
    """``poisoned(shape, dtype, fill=None)``: an output to be written, channels_last if 4-D.

    ``fill`` starts it from that tensor's values instead of poison, for in-place operations.
    """

    def make(shape, dtype, fill: torch.Tensor | None = None) -> Guarded:
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * GUARD,), 77.0, dtype=dtype, device=device)
        flat = buffer[GUARD : GUARD + size]
        flat.view(_BITS[dtype]).fill_(_POISON[dtype])
        if len(shape) == 4:
            n, c, h, w = shape
            out = flat.view(n, h, w, c).permute(0, 3, 1, 2)
        else:
            out = flat.view(shape)
        if fill is not None:
            out.copy_(fill)
        return Guarded(out, buffer)

    return make


@pytest.fixture(scope="session")
def rule_of_two() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """``rule_of_two(out, pt, ref)``: no more than twice the error of same-precision PyTorch.

    ``ref`` is float64; errors are the largest of any output, on a GPU root mean squares: cuDNN may
    split a sum, which makes its largest error smaller than that of a sum in order.
    """

    def size(t: torch.Tensor) -> float:
        return float(t.square().mean().sqrt() if t.is_cuda else t.abs().max())

    def check(out: torch.Tensor, pt: torch.Tensor, ref: torch.Tensor) -> None:
        assert out.shape == ref.shape
        assert out.dtype == pt.dtype
        error, own = size(out.double() - ref), size(pt.double() - ref)
        allowed = allowed_error(own, size(ref), out.dtype)
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"

    return check
