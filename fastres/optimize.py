"""Any traceable module to a frozen, fused, verified copy for inference."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import fold, plan, portable, trace
from .backends import check_backend, select_ops
from .cuda_graph import GraphRunner, warm_up
from .engine import Executor
from .errors import BackendError, InputError, InputTypeError, VerificationError
from .fold import Weights, fold_step
from .guards import GRADIENT, Change, Watch, ambient_reason, in_functorch
from .ir import Call, Conv2d, Linear, attribute
from .plan import Plan, Step, parameter_paths
from .shell import FastShell
from .verify import Verification, verify, verify_steps

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class FastModel(nn.Module):
    """A fused copy of a module, for inference only; made by :func:`optimize`.

    The folded weights are buffers, so ``.to(device)``, ``state_dict`` and ``deepcopy`` work. The
    dtype is fixed, under autocast too: folding again from the source is more exact than casting
    what was folded. The source's plain attributes (such as timm's ``feature_info``) can be read
    from the copy.

    Attributes:
        verification: the measured comparison with the source; None until it has run.
    """

    def __init__(self, source: nn.Module, traced: Plan, dtype: torch.dtype, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.dtype = dtype
        self.source_dtype = _weight_dtype(source, traced)
        self.verification: Verification | None = None
        self._described = _plain_attributes(source)
        self._plan = traced
        self._pending: _Pending | None = None
        self.folded = nn.Module()
        for index, step in enumerate(traced.steps):
            if isinstance(step.op, (Conv2d, Linear)):
                self._add_weights(index, fold_step(step.op, lambda p: attribute(source, p), dtype))
        self.kept = _keep(source, traced, dtype)
        self._runners: dict[tuple[str, torch.device], GraphRunner] = {}
        self._program = portable.lower(traced)
        self._on_triton = self._served_by_triton()
        self.eval()

    signature: ClassVar[inspect.Signature]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the source's forward, without gradients.

        Raises:
            InputError, InputTypeError: an argument does not fit the model.
            VerificationError: this is the first call and the outputs differ from the source's.
        """
        if torch.compiler.is_compiling() or _transformed((*args, *kwargs.values())):
            return self._program(self, self._functional(), *args, **kwargs)
        arguments = self._bind(args, kwargs)
        if self._pending is not None and _can_show_errors(arguments):
            self._pending.check(self, arguments)
            self._pending = None
        return self.run(arguments)

    def run(self, arguments: Sequence[Any]) -> Any:
        """Run the plan on positional arguments, one per parameter of the source's forward."""
        home = self._device(arguments)
        runner = self._runner(home)
        arguments = [self._cast(value) for value in arguments]
        with torch.no_grad(), _without_autocast(home):
            if len(arguments) == 1 and isinstance(arguments[0], Tensor):
                return runner(arguments[0])
            return runner.executor.run(arguments)

    def plan(self) -> Plan:
        """Each step, what computes it, what was left to PyTorch and why; ``str()`` is a table."""
        return self._runner(self._home()).executor.plan

    def executor(self) -> Executor:
        """The plan with its weights, for looking at single steps."""
        return self._runner(self._home()).executor

    def warmup(self, shapes: Sequence[Sequence[int]]) -> FastModel:
        """Run each input shape often enough that compiling and graph capture are behind it."""
        warm_up(lambda x: self.run([x]), shapes, self._home(), self.dtype)
        return self

    def train(self, mode: bool = True) -> FastModel:
        """Refuses training: the batch norms are gone.

        Raises:
            RuntimeError: for ``mode=True``.
        """
        if mode:
            raise RuntimeError(
                "a FastModel is for inference only; train the source and optimize it"
            )
        return super().train(False)

    def _add_weights(self, index: int, weights: Weights) -> None:
        weight, bias = weights
        self.folded.register_buffer(f"weight{index}", weight)
        self.folded.register_buffer(f"bias{index}", bias)

    def _step_weights(self, step: Step) -> Weights:
        index = self._index[step.name]
        return getattr(self.folded, f"weight{index}"), getattr(self.folded, f"bias{index}")

    @property
    def _index(self) -> dict[str, int]:
        return {step.name: index for index, step in enumerate(self._plan.steps)}

    def _runner(self, device: torch.device) -> GraphRunner:
        ops = select_ops(self.backend, device, self.dtype)
        key = (ops.name, device)
        if key not in self._runners:
            executor = Executor(self._plan, self.kept, ops, self.dtype, self._step_weights)
            self._runners[key] = GraphRunner(executor)
        return self._runners[key]

    def _home(self) -> torch.device:
        return next((t.device for t in self.buffers()), torch.device("cpu"))

    def _device(self, arguments: Sequence[Any]) -> torch.device:
        home = self._home()
        for parameter, value in zip(self._plan.parameters, arguments, strict=True):
            if isinstance(value, Tensor) and value.device != home:
                raise InputError(
                    f"{parameter.name} must be on {home}, as the weights are; got {value.device}"
                )
            if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
                raise InputError(
                    f"{parameter.name} requires grad, but a FastModel has no backward; "
                    "use the source, or call it under torch.no_grad()"
                )
        return home

    def _cast(self, value: Any) -> Any:
        """Images in the source's dtype are taken as well as those in the model's own."""
        if isinstance(value, Tensor) and value.dtype is self.source_dtype:
            return value.to(self.dtype)
        return value

    def _functional(self) -> portable.Aten:
        """What computes the steps of the portable program; an export must not need fastres."""
        if not torch.compiler.is_compiling():
            return _ANY_LAYOUT if in_functorch() else _ATEN
        # Dynamo takes torch.compiler.is_exporting() for True; the flag itself it reads as it is.
        exporting = getattr(torch.compiler, "_is_exporting_flag", False)
        return _CUSTOM_OPS if self._on_triton and not exporting else _ATEN

    def _served_by_triton(self) -> bool:
        try:
            return select_ops(self.backend, self._home(), self.dtype).name == "triton"
        except BackendError:
            return False

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        names = [parameter.name for parameter in self._plan.parameters]
        return [bound.arguments[name] for name in names]

    def _apply(self, fn: Any, recurse: bool = True) -> FastModel:
        if fn(torch.empty(0, dtype=self.dtype, device=self._home())).dtype is not self.dtype:
            raise InputTypeError(
                f"the dtype of a FastModel is fixed ({self.dtype}); "
                "call optimize(source, dtype=...) for another one"
            )
        self._runners.clear()
        super()._apply(lambda t: _keeping_dtype(fn, t), recurse)
        self._on_triton = self._served_by_triton()
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As ``nn.Module.load_state_dict``; the engine takes the new weights."""
        self._runners.clear()
        return super().load_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        described = self.__dict__.get("_described", {})
        return described[name] if name in described else super().__getattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (self.signature,), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runners": {}, "_pending": None, "_program": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._program = portable.lower(self._plan)


def with_signature(signature: inspect.Signature) -> type[FastModel]:
    """A FastModel whose forward shows this signature, as torch.export and its users look it up."""

    def forward(self: FastModel, *args: Any, **kwargs: Any) -> Any:
        return FastModel.forward(self, *args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    if any(p.kind is not inspect.Parameter.POSITIONAL_ONLY for p in plain):
        own = own.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = inspect.Signature([own, *plain])  # type: ignore[attr-defined]
    members = {
        "forward": forward,
        "signature": inspect.Signature(plain),
        "__module__": __name__,
        "__doc__": FastModel.__doc__,
    }
    return type("FastModel", (FastModel,), members)


def _new(signature: inspect.Signature) -> FastModel:
    kind = with_signature(signature)
    return kind.__new__(kind)


class _Pending:
    """The source, kept until the first call has shown that its copy gives the same answers."""

    def __init__(self, source: nn.Module, traced: Plan) -> None:
        self.source = source
        paths = [path for step in traced.steps for path in parameter_paths(step.op)]
        self.watch = Watch(source, paths)

    def check(self, model: FastModel, arguments: Sequence[Any]) -> None:
        if self.watch.change() is not Change.NONE:
            raise VerificationError(
                "the source changed before the first call could be checked against it; "
                "optimize it again, or give example_input"
            )
        model.verification = check_against(self.source, model, arguments)


def optimize(
    model: nn.Module,
    *,
    example_input: Tensor | Sequence[Any] | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    verify: bool = True,
) -> FastModel | FastShell:
    """Fold and fuse a module for inference; the module itself is left as it is.

    What torch.fx cannot trace whole, such as a detector, becomes a FastShell (fastres.shell):
    a copy with the source's own Python around its largest traceable parts.

    Args:
        model: any module in eval mode; (Distributed)DataParallel and torch.compile are looked
            through.
        example_input: a real input (or the positional arguments) to verify with; without one the
            first call is verified.
        dtype: compute in this dtype, folded from the source's weights; default the source's own.
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
    model = unwrapped(model)
    _check_source(model)
    check_backend(backend)
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOATS))}; got {dtype!r}")
    fast: FastModel | FastShell
    try:
        fast = _fuse(model, dtype, backend, verify)
    except trace.TraceError as error:
        fast = FastShell(model, lambda part: _fuse(part, dtype, backend, verify), dtype, str(error))
        if verify:
            fast.verify_with(model)
    if verify and example_input is not None:
        example = [example_input] if isinstance(example_input, Tensor) else example_input
        if not _can_show_errors(example):
            raise ValueError("example_input is empty or not finite, so it cannot show an error")
        fast(*example)
    return fast


