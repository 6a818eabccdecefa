"""What a result was obtained on: versions, commit, processors, and switches that change numbers."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .host_memory import host_memory

PACKAGES = (
    *("torch", "torchvision", "triton", "numpy", "safetensors", "timm", "scikit-learn"),
    *("torch-tensorrt", "onnxruntime", "onnxruntime-gpu", "openvino", "nncf", "zentorch"),
)
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "FASTRES_KERNELS",
    "FASTRES_PDL",
    "FASTRES_TUNED",
    "GLIBC_TUNABLES",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "LD_PRELOAD",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "ONEDNN_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TRITON_INTERPRET",
)
GPU_STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "driver_version")


@dataclass(frozen=True)
class Environment:
    """A machine and its software at one moment; every field is plain JSON data.

    ``commit`` is the source tree's, with ``-dirty`` behind it where tracked files differ, or None
    for an installed package. ``cpu["memory_gib"]`` and ``gpus[i]["memory_gib"]`` are in GiB.
    ``flags["conv_precision"]`` and ``flags["matmul_precision"]`` are torch's ``fp32_precision``
    settings (``"tf32"``, ``"ieee"``, or ``"none"`` for torch's default) on CUDA.
    """

    fastres: str
    commit: str | None
    python: str
    platform: str
    versions: dict[str, str]
    cpu: dict[str, Any]
    gpus: tuple[dict[str, Any], ...]
    flags: dict[str, Any]
    variables: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-ready dict."""
        return asdict(self) | {"gpus": list(self.gpus)}

    def summary(self) -> str:
        """One line: the processor, torch and fastres with its commit."""
        chip = self.gpus[0]["name"] if self.gpus else self.cpu["name"]
        commit = f" at {self.commit}" if self.commit else ""
        threads = "" if self.gpus else f", {self.cpu['threads']} threads"
        return f"{chip}{threads}; torch {self.versions['torch']}; fastres {self.fastres}{commit}"


def environment() -> Environment:
    """Reads the current :class:`Environment`; needs neither a GPU nor Triton."""
    from ..version import __version__

    return Environment(
        fastres=__version__,
        commit=commit(),
        python=platform.python_version(),
        platform=platform.platform(),
        versions=versions(),
        cpu=cpu(),
        gpus=gpus(),
        flags=flags(),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter; what is missing is left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"torch": str(torch.__version__)}


def commit() -> str | None:
    """The commit of the work tree that fastres is run from, or None where it is installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    head = _run("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if not head:
        return None
    changed = _run("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if changed else head


def cpu() -> dict[str, Any]:
    """Name, core counts, torch threads, memory and vector instructions of the processor."""
    return {
        "name": _cpu_name(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "native_bf16": native_bf16(),
        "memory_gib": _memory_gib(),
    }


def usable_cores() -> int:
    """Those that the process' affinity allows."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def worker_cores() -> int:
    """Usable cores, as far as the control group grants their time: so many workers pay."""
    usable = usable_cores()
    with suppress(OSError, ValueError), open("/sys/fs/cgroup/cpu.max") as file:
        quota, period = map(int, file.read().split())
        usable = min(usable, max(1, quota // period))
    return usable


def native_bf16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name)() for name in names if hasattr(torch.cpu, name))


def gpus() -> tuple[dict[str, Any], ...]:
    """Name, capability, size and momentary clocks of each visible CUDA device."""
    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "state": gpu_state(str(properties.uuid) if hasattr(properties, "uuid") else index),
            }
        )
    return tuple(found)


def gpu_state(device: str | int = 0) -> dict[str, str]:
    """Clocks (MHz), temperature (C), power (W) and driver as nvidia-smi tells them, or {}.

    Args:
        device: the UUID or the index by which nvidia-smi knows the GPU.
    """
    name = device if isinstance(device, int) or device.startswith("GPU-") else f"GPU-{device}"
    line = _run(
        "nvidia-smi",
        f"--id={name}",
        f"--query-gpu={','.join(GPU_STATE)}",
        "--format=csv,noheader,nounits",
    )
    values = [value.strip() for value in (line or "").split(",")]
    return dict(zip(GPU_STATE, values, strict=True)) if len(values) == len(GPU_STATE) else {}


def flags() -> dict[str, Any]:
    """torch's switches that change numbers or speed; TF32 among them."""
    cudnn: Any = torch.backends.cudnn
    return {
        "matmul_precision": torch.backends.cuda.matmul.fp32_precision,
        "conv_precision": cudnn.conv.fp32_precision,
        "cudnn_version": cudnn.version() if torch.cuda.is_available() else None,
        "cudnn_benchmark": cudnn.benchmark,
        "cudnn_deterministic": cudnn.deterministic,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "mkldnn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "cuda": torch.version.cuda,
        "host_memory": host_memory().detail,
    }


def _run(*command: str) -> str | None:
    """Standard output of a command that succeeded, else None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _memory_gib() -> float | None:
    if sys.platform == "win32":
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
