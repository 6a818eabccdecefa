"""The ResNets by name: ``create_model``, ``list_models`` and a function for each."""

import difflib
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UnknownModelError
from .checkpoint import load_state_dict
from .resnet import BasicBlock, Bottleneck, ResNet
from .weights import required_arguments, resolve_weights


@dataclass(frozen=True)
class Variant:
    """One row of the table: what makes a name a network.

    ``fixed`` arguments define the variant and cannot be given otherwise; ``defaults`` can.
    """

    block: type[BasicBlock] | type[Bottleneck]
    layers: tuple[int, ...]
    fixed: Mapping[str, int] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


_CIFAR = {"num_classes": 10, "planes": 16, "stem": "cifar", "shortcut": "A"}


VARIANTS: Mapping[str, Variant] = {
    "resnet18": Variant(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Variant(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Variant(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Variant(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Variant(Bottleneck, (3, 8, 36, 3)),
    "resnext50_32x4d": Variant(Bottleneck, (3, 4, 6, 3), {"groups": 32, "width_per_group": 4}),
    "resnext101_32x8d": Variant(Bottleneck, (3, 4, 23, 3), {"groups": 32, "width_per_group": 8}),
    "resnext101_64x4d": Variant(Bottleneck, (3, 4, 23, 3), {"groups": 64, "width_per_group": 4}),
    "wide_resnet50_2": Variant(Bottleneck, (3, 4, 6, 3), {"width_per_group": 128}),
    "wide_resnet101_2": Variant(Bottleneck, (3, 4, 23, 3), {"width_per_group": 128}),
    "resnet20": Variant(BasicBlock, (3, 3, 3), defaults=_CIFAR),
    "resnet32": Variant(BasicBlock, (5, 5, 5), defaults=_CIFAR),
    "resnet44": Variant(BasicBlock, (7, 7, 7), defaults=_CIFAR),
    "resnet56": Variant(BasicBlock, (9, 9, 9), defaults=_CIFAR),
    "resnet110": Variant(BasicBlock, (18, 18, 18), defaults=_CIFAR),
    "resnet1202": Variant(BasicBlock, (200, 200, 200), defaults=_CIFAR),
}


def list_models(pattern: str = "*") -> list[str]:
    """Names that :func:`create_model` knows, in the order of its table.

    Args:
        pattern: a shell pattern, such as ``"resnext*"``.
    """
    return [name for name in VARIANTS if fnmatch.fnmatchcase(name, pattern)]


def create_model(name: str, *, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Build the network called ``name``.

    Args:
        name: one of :func:`list_models`.
        weights: a torchvision weights enum or its name (``"DEFAULT"``, ``"IMAGENET1K_V1"``,
            ``"ResNet50_Weights.IMAGENET1K_V2"``), or any object with
            ``get_state_dict(progress=, check_hash=)`` and ``meta``; None for random weights.
            torchvision's old ``pretrained=True`` is taken with a warning, and as timm does with
            another ``num_classes``: the weights are loaded and a new classifier is put in place.
        progress: show a progress bar while downloading.
        kwargs: arguments of :class:`ResNet`.

    Raises:
        UnknownModelError: no such name; the message has the closest ones.
        ValueError: an argument contradicts the variant or its weights.
        WeightsError: the weights cannot be fetched, or their hash is wrong.
    """
    if name not in VARIANTS:
        close = difflib.get_close_matches(str(name), VARIANTS, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(VARIANTS)}"
        raise UnknownModelError(f"unknown model {name!r}; {hint}")
    variant = VARIANTS[name]
    classes = (
        kwargs.pop("num_classes", None) if True in (weights, kwargs.get("pretrained")) else None
    )
    source = resolve_weights(name, weights, kwargs)
    required = dict(variant.fixed)
    if source is not None:
        required |= required_arguments(source)
    for key, value in required.items():
        if kwargs.setdefault(key, value) != value:
            raise ValueError(
                f"The parameter '{key}' expected value {value} but got {kwargs[key]} instead."
            )
    model = ResNet(variant.block, variant.layers, **{**variant.defaults, **kwargs})
    if source is not None:
        state = source.get_state_dict(progress=progress, check_hash=True)
        load_state_dict(model, state, source=f"weights {source}")
    if classes is not None and classes != model.num_classes:
        model.reset_classifier(classes)
    return model


def resnet18(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18 (https://arxiv.org/abs/1512.03385)."""
    return create_model("resnet18", weights=weights, progress=progress, **kwargs)


def resnet34(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34 (https://arxiv.org/abs/1512.03385)."""
    return create_model("resnet34", weights=weights, progress=progress, **kwargs)


def resnet50(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50 (https://arxiv.org/abs/1512.03385), strided on the 3x3 as in torchvision."""
    return create_model("resnet50", weights=weights, progress=progress, **kwargs)


def resnet101(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101 (https://arxiv.org/abs/1512.03385), strided on the 3x3 as in torchvision."""
    return create_model("resnet101", weights=weights, progress=progress, **kwargs)


def resnet152(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-152 (https://arxiv.org/abs/1512.03385), strided on the 3x3 as in torchvision."""
    return create_model("resnet152", weights=weights, progress=progress, **kwargs)


def resnext50_32x4d(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-50, 32 groups of width 4 (https://arxiv.org/abs/1611.05431)."""
    return create_model("resnext50_32x4d", weights=weights, progress=progress, **kwargs)


def resnext101_32x8d(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101, 32 groups of width 8 (https://arxiv.org/abs/1611.05431)."""
    return create_model("resnext101_32x8d", weights=weights, progress=progress, **kwargs)


def resnext101_64x4d(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101, 64 groups of width 4 (https://arxiv.org/abs/1611.05431)."""
    return create_model("resnext101_64x4d", weights=weights, progress=progress, **kwargs)


def wide_resnet50_2(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-50-2, inner channels doubled (https://arxiv.org/abs/1605.07146)."""
    return create_model("wide_resnet50_2", weights=weights, progress=progress, **kwargs)


def wide_resnet101_2(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-101-2, inner channels doubled (https://arxiv.org/abs/1605.07146)."""
    return create_model("wide_resnet101_2", weights=weights, progress=progress, **kwargs)


def resnet20(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-20 for CIFAR-10 (https://arxiv.org/abs/1512.03385, section 4.2)."""
    return create_model("resnet20", weights=weights, progress=progress, **kwargs)


def resnet32(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-32 for CIFAR-10 (https://arxiv.org/abs/1512.03385, section 4.2)."""
    return create_model("resnet32", weights=weights, progress=progress, **kwargs)


def resnet44(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-44 for CIFAR-10 (https://arxiv.org/abs/1512.03385, section 4.2)."""
    return create_model("resnet44", weights=weights, progress=progress, **kwargs)


def resnet56(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-56 for CIFAR-10 (https://arxiv.org/abs/1512.03385, section 4.2)."""
    return create_model("resnet56", weights=weights, progress=progress, **kwargs)


def resnet110(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-110 for CIFAR-10 (https://arxiv.org/abs/1512.03385, section 4.2)."""
    return create_model("resnet110", weights=weights, progress=progress, **kwargs)


def resnet1202(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-1202 for CIFAR-10 (https://arxiv.org/abs/1512.03385, section 4.2)."""
    return create_model("resnet1202", weights=weights, progress=progress, **kwargs)
