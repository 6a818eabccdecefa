"""8-bit plans through our kernels: the bytes of the definition, fallback, and what is chosen."""

from __future__ import annotations

import warnings

import pytest
import torch
from launches import auto_with_kernels, failing
from torch import nn

pytest.importorskip("triton")

import fastres
from fastres.backends import triton
from fastres.backends.aten import AtenOps
from fastres.backends.onednn_int8 import Int8Ops
from fastres.backends.select import select_int8_ops
from fastres.backends.triton_int8 import TritonInt8Ops
from fastres.errors import BackendError, InputError
from fastres.graph import plan as planning
from fastres.graph.ir import Grid
from fastres.kernels import COMPILING, LAUNCHES, KernelError
from fastres.models.digits import digits_split, load_digits_model
from fastres.runtime.executor import Executor
from tests.support.eight_bit import eight_bit_plan, engine
from tests.support.helpers import adversarial_

pytestmark = pytest.mark.interpreter
CPU = torch.device("cpu")


class Net(nn.Module):
    """A stem with its pool, a residual block, groups, 24 channels, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 7, 2, 3)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.a = nn.Conv2d(24, 24, 3, 1, 1, groups=3)
        self.b = nn.Conv2d(24, 24, 1)
        self.down = nn.Conv2d(24, 40, 1, 2)
        self.fc = nn.Linear(40, 5)

    def forward(self, x):
        x = self.pool(self.stem(x).relu())
        x = (self.b(self.a(x).relu()) + x).relu()
        return self.fc(self.down(x).relu().mean((2, 3)))


def network():
    torch.manual_seed(0)
    model = adversarial_(Net())
    x = (torch.randn(2, 3, 19, 17) * 64).round() / 64
    return model, x


def traced(made, x):
    """The output, and each step's result."""
    found = {}
    out = made.run([x], lambda step, _, result: found.update({step.name: result.clone()}))
    return out, found


@pytest.mark.fault(92)
@pytest.mark.parametrize("keep", [(), ("a",), ("stem", "down")], ids=str)
def test_every_byte_is_that_of_the_definition(keep):
    """Powers of two: nothing is left to rounding. Layers in floats stand between."""
    model, x = network()
    kept = {s.name for s in planning.of_module(model).steps if s.where in keep}
    plan = eight_bit_plan(model, x, kept)
    assert plan.eight_bit[0] == 4 - len(keep)
    due, steps = traced(engine(plan, model, Int8Ops()), x)
    launched = LAUNCHES["conv2d_kernel"]
    made = engine(plan, model, TritonInt8Ops())
    out, found = traced(made, x)
    assert LAUNCHES["conv2d_kernel"] == launched + 5  # and the linear layer
    assert sum(t.dtype is torch.uint8 for t in steps.values()) >= 4 - len(keep)
    for name, want in steps.items():
        assert found[name].dtype is want.dtype, name
        if not keep and want.dtype is torch.uint8:
            assert torch.equal(found[name], want), name
    assert torch.allclose(out, due, rtol=1e-5, atol=1e-5)
    assert torch.allclose(made.run([x]), due, rtol=1e-5, atol=1e-5)  # in place, in groups
    assert made.plan.kernels.count("triton conv2d, int8") == 4 - len(keep)


def test_the_plan_says_what_runs():
    model, x = network()
    made = engine(eight_bit_plan(model, x), model, TritonInt8Ops())
    kernels = dict(
        zip((type(s.op).__name__ for s in made.plan.steps), made.plan.kernels, strict=True)
    )
    assert kernels["Quantize"] == "triton to_bytes"
    assert kernels["MaxPool2d"] == "triton max_pool2d"
    assert kernels["Linear"] == "triton linear"


@pytest.mark.fault(92)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_first_layer_and_the_head_in_half_precision(dtype):
    """The first layer goes with its pool, in one kernel, and bytes begin behind them."""
    model, x = network()
    x = x.to(dtype)
    stem = next(s.name for s in planning.of_module(model).steps if s.where == "stem")
    plan = eight_bit_plan(model, x.float(), {stem})
    kinds = [type(step.op).__name__ for step in plan.steps]
    assert kinds[:4] == ["Conv2d", "MaxPool2d", "Quantize", "Conv2d"]
    due, steps = traced(engine(plan, model, Int8Ops(dtype), dtype), x)
    made = engine(plan, model, TritonInt8Ops(dtype), dtype)
    out, found = traced(made, x)
    assert {t.dtype for t in found.values()} == {torch.uint8, dtype}
    for name, want in steps.items():
        assert found[name].dtype is want.dtype, name
        if want.dtype is torch.uint8:  # a number that was rounded the other way is another byte
            assert (want.int() - found[name].int()).abs().max() <= 1, name
    eps = torch.finfo(dtype).eps
    assert (out - due).abs().max() <= 8 * eps * due.abs().max()
    (first, *_) = made.ops.candidates(plan, dtype, CPU)
    assert (first.kernel, len(first.steps)) == ("stem", 2)


