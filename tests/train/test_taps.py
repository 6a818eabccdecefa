"""Convolutions without the taps that meet padding alone: the same numbers and gradients."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastres
from fastres.train.batches import Batches
from fastres.train.loop import fit
from fastres.train.taps import ReachedTaps

GIVEN = torch.Generator().manual_seed(11)
FORMS = list(itertools.product((1, 2, 3, 5), (1, 3), (1, 3, 5), (1, 2), (0, 1, 2), (1, 2)))


def both(conv, x):
    """Output and gradients, plain and in the mode; and whether the mode left out anything."""
    found = []
    with torch.no_grad():
        shape = conv(x).shape
    seed = torch.randn(shape, generator=GIVEN, dtype=x.dtype)
    for mode in (None, ReachedTaps()):
        inputs = x.clone().requires_grad_()
        conv.zero_grad()
        if mode is None:
            y = conv(inputs)
        else:
            with mode:
                y = conv(inputs)
        y.backward(seed)
        found.append([y.detach(), inputs.grad, *(p.grad.clone() for p in conv.parameters())])
    return *found, mode.found


def test_outputs_and_gradients_are_those_of_the_whole_convolution():
    left_out = 0
    for height, width, taps, stride, padding, dilation in FORMS:
        if min(height, width) + 2 * padding < dilation * (taps - 1) + 1:
            continue  # no output
        conv = nn.Conv2d(4, 6, taps, stride, padding, dilation, groups=2).double()
        x = torch.randn(3, 4, height, width, generator=GIVEN, dtype=torch.float64)
        plain, cut, found = both(conv, x)
        left_out += found
        for a, b in zip(plain, cut, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert 40 < left_out < len(FORMS)


@pytest.mark.parametrize(("size", "expected"), [(1, (1, 1)), (2, (3, 3)), (3, (3, 3))])
def test_which_taps_are_computed(size, expected, monkeypatch):
    """A 3x3 of one pixel has one tap; of four pixels it has all nine."""
    seen, real = [], torch.conv2d

    class Look(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is real:
                seen.append(tuple(args[1].shape[2:]))
            return func(*args, **(kwargs or {}))

    with Look(), ReachedTaps():
        nn.Conv2d(2, 2, 3, padding=1)(torch.randn(1, 2, size, size))
    assert seen == [expected]


def test_other_calls_are_left_alone():
    x, weight = torch.randn(2, 3, 1, 1, generator=GIVEN), torch.randn(4, 3, 3, 3, generator=GIVEN)
    with ReachedTaps() as mode:
        for y, options in (
            (F.conv2d(x, weight, None, 1, 1, 1, 1), {"padding": 1}),
            (F.conv2d(x, weight, padding="same"), {"padding": 1}),
        ):
            assert torch.equal(y, F.conv2d(x, weight, **options))
        assert nn.Conv2d(3, 4, 3, padding=1)(x[0]).shape == (4, 1, 1)
    assert not mode.found


def test_a_network_learns_the_same_with_them():
    """A ResNet-18 at 32x32, whose last stage has one pixel; the loss is in float32 in fit."""
    images = torch.randn(16, 3, 32, 32, generator=GIVEN, dtype=torch.float64)
    labels = torch.randint(0, 5, (16,), generator=GIVEN)
    torch.manual_seed(2)
    ours = fastres.create_model("resnet18", num_classes=5, planes=8).double()
    plain = copy.deepcopy(ours).train()
    before = ours.layer4[1].conv2.weight.detach().clone()
    options = {"batch_size": 8, "momentum": 0.0, "weight_decay": 0.0, "lr_scheduler": "constant"}
    run = fit(ours, images, labels, epochs=2, lr=0.01, progress=False, **options)
    optimizer = torch.optim.SGD(plain.parameters(), 0.01)
    batches = Batches(run.data, run.config, torch.device("cpu"))
    for batch in [*batches.order(0), *batches.order(1)]:
        optimizer.zero_grad()
        F.cross_entropy(plain(images[batch]), labels[batch]).backward()
        optimizer.step()
    found, expected = (net.layer4[1].conv2.weight.detach() - before for net in (ours, plain))
    assert float(expected.abs().max()) > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)
