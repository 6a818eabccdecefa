"""Fused inference for a module whose weights stay the user's to change at any time."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock, RLock
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.select import check_backend, select_ops
from ..errors import FoldError, InputError
from ..graph import plan, trace
from ..graph.ir import attribute
from ..graph.plan import Plan
from .cuda_graph import GraphRunner, warm_up
from .executor import Executor
from .first_call import FirstCall, can_show_errors
from .guards import GRADIENT, Change, WeightGuard, ambient_reason, busy_reason, pytorch_reason

ExecutorKey = tuple[str, torch.device, torch.dtype]
METHOD = "_forward_impl"


@dataclass(frozen=True)
class _Early:
    """A result launched before it was known whether the weights had changed."""

    runner: GraphRunner
    folds: int
    output: Any

    def holds_for(self, runner: GraphRunner) -> bool:
        """Whether the checks chose the same runner and found nothing to fold again."""
        return runner is self.runner and runner.executor.folds == self.folds


class Live:
    """Plan, folded weights and graphs of one module; rebuilt or refolded when the module changed.

    Args:
        module: an ``nn.Module`` whose ``_forward_impl`` takes one image tensor.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
    """

    def __init__(self, module: nn.Module, backend: str) -> None:
        self.module = module
        self.backend = backend
        self._lock = RLock()
        self._plan: Plan | None = None
        self._guard: WeightGuard | None = None
        self._refused: str | None = None
        self._home: tuple[torch.device, torch.dtype] | None = None
        self._runners: dict[ExecutorKey, GraphRunner] = {}
        self._stale: dict[ExecutorKey, set[str] | None] = {}
        self._unfoldable: set[ExecutorKey] = set()
        self._unchecked: set[GraphRunner] = set()  # whose first answer is to be judged
        self._last: GraphRunner | None = None

    def run(self, x: Tensor) -> tuple[bool, Any]:
        """``(True, output)``, or ``(False, None)`` where ordinary PyTorch must run.

        Raises:
            InputError, InputTypeError: the input does not fit the model.
            BackendError: the backend asked for cannot run here.
        """
        early = self._launch_early(x)
        with self._lock:
            runner = self._runner_for(x)
            self._last = runner
        if runner is None:
            return False, None
        if early is not None and early.holds_for(runner):
            return True, early.output
        with torch.no_grad():
            x = x.to(runner.executor.dtype) if _autocasts(x) else x
            if runner in self._unchecked or runner.tunes(x):
                return self._run_judged(runner, x)
            return True, runner(x)

    def _run_judged(self, runner: GraphRunner, x: Tensor) -> tuple[bool, Any]:
        """The first call of kernels that auto chose, at first or by measuring: where their answer
        is not PyTorch's, others go on. The other threads wait for the verdict."""
        with self._lock:
            first = runner in self._unchecked
            if not (first or runner.tunes(x)) or _is_capturing(x):
                return True, runner(x)
            if not can_show_errors([x]):
                if first:
                    self._last = None  # no graph is replayed before an answer was judged
                return True, runner(x)
            executor, chosen = runner.executor, runner.executor.ops.setting()
            call = FirstCall(executor, x) if first else None
            output = runner(x)
            if not first and executor.ops.setting() == chosen:
                return True, output
            call = call or FirstCall(executor, x)
            why = call.wrong(output)
            right = why is None or self._guard is None or self._guard.check() is not Change.NONE
            if not right:  # and no weights changed meanwhile
                if executor.fall_back(f"the first answer is wrong: {why}"):
                    why = call.wrong(executor.run([x]))
                if why is not None:
                    self._refuse(f"its answer is wrong: {why}")
            self._unchecked.discard(runner)  # now that there is a verdict for the others
            return right, output if right else None

    def _launch_early(self, x: Tensor) -> _Early | None:
        """Replay the graph that most likely serves the call, to look for changes while it runs."""
        runner = self._last
        if runner is None or _autocasts(x) or not runner.has_graph(x):
            return None
        folds = runner.executor.folds
        with torch.no_grad():
            return _Early(runner, folds, runner(x))

    def executor_for(self, x: Tensor) -> Executor | None:
        """What serves images of x's dtype on its device; None where ordinary PyTorch does."""
        with self._lock:
            runner = self._runner_for(x)
        return None if runner is None else runner.executor

    def plan(self) -> Plan:
        """The plan for the module as it is now, in inference."""
        with self._lock:
            self._refresh()
            if self._plan is None:
                reason = self._refused or pytorch_reason(self.module, METHOD)
                raise RuntimeError(f"there is no fused plan: {reason}")
            runners = list(self._runners.values())
            return runners[-1].executor.plan if runners else self._plan

    def invalidate(self) -> None:
        """Fold everything again at the next fused call, whatever the guards say."""
        with self._lock:
            self._stale = dict.fromkeys(self._runners)

    def refresh(self) -> None:
        """As :meth:`invalidate`; numbers that could not be folded are tried again too."""
        with self._lock:
            self.invalidate()
            self._unfoldable.clear()

    def free(self) -> None:
        """Drop the plan, folded weights, graphs and workspaces."""
        with self._lock:
            for runner in self._runners.values():
                runner.free()
            self._runners.clear()
            self._stale.clear()
            self._unfoldable.clear()
            self._unchecked.clear()
            self._plan = self._guard = self._refused = self._last = None

    def _runner_for(self, x: Tensor) -> GraphRunner | None:
        self._refresh()
        if self._plan is None or self._guard is None or self._refused is not None:
            return None
        if self._guard.reason() is not None:
            self.invalidate()  # norms in training change their statistics without a version
            return None
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.module.parameters()):
            say_how_to_get_the_fast_path()
            return None
        weight = self._first_weight()
        if weight.device != x.device:
            raise InputError(f"x must be on {weight.device}, as the weights are; got {x.device}")
        if not weight.is_floating_point() or (_autocasts(x) and weight.dtype is torch.float64):
            return None
        dtype = torch.get_autocast_dtype(x.device.type) if _autocasts(x) else weight.dtype
        return self._fresh_runner(x, dtype)

    def _fresh_runner(self, x: Tensor, dtype: torch.dtype) -> GraphRunner | None:
        assert self._plan is not None
        ops = select_ops(self.backend, x.device, dtype)
        key = (ops.name, x.device, dtype)
        if key in self._unfoldable:
            return None
        try:
            if key not in self._runners:
                _refuse_during_capture(x)
                runner = GraphRunner(Executor(self._plan, self.module, ops, dtype))
                self._runners[key] = runner
                if ops.falls_back:
                    self._unchecked.add(runner)
            elif key in self._stale:
                _refuse_during_capture(x)
                self._runners[key].refold(self._stale[key])
            self._stale.pop(key, None)
        except FoldError as error:
            self._runners.pop(key, None)
            self._unfoldable.add(key)
            self._warn(str(error))
            return None
        return self._runners[key]

    def _refresh(self) -> None:
        """Bring plan and guard up to date with the module; mark what must be folded again."""
        if self._guard is not None:
            change = self._guard.check()
            if change is Change.NONE:
                return
            if change is Change.WEIGHTS and self._may_refold():
                # The new guard comes first: a step meanwhile is then seen by it, by both at worst.
                before, self._guard = self._guard, self._new_guard()
                self._mark(before.changed())
                self._unfoldable.clear()
                return
            self.free()
        if pytorch_reason(self.module, METHOD) is None:
            self._build()

    def _mark(self, changed: set[str]) -> None:
        """Fold what reads these tensors again, whichever executor is asked for next."""
        for key in self._runners:
            held = self._stale.get(key, set())
            self._stale[key] = None if held is None else held | changed

    def _may_refold(self) -> bool:
        """Whether the plan still holds for the new weights: of the same kind, dtype and device."""
        if pytorch_reason(self.module, METHOD) is not None:
            return False
        return self._home == self._weights_home()

    def _build(self) -> None:
        try:
            self._plan = plan.of_module(self.module, METHOD)
            self._home = self._weights_home()
            if self._home is None:
                self._refuse("it has no convolution or linear layer")
        except trace.TraceError as error:
            self._home = None
            self._refuse(str(error))
        self._guard = self._new_guard()

    def _new_guard(self) -> WeightGuard:
        steps = self._plan.steps if self._plan else ()
        paths = [path for step in steps for path in plan.parameter_paths(step.op)]
        return WeightGuard(self.module, paths, METHOD)

    def _weights_home(self) -> tuple[torch.device, torch.dtype] | None:
        """Device and dtype of the first weight: executors are built for one of each."""
        if self._plan is None or self._first_path() is None:
            return None
        weight = self._first_weight()
        return weight.device, weight.dtype

    def _first_path(self) -> str | None:
        steps = self._plan.steps if self._plan else ()
        return next((path for step in steps for path in plan.parameter_paths(step.op)), None)

    def _first_weight(self) -> Tensor:
        path = self._first_path()
        assert path is not None
        weight: Tensor = attribute(self.module, path)
        return weight

    def _refuse(self, reason: str) -> None:
        self._refused = reason
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        warnings.warn(f"fastres runs this model as ordinary PyTorch: {reason}", stacklevel=7)


