"""Which grid each tensor of a fused network gets: observed on images, judged on others."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.onednn_int8 import Int8Ops
from ..backends.select import select_int8_ops
from ..graph.fold import refuse_overflow
from ..graph.ir import Conv2d, Grid, Linear
from ..graph.plan import Plan, Step, kept_names
from ..graph.quantize import quantize, quantized_weight, sharing, value_grids
from .fast_model import FastModel, with_signature

SAMPLES = 256  # values of each tensor that are kept of an image
CLIPS = torch.linspace(0.3, 1, 36).tolist()  # of the largest value, among which "mse" chooses


def decibels(exact: Tensor, found: Tensor) -> float:
    """Signal to noise, at most 200 dB."""
    exact, noise = exact.double(), exact.double() - found.double()
    ratio = noise.square().sum() / exact.square().sum().clamp_min(1e-300)
    return float(-10 * ratio.clamp_min(1e-20).log10())


def clamped(grid: Grid, x: Tensor) -> Tensor:
    """What is left of numbers as bytes on a grid."""
    return ((x / grid.scale).round() + grid.zero).clamp(0, 255).sub(grid.zero) * grid.scale


def grid_for(low: float, high: float) -> Grid:
    """The grid of the numbers from low to high, and 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / (253 if low else 255), 2.0**-100) if high > low else 1.0
    scale = float(torch.tensor(scale, dtype=torch.float32))
    return Grid(scale, 2 * math.ceil(-low / scale / 2))


def choose(calibrator: str, low: float, high: float, seen: Tensor, unseen: Tensor) -> Grid:
    """The calibrator's grid, or that from low to high where it keeps more of unseen values."""

    def error(grid: Grid, values: Tensor) -> float:
        return float((clamped(grid, values) - values).square().mean())

    widest = grid_for(low, high)
    if calibrator == "mse":
        grids = [grid_for(low * clip, high * clip) for clip in CLIPS]
        grid = min(grids, key=lambda g: error(g, seen))
    elif calibrator == "max":
        return widest
    else:
        share = float(calibrator.partition(":")[2]) / 100
        ordered = seen.sort().values
        last = len(ordered) - 1
        grid = grid_for(
            float(ordered[round((1 - share) * last)]) if low < 0 else 0.0,
            float(ordered[round(share * last)]),
        )
    return min(grid, widest, key=lambda g: error(g, unseen))


