"""The models that fastres is tested on, as docs/models.md lists; weights are adversarial."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers import adversarial_, real_images
from torch import Tensor, nn
from tutorials import MnistResNet18, d2l_resnet

import fastres
from fastres.graph.ir import BatchNorm2d
from fastres.graph.plan import Plan, Step


@dataclass(frozen=True)
class Case:
    """A model, what it is fed, and what stays a PyTorch call in its plan.

    ``left`` names those calls as :func:`left_names` does; ``arguments`` turns images into the
    model's arguments; ``shell`` says that torch.fx cannot trace the whole, ``only_size`` that it
    takes images of no other size.
    """

    family: str
    name: str
    build: Callable[[], nn.Module]
    left: frozenset[str] = frozenset()
    size: int = 64
    channels: int = 3
    arguments: Callable[[Tensor], tuple] = lambda images: (images,)
    shell: bool = False
    only_size: bool = False

    @property
    def fixed(self) -> bool:
        """Whether ``size`` is the one to use: a detector's, or the only one that fits."""
        return self.shell or self.only_size

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"

    def model(self) -> nn.Module:
        """The source with adversarial weights, in eval mode."""
        torch.manual_seed(0)
        return adversarial_(self.build())

    def inputs(self, images: int = 2, size: int | None = None) -> tuple:
        """Real images as the model's arguments."""
        return self.arguments(real_images(images, size or self.size, self.channels))


def left_names(plan: Plan) -> Counter[str]:
    """How often each kind of step was left to PyTorch."""
    return Counter(_left_name(step, reason) for step, reason in plan.fallbacks)


def _left_name(step: Step, reason: str) -> str:
    if isinstance(step.op, BatchNorm2d):
        return "batch norm"
    if "in place" in reason:
        return "in-place ReLU"
    if reason.startswith("around the fused parts"):
        return str(step.op.target)
    return reason.removesuffix(" is not fused")


def _torchvision(name: str, **options) -> nn.Module:
    from torchvision.models import get_model

    return get_model(name, weights=None, **options)


def _classifier(name: str, **options) -> nn.Module:
    """torchvision's classifier without the seconds that initial values take."""
    with torch.device("meta"):
        model = _torchvision(name, **options)
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.zero_()
    return model


def _torchvision_in(name: str, channels: int) -> nn.Module:
    model = _classifier(name, num_classes=7)
    model.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    return model


def _timm(name: str, **options) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **options)


def _huggingface(layer_type: str, **options) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(layer_type=layer_type, **options))


