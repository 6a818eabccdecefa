"""May this call be fused, and does the plan still hold? One place for both answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from enum import Enum
from functools import lru_cache
from operator import attrgetter, is_, methodcaller
from threading import Lock
from types import CodeType, FunctionType, ModuleType
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from ..graph.ir import attribute

GRADIENT = "a gradient is wanted"
_unfused = ContextVar("unfused", default=False)


@contextmanager
def unfused() -> Iterator[None]:
    """Inside, live models run as ordinary PyTorch: what a fused answer is measured against."""
    token = _unfused.set(True)
    try:
        yield
    finally:
        _unfused.reset(token)


def ambient_reason(x: Any) -> str | None:
    """Why a call with this input, under the modes in force, must run as ordinary PyTorch."""
    if type(x) is not Tensor:
        return "the input is not a plain tensor"
    if _unfused.get():
        return "ordinary PyTorch was asked for"
    if x.device.type not in ("cpu", "cuda"):
        return f"the input is on {x.device.type}"
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return "the model is being compiled or traced"
    if torch._C._len_torch_dispatch_stack() > 0 or _in_function_mode():  # of this thread alone
        return "a dispatch or function mode is active"
    if in_functorch():
        return "a functorch transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if _is_receiving_buffers():
        return "DistributedDataParallel broadcasts buffers at each call"
    if nn_module._has_any_global_hook():
        return "a global module hook is registered"
    if torch.is_grad_enabled() and x.requires_grad:
        return GRADIENT
    return None


def in_functorch() -> bool:
    """Whether vmap, grad, jvp or another transform of torch.func is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _is_receiving_buffers() -> bool:
    """Whether DDP has just overwritten batch norms; from torch 2.15 on no version shows it."""
    if not torch.distributed.is_available():
        return False
    ddp = nn.parallel.DistributedDataParallel._active_ddp_module
    return ddp is not None and ddp.will_sync_module_buffers()


def _in_function_mode() -> bool:
    """Whether a user's mode intercepts calls; ``torch.device(...)`` as a context does not count."""
    depth = torch._C._len_torch_function_stack()
    return any(_is_user_mode(torch._C._get_function_stack_at(i)) for i in range(depth))


def _is_user_mode(mode: TorchFunctionMode) -> bool:
    return not isinstance(mode, DeviceContext)


class _WeightGuards:
    """All weight guards of this process, to be told of changes that leave no trace in a tensor."""

    def __init__(self) -> None:
        self._all: WeakSet[WeightGuard] = WeakSet()
        self._lock = Lock()
        self._registered = False

    def add(self, guard: WeightGuard) -> None:
        """Tell ``guard`` from now on; fused optimizers change weights without a version."""
        with self._lock:
            if not self._registered:
                register_optimizer_step_post_hook(self._stepped)
                self._registered = True
            self._all.add(guard)

    def tell(self, tensors: Iterable[Tensor], shapes: frozenset[tuple[int, ...]]) -> None:
        """These tensors, all in their memory, and half-precision weights of these shapes that are
        being trained, may hold other values now."""
        with self._lock:
            guards = list(self._all)
        memory = set(map(_memory, tensors)) if guards else set()
        for guard in guards:
            guard.hear(memory, shapes)

    def _stepped(self, optimizer: Any, *_: Any) -> None:
        groups = getattr(optimizer, "param_groups", ())
        owned = [tensor for group in groups for tensor in group.get("params", ())]
        # It may own float32 copies, from which its owner writes the weights without a version.
        self.tell(owned, frozenset(tuple(t.shape) for t in owned if t.dtype is torch.float32))


WEIGHT_GUARDS = _WeightGuards()


def _memory(tensor: Tensor) -> int | None:
    """Where a tensor's storage begins; None where that cannot be told, as of a sharded one."""
    try:
        return tensor.untyped_storage().data_ptr()
    except Exception:  # subclasses raise what they like, and an optimizer's step must go on
        return None


class Change(Enum):
    """What differs from when the plan was built."""

    NONE = "nothing"
    WEIGHTS = "values of weights or statistics"
    STRUCTURE = "modules or their settings"


