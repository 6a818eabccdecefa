"""Modules that torch.fx cannot trace whole: their Python stays, their traceable parts become plans.

Detectors, models with options and Hugging Face's models branch on their arguments or return classes
of their own. A deep copy keeps all of that; only the largest parts with convolutions that can be
traced are replaced, by fused copies of themselves.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from .copies import duplicate
from .cuda_graph import warm_up
from .errors import VerificationError
from .fast_model import forward_showing
from .guards import unfused
from .ir import Call
from .memory_format import is_channels_last, to_contiguous
from .plan import Plan, Step
from .trace import TraceError, opaque_reason
from .verify import Verification, judge


class Part(Protocol):
    """A fused copy of a part: an ``nn.Module`` that can show its plan."""

    def plan(self) -> Plan: ...


class FastShell(nn.Module):
    """A copy of a module in which parts are fused; everything else is the source's own Python.

    Attributes and methods that are not found here are those of the copy.

    Args:
        source: the module, in eval mode; it is not changed.
        build: makes the fused copy of a part, or raises TraceError.
        dtype: of the parameters that stay PyTorch's; the dtype of the parts.
        reason: why the whole could not be traced.

    Attributes:
        body: the copy.
        parts: the fused parts by their paths in the source.
        channels_last: images are handed on in NHWC memory, so that no part need convert them; found
            out at the first call that is verified, since code between the parts may not bear it.
        verification: how far the outputs are from the source's; None until that was measured.

    Raises:
        TraceError: no part of the module can be traced either.
    """

    def __init__(
        self,
        source: nn.Module,
        build: Callable[[nn.Module], nn.Module],
        dtype: torch.dtype | None,
        reason: str,
    ) -> None:
        super().__init__()
        found = dict(_build_parts(source, build))
        if not found:
            raise TraceError(f"{reason}; nor can any part of it that has convolutions")
        self.reason = reason
        self.parts: dict[str, Any] = found
        self.source_dtype = _first_dtype(source)
        self.dtype = dtype or self.source_dtype
        self.verification: Verification | None = None
        self.channels_last = False
        self.signature = inspect.signature(source.forward)
        self.__class__ = _with_signature(self.signature)
        self._pending: nn.Module | None = None
        replaced = {id(source.get_submodule(path)): part for path, part in found.items()}
        self.body: nn.Module = duplicate(source, replaced)
        self.body.requires_grad_(False).to(self.dtype)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the source's forward, without gradients.

        Raises:
            VerificationError: this is the first call and the outputs differ in form.
        """
        if self._pending is not None and not torch.compiler.is_compiling():
            source, self._pending = self._pending, None
            self.verification = self._check(source, args, kwargs)
        return self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Any:
        """The copy's output; inputs in the source's dtype are taken as well as those in its own."""
        args, kwargs = self._cast((args, dict(kwargs or {})))
        with torch.no_grad():
            if not self.channels_last or any(map(is_channels_last, tree_leaves((args, kwargs)))):
                return self.body(*args, **kwargs)
            args, kwargs = tree_map(_to_channels_last, (args, kwargs))
            return tree_map(to_contiguous, self.body(*args, **kwargs))

    def verify_with(self, source: nn.Module) -> None:
        """Compare with ``source`` at the first call."""
        self._pending = source

    def plan(self) -> Plan:
        """The steps of all parts, and the modules that stay PyTorch calls around them."""
        steps: list[Step] = []
        servers: list[str] = []
        for path, part in self.parts.items():
            plan = part.plan()
            steps += [_below(path, step) for step in plan.steps]
            servers += plan.served_by or [""] * len(plan.steps)
        reason = self.reason.partition(". ")[0]
        rest = [_left(path, module, reason) for path, module in self._rest()]
        return Plan((*steps, *rest), (), None, (*servers, *[""] * len(rest)))

    def warmup(self, shapes: Any) -> FastShell:
        """Run each shape, (N, C, H, W), twice; for modules that take one tensor of images.

        Raises:
            TypeError: the module takes something else.
        """
        warm_up(lambda x: self.run((x,)), shapes, next(self.buffers()).device, self.dtype)
        return self

    def train(self, mode: bool = True) -> FastShell:
        """Refuses training: the batch norms of the parts are gone.

        Raises:
            RuntimeError: for ``mode=True``.
        """
        if mode:
            raise RuntimeError("a FastShell is for inference only; train the source instead")
        return super().train(False)

    def _rest(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules with weights that belong to no part, by their paths."""
        inside = {id(m) for part in self.parts.values() for m in part.modules()}
        for path, module in self.body.named_modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if own and id(module) not in inside:
                yield path, module

    def _cast(self, value: Any) -> Any:
        if self.dtype is self.source_dtype:
            return value
        old, new = self.source_dtype, self.dtype
        return tree_map(
            lambda v: v.to(new) if isinstance(v, Tensor) and v.dtype is old else v, value
        )

    def _check(self, source: nn.Module, args: Any, kwargs: Any) -> Verification | None:
        """Each part has checked itself by now or does at its own first call; this is the whole.

        A wrong form is refused. Other values are only warned of: a detector may order or drop boxes
        anew when a score moves by its last digit.
        """
        with torch.no_grad(), unfused():
            expected = source(*args, **kwargs)
        actual = self._try_channels_last(args, kwargs)
        wanted, wanted_form = tree_flatten(expected)
        got, got_form = tree_flatten(actual)
        if wanted_form != got_form or type(expected) is not type(actual):
            raise VerificationError(
                f"the outputs differ in form: expected {wanted_form}, got {got_form}"
            )
        pairs = [(a, b) for a, b in zip(wanted, got, strict=True) if _is_float(a) and _is_float(b)]
        if not pairs or self.dtype is not self.source_dtype:
            return None
        name = type(source).__name__
        note = f"each fused part of {name} is right, but detections that tie may be ordered anew"
        if any(a.shape != b.shape for a, b in pairs):
            warnings.warn(f"{note}: the copy returns another number of rows", stacklevel=4)
            return None
        verdict = judge([a for a, _ in pairs], [b for _, b in pairs], None)
        if not verdict.ok:
            warnings.warn(f"{note}: {verdict.reason}", stacklevel=4)
        return verdict

    def _try_channels_last(self, args: Any, kwargs: Any) -> Any:
        self.channels_last = True
        try:
            output = self.run(args, kwargs)
            if all(isinstance(leaf, _LEAVES) for leaf in tree_leaves(output)):
                return output
        except RuntimeError:  # a .view() between the parts
            pass
        self.channels_last = False
        return self.run(args, kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> FastShell:
        if fn(torch.empty(0, dtype=self.dtype)).dtype is not self.dtype:
            raise TypeError(
                f"the dtype of a FastShell is fixed ({self.dtype}); "
                "call optimize(source, dtype=...) for another one"
            )
        super()._apply(fn, recurse)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "body" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.body, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (self.signature,), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pending": None}


def _with_signature(signature: inspect.Signature) -> type[FastShell]:
    """A FastShell whose forward shows this signature."""
    forward = forward_showing(signature, FastShell)
    members = {"forward": forward, "__module__": __name__, "__doc__": FastShell.__doc__}
    return type("FastShell", (FastShell,), members)


def _new(signature: inspect.Signature) -> FastShell:
    kind = _with_signature(signature)
    return kind.__new__(kind)


_LEAVES = (Tensor, int, float, str, type(None))


def _to_channels_last(value: Any) -> Any:
    is_image = isinstance(value, Tensor) and value.dim() == 4
    return value.contiguous(memory_format=torch.channels_last) if is_image else value


def _build_parts(
    module: nn.Module, build: Callable[[nn.Module], nn.Module], path: str = ""
) -> Iterator[tuple[str, nn.Module]]:
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
    call = Call("call_module", type(module).__name__, reason=f"around the fused parts ({reason})")
    return Step(path, call, (), path)


def _first_dtype(module: nn.Module) -> torch.dtype:
    tensors = (*module.parameters(), *module.buffers())
    floats = (t.dtype for t in tensors if t.is_floating_point())
    return next(floats, torch.get_default_dtype())


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
