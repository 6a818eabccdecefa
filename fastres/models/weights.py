"""torchvision's pretrained ImageNet weights, usable without torchvision.

The table holds what torchvision publishes with each file: its address (the eight hex digits in
the name are the beginning of the file's SHA-256 and are checked), its size in parameters, its
accuracy as torchvision measured it, and the preprocessing it wants.
"""

import enum
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.error import URLError

import torch
from torch import Tensor

from ..errors import MissingDependencyError, WeightsError

__all__ = ["ImageNetWeights", "WeightsSource", "available_weights", "get_weights"]


class WeightsSource(Protocol):
    """What a model builder asks of weights; torchvision's enums offer it too."""

    @property
    def meta(self) -> Mapping[str, Any]: ...

    def get_state_dict(self, *, progress: bool, check_hash: bool) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class ImageNetWeights:
    """One file of weights for ``model``; accuracies in percent, sizes in pixels."""

    model: str
    name: str
    url: str
    num_params: int
    acc1: float
    acc5: float
    resize_size: int = 256
    crop_size: int = 224

    def __str__(self) -> str:
        return f"{ENUMS[self.model]}.{self.name}"

    @property
    def meta(self) -> dict[str, Any]:
        """The facts of torchvision's ``meta`` that need no torchvision."""
        return {
            "num_params": self.num_params,
            "num_classes": 1000,
            "in_chans": 3,
            "stem": "imagenet",
            "min_size": (1, 1),
            "_metrics": {"ImageNet-1K": {"acc@1": self.acc1, "acc@5": self.acc5}},
        }

    def get_state_dict(
        self, *, progress: bool = True, check_hash: bool = True
    ) -> Mapping[str, Tensor]:
        """Download (or find in torch.hub's cache) the parameters, on the CPU.

        Raises WeightsError where the file cannot be had, is damaged or has the wrong hash.
        """
        return fetch(self.url, progress=progress, check_hash=check_hash)

    def transforms(self) -> Callable[[Any], Tensor]:
        """torchvision's own preprocessing: PIL image or tensor -> normalised (3, 224, 224)."""
        presets = _torchvision("transforms._presets", "preprocessing")
        return presets.ImageClassification(crop_size=self.crop_size, resize_size=self.resize_size)

    def categories(self) -> list[str]:
        """The 1000 class names, as torchvision spells them."""
        return list(_torchvision("models._meta", "class names")._IMAGENET_CATEGORIES)


def fetch(url: str, *, progress: bool = True, check_hash: bool = True) -> Mapping[str, Tensor]:
    """Load a state dict from ``url`` through torch.hub's cache, never running what it contains.

    Raises WeightsError naming the address and the reason.
    """
    try:
        with redirect_stdout(sys.stderr):  # where it says what it downloads
            return torch.hub.load_state_dict_from_url(
                url, map_location="cpu", progress=progress, check_hash=check_hash, weights_only=True
            )
    except (OSError, URLError) as error:
        reason = str(getattr(error, "reason", error))
        raise WeightsError(
            f"cannot get weights from {url}: {reason}; without a network, download the file "
            "elsewhere and load it with fastres.load_checkpoint"
        ) from error
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise WeightsError(
            f"the weights from {url} are damaged or not what was asked for: {reason}; "
            f"delete any copy in {torch.hub.get_dir()}/checkpoints and try again"
        ) from error


ENUMS: Mapping[str, str] = {
    "resnet18": "ResNet18_Weights",
    "resnet34": "ResNet34_Weights",
    "resnet50": "ResNet50_Weights",
    "resnet101": "ResNet101_Weights",
    "resnet152": "ResNet152_Weights",
    "resnext50_32x4d": "ResNeXt50_32X4D_Weights",
    "resnext101_32x8d": "ResNeXt101_32X8D_Weights",
    "resnext101_64x4d": "ResNeXt101_64X4D_Weights",
    "wide_resnet50_2": "Wide_ResNet50_2_Weights",
    "wide_resnet101_2": "Wide_ResNet101_2_Weights",
}

_V1, _V2 = "IMAGENET1K_V1", "IMAGENET1K_V2"

