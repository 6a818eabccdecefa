"""Each kind of model of the zoo, narrow and on small images, on fastres' own kernels."""

import copy
from dataclasses import replace

import pytest
import torch
from fused import rms
from helpers import adversarial_
from tolerance import allowed_error
from torch import nn
from torch.utils._pytree import tree_leaves

import fastres
from fastres.graph.ir import Call

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

NARROW = {"layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8), "stem_width": 4, "num_classes": 40}
V2 = {"layers": (1, 1), "channels": (16, 32), "stem_chs": 8, "num_classes": 40}


def timm(name: str, **options):
    return pytest.importorskip("timm").create_model(name, pretrained=False, **options)


def huggingface(layer_type: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[8, 16], depths=[1, 1], layer_type=layer_type, num_labels=40
    )
    return transformers.ResNetForImageClassification(config)


def bit() -> nn.Module:
    """Weights that are standardised at every call, and group norms of 32 groups."""
    create = pytest.importorskip("timm.models.resnetv2")._create_resnetv2_bit
    widths = {"layers": (1, 1, 1, 1), "channels": (128, 128, 128, 128), "stem_chs": 32}
    return create("resnetv2_50x1_bit", num_classes=40, **widths)


def torchvision_resnet() -> nn.Module:
    """ResNet-18 up to its first stage, the others being wide."""
    model = pytest.importorskip("torchvision.models").resnet18()
    model.layer2 = model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(64, 40)
    return model


def timm_byob(name: str, **options) -> nn.Module:
    """One of timm's networks of blocks, one block of each kind, a sixteenth as wide."""
    byobnet = pytest.importorskip("timm.models.byobnet")
    cfg = {**byobnet.model_cfgs, **pytest.importorskip("timm.models.byoanet").model_cfgs}[name]
    stages = [stage if isinstance(stage, tuple) else (stage,) for stage in cfg.blocks]
    blocks = tuple(tuple(replace(b, d=1, c=b.c // 16) for b in stage) for stage in stages)
    return byobnet.ByobNet(replace(cfg, blocks=blocks, stem_chs=8), num_classes=40, **options)


MODELS = {
    "timm resnet50d": lambda: timm("resnet50d", **NARROW),
    "timm resnet50_gn": lambda: timm(
        "resnet50_gn", **NARROW | {"channels": (32, 32, 32, 32), "output_stride": 8}
    ),
    "timm ecaresnet50d": lambda: timm("ecaresnet50d", **NARROW),
    "timm resnetaa50": lambda: timm("resnetaa50", **NARROW),
    "timm resnetv2_50": lambda: timm("resnetv2_50", **V2),
    "timm resnetv2_50x1_bit": bit,
    "timm convnext_atto": lambda: timm(
        "convnext_atto", depths=(1, 1, 1, 1), dims=(4, 8, 8, 16), num_classes=40
    ),
    "timm seresnet50": lambda: timm("seresnet50", **NARROW),
    "timm gcresnet": lambda: timm_byob("gcresnet50t"),
    "timm botnet": lambda: timm_byob("botnet26t", img_size=32),
    "torchvision resnet18": torchvision_resnet,
    "Hugging Face bottleneck": lambda: huggingface("bottleneck"),
    "Hugging Face basic": lambda: huggingface("basic"),
}


SAMPLE = ("timm resnet50d", "timm resnetv2_50")


@pytest.mark.fault(66)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow if n in SAMPLE else pytest.mark.sweep])
        for n in MODELS
    ],
)
def test_models_of_the_zoo(name):
    side = 64 if name.endswith("_bit") else 32  # its group norms refuse maps of a single pixel
    model, x = adversarial_(MODELS[name]()), torch.randn(1, 3, side, side)
    fast = fastres.optimize(model, backend="triton", example_input=x)
    with torch.no_grad():
        found, exact = fast(x), copy.deepcopy(model).double()(x.double())
        # The engine's layout: there oneDNN's own convolution may be several times less exact.
        nhwc = model(x.contiguous(memory_format=torch.channels_last))
        found, exact, same, nhwc = map(tree_leaves, (found, exact, model(x), nhwc))
    for out, ref, *pt in zip(found, exact, same, nhwc, strict=True):
        # The rule of two by means, not maxima: of few outputs the largest error is one draw.
        own = max(rms(y - ref) for y in pt)
        assert rms(out - ref) <= allowed_error(own, rms(ref), out.dtype)
    served = fast.plan().kernels
    assert "_gn" in name or any("triton" in server for server in served), served


@pytest.mark.fault(66)
@pytest.mark.sweep
def test_standardised_weights_are_as_exact_as_pytorch_in_the_same_layout():
    """Their convolutions are PyTorch calls, so that the two differ by what is around them alone.
    In NCHW the same calls are three times as exact."""
    model, x = adversarial_(bit()), torch.randn(1, 3, 64, 64)
    fast = fastres.optimize(model, backend="triton", example_input=x)
    convolutions = [s for s in fast.plan().steps if s.name.startswith("conv2d")]
    assert len(convolutions) == 17
    assert all(isinstance(step.op, Call) for step in convolutions)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        same = model(x.contiguous(memory_format=torch.channels_last))
        assert rms(fast(x) - exact) <= 1.3 * rms(same - exact)