class Calibration:
    """What is observed of a fused network, or of the part of a shell at ``path``.

    Args:
        path: of the part in its shell.
        model: in floats; or in 8 bits, of which
        exact: is the same in floats.

    Attributes:
        unseen: whether the images that come are held back from calibration.
        left: the convolutions that stay in floating point, each with the reason.
    """

    def __init__(self, path: str, model: FastModel, exact: Calibration | None = None) -> None:
        self.path, self.model, self.exact = path, model, exact
        self.unseen = exact is not None
        self.left: dict[str, str] = {}
        self._ends: dict[str, tuple[float, float]] = {}
        self._values: dict[tuple[str, bool], list[Tensor]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._own: dict[str, float] = {}
        self._grids = value_grids(model.traced)
        self._weighted = [s for s in model.traced.steps if isinstance(s.op, (Conv2d, Linear))]
        self._draws = torch.Generator()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's answer, observed."""
        model = self.model
        arguments = [model._cast(value) for value in model._bind(args, kwargs)]
        names = [parameter.name for parameter in model.traced.parameters]
        for name, value in zip(names, arguments, strict=True):
            self._add(name, value)
        return model.executor().run(arguments, self._observe)

    def _observe(self, step: Step, inputs: list[Any], result: Any) -> None:
        result = self._numbers(step.name, result)
        self._add(step.name, result)
        op, name = step.op, step.name
        if self.exact and isinstance(op, Conv2d) and op.x_grid and name not in self._own:
            numbers = map(self._numbers, step.inputs, inputs)
            self._own[name] = decibels(self.exact.computed(self.place(name), *numbers), result)

    def _numbers(self, name: str, value: Any) -> Any:
        grid = self._grids.get(name)
        return value if grid is None else Int8Ops().dequantize(grid, value)

    def _add(self, name: str, value: Any) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() != 4:
            return
        before = self._values.setdefault((name, self.unseen), [])
        if not bool(torch.isfinite(value).all()):
            batch = f"batch {len(before) + 1} of those {'held out' if self.unseen else 'taken'}"
            raise ValueError(f"calibration: {self.where(name)} is not finite in {batch}")
        if not self.unseen:
            low, high = self._ends.get(name, (0.0, 0.0))
            self._ends[name] = min(low, float(value.min())), max(high, float(value.max()))
            self._shapes[name] = tuple(value.shape)
        flat = value.permute(0, 2, 3, 1).reshape(-1)
        self._draws.manual_seed(len(before))
        count = min(len(flat), SAMPLES * len(value))
        places = torch.randint(len(flat), (count,), generator=self._draws)
        before.append(flat[places.to(flat.device)].cpu())

    @property
    def eights(self) -> list[Step]:
        """The steps in 8 bits."""
        return [s for s in self._weighted if isinstance(s.op, Conv2d) and s.op.x_grid is not None]

    def place(self, name: str) -> int:
        """A step's place among those with weights, which is the same in floats and in 8 bits."""
        return [step.name for step in self._weighted].index(name)

    def where(self, name: str) -> str:
        """A step's path in the source, or its name."""
        below = next((s.where for s in self._weighted if s.name == name and s.where), name)
        return f"{self.path}.{below}" if self.path else below

    def computed(self, place: int, x: Tensor, *residual: Tensor) -> Tensor:
        """The result of a convolution in floats."""
        step = self._weighted[place]
        op: Any = step.op
        if op.images is not None:
            x = x.float() - self._centered(op, self.model.kept).whole
        weight, bias = self.model._step_weights(step)
        y = F.conv2d(x, weight, bias, op.stride, op.padding, op.dilation, op.groups)
        y = sum(residual, y)
        return y.relu() if op.relu else y

    def rows(self) -> list[tuple[Any, ...]]:
        """Of a model in 8 bits: a row for each convolution that is."""
        exact, found = self.exact, []
        assert exact is not None
        plan = self.model.plan()
        kernels = {s.name: kernel for s, kernel in zip(plan.steps, plan.kernels, strict=True)}
        for step in self.eights:
            like, op = exact._weighted[self.place(step.name)], step.op
            assert isinstance(op, Conv2d)
            grid, clipped = op.y_grid, 0.0
            name = like.name
            true, own = (torch.cat(c._values[name, True]) for c in (exact, self))
            if grid is not None:
                whole = (true / grid.scale).round() + grid.zero
                clipped = float(((whole < 0) | (whole > 255)).double().mean())
            of_step: Any = self.model._step_weights(step)
            weight, _, scale = of_step
            rounded = weight * scale.view(-1, 1, 1, 1)
            found.append(
                (
                    exact.where(name),
                    kernels[step.name],
                    grid.scale if grid else None,
                    grid.zero if grid else None,
                    clipped,
                    decibels(exact.model._step_weights(like)[0], rounded),
                    self._own[step.name],
                    decibels(true, own),
                )
            )
        return found

    def quantized(self, calibrator: str, keep: Sequence[str], dtype: torch.dtype) -> FastModel:
        """The model with its convolutions in 8 bits, the rest in ``dtype``; fills :attr:`left`."""
        steps = [step for step in self._weighted if isinstance(step.op, Conv2d)]
        reasons = {step.name: self._reason(step, keep) for step in steps}
        self.left = {self.where(name): why for name, why in reasons.items() if why}
        chosen = [name for name, why in reasons.items() if not why]
        plan = quantize(self.model.traced, self._grids_by(calibrator), chosen)
        return self._assembled(plan, dtype)

    def _grids_by(self, calibrator: str) -> dict[str, Grid]:
        of = sharing(self.model.traced, [name for name, (low, _) in self._ends.items() if low >= 0])
        groups: dict[str, list[str]] = {}
        for name in self._ends:
            groups.setdefault(of[name], []).append(name)
        found = {}
        for names in groups.values():
            lows, highs = zip(*(self._ends[name] for name in names), strict=True)
            seen, unseen = (
                torch.cat([t for name in names for t in self._values[name, which]])
                for which in (False, True)
            )
            grid = choose(calibrator, min(lows), max(highs), seen, unseen)
            found.update(dict.fromkeys(names, grid))
        return found

    def _reason(self, step: Step, keep: Sequence[str]) -> str:
        """Why a convolution is not to be in 8 bits; empty if it is."""
        op: Any = step.op
        x, *residual = step.inputs
        if any(fnmatchcase(name, p) for p in keep for name in (self.where(step.name), step.name)):
            return "asked for by keep"
        if self.model.traced.source_layout:
            return "PyTorch writes in place into memory that others see"
        if op.images is not None:
            whole = self._centered(op, self.model.kept).whole
            outside = bool(((whole < 0) | (whole > 255)).any())
            return "the mean of its images is outside of [0, 1]" if outside else ""
        if x not in self._ends:
            return "it was not called with images in float32"
        if residual and self._shapes.get(residual[0]) != self._shapes[step.name]:
            return "it adds a tensor of another shape"
        return ""

    def _centered(self, op: Conv2d, kept: nn.Module) -> Any:
        assert op.images is not None
        return getattr(kept, kept_names(self.model.traced)[f"{op.images.module}.centered"])

    def _assembled(self, plan: Plan, dtype: torch.dtype) -> FastModel:
        model, kept, folded = self.model, copy.deepcopy(self.model.kept), dict[int, Any]()
        weights = iter([model._step_weights(step) for step in self._weighted])
        most = select_int8_ops(model.backend, model.device, dtype).most
        for index, step in enumerate(plan.steps):
            if not isinstance(step.op, (Conv2d, Linear)):
                continue
            weight, bias = next(weights)
            refuse_overflow(self.where(step.name), weight, dtype)
            folded[index] = weight.to(dtype), bias
            op = step.op
            if isinstance(op, Conv2d) and op.x_grid is not None:
                bias = weight.new_zeros(len(weight)) if bias is None else bias
                # So that the bias is a 32-bit number of products, as which other runtimes take it.
                least = bias.abs() / (2.0**30 * op.x_grid.scale)
                whole, scale = quantized_weight(weight, most, least)
                if op.images is not None:
                    centered = self._centered(op, kept)
                    centered.as_bytes = True
                    bias = bias - _shift(op, centered.whole, whole * scale.view(-1, 1, 1, 1))
                folded[index] = whole, bias, scale
        return with_signature(model.signature)(
            plan,
            folded,
            kept.to(dtype),
            dtype=dtype,
            source_dtype=model.source_dtype,
            backend=model.backend,
            described=model.described,
            names=model._fixed,
        )


def _shift(op: Conv2d, whole: Tensor, weight: Tensor) -> Tensor:
    """(K,): what a convolution makes of images that are everywhere ``whole``, which bytes add."""
    window = (1 + d * (k - 1) for d, k in zip(op.dilation, op.kernel, strict=True))
    image = whole.double().expand(1, op.in_channels, *window)
    return F.conv2d(image, weight.double(), None, 1, 0, op.dilation, op.groups).flatten().float()
