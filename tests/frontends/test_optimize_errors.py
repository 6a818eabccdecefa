"""What ``optimize`` and its copies refuse, and how arguments are taken."""

import numpy as np
import pytest
import torch
from fused import small
from helpers import real_images
from torch import nn

import fastres
from fastres.errors import FastresError, FoldError


def test_moves_keep_dtypes_and_casts_are_refused():
    source, x = small(), real_images(2, 16)
    fast = fastres.optimize(source, dtype=torch.bfloat16, verify=False)
    before = {name: (b.dtype, b.clone()) for name, b in fast.named_parameters()}
    out = fast(x)
    for move in (lambda: fast.to("cpu"), lambda: fast.to(torch.bfloat16), fast.bfloat16, fast.cpu):
        assert move() is fast
    for name, buffer in fast.named_parameters():
        assert buffer.dtype is before[name][0]
        assert torch.equal(buffer, before[name][1])
    assert torch.equal(fast(x), out)
    for cast in (fast.half, fast.double, fast.float, lambda: fast.to("cpu", torch.float32)):
        with pytest.raises(
            TypeError, match="dtype of a FastModel is fixed.*optimize.source, dtype"
        ):
            cast()
    assert torch.equal(fast(x), out)


def test_training_and_gradients_are_refused():
    fast = fastres.optimize(small(), verify=False)
    x = real_images(2, 16)
    with pytest.raises(RuntimeError, match="for inference only"):
        fast.train()
    assert fast.eval() is fast
    assert fast.train(False) is fast
    with pytest.raises(ValueError, match="x requires grad, but a FastModel has no backward"):
        fast(x.requires_grad_())
    with torch.no_grad():
        assert not fast(x).requires_grad
    assert not fast(x.detach()).requires_grad


def test_arguments_are_bound_as_the_source_does():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, scale: float = 2.0):
            return {"out": self.conv(x) * scale}

    source = Scaled().eval()
    fast = fastres.optimize(source, example_input=(real_images(1, 8), 3.0))
    x = real_images(2, 8)
    for args, kwargs in (((x,), {}), ((x, 5.0), {}), ((), {"scale": 0.5, "x": x})):
        with torch.no_grad():
            torch.testing.assert_close(fast(*args, **kwargs), source(*args, **kwargs))
    for args, kwargs in (((), {}), ((x, 1.0, 2.0), {}), ((x,), {"size": 2})):
        with pytest.raises(TypeError, match="argument"):
            fast(*args, **kwargs)


@pytest.mark.parametrize("example", [real_images(2, 16)[:0], torch.full((1, 3, 16, 16), torch.inf)])
def test_examples_that_show_nothing_are_refused(example):
    with pytest.raises(ValueError, match="example_input is empty or not finite"):
        fastres.optimize(small(), example_input=example)


def negative_variance():
    source = small()
    source.layer2[0].bn2.running_var[1] = -1
    return source


def training_child():
    source = small()
    source.layer1[0].bn2.train()
    return source


def replaced_forward():
    source = small()
    source.forward = lambda x: x
    return source


def two_devices():
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1, device="meta")).eval()


def two_dtypes():
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1).half()).eval()


@pytest.mark.parametrize(
    ("make", "kwargs", "error", "message"),
    [
        (lambda: "resnet18", {}, TypeError, "model must be a torch.nn.Module; got str"),
        (lambda: small().train(), {}, ValueError, "the model is in training mode"),
        (training_child, {}, ValueError, "layer1.0.bn2 is in training mode"),
        (replaced_forward, {}, ValueError, "forward was replaced"),
        (negative_variance, {}, FoldError, r"layer2\.0\.bn2\.running_var\[1\] is -1"),
        (small, {"dtype": torch.int8}, TypeError, "dtype must be one of .*got torch.int8"),
        (small, {"dtype": "float17"}, TypeError, "dtype must be one of .*got 'float17'"),
        (small, {"backend": "cuda"}, ValueError, "backend must be one of .*got 'cuda'"),
        (small, {"example_input": real_images(1, 8)[0]}, ValueError, "must be 4-D"),
        (small, {"example_input": real_images(1, 8).double()}, TypeError, "got torch.float64"),
        (lambda: fastres.optimize(small(), verify=False), {}, TypeError, "is a FastModel already"),
        (two_devices, {}, ValueError, "on one device; got cpu, meta"),
        (lambda: small().to("meta"), {}, ValueError, "no weights to fold"),
        (
            two_dtypes,
            {"dtype": torch.half},
            ValueError,
            r"float32 \(0.weight\), torch.float16 \(1.weight\)",
        ),
        (lambda: torch.jit.script(small()), {}, TypeError, "model is of torch.jit"),
        (small, {"example_input": {"x": 1}}, TypeError, "example_input must be .*got dict"),
        (small, {"example_input": np.ones((1, 3, 8, 8))}, TypeError, "got ndarray"),
    ],
)
def test_wrong_arguments_are_named(make, kwargs, error, message):
    with pytest.raises(error, match=message) as caught:
        fastres.optimize(make(), **kwargs)
    assert isinstance(caught.value, (FastresError, TypeError, ValueError))
