"""Fused models for other runtimes: ONNX files, and torch.export programs that need no fastres."""

from __future__ import annotations

import io
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, treespec_dumps

from ..errors import MissingDependencyError, VerificationError
from ..files import atomic_write, check_target, exiting_on_signals
from ..frontends.calibrate import decibels
from ..frontends.fast_model import FastModel, in_float64
from ..frontends.fast_shell import FastShell
from ..runtime.verify import _check_structure, compare

FORMATS = (".onnx", ".pt2")
ONNX_DTYPES = (torch.float32, torch.float16)  # those whose convolutions onnxruntime can run
PROTOBUF_LIMIT = 2**31 - 2**24  # bytes that a single .onnx file can hold, some left for the graph


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how far its answers are from the fused model's.

    Attributes:
        path: the file.
        checked_by: what ran the file for the comparison; empty where onnxruntime is missing.
        max_abs: the largest difference; None if nothing could run the file.
    """

    path: str
    checked_by: str
    max_abs: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


Inputs: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]


def export(model: FastModel | FastShell, path: str | os.PathLike[str], images: Inputs) -> Exported:
    """Write a fused model as an ONNX file or as a torch.export program.

    The batch size stays open, the image size is that of ``images``. The file is run on one and on
    all of the images and compared with the model before it takes the place of an older one. An ONNX
    file returns the tensors of tuples and dictionaries one after another, a program as they are.

    Args:
        model: on the CPU.
        path: ends in ``.onnx`` or ``.pt2``.
        images: at least two, (N, C, H, W); for a model of several inputs all positional arguments,
            or all arguments by name, as which a program then takes them. Each tensor has the batch
            first; what is no tensor becomes a constant.

    Raises:
        TypeError: ``model`` is not a FastModel, or ``images`` are not the arguments of its forward.
        ValueError: another suffix, fewer than two images, a model not on the CPU, for ``.onnx``
            another dtype than float32 and float16, or a model that PyTorch cannot export.
        OSError: the file cannot be written; where the folder or the target says so, before work.
        MissingDependencyError: ``.onnx`` without onnxscript.
        VerificationError: the file gives other answers than the model.
    """
    path = Path(path)
    if not isinstance(model, FastModel):
        raise TypeError(_not_fused(model))
    target = check_before(path)
    if path.suffix == ".onnx" and model.dtype not in ONNX_DTYPES:
        raise ValueError(
            f"a .onnx file must hold a model of torch.float32 or torch.float16; got {model.dtype}"
        )
    if any(t.device.type != "cpu" for t in model.state_dict().values()):
        raise ValueError("model must be on the CPU to be exported; call model.cpu()")
    call = _arguments(model, images)
    _refuse_odd_output(model, path.suffix, call)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters' own, about their own future
            written = _onnx(model, call) if path.suffix == ".onnx" else _program(model, call)
    except Exception as error:
        interrupt = _interrupt_in(error)
        if interrupt is not None:
            raise interrupt from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"PyTorch cannot export model to {path.suffix}: {reason}") from error
    if isinstance(written, bytes):
        found = _check(model, written, path.suffix, call)
        atomic_write(path, written)
        return Exported(str(path), *found)
    with exiting_on_signals(), tempfile.TemporaryDirectory(dir=target.parent) as folder:
        draft = Path(folder) / target.name
        written.save(draft, external_data=True)
        found = _check(model, draft, path.suffix, call)
        for part in Path(folder).iterdir():  # the weights are a second file
            os.replace(part, check_target(target.with_name(part.name)))
    return Exported(str(path), *found)


def _interrupt_in(error: BaseException | None) -> BaseException | None:
    """Ctrl-C or the end by a signal, where torch.onnx made an error of its own of it."""
    while error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit)):
        error = error.__cause__ or error.__context__
    return error


def check_before(path: Path) -> Path:
    """The file to write. Raises what :func:`export` says of paths, and MissingDependencyError."""
    target = check_target(path, FORMATS)
    try:
        if path.suffix == ".onnx":
            import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"ONNX files need onnxscript, which cannot be imported ({error}); install fastres[onnx]"
        ) from error
    return target


Given: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


def _not_fused(model: object) -> str:
    if isinstance(model, FastShell):
        return (
            f"model must be a FastModel, got FastShell: {model.reason.partition('. ')[0]}, so that "
            "its Python is kept, which no file can hold; optimize and export a part that can be "
            f"traced, such as {next(iter(model.parts))!r}"
        )
    return f"model must be a FastModel, got {type(model).__name__}; optimize it first"


def _arguments(model: FastModel, images: Inputs) -> Given:
    """Positional and keyword arguments of the model's forward, all tensors of one batch."""
    if isinstance(images, Tensor):
        images = (images,)
    call: Given = ((), dict(images)) if isinstance(images, Mapping) else (tuple(images), {})
    try:
        model.signature.bind(*call[0], **call[1])
    except TypeError as error:
        raise TypeError(f"images must fit forward{model.signature}: {error}") from None
    given = [*call[0], *call[1].values()]
    tensors = [value for value in given if isinstance(value, Tensor)]
    others = [v for v in given if not isinstance(v, (Tensor, bool, int, float, str, type(None)))]
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors) or "no tensor"
    if others:
        raise TypeError(f"images must be tensors and numbers; got a {type(others[0]).__name__}")
    if not tensors or any(t.dim() == 0 or len(t) < 2 for t in tensors):
        raise ValueError(f"images must be at least two, (N, C, H, W); got {shapes}")
    if len({len(t) for t in tensors}) > 1:
        raise ValueError(f"images must have one batch size in all tensors; got {shapes}")
    return call


