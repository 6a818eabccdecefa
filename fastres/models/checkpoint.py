"""Checkpoints in and out: safetensors first, pickles only through ``weights_only=True``.

A checkpoint is read and checked whole before the first parameter changes, so a file that does not
fit leaves the model as it was.
"""

import hashlib
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import PathLike, atomic_write, check_target

__all__ = [
    "digest",
    "load_checkpoint",
    "load_state_dict",
    "read_metadata",
    "save_checkpoint",
    "state_dict_from_file",
]

# Where training scripts keep the weights inside a larger dictionary, in timm's order.
_AVERAGED = ("state_dict_ema", "model_ema")
_WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
# Objects in checkpoints that carry data and run nothing of their own.
_HARMLESS = (
    *("argparse.Namespace", "types.SimpleNamespace", "datetime.datetime"),
    *("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath"),
)
_DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
_MOST_WRAPPERS = 3
_SHOWN_PROBLEMS = 20
_DEEPEST_FRONT = 8


def state_dict_from_file(path: PathLike, *, use_ema: bool = True) -> dict[str, Any]:
    """Read the state dict of a checkpoint onto the CPU without running anything that is in it.

    ``*.safetensors`` is read as such, everything else by ``torch.load(weights_only=True)``. A
    training checkpoint is unwrapped where it keeps the weights under a key: as timm does, the
    averaged ones ("state_dict_ema", "model_ema") before "state_dict", "model", "model_state_dict",
    "net", and before any other. Where there was a choice, or the key is another, a warning says it.

    use_ema: False passes over the averaged weights.

    Raises FileNotFoundError for a missing file and CheckpointError for one that is truncated,
    asks for more than tensors, or holds no state dict.
    """
    path = _existing(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        _refuse_compressed(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"cannot read {path}: {_reason(error, path)}") from error
    return _unwrap(content, path, use_ema)


def read_metadata(path: PathLike) -> dict[str, str]:
    """The strings that a safetensors file carries beside its tensors.

    Raises FileNotFoundError for a missing file and CheckpointError for an unreadable one.
    """
    path = _existing(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:
        raise CheckpointError(f"cannot read {path}: {_reason(error, path)}") from error


def load_checkpoint(
    model: nn.Module,
    path: PathLike,
    *,
    strip: str | Sequence[str] = ("module.", "_orig_mod."),
    num_classes_mismatch: str = "error",
    use_ema: bool = True,
) -> tuple[str, ...]:
    """Load the file at ``path`` into ``model``, all of it or nothing.

    Nothing in the file is run: safetensors, or ``torch.load(weights_only=True)``.

    Args:
        model: any module.
        path: a ``.safetensors`` file, or a state dict or training checkpoint of ``torch.save``.
        strip: prefixes (or one) taken off the names, as DataParallel, DDP and torch.compile put
            them on.
        num_classes_mismatch: ``"error"``, or ``"reinit"`` to load the rest and initialise the
            classifier anew where the file has another number of classes.
        use_ema: take the averaged weights where the file has some, as timm does; a warning says it.

    Returns:
        names of the parameters that were initialised anew.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown ``num_classes_mismatch``.
        CheckpointError: the file cannot be read, or does not fit; the message lists every missing,
            unexpected, misshapen or non-finite entry. The model is then as it was.
    """
    return load_state_dict(
        model,
        state_dict_from_file(path, use_ema=use_ema),
        source=str(path),
        strip=strip,
        num_classes_mismatch=num_classes_mismatch,
    )


def load_state_dict(
    model: nn.Module,
    state: Mapping[str, Any],
    *,
    source: str = "the state dict",
    strip: str | Sequence[str] = (),
    num_classes_mismatch: str = "error",
) -> tuple[str, ...]:
    """As :func:`load_checkpoint`, from a state dict in memory; ``source`` names it in errors."""
    if num_classes_mismatch not in ("error", "reinit"):
        raise ValueError(
            f"num_classes_mismatch must be 'error' or 'reinit', got {num_classes_mismatch!r}"
        )
    expected = model.state_dict()
    prefixes = (strip,) if isinstance(strip, str) else tuple(strip)
    state = _strip(state, prefixes, expected, source)
    classifier = _mismatched_classifier(model, state, expected)
    fresh: dict[str, Tensor] = {}
    if classifier and num_classes_mismatch == "reinit":
        fresh = _fresh_classifier(model, classifier)
        state = state | fresh

    problems = list(_problems(state, expected))
    if problems:
        hint = _class_hint(classifier, state, expected) if classifier else ""
        hint = hint or _prefix_hint(state, expected, prefixes)
        raise CheckpointError(_report(source, problems, hint))
    _load_all_or_nothing(model, state, expected, source)
    return tuple(fresh)


def save_checkpoint(
    model: nn.Module | Mapping[str, Tensor],
    path: PathLike,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the parameters and buffers to a safetensors file, whole or not at all.

    Args:
        model: a module, or tensors by name.
        path: ends in ``.safetensors``.
        metadata: strings that the file carries beside its tensors.

    Raises:
        ValueError: another suffix.
        CheckpointError: something is no plain tensor.
        OSError: the file cannot be written.
    """
    check_target(path, (".safetensors",))
    state = model.state_dict() if isinstance(model, nn.Module) else model
    for name, value in state.items():
        odd = odd_form(value) if isinstance(value, Tensor) else f"a {type(value).__name__}"
        if odd or value.is_complex():
            raise CheckpointError(f"cannot save {name} in {path}: it is {odd or value.dtype}")
    # safetensors refuses strided and shared storage; a copy of each tensor has neither.
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    atomic_write(path, safetensors.torch.save(tensors, dict(metadata or {})))


def _existing(path: PathLike) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    return path


def _refuse_compressed(path: Path) -> None:
    """torch.save stores as it is; a compressed entry can ask for a thousand times its size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if any(entry.compress_type for entry in file.infolist()):
                raise ValueError("it is compressed, as torch.save never does")


def _reason(error: Exception, path: Path) -> str:
    """One line from the readers' long messages, which also advise to turn the safety off."""
    text = str(error)
    found = re.search(r"GLOBAL ([\w.]+)", text)
    if found:
        names = _unsafe_globals(path) or [found.group(1)]
        advice = "save only model.state_dict()"
        risky = [name for name in names if name not in _HARMLESS]
        asked = found.group(1) if not risky or found.group(1) in risky else risky[0]
        if not risky:
            allow = f"torch.serialization.add_safe_globals([{', '.join(names)}])"
            advice = f"if you trust the file, call {allow} before loading it, or {advice}"
        return (
            f"it asks for the Python object {asked}, never unpickled unasked since that can run "
            f"code; {advice}"
        )
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if first.startswith("Weights only load failed"):
        first = "not a pickle of tensors"
    return f"truncated or not a checkpoint ({first})"


def _unsafe_globals(path: Path) -> list[str]:
    """All objects that would have to be allowed; none where torch cannot list them."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # a file of before torch 1.6, or a damaged one
        return []


def _unwrap(content: Any, path: Path, use_ema: bool) -> dict[str, Any]:
    for _ in range(_MOST_WRAPPERS):
        found = _state_dicts(content)
        if not found:
            break
        key = next((k for k in (*_AVERAGED[: 2 * use_ema], *_WRAPPERS) if k in found), None)
        if key is None and len(found) > 1:
            raise CheckpointError(f"{path} holds several state dicts, under {_quoted(found)}")
        key = key or next(iter(found))
        others = _quoted(k for k in found if k != key)
        if key in _AVERAGED:
            instead = f"; use_ema=False takes those under {others}" if others else ""
            _say(f"{path}: took the averaged weights under {key!r}, as timm does{instead}")
        elif others or key not in _WRAPPERS:
            _say(f"{path}: took the weights under {key!r}" + (others and f", not {others}"))
        content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} holds no state dict: no tensors by name were found in it")
    return {_name(key): value for key, value in content.items()}


def _state_dicts(content: Any) -> dict[str, Any]:
    """By key: what may be a state dict or hold one; nothing for a state dict."""
    if not isinstance(content, Mapping):
        return {}
    inside = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Mapping)}
    known = {k: v for k, v in inside.items() if k in (*_AVERAGED, *_WRAPPERS) and v}
    if known or not any(_is_weight(v) for v in content.values()):
        return known | {k: v for k, v in inside.items() if any(map(_is_weight, v.values()))}
    return {}


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _say(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def _name(key: Any) -> str:
    return str(key) if isinstance(key, (str, int)) else f"<a {type(key).__name__}>"


def _strip(
    state: Mapping[str, Any], prefixes: Sequence[str], expected: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Take the prefixes off, in any order and number, except where the model has them itself."""
    stripped: dict[str, Any] = {}
    for name, value in state.items():
        short = name
        while short not in expected and (
            prefix := next((p for p in prefixes if p and short.startswith(p)), "")
        ):
            short = short.removeprefix(prefix)
        if short == "n_averaged" and short not in expected:
            continue  # a counter of AveragedModel's own
        if short in stripped:
            raise CheckpointError(f"{source} has {short} twice once {list(prefixes)} are stripped")
        stripped[short] = value
    return stripped


def _problems(state: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    for name in expected:
        # Batch norms saved before PyTorch 0.4.1 have no counter; torch then keeps the model's.
        if name not in state and not name.endswith("num_batches_tracked"):
            yield f"missing: {name}"
    for name, value in state.items():
        if name not in expected:
            yield f"unexpected: {name}"
        elif isinstance(expected[name], Tensor):
            problem = _tensor_problem(name, value, expected[name])
            if problem:
                yield problem


def _tensor_problem(name: str, value: Any, wanted: Tensor) -> str:
    if not isinstance(value, Tensor):
        return f"not a tensor: {name} is a {type(value).__name__}"
    if odd_form(value):
        return f"no plain tensor: {name} is {odd_form(value)}"
    if odd_form(wanted):
        return f"no plain tensor: the model's {name} is {odd_form(wanted)}"
    if value.shape != wanted.shape:
        return f"shape: {name} is {tuple(value.shape)}, the model's {tuple(wanted.shape)}"
    if value.is_floating_point() != wanted.is_floating_point() or value.dtype not in _DTYPES:
        return f"dtype: {name} is {value.dtype}, the model's {wanted.dtype}"
    if value.is_floating_point() and not value.isfinite().all():
        return f"not finite: {name} has {int((~value.isfinite()).sum())} NaN or infinite values"
    if name.endswith("running_var") and (value < 0).any():
        return f"negative variance: {name} has {int((value < 0).sum())} negative values"
    return ""


def odd_form(value: Tensor) -> str:
    """What makes a tensor no plain array of numbers, of which a shape can be asked; or ``""``."""
    if nn.parameter.is_lazy(value):
        return "not initialised"
    if value.is_nested:
        return "nested"
    if value.layout is not torch.strided:
        return f"sparse ({value.layout})"
    if value.is_quantized:
        return "quantized"
    return "on the meta device, without values" if value.is_meta else ""


def _prefix_hint(
    state: Mapping[str, Any], expected: Mapping[str, Any], strip: tuple[str, ...]
) -> str:
    """Advice where most names would fit but for something in front."""
    most = len(expected) / 2
    front, count = _common_front(state, expected)
    if count > most:
        return (
            f"most names fit without {front!r}: pass strip={(*strip, front)!r} to load_checkpoint"
        )
    front, count = _common_front(expected, state)
    if count > most:
        return f"the model's names begin with {front!r}: load into its {front.rstrip('.')} instead"
    return ""


def _common_front(names: Iterable[str], known: Mapping[str, Any]) -> tuple[str, int]:
    """What stands most often in front of a known name, and how often."""
    fronts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".", _DEEPEST_FRONT)
        rests = (".".join(parts[i:]) for i in range(len(parts)))
        rest = next((rest for rest in rests if rest in known), "")
        if rest and rest != name:
            fronts[name.removesuffix(rest)] += 1
    return fronts.most_common(1)[0] if fronts else ("", 0)


def _report(source: str, problems: list[str], hint: str) -> str:
    missing = [problem for problem in problems if problem.startswith("missing: ")]
    rest = problems[len(missing) :]
    half = _SHOWN_PROBLEMS // 2
    shown = missing[: max(half, _SHOWN_PROBLEMS - len(rest))]
    shown += rest[: max(half, _SHOWN_PROBLEMS - len(missing))]
    if len(problems) > len(shown):
        shown.append(f"... and {len(problems) - len(shown)} more")
    head = f"{source} does not fit the model, which is unchanged ({len(problems)} problems)"
    return "\n  ".join([head + (f": {hint}" if hint else ""), *shown])


def _classifier_name(model: nn.Module) -> str:
    """The name of the final linear layer: the model's own word for it, else the last one."""
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    get_classifier = getattr(model, "get_classifier", None)
    if callable(get_classifier):
        chosen = get_classifier()
        linears = [(name, m) for name, m in linears if m is chosen]
    return linears[-1][0] if linears else ""


def _mismatched_classifier(
    model: nn.Module, state: Mapping[str, Any], expected: Mapping[str, Any]
) -> str:
    """The classifier's name if the two differ in their number of classes, and in nothing else."""
    name = _classifier_name(model)
    ours, theirs = expected.get(f"{name}.weight"), state.get(f"{name}.weight")
    if not (isinstance(ours, Tensor) and isinstance(theirs, Tensor)):
        return ""
    if odd_form(ours) or odd_form(theirs) or theirs.dim() != 2:
        return ""
    return name if theirs.shape[0] != ours.shape[0] and theirs.shape[1] == ours.shape[1] else ""


def _class_hint(name: str, state: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    theirs, ours = (len(tensors[f"{name}.weight"]) for tensors in (state, expected))
    return (
        f"its classifier {name} has {theirs} classes, the model's {ours}; build the model with "
        f"num_classes={theirs} or pass num_classes_mismatch='reinit'"
    )


def _fresh_classifier(model: nn.Module, name: str) -> dict[str, Tensor]:
    """New initial values for the classifier, which itself stays untouched until all is checked."""
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    new = nn.Linear(old.in_features, old.out_features, old.bias is not None)
    return {f"{name}.{key}": value for key, value in new.state_dict().items()}


def _load_all_or_nothing(
    model: nn.Module, state: dict[str, Any], expected: Mapping[str, Any], source: str
) -> None:
    before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in expected.items()}
    try:
        model.load_state_dict(state)
    except Exception as error:
        model.load_state_dict(before)
        raise CheckpointError(f"{source} could not be loaded: {error}") from error


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values: the same for every file that holds them."""
    found = hashlib.sha256()
    for name, tensor in state.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