class LiveModule(nn.Module):
    """A module with one image input whose inference runs fused while its weights stay live.

    Subclasses define ``_forward_impl``. ``state_dict``, training, copying, scripting and export see
    an ordinary module.

    Args:
        backend: ``"auto"``, ``"triton"`` or ``"torch"``: what may serve inference.
    """

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.backend = check_backend(backend)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._forward_impl(x)
        return self._dispatch(x)

    def _forward_impl(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _forward_impl")

    @torch.jit.unused
    def _dispatch(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._forward_impl(x)
        reason = "training" if self.training else ambient_reason(x)
        if reason is None:
            fused, output = self._live().run(x)
            if fused:
                return output
            return self._forward_impl(x)
        if reason == GRADIENT:
            say_how_to_get_the_fast_path()
        if reason != GRADIENT or busy_reason(self.modules()) is not None:
            self._invalidate()
        return self._forward_impl(x)

    @torch.jit.unused
    def plan(self) -> Plan:
        """What runs in inference: each step and what computes it. ``str()`` of it is a table."""
        return self._live().plan()

    @torch.jit.unused
    def warmup(
        self,
        shapes: Iterable[Sequence[int]],
        progress: Callable[[int, int], Any] | None = None,
    ) -> Any:
        """Put folding, compiling and graph capture behind for these input shapes; returns self.

        The kernels of all shapes compile first, several at a time.

        Args:
            shapes: (N, C, H, W) of the images to come.
            progress: called with (done, wanted): kernels to compile and shapes to run.

        Raises:
            RuntimeError: in training mode, where nothing is fused.
        """
        if self.training:
            raise RuntimeError("warmup is for inference: call .eval() first")
        weight = next(self.parameters())
        with torch.inference_mode():
            executor = self._live().executor_for(weight)
            warm_up(self, shapes, weight.device, weight.dtype, executor, progress)
        return self

    @torch.jit.unused
    def refresh(self) -> None:
        """Fold the weights again at the next inference.

        Needed only after changes that PyTorch cannot see: through ``.data``, numpy views or raw
        collectives.
        """
        live: Live | None = self.__dict__.get("_engine")
        if live is not None:
            live.refresh()

    @torch.jit.unused
    def _invalidate(self) -> None:
        live: Live | None = self.__dict__.get("_engine")
        if live is not None:
            live.invalidate()

    @torch.jit.unused
    def _live(self) -> Live:
        with _CREATION:
            live: Live | None = self.__dict__.get("_engine")
            # A DataParallel replica starts with a copy of the original's dictionary.
            if live is None or live.module is not self:
                live = self.__dict__["_engine"] = Live(self, self.backend)
        return live

    @torch.jit.unused
    def train(self, mode: bool = True) -> Any:
        """As ``nn.Module.train``; entering training frees the fused engine's memory."""
        live: Live | None = self.__dict__.get("_engine")
        if live is not None:
            live.free() if mode else live.refresh()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_engine"}


_CREATION = Lock()


def _autocasts(x: Tensor) -> bool:
    """Whether autocast would cast this input: neither integers nor float64."""
    eligible = x.is_floating_point() and x.dtype is not torch.float64
    return eligible and torch.is_autocast_enabled(x.device.type)


def _is_capturing(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _refuse_during_capture(x: Tensor) -> None:
    if _is_capturing(x):
        raise RuntimeError(
            "the model's weights are new or have changed since its last call; "
            "call it once outside the capture"
        )


_said: set[str] = set()


def say_how_to_get_the_fast_path() -> None:
    if "gradient" not in _said:
        _said.add("gradient")
        warnings.warn(
            "fastres: in eval mode but gradients are on, so ordinary PyTorch runs; "
            "wrap the call in torch.inference_mode() or torch.no_grad() for the fused path",
            stacklevel=5,
        )