def _refuse_odd_output(model: FastModel, suffix: str, call: Given) -> None:
    """Run the model, which refuses inputs that do not fit, and look at what it returns."""
    leaves, form = tree_flatten(_run(model, *call))
    odd = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)]
    if odd or not leaves:
        got = odd[0] if odd else "nothing"
        raise ValueError(f"model must return tensors only to be exported; got {got} among them")
    try:
        if suffix == ".pt2":
            treespec_dumps(form)
    except NotImplementedError as error:
        raise ValueError(
            "model must return tuples, lists and dictionaries for a .pt2 file: "
            f"{str(error).partition(' because')[0]}; export an .onnx file"
        ) from error


def _floats(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _to_double(value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def _run(model: FastModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model.run(model._bind(args, kwargs))


def _dynamic_batch(model: FastModel, call: Given) -> dict[str, Any]:
    batch = torch.export.Dim("batch")
    given = model.signature.bind(*call[0], **call[1]).arguments
    return {name: {0: batch} if isinstance(v, Tensor) else None for name, v in given.items()}


def _program(model: FastModel, call: Given) -> bytes:
    shapes = _dynamic_batch(model, call)
    buffer = io.BytesIO()  # where the disk is full, PyTorch's own file writer ends the process
    torch.export.save(torch.export.export(model, *call, dynamic_shapes=shapes), buffer)
    return buffer.getvalue()


def _onnx(model: FastModel, call: Given) -> Any:
    """The file's content, or above the limit the program that writes it in two files."""
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    shapes = _dynamic_batch(model, call)
    model.for_onnx = True
    try:
        program: Any = torch.onnx.export(
            model, call[0], kwargs=call[1], dynamo=True, dynamic_shapes=shapes, verbose=False
        )
    finally:
        model.for_onnx = False
    return program if size > PROTOBUF_LIMIT else program.model_proto.SerializeToString()


def _check(
    model: FastModel, file: bytes | Path, suffix: str, call: Given
) -> tuple[str, float | None]:
    """What ran the file, and the largest difference."""
    run, name = _runner(file, suffix)
    if run is None:
        return "", None

    def floats(which: FastModel) -> Any:
        return lambda args, kwargs: _floats(_run(which, args, kwargs))

    wide, largest = in_float64(model), 0.0

    def exact(args: Any, kwargs: Any) -> Any:
        return floats(wide)(*tree_map(_to_double, (args, kwargs)))

    for rows in (slice(1), slice(None)):
        args, kwargs = tree_map(lambda v, rows=rows: v[rows] if isinstance(v, Tensor) else v, call)
        outputs = (tree_leaves(_run(model, args, kwargs)), tree_leaves(run(*args, **kwargs)))
        _check_structure(*outputs)
        # Indices and masks, which have no rounding, must be the same.
        expected, actual = ([t for t in o if t.is_floating_point()] for o in outputs)
        rest = ([t for t in o if not t.is_floating_point()] for o in outputs)
        if not all(map(torch.equal, *rest)):
            raise VerificationError(f"{name} gives other whole numbers")
        if not expected:
            continue
        if model.report is not None:
            largest = max(largest, _check_8_bits(model.report.db, expected, actual, name))
            continue
        verdict = compare(floats(model), lambda a, k: _floats(run(*a, **k)), exact, (args, kwargs))
        if not verdict.ok:
            raise VerificationError(f"{name} gives other answers: {verdict.reason}")
        largest = max(largest, verdict.max_abs)
    return name, largest


def _check_8_bits(db: float, expected: list[Tensor], actual: list[Tensor], name: str) -> float:
    """The largest difference; it may have twice the power of what 8 bits themselves cost.

    A runtime rounds some bytes the other way, and a network may make more of that.
    """
    exact, found = (torch.cat([t.flatten() for t in outputs]) for outputs in (expected, actual))
    same = decibels(exact, found)
    if same < db - 3:
        raise VerificationError(
            f"{name} gives other answers: it is {same:.1f} dB from the model, which is {db:.1f} dB "
            "from the network in floats"
        )
    return float((exact - found).abs().max())


def _runner(file: bytes | Path, suffix: str) -> tuple[Any, str]:
    if suffix == ".pt2":
        assert isinstance(file, bytes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of read-only bytes, which nobody writes into
            return torch.export.load(io.BytesIO(file)).module(), "torch.export"
    try:
        import onnxruntime
    except ImportError:
        return None, ""
    content = file if isinstance(file, bytes) else str(file)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        tensors = [v.numpy() for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        return list(
            map(torch.from_numpy, session.run(None, dict(zip(names, tensors, strict=True))))
        )

    return run, "onnxruntime"
