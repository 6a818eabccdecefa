"""The choice of a kernel for a workload: as forced, else as measured, else by the table.

Measurements live in one JSON file for all machines and versions. Writers merge under a lock and
replace the file whole, so that two at once lose nothing and a reader never sees half of it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ..files import atomic_write, check_target, read_text
from ..graph.patterns import Workload
from .aten import conv_precision
from .fused import EXPERIMENTAL, KERNELS
from .kernel_table import shipped

FORMAT = 1
DEFAULT = "conv2d"
"""What serves a convolution where nothing else was chosen."""
UNFUSED = "unfused"
FORMER = {"rot2": "b2b_gemm", "gemm_pair": "dual_gemm", "apart": UNFUSED}
"""Names that FASTRES_KERNELS and measured files may still hold."""
PATH_VARIABLE = "FASTRES_TUNED"
FORCE_VARIABLE = "FASTRES_KERNELS"
TUNE_VARIABLE = "FASTRES_TUNE"
TUNE_SECONDS = 2.0
LOCK_SECONDS = 5.0  # that a network waits for others to write measurements
NEAREST = 2.0
LARGEST = 2**24  # bytes of a file of measurements; a GPU has some thousands


@dataclass(frozen=True)
class Measurement:
    """What was found for one workload at one batch size.

    Attributes:
        seconds: of one call, by kernel; ``"unfused"`` stands for the best way without the kernel.
        excluded: kernels that are out, each with the reason: a wrong answer, an error.
        chosen: the kernel that serves the workload, if that is not the one of least time.
    """

    seconds: dict[str, float]
    excluded: dict[str, str] = field(default_factory=dict)
    chosen: str = ""

    def choice(self, unavailable: Iterable[str] = ()) -> str:
        """The kernel that serves the workload, but for those ``unavailable``."""
        usable = self.seconds.keys() - set(unavailable)
        return self.chosen if self.chosen in usable else self.fastest(unavailable)

    def fastest(self, unavailable: Iterable[str] = ()) -> str:
        """The kernel of least time but for those ``unavailable``; ``""`` if none is left."""
        usable = {name: s for name, s in self.seconds.items() if name not in unavailable}
        return min(usable, key=usable.__getitem__, default="")

    def sentence(self, kernel: str) -> str:
        """How ``kernel`` did against the best of the others, in words."""
        if kernel not in self.seconds:
            return f"measured here: {self.excluded.get(kernel, 'not timed')}"
        took = f"measured here: {self.seconds[kernel] * 1e6:.1f} us"
        rival = self.fastest(unavailable=(kernel,))
        ratio = f", {self.seconds[rival] / self.seconds[kernel]:.2f}x {rival}" if rival else ""
        return took + ratio


Measured: TypeAlias = Mapping[str, Mapping[int, Measurement]]


@dataclass(frozen=True)
class Decision:
    """Whether a kernel serves a workload, and why."""

    chosen: bool
    why: str


@dataclass(frozen=True)
class KernelSelector:
    """What decides between kernels on one machine.

    Attributes:
        architecture: such as ``"sm_90"`` or ``"gfx942"``.
        measured: by the key of the workload and the batch size.
        forced: kernels to use wherever they can run (True), or never (False).
        forced_by: who says so.
        unavailable: kernels that cannot be had, though they were measured.
    """

    architecture: str
    measured: Measured = field(default_factory=dict)
    forced: Mapping[str, bool] = field(default_factory=dict)
    forced_by: str = "asked for"
    unavailable: frozenset[str] = frozenset()

    def select(self, kernel: str, workload: Workload | None) -> Decision:
        """Whether ``kernel`` serves the workload; an unknown one rests on what is forced."""
        if kernel in self.forced:
            return Decision(self.forced[kernel], self.forced_by)
        if workload is None:
            return Decision(False, "sizes not known")
        found = self.found(workload)
        if found is not None:
            return Decision(found.choice(self.unavailable) == kernel, found.sentence(kernel))
        rule = shipped(self.architecture, kernel, workload)
        return Decision(rule is not None, rule.evidence if rule else "")

    def found(self, workload: Workload) -> Measurement | None:
        """What was measured for the workload, at the closest batch size within a factor of two."""
        return _nearest(self.measured.get(workload.key, {}), workload.batch)

    def why_default(self, workload: Workload | None) -> str:
        """Why no other kernel serves a convolution."""
        found = self.found(workload) if workload else None
        return found.sentence(DEFAULT) if found else "predicted: no rule for another kernel"


def only(*kernels: str, architecture: str = "sm_90") -> KernelSelector:
    """These kernels wherever they can run, and no other choice."""
    check_kernels(kernels)
    return KernelSelector(
        architecture, forced={name: name in kernels for name in KERNELS | EXPERIMENTAL}
    )


def check_kernels(names: Iterable[str], argument: str = "kernels") -> None:
    """Raises ValueError for a name that is the name of no kernel."""
    for name in names:
        if name not in KERNELS | EXPERIMENTAL:
            known = ", ".join(KERNELS | EXPERIMENTAL)
            raise ValueError(f"{argument} takes names out of {known}; got {name!r}")


def standard(device: torch.device, unavailable: frozenset[str] = frozenset()) -> KernelSelector:
    """What selects kernels on a device: the environment's, the cache's, the shipped table's.

    Args:
        unavailable: kernels that cannot be had.

    Raises:
        ValueError: FASTRES_KERNELS names what does not exist.
    """

    def name() -> str:
        return machine(device)

    return KernelSelector(
        architecture_of(device),
        _merged(load(cache_path(), name), _unwritten.get(name(), {}) if _unwritten else {}),
        forced(os.environ.get(FORCE_VARIABLE, "")),
        FORCE_VARIABLE,
        unavailable,
    )


def tuning_seconds() -> float:
    """FASTRES_TUNE: how long the pieces of a network are measured for a new shape; 0 is never.

    Raises:
        ValueError: it is no such number.
    """
    text = os.environ.get(TUNE_VARIABLE) or str(TUNE_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(
            f"FASTRES_TUNE takes seconds a shape, at least 0 (0 measures nothing); got {text!r}"
        )
    return seconds


def forced(text: str) -> dict[str, bool]:
    """``"gemm,-b2b_gemm"`` as ``{"gemm": True, "b2b_gemm": False}``."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    found = {current(name.removeprefix("-")): not name.startswith("-") for name in names}
    check_kernels(found, FORCE_VARIABLE)
    return found


