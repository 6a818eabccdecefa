"""Whole networks through the Triton engine, in the interpreter where there is no GPU."""

import copy
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fused import assert_close, plain, rms, shallow, small
from helpers import adversarial_, real_images
from tolerance import allowed_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastres
from fastres.backends import select
from fastres.graph.ir import Conv2d, Linear
from fastres.runtime.executor import Executor

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

# Ways of getting memory, looking at it differently or filling it from elsewhere: no arithmetic.
MEMORY = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "view",
    "_unsafe_view",
    "_reshape_alias",
    "as_strided",
    "permute",
    "reshape",
    "flatten",
    "contiguous",
    "slice",
    "set_",
    "zero_",
    "zeros",
    "new_zeros",
    "detach",
    "alias",
    "clone",
    "copy_",
    "_to_copy",
}


class Recorded(TorchDispatchMode):
    """Names of the aten operators that run meanwhile."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches():
    """The kernels' own count of launches, from zero."""
    from fastres.kernels import LAUNCHES

    LAUNCHES.clear()
    return LAUNCHES


def run(model, x):
    """The live model's answer, by its executor under a mode that sees every aten operator."""
    model(x[:0])
    (runner,) = model._live()._runners.values()
    with Recorded() as recorded:
        out = runner.executor.run([x])
    return out, recorded.seen, runner.executor.plan


