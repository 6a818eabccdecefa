"""What ``import kernels`` gives where this folder hides Hugging Face's package of that name."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any


def _installed() -> ModuleSpec | None:
    """The package ``kernels`` that is found where no checkout of fastres is on ``sys.path``."""
    own = Path("kernels", Path(__file__).name)
    others = [entry for entry in sys.path if not Path(entry, own).exists()]
    for finder in sys.meta_path:
        spec = finder.find_spec("kernels", others)
        if spec is not None and spec.loader is not None:
            return spec
    return None


def step_aside(hidden: dict[str, Any]) -> None:
    """Put the installed package in the place of this one, whose globals are ``hidden``.

    Without one, this becomes what an empty folder would be: no file, no version, no submodules.
    transformers takes that for "not installed", and no kernel of fastres is loaded twice.
    """
    del sys.modules[__name__]
    spec = _installed()
    if spec is None:
        hidden.update(__file__=None, __path__=[])
        return
    sys.modules["kernels"] = package = module_from_spec(spec)
    spec.loader.exec_module(package)  # type: ignore[union-attr]
