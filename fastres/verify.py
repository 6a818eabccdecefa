"""Are two modules the same function? Judged against float64, not against a guessed tolerance.

The rule of two (flash-attention's): a candidate may be at most twice as far from the float64
answer as the reference is in its own precision, plus a few units in the last place of the output's
scale. The root mean square over all outputs is compared: a maximum over a whole model is noisy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from .aten_ops import conv_precision, cudnn_benchmarking, matmul_precision
from .copies import duplicate
from .engine import Executor
from .errors import VerificationError
from .fold import unnormalised_conv
from .guards import unfused
from .ir import BatchNorm2d, Conv2d, Linear, attribute
from .plan import Step, describe

# Rounding the result itself costs up to half a unit; sums of a few roundings stay within four.
FLOOR_ULPS = 4.0
# One step in half precision, with float32 sums, is 0.4 units from float64, like PyTorch: a floor is
# needed for exact results alone, and a larger one would hide a wrong eps.
STEP_FLOOR_ULPS = {torch.float16: 0.5, torch.bfloat16: 0.5}


@dataclass(frozen=True)
class Verification:
    """What was measured when a candidate was compared with its reference.

    Attributes:
        ok: the candidate passed.
        reason: why not, or what the judgement rests on.
        max_abs: largest absolute difference between candidate and reference.
        rms: root mean square of the candidate's error against float64 (against the reference where
            float64 could not be run, or is the reference's own dtype).
        reference_rms: the reference's own error against float64; None where there is no such.
        scale: root mean square of the outputs.
        agreement: share of rows with the same largest entry; None for outputs that are not (N, K).
        finite: no output is infinite or NaN where the reference's is not.
        shape: shape of the first input.
        dtype: dtype of the outputs.
    """

    ok: bool
    reason: str
    max_abs: float
    rms: float
    reference_rms: float | None
    scale: float
    agreement: float | None
    finite: bool
    shape: tuple[int, ...]
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@torch.no_grad()
def verify(
    a: Callable[..., Any], b: Callable[..., Any], inputs: Tensor | Sequence[Any]
) -> Verification:
    """Compare candidate ``b`` with reference ``a`` on real inputs; ``a`` runs as ordinary PyTorch.

    Args:
        a: the reference, a module in eval mode (or any function of the inputs).
        b: the candidate.
        inputs: one tensor, or the positional arguments of both.

    Raises:
        VerificationError: the two do not return the same structure of tensors.
    """
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    actual = _tensors(b(*_copies(arguments)))
    with unfused(), cudnn_benchmarking(False):
        expected = _tensors(a(*_copies(arguments)))
        exact = None if _any_float64(expected) else _float64_outputs(a, arguments)
    _check_structure(expected, actual)
    shape = next((tuple(v.shape) for v in arguments if isinstance(v, Tensor)), ())
    found = judge(expected, actual, exact, shape)
    if found.ok or exact is None:
        return found
    # The same convolution by oneDNN is up to four times less exact in channels_last, the layout of
    # the engine: PyTorch's own error in that layout is what a fused copy is measured by.
    with unfused(), cudnn_benchmarking(False):
        expected = _tensors(a(*tree_map(_to_channels_last, arguments)))
    return judge(expected, actual, exact, shape)


def judge(
    expected: Sequence[Tensor],
    actual: Sequence[Tensor],
    exact: Sequence[Tensor] | None,
    shape: tuple[int, ...] = (),
) -> Verification:
    """The verdict on outputs already computed; ``exact`` is the float64 answer if there is one."""
    dtype = expected[0].dtype
    reference, candidate = _flat(expected), _flat(actual)
    same_holes = bool(torch.equal(torch.isfinite(reference), torch.isfinite(candidate)))
    keep = torch.isfinite(reference) & torch.isfinite(candidate)
    truth = reference if exact is None else _flat(exact)
    keep &= torch.isfinite(truth)
    reference, candidate, truth = reference[keep], candidate[keep], truth[keep]
    scale = rms(truth)
    error = rms(candidate - truth)
    own = None if exact is None else rms(reference - truth)
    eps = _eps(dtype)
    # Without float64, two roundings of every one of ~100 layers are allowed to add up at random.
    unit = product_eps(dtype, expected[0].device)
    allowed = 20 * unit * scale if own is None else 2 * own + FLOOR_ULPS * eps * scale
    ok = same_holes and error <= allowed
    against = "float64" if exact is not None else "the reference"
    bound = f"error {error:.3g} against {against}, allowed {allowed:.3g}"
    return Verification(
        ok=ok,
        reason=bound if same_holes else "infinite or NaN outputs in different places",
        max_abs=float((candidate - reference).abs().max()) if candidate.numel() else 0.0,
        rms=error,
        reference_rms=own,
        scale=scale,
        agreement=_agreement(expected, actual),
        finite=same_holes,
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
    )


def product_eps(dtype: torch.dtype, device: torch.device) -> float:
    """The unit that operands of products are rounded to: TF32's where float32 may be made so."""
    may = "tf32" in (conv_precision(), matmul_precision())
    tf32 = dtype is torch.float32 and device.type == "cuda" and may
    return 2.0**-10 if tf32 else _eps(dtype)


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


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

    This is what half precision needs: a whole model's half-precision output hides a dropped bias or
    a wrong eps below its rounding.

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


