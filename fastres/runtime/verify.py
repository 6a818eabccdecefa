"""Are two modules the same function? Judged against float64, not against a guessed tolerance.

The rule of two (flash-attention's): a candidate may be at most twice as far from the float64
answer as the reference is in its own precision, plus a few units in the last place of the output's
scale. The root mean square over all outputs is compared: a maximum over a whole model is noisy.

Both errors are estimates from as many draws as there are outputs, and of one or two outputs that is
nothing to go by: a candidate that seems too far off is measured again on more inputs, varied a
little, until the draws are enough. What is small against the rounding of a whole network is found
in its steps, each judged on its own inputs and channel by channel (:func:`verify_steps`).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from itertools import chain
from math import ceil, sqrt
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ..backends.aten import conv_precision, cudnn_benchmarking, matmul_precision
from ..backends.memory_format import images_to_channels_last
from ..errors import VerificationError
from ..graph.fold import unnormalised_conv
from ..graph.ir import BatchNorm2d, Conv2d, Linear, attribute
from ..graph.modules import duplicate, uncopiable
from ..graph.plan import Step, describe
from .executor import Executor
from .guards import unfused

# Draws of a rounding error: of fewer, an estimate of its size can be wrong by two; and how many are
# tried first, which settles nearly all.
ENOUGH = 64
FEW = 8
# An error this many times what is allowed is no chance: after one look, and after a few draws.
HOPELESS = 1000.0
CLEAR = 5.0
RULE_OF_TWO = 2.0
# Rounding the result itself costs up to half a unit; sums of a few roundings stay within four.
FLOOR_ULPS = 4.0
# One step in half precision, with float32 sums, is 0.4 units from float64, like PyTorch: a floor is
# needed for exact results alone, and a larger one would hide a wrong eps.
HALF_FLOOR_ULPS = 0.5
HALF_EPS = 2.0**-12  # half precision and TF32 are coarser than this
# Seven sigma: the roundings of a channel may all be one draw, that of its folded weights, and a
# network has tens of thousands of channels.
CHANNEL = 7.0
# Without a more exact answer, two roundings of every one of ~100 layers may add up at random.
UNMEASURED_ULPS = 20.0

Answer = Callable[..., Any]
Size = TypeVar("Size", float, Tensor)


@dataclass(frozen=True)
class Verification:
    """What was measured when a candidate was compared with its reference.

    Attributes:
        ok: whether the candidate passed.
        reason: why not, or the measured error and the allowed one.
        max_abs: largest absolute difference between candidate and reference.
        rms: root mean square of the candidate's error against float64 (against the reference where
            float64 could not be run, or is the reference's own dtype).
        reference_rms: the reference's own error against float64, which for a float64 model is that
            of its float32 copy, so much smaller as its unit is; None where nothing measured it.
        scale: root mean square of the outputs.
        agreement: share of images with the same largest output; None for outputs that are not
            (N, K).
        finite: whether no output is infinite or NaN where the reference is finite.
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
    a: Answer, b: Answer, inputs: Tensor | Sequence[Any], *, same_form: bool = False
) -> Verification:
    """Compare candidate ``b`` with reference ``a`` on real inputs; ``a`` runs as ordinary PyTorch.

    A module is run on copies of it, so that nothing of it changes, nor do the states of random
    numbers.

    Args:
        a: the reference, a module in eval mode or any function of the inputs.
        b: the candidate, likewise.
        inputs: one tensor, or the positional arguments of both.
        same_form: the containers must be of the same types too, and what is no tensor equal.

    Raises:
        VerificationError: the two do not return the same structure of tensors; the reference gives
            two answers to one input, or cannot be copied.
    """
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    with undisturbed():
        if not isinstance(a, nn.Module):
            return compare(a, b, None, arguments, same_form)
        doubles = _first_float((*a.parameters(), *a.buffers(), *arguments)) is torch.float64
        exact = Recast(a, torch.float32 if doubles else torch.float64)
        return compare(copied(a), b, exact, arguments, same_form)


