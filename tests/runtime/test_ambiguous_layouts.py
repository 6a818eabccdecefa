"""Row 8: sizes of one, whose memory is dense in both layouts at once, through whole plans."""

import pytest
import torch
from fused import executions, images, small
from helpers import adversarial_
from torch import nn

import fastres
from fastres.runtime.verify_steps import verify_steps


class Kept(nn.Module):
    """A sum whose second term is an output too, so that it may not be overwritten."""

    def __init__(self, channels, relu):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.ReLU() if relu else nn.Identity()

    def forward(self, x):
        x = self.first(x)
        return x, self.last(self.second(x) + x)


@pytest.mark.fault(8)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (4, 4)])
def test_a_residual_that_must_be_kept(channels, size, relu):
    """oneDNN's sum refuses memory that is dense both ways unless it may write into it."""
    net, x = adversarial_(Kept(channels, relu)), torch.randn(2, 3, *size)
    fast = fastres.optimize(net, verify=False)
    last = fast.plan().steps[-1]
    assert last.op.residual
    assert not last.in_place
    with torch.no_grad():
        pairs = zip(net(x), fast(x), strict=True)
    for wanted, got in pairs:
        torch.testing.assert_close(got, wanted)  # float32's own tolerance: 1e-6 of values near 1


@pytest.mark.fault(8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_step_of_a_network_that_ends_in_one_pixel(dtype):
    """While steps are observed nothing is computed in place."""
    model, x = adversarial_(fastres.resnet18(num_classes=5)), images(2, 32)
    fast = fastres.optimize(model, dtype=dtype, example_input=x)
    assert fast.verification.ok
    errors = verify_steps(fast.executor(), model, [x.to(dtype)])
    assert len(errors) == 21  # 20 convolutions and the classifier
    assert all(error.ok for error in errors)


@pytest.mark.fault(8)
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_strides_of_one_pixel_say_nothing(size, channels_last):
    """The same image under every stride that its sizes of one allow."""
    model, x = small(in_chans=1), images(1)[:, :1, : size[0], : size[1]].contiguous()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), executions() as ran:
        first = model(x)
        for strides in ((99, 99), (1, 1), (0, 0)):
            twin = x.as_strided(x.shape, (*strides, *x.stride()[2:]))
            assert torch.equal(model(twin), first)
    assert len(ran) == 4
