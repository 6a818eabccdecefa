"""What may come in: layouts, sizes, dtypes, autocast; and what a wrong input or weight is told."""

import warnings

import pytest
import torch
from fused import assert_close, assert_fused, assert_plain, executions, images, plain, small
from torch import nn

from fastres import FastresError, ResNet
from fastres.backends import select
from fastres.errors import InputError

CHANNELS_LAST = torch.channels_last


def misaligned(x):
    buffer = torch.empty(x.numel() + 1, dtype=x.dtype)
    view = buffer[1:].view(x.shape)
    return view.copy_(x)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=CHANNELS_LAST),
    "expanded images": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded channels": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "flipped": lambda x: x.flip(3),
    "every second pixel": lambda x: x[:, :, ::2, ::2],
    "a crop": lambda x: x[:, :, 3:13, 2:15],
    "some channels": lambda x: torch.cat([x, x], 1)[:, 1:4],
    "transposed": lambda x: x.transpose(2, 3),
    "NHWC source": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "misaligned": misaligned,
    "one image": lambda x: x[:1],
    "one image, channels_last": lambda x: x[1:].contiguous(memory_format=CHANNELS_LAST),
    "no image": lambda x: x[:0],
    "one pixel": lambda x: x[:, :, :1, :1],
    "one row": lambda x: x[:, :, :1],
    "odd and not square": lambda x: images(2, 31)[:, :, :7, :],
}


@pytest.mark.fault(7)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("features", [False, True])
def test_layouts_and_sizes(layout, features):
    """With ``features`` the output is a map, whose strides must be PyTorch's as well."""
    model = small(Features if features else ResNet)
    x = layout(images())
    before = x.clone()
    assert_fused(model, x)
    assert_fused(model, images())
    assert torch.equal(x, before)


class Features(ResNet):
    """Returns the last feature map."""

    def _forward_impl(self, x):
        return self.forward_features(x)


@pytest.mark.fault(8)
def test_one_input_channel():
    """(N, 1, H, W) is dense in both layouts at once."""
    model, x = small(in_chans=1), images()[:, :1]
    assert_fused(model, x.contiguous())
    assert_fused(model, x.contiguous(memory_format=CHANNELS_LAST))


@pytest.mark.fault(3)
def test_the_imagenet_stem_takes_the_smallest_images():
    model = small(stem="imagenet")
    for size in (1, 2, 7, 33):
        assert_fused(model, images(2, size))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    assert_fused(small().to(dtype), images().to(dtype))


@pytest.mark.fault(14)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("place", "value"), [("pixel", float("nan")), ("pixel", float("inf")), ("weight", float("nan"))]
)
def test_nan_and_infinities_are_kept(dtype, place, value):
    """oneDNN's own fused ReLU would make 0 of NaN, and an ordinary answer of a spoilt image."""
    model, x = small().to(dtype), images().to(dtype)
    assert_fused(model, x)
    target = x[1] if place == "pixel" else model.layer1[0].conv1.weight.detach()[2]
    target[0, 2, 2] = value
    with torch.no_grad(), executions() as ran:
        out = model(x)
    assert len(ran) == 1
    assert out[1].isnan().all()
    assert torch.equal(out.isnan(), plain(model, x).isnan())


@pytest.mark.fault(15)
def test_overflow_in_float16_shows():
    model, x = small().half(), 2e4 * images(1).half()
    with torch.no_grad(), executions() as ran:
        assert not model(x).isfinite().any()
    assert len(ran) == 1
    assert not plain(model, x).isfinite().any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x[0], ValueError, r"x must be 4-D \(N, C, H, W\); got shape \(3, 16, 16\)"),
        (lambda x: x[:, :2], ValueError, r"x must have 3 channels \(axis 1\); got shape \(2, 2,"),
        (lambda x: x.permute(0, 2, 3, 1), ValueError, r"must have 3 channels.*\(2, 16, 16, 3\)"),
        (
            lambda x: x.double(),
            TypeError,
            "x must be torch.float32, the dtype of the weights; got torch.float64",
        ),
        (lambda x: (255 * x).to(torch.uint8), TypeError, "got torch.uint8"),
        (lambda x: x.half(), TypeError, "got torch.float16"),
        (lambda x: x[:, :, :0], ValueError, r"image is too small: input \(2, 3, 0, 16\)"),
    ],
)
@pytest.mark.parametrize("warm", [False, True])
def test_wrong_inputs_are_named(change, error, message, warm):
    """Also a RuntimeError, which is what callers of torchvision's models catch."""
    model = small()
    if warm:
        assert_fused(model, images())
    with torch.no_grad(), pytest.raises(error, match=message) as caught:
        model(change(images()))
    assert isinstance(caught.value, FastresError)
    assert isinstance(caught.value, RuntimeError)
    assert_fused(model, images())


@pytest.mark.fault(2)
def test_images_smaller_than_a_window():
    model = small()
    model.conv1 = nn.Conv2d(3, 8, 7, bias=False).eval()
    assert_fused(model, images(2, 7))
    message = r"image is too small: input \(2, 3, 6, 6\) leaves \(0, 0\) pixels at conv1"
    with torch.no_grad(), pytest.raises(InputError, match=message):
        model(images(2, 6))