@torch.no_grad()
def compare(
    reference: Answer,
    candidate: Answer,
    exact: Answer | None,
    arguments: tuple[Any, ...],
    same_form: bool = False,
) -> Verification:
    """The rule of two for functions of ``arguments``, over as many draws of rounding as it takes.

    Args:
        reference: ordinary PyTorch; called twice at first, which must give one answer.
        candidate: what is judged.
        exact: the reference in float64, or a :class:`Recast`; one that fails is done without.
        arguments: of all three.
        same_form: as for :func:`verify`.
    """
    shape = next((tuple(v.shape) for v in arguments if isinstance(v, Tensor)), ())
    draws = _Draws(reference, candidate, exact, same_form)
    draws.add(arguments, twice=True)
    first, allowed = found, _ = draws.verdict(shape)
    each = max(1, sum(t.numel() for t in draws.expected[0]))
    varied = _variants(arguments)
    for wanted, hopeless in ((FEW, HOPELESS), (ENOUGH, CLEAR)):
        if found.ok or draws.exact is None or not found.rms <= hopeless * allowed:
            break
        while len(draws.inputs) < max(4, ceil(wanted / each)):
            draws.add(next(varied))
        found, allowed = draws.verdict(shape)
    return replace(found, max_abs=first.max_abs, agreement=first.agreement)


class Recast:
    """A module in another precision, on a copy that is made at the first call.

    For float64 modules that is float32: what a network makes of rounding is the same in both, but
    for the unit, so its error in float32 tells how large that in float64 may be.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module, self.dtype = module, dtype
        self._copy: nn.Module | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self._copy is None:
            self._copy = duplicate(self.module).to(self.dtype)
        with _InPrecision(self.dtype):
            return self._copy(*tree_map(self._cast, arguments))

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if _is_float(value) else value


class _Draws:
    """Answers of reference, candidate and the exact function to several inputs."""

    def __init__(
        self, reference: Answer, candidate: Answer, exact: Answer | None, same_form: bool
    ) -> None:
        self.same_form = same_form
        self.coarse = isinstance(exact, Recast) and exact.dtype is torch.float32
        self.reference, self.candidate, self.exact = reference, candidate, exact
        self.expected: list[list[Tensor]] = []
        self.reordered: list[list[Tensor]] = []
        self.reordered_coarse: list[list[Tensor]] = []
        self.actual: list[list[Tensor]] = []
        self.truth: list[list[Tensor]] = []
        self.inputs: list[tuple[Any, ...]] = []

    def add(self, arguments: tuple[Any, ...], twice: bool = False) -> None:
        output = self.candidate(*_copies(arguments))
        actual = _tensors(output)
        with unfused(), cudnn_benchmarking(False):
            answer = self.reference(*_copies(arguments))
            expected = _tensors(answer)
            _check_structure(expected, actual)
            if self.same_form and _form(answer) != _form(output):
                raise VerificationError(
                    f"the outputs differ in form: expected {_form(answer)}, got {_form(output)}"
                )
            if twice:
                _check_reproducible(expected, _tensors(self.reference(*_copies(arguments))))
            truth = self._exact(arguments)
        self.inputs.append(arguments)
        self.actual.append(actual)
        self.expected.append(expected)
        self.truth.append(truth or [])

    def verdict(self, shape: tuple[int, ...]) -> tuple[Verification, float]:
        """Over all inputs, and the error that is allowed. The same convolution by oneDNN is up to
        four times less exact in channels_last, the layout of the engine: PyTorch's own error in
        that layout counts too."""
        actual = list(chain(*self.actual))
        truth = None if self.exact is None else list(chain(*self.truth))
        found = compare_outputs(list(chain(*self.expected)), actual, truth, shape, self.coarse)
        if found[0].ok or truth is None:
            return found
        with unfused(), cudnn_benchmarking(False):
            for arguments in self.inputs[len(self.reordered) :]:
                nhwc = tree_map(images_to_channels_last, arguments)
                self.reordered.append(_tensors(self.reference(*_copies(nhwc))))
                if self.coarse:  # float32 shows what the layout costs in float32 alone
                    self.reordered_coarse.append(self._exact(nhwc) or [])
        if self.coarse:
            truth = list(chain(*self.reordered_coarse))
        other = compare_outputs(list(chain(*self.reordered)), actual, truth, shape, self.coarse)
        return max(found, other, key=lambda verdict: verdict[1])

    def _exact(self, arguments: tuple[Any, ...]) -> list[Tensor] | None:
        """None, now and later, where there is no more exact answer of the same form."""
        if self.exact is None:
            return None
        try:
            return _tensors(self.exact(*_copies(arguments)))
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            self.exact = None
            return None


def compare_outputs(
    expected: Sequence[Tensor],
    actual: Sequence[Tensor],
    exact: Sequence[Tensor] | None,
    shape: tuple[int, ...] = (),
    coarse: bool = False,
) -> tuple[Verification, float]:
    """The verdict on outputs, and the error that is allowed.

    Args:
        expected: the reference's outputs.
        actual: the candidate's.
        exact: the outputs in float64, if there are any.
        shape: of the first input.
        coarse: ``exact`` is in float32.
    """
    dtype = expected[0].dtype
    reference, candidate = _flat(expected), _flat(actual)
    same_holes = bool(torch.equal(torch.isfinite(reference), torch.isfinite(candidate)))
    keep = torch.isfinite(reference) & torch.isfinite(candidate)
    other = None if exact is None else _flat(exact)
    if other is not None and other.shape == reference.shape:
        keep &= torch.isfinite(other)
        other = other[keep]
    else:  # a detector's float32 answer may have other boxes
        other = None
    reference, candidate = reference[keep], candidate[keep]
    truth = reference if other is None or coarse else other
    scale = rms(truth)
    error = rms(candidate - truth)
    own = None if other is None else rms(reference - other)
    allowed = UNMEASURED_ULPS * product_eps(dtype, expected[0].device) * scale
    if own is not None and coarse:
        own *= _eps(torch.float64) / _eps(torch.float32)
        allowed = max(allowed, 3 * own)  # of which the reference has one itself
    elif own is not None:
        allowed = allowed_error(own, scale, _eps(dtype))
    against = "the reference" if own is None or coarse else "float64"
    bound = f"error {error:.3g} against {against}, allowed {allowed:.3g}"
    verification = Verification(
        ok=same_holes and error <= allowed,
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
    return verification, allowed


def allowed_error(own: Size, scale: Size, eps: float, ulps: float = FLOOR_ULPS) -> Size:
    """How far from float64 a candidate may be, by the rule of two.

    Args:
        own: the reference's error in its own precision.
        scale: size of the exact answer, by the same norm as ``own``.
        eps: relative unit in the last place of the candidate's dtype.
        ulps: such units that are allowed besides, where the reference happens to round well.
    """
    return RULE_OF_TWO * own + ulps * eps * scale


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
        finer = _eps(torch.float64) / _eps(torch.float32)
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


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, random numbers may be drawn: afterwards their states are what they were."""
    cuda = torch.cuda.is_initialized()
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    kept = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count() if cuda else 0)):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(kept)


