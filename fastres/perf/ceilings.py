"""What a machine can do at most, measured: bandwidths and matrix throughput."""

from __future__ import annotations

import torch

from ..runtime.clocks import call_seconds
from .roofline import Ceilings

SHORT = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "int8",
}
COPIED_BYTES = 256 * 2**20
TRIES = 7
L2_SET_BYTES, L2_READS = 16 * 2**20, 512


def measured_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """This machine's bandwidths and matrix throughput, the best of several tries.

    The copy is larger than the caches, on a GPU as on a CPU; inputs are random, since zeros are
    faster on a GPU.
    """
    source = torch.randn(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    copied = min(call_seconds(lambda: target.copy_(source), device, TRIES))
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    multiplied = min(call_seconds(lambda: a @ b, device, TRIES))
    name = f"{_machine(device)}, {SHORT.get(dtype, str(dtype))}, measured"
    cached = _l2_bandwidth(device) if device.type == "cuda" else None
    return Ceilings(name, 2 * COPIED_BYTES / copied, 2 * size**3 / multiplied, cached)


def _l2_bandwidth(device: torch.device) -> float | None:
    """Bytes per second from the L2 cache to all multiprocessors; None without Triton."""
    try:
        from ..kernels.cache_read import BLOCK, cache_read
    except ImportError:
        return None
    x = torch.randn(L2_SET_BYTES // 4, device=device)
    programs = 4 * torch.cuda.get_device_properties(device).multi_processor_count
    read = min(call_seconds(lambda: cache_read(x, programs, L2_READS), device, TRIES))
    return 4 * BLOCK * programs * L2_READS / read


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.get_num_threads()} threads"
