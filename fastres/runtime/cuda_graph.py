"""CUDA graphs per input shape: captured after a first call, replayed, bounded in number.

The one copy of an image into the graph's memory also brings it into the dtype and memory order that
the engine wants. All graphs of one cache share a memory pool. That is safe because a call waits for
the end of the last one's copy-out, on whatever stream that was, and because the caller gets a copy.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import RLock
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..backends.aten import conv_precision, matmul_precision
from ..backends.memory_format import CHANNELS_LAST, is_channels_last
from .clocks import ONE_CAPTURE
from .executor import Executor
from .tuning import measures, tune_shape

Key: TypeAlias = tuple[Any, ...]


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    source: Tensor
    output: Any
    workspace: Any
    used: int = 0  # the number of the last call


class GraphRunner:
    """Runs an executor, through a graph once a shape has been seen before.

    Args:
        executor: a plan with weights, with one image tensor in; any nest of tensors out.
        limit: graphs kept. Beyond them a shape gets one for the least recently used only when it
            comes a second time before that is used again: shapes in turn capture nothing anew.
        casts: dtype of images that are taken as well as those in the executor's own.
    """

    def __init__(
        self, executor: Executor, limit: int = 64, casts: torch.dtype | None = None
    ) -> None:
        self.executor = executor
        self.limit = limit
        self.casts = casts
        self._whole = not executor.plan.fallbacks
        self._ops = executor.ops
        self._graphs: OrderedDict[Key, _Captured] = OrderedDict()
        self._asked: dict[Key, int] = {}  # the last call with each that has no graph
        self._calls = 0
        self._without: set[Key] = set()  # those whose graphs do not fit the memory
        self._space: Any = None  # one workspace for all graphs, as their calls take turns
        self._lock = RLock()
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._last_use: torch.cuda.Event | None = None

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The input shapes that have a graph now."""
        return tuple(tuple(entry.source.shape) for entry in self._graphs.values())

    def __call__(self, x: Tensor) -> Any:
        """The executor's output for ``x``; the result belongs to the caller.

        A call inside the user's own capture, of an empty batch, or of a plan with PyTorch calls in
        it runs step by step.
        """
        if x.device.type != "cuda" or _is_capturing():
            return self.executor.run([self._cast(x)])
        with self._lock, torch.cuda.device(x.device):
            self._wait()
            try:
                return self._run(x)
            finally:
                self._mark()

    def _run(self, x: Tensor) -> Any:
        if self.executor.ops is not self._ops:
            # A kernel failed and others go on: the weights that graphs read by address are gone.
            self.free()
            self._ops = self.executor.ops
        key = _key(x)
        self._calls += 1
        entry = self._graphs.get(key)
        if entry is None and self._wants_graph(key) and self._capturable(x):
            entry = self._try_capture(key, x)
        if entry is None:
            return self.executor.run([self._cast(x)])
        entry.used = self._calls
        self._graphs.move_to_end(key)
        return self._replay(entry, x)

    def _wants_graph(self, key: Key) -> bool:
        """As :meth:`_due`, at a call, which counts."""
        due = self._due(key)
        if len(self._asked) > 64 * self.limit:
            self._asked.clear()
        self._asked[key] = self._calls
        return due

    def _due(self, key: Key) -> bool:
        """Whether a key that has no graph should get one, for the oldest of them if need be."""
        before = self._asked.get(key, 0)
        if not before or key in self._without or key in self._graphs:
            return False
        return len(self._graphs) < self.limit or before > next(iter(self._graphs.values())).used

    def _try_capture(self, key: Key, x: Tensor) -> _Captured | None:
        try:
            return self._capture(key, x)
        except torch.OutOfMemoryError:
            self._without.add(key)
            torch.cuda.empty_cache()
            warnings.warn(
                f"fastres runs images of shape {tuple(x.shape)} without a CUDA graph, "
                "for which the GPU's memory does not suffice",
                stacklevel=2,
            )
            return None

    def has_graph(self, x: Tensor) -> bool:
        """Whether a call with ``x`` replays a graph that exists already."""
        return self._capturable(x) and _key(x) in self._graphs

    def tunes(self, x: Tensor) -> bool:
        """Whether a call with ``x`` may choose other kernels, by measuring, for a graph to come."""
        return measures(self.executor.ops) and self._capturable(x) and self._due(_key(x))

    def refold(self, changed: Collection[str] | None = None) -> None:
        """As :meth:`Executor.refold`, once no call uses the old weights any more."""
        with self._lock:
            self._finish()
            self.executor.refold(changed)

    def free(self) -> None:
        """Drop all graphs and their memory, once no call uses them any more."""
        with self._lock:
            self._finish()
            self._graphs.clear()
            self._asked.clear()
            self._without.clear()
            self._pool = self._stream = self._space = None

    def _capturable(self, x: Tensor) -> bool:
        if x.device.type != "cuda" or x.numel() == 0 or not self._whole:
            return False
        return not _is_capturing()

    def _capture(self, key: Key, x: Tensor) -> _Captured:
        if len(self._graphs) >= self.limit:
            self._finish()
        while len(self._graphs) >= self.limit:
            self._graphs.popitem(last=False)
        if self._stream is None:
            # The allocator shares a pool's memory among captures on one stream alone.
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        stream = self._stream
        with torch.inference_mode(False), torch.no_grad(), self._workspace(x) as workspace:
            if measures(self.executor.ops):
                tune_shape(self.executor, self._source(x))
            source, contiguous = self._source(x), not is_channels_last(x)
            # Memory that is aligned as the caller's was not wants kernels of its own, and while
            # capturing none can be compiled or loaded.
            self.executor.run([source], contiguous=contiguous)
            graph = torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            with (
                ONE_CAPTURE,
                torch.cuda.graph(
                    graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
                ),
            ):
                output = self.executor.run([source], contiguous=contiguous)
            torch.cuda.current_stream().wait_stream(stream)
        self._space = workspace
        self._graphs[key] = _Captured(graph, source, output, workspace)
        return self._graphs[key]

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.executor.dtype) if x.dtype is self.casts else x

    def _source(self, x: Tensor) -> Tensor:
        """Memory of the graph's own for images like ``x``, filled with it."""
        dtype = self.executor.dtype if x.dtype is self.casts else x.dtype
        order = torch.preserve_format if self.executor.reads_any_order(x) else CHANNELS_LAST
        return torch.empty_like(x, dtype=dtype, memory_format=order).copy_(x)

    def _workspace(self, x: Tensor) -> AbstractContextManager[Any]:
        """Memory of the graphs' own, so that their kernels need not clear any."""
        return self.executor.ops.workspace_held(x.device, self._space)

    def _replay(self, entry: _Captured, x: Tensor) -> Any:
        entry.source.copy_(x)
        entry.graph.replay()
        if isinstance(entry.output, Tensor):
            return entry.output.clone()
        return tree_map(_clone, entry.output)

    def _mark(self) -> None:
        """Remember, on the current stream, where the use of the engine's memory ends."""
        if self._last_use is None:
            self._last_use = torch.cuda.Event()
        self._last_use.record()

    def _wait(self) -> None:
        """Let the current stream wait for that."""
        if self._last_use is not None:
            torch.cuda.current_stream().wait_event(self._last_use)

    def _finish(self) -> None:
        """Let the host wait for it."""
        if self._last_use is not None:
            self._last_use.synchronize()