def assert_whole_network(model, size, device, launches, convolutions):
    model.to(device)
    x = real_images(1, size).to(device)
    with torch.inference_mode():
        out, seen, plan = run(model, x)
    assert not plan.fallbacks
    assert set(seen) <= MEMORY, "PyTorch computed something"
    assert all(s == "view" or s.startswith("triton ") for s in plan.kernels)
    # One for most convolutions, though a kernel may serve two; pools and the classifier besides.
    assert 0.75 * convolutions <= sum(launches.values()) <= convolutions + 4
    exact = plain(copy.deepcopy(model).double(), x.double())
    errors = [
        rms(plain(model, x.contiguous(memory_format=layout)) - exact)
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    # Full float32 products: the rule of two, and a rounding of the logits on top.
    assert rms(out - exact) <= allowed_error(max(errors), rms(exact), torch.float32, ulps=1)


@pytest.mark.slow
def test_resnet18(device, launches):
    assert_whole_network(
        shallow("resnet18", 1, planes=32, backend="triton"), 32, device, launches, 12
    )


@pytest.mark.sweep
def test_resnet50(device, launches):
    assert_whole_network(
        shallow("resnet50", 2, planes=32, backend="triton"), 32, device, launches, 29
    )


def test_cifar_network_with_projections(device, launches):
    model = adversarial_(fastres.create_model("resnet20", backend="triton", shortcut="B"))
    assert_whole_network(model, 16, device, launches, 21)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_by_steps(device, launches, dtype):
    from fastres.runtime.verify_steps import verify_steps

    model = small(backend="triton").to(device, dtype)
    x = real_images(1, 16).to(device, dtype)
    with torch.inference_mode():
        out, seen, plan = run(model, x)
    (runner,) = model._live()._runners.values()
    found = verify_steps(runner.executor, model, [x])
    assert out.dtype is dtype
    assert len(found) == sum(isinstance(s.op, (Conv2d, Linear)) for s in plan.steps) == 7
    assert [error for error in found if not error.ok] == []
    assert set(seen) <= MEMORY
    assert sum(launches.values()) >= 9


def test_layouts_batches_and_refolding(device):
    model = small(backend="triton").to(device)
    x = real_images(3, 8).to(device)
    with torch.no_grad():
        for view in (
            x,
            x.contiguous(memory_format=torch.channels_last),
            x[:1].expand(2, -1, -1, -1),
        ):
            assert_close(model(view), model, view)
        assert model(x[:0]).shape == (0, 5)
        model.load_state_dict(small(seed=2).state_dict())
        assert_close(model(x), model, x)


class Mixed(nn.Module):
    """Every kind of step: grouped and dilated convolutions, both pools, sums, PyTorch calls."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.norm, self.last = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x)))
        y = nn.functional.max_pool2d(y, 2, ceil_mode=True)
        z = self.grouped(y) + y.mean((2, 3), keepdim=True)
        w = torch.relu(self.last(z * torch.sigmoid(y)) + y)
        w = nn.functional.avg_pool2d(w, 3, 1, 1, count_include_pad=False) + x.shape[0]
        return torch.relu(self.fc(torch.relu(w.sin()).mean([2, 3])))


def test_every_kind_of_step(device, launches):
    source = adversarial_(Mixed()).to(device)
    x = real_images(2, 13).to(device)
    fast = fastres.optimize(source, backend="triton", example_input=x)
    launches.clear()
    assert_close(fast(x), source, x)
    assert fast.verification.ok
    served = {s for s in fast.plan().kernels if s}
    assert {"triton conv2d", "triton max_pool2d", "triton avg_pool2d", "triton linear"} <= served
    assert sum(launches.values()) >= 6


def test_a_broken_kernel_is_seen(device, monkeypatch):
    """The reference is PyTorch's own network, never the kernels' ``_ref``."""
    from fastres import kernels

    conv = kernels.conv2d
    monkeypatch.setattr(kernels, "conv2d", lambda *a, relu=False, **k: conv(*a, relu=True, **k))
    model = small(backend="triton").to(device)
    x = real_images(1, 8).to(device)
    with torch.no_grad(), pytest.raises(AssertionError):
        assert_close(model(x), model, x)


def test_wrong_inputs_launch_nothing(device, launches):
    model = small(backend="triton").to(device)
    x = real_images(1, 8).to(device)
    with torch.no_grad():
        for wrong in (x[:, :2], x.double(), x[0], x[:, :, :0]):
            with pytest.raises((ValueError, TypeError)):
                model(wrong)
    assert not launches


def test_all_backends_agree(device):
    x = real_images(1, 12).to(device)
    exact = plain(small().to(device).double(), x.double())
    for backend in select.BACKENDS:
        model = small(backend=backend).to(device)
        with torch.no_grad():
            assert rms(model(x) - exact) <= 1e-5 * rms(exact)  # float32 over 8 layers
            assert rms(model(x) - exact) > 0


def test_the_executor_needs_no_model(device):
    """A plan, a module to look parameters up in, and a backend: nothing else."""
    from fastres.graph import fold, plan, trace

    source = adversarial_(Mixed()).to(device)
    built = plan.build(fold.fold(trace.trace(source)))
    executor = Executor(built, source, select.TritonOps(), torch.float32)
    x = real_images(1, 9).to(device)
    with torch.no_grad():
        assert_close(executor.run([x]), source, x)


def test_six_frames_from_a_call_to_a_launch(device):
    """Of a fused copy's plain convolution: fewer layers are easier to read and to debug."""
    if device != "cpu":
        pytest.skip("the stack is the same, and a GPU's launch is not seen")
    from fastres.kernels import _common

    stacks = []

    def run(kernel, *rest):
        stacks.append([Path(frame.filename).parts for frame in traceback.extract_stack()])
        interpreter.run(kernel, *rest)

    interpreter = _common.host(torch.device("cpu"))
    source = nn.Conv2d(3, 8, 3).eval()
    model = fastres.optimize(source, backend="triton", example_input=torch.ones(1, 3, 8, 8))
    with _common.hosted(replace(interpreter, run=run)):
        model(torch.ones(1, 3, 8, 8))
    ours = [parts[-2:] for parts in stacks[0] if {"fastres", "kernels"} & set(parts[-3:-1])]
    assert ours.pop() == ("kernels", "_common.py")  # launch itself
    assert len(ours) <= 6, ours