def copied(module: nn.Module, shared: Mapping[int, Any] | None = None) -> nn.Module:
    """A copy for the module to be run on; with the objects ``shared``, by their ``id``, if given.

    Raises:
        VerificationError: there can be none.
    """
    try:
        return duplicate(module, shared)
    except Exception as error:
        raise VerificationError(uncopiable(module, error)) from error


def _variants(arguments: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Inputs of the same kind: images moved a little, floats up to an eighth smaller."""
    generator = torch.Generator().manual_seed(0)

    def vary(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            span = value if bool(value.any()) else torch.ones_like(value)
            noise = torch.rand(value.shape, generator=generator).to(value.device, value.dtype)
            value = value - span * noise / 8
        if value.dim() == 4 and value.numel():
            value = value.roll(torch.randint(8, (2,), generator=generator).tolist(), (2, 3))
        return value

    while True:
        yield tree_map(vary, arguments)


def _check_reproducible(first: list[Tensor], second: list[Tensor]) -> None:
    """Rounding may differ from run to run, as memory is aligned; nothing else may."""
    one, two = _flat(first), _flat(second)
    dtype = first[0].dtype
    eps = product_eps(dtype, first[0].device)
    if one.shape == two.shape:
        keep = torch.isfinite(one)
        units = 1.0 if eps >= HALF_EPS else UNMEASURED_ULPS
        same = torch.equal(keep, torch.isfinite(two))
        if same and rms((one - two)[keep]) <= units * eps * rms(one[keep]):
            return
    raise VerificationError(
        "the source gives two answers to one input: it draws random numbers, or its forward "
        "changes a state that the next answer depends on. No comparison can tell whether a copy is "
        "right; verify=False takes one unchecked"
    )


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


def _form(output: Any) -> Any:
    leaves, form = tree_flatten(output)
    return form, [leaf for leaf in leaves if isinstance(leaf, (bool, int, float, str))]


def _check_structure(expected: list[Tensor], actual: list[Tensor]) -> None:
    wanted = [(tuple(t.shape), t.dtype) for t in expected]
    got = [(tuple(t.shape), t.dtype) for t in actual]
    if wanted != got:
        raise VerificationError(f"the outputs differ in form: expected {wanted}, got {got}")


class _InPrecision(TorchFunctionMode):
    """A module's own casts to other floating-point types are not obeyed inside."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _CASTS or not _is_float(result):
            return result
        wide = args[0] if args[0].is_floating_point() else result
        return wide.to(result.device, self.dtype)


_CASTS = (
    *(Tensor.to, Tensor.type, Tensor.type_as),
    *(Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16),
)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _first_float(values: Sequence[Any]) -> torch.dtype | None:
    floats = (v.dtype for v in values if _is_float(v))
    return next(floats, None)


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
