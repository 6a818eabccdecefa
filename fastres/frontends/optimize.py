"""Any traceable module to a frozen, fused, verified copy for inference."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..backends.select import check_backend
from ..errors import VerificationError
from ..graph import plan, trace
from ..graph.effects import hooks_into
from ..graph.fold import fold_step
from ..graph.ir import Conv2d, Linear, attribute
from ..graph.match import has_hooks
from ..graph.modules import duplicate, unwrapped
from ..graph.plan import Plan, parameter_paths
from ..runtime.first_call import can_show_errors
from ..runtime.guards import Change, WeightGuard, heeds_training
from ..runtime.verify import Verification, copied, undisturbed, verify
from ..runtime.verify_steps import check_steps
from .fast_model import FastModel, with_signature
from .fast_shell import FastShell

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class _Pending:
    """The source, kept until the first call has shown that its copy gives the same answers.

    Deep copies of the model wait for the same source; a pickle does not carry it.
    """

    def __init__(self, source: nn.Module, traced: Plan, watch: bool) -> None:
        copied(source, {id(p): p for p in source.parameters()})  # or refused at once
        self.source = source
        paths = [path for step in traced.steps for path in parameter_paths(step.op)]
        self.guard = WeightGuard(source, paths) if watch else None

    def __call__(self, model: FastModel, arguments: Sequence[Any]) -> None:
        if self.guard is not None and self.guard.check() is not Change.NONE:
            raise VerificationError(
                "the source changed before the first call could be checked against it; "
                "optimize it again, or give example_input"
            )
        source = self.source
        if any(t.device != model.device for t in (*source.parameters(), *source.buffers())):
            source = copied(source).to(model.device)
        model.verification = check_against(source, model, arguments)

    def __deepcopy__(self, memo: Any) -> _Pending:
        return self

    def __reduce__(self) -> Any:
        return type(None), ()


class _ByPosition(nn.Module):
    """A module whose last arguments, keyword-only ones, are passed by position."""

    def __init__(self, module: nn.Module, keywords: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.keywords = keywords

    def forward(self, *arguments: Any) -> Any:
        first = len(arguments) - len(self.keywords)
        named = dict(zip(self.keywords, arguments[first:], strict=True))
        return self.module(*arguments[:first], **named)


@undisturbed()
def optimize(
    model: nn.Module,
    example_input: Tensor | Sequence[Any] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    verify: bool = True,
) -> FastModel | FastShell:
    """Fold and fuse a module for inference; the module itself is left as it is.

    What torch.fx cannot trace whole, such as a detector, becomes a FastShell:
    a copy with the source's own Python around its largest traceable parts.

    Args:
        model: any module in eval mode; (Distributed)DataParallel and torch.compile are looked
            through.
        example_input: a real input (or the positional arguments) to verify with; without one the
            first call is verified.
        dtype: compute in this dtype, or the one of this name (``"bfloat16"``), folded from the
            source's weights; default the source's own.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        verify: compare with the source; the measurement is kept as ``verification``.

    Raises:
        TypeError, ValueError: an argument is not what it must be.
        TraceError: neither the module's Python nor that of any part of it can be recorded.
        FoldError: a batch norm's numbers cannot be folded; the message names the layer.
        VerificationError: the fused copy's answers differ from the source's.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is of torch.jit, which torch.fx cannot record; optimize its source")
    model, dtype = unwrapped(model), _dtype_named(dtype)
    _check_source(model, dtype)
    _check_example(example_input)
    check_backend(backend)
    fast: FastModel | FastShell
    try:
        fast = _fuse(model, dtype, backend, verify)
    except trace.TraceError as error:
        fast = _fuse_parts(model, dtype, backend, verify, error)
    _warn_of_nothing(model, fast)
    hooked = hooks_into(model)
    if hooked is not None:
        warnings.warn(
            f"a forward hook of {hooked} refers to modules of the source, and goes on to: what it "
            "stores there is not on the copy",
            stacklevel=3,  # past the wrapper of optimize
        )
    if verify and example_input is not None:
        example = [example_input] if isinstance(example_input, Tensor) else example_input
        if not can_show_errors(example):
            raise ValueError("example_input is empty or not finite, so it cannot show an error")
        fast(*example)
    return fast


def _warn_of_nothing(model: nn.Module, fast: FastModel | FastShell) -> None:
    """Say so where a copy computes as its source does, one layer at a time."""
    plans = (
        [fast.traced] if isinstance(fast, FastModel) else [p.traced for p in fast.parts.values()]
    )
    convolutions = any(isinstance(m, _ConvNd) for m in model.modules())
    if any(p.fuses_convolutions or (p.fuses and not convolutions) for p in plans):
        return
    what = "no convolution" if any(p.fuses for p in plans) else "nothing"
    reasons = Counter(reason for p in plans for _, reason in p.fallbacks).most_common(2)
    why = f" ({'; '.join(reason for reason, _ in reasons)})" if reasons else ""
    warnings.warn(
        f"{what} of {type(model).__name__} could be fused{why}; plan() shows each step",
        stacklevel=4,  # past the wrapper of optimize
    )