def _fuse(model: nn.Module, dtype: torch.dtype | None, backend: str, verify: bool) -> FastModel:
    """The fused copy of a module that can be traced whole."""
    traced = plan.build(fold.fold(trace.trace(model)))
    kind = with_signature(inspect.signature(model.forward))
    fast = kind(model, traced, dtype or _weight_dtype(model, traced), backend)
    if verify:
        fast._pending = _Pending(model, traced)
    return fast


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile's wrapper."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrapped(model.module)
    inner = model._modules.get("_orig_mod")
    return model if inner is None else unwrapped(inner)


def check_against(source: nn.Module, model: FastModel, arguments: Sequence[Any]) -> Verification:
    """Compare a fused copy with its source on (at most four images of) these arguments.

    In half precision each step is judged on its own inputs too.

    Raises:
        VerificationError: the copy is wrong; the message gives the measured error.
    """
    arguments = _few(arguments)
    reference = source
    if model.dtype is not model.source_dtype:
        reference = copy.deepcopy(source).to(model.dtype)
    same = [_to(value, model.source_dtype, model.dtype) for value in arguments]
    found = verify(reference, lambda *args: model.run(args), same)
    if not found.ok:
        raise VerificationError(
            f"{type(source).__name__} and its fused copy differ: {found.reason}"
        )
    if model.dtype in (torch.float16, torch.bfloat16):
        wrong = [e for e in verify_steps(model.executor(), source, same) if not e.ok]
        if wrong:
            worst = max(wrong, key=lambda e: e.rms / max(e.allowed, 1e-300))
            raise VerificationError(
                f"step {worst.step} ({worst.what}) is wrong: "
                f"error {worst.rms:.3g}, allowed {worst.allowed:.3g}"
            )
    if not found.finite or not _all_finite(model.run(same)):
        warnings.warn(
            f"the outputs are not all finite in {model.dtype}; try torch.bfloat16", stacklevel=4
        )
    return found