class WeightGuard:
    """What a plan was built from, for telling whether it still holds.

    Strong references are held to the watched tensors and to their storage, so that neither an id
    nor an address can be reused by something else.

    Args:
        module: the root that the plan was traced from.
        paths: dotted paths of the tensors that were folded.
        method: name of the root's method that was traced.
    """

    def __init__(self, module: nn.Module, paths: Iterable[str], method: str = "forward") -> None:
        self._root, self._method = module, method
        self._traced = getattr(module, method)
        self._modules = tuple(module.modules())
        self._heeding = (module, *filter(heeds_training, self._modules[1:]))
        self._children = [m._modules for m in self._modules]
        self._empty = [found for found in self._children if not found]
        self._filled = [found for found in self._children if found]
        self._members = list(map(tuple, map(_VALUES, self._filled)))
        self._forwards = list(map(_FORWARD, self._modules))
        self._settings = _settings(self._modules)
        self._heard: set[int | None] = set()
        self._tensors = _Tensors(module, dict.fromkeys([*paths, *_counters(module)]))
        WEIGHT_GUARDS.add(self)

    def reason(self) -> str | None:
        """As :func:`busy_reason`, for the watched modules."""
        below = self._modules[1:]
        hooked = any(map(_HOOKS, below)) or any(map(_PRE_HOOKS, below))
        if not hooked and not any(map(_TRAINING, self._heeding)):
            return None
        return busy_reason(self._modules)

    def check(self) -> Change:
        """Compare the module with what was recorded.

        It runs beside each call, so nothing here loops in Python over modules or tensors.
        """
        if getattr(self._root, self._method) != self._traced:
            return Change.STRUCTURE
        try:
            if not self._same_structure():
                return Change.STRUCTURE
        except AttributeError:  # a setting was deleted
            return Change.STRUCTURE
        if self._heard or not self._tensors.same():
            return Change.WEIGHTS
        return Change.NONE

    def changed(self) -> set[str]:
        """Paths of the tensors that hold, or may hold, other values than when watching began."""
        return self._tensors.changed(self._heard)

    def hear(self, memory: set[int | None], shapes: frozenset[tuple[int, ...]]) -> None:
        """As :meth:`_WeightGuards.tell`; None stands for any memory."""
        self._heard |= self._tensors.among(memory, shapes)

    def _same_structure(self) -> bool:
        return (
            all(map(is_, map(_CHILDREN, self._modules), self._children))
            and not any(self._empty)
            and list(map(tuple, map(_VALUES, self._filled))) == self._members
            and list(map(_FORWARD, self._modules)) == self._forwards
            and all(list(map(get, modules)) == values for get, modules, values in self._settings)
        )


_CHILDREN, _FORWARD, _TRAINING = map(attrgetter, ("_modules", "forward", "training"))
_HOOKS, _PRE_HOOKS = map(attrgetter, ("_forward_hooks", "_forward_pre_hooks"))
_COUNTER = "num_batches_tracked"
_VERSION, _VALUES = attrgetter("_version"), methodcaller("values")