def _fuse_parts(
    model: nn.Module,
    dtype: torch.dtype | None,
    backend: str,
    verify: bool,
    error: trace.TraceError,
) -> FastModel | FastShell:
    """The parts of a module that cannot be traced whole; else whatever is around them."""

    def part(copied: nn.Module) -> FastModel:
        return _fuse(copied, dtype, backend, verify, watch=False)

    try:
        return FastShell(model, part, dtype, str(error))
    except trace.TraceError as none:
        try:
            return _fuse(model, dtype, backend, verify, most=False)
        except trace.TraceError:
            raise none from error


def _fuse(
    model: nn.Module,
    dtype: torch.dtype | None,
    backend: str,
    verify: bool,
    most: bool = True,
    watch: bool = True,
) -> FastModel:
    """The fused copy of a module that can be traced whole; ``watch`` if others may change it."""
    traced = plan.of_module(model, most=most)
    fast = _folded(model, traced, dtype or _weight_dtype(model, traced), backend)
    if verify:
        fast._pending = _Pending(model, traced, watch)
    return fast


def _folded(model: nn.Module, traced: Plan, dtype: torch.dtype, backend: str) -> FastModel:
    """The copy that a plan describes, with the module's weights folded in this dtype."""
    source_dtype = _weight_dtype(model, traced)
    folded = {
        index: fold_step(step.op, lambda path: attribute(model, path), dtype)
        for index, step in enumerate(traced.steps)
        if isinstance(step.op, (Conv2d, Linear))
    }
    return with_signature(inspect.signature(model.forward))(
        traced,
        folded,
        _keep(model, traced, dtype, casts=dtype is not source_dtype),
        dtype=dtype,
        source_dtype=source_dtype,
        backend=backend,
        described=_plain_attributes(model),
        names=_names(model),
    )


@undisturbed()
def check_against(source: nn.Module, model: FastModel, arguments: Sequence[Any]) -> Verification:
    """Compare a fused copy with its source on (at most four images of) these arguments.

    Each convolution and linear step is judged on its own inputs too. In half precision the whole
    hides what its rounding is larger than, so the plan is judged in float32 besides.

    Raises:
        VerificationError: the copy is wrong; the message gives the measured error.
    """
    arguments = _few(arguments)
    same = [_to(value, model.source_dtype, model.dtype) for value in arguments]
    found = _check_whole(source, model, same)
    check_steps(model.executor(), source, same)
    if model.dtype in (torch.float16, torch.bfloat16):
        wide = [_to(value, model.dtype, torch.float32) for value in same]
        try:
            _check_whole(source, _folded(source, model.traced, torch.float32, "torch"), wide)
        except VerificationError:
            raise
        except RuntimeError:  # of code between the steps that needs its own dtype
            pass
    if not found.finite or not _all_finite(model.run(same)):
        advice = "; try torch.bfloat16" if model.dtype is torch.float16 else ""
        warnings.warn(f"the outputs are not all finite in {model.dtype}{advice}", stacklevel=5)
    return found


def _check_whole(source: nn.Module, model: FastModel, arguments: Sequence[Any]) -> Verification:
    """The outputs of both in the copy's dtype, which the arguments have."""
    reference = source
    if model.dtype is not model.source_dtype:
        reference = copied(source).to(model.dtype)
    keywords = [p.name for p in model.signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    if keywords:
        reference = _ByPosition(reference, keywords)
    found = verify(reference, lambda *args: model.run(args), arguments, same_form=True)
    if not found.ok:
        raise VerificationError(
            f"{type(source).__name__} and its fused copy differ: {found.reason}{_of_int8(source)}"
        )
    return found


def _of_int8(source: nn.Module) -> str:
    """What may be behind a difference where layers round to 8 bits."""
    kinds = ((name, type(m).__module__) for name, m in source.named_modules())
    layers = [name for name, kind in kinds if "quantized" in kind.split(".")]
    if not layers:
        return ""
    return (
        f"; {layers[0]} computes in int8, where the least difference before it may be a whole step "
        "behind it: optimize the float model, or judge yourself with verify=False"
    )


def _check_source(model: nn.Module, dtype: torch.dtype | None) -> None:
    if isinstance(model, (FastModel, FastShell)):
        raise TypeError(f"model is a {type(model).__name__} already")
    training = [n for n, m in model.named_modules() if m.training and heeds_training(m)]
    if training:
        culprit = "the model" if model.training else training[0]
        raise ValueError(f"model must be in eval mode; {culprit} is in training mode")
    if has_hooks(model):
        raise ValueError("model has forward hooks of its own, which a fused copy would not run")
    if "forward" in vars(model):
        raise ValueError("model's forward was replaced on the instance, which tracing cannot see")
    devices = {str(t.device) for t in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        raise ValueError(f"model must be on one device; got {', '.join(sorted(devices))}")
    if "meta" in devices:
        raise ValueError("model is on the meta device: it has no weights to fold")
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    dtypes = {m.weight.dtype: f"{m.weight.dtype} ({name}.weight)" for name, m in layers}
    if len(dtypes) > 1 and dtype is not None:
        raise ValueError(
            f"dtype={dtype} is for models with weights of one dtype; "
            f"got {', '.join(dtypes.values())}"
        )


def _dtype_named(dtype: torch.dtype | str | None) -> torch.dtype | None:
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) else None
    found = dtype if name is None else getattr(torch, name, name)
    if found is not None and found not in FLOATS:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOATS))}; got {dtype!r}")
    return found


