"""Row 21: many calls and many sizes on the CPU's engine; memory and caches stay flat.

``FASTRES_SOAK=10000`` runs the full length; by default a tenth of it.
"""

import gc
import os
import tracemalloc
from collections import Counter

import pytest
import torch
from fused import assert_fused, images, small

import fastres

CALLS = int(os.environ.get("FASTRES_SOAK", "1000"))
BATCHES = 50


def objects() -> Counter[str]:
    """How many objects of each type are alive."""
    gc.collect()
    return Counter(type(o).__name__ for o in gc.get_objects())


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_model():
    return small()


def copied_model():
    return fastres.optimize(small(), example_input=images())


@pytest.fixture(params=[live_model, copied_model], ids=["live", "optimized"])
def model(request):
    net = request.param()
    with torch.no_grad():
        for _ in range(3):
            net(images())
    return net


@pytest.fixture
def calls(model):
    """``calls(n)`` makes that many, of sizes that take turns."""
    inputs = [images(n, size) for n in (1, 2) for size in (8, 9, 16)]

    def run(count: int) -> None:
        with torch.inference_mode():
            for i in range(count):
                model(inputs[i % len(inputs)])

    return run


@pytest.mark.fault(21)
def test_calls_leave_no_object_behind(calls):
    calls(50)
    before = objects()
    calls(CALLS)
    left = objects() - before
    # Python fills caches of its own (isinstance with abstract classes: up to 84 objects were
    # seen, whatever the number of calls); a leak would keep at least one per call.
    assert sum(left.values()) < CALLS // 5, left.most_common(5)


@pytest.mark.fault(21)
def test_calls_leave_no_memory_behind(calls):
    """Python's own allocations to the byte; torch's by what the process holds."""
    calls(200)
    gc.collect()
    tracemalloc.start()
    try:
        calls(100)
        gc.collect()
        first = tracemalloc.get_traced_memory()[0]
        calls(CALLS // 2)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - first
    finally:
        tracemalloc.stop()
    assert grown < 10 * CALLS  # a kept output is over 500 bytes


@pytest.mark.fault(21)
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
def test_the_process_stays_as_large_as_it_is(model):
    x = images(8, 32)
    with torch.inference_mode():
        for _ in range(100):
            model(x)
        before = resident()
        for _ in range(CALLS // 2):
            model(x)
    # One activation map of this input is 256 KiB: 500 calls that kept one would take 128 MiB.
    assert resident() - before < 16 * 2**20


@pytest.mark.fault(21)
def test_fifty_batch_sizes_share_one_plan(model):
    """No size is compiled, planned or folded for; what is remembered of sizes is bounded."""
    folds = []
    engines = model._live()._runners if isinstance(model, fastres.ResNet) else model._runners
    (runner,) = engines.values()
    weights = [id(prepared) for prepared in runner.executor._prepared.values()]
    with torch.inference_mode():
        for n in range(1, BATCHES + 1):
            assert model(torch.randn(n, 3, 8, 8)).shape == (n, 5)
            folds.append(runner.executor.folds)
    assert list(engines.values()) == [runner]
    assert set(folds) == {1}
    assert [id(prepared) for prepared in runner.executor._prepared.values()] == weights
    with torch.inference_mode():
        for n in range(1, 300):
            model(torch.randn(1, 3, 8, n))
    assert len(runner.executor._schedules) <= 257
    assert not runner.shapes


@pytest.mark.fault(21)
def test_models_made_and_dropped_leave_nothing():
    """A server that reloads its model: the engine and its weights go with it."""

    def load_and_use():
        assert_fused(small(), images())

    for _ in range(3):
        load_and_use()
    before = objects()
    for _ in range(10):
        load_and_use()
    left = objects() - before
    assert left["Tensor"] + left["Parameter"] + left["Executor"] == 0, left.most_common(5)


@pytest.mark.fault(21)
def test_weights_changed_again_and_again():
    """Refolding writes anew and keeps nothing of before."""
    model = small()
    x = images()
    states = [small(seed=seed).state_dict() for seed in (1, 2)]

    def reload(count):
        for i in range(count):
            model.load_state_dict(states[i % 2])
            assert_fused(model, x)

    reload(5)
    before = objects()
    reload(40)
    left = objects() - before
    assert left["Tensor"] + left["Parameter"] < 10, left.most_common(5)
