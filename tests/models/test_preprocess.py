"""8-bit images into the engine: torchvision's normalisation, folded exactly, borders included."""

import copy

import numpy as np
import pytest
import torch
from helpers import adversarial_, real_images
from tolerance import allowed_error
from torch import nn
from torchvision.models import ResNet50_Weights
from torchvision.transforms import v2
from torchvision.transforms.functional import convert_image_dtype, normalize

import fastres
from fastres import BasicBlock, Normalize, ResNet
from fastres.errors import InputError, InputTypeError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def pixels():
    """(3, 3, 40, 33) photographs as they come, no two sides alike."""
    images = real_images(3, 40)[:, :, :, :33]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).contiguous()


def network(**kwargs):
    return adversarial_(ResNet(BasicBlock, [1, 1], num_classes=6, planes=8, **kwargs))


def torchvisions(pixels, dtype=torch.float32):
    return normalize(convert_image_dtype(pixels, dtype), MEAN, STD)


def nhwc(pixels):
    return pixels.permute(0, 2, 3, 1).contiguous()


def test_unfused_it_is_torchvisions_bit_for_bit(pixels):
    assert torch.equal(Normalize(MEAN, STD)(pixels), torchvisions(pixels))
    assert torch.equal(Normalize(MEAN, STD, layout="NHWC")(nhwc(pixels)), torchvisions(pixels))


def test_unfused_it_is_the_second_versions_but_for_rounding(pixels):
    """v2 multiplies by 1/255 where v1 divides by 255."""
    v2s = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    torch.testing.assert_close(Normalize(MEAN, STD)(pixels), v2s(pixels), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_folded_it_is_exact(pixels, layout, stem):
    """In float64; a border filled with 0 instead of the mean would be off by 0.1 and more."""
    model = nn.Sequential(Normalize(MEAN, STD, layout=layout), network(stem=stem)).eval().double()
    x = nhwc(pixels) if layout == "NHWC" else pixels
    fast = fastres.optimize(model, example_input=x)
    with torch.no_grad():
        wanted = model[1](torchvisions(pixels, torch.float64))
    torch.testing.assert_close(fast(x), wanted, rtol=1e-11, atol=1e-11)
    assert not fast.plan().fallbacks
    conv = next(step for step in fast.plan().steps if step.where.endswith("conv1"))
    assert (conv.op.images.module, conv.op.padding) == ("0", (0, 0))


def test_a_border_matters_here(pixels):
    """That the test above could fail: the network sees the first pixels differently without it."""
    model = network().double()
    images = torchvisions(pixels, torch.float64)
    padded = nn.functional.pad(images, (3, 3, 3, 3), value=0.1)
    conv = copy.deepcopy(model.conv1)
    conv.padding = (0, 0)
    with torch.no_grad():
        assert float((conv(padded) - model.conv1(images)).abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_at_least_as_exact_as_normalised_images(pixels, dtype):
    source = nn.Sequential(Normalize(MEAN, STD), network()).eval()
    exact = copy.deepcopy(source).double()
    fast = fastres.optimize(source, example_input=pixels, dtype=dtype)
    plain = fastres.optimize(source[1], dtype=dtype, verify=False)
    with torch.no_grad():
        wanted = exact(pixels)
        images = torchvisions(pixels)
    error = float((fast(pixels).double() - wanted).norm())
    usual = float((plain(images).double() - wanted).norm())
    # Both round everywhere behind the first layer: between one and two times the usual error.
    assert error <= allowed_error(usual, float(wanted.norm()), dtype, ulps=8)
    assert fast(pixels).dtype is dtype


def test_casts_leave_the_numbers_alone(pixels):
    model = nn.Sequential(Normalize(MEAN, STD)).bfloat16()
    wanted = torchvisions(pixels).bfloat16()
    assert torch.equal(model(pixels), wanted)
    assert torch.equal(model.float()(pixels), torchvisions(pixels))
    assert not model.state_dict()


def test_groups(pixels):
    """Input channels of a group belong to the group's own part of the weights."""
    images = torch.cat([pixels, pixels.flip(3)], 1)
    conv = nn.Conv2d(6, 8, 3, padding=1, groups=2)
    mean, std = [0.1, 0.5, 0.9, 0.2, 0.6, 0.4], [0.3, 0.1, 0.2, 0.5, 0.7, 0.9]
    model = adversarial_(nn.Sequential(Normalize(mean, std), conv, nn.BatchNorm2d(8))).double()
    fast = fastres.optimize(model, example_input=images)
    with torch.no_grad():
        torch.testing.assert_close(fast(images), model(images), rtol=1e-11, atol=1e-11)
    assert len(fast.plan().steps) == 2


class Twice(nn.Module):
    """The normalised images have two readers."""

    def __init__(self):
        super().__init__()
        self.normalize = Normalize(MEAN, STD)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images):
        x = self.normalize(images)
        return self.conv(x) + x


@pytest.mark.parametrize(
    "build",
    [
        Twice,
        lambda: nn.Sequential(Normalize(MEAN, STD), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3)),
        lambda: nn.Sequential(
            Normalize(MEAN, STD), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        ),
    ],
)
def test_what_cannot_be_folded_is_still_right(pixels, build):
    model = adversarial_(build()).double()
    fast = fastres.optimize(model, example_input=pixels)
    with torch.no_grad():
        torch.testing.assert_close(fast(pixels), model(pixels))
    assert "normalisation" in fast.plan().fallbacks[0][1]