def _check_example(example: Any) -> None:
    taken = isinstance(example, (Tensor, Sequence)) and not isinstance(example, str)
    if example is not None and not taken:
        raise TypeError(
            "example_input must be a tensor or a sequence of positional arguments; "
            f"got {type(example).__name__}"
        )


def _plain_attributes(source: nn.Module) -> dict[str, Any]:
    """Copies of the public attributes that say what a module is: sizes, names, configurations."""
    own = set(vars(nn.Module()))
    found = {}
    for name, value in vars(source).items():
        leaves = torch.utils._pytree.tree_leaves(value)
        opaque = any(callable(leaf) or isinstance(leaf, (Tensor, nn.Module)) for leaf in leaves)
        if not (name.startswith("_") or name in own or opaque):
            with suppress(Exception):  # locks, files and the like: nothing that a copy could be
                found[name] = copy.deepcopy(value)
    return found


def _names(source: nn.Module) -> set[str]:
    """What a user could set on the source: its attributes, modules and tensors, its class's too."""
    tensors = (*source._parameters, *source._buffers, *source._modules)
    found = {*vars(source), *tensors, *dir(type(source))} - {*vars(nn.Module()), *dir(nn.Module)}
    return found - {"__module__", "__doc__"}


def _weight_dtype(source: nn.Module, traced: Plan) -> torch.dtype:
    """That of the first step with weights, or else of the source's first floating-point tensor."""
    layers = [s.op for s in traced.steps if isinstance(s.op, (Conv2d, Linear))]
    paths = (op.weight for op in layers)
    watched: list[Tensor] = [attribute(source, path) for path in paths]
    tensors = (*watched, *source.parameters(), *source.buffers())
    floating = (t.dtype for t in tensors if t.is_floating_point())
    return next(floating, torch.get_default_dtype())


def _keep(source: nn.Module, traced: Plan, dtype: torch.dtype, casts: bool) -> nn.Module:
    """Copies, under names of our own, of what the steps left to PyTorch still need; each in its own
    dtype unless ``casts``, but for centred images, which a convolution of ours reads."""
    images = [s.op.images for s in traced.steps if isinstance(s.op, Conv2d) and s.op.images]
    centered = {f"{normalize.module}.centered" for normalize in images}
    kept = nn.Module()
    for path, name in plan.kept_names(traced).items():
        value = attribute(source, path)
        if isinstance(value, nn.Module):
            copied = duplicate(value)
            if casts or path in centered:
                copied = copied.to(dtype)
            for parameter in copied.parameters():  # torch.jit's modules refuse requires_grad_
                parameter.detach_()
            kept.add_module(name, copied)
        elif isinstance(value, Tensor):
            value = value.detach().clone()
            cast = casts and value.is_floating_point()
            kept.register_buffer(name, value.to(dtype) if cast else value)
        else:
            setattr(kept, name, copy.deepcopy(value))
    return kept.eval()


def _few(arguments: Sequence[Any], images: int = 4) -> Sequence[Any]:
    """Four images say as much as a full batch; other arguments are passed on whole."""
    if len(arguments) == 1 and isinstance(arguments[0], Tensor) and arguments[0].dim() == 4:
        return [arguments[0][:images]]
    return arguments


def _to(value: Any, source: torch.dtype, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype is source else value


def _all_finite(output: Any) -> bool:
    leaves = torch.utils._pytree.tree_leaves(output)
    return all(bool(torch.isfinite(t).all()) for t in leaves if isinstance(t, Tensor))