def _check_source(model: nn.Module) -> None:
    if isinstance(model, (FastModel, FastShell)):
        raise TypeError(f"model is a {type(model).__name__} already")
    training = [name or "the model" for name, m in model.named_modules() if m.training]
    if training:
        raise ValueError(f"model must be in eval mode; {training[0]} is in training mode")
    if trace.has_hooks(model):
        raise ValueError("model has forward hooks of its own, which a fused copy would not run")
    if "forward" in vars(model):
        raise ValueError("model's forward was replaced on the instance, which tracing cannot see")
    devices = {str(t.device) for t in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        raise ValueError(f"model must be on one device; got {', '.join(sorted(devices))}")


_ATEN = portable.Aten()
_ANY_LAYOUT = portable.AnyLayout()
_CUSTOM_OPS = portable.CustomOps()


def _transformed(arguments: Sequence[Any]) -> bool:
    """Whether something looks over the call's shoulder that cannot see into the engine."""
    reasons = (ambient_reason(value) for value in arguments if isinstance(value, Tensor))
    return any(reason not in (None, GRADIENT) for reason in reasons)


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _keeping_dtype(fn: Any, tensor: Tensor) -> Tensor:
    """``fn(tensor)`` for a move; a cast is not meant for biases, which are wider than the model."""
    moved: Tensor = fn(tensor)
    return moved if moved.dtype is tensor.dtype else tensor.to(moved.device)


def _plain_attributes(source: nn.Module) -> dict[str, Any]:
    """Copies of the public attributes that say what a module is: sizes, names, configurations."""
    own = set(vars(nn.Module())) | {"_plan"}
    found = {}
    for name, value in vars(source).items():
        leaves = torch.utils._pytree.tree_leaves(value)
        opaque = any(callable(leaf) or isinstance(leaf, (Tensor, nn.Module)) for leaf in leaves)
        if not (name.startswith("_") or name in own or opaque):
            found[name] = copy.deepcopy(value)
    return found


def _weight_dtype(source: nn.Module, traced: Plan) -> torch.dtype:
    """That of the first step with weights, or else of the source's first floating-point tensor."""
    paths = (path for step in traced.steps for path in parameter_paths(step.op))
    watched: list[Tensor] = [attribute(source, path) for path in paths]
    tensors = (*watched, *source.parameters(), *source.buffers())
    floating = (t.dtype for t in tensors if t.is_floating_point())
    return next(floating, torch.get_default_dtype())


def _keep(source: nn.Module, traced: Plan, dtype: torch.dtype) -> nn.Module:
    """Copies, under their own paths, of what the steps left to PyTorch still need."""
    kept = nn.Module()
    for step in traced.steps:
        if isinstance(step.op, Call) and step.op.kind in ("call_module", "get_attr"):
            _place(kept, str(step.op.target), source, dtype)
        elif not isinstance(step.op, (Conv2d, Linear)):
            for path in parameter_paths(step.op):
                _place(kept, path, source, dtype)
    return kept.eval()


def _place(kept: nn.Module, path: str, source: nn.Module, dtype: torch.dtype) -> None:
    *parents, name = path.split(".")
    holder = kept
    for parent in parents:
        if parent not in holder._modules:
            holder.add_module(parent, nn.Module())
        holder = holder._modules[parent]  # type: ignore[assignment]
    if hasattr(holder, name):
        return
    value = copy.deepcopy(attribute(source, path))
    if isinstance(value, nn.Module):
        holder.add_module(name, value.requires_grad_(False).to(dtype))
    elif isinstance(value, Tensor):
        value = value.detach()
        holder.register_buffer(name, value.to(dtype) if value.is_floating_point() else value)
    else:
        setattr(holder, name, value)


def _few(arguments: Sequence[Any], images: int = 4) -> Sequence[Any]:
    """Four images say as much as a full batch; other arguments are passed on whole."""
    if len(arguments) == 1 and isinstance(arguments[0], Tensor) and arguments[0].dim() == 4:
        return [arguments[0][:images]]
    return arguments


def _to(value: Any, source: torch.dtype, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype is source else value


def _can_show_errors(arguments: Sequence[Any]) -> bool:
    """Whether there is something to compare: all tensors hold elements, and finite ones only."""
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    return all(t.numel() > 0 and bool(torch.isfinite(t).all()) for t in tensors)


def _all_finite(output: Any) -> bool:
    leaves = torch.utils._pytree.tree_leaves(output)
    return all(bool(torch.isfinite(t).all()) for t in leaves if isinstance(t, Tensor))