def _detector_images(images: Tensor) -> tuple:
    """Lists of images of different sizes, as torchvision's detectors take them."""
    return ([images[0], images[1][:, :, : images.shape[3] * 5 // 6]],)


def _detector(name: str) -> Callable[[], nn.Module]:
    """At a size at which a CPU is quick, with a narrow head: the usual one is large."""

    def build() -> nn.Module:
        from torchvision.models.detection import faster_rcnn

        sizes = {"min_size": 96, "max_size": 128, "box_detections_per_img": 20}
        model = _torchvision(name, weights_backbone=None, **sizes)
        model.roi_heads.box_head = faster_rcnn.TwoMLPHead(256 * 7 * 7, 64)
        model.roi_heads.box_predictor = faster_rcnn.FastRCNNPredictor(64, 91)
        return model

    return build


def _retinanet() -> nn.Module:
    return _torchvision(
        "retinanet_resnet50_fpn",
        weights_backbone=None,
        min_size=96,
        max_size=128,
        topk_candidates=50,
    )


def _keras(build: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    """A Keras model saved by Keras and read by fastres."""

    def read() -> nn.Module:
        import keras_models

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.keras"
            build(keras_models).save(path)
            return fastres.from_keras(path)

    return read


_SE = frozenset({"sigmoid", "mul"})
_SHAPES = frozenset({"getattr", "getitem"})
_PYRAMID = frozenset({"interpolate", *_SHAPES})

CASES: tuple[Case, ...] = (
    *(
        Case("torchvision", name, lambda name=name: _classifier(name))
        for name in (
            "resnet18",
            "resnet34",
            "resnet50",
            "resnet101",
            "resnet152",
            "resnext50_32x4d",
            "resnext101_32x8d",
            "resnext101_64x4d",
            "wide_resnet50_2",
            "wide_resnet101_2",
        )
    ),
    Case(
        "torchvision",
        "resnet50, dilated",
        lambda: _classifier("resnet50", replace_stride_with_dilation=[False, True, True]),
    ),
    Case("torchvision", "resnet18, 4 channels", lambda: _torchvision_in("resnet18", 4), channels=4),
    Case(
        "torchvision",
        "fasterrcnn_resnet50_fpn",
        _detector("fasterrcnn_resnet50_fpn"),
        _PYRAMID | {"Linear", "Conv2d"},
        arguments=_detector_images,
        shell=True,
    ),
    Case(
        "torchvision",
        "maskrcnn_resnet50_fpn",
        _detector("maskrcnn_resnet50_fpn"),
        _PYRAMID | {"Linear", "Conv2d", "ConvTranspose2d"},
        arguments=_detector_images,
        shell=True,
    ),
    Case(
        "torchvision",
        "retinanet_resnet50_fpn",
        _retinanet,
        _PYRAMID | {"Conv2d"},
        arguments=_detector_images,
        shell=True,
    ),
    Case(
        "torchvision",
        "deeplabv3_resnet50",
        lambda: _torchvision("deeplabv3_resnet50", weights_backbone=None, aux_loss=True),
        _PYRAMID | {"cat"},
    ),
    Case(
        "torchvision",
        "fcn_resnet50",
        lambda: _torchvision("fcn_resnet50", weights_backbone=None, aux_loss=True),
        _PYRAMID,
    ),
    *(
        Case("timm", name, lambda name=name: _timm(name))
        for name in ("resnet18", "resnet26d", "resnet50", "resnet50d", "resnext50_32x4d")
    ),
    Case("timm", "wide_resnet50_2", lambda: _timm("wide_resnet50_2")),
    Case("timm", "resnet18, 1 channel", lambda: _timm("resnet18", in_chans=1), channels=1),
    Case(
        "timm",
        "resnet18, 12 channels, 7 classes",
        lambda: _timm("resnet18", in_chans=12, num_classes=7),
        channels=12,
    ),
    Case(
        "timm",
        "resnet18, global_pool=avgmax",
        lambda: _timm("resnet18", global_pool="avgmax"),
        frozenset({"adaptive_max_pool2d", "mul"}),
    ),
    Case("timm", "resnet50, output_stride=8", lambda: _timm("resnet50", output_stride=8)),
    Case("timm", "resnet50, features_only", lambda: _timm("resnet50", features_only=True)),
    Case("timm", "seresnet50", lambda: _timm("seresnet50"), _SE),
    Case(
        "timm",
        "ecaresnet50d",
        lambda: _timm("ecaresnet50d"),
        _SE | _SHAPES | {"view", "Conv1d", "expand_as"},
    ),
    Case("timm", "resnetv2_50", lambda: _timm("resnetv2_50"), frozenset({"batch norm"})),
    Case("timm", "resnetblur50", lambda: _timm("resnetblur50"), frozenset({"pad"})),
    Case("timm", "resnetaa50", lambda: _timm("resnetaa50")),
    Case("timm", "regnety_016", lambda: _timm("regnety_016"), _SE),
    Case("timm", "resnet50_gn", lambda: _timm("resnet50_gn"), frozenset({"group_norm"})),
    Case(
        "Hugging Face",
        "ResNetForImageClassification, bottleneck",
        lambda: _huggingface("bottleneck"),
        frozenset({"Linear"}),
        shell=True,
    ),
    Case(
        "Hugging Face",
        "ResNetForImageClassification, basic",
        lambda: _huggingface("basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512]),
        frozenset({"Linear"}),
        shell=True,
    ),
    Case("fastres", "resnet50", lambda: fastres.create_model("resnet50")),
    Case(
        "fastres",
        "resnet20",
        lambda: fastres.create_model("resnet20"),
        frozenset({"getitem", "pad"}),
        size=32,
    ),
    Case("tutorial", "d2l ResNet-34, 1 channel", d2l_resnet, channels=1, size=96),
    Case("tutorial", "MNIST ResNet-18", MnistResNet18, channels=1, size=32),
    Case(
        "tutorial",
        "MNIST ResNet-18, no residual",
        lambda: MnistResNet18(use_residual=False),
        channels=1,
        size=32,
    ),
)

# Compared with Keras itself in test_keras.py; here for the table of models.
KERAS_CASES: tuple[Case, ...] = (
    Case(
        "Keras",
        "tutorial ResNet-50, 32x32",
        _keras(lambda k: k.resnet50(32, 10, zero_padding=False, pool=1)),
        frozenset({"Softmax"}),
        size=32,
    ),
    Case(
        "Keras",
        "tutorial ResNet-50, 64x64",
        _keras(lambda k: k.resnet50(64, 6, zero_padding=True, pool=2)),
        frozenset({"Softmax"}),
        only_size=True,
    ),
    Case(
        "Keras",
        "applications.ResNet50",
        _keras(lambda k: k.keras.applications.ResNet50(weights=None)),
        frozenset({"Softmax"}),
    ),
)
