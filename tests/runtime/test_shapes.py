"""Rows 1 to 4 through whole networks, on the CPU's engine and through the kernels.

The kernels run in Triton's interpreter where there is no GPU, on networks of a few channels.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fused import assert_close, assert_fused, executions, images, small
from helpers import adversarial_, real_images
from torch import nn

import fastres

BACKENDS = ["auto", pytest.param("triton", marks=pytest.mark.interpreter)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture
def launches():
    """How many kernels were launched since."""
    kernels = pytest.importorskip("fastres.kernels")
    before = sum(kernels.LAUNCHES.values())
    return lambda: sum(kernels.LAUNCHES.values()) - before


@pytest.mark.fault(1)
@pytest.mark.interpreter
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_an_empty_batch_launches_no_kernel(launches, stem):
    model = small(backend="triton", stem=stem)
    copied = fastres.optimize(model, backend="triton", verify=False)
    with torch.no_grad():
        for net in (model, copied):
            out = net(images()[:0])
            assert out.shape == (0, 5)
            assert out.dtype == torch.float32
    assert launches() == 0
    with torch.no_grad():
        model(images(1, 8))
    assert launches() > 6


@pytest.mark.fault(1)
def test_an_empty_batch_of_every_output(backend):
    """Feature maps and tuples have their own sizes with no image too."""

    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, 2)
            self.pool = nn.AvgPool2d(2)

        def forward(self, x):
            x = self.conv(x).relu()
            return x, self.pool(x)

    net = adversarial_(Maps())
    x = images(2, 9)[:0]
    outputs = fastres.optimize(net, backend=backend, verify=False)(x)
    assert [t.shape for t in outputs] == [t.shape for t in net(x)] == [(0, 4, 4, 4), (0, 4, 2, 2)]


@pytest.mark.fault(2)
def test_too_small_for_a_window_names_the_sizes(backend):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)).eval()
    fast = fastres.optimize(net, backend=backend, verify=False)
    assert fast(images(1, 8)).shape == (1, 4, 1, 1)
    for size, left in ((7, r"\(0, 0\)"), (3, r"\(0, 0\)"), (1, r"\(-1, -1\)")):
        message = rf"image is too small: input \(1, 3, {size}, {size}\) leaves {left} pixels"
        with pytest.raises(ValueError, match=message):
            fast(images(1, size))


@pytest.mark.fault(3)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (223, 223), (225, 225), (224, 320)], ids=str)
def test_odd_and_oblong_images(size):
    model = adversarial_(fastres.resnet18(num_classes=10))
    x = real_images(2, max(size))[:, :, : size[0], : size[1]]
    assert_fused(model, x)
    assert_fused(model, x.contiguous(memory_format=torch.channels_last))


@pytest.mark.sample(2)
@pytest.mark.fault(3)
@pytest.mark.interpreter
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (13, 6), (2, 17)], ids=str)
def test_odd_and_oblong_images_through_the_kernels(launches, size):
    model = small(backend="triton", stem="imagenet")
    x = images(8, 17)[:, :, : size[0], : size[1]]
    assert_fused(model, x)
    assert launches() > 6


@pytest.mark.fault(4)
@pytest.mark.parametrize("channels", [1, 3, 5, 17, 65])
def test_channels_that_fill_no_tile(backend, channels):
    """Into, within and out of a network."""
    options = {"in_chans": channels, "planes": channels, "stem": "cifar", "backend": backend}
    model = adversarial_(fastres.ResNet(fastres.BasicBlock, [1], channels, **options))
    assert_fused(model, torch.randn(2, channels, 4, 3))


@pytest.mark.fault(4)
@pytest.mark.interpreter
@pytest.mark.parametrize("channels", [1, 3, 5, 17, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_kernel_on_channels_that_fill_no_tile(integers, channels, dtype):
    kernels = pytest.importorskip("fastres.kernels")
    x, w = integers(2, channels, 5, 4, dtype=dtype), integers(channels, channels, 3, 3, dtype=dtype)
    b = integers(channels)
    wide = {"upcast": True}
    assert torch.equal(
        kernels.conv2d(x, w, b, padding=1), kernels.conv2d_ref(x, w, b, padding=1, **wide).to(dtype)
    )
    rows, weight = integers(3, channels, dtype=dtype), integers(channels, channels, dtype=dtype)
    assert torch.equal(
        kernels.linear.linear(rows, weight, b),
        kernels.linear.linear_ref(rows, weight, b, **wide).to(dtype),
    )
    assert torch.equal(kernels.add_relu(x, -x.clone()), torch.zeros_like(x))
    assert torch.equal(kernels.relu(x), kernels.relu_ref(x))
    assert torch.equal(kernels.max_pool2d(x, 2), kernels.max_pool2d_ref(x, 2))
    averages = kernels.avg_pool2d(x, 2)  # four integers: exact in every dtype
    assert torch.equal(averages, kernels.avg_pool2d_ref(x, 2, **wide).to(dtype))
    mean = kernels.global_avg_pool(x[:, :, :4].contiguous(memory_format=torch.channels_last))
    assert torch.equal(mean, x[:, :, :4].double().mean((2, 3), keepdim=True).to(dtype))


@pytest.mark.fault(14)
def test_a_spoilt_image_spoils_no_other(backend):
    """Padding between images, tiles across them, and the in-place sums of a whole network."""
    model, x = small(backend=backend), images(3, 8)
    spoilt = x.clone()
    spoilt[1, 2, 0, 7] = float("nan")
    with torch.no_grad(), executions() as ran:
        clean, out = model(x), model(spoilt)
    assert len(ran) == 2
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    assert_close(clean, model, x)


BESIDE_THE_IMAGE = """
import torch, fastres
from torch import nn
net = nn.Sequential(nn.Conv2d(16, 16, 2, (1, 2), 3, (1, 2)), nn.BatchNorm2d(16), nn.ReLU()).eval()
x = torch.randn(2, 16, 7, 1)
fast = fastres.optimize(net, example_input=x)
for _ in range(20):
    torch.testing.assert_close(fast(x), net(x))
print(len(fast.plan().fallbacks))
"""


@pytest.mark.fault(3)
def test_a_dilated_window_beside_the_image():
    """oneDNN crashes the process on such a window in channels_last memory, so PyTorch keeps it."""
    done = subprocess.run(
        [sys.executable, "-c", BESIDE_THE_IMAGE],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1


@pytest.mark.fault(39)
@pytest.mark.parametrize("stride_on", ["3x3", "1x1"])
def test_both_strides_are_as_torchvisions_moved_there(stride_on):
    """torchvision has v1.5; v1 is the same network with the strides moved, which changes it."""
    torchvision = pytest.importorskip("torchvision")
    theirs = adversarial_(torchvision.models.resnet50())
    other = theirs(real_images(2, 64))
    if stride_on == "1x1":
        for stage in (theirs.layer2, theirs.layer3, theirs.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
        assert not torch.allclose(theirs(real_images(2, 64)), other, rtol=1e-2)
    ours = adversarial_(fastres.resnet50(stride_on=stride_on))
    ours.load_state_dict(theirs.state_dict())
    assert_fused(ours, real_images(2, 64))
    with torch.no_grad():
        assert_close(ours(real_images(2, 64)), theirs, real_images(2, 64))
