"""The executor and its CPU backends: every form of a sum, weights in place, who serves what."""

import dataclasses
import itertools
import math

import pytest
import torch
from fused import images, small
from helpers import adversarial_
from torch import nn

from fastres.backends import select
from fastres.backends.select import AtenOps, OneDNNOps, select_ops
from fastres.errors import BackendError, FoldError
from fastres.graph import fold, plan, trace
from fastres.graph.ir import Conv2d, Flatten, MaxPool2d
from fastres.runtime.executor import Executor

CPU = torch.device("cpu")
onednn = pytest.mark.skipif(
    not isinstance(select_ops("torch", CPU, torch.float32), OneDNNOps), reason="needs oneDNN"
)


def build(module, method="forward"):
    return plan.build(fold.fold(trace.trace(module.eval(), method)))


def executor(module, ops=None, dtype=torch.float32, method="forward"):
    return Executor(build(module, method), module, ops or AtenOps(), dtype)


class Sum(nn.Module):
    """A convolution whose result is added to ``other(y)``, with or without ReLU."""

    def __init__(self, other, relu, bias=True, groups=1):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=bias)
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.other, self.relu = other, relu

    def forward(self, x):
        y = self.stem(x)
        z = self.conv(y) + self.other(self, y)
        return torch.relu(z) if self.relu else z


OTHERS = {
    "the stem's own result": lambda self, y: y,
    "one pixel": lambda self, y: y.mean((2, 3), keepdim=True),
    "one channel": lambda self, y: y[:, :1],
    "one image": lambda self, y: y[:1],
    "one row": lambda self, y: y[:, :, :1],
    "a parameter": lambda self, y: self.scale,
    "another rank": lambda self, y: y.sum((0, 1)),
    "a number": lambda self, y: y.shape[1],
    "not dense": lambda self, y: torch.cat([y, y], 1)[:, ::2],
    "NCHW": lambda self, y: y.contiguous(memory_format=torch.contiguous_format),
    "flipped": lambda self, y: y.flip(3),
    "float64": lambda self, y: y.double(),
    "larger": lambda self, y: torch.stack([y, y]),
}


@onednn
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_every_form_of_a_sum(other, relu, batch):
    """Fused where shapes and dtypes are equal, broadcast and promoted as PyTorch does elsewhere."""
    module = adversarial_(Sum(other, relu, bias=batch > 1, groups=1 + batch % 2))
    x = torch.randn(batch, 3, 5, 7)
    with torch.no_grad():
        expected = module(x)
        for ops in (AtenOps(), OneDNNOps()):
            out = executor(module, ops).run([x])
            assert out.dtype == expected.dtype
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)  # two float32 layers


@onednn
def test_onednn_packs_once_and_stays_right_for_other_sizes():
    model = small()
    made = executor(model, OneDNNOps(), method="_forward_impl")
    with torch.no_grad():
        for size in (16, 7, 40, 1):
            x = torch.randn(2, 3, size, size)
            expected = model._forward_impl(x)
            torch.testing.assert_close(made.run([x]), expected, rtol=1e-4, atol=1e-5)


