"""What several tests share: adversarial weights, real images, TF32."""

import copy
import functools
import importlib.util
import io
import pickle
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = (1e-5, 1e-3, 1e-1, 1e-2)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@torch.no_grad()
def adversarial_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give ``model`` in place weights under which no part of a batch norm can be forgotten.

    Norms get negative and zero gammas, non-zero betas and means, variances spread over a factor
    of 16 and another eps in each layer: one forgotten beta moves the logits by 0.06 at least. A
    convolution keeps the second moment of its input and a norm shrinks it a little, so that the
    identity path dominates: the largest activation is about 10 in ResNet-18, 200 in ResNet-152
    and 4000 in ResNet-110, far inside fp16. Returns the model in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, std: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * std

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    layer = 0
    for module in model.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight.copy_(normal(weight, weight[0].numel() ** -0.5))
            if bias is not None:
                bias.copy_(normal(bias, 0.3))
        elif hasattr(module, "eps"):
            module.eps = _EPS[layer % len(_EPS)]
            layer += 1
            if weight is not None:
                sign = torch.where(uniform(weight, 0, 1) < 0.5, -1.0, 1.0)
                keep = uniform(weight, 0, 1) >= 0.1
                gamma = sign * keep * uniform(weight, 0.5, 1.5)
                gamma[0], gamma[-1] = 0.0, -1.0
                weight.copy_(gamma)
                bias.copy_(normal(bias, 0.3))
            if getattr(module, "running_var", None) is not None:
                module.running_mean.copy_(normal(module.running_mean, 0.6))
                module.running_var.copy_(0.35 * 16 ** uniform(module.running_var, 0, 1))
    return model.eval()


def on(device: torch.device, value: Any) -> Any:
    """The tensors of a call, in dictionaries and tuples too, on a device; meta ones stay."""
    if isinstance(value, dict):
        return {key: on(device, inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return tuple(on(device, inner) for inner in value)
    return value.to(device) if isinstance(value, Tensor) and not value.is_meta else value


def copied(model: nn.Module, how: str) -> nn.Module:
    """A copy by ``how``: ``deepcopy``, ``copy``, ``pickle`` or ``torch.save``."""
    if how in ("deepcopy", "copy"):
        return getattr(copy, how)(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@contextmanager
def refused(error: type[Exception], message: str) -> Iterator[None]:
    """A call inside raises this error, and no kernel is launched."""
    from fastres.kernels import LAUNCHES

    before = LAUNCHES.total()
    with pytest.raises(error, match=message):
        yield
    assert LAUNCHES.total() == before


@functools.cache
def _photographs() -> tuple[Tensor, ...]:
    """scikit-learn's two photographs, (3, 427, 640) in [0, 1]: a Chinese temple and a flower."""
    from sklearn.datasets import load_sample_images

    return tuple(
        torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255
        for image in load_sample_images().images
    )


def real_images(n: int, size: int = 224, channels: int = 3) -> Tensor:
    """(n, channels, size, size): different crops of two photographs, normalised as for ImageNet.

    Other numbers of channels take the colours in turn.
    """
    photographs = _photographs()
    crops = []
    for i in range(n):
        photograph = photographs[i % len(photographs)]
        side = 427 - 37 * (i // 2 % 5)
        left = 53 * i % (photograph.shape[2] - side + 1)
        crop = photograph[:, :side, left : left + side]
        crops.append(F.interpolate(crop[None], (size, size), mode="bilinear", antialias=True))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (_IMAGENET_MEAN, _IMAGENET_STD))
    images = (torch.cat(crops) - mean) / std
    return images[:, [c % 3 for c in range(channels)]]


def nearest_tf32(x: Tensor) -> Tensor:
    """float32 values rounded to the eleven bits of TF32, one of them implied, ties away from 0."""
    mantissa, exponent = torch.frexp(x.double())
    steps = (mantissa.abs() * 2**11 + 0.5).floor() / 2**11
    return torch.ldexp(steps.copysign(mantissa), exponent).float()


def with_edit(module: types.ModuleType, old: str, new: str, folder: Path) -> types.ModuleType:
    """A kernels' module anew, with ``new`` in its source for ``old``, which stands there once."""
    assert module.__file__ is not None
    text = Path(module.__file__).read_text()
    assert text.count(old) == 1
    path = folder / "broken.py"  # a file, because Triton reads the source of what it compiles
    path.write_text(text.replace(old, new))
    name = f"{module.__name__}_broken"  # in the module's own package, as its relative imports need
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {spec.name: broken}):  # dataclasses look it up
        spec.loader.exec_module(broken)
    return broken