def test_saved_compiled_and_exported(pixels, tmp_path):
    model = nn.Sequential(Normalize(MEAN, STD, layout="NHWC"), network()).eval()
    fast = fastres.optimize(model, example_input=nhwc(pixels))
    wanted = fast(nhwc(pixels))
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(nhwc(pixels)), wanted)
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(fast, (nhwc(pixels),), dynamic_shapes=batch)
    torch.testing.assert_close(program.module()(nhwc(pixels[:2])), wanted[:2])
    fastres.save(fast, tmp_path / "m.safetensors")
    assert torch.equal(fastres.load(tmp_path / "m.safetensors")(nhwc(pixels)), wanted)
    fast.warmup([(1, 40, 33, 3)])


def test_numbers_from_others():
    preset = Normalize.like(ResNet50_Weights.IMAGENET1K_V2.transforms())
    assert preset.mean.tolist() == list(MEAN)
    assert Normalize.like({"mean": MEAN, "std": STD, "crop_pct": 1}).std.tolist() == list(STD)
    processor = type("Processor", (), {"image_mean": [0.5], "image_std": [0.25]})()
    assert Normalize.like(processor).mean.tolist() == [0.5]
    arrays = Normalize(np.array(MEAN), torch.tensor(STD, dtype=torch.float64))
    assert (arrays.mean.tolist(), arrays.std.tolist()) == (list(MEAN), list(STD))
    with pytest.raises(TypeError, match="no mean and std; got dict"):
        Normalize.like({})


@pytest.mark.parametrize("fuse", [False, True])
def test_other_images_are_refused(pixels, fuse):
    model = nn.Sequential(Normalize(MEAN, STD), network()).eval()
    run = fastres.optimize(model, verify=False) if fuse else model
    with pytest.raises(InputTypeError, match=r"uint8 tensor; got torch\.float32"):
        run(pixels.float())
    with pytest.raises(InputError, match=r"must be \(N, 3, H, W\); got shape \(3, 40, 33, 3\)"):
        run(nhwc(pixels))
    with pytest.raises(InputError, match="got shape"):
        run(pixels[0])


def test_arguments():
    for arguments, message in (
        (((0.1,), (0.2, 0.3)), "as long; got 1 and 2"),
        (((), ()), "mean must have a finite number for each channel"),
        (((0.1,), (float("nan"),)), "std must have a finite number for each channel"),
        (((0.1,), (0.0,)), "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            Normalize(*arguments)
    with pytest.raises(TypeError, match=r"mean must have a number for each channel; got 0\.5"):
        Normalize(0.5, 0.5)
    with pytest.raises(ValueError, match="NCHW, NHWC; got 'HWC'"):
        Normalize(MEAN, STD, layout="HWC")
