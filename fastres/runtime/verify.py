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
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ..backends.aten import cudnn_benchmarking
from ..backends.memory_format import images_to_channels_last
from ..errors import VerificationError
from ..graph.modules import duplicate, uncopiable
from .guards import unfused
from .tolerance import ENOUGH, HALF_EPS, UNMEASURED_ULPS, allowed_error, eps_of, product_eps, rms

FEW = 8  # draws that are tried first, which settles nearly all
# An error this many times what is allowed is no chance: after one look, and after a few draws.
HOPELESS = 1000.0
CLEAR = 5.0

Answer = Callable[..., Any]


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
        own *= eps_of(torch.float64) / eps_of(torch.float32)
        allowed = max(allowed, 3 * own)  # of which the reference has one itself
    elif own is not None:
        allowed = allowed_error(own, scale, eps_of(dtype))
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


def _agreement(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float | None:
    logits = expected[0]
    if len(expected) != 1 or logits.dim() != 2 or 0 in logits.shape or logits.shape[1] < 2:
        return None
    return float((logits.argmax(1) == actual[0].argmax(1)).double().mean())
