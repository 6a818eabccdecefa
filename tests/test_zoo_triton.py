"""Each kind of model of the zoo, narrow and on small images, on fastres' own kernels."""

import copy

import pytest
import torch
from fused import rms
from helpers import hostile_
from torch import nn

import fastres

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


MODELS = {
    "timm resnet50d": lambda: timm("resnet50d", **NARROW),
    "timm resnet50_gn": lambda: timm(
        "resnet50_gn", **NARROW | {"channels": (32, 32, 32, 32), "output_stride": 8}
    ),
    "timm ecaresnet50d": lambda: timm("ecaresnet50d", **NARROW),
    "timm resnetaa50": lambda: timm("resnetaa50", **NARROW),
    "timm resnetv2_50": lambda: timm("resnetv2_50", **V2),
    "timm convnext_atto": lambda: timm(
        "convnext_atto", depths=(1, 1, 1, 1), dims=(4, 8, 8, 16), num_classes=40
    ),
    "Hugging Face bottleneck": lambda: huggingface("bottleneck"),
    "Hugging Face basic": lambda: huggingface("basic"),
}


@pytest.mark.parametrize("name", MODELS)
def test_row66_models_of_the_zoo(name):
    model, x = hostile_(MODELS[name]()), torch.randn(1, 3, 32, 32)
    fast = fastres.optimize(model, backend="triton", example_input=x)
    with torch.no_grad():
        found, same, exact = fast(x), model(x), copy.deepcopy(model).double()(x.double())
    leaves = torch.utils._pytree.tree_leaves
    for out, pt, ref in zip(leaves(found), leaves(same), leaves(exact), strict=True):
        # The rule of two by means, not maxima: of few outputs the largest error is one draw.
        allowed = 2 * rms(pt - ref) + 4 * torch.finfo(out.dtype).eps * rms(ref)
        assert rms(out - ref) <= allowed
    served = fast.plan().served_by
    assert "_gn" in name or any("triton" in server for server in served), served