@pytest.mark.slow
@pytest.mark.fault(92)
def test_digits_give_the_bytes_of_the_definition():
    """All 19 layers of the trained network, on images that it was not calibrated on."""
    model, (x, y) = load_digits_model(), digits_split("train")
    q = fastres.quantize(model, (x, y), images=64, calibrator="max")
    images, labels = (t[:16] for t in digits_split("heldout"))
    engines = [
        Executor(q.traced, q.kept, ops, torch.float32, q._step_weights)
        for ops in (Int8Ops(), TritonInt8Ops())
    ]
    (due, steps), (out, found) = (traced(made, images) for made in engines)
    for name, want in steps.items():
        if want.dtype is torch.uint8:  # scales are any: one unit where a half decides
            assert (want.int() - found[name].int()).abs().max() <= 1, name
    assert (out - due).abs().max() < 0.02 * due.abs().max()
    assert torch.equal(out.argmax(1), labels)


def test_what_is_chosen():
    assert type(select_int8_ops("triton", CPU, torch.float32)) is TritonInt8Ops
    assert type(select_int8_ops("triton", CPU, torch.float64)) is Int8Ops  # which verify compares
    with auto_with_kernels():
        ops = select_int8_ops("auto", CPU, torch.float32)
        assert isinstance(ops, TritonInt8Ops)
        assert ops.falls_back
        assert type(select_int8_ops("torch", CPU, torch.float32)) is not TritonInt8Ops
    assert TritonInt8Ops().most == 127


def test_triton_on_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr("fastres.backends.select._interpreting", lambda: False)
    with pytest.raises(BackendError, match="backend='triton' needs a CUDA device"):
        select_int8_ops("triton", CPU, torch.float32)


@pytest.mark.fault(88)
@pytest.mark.parametrize("falls_back", [True, False])
def test_a_kernel_that_fails_leaves_the_same_numbers_to_pytorch(falls_back):
    model, x = network()
    plan = eight_bit_plan(model, x)
    due = engine(plan, model, Int8Ops()).run([x])
    made = engine(plan, model, TritonInt8Ops())
    made.ops.falls_back = falls_back
    with auto_with_kernels(), failing(RuntimeError("Cannot find ptxas")):
        if not falls_back:
            with pytest.raises(KernelError, match="cannot run: RuntimeError: Cannot find ptxas"):
                made.run([x])
            assert not triton.FAILED
            return
        with pytest.warns(UserWarning, match="goes on without its Triton kernels on cpu"):
            assert torch.equal(made.run([x]), due)
    assert type(made.ops) is Int8Ops
    assert set(made.plan.kernels) >= {"aten conv2d, 8 bits in floats"}


@pytest.mark.fault(25)
def test_what_is_not_computed_yet_is_not_looked_at(monkeypatch):
    """Neither while kernels are compiled ahead nor while a CUDA graph is captured, where waiting
    for the GPU would break the capture off; a NaN is refused at every other call."""
    grid, bad = Grid(0.5, 0), torch.full((1, 3, 2, 2), float("nan"))
    with pytest.raises(InputError, match="hold NaN or infinity"):
        TritonInt8Ops().quantize(grid, bad)
    token = COMPILING.set(True)
    try:
        assert TritonInt8Ops().quantize(grid, bad).dtype is torch.uint8
    finally:
        COMPILING.reset(token)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for ops in (Int8Ops(), TritonInt8Ops()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of values outside of the grid
            ops.quantize(grid, bad)
            ops.quantize(grid, torch.full((1, 3, 2, 2), 1e4))
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="lie outside"):  # the first that may be looked at
        ops.quantize(grid, torch.full((1, 3, 2, 2), 1e4))


def test_no_fused_kernel_takes_steps_in_8_bits():
    model, x = network()
    made = engine(eight_bit_plan(model, x), model, TritonInt8Ops())
    groups = made.ops.candidates(made.plan, torch.float32, CPU)
    assert all(getattr(s.op, "x_grid", None) is None for group in groups for s in group.steps)
    assert isinstance(made.ops, AtenOps)
