"""The fused copy of a module: a plan with its folded weights, callable as the module was."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from operator import is_
from threading import RLock
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backends.select import select_int8_ops, select_ops
from ..errors import BackendError, FrozenError, InputError, InputTypeError, VerificationError
from ..graph.fold import Weights
from ..graph.ir import Call, Conv2d
from ..graph.plan import Plan, Step, kept_names, parameter_paths
from ..runtime.cuda_graph import GraphRunner, warm_up
from ..runtime.executor import Executor
from ..runtime.first_call import can_show_errors
from ..runtime.guards import GRADIENT, ambient_reason, in_functorch
from ..runtime.verify import Verification
from . import fx_program


class FastModel(nn.Module):
    """A fused copy of a module, for inference only; made by :func:`optimize`.

    The folded weights are parameters without gradients, so ``.to(device)``, ``state_dict``,
    ``functional_call``, ``deepcopy`` and ``next(model.parameters()).device`` work. The dtype is
    fixed, under autocast too: folding again from the source is more exact than casting what was
    folded. The source's plain attributes (such as timm's ``feature_info``) can be read from the
    copy; setting one of the source's attributes or modules is an error, for the plan is made.

    Args:
        traced: the plan.
        folded: weight and bias of each convolution and linear step, by the step's index.
        kept: what the steps left to PyTorch need.
        dtype: of weights and activations.
        source_dtype: the source's; tensors of it are taken and cast.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        described: the source's plain attributes.
        names: the source's other attributes and modules.

    Attributes:
        signature: the signature of the source's forward.
        positional: whether all of its parameters can be given by position.
        verification: the measured comparison with the source; None before the first call, and
            for ``verify=False``.
        report: what :func:`quantize` measured; None of a model in floats.
    """

    signature: ClassVar[inspect.Signature]
    positional: ClassVar[bool]
    report: Any = None
    for_onnx = False  # while it is exported to ONNX

    def __init__(
        self,
        traced: Plan,
        folded: Mapping[int, Weights],
        kept: nn.Module,
        *,
        dtype: torch.dtype,
        source_dtype: torch.dtype,
        backend: str,
        described: Mapping[str, Any],
        names: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.backend = backend
        self.dtype = dtype
        self.source_dtype = source_dtype
        self.verification: Verification | None = None
        self.described = dict(described)
        self.traced = traced
        self._pending: Callable[[FastModel, Sequence[Any]], None] | None = None
        self._refused: str | None = None
        self._lock = RLock()
        self.folded = nn.Module()
        for index, tensors in folded.items():
            for name, tensor in zip(("weight", "bias", "scale"), tensors, strict=False):
                self.folded.register_parameter(f"{name}{index}", _constant(tensor))
        self.kept = kept
        self._index = {step.name: index for index, step in enumerate(traced.steps)}
        self._argument_names = fx_program.argument_names(traced)
        self._runners: dict[torch.device, GraphRunner] = {}
        self._program = fx_program.lower(traced)
        self._on_triton = self._on_triton_kernels()
        self._settle()
        self.register_load_state_dict_post_hook(_settle)
        self.eval()
        own = {name for name in vars(self) if name.startswith("_")} | {"training", "verification"}
        public = {*vars(self), *self._modules, "signature", "positional", "device"}
        self._fixed = (public | {*described, *names, *_tops(traced)}) - own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the source's forward, without gradients.

        Raises:
            InputError, InputTypeError: an argument does not fit the model.
            VerificationError: at the first call the outputs differed from the source's.
        """
        if torch.compiler.is_compiling() or _transformed((*args, *kwargs.values())):
            return self._run_portable(args, kwargs)
        if self._has_other_weights():
            return self._run_portable(args, kwargs)
        arguments = self._bind(args, kwargs)
        if self._pending is not None and can_show_errors(arguments):
            self._verify(arguments)
        return self.run(arguments)

    def _verify(self, arguments: Sequence[Any]) -> None:
        """One thread compares with the source, and the others wait for its verdict, which stays."""
        with self._lock:
            if self._pending is not None and self._refused is None:
                try:
                    self._pending(self, arguments)
                except VerificationError as error:
                    self._refused = str(error)
                    raise
                self._pending = None

    def _raise_refusal(self) -> None:
        if self._refused is not None:
            raise VerificationError(self._refused)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._home()

    def run(self, arguments: Sequence[Any]) -> Any:
        """Run the plan on positional arguments, one per parameter of the source's forward."""
        self._raise_refusal()
        home = self._device(arguments)
        runner = self._runner(home)
        with torch.no_grad(), _without_autocast(home):
            if len(arguments) == 1 and isinstance(arguments[0], Tensor):
                return runner(arguments[0])
            return runner.executor.run([self._cast(value) for value in arguments])

    def _run_portable(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As the engine, by operators that compilers, exporters and transforms can see."""
        self._raise_refusal()
        args = tuple([self._cast(value) for value in args])
        names = self._argument_names
        kwargs = {names.get(name, name): self._cast(value) for name, value in kwargs.items()}
        with _without_autocast(self._home()):
            return self._program(self, self._functional(), *args, **kwargs)

    def plan(self) -> Plan:
        """Each step, what computes it, what was left to PyTorch and why; ``str()`` is a table."""
        return self._runner(self._home()).executor.plan

    def executor(self) -> Executor:
        """The plan with its weights, for looking at single steps."""
        return self._runner(self._home()).executor

    @property
    def takes_bytes(self) -> bool:
        """Whether images are uint8, because a Normalize is folded into a convolution."""
        convolutions = (step.op for step in self.traced.steps if isinstance(step.op, Conv2d))
        return any(op.images is not None for op in convolutions)

    def warmup(
        self,
        shapes: Sequence[Sequence[int]],
        progress: Callable[[int, int], Any] | None = None,
    ) -> FastModel:
        """Put compiling, for all shapes at once, and graph capture behind; returns self.

        Args:
            shapes: (N, C, H, W) of the images to come.
            progress: called with (done, wanted): kernels to compile and shapes to run.
        """
        dtype = torch.uint8 if self.takes_bytes else self.dtype
        warm_up(lambda x: self.run([x]), shapes, self._home(), dtype, self.executor(), progress)
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

    def _step_weights(self, step: Step) -> Weights:
        index, own = self._index[step.name], self.folded._parameters
        names = [f"{name}{index}" for name in ("weight", "bias", "scale")]
        found: Any = tuple(own[name] for name in names if name in own)
        return found

    def _runner(self, device: torch.device) -> GraphRunner:
        found = self._runners.get(device)
        if found is not None:
            return found
        with self._lock:
            if device not in self._runners:
                select = select_int8_ops if self.traced.eight_bit[0] else select_ops
                ops, names = select(self.backend, device, self.dtype), kept_names(self.traced)
                weights = self._step_weights
                executor = Executor(self.traced, self.kept, ops, self.dtype, weights, names)
                self._runners[device] = GraphRunner(executor, casts=self.source_dtype)
            return self._runners[device]

    def _home(self) -> torch.device:
        folded = self.folded._parameters.values()  # at each call: parameters() walks all modules
        tensors = chain(folded, self.parameters(), self.buffers())
        found = next((t for t in tensors if t is not None), None)
        return torch.device("cpu") if found is None else found.device

    def _device(self, arguments: Sequence[Any]) -> torch.device:
        home = self._home()
        for parameter, value in zip(self.traced.parameters, arguments, strict=True):
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

    def _functional(self) -> fx_program.Aten:
        """What computes the steps of the portable program; an export must not need fastres."""
        if not torch.compiler.is_compiling():
            return _ANY_LAYOUT if in_functorch() else _ATEN
        # Dynamo takes torch.compiler.is_exporting() for True; the flag itself it reads as it is.
        exporting = getattr(torch.compiler, "_is_exporting_flag", False)
        if self.for_onnx:
            return _ONNX
        if exporting or not self._on_triton:
            return _ATEN
        return _OR_PLAIN if self.backend == "auto" else _CUSTOM_OPS

    def _on_triton_kernels(self) -> bool:
        if self.traced.eight_bit[0]:
            return False
        try:
            return select_ops(self.backend, self._home(), self.dtype).name == "triton"
        except BackendError:
            return False

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        if self.positional and not kwargs and len(args) == len(self.traced.parameters):
            return list(args)
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        names = [parameter.name for parameter in self.traced.parameters]
        return [bound.arguments[name] for name in names]

    def _apply(self, fn: Any, recurse: bool = True) -> FastModel:
        if fn(torch.empty(0, dtype=self.dtype, device=self._home())).dtype is not self.dtype:
            raise InputTypeError(
                f"the dtype of a FastModel is fixed ({self.dtype}); "
                "call optimize(source, dtype=...) for another one"
            )
        self._runners.clear()
        super()._apply(lambda t: _keeping_dtype(fn, t), recurse)
        self._on_triton = self._on_triton_kernels()
        self._settle()
        return self

    def _settle(self) -> None:
        """Take the tensors that are here now for the model's own, which engines are built from."""
        self._runners.clear()
        owners = (m for m in self.modules() if m._buffers or m._parameters)
        self._own = [(m, _tensors(m)) for m in owners]

    def _has_other_weights(self) -> bool:
        """Whether other tensors are in their places, as torch.func.functional_call puts them."""
        return any(not all(map(is_, _tensors(module), own)) for module, own in self._own)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_fixed", ()):
            raise FrozenError(
                f"{name} cannot be set on a FastModel, whose plan is made; "
                "set it on the source and optimize that again"
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        described = self.__dict__.get("described", {})
        return described[name] if name in described else super().__getattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return new, (self.signature,), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        dropped: dict[str, Any] = {
            "_runners": {},
            "_program": None,
            "_own": [],
            "_lock": None,
        }
        return {**self.__dict__, **dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = RLock()
        self._program = fx_program.lower(self.traced)
        self._settle()


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def with_signature(signature: inspect.Signature) -> type[FastModel]:
    """A FastModel whose forward shows this signature."""
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    members = {
        "forward": forward_showing(signature, FastModel),
        "signature": inspect.Signature(plain),
        "positional": all(p.kind in _POSITIONAL for p in plain),
        "__module__": __name__,
        "__doc__": FastModel.__doc__,
    }
    return type("FastModel", (FastModel,), members)


def forward_showing(signature: inspect.Signature, kind: type[nn.Module]) -> Callable[..., Any]:
    """``kind.forward`` with this signature, as torch.export and its users look it up."""

    plain_forward: Any = kind.forward
    forward = FunctionType(plain_forward.__code__, plain_forward.__globals__)
    forward.__doc__ = plain_forward.__doc__
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    if any(p.kind is not inspect.Parameter.POSITIONAL_ONLY for p in plain):
        own = own.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = inspect.Signature([own, *plain])  # type: ignore[attr-defined]
    return forward


def new(signature: inspect.Signature) -> FastModel:
    kind = with_signature(signature)
    return kind.__new__(kind)


def _constant(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


def _tops(plan: Plan) -> Iterator[str]:
    """The source's attributes that the steps were made of."""
    for step in plan.steps:
        paths = [step.where, *parameter_paths(step.op)]
        if isinstance(step.op, Call) and step.op.kind in ("call_module", "get_attr"):
            paths.append(str(step.op.target))
        yield from (path.partition(".")[0] for path in paths)


def in_float64(model: FastModel) -> FastModel:
    """A copy that computes with the same folded weights in float64: what its rounding is."""
    wide = copy.deepcopy(model)
    nn.Module._apply(wide, lambda t: t.double() if t.is_floating_point() else t)
    wide.__dict__["dtype"] = torch.float64  # which users may not set
    wide._settle()
    return wide


_ATEN = fx_program.Aten()
_ANY_LAYOUT = fx_program.AnyLayout()
_ONNX = fx_program.Onnx()
_CUSTOM_OPS = fx_program.CustomOps()
_OR_PLAIN = fx_program.CustomOps("_or_plain")


def _tensors(module: nn.Module) -> list[Tensor | None]:
    # The dictionaries are looked up at each call: torch.export leaves others behind.
    return [*module._buffers.values(), *module._parameters.values()]


def _settle(model: FastModel, _: Any) -> None:
    """What runs after a load_state_dict, the model's own or that of a module that holds it."""
    model._settle()


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