_ROWS = (
    ("resnet18", _V1, "f37072fd", 11_689_512, 69.758, 89.078, 256),
    ("resnet34", _V1, "b627a593", 21_797_672, 73.314, 91.42, 256),
    ("resnet50", _V1, "0676ba61", 25_557_032, 76.13, 92.862, 256),
    ("resnet50", _V2, "11ad3fa6", 25_557_032, 80.858, 95.434, 232),
    ("resnet101", _V1, "63fe2227", 44_549_160, 77.374, 93.546, 256),
    ("resnet101", _V2, "cd907fc2", 44_549_160, 81.886, 95.78, 232),
    ("resnet152", _V1, "394f9c45", 60_192_808, 78.312, 94.046, 256),
    ("resnet152", _V2, "f82ba261", 60_192_808, 82.284, 96.002, 232),
    ("resnext50_32x4d", _V1, "7cdf4587", 25_028_904, 77.618, 93.698, 256),
    ("resnext50_32x4d", _V2, "1a0047aa", 25_028_904, 81.198, 95.34, 232),
    ("resnext101_32x8d", _V1, "8ba56ff5", 88_791_336, 79.312, 94.526, 256),
    ("resnext101_32x8d", _V2, "110c445d", 88_791_336, 82.834, 96.228, 232),
    ("resnext101_64x4d", _V1, "173b62eb", 83_455_272, 83.246, 96.454, 232),
    ("wide_resnet50_2", _V1, "95faca4d", 68_883_240, 78.468, 94.086, 256),
    ("wide_resnet50_2", _V2, "9ba9bcbe", 68_883_240, 81.602, 95.758, 232),
    ("wide_resnet101_2", _V1, "32ee1156", 126_886_696, 78.848, 94.284, 256),
    ("wide_resnet101_2", _V2, "d733dc28", 126_886_696, 82.51, 96.02, 232),
)

WEIGHTS: tuple[ImageNetWeights, ...] = tuple(
    ImageNetWeights(
        model,
        name,
        f"https://download.pytorch.org/models/{model}-{sha}.pth",
        params,
        acc1,
        acc5,
        size,
    )
    for model, name, sha, params, acc1, acc5, size in _ROWS
)


def available_weights(model: str) -> list[ImageNetWeights]:
    """The published weights of ``model``, oldest first; empty where there are none."""
    return [weights for weights in WEIGHTS if weights.model == model]


def get_weights(model: str, name: str = "DEFAULT") -> ImageNetWeights:
    """Look up weights: "IMAGENET1K_V1", "DEFAULT" (the newest), with or without the enum's name.

    Raises ValueError listing what there is.
    """
    available = {weights.name: weights for weights in available_weights(model)}
    if not available:
        raise ValueError(f"No weights available for model {model}")
    available["DEFAULT"] = list(available.values())[-1]
    member = name.removeprefix(f"{ENUMS[model]}.")
    if member not in available:
        raise ValueError(
            f"unknown weights {name!r} for {model}; available: {', '.join(sorted(available))}"
        )
    return available[member]


def resolve_weights(model: str, weights: Any, kwargs: dict[str, Any]) -> WeightsSource | None:
    """Turn what was passed as ``weights`` (or ``pretrained``, taken out of kwargs) into a source.

    Raises TypeError for weights of another model or for what is no source, ValueError for unknown
    names.
    """
    weights = _from_legacy(model, weights, kwargs)
    if weights is None:
        return None
    if isinstance(weights, str):
        return get_weights(model, weights)
    _check_belongs(model, weights)
    for known in available_weights(model):
        # torchvision's own download would unpickle the file without weights_only.
        if getattr(weights, "url", None) == known.url:
            return known
    if not (hasattr(weights, "get_state_dict") and hasattr(weights, "meta")):
        raise TypeError(
            "weights must be None, a name, a weights enum or offer get_state_dict() and meta, "
            f"got {type(weights).__name__}"
        )
    return weights


def required_arguments(source: WeightsSource) -> dict[str, Any]:
    """The model arguments that the weights dictate, as far as their ``meta`` tells."""
    meta = source.meta
    if "categories" in meta:
        return {"num_classes": len(meta["categories"])}
    return {key: meta[key] for key in ("num_classes", "in_chans", "stem") if key in meta}


def _from_legacy(model: str, weights: Any, kwargs: dict[str, Any]) -> Any:
    """Translate ``pretrained=`` and ``weights=True`` of old torchvision, with its warning."""
    if "pretrained" in kwargs:
        if weights is not None:
            raise TypeError("got both 'weights' and the deprecated 'pretrained'; give one of them")
        weights = bool(kwargs.pop("pretrained"))
    if not isinstance(weights, bool):
        return weights
    meant = get_weights(model, _V1) if weights else None
    warnings.warn(
        "The parameter 'pretrained' is deprecated since torchvision 0.13, please use 'weights' "
        f"instead. The current behavior is equivalent to passing `weights={meant}`.",
        stacklevel=5,
    )
    return meant


def _check_belongs(model: str, weights: Any) -> None:
    """torchvision's rule: the enum (or table row) of another model is a mistake, never a guess."""
    if isinstance(weights, enum.Enum) and type(weights).__name__.endswith("_Weights"):
        got = type(weights).__name__
    elif isinstance(weights, ImageNetWeights):
        got = ENUMS[weights.model]
    else:
        return
    expected = ENUMS.get(model, "None")
    if got != expected:
        raise TypeError(f"Invalid Weight class provided; expected {expected} but received {got}.")


def _torchvision(module: str, purpose: str) -> Any:
    try:
        return importlib.import_module(f"torchvision.{module}")
    except ImportError as error:
        raise MissingDependencyError(
            f"the {purpose} of pretrained weights come from torchvision, which cannot be imported "
            f"({error}); install fastres[vision]"
        ) from error
