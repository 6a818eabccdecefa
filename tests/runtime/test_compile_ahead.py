"""When kernels compile ahead of a run: once for each kind of run, and for all of a warm-up."""

from contextvars import copy_context

import pytest
import torch
from fused import small
from torch import nn

import fastres
from fastres.backends import select
from fastres.backends.aten import AtenOps
from fastres.backends.triton import FAILED
from fastres.graph import fold, plan, trace
from fastres.runtime import cuda_graph
from fastres.runtime.executor import Executor


class Recording(AtenOps):
    """Notes what is compiled ahead, and what then runs."""

    def __init__(self):
        self.events = []

    def compile_ahead(self, run, device, tell=None):
        before = len(self.events)
        run()
        ran = len(self.events) - before
        del self.events[before:]
        self.events.append(("ahead", ran))
        if tell is not None:
            tell(ran, ran)

    def conv(self, *args, **others):
        self.events.append("conv")
        return super().conv(*args, **others)


def executor(model):
    built = plan.build(fold.fold(trace.trace(model, "_forward_impl")))
    return Executor(built, model, Recording(), torch.float32)


def events(made):
    found, made.ops.events[:] = list(made.ops.events), []
    return found


def images(size=8, batch=1):
    return torch.randn(batch, 3, size, size)


@torch.no_grad()
def test_the_first_run_of_a_kind_is_compiled_before_it_runs():
    made = executor(small())
    made.run([images()])
    first = events(made)
    convolutions = first.count("conv")
    assert first == [("ahead", convolutions), *["conv"] * convolutions]
    assert convolutions > 1
    made.run([images()])
    assert ("ahead", convolutions) not in events(made)
    made.run([images(batch=2)])
    assert events(made)[0] == ("ahead", convolutions)


@torch.no_grad()
def test_a_run_that_is_observed_has_other_kernels_and_shows_only_what_was_computed():
    made, seen = executor(small()), []
    made.run([images()])
    events(made)
    made.run([images()], lambda step, operands, result: seen.append(step.name))
    assert events(made)[0][0] == "ahead"
    assert len(seen) == len(made.plan.steps)


@torch.no_grad()
def test_what_pytorch_is_to_run_never_sees_what_was_not_computed():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return torch.nn.functional.softmax(self.conv(x), 1)

    model = Looks().eval()
    made = Executor(plan.of_module(model), model, Recording(), torch.float32)
    assert made.plan.fallbacks
    made.run([images()])
    assert events(made) == ["conv"]


def test_a_warm_up_compiles_all_shapes_first_and_tells_how_far_it_is():
    made, calls, told = executor(small()), [], []
    cuda_graph.warm_up(
        lambda x: calls.append((tuple(x.shape), len(events(made)))),
        [(1, 3, 8, 8), (2, 3, 8, 8)],
        torch.device("cpu"),
        torch.float32,
        made,
        lambda *state: told.append(state),
    )
    assert [shape for shape, _ in calls] == [(1, 3, 8, 8)] * 2 + [(2, 3, 8, 8)] * 2
    assert calls[0][1] == 1, "one pass over both shapes, before the first call"
    kernels = told[0][0]
    assert told == [(kernels, kernels + 2), (kernels + 1, kernels + 2), (kernels + 2, kernels + 2)]
    assert kernels > 2
    with torch.no_grad():
        made.run([images(batch=2)])
    assert events(made)[0] == "conv", "nothing is left to compile"


@pytest.mark.parametrize("kind", ["live", "frozen"])
def test_models_warm_up_by_their_executors(monkeypatch, kind):
    """So that what is compiled ahead is the plan, and no check of first calls sees garbage."""
    given, told = [], []
    model = fastres.ResNet(fastres.BasicBlock, [1], num_classes=3, stem="cifar", planes=8).eval()
    if kind == "frozen":
        model = fastres.optimize(model, example_input=images())
    monkeypatch.setattr(
        Executor, "compile_ahead", lambda self, calls, *rest, **_: given.append((self, list(calls)))
    )
    model.warmup([(1, 3, 8, 8), (3, 3, 8, 8)], progress=lambda *state: told.append(state))
    made, calls = given[0]
    with torch.inference_mode():
        serves = model.executor() if kind == "frozen" else model._live().executor_for(images())
    assert made is serves
    assert [tuple(x.shape) for (x,) in calls] == [(1, 3, 8, 8), (3, 3, 8, 8)]
    assert told == [(1, 2), (2, 2)]


def test_a_kernel_that_fails_in_the_pass_is_left_to_the_run():
    """There it is told, and another backend goes on."""
    kernels = pytest.importorskip("fastres.kernels")
    ops, error = select.TritonOps(), kernels.KernelError("no ptxas", torch.device("cpu"))
    ops.falls_back = True
    told = copy_context()
    told.run(kernels.COMPILING.set, True)
    assert told.run(ops.instead, error, torch.device("cpu")) is None
    assert not FAILED