@onednn
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(1, 3, 13, 6), (1, 2, 4, 9), (5, 3, 7, 6)])
def test_a_pool_in_portions_is_the_pool(shape, layout, monkeypatch):
    """Every geometry that PyTorch takes; distinct values, so that a wrong window shows."""
    monkeypatch.setattr("fastres.backends.aten.POOLED_BYTES", 4 * math.prod(shape) // 2)
    x = torch.randperm(math.prod(shape)).float().view(shape).sub(20)
    x[0, 0, 3, 2] = math.nan
    x = x.contiguous(memory_format=layout)
    tried = 0
    for k, s, p, d, up in itertools.product((1, 2, 3), (1, 2, 3), (0, 1), (1, 2), (False, True)):
        if p <= k // 2 and (k - 1) * d < shape[2]:
            op = MaxPool2d((k, k), (s, 1), (p, p), (d, 1), up)
            wanted, found = AtenOps().max_pool(op, x), OneDNNOps().max_pool(op, x)
            assert torch.equal(found.nan_to_num(-99), wanted.nan_to_num(-99)), op
            assert found.stride() == wanted.stride()
            tried += 1
    assert tried > 30


def test_refolding_writes_into_the_same_storage():
    """Captured graphs hold the addresses."""
    model, x = small(), images()
    made = executor(model, method="_forward_impl")
    before = [t.data_ptr() for pair in made._prepared.values() for t in pair]
    with torch.no_grad():
        made.run([x])
        model.load_state_dict(small(seed=2).state_dict())
        made.refold()
        torch.testing.assert_close(made.run([x]), model._forward_impl(x), rtol=1e-4, atol=1e-5)
    assert [t.data_ptr() for pair in made._prepared.values() for t in pair] == before
    assert made.folds == 2


def test_a_refold_that_fails_changes_nothing():
    model, x = small(), images()
    made = executor(model, method="_forward_impl")
    with torch.no_grad():
        out = made.run([x])
        model.load_state_dict(small(seed=2).state_dict())
        model.layer2[0].bn2.running_var[0] = -1
        with pytest.raises(FoldError):
            made.refold()
        assert torch.equal(made.run([x]), out)


def test_weights_born_in_inference_mode_can_be_refolded():
    model, x = small(), images()
    with torch.inference_mode():
        made = executor(model, method="_forward_impl")
        made.run([x])
    assert not any(t.is_inference() for pair in made._prepared.values() for t in pair)
    with torch.no_grad():
        made.refold()


@onednn
def test_observed_runs_keep_every_operand():
    """Nothing in place: each operand still holds what the step saw, and the answer is the same."""
    model, x = small(), images()
    made = executor(model, OneDNNOps(), method="_forward_impl")
    seen = []

    def observe(step, operands, result):
        seen.append((step, operands, [o.clone() for o in operands], result, result.clone()))

    with torch.no_grad():
        out = made.run([x], observe)
        torch.testing.assert_close(out, made.run([x]))
    assert [step.name for step, *_ in seen] == [step.name for step in made.plan.steps]
    for step, operands, copies, result, at_once in seen:
        assert all(map(torch.equal, operands, copies)), step.name
        assert torch.equal(result, at_once), step.name


def test_activations_are_channels_last_inside():
    model, x = small(), images()
    made = executor(model, method="_forward_impl")
    layouts = {}

    def observe(step, operands, result):
        if isinstance(step.op, Flatten):
            assert result.is_contiguous()
        elif result.dim() == 4 and result.shape[2] > 1:
            layouts[step.name] = result.is_contiguous(memory_format=torch.channels_last)

    with torch.no_grad():
        made.run([x], observe)
    assert all(layouts.values())
    assert len(layouts) == 6


def test_checks_are_done_once_for_each_shape(monkeypatch):
    model = small()
    made = executor(model, method="_forward_impl")
    calls = []
    check = Executor._checked_schedule.__globals__["check_inputs"]
    monkeypatch.setattr(
        "fastres.runtime.executor.check_inputs",
        lambda *a: calls.append(a[1]["x"].shape) or check(*a),
    )
    with torch.no_grad():
        for size in (8, 9, 8, 8, 9):
            made.run([torch.randn(1, 3, size, size)])
    assert calls == [(1, 3, 8, 8), (1, 3, 9, 9)]


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float32, "onednn"), (torch.bfloat16, "onednn"), (torch.float64, "torch")],
)
def test_who_serves_the_cpu(dtype, name, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    for backend in ("auto", "torch"):
        assert select_ops(backend, CPU, dtype).name == name
        with torch.backends.mkldnn.flags(enabled=False):
            assert select_ops(backend, CPU, dtype).name == "torch"


@pytest.mark.parametrize(
    ("backend", "dtype", "triton", "name"),
    [
        ("auto", torch.float16, True, "triton"),
        ("auto", torch.float32, True, "triton"),
        ("auto", torch.float64, True, "cudnn"),
        ("auto", torch.float16, False, "cudnn"),
        ("torch", torch.float16, True, "cudnn"),
        ("triton", torch.float16, True, "triton"),
    ],
)
def test_who_serves_cuda(backend, dtype, triton, name, monkeypatch):
    monkeypatch.setattr(select, "_has_triton", lambda: triton)
    monkeypatch.setattr(select, "architecture_of", lambda device: "sm_90")
    if name == "triton":
        pytest.importorskip("triton")
    assert select_ops(backend, torch.device("cuda"), dtype).name == name


def test_backends_are_named_when_wrong():
    with pytest.raises(ValueError, match="'auto', 'triton', 'torch', got 'tpu'"):
        select_ops("tpu", CPU, torch.float32)


def test_triton_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fastres.kernels", None)
    monkeypatch.delattr("fastres.kernels", raising=False)
    with pytest.raises(BackendError, match="backend='triton' needs the package triton"):
        select_ops("triton", torch.device("cuda"), torch.float16)


@pytest.mark.fault(17)
def test_precision_follows_torchs_flags(monkeypatch):
    """The old flags and the new ones, and the higher level where the lower is not set."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    saved = cudnn.allow_tf32, matmul.allow_tf32
    try:
        for allowed, name in ((True, "tf32"), (False, "ieee")):
            cudnn.allow_tf32 = matmul.allow_tf32 = allowed
            assert select.conv_precision() == name
            assert select.matmul_precision() == name
        torch.set_float32_matmul_precision("high")
        assert select.matmul_precision() == "tf32"
        assert select.conv_precision() == "ieee"
        torch.set_float32_matmul_precision("highest")
        assert select.matmul_precision() == "ieee"
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = saved


def test_steps_are_plain_data():
    """An executor is a function of plan, module and backend: nothing in the plan is changed."""
    model = small()
    built = build(model, "_forward_impl")
    made = Executor(built, model, AtenOps(), torch.float32)
    assert made.plan.steps == built.steps
    assert dataclasses.replace(made.plan, kernels=()) == built
    assert made.plan.kernels.count("aten conv2d") == sum(
        isinstance(step.op, Conv2d) for step in built.steps
    )
