"""What goes into a graph, seen over a stand-in for torch.cuda; tests/gpu has the real one."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fused import small

import fastres
from benchmarks import call_cost
from benchmarks.call_cost import stubbed_graphs
from fastres.backends import select
from fastres.graph import fold, plan, trace
from fastres.runtime import cuda_graph
from fastres.runtime.executor import Executor

CL = torch.channels_last


@pytest.fixture(scope="module")
def runner_class():
    return stubbed_graphs().GraphRunner


def executor(model, ops=None, dtype=torch.float32):
    built = plan.build(fold.fold(trace.trace(model, "_forward_impl")))
    return Executor(built, model, ops or select.AtenOps(), dtype)


def captured(runner, x):
    """The graph's own image after two calls with ``x`` and one with its negative."""
    with torch.no_grad():
        for image in (x, x, -x):
            runner(image)
    (entry,) = runner._graphs.values()
    return entry


@pytest.mark.parametrize("layout", [torch.contiguous_format, CL], ids=["NCHW", "NHWC"])
def test_one_copy_converts_dtype_and_memory_order(runner_class, layout):
    made = executor(small(), dtype=torch.bfloat16)
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=layout)
    source = captured(runner_class(made, casts=torch.float32), x).source
    assert source.dtype is torch.bfloat16
    assert source.is_contiguous(memory_format=CL)
    assert torch.equal(source, (-x).bfloat16()), "the last call's image, converted"


def test_a_stem_that_reads_any_order_gets_the_image_as_it_is(runner_class):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernels run in the interpreter only where there is no GPU")
    made = executor(fastres.resnet18(num_classes=3).eval(), select.TritonOps(), torch.float16)
    x = torch.randn(1, 3, 32, 32).half()
    assert made.reads_any_order(x)
    assert not executor(small()).reads_any_order(torch.randn(1, 3, 8, 8))
    source = runner_class(made)._source(x)
    assert source.stride() == x.stride()


def test_other_dtypes_are_refused_as_without_a_graph(runner_class):
    runner = runner_class(executor(small()), casts=torch.float32)
    with pytest.raises(TypeError, match="x must be torch.float32.*got torch.float64"):
        runner(torch.randn(1, 3, 8, 8).double())


@pytest.mark.parametrize("layout", [torch.contiguous_format, CL], ids=["NCHW", "NHWC"])
def test_outputs_have_the_callers_memory_order(runner_class, layout):
    """The graph's own image may be in another order than the caller's."""

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x).relu()

    model = Features().eval()
    made = Executor(
        plan.build(fold.fold(trace.trace(model))), model, select.AtenOps(), torch.float32
    )
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=layout)
    output = captured(runner_class(made), x).output
    assert output.is_contiguous(memory_format=layout)
    assert not output.is_contiguous(
        memory_format=CL if layout is not CL else torch.contiguous_format
    )


def test_what_is_captured_has_run_before_on_the_same_memory(runner_class, monkeypatch):
    """So that nothing is compiled in a capture, as for an image that starts on an odd address."""
    made = executor(small())
    addresses = []
    run = made.run

    def recorded(arguments, **options):
        addresses.append(arguments[0].data_ptr())
        return run(arguments, **options)

    monkeypatch.setattr(made, "run", recorded)
    image = torch.randn(1 + 3 * 8 * 8)[1:].view(1, 3, 8, 8)
    runner = runner_class(made)
    with torch.no_grad():
        runner(image)
        runner(image)
    assert addresses[0] == image.data_ptr()
    assert addresses[-1] == addresses[-2] != image.data_ptr()


def test_all_captures_share_one_stream_without_which_they_share_no_memory(
    runner_class, monkeypatch
):
    """PyTorch: captures into one pool should be on the same stream, for effective sharing."""
    streams = []

    def graph(captured, pool=None, stream=None, capture_error_mode="global"):
        streams.append(stream)
        return contextlib.nullcontext()

    monkeypatch.setattr(call_cost._Cuda, "graph", staticmethod(graph))
    runner = runner_class(executor(small()))
    with torch.no_grad():
        for size in (8, 8, 12, 12):
            runner(torch.randn(1, 3, size, size))
    assert len(streams) == 2
    assert streams[0] is streams[1] is not None


def test_models_in_threads_capture_one_after_the_other(runner_class, monkeypatch):
    """PyTorch: only one capture may be underway at a time in the process."""
    underway, most = [], []

    @contextlib.contextmanager
    def graph(captured, **options):
        underway.append(captured)
        time.sleep(0.05)
        most.append(len(underway))
        yield
        underway.remove(captured)

    def capture(seed):
        runner, x = runner_class(executor(small(seed=seed))), torch.randn(1, 3, 8, 8)
        with torch.no_grad():
            for _ in range(2):
                runner(x)

    monkeypatch.setattr(call_cost._Cuda, "graph", staticmethod(graph))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(capture, range(4)))
    assert most == [1, 1, 1, 1]


@pytest.fixture
def captures(runner_class, monkeypatch):
    """The shapes that runners have captured."""
    found, capture = [], runner_class._capture

    def recorded(self, key, x):
        found.append(x.shape[0])
        return capture(self, key, x)

    monkeypatch.setattr(runner_class, "_capture", recorded)
    return found


@pytest.mark.fault(24)
def test_more_shapes_in_turn_than_graphs_capture_nothing_anew(runner_class, captures):
    model = small()
    runner = runner_class(executor(model), limit=3)
    images = [torch.randn(n, 3, 8, 8) for n in range(1, 6)]
    with torch.no_grad():
        for _ in range(5):
            for x in images:
                runner(x)
        assert captures == [1, 2, 3]
        assert [shape[0] for shape in runner.shapes] == [1, 2, 3]
        for _ in range(2):
            runner(images[4])
    assert captures == [1, 2, 3, 5], "twice on end is more often than the oldest graph"
    assert [shape[0] for shape in runner.shapes] == [2, 3, 5]


@pytest.mark.fault(88)
def test_graphs_go_with_the_kernels_that_they_hold(runner_class, monkeypatch):
    """What was captured reads weights by address, which are freed when others go on."""

    def fails(*_, **__):
        raise RuntimeError("a kernel cannot run")

    made = executor(small())
    runner, x = runner_class(made), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for _ in range(2):
            expected = runner(x).clone()
        assert runner.has_graph(x)
        monkeypatch.setattr(made.ops, "instead", lambda *_: select.AtenOps())
        monkeypatch.setattr(made.ops, "conv", fails)
        runner(torch.randn(3, 3, 8, 8))
        torch.testing.assert_close(runner(x), expected)
    assert runner.shapes == ()


@pytest.mark.fault(20)
def test_memory_that_runs_out_in_a_capture_means_steps_one_by_one(runner_class, monkeypatch):
    model, x = small(), torch.randn(2, 3, 8, 8)
    runner = runner_class(executor(model))
    tried = []

    def full(*_):
        tried.append(1)
        raise torch.OutOfMemoryError("no room for the graph")

    monkeypatch.setattr(runner, "_source", full)
    with torch.no_grad():
        first = runner(x)
        with pytest.warns(UserWarning, match=r"shape \(2, 3, 8, 8\) without a CUDA graph"):
            second = runner(x)
        assert all(torch.equal(runner(x), first) for _ in range(4))
    assert torch.equal(second, first)
    assert tried == [1], "it is not tried again at every call"
    assert not runner.shapes


def test_a_forked_child_is_told_to_spawn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(RuntimeError, match="forked subprocess.*'spawn'"):
        cuda_graph._is_capturing()