@pytest.mark.fault(22)
def test_weights_elsewhere():
    model = small().to("meta")
    with torch.no_grad(), pytest.raises(InputError, match="x must be on meta.*got cpu"):
        model(images())
    assert_fused(adversarial_again(model), images())


def adversarial_again(model):
    model.to_empty(device="cpu").load_state_dict(small().state_dict())
    return model


def test_other_devices_run_as_pytorch():
    with torch.no_grad(), executions() as ran:
        assert small().to("meta")(images().to("meta")).shape == (2, 5)
    assert not ran


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, x = small(), images()
    half = small().to(dtype)
    with torch.autocast("cpu", dtype), torch.no_grad(), executions() as ran:
        outs = [model(x), model(x.to(dtype)), model(x)]
        expected = model._forward_impl(x)
        with torch.autocast("cpu", enabled=False):
            exact = model(x)
    assert len(ran) == 4
    for out in outs:
        assert out.dtype == expected.dtype == dtype
        assert_close(out, half, x.to(dtype))
    assert_close(exact, model, x)
    assert_fused(model, x)


class Widened(ResNet):
    """A step in the middle returns float32, as norms and softmax do under CUDA's autocast."""

    def _forward_impl(self, x):
        x = self.layer1(self.relu(self.bn1(self.conv1(x)))).float().softmax(1)
        return self.fc(self.layer2(x).float().mean((2, 3)))


def test_autocast_around_steps_that_widen():
    model, x = small(Widened), images()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), executions() as ran:
        out = model(x)
        expected = model._forward_impl(x)
    assert len(ran) == 1
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)  # a few roundings of bfloat16


@pytest.mark.parametrize("eligible", [torch.float64, torch.uint8])
def test_autocast_leaves_float64_and_integers_alone(eligible):
    model, x = small(), images().to(eligible)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), pytest.raises(TypeError):
        model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_fused(small().double(), images().double())


@pytest.mark.fault(32)
@pytest.mark.parametrize("variance", [-1.0, float("inf"), float("nan"), -1e-30])
def test_nonsense_variance_runs_as_pytorch_with_one_warning(variance):
    model, x = small(), images()
    norm = model.layer2[0].bn1
    saved = norm.running_var.clone()
    norm.running_var[3] = variance
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            with torch.no_grad(), executions() as ran:
                out = model(x)
            assert not ran
            torch.testing.assert_close(out, plain(model, x), equal_nan=True, rtol=0, atol=0)
    (warning,) = caught
    assert "ordinary PyTorch: layer2.0.bn1.running_var[3] is" in str(warning.message)
    norm.running_var.copy_(saved)
    assert_fused(model, x)


@pytest.mark.fault(32)
def test_a_refusal_ends_when_training_mends_the_statistics():
    model, x = small(), images()
    model.bn1.running_var[0] = -1
    with torch.no_grad(), pytest.warns(UserWarning, match="running_var"):
        model(x)
    model.train()
    model.bn1.running_var.data.fill_(1)
    assert_fused(model.eval(), x)


@pytest.mark.fault(32)
def test_a_refusal_ends_with_refresh():
    model, x = small(), images()
    model.bn1.running_var[0] = -1
    with torch.no_grad(), pytest.warns(UserWarning, match="running_var"):
        model(x)
    model.bn1.running_var.data.fill_(1)
    assert_plain(model, x)
    model.refresh()
    assert_fused(model, x)


@pytest.mark.fault(33)
def test_weights_too_large_for_half_precision():
    """float16 is refused, with advice; float32 of the same model stays fused."""
    model, x = small(), images()
    with torch.no_grad():
        model.bn1.weight[1], model.bn1.running_var[1] = 1e4, 1e-8
        model.bn1.eps = 1e-12
    assert_fused(model, x)
    advice = "does not fit torch.float16; use torch.bfloat16 or torch.float32"
    with torch.autocast("cpu", torch.float16), pytest.warns(UserWarning, match=advice):
        assert_plain(model, x)
    assert_fused(model, x)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.float16):
        warnings.simplefilter("error")
        assert_plain(model, x)


class Branching(ResNet):
    """Control flow that no tracer can follow."""

    def _forward_impl(self, x):
        return super()._forward_impl(x) if x.sum() > 0 else super()._forward_impl(-x)


class Convolutionless(ResNet):
    """Nothing to fold."""

    def _forward_impl(self, x):
        return torch.flatten(self.avgpool(x), 1)


@pytest.mark.fault(34)
@pytest.mark.parametrize(
    ("cls", "reason"),
    [(Branching, "Branching cannot be traced"), (Convolutionless, "has no convolution")],
)
def test_what_cannot_be_planned_runs_as_pytorch_with_one_warning(cls, reason):
    model, x = small(cls), images()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert_plain(model, x)
            assert_plain(model, -x)
    (warning,) = caught
    assert reason in str(warning.message)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(select, "_interpreting", lambda: False)
    model = small(backend="triton")
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="needs a CUDA device, got a CPU tensor"),
    ):
        model(images())
