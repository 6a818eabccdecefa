"""Each convolution and linear step of a plan on its own inputs, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.aten import cudnn_benchmarking
from ..errors import VerificationError
from ..graph.fold import unnormalised_conv
from ..graph.ir import BatchNorm2d, Conv2d, Linear, attribute
from ..graph.plan import Step, describe
from .executor import Executor
from .tolerance import (
    CHANNEL,
    ENOUGH,
    FLOOR_ULPS,
    HALF_EPS,
    HALF_FLOOR_ULPS,
    allowed_error,
    eps_of,
    product_eps,
    rms,
)


@dataclass(frozen=True)
class StepError:
    """One step's error on that step's own inputs, against float64 without folding."""

    step: str
    what: str
    rms: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the step keeps the rule of two."""
        return self.rms <= self.allowed


def verify_steps(executor: Executor, source: nn.Module, inputs: Sequence[Any]) -> list[StepError]:
    """Judge every convolution and linear step on its own inputs, batch norm unfolded in float64.

    A whole model's output hides a dropped bias or a wrong eps below its rounding in half precision,
    and below chance where it is a single number. Each channel is judged by itself too.

    Args:
        executor: the plan with the weights under test.
        source: the module whose parameters the plan names.
        inputs: the positional arguments of the model.
    """
    found: list[StepError] = []

    def observe(step: Step, operands: list[Any], result: Any) -> None:
        if isinstance(step.op, (Conv2d, Linear)):
            with cudnn_benchmarking(False):
                found.append(_step_error(step, source, operands, result))

    with torch.no_grad():
        executor.run(inputs, observe)
    return found


def check_steps(executor: Executor, source: nn.Module, inputs: Sequence[Any]) -> None:
    """As :func:`verify_steps`.

    Raises:
        VerificationError: a step is wrong; the message names the worst.
    """
    wrong = [error for error in verify_steps(executor, source, inputs) if not error.ok]
    if wrong:
        worst = max(wrong, key=lambda e: e.rms / max(e.allowed, 1e-300))
        raise VerificationError(
            f"step {worst.step} ({worst.what}) is wrong: "
            f"error {worst.rms:.3g}, allowed {worst.allowed:.3g}"
        )


def _step_error(step: Step, source: nn.Module, operands: list[Tensor], result: Tensor) -> StepError:
    """The step's error as a whole, or that of its worst channel where only that is too large.

    The unit of each element is the spread of its terms, not what is left of them when they cancel.
    PyTorch's own error is pooled over all channels in that unit.
    """
    many = result.dim() == 4 and result[0].numel() >= ENOUGH * result.shape[1]
    if many:  # an image is enough, each with its own answer
        operands, result = [v[:1] for v in operands], result[:1]
    exact, spread = _exact_step(step, source, operands)
    if result.dtype is torch.float64:
        less = [v.float() for v in operands]
        plain = _unfolded(step, source, less, torch.float32).double()
        finer = eps_of(torch.float64) / eps_of(torch.float32)
    else:
        same = [v.to(result.dtype) for v in operands]
        plain, finer = _unfolded(step, source, same, result.dtype).double(), 1.0
    keep = torch.isfinite(exact) & torch.isfinite(plain)
    zero = exact.new_zeros(())
    errors = torch.where(keep, result.double() - exact, zero)
    own = torch.where(keep, plain - exact, zero) * finer
    unit = torch.where(keep, spread, zero)

    eps = product_eps(result.dtype, result.device)
    ulps = FLOOR_ULPS if eps < HALF_EPS else HALF_FLOOR_ULPS
    few = 1 + 4 / sqrt(max(1, result.numel()))  # the rounding of a single element is one draw
    error, allowed = rms(errors), allowed_error(rms(own), few * rms(unit), eps, ulps)
    dim = 1 if isinstance(step.op, Conv2d) else result.dim() - 1
    each, own_each, unit_each = (_rms_by_channel(v, dim) for v in (errors, own, unit))
    typical = rms((own_each / unit_each)[unit_each > 0])
    own_each = torch.maximum(own_each, typical * unit_each)
    limits = CHANNEL * allowed_error(own_each, unit_each, eps, ulps)
    what = describe(step.op)
    if error <= allowed and result.numel() and not bool((each <= limits).all()):
        worst = int((each / limits.clamp(min=1e-300)).argmax())
        error, allowed = float(each[worst]), float(limits[worst])
        what = f"{what}, channel {worst}"
    return StepError(step.where or step.name, what, error, allowed)


def _rms_by_channel(x: Tensor, dim: int) -> Tensor:
    return x.movedim(dim, 0).flatten(1).square().mean(1).sqrt()


def _exact_step(step: Step, source: nn.Module, operands: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The step in float64, and the root of the squares of the terms that each element adds up."""
    operands = [v.double() for v in operands]
    exact = _unfolded(step, source, operands, torch.float64)
    squares = _unfolded(step, source, operands, torch.float64, squared=True)
    return exact, (exact.square() + squares).sqrt()


def _unfolded(
    step: Step, source: nn.Module, operands: list[Tensor], dtype: torch.dtype, squared: bool = False
) -> Tensor:
    """A convolution or linear step as the source computes it, all parameters cast to ``dtype``.

    ``squared`` adds up the squares of all terms instead.
    """

    def get(path: str | None) -> Tensor | None:
        return None if path is None else attribute(source, path).detach().to(dtype)

    def term(value: Tensor | None) -> Any:
        return value.square() if squared and value is not None else value

    op = step.op
    x, *residual = map(term, operands)
    if isinstance(op, Linear):
        y = F.linear(x, term(get(op.weight)), term(get(op.bias)))
        return y.relu() if op.relu else y
    assert isinstance(op, Conv2d)
    geometry = (op.stride, op.padding, op.dilation, op.groups)
    weight, bias = get(op.weight), get(op.bias)
    if op.images is not None:
        found = unnormalised_conv(op, lambda path: attribute(source, path))
        weight, bias = (None if v is None else v.to(dtype) for v in found)
    y = F.conv2d(x, term(weight), term(bias), *geometry)
    norm = op.norm
    if isinstance(norm, BatchNorm2d):
        mean, var, gamma, beta = map(get, (norm.mean, norm.var, norm.weight, norm.bias))
        assert mean is not None
        assert var is not None
        if squared:
            y = _squared_norm(y, mean, var, gamma, beta, norm.eps)
        else:
            y = F.batch_norm(y, mean, var, gamma, beta, False, 0.0, norm.eps)
    for other in residual:
        y = y + other
    return y.relu() if op.relu else y


def _squared_norm(
    y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    def shaped(v: Tensor) -> Tensor:
        return v.reshape(-1, 1, 1)

    scale = (1 if gamma is None else gamma.square()) / (var + eps)
    y = (y + shaped(mean.square())) * shaped(scale)
    return y if beta is None else y + shaped(beta.square())