def _counters(module: nn.Module) -> list[str]:
    """Batch norms in training leave their statistics' versions alone, but not their counter's.

    Those of torch.jit's modules, which own no dictionaries, are never folded."""
    scripted = [f"{n}." for n, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    paths = (path for path, _ in module.named_buffers() if path.endswith(_COUNTER))
    return [path for path in paths if not path.startswith(tuple(scripted))]


class _Tensors:
    """Tensors by owner and name: the same objects, versions and addresses as before?

    Inference tensors have no version.
    """

    def __init__(self, module: nn.Module, paths: Iterable[str]) -> None:
        self._paths = list(paths)
        found = [_place(module, path) for path in self._paths]
        self._owners = [owner for owner, _ in found]
        self._names = [name for _, name in found]
        self._tensors = [owner[name] for owner, name in found]
        self._versioned = [t for t in self._tensors if not t.is_inference()]
        self._versions = list(map(_VERSION, self._versioned))
        self._pointers = list(map(Tensor.data_ptr, self._tensors))
        self._aliases = [t.detach() for t in self._tensors]
        self._memory = list(map(_memory, self._aliases))

    def same(self) -> bool:
        return (
            all(map(is_, map(dict.get, self._owners, self._names), self._tensors))
            and list(map(_VERSION, self._versioned)) == self._versions
            and list(map(Tensor.data_ptr, self._tensors)) == self._pointers
        )

    def among(self, memory: set[int | None], shapes: frozenset[tuple[int, ...]]) -> set[int | None]:
        """Of the storages that they are in, those in ``memory`` and those of trained halves."""
        if None in memory:
            return set(self._memory)
        return memory.intersection(self._memory) | {
            place
            for place, t in zip(self._memory, self._tensors, strict=True)
            if t.requires_grad and t.dtype in _HALVES and tuple(t.shape) in shapes
        }

    def changed(self, heard: set[int | None]) -> set[str]:
        """Paths of those that are not, of all that share their memory or are in ``heard``, and of
        the norms whose counters are among them."""
        versions = dict(zip(map(id, self._versioned), self._versions, strict=True))
        places = set(heard)
        for i, tensor in enumerate(self._tensors):
            kept = self._owners[i].get(self._names[i]) is tensor
            moved = tensor.data_ptr() != self._pointers[i]
            if not kept or moved or versions.get(id(tensor), 0) != _version(tensor):
                places.add(self._memory[i])
        found = {p for p, place in zip(self._paths, self._memory, strict=True) if place in places}
        norms = {path.rpartition(".")[0] for path in found if path.endswith(_COUNTER)}
        return found | {path for path in self._paths if path.rpartition(".")[0] in norms}


_HALVES = (torch.float16, torch.bfloat16)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _place(module: nn.Module, path: str) -> tuple[dict[str, Tensor], str]:
    """The dictionary that holds a tensor, and its name there."""
    parent, _, name = path.rpartition(".")
    holder = attribute(module, parent) if parent else module
    owner = holder._parameters if name in holder._parameters else holder._buffers
    return cast("dict[str, Tensor]", owner), name


_SETTINGS: dict[type, Any] = {
    nn.Conv2d: attrgetter("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.BatchNorm2d: attrgetter("eps", "track_running_stats"),
}
_PLAIN = (bool, int, float, str, type(None))


def _settings(modules: Iterable[nn.Module]) -> list[tuple[Any, list[nn.Module], list[Any]]]:
    """Getters of the settings that a trace bakes in, each with its modules and their values."""
    by_getter: dict[Any, list[nn.Module]] = {}
    by_names: dict[tuple[str, ...], Any] = {}
    for module in modules:
        by_getter.setdefault(_getter(module, by_names), []).append(module)
    return [(get, found, list(map(get, found))) for get, found in by_getter.items()]


def _getter(module: nn.Module, by_names: dict[tuple[str, ...], Any]) -> Any:
    """What reads a module's settings: for a type not listed, all plain attributes.

    Whether a module is training is no setting: it decides about the call, not about the plan.
    """
    if type(module) in _SETTINGS:
        return _SETTINGS[type(module)]
    names = tuple(n for n, value in vars(module).items() if n != "training" and _is_plain(value))
    if not names:
        return _nothing
    return by_names.setdefault(names, attrgetter(*names))


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(item, _PLAIN) for item in value)
    return isinstance(value, _PLAIN)


def _nothing(module: nn.Module) -> tuple[()]:
    return ()


def heeds_training(module: nn.Module) -> bool:
    """Whether a module's forward may depend on its flag ``training``, as far as its code shows.

    What is not a class's own Python, such as a module of torch.jit, counts as if it did.
    """
    if isinstance(module, torch.jit.ScriptModule) or "forward" in vars(module):
        return True
    if type(module) in _INSTANCE_NORMS:
        return bool(module.track_running_stats)
    kind: Any = type(module)  # mypy doubts that classes can be hashed
    return _reads_training(kind)


_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@lru_cache(maxsize=512)
def _reads_training(kind: type[nn.Module]) -> bool:
    """Whether forward, or a function that it may hand the module to, mentions ``training``."""
    members = [vars(base) for base in kind.__mro__ if not issubclass(nn.Module, base)]
    todo = [found[name] for name in ("forward", "__call__") for found in members if name in found]
    if any(not isinstance(forward, FunctionType) for forward in todo):
        return True
    seen: set[CodeType] = set()
    while todo:
        member = todo.pop()
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if not isinstance(function, FunctionType) or function.__code__ in seen:
            continue
        seen.add(function.__code__)
        names = set(_names(function.__code__))
        if "training" in names:
            return True
        todo += [found[name] for found in members for name in names & found.keys()]
        todo += filter(_is_of_users, _reached(function, names))
    return False


def _names(code: CodeType) -> Iterator[str]:
    """What a function's code, and that of the functions inside it, refers to by name or text."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str):
            yield constant


def _reached(function: FunctionType, names: set[str]) -> Iterator[Any]:
    """What a function knows from outside: globals, members of global modules, its closure."""
    scope = function.__globals__
    found = [scope[name] for name in names & scope.keys()]
    yield from found
    for module in found:
        if isinstance(module, ModuleType) and module.__name__.partition(".")[0] != "torch":
            yield from (vars(module)[name] for name in names & vars(module).keys())
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a cell that is still empty
            yield cell.cell_contents


def _is_of_users(function: Any) -> bool:
    return not str(getattr(function, "__module__", "")).startswith("torch.")


def busy_reason(modules: Iterable[nn.Module]) -> str | None:
    """Why modules, the root first, cannot be fused just now: training, or hooks below the root."""
    for index, module in enumerate(modules):
        if module.training and (index == 0 or heeds_training(module)):
            return "a submodule is in training mode"
        if index and (module._forward_hooks or module._forward_pre_hooks):
            return "a submodule has forward hooks"
    return None


def pytorch_reason(module: nn.Module, method: str = "forward") -> str | None:
    """Why a module must run as ordinary PyTorch: busy, or not what tracing and watching can see."""
    if getattr(module, "_is_replica", False):
        return "a DataParallel replica"
    if method in vars(module):
        return f"its {method} was replaced on the instance"
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"{name} is a {type(tensor).__name__}"
        if tensor.is_inference():
            return f"{name} is an inference tensor, which has no version counter"
    if any(nn.utils.parametrize.is_parametrized(m) for m in module.modules()):
        return "a submodule is parametrized"
    return busy_reason(module.modules())
