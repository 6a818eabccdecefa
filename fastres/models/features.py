"""Feature maps of a network, for detection, segmentation and whatever else stands on a backbone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from ..graph import trace
from ..graph.modules import unwrapped
from ..runtime.live import LiveModule


@dataclass(frozen=True)
class FeatureInfo:
    """What each feature map is, in their order; the methods are those of timm's FeatureInfo."""

    names: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]

    def module_name(self) -> list[str]:
        """The module that each map is the output of."""
        return list(self.names)

    def channels(self) -> list[int]:
        """The number of channels of each map."""
        return [channels for channels, _ in self.sizes]

    def reduction(self) -> list[int]:
        """How many pixels of the image one pixel of each map stands for, per axis."""
        return [reduction for _, reduction in self.sizes]


class Features(LiveModule):
    """A network up to some of its modules, whose outputs it returns; made by :func:`features`.

    The modules are the network's own, under its names: training one trains the other, and the
    state_dict has the network's keys. In inference it runs fused.

    Attributes:
        feature_info: for each map its module, number of channels and reduction (pixels of the
            image for one of the map, along a side).
        out_channels: number of channels of the last map, as torchvision's detectors read it.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], keys: Sequence[str] | None, backend: str
    ) -> None:
        super().__init__(backend)
        graph = trace.truncated(model, names, keys)
        # Not a child: it calls this module's own children, which keep the network's names.
        try:
            self.__dict__["_program"] = fx.GraphModule(model, graph)
        except SyntaxError as error:
            raise trace.TraceError(
                "model has a module or parameter named by a word of Python, such as 'in', which "
                "torch.fx cannot write down; rename it"
            ) from error
        used = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
        tops = {path.partition(".")[0] for path in used}
        for kind in ("_modules", "_parameters", "_buffers"):
            theirs: dict[str, Any] = getattr(model, kind)
            getattr(self, kind).update({n: v for n, v in theirs.items() if n in tops})
        self._non_persistent_buffers_set |= model._non_persistent_buffers_set & tops
        self.train(model.training)
        self.feature_info = FeatureInfo(tuple(names), _sizes(self, names))
        self.out_channels = self.feature_info.channels()[-1]

    def _forward_impl(self, x: Tensor) -> Any:
        program: Any = type(self.__dict__["_program"])
        return program.forward(self, x)


def features(
    model: nn.Module,
    out_indices: Sequence[int] | Sequence[str] | Mapping[str, str],
    *,
    backend: str = "auto",
) -> Features:
    """The feature maps of a network, (N, C, h, w) each, for images (N, in_chans, H, W).

    torch.jit.script takes neither these nor their torch.fx traces: script what torchvision's
    ``create_feature_extractor`` makes of the network.

    Args:
        model: a ResNet of fastres, torchvision or timm, or any module that torch.fx can trace;
            (Distributed)DataParallel and torch.compile are looked through.
        out_indices: which maps. Numbers as in timm's ``features_only``: 0 is the stem before its
            pooling, 1 to 4 are the stages, negative ones count from the end; the maps come in a
            list. Names of modules, or names with the keys wanted, as in torchvision's feature
            extractors (``{"layer4": "out"}``): the maps come in an OrderedDict, which torchvision's
            detectors and FeaturePyramidNetwork take.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``: what may serve inference.

    Raises:
        TypeError: ``model`` is no module, or ``out_indices`` neither numbers nor names.
        ValueError: an index or a name that the model does not have; the message lists those. Or
            there is no convolution.
        TraceError: the model's Python cannot be recorded.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    model = unwrapped(model)
    if isinstance(out_indices, str) or not isinstance(out_indices, Iterable):
        raise TypeError(f"out_indices must be a sequence or a mapping; got {out_indices!r}")
    wanted = list(out_indices)
    if not wanted:
        raise ValueError("out_indices is empty")
    if all(isinstance(index, int) for index in wanted):
        stages = _stages(model)
        return Features(model, [_stage(stages, i) for i in wanted], None, backend)  # type: ignore[arg-type]
    if not all(isinstance(name, str) for name in wanted):
        raise TypeError(f"out_indices must be numbers or names of modules; got {wanted!r}")
    names = [str(name) for name in wanted]
    keys = [out_indices[n] for n in names] if isinstance(out_indices, Mapping) else names
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(f"model has no module {unknown[0]!r}; at the top: {_tops(model)}")
    return Features(model, names, keys, backend)


def _stages(model: nn.Module) -> list[str]:
    """The modules whose outputs timm calls features 0, 1, ..., for its models and torchvision's."""
    info = getattr(model, "feature_info", None)
    if isinstance(info, list):
        return [str(entry["module"]) for entry in info]
    if info is not None:
        return [str(name) for name in info.module_name()]
    stem = next((name for name in ("act1", "relu") if hasattr(model, name)), None)
    stages = [f"layer{i}" for i in range(1, 5) if len(getattr(model, f"layer{i}", ()))]
    if stem is None or not stages:
        raise ValueError(
            f"out_indices may be numbers only for ResNets and timm's models; name modules of "
            f"{type(model).__name__} instead, such as {_tops(model)}"
        )
    return [stem, *stages]


def _stage(stages: list[str], index: int) -> str:
    if not -len(stages) <= index < len(stages):
        raise ValueError(f"out_indices has {index}; the model has {len(stages)} feature maps")
    return stages[index]


def _tops(model: nn.Module) -> str:
    return ", ".join(name for name, _ in model.named_children())


def _sizes(model: Features, names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """(channels, reduction) of each map, from shapes alone."""
    side = 256
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ValueError("model has no Conv2d before its maps, so they are no maps of an image")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    image = torch.empty(1, first.in_channels, side, side, device="meta", dtype=first.weight.dtype)
    with torch.no_grad():
        maps = functional_call(model, shapes, (image,))
    found = list(maps.values()) if isinstance(maps, OrderedDict) else maps
    for name, value in zip(names, found, strict=True):
        if not isinstance(value, Tensor) or value.dim() != 4:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"out_indices has {name!r}, whose output is no map (N, C, h, w) but {got}"
            )
    return tuple((m.shape[1], round(side / m.shape[2])) for m in found)