def current(kernel: str) -> str:
    """The name of today for one that a kernel had before."""
    return FORMER.get(kernel, kernel)


def _nearest(by_batch: Mapping[int, Measurement], batch: int) -> Measurement | None:
    """The measurement at the closest batch size, no more than a factor of two away."""

    def distance(other: int) -> float:
        return max(other, batch) / max(1, min(other, batch))

    closest = min(by_batch, key=distance, default=None)
    return None if closest is None or distance(closest) > NEAREST else by_batch[closest]


def math_mode_of(dtype: torch.dtype) -> str:
    """``"half"``, or how float32 is multiplied: ``"tf32"``, ``"ieee"``."""
    return conv_precision() if dtype is torch.float32 else "half"


def architecture_of(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``; Triton's interpreter on a CPU plays a GPU with TMA."""
    if device.type != "cuda":
        return "sm_90"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def machine(device: torch.device) -> str:
    """What a measurement holds for: the GPU, its driver and the versions of all that runs."""
    from importlib import metadata

    from ..version import __version__

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    parts = (name, f"driver {_driver()}", f"torch {torch.__version__}", f"triton {triton}")
    return "; ".join((*parts, f"fastres {__version__}"))


def _driver() -> str:
    """The version of NVIDIA's kernel module, or else what torch was built for."""
    try:
        line = Path("/proc/driver/nvidia/version").read_text().partition("\n")[0]
    except OSError:
        return str(torch.version.hip or torch.version.cuda or "none")
    return next((word for word in line.split() if word[:1].isdigit() and "." in word), line)


def cache_path() -> Path:
    """FASTRES_TUNED, or ``fastres/tuned.json`` in the user's cache folder."""
    given = os.environ.get(PATH_VARIABLE)
    if given:
        return Path(given)
    # Without a home, as in containers of unknown users, "~" stays and is no file.
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "fastres" / "tuned.json"


def load(path: Path, machine_name: Callable[[], str]) -> Measured:
    """What was measured on this machine with these versions; nothing where there is no file.

    A file that cannot be understood is ignored with one warning; so is one that holds nothing for
    this machine where FASTRES_TUNE keeps networks from measuring it by themselves.
    """
    try:
        status = path.stat()
    except OSError:
        return {}
    return _load(path, status.st_mtime_ns, status.st_size, machine_name())


@lru_cache(maxsize=16)
def _load(path: Path, changed: int, size: int, machine_name: str) -> Measured:
    try:
        machines = _machines(path)
    except (OSError, ValueError) as error:
        warnings.warn(f"fastres ignores {path}: {error}", stacklevel=2)
        return {}
    if machine_name not in machines and not tuning_seconds():
        warnings.warn(
            f"fastres ignores {path}: it was measured on another machine or with other versions "
            f"than {machine_name}; run `fastres tune` here",
            stacklevel=2,
        )
    return machines.get(machine_name, {})


def _machines(path: Path) -> dict[str, dict[str, dict[int, Measurement]]]:
    """The file's content. Raises ValueError for anything that fastres did not write."""
    try:
        content = json.loads(read_text(path, LARGEST))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        return {
            str(name): {
                str(key): {_batch(batch): _measurement(entry) for batch, entry in batches.items()}
                for key, batches in workloads.items()
            }
            for name, workloads in content["machines"].items()
        }
    except (KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"not a file of measurements ({type(error).__name__})") from error


def _batch(text: str) -> int:
    batch = int(text)
    if not 0 < batch < 2**31:
        raise ValueError(f"a batch size must be positive and below 2**31, got {text}")
    return batch


def _measurement(entry: Mapping[str, Any]) -> Measurement:
    seconds = {current(str(name)): float(value) for name, value in entry["seconds"].items()}
    if not all(0 < value < float("inf") for value in seconds.values()):
        raise ValueError(f"seconds must be positive, got {seconds}")
    excluded = {current(str(name)): str(reason) for name, reason in entry["excluded"].items()}
    return Measurement(seconds, excluded, current(str(entry.get("chosen", ""))))


_times = 0
_unwritten: dict[str, dict[str, dict[int, Measurement]]] = {}
"""What no file could take, by machine; for this process alone."""


def remember(found: Measured, device: torch.device) -> None:
    """Let measurements be in force from now on; in other processes too, if the file can be written.

    A file that fastres did not write is left as it is.
    """
    global _times
    path, name = cache_path(), machine(device)
    written = path.parts[0] != "~"  # there is a home
    try:
        if written:
            store(path, name, found, replaces=False, seconds=LOCK_SECONDS)
    except (OSError, ValueError, NotImplementedError):  # the last of file systems without locks
        written = False
    if not written:
        _unwritten[name] = _merged(_unwritten.get(name, {}), found)
    _times += 1


def times_remembered() -> int:
    """How often :func:`remember` was called in this process."""
    return _times


def _merged(old: Measured, new: Measured) -> dict[str, dict[int, Measurement]]:
    """Both; what is in both, of the newer."""
    return {key: {**old.get(key, {}), **new.get(key, {})} for key in old.keys() | new.keys()}


def store(
    path: Path, machine_name: str, found: Measured, *, replaces: bool = True, seconds: float = -1
) -> None:
    """Merge measurements into the file; a workload measured before is replaced.

    Args:
        replaces: a file that cannot be understood, as a whole.
        seconds: to wait for others that write, if not for ever.

    Raises:
        OSError: the file cannot be written, or was not free in time.
        ValueError: it cannot be understood and is not to be replaced.
    """
    check_target(path, makes_folder=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path, seconds):
        try:
            machines = _machines(path)
        except FileNotFoundError:
            machines = {}
        except (OSError, ValueError):
            if not replaces:
                raise
            machines = {}
        machines[machine_name] = _merged(machines.get(machine_name, {}), found)
        content = {"format": FORMAT, "machines": _plain(machines)}
        atomic_write(path, json.dumps(content, indent=1).encode())


def _plain(machines: Mapping[str, Measured]) -> dict[str, Any]:
    return {
        name: {
            key: {str(batch): asdict(batches[batch]) for batch in sorted(batches)}
            for key, batches in workloads.items()
        }
        for name, workloads in machines.items()
    }


@contextmanager
def _locked(path: Path, seconds: float) -> Iterator[None]:
    """Only one process at a time; the lock ends with its holder, however that ends."""
    from filelock import FileLock

    with FileLock(path.with_name(path.name + ".lock"), timeout=seconds):
        yield
