"""Modules that torch.fx cannot trace whole: their Python stays, their traceable parts become plans.

Detectors, models with options and Hugging Face's models branch on their arguments or return classes
of their own. A deep copy keeps all of that, every module included; only the ``forward`` of the
largest parts with convolutions that can be traced leads to fused copies of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ..backends.memory_format import (
    images_to_channels_last,
    is_channels_last,
    to_contiguous,
)
from ..errors import FrozenError
from ..graph.effects import outside_owners
from ..graph.fx_graph import opaque_reason
from ..graph.ir import Call
from ..graph.modules import duplicate, trace_copy
from ..graph.plan import Plan, Step
from ..graph.trace import TraceError
from ..runtime.cuda_graph import warm_up
from ..runtime.tolerance import rms
from ..runtime.verify import Verification
from .fast_model import FastModel, forward_showing
from .part import Part

MAX_KINDS = 64


class FastShell(nn.Module):
    """A copy of a module in which parts run fused; everything else is the source's own Python.

    The copy's modules, parameters and buffers are the source's, under its names, and so is what
    reads or writes them: ``state_dict``, ``save_pretrained``, attributes that are set. Weights of
    parts are held twice, as they were and folded. A part that was changed runs as PyTorch.

    Args:
        source: the module, in eval mode; it is not changed.
        build: makes the fused copy of a part, or raises TraceError.
        dtype: of the copy's parameters and the parts; default the source's.
        reason: why the whole could not be traced.

    Attributes:
        body: the copy, of the source's own class.
        parts: the fused copies by the paths of their parts.
        reason: why the whole could not be traced.
        report: what :func:`quantize` measured; None of a model in floats.

    Raises:
        TraceError: no part of the module can be traced either.
    """

    report: Any = None

    def __init__(
        self,
        source: nn.Module,
        build: Callable[[nn.Module], FastModel],
        dtype: torch.dtype | None,
        reason: str,
    ) -> None:
        super().__init__()
        users = {id(owner): owner for owner in outside_owners(source)}
        body = duplicate(source, users).requires_grad_(False)
        own = _first_dtype(source)
        copied = trace_copy if dtype in (None, own) else duplicate
        found = dict(_build_parts(body, lambda part: build(copied(part))))
        if not found:
            raise TraceError(f"{reason}; nor can any part of it that has convolutions")
        signature = inspect.signature(source.forward)
        containers = [name for name in _CONTAINER if hasattr(type(source), name)]
        self.__class__ = _with_signature(signature, containers)
        shared = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        self.__dict__.update(
            {name: vars(body)[name] for name in shared},
            body=body if dtype is None else body.to(dtype),
            _kind=(signature, containers),
            reason=reason,
            _dtypes=(own, dtype or own),
            _parts=[Part(body.get_submodule(path), path, fast) for path, fast in found.items()],
            _layouts={},
            _lock=RLock(),
        )
        self.eval()
        self._route()

    @property
    def parts(self) -> dict[str, FastModel]:
        return {part.path: part.fast for part in self._parts}

    @property
    def dtype(self) -> torch.dtype:
        """Of the copy's parameters and the parts."""
        dtype: torch.dtype = self._dtypes[1]
        return dtype

    @property
    def channels_last(self) -> bool:
        """Whether images are handed on in NHWC memory, so that no part need convert them, by some
        kind of call; found out at the first of each, since code between may not bear it."""
        return any(self._layouts.values())

    @property
    def verification(self) -> Verification | None:
        """Each part is compared with the source's at its first call; this is the part with the
        largest error. None before, or for ``verify=False``."""
        served = [part.fast.verification for part in self._parts if not part.reason()]
        return max(filter(None, served), key=lambda v: v.rms / (v.scale or 1.0), default=None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the source's forward, without gradients.

        A part whose fused copy turns out wrong at its first call runs as PyTorch, with a warning.
        """
        return self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Any:
        """The copy's output; inputs in the source's dtype are taken as well as those in its own."""
        args, kwargs = self._cast((args, dict(kwargs or {})))
        with torch.no_grad():
            if torch.compiler.is_compiling() or not _gains_by_nhwc(tree_leaves((args, kwargs))):
                return self.body(*args, **kwargs)
            kind = _kind((*args, *kwargs.items()))
            if kind not in self._layouts:
                return self._first_of(kind, args, kwargs)
            if self._layouts[kind]:
                try:
                    return _run_nhwc(self.body, args, kwargs)
                except RuntimeError:  # perhaps a .view() that no call has met before
                    output = self.body(*args, **kwargs)
                    self._layouts[kind] = False
                    return output
            return self.body(*args, **kwargs)

    def plan(self) -> Plan:
        """The steps of all parts, and the modules that stay calls around them: PyTorch's, or of
        copies that the source held already."""
        steps: list[Step] = []
        kernels: list[str] = []
        fused = (m for m in self.body.modules() if isinstance(m, (FastModel, FastShell)))
        reasons = {id(m): "is fused already" for found in fused for m in found.modules()}
        for part in self._parts:
            why = part.reason()
            reasons.update({id(module): why for module in part.module.modules()})
            if not why:
                plan = part.fast.plan()
                steps += [_below(part.path, step) for step in plan.steps]
                kernels += plan.kernels or [""] * len(plan.steps)
        around = f"around the fused parts ({self.reason.partition('. ')[0]})"
        rest = [
            _left(path, module, reasons.get(id(module), around))
            for path, module in self.body.named_modules()
            if (module._parameters or module._buffers) and reasons.get(id(module), around)
        ]
        return Plan((*steps, *rest), (), None, (*kernels, *[""] * len(rest)))

    def warmup(self, shapes: Any, progress: Callable[[int, int], Any] | None = None) -> FastShell:
        """Run each shape, (N, C, H, W), twice; for modules that take one tensor of images.

        Args:
            progress: called with (shapes run, shapes).

        Raises:
            TypeError: the module takes something else.
        """
        device = next(chain(self.parameters(), self.buffers())).device
        warm_up(lambda x: self.run((x,)), shapes, device, self.dtype, progress=progress)
        return self

    def train(self, mode: bool = True) -> FastShell:
        """Refuses training: the parts' norms are folded.

        Raises:
            RuntimeError: for ``mode=True``.
        """
        if mode:
            raise RuntimeError("a FastShell is for inference only; train the source instead")
        return super().train(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The source's, in the copy's dtype."""
        return self.body.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the source's; parts whose weights it changes run as PyTorch from then on."""
        return self.body.load_state_dict(*args, **kwargs)

    def _route(self) -> None:
        for part in self._parts:
            part.module.forward = part
        for part in self._parts:
            part.guard()

    def _cast(self, value: Any) -> Any:
        old, new = self._dtypes
        if new is old:
            return value
        return tree_map(
            lambda v: v.to(new) if isinstance(v, Tensor) and v.dtype is old else v, value
        )

    def _first_of(self, kind: Any, args: Any, kwargs: Any) -> Any:
        """A call of a new kind, and the same on a stand-in in NHWC memory: is that the same?"""
        with self._lock:
            if kind in self._layouts or len(self._layouts) >= MAX_KINDS:
                return self.body(*args, **kwargs)
            copies = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (args, kwargs))
            standin = self._standin()
            output = self.body(*args, **kwargs)
            self._layouts[kind] = standin is not None and self._bears_nhwc(standin, copies, output)
            return output

    def _standin(self) -> nn.Module | None:
        """A copy with the same weights, whose state may change; None if a call would be noticed."""
        if any(m._forward_hooks or m._forward_pre_hooks for m in self.modules()):
            return None
        kept = chain(self.parameters(), (part.fast for part in self._parts))
        try:
            return duplicate(self.body, {id(value): value for value in kept})
        except Exception:  # files, locks and the like on a module
            return None

    def _bears_nhwc(self, standin: nn.Module, call: Any, output: Any) -> bool:
        if any(part.reason() for part in self._parts):
            return False
        devices = {part.fast.device for part in self._parts} - {torch.device("cpu")}
        try:
            with torch.random.fork_rng(devices=devices):
                return _same(output, _run_nhwc(standin, *call))
        except Exception:  # a trial only: whatever is wrong, the call itself was right
            return False

    def _apply(self, fn: Any, recurse: bool = True) -> FastShell:
        if fn(torch.empty(0, dtype=self.dtype)).dtype is not self.dtype:
            raise TypeError(
                f"the dtype of a FastShell is fixed ({self.dtype}); "
                "call optimize(source, dtype=...) for another one"
            )
        for part in self._parts:
            part.settle()
            part.fast._apply(fn, recurse)
        super()._apply(fn, recurse)
        self._route()
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "body" not in self.__dict__:
                raise
            return getattr(self.body, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("body", "reason"):
            raise FrozenError(f"{name} cannot be set on a FastShell; optimize another source")
        own = name in self.__dict__ or hasattr(type(self), name) or "body" not in self.__dict__
        (super().__setattr__ if own else self.body.__setattr__)(name, value)

    def __delattr__(self, name: str) -> None:
        self.body.__delattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, self._kind, {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_lock"] = RLock()
        self._route()


_CONTAINER = ("__len__", "__getitem__", "__iter__", "__contains__")


def _with_signature(signature: inspect.Signature, containers: Iterable[str]) -> type[FastShell]:
    """A FastShell whose forward shows this signature, and which can be indexed as its body can."""
    members = {name: _of_body(name) for name in containers}
    forward = forward_showing(signature, FastShell)
    members |= {"forward": forward, "__module__": __name__, "__doc__": FastShell.__doc__}
    return type("FastShell", (FastShell,), members)


def _of_body(name: str) -> Any:
    return lambda self, *args: getattr(self.body, name)(*args)


def _new(signature: inspect.Signature, containers: Iterable[str]) -> FastShell:
    kind = _with_signature(signature, containers)
    return kind.__new__(kind)


def _gains_by_nhwc(leaves: list[Any]) -> bool:
    """Whether there are images, all of them in NCHW memory."""
    images = [v for v in leaves if isinstance(v, Tensor) and v.dim() == 4]
    return bool(images) and not any(map(is_channels_last, images))


def _kind(value: Any) -> Any:
    """What may decide which way a call takes: its options, and the types of all else."""
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    return type(value), value if isinstance(value, _PLAIN) else getattr(value, "ndim", None)


_PLAIN = (bool, int, float, str, type(None))


def _run_nhwc(module: nn.Module, args: Any, kwargs: Any) -> Any:
    args, kwargs = tree_map(images_to_channels_last, (args, kwargs))
    return tree_map(to_contiguous, module(*args, **kwargs))


def _same(output: Any, other: Any) -> bool:
    """Whether nothing but rounding tells the memory formats apart."""
    leaves, form = tree_flatten(output)
    others, other_form = tree_flatten(other)
    return form == other_form and all(map(_alike, leaves, others))


def _alike(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and isinstance(a, _PLAIN) and bool(a == b)
    if a.shape != b.shape or a.dtype is not b.dtype or a.is_contiguous() != b.is_contiguous():
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    # Memory that is read in another order makes an error of the values' own size.
    return rms(a.double() - b.double()) <= torch.finfo(a.dtype).eps ** 0.5 * rms(a)


def _build_parts(
    module: nn.Module, build: Callable[[nn.Module], FastModel], path: str = ""
) -> Iterator[tuple[str, FastModel]]:
    """The largest traceable modules with convolutions below ``module``, each once."""
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if not any(isinstance(m, nn.Conv2d) for m in child.modules()) or _is_layer(child):
            continue
        try:
            if opaque_reason(child) is not None or not _has_forward(child):
                raise TraceError("called for its children only")
            yield inner, build(child)
        except TraceError:
            yield from _build_parts(child, build, inner)


def _is_layer(module: nn.Module) -> bool:
    """A single layer of torch's own: nothing to fuse inside."""
    return type(module).__module__.startswith("torch.nn.") and not list(module.children())


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _below(path: str, step: Step) -> Step:
    where = f"{path}.{step.where}" if step.where else path
    return replace(step, name=f"{path}.{step.name}", where=where)


def _left(path: str, module: nn.Module, reason: str) -> Step:
    return Step(path, Call("call_module", type(module).__name__, reason=reason), (), path)


def _first_dtype(module: nn.Module) -> torch.dtype:
    tensors = (*module.parameters(), *module.buffers())
    floats = (t.dtype for t in tensors if t.is_floating_point())
    return next(floats, torch.get_default_dtype())