def _is_capturing() -> bool:
    """Whether the user captures. In a forked child, torch's own error, which advises to spawn."""
    torch.cuda.init()  # the question itself would fail there without a word about forks
    return torch.cuda.is_current_stream_capturing()


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def warm_up(
    run: Callable[[Tensor], Any],
    shapes: Iterable[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype,
    executor: Executor | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> None:
    """Compile for all shapes at once; then run random images of each twice, which captures.

    Args:
        run: takes one tensor of images.
        shapes: input shapes, (N, C, H, W).
        executor: what serves ``run``, if that is one; else each shape compiles when it is run.
        progress: called with (done, wanted): kernels to compile and shapes to run.
    """
    sizes, compiled = [tuple(shape) for shape in shapes], 0

    def tell(done: int, wanted: int) -> None:
        nonlocal compiled
        compiled = wanted
        if progress is not None:
            progress(done, wanted + len(sizes))

    if executor is not None:
        taken = executor.dtype if dtype.is_floating_point else dtype
        with torch.no_grad():
            empty = ([torch.empty(size, dtype=taken, device=device)] for size in sizes)
            executor.compile_ahead(empty, tell)
    generator = torch.Generator().manual_seed(0)
    for done, size in enumerate(sizes, 1):
        x = torch.randn(*size, generator=generator, device="cpu").to(device, dtype)
        for _ in range(2):
            run(x)
        tell(compiled + done, compiled)


def _key(x: Tensor) -> Key:
    layout = x.is_contiguous(memory_format=CHANNELS_LAST) and not x.is_contiguous()
    return (tuple(x.shape), x.dtype, x.device, layout, conv_precision(), matmul_precision())
