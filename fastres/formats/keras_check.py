"""An imported Keras model against Keras itself: what ``fastres verify model.keras`` measures.

A wrong import says nothing, so it is compared with the only one who knows. The rule of two does not
hold between two libraries, which sum in different orders; what is forgotten or misplaced in an
import moves outputs by a hundredth and more, and rounding by a millionth.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import CheckpointError, MissingDependencyError
from ..frontends.optimize import optimize
from .keras_file import KerasFile
from .keras_import import from_keras

# Of the largest output; a deep ResNet of two libraries differs by about 1e-6.
TOLERANCE = 1e-4
# What the import itself loses in float32 to cancellation, the other library may lose as well.
OWN_ERRORS = 16
PARTS = "activations|constraints|dtype_policies|engine|initializers|layers|losses|metrics|models"
PARTS = f"{PARTS}|ops|optimizers|regularizers"
KERAS_MODULES = re.compile(rf"builtins|(tf_)?keras(\.src)?(\.({PARTS})(\..*)?)?")


@dataclass(frozen=True)
class Compared:
    """One run of one output: of the module as imported, or of its fused copy.

    Attributes:
        what: which of the two, and which output.
        shape: of the images, (N, C, H, W).
        max_abs: the largest difference from Keras; None where even the shapes differ.
        scale: the largest output, in magnitude.
        allowed: the largest difference that rounding explains.
        ok: whether it is explained.
    """

    what: str
    shape: tuple[int, ...]
    max_abs: float | None
    scale: float
    allowed: float
    ok: bool


class KerasModel:
    """The model as Keras itself loads it: ``safe_mode=True``, without its compile settings.

    fastres has read the file by then, so that it holds layers of Keras' own and no Lambda; what
    names any other module is refused before Keras sees it. Where KERAS_BACKEND is not set, Keras
    runs on PyTorch; of mixed precision, it is told to compute in float32.

    Raises:
        MissingDependencyError: without Keras.
        CheckpointError: the file names foreign modules, or Keras cannot load it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        config = {**KerasFile(path).config, "compile_config": None}
        foreign = next(_foreign_modules(config), None)
        if foreign is not None:
            raise CheckpointError(f"{path} names {foreign!r}, no module of Keras: it is not loaded")
        os.environ.setdefault("KERAS_BACKEND", "torch")
        try:
            import keras  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError as error:
            raise MissingDependencyError(
                f"comparing with Keras needs Keras, which cannot be imported ({error}); "
                "pip install keras"
            ) from error
        self.version = f"{keras.__version__} on {keras.backend.backend()}"
        try:
            self.model = keras.models.load_model(Path(path), compile=False, safe_mode=True)
            for layer in self.model._flatten_layers():
                if layer.compute_dtype != "float32":
                    layer.dtype_policy = "float32"
        except Exception as error:
            reason = str(error).partition("\n")[0][:100]
            raise CheckpointError(
                f"Keras {keras.__version__} cannot load {path} itself ({reason}); compare where "
                "the Keras that wrote it is installed"
            ) from error

    def __call__(self, images: Tensor) -> list[Tensor]:
        """The outputs for (N, C, H, W) float32 images, images as (N, C, H, W)."""
        found = self.model.predict(images.permute(0, 2, 3, 1).contiguous().numpy(), verbose=0)
        outputs = [torch.from_numpy(output.copy()) for output in _in_order(found)]
        return [o.permute(0, 3, 1, 2) if o.dim() == 4 else o for o in outputs]


def input_shapes(
    path: str | os.PathLike[str], size: int | None = None, batch: int = 8
) -> list[tuple[int, int, int, int]]:
    """Shapes (N, C, H, W) to compare on: several sizes where the file leaves them open.

    Raises:
        ValueError: the file asks for images of another size.
        FileNotFoundError, CheckpointError, KerasImportError: as :func:`fastres.from_keras`.
    """
    side = size or 224
    sides = ((side, side), (side + 1, side + 6))
    first, second = (from_keras(path, input_size=pair) for pair in sides)
    channels: Any = first.input_channels
    asked: Any = first.input_size
    if size is not None and asked != sides[0]:
        raise ValueError(f"{path} is for images of {asked} pixels; got size {size}")
    sizes = [asked] if asked == second.input_size else sides
    shapes = [(batch, channels, *pair) for pair in sizes]
    return [*shapes, (1, *shapes[0][1:])] if batch > 1 else shapes


def compare_with_keras(
    path: str | os.PathLike[str],
    batches: Sequence[Tensor],
    *,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> tuple[str, list[Compared]]:
    """Run a Keras file in Keras and in fastres, imported and fused.

    Args:
        path: a ``.keras`` or ``.h5`` file.
        batches: float32 images (N, C, H, W). Of other sizes than the first's only those count that
            Keras itself can run.
        device: where fastres runs.
        backend: of the fused copy.

    Returns:
        Keras' version and backend, and what was measured.

    Raises:
        FileNotFoundError, KerasImportError: as :func:`fastres.from_keras`.
        MissingDependencyError, CheckpointError: as :class:`KerasModel`.
    """
    imported = [from_keras(path, input_size=(b.shape[2], b.shape[3])).to(device) for b in batches]
    keras = KerasModel(path)
    found: list[Compared] = []
    for index, (module, images) in enumerate(zip(imported, batches, strict=True)):
        try:
            wanted = keras(images)
        except Exception:
            if index == 0:
                raise
            continue
        runs = {"imported": module, "fused": optimize(module, backend=backend, verify=False)}
        exact = _outputs(copy.deepcopy(module).double(), images.to(device).double())
        plain = _outputs(module, images.to(device))
        for name, run in runs.items():
            outputs = _outputs(run, images.to(device))
            found += [
                _compared(f"{name}, output {i}", images, *four)
                for i, four in enumerate(zip(wanted, outputs, plain, exact, strict=True))
            ]
    return keras.version, found


@torch.no_grad()
def _outputs(run: nn.Module, images: Tensor) -> list[Tensor]:
    return [output.cpu() for output in tree_leaves(_in_order(run(images)))]


def _in_order(outputs: Any) -> list[Any]:
    """Keras' order: of a dictionary that of its keys."""
    if isinstance(outputs, Mapping):
        return [outputs[key] for key in sorted(outputs)]
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def _compared(
    what: str, images: Tensor, wanted: Tensor, found: Tensor, plain: Tensor, exact: Tensor
) -> Compared:
    scale = float(exact.abs().max())
    own = float((plain.double() - exact).abs().max())
    allowed = max(TOLERANCE * scale, OWN_ERRORS * own)
    if wanted.shape != found.shape:
        return Compared(what, tuple(images.shape), None, scale, allowed, ok=False)
    difference = (wanted.double() - found.double()).abs()
    difference[(wanted == found) | (wanted.isnan() & found.isnan())] = 0
    error = float(difference.max())
    return Compared(what, tuple(images.shape), error, scale, allowed, ok=error <= allowed)


def _foreign_modules(config: Any) -> Any:
    """Names of modules in a configuration that are none of Keras' with layers and the like."""
    if isinstance(config, Mapping):
        module = config.get("module")
        if module is not None and not KERAS_MODULES.fullmatch(str(module)):
            yield module
    if isinstance(config, (Mapping, list)):
        for inner in config.values() if isinstance(config, Mapping) else config:
            yield from _foreign_modules(inner)
