"""What a call costs in Python before and after its CUDA graph is launched; needs no GPU.

    python benchmarks/call_cost.py [--calls 2000] [--json]

The engine's own code runs with a stub for the CUDA runtime: a graph's replay does nothing but read
the clock. ``before`` delays the GPU; ``after`` runs while the GPU works, unless the work is shorter
than that. Not counted is what the runtime itself takes: the launch, events, the copies in and out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from fastres import create_model, optimize
from fastres.frontends import fast_model
from fastres.perf.timing import Samples
from fastres.runtime import live

SHAPE = (1, 3, 32, 32)
WARM = 50
GOAL = 25e-6  # seconds, of before and after together, over the launch


class Clock:
    """Remembers when the stub's graph was last launched."""

    launched = 0.0


class _Anything:
    """A stream or an event: whatever is asked of it is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Graph:
    def replay(self) -> None:
        Clock.launched = time.perf_counter()


_STREAM = _Anything()


class _Cuda:
    """As much of torch.cuda as running a captured graph takes."""

    CUDAGraph = _Graph
    Stream = Event = _Anything
    device = graph = staticmethod(lambda *_, **__: contextlib.nullcontext())
    current_stream = stream = staticmethod(lambda *_: _STREAM)
    is_current_stream_capturing = staticmethod(lambda: False)
    init = graph_pool_handle = empty_cache = staticmethod(lambda: None)


class _Torch:
    """torch, but for its ``cuda``."""

    cuda = _Cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def stubbed_graphs() -> ModuleType:
    """fastres.runtime.cuda_graph as it stands, for CPU tensors and the stub of torch.cuda."""
    spec = importlib.util.find_spec("fastres.runtime.cuda_graph")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text()
    if '"cuda"' not in source:
        raise RuntimeError("fastres.runtime.cuda_graph no longer asks for the device 'cuda'")
    module = ModuleType(f"{spec.name}_stubbed")
    module.__package__ = spec.parent
    sys.modules[module.__name__] = module  # dataclasses look it up
    exec(compile(source.replace('"cuda"', '"cpu"'), spec.origin, "exec"), module.__dict__)
    module.__dict__["torch"] = _Torch()
    return module


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    """Engines built inside run as on a GPU, with graphs that do nothing."""
    runner = stubbed_graphs().__dict__["GraphRunner"]
    original = live.GraphRunner, fast_model.GraphRunner
    live.GraphRunner = fast_model.GraphRunner = runner
    try:
        yield
    finally:
        live.GraphRunner, fast_model.GraphRunner = original


def contenders(name: str = "resnet50") -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """A live network, whose weights are looked over at each call, and an optimised copy."""
    model = create_model(name).eval()
    x = torch.randn(SHAPE)
    return {"live": model, "optimised": optimize(model, example_input=x, dtype=torch.float32)}


def measure(call: Callable[[torch.Tensor], torch.Tensor], calls: int) -> dict[str, Samples]:
    """Seconds before the launch, after it, and both, of each call."""
    x = torch.randn(SHAPE)
    for _ in range(WARM):
        call(x)
    before, after = [], []
    for _ in range(calls):
        started = time.perf_counter()
        Clock.launched = 0.0
        call(x)
        ended = time.perf_counter()
        if Clock.launched < started:
            raise RuntimeError("the call launched no graph")
        before.append(Clock.launched - started)
        after.append(ended - Clock.launched)
    both = [a + b for a, b in zip(before, after, strict=True)]
    return {
        "before": Samples(tuple(before)),
        "after": Samples(tuple(after)),
        "both": Samples(tuple(both)),
    }


def run(calls: int, name: str = "resnet50") -> dict[str, dict[str, Samples]]:
    """By contender and part."""
    with stubbed():
        calls_of = contenders(name)
        with torch.inference_mode():
            return {what: measure(call, calls) for what, call in calls_of.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--json", action="store_true", help="with the raw samples")
    options = parser.parse_args()
    found = run(options.calls)
    if options.json:
        print(json.dumps({n: {k: v.to_dict() for k, v in p.items()} for n, p in found.items()}))
        return 0
    print(f"resnet50, batch 1, {options.calls} calls; microseconds, median (p20-p80)")
    for what, parts in found.items():
        shown = (
            f"{part} {s.median * 1e6:.1f} ({s.p20 * 1e6:.1f}-{s.p80 * 1e6:.1f})"
            for part, s in parts.items()
        )
        print(f"{what:10} {', '.join(shown)}")
    print(f"goal: less than {GOAL * 1e6:.0f} over the launch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