def _step_error(step: Step, source: nn.Module, operands: list[Tensor], result: Tensor) -> StepError:
    exact = _unfolded(step, source, [v.double() for v in operands], torch.float64)
    plain = _unfolded(step, source, operands, result.dtype).double()
    keep = torch.isfinite(exact) & torch.isfinite(plain)
    error = rms((result.double() - exact)[keep])
    eps = torch.finfo(result.dtype).eps
    floor = STEP_FLOOR_ULPS.get(result.dtype, FLOOR_ULPS) * eps * rms(exact[keep])
    allowed = 2 * rms((plain - exact)[keep]) + floor
    return StepError(step.where or step.name, describe(step.op), error, allowed)


def _unfolded(step: Step, source: nn.Module, operands: list[Tensor], dtype: torch.dtype) -> Tensor:
    """A convolution or linear step as the source computes it, all parameters cast to ``dtype``."""
    x, *residual = operands

    def get(path: str | None) -> Tensor | None:
        if path is None:
            return None
        value: Tensor = attribute(source, path)
        return value.detach().to(dtype)

    op = step.op
    if isinstance(op, Linear):
        y = F.linear(x, get(op.weight), get(op.bias))  # type: ignore[arg-type]
        return y.relu() if op.relu else y
    assert isinstance(op, Conv2d)
    geometry = (op.stride, op.padding, op.dilation, op.groups)
    weight, bias = get(op.weight), get(op.bias)
    if op.images is not None:
        found = unnormalised_conv(op, lambda path: attribute(source, path))
        weight, bias = (None if v is None else v.to(dtype) for v in found)
    y = F.conv2d(x, weight, bias, *geometry)  # type: ignore[arg-type]
    norm = op.norm
    if isinstance(norm, BatchNorm2d):
        statistics = (get(norm.mean), get(norm.var), get(norm.weight), get(norm.bias))
        y = F.batch_norm(y, *statistics, False, 0.0, norm.eps)
    for other in residual:
        y = y + other
    return y.relu() if op.relu else y


def _copies(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Some models write into their input."""
    copied: tuple[Any, ...] = tree_map(
        lambda v: v.clone() if isinstance(v, Tensor) else v, arguments
    )
    return copied


def _tensors(output: Any) -> list[Tensor]:
    leaves = [leaf for leaf in _leaves(output) if isinstance(leaf, Tensor)]
    if not leaves:
        raise VerificationError(f"the output holds no tensor; got {type(output).__name__}")
    return leaves


def _leaves(output: Any) -> Iterator[Any]:
    for leaf in tree_leaves(_as_tree(output)):
        yield from _leaves(leaf) if _is_dataclass(leaf) else (leaf,)


def _as_tree(output: Any) -> Any:
    """Outputs like dictionaries (Hugging Face's ModelOutput) and dataclasses as plain ones."""
    if _is_dataclass(output) and not isinstance(output, dict):
        return {field.name: getattr(output, field.name) for field in fields(output)}
    return dict(output) if isinstance(output, dict) else output


def _is_dataclass(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _check_structure(expected: list[Tensor], actual: list[Tensor]) -> None:
    wanted = [(tuple(t.shape), t.dtype) for t in expected]
    got = [(tuple(t.shape), t.dtype) for t in actual]
    if wanted != got:
        raise VerificationError(f"the outputs differ in form: expected {wanted}, got {got}")


def _float64_outputs(module: Any, arguments: tuple[Any, ...]) -> list[Tensor] | None:
    """The reference in float64, or None where it is no module or insists on its dtype."""
    if not isinstance(module, nn.Module):
        return None
    try:
        exact = duplicate(module).double()
        with _InFloat64():
            return _tensors(exact(*tree_map(_to_float64, arguments)))
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None


class _InFloat64(TorchFunctionMode):
    """A module's own casts to other floating-point types are not obeyed inside."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _CASTS or not _is_float(result):
            return result
        wide = args[0] if args[0].is_floating_point() else result
        return wide.to(result.device, torch.float64)


_CASTS = (Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16)


def _any_float64(outputs: Sequence[Tensor]) -> bool:
    """Whether the reference is in float64 itself: then nothing more exact judges its rounding."""
    return any(t.dtype is torch.float64 for t in outputs)


def _to_float64(value: Any) -> Any:
    return value.double() if _is_float(value) else value


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _to_channels_last(value: Any) -> Any:
    is_image = isinstance(value, Tensor) and value.dim() == 4
    return value.contiguous(memory_format=torch.channels_last) if is_image else value


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def rms(x: Tensor) -> float:
    """Root mean square in float64; 0 of no elements."""
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def _agreement(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float | None:
    logits = expected[0]
    if len(expected) != 1 or logits.dim() != 2 or 0 in logits.shape or logits.shape[1] < 2:
        return None
    return float((logits.argmax(1) == actual[0].argmax(1)).double().mean())
