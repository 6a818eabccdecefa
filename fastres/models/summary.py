"""What a network consists of before it is folded: a table of its layers and an operation count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ..graph.modules import duplicate

COLUMNS = ("layer", "kind", "kernel", "output", "parameters", "operations")


@dataclass(frozen=True)
class Summary:
    """A table of modules, and the totals.

    Attributes:
        table: the text of the table.
        parameters: number of parameters.
        flop: operations of one call; a multiply-add counts as two.
        input_size: shape of the input, (N, C, H, W).
    """

    table: str
    parameters: int
    flop: int
    input_size: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """The totals as plain data."""
        return {
            "parameters": self.parameters,
            "flop": self.flop,
            "input_size": list(self.input_size),
        }


def summary(model: nn.Module, input_size: Sequence[int]) -> Summary:
    """Describe a module as it is, unfused.

    Shapes are found on a copy without memory (PyTorch's meta device), so nothing is computed and
    the model is not touched. Operations are those that torch.utils.flop_counter knows: matrix
    products and convolutions.

    Args:
        model: any module that takes one image tensor.
        input_size: shape of its input, (N, C, H, W).
    """
    from torch.utils.flop_counter import FlopCounterMode  # it imports Triton

    weights = {id(t): _on_meta(t) for t in (*model.parameters(), *model.buffers())}
    plain = duplicate(model, weights).eval()
    names = {module: name for name, module in plain.named_modules()}
    sizes: dict[str, tuple[int, ...]] = {}

    def observe(module: nn.Module, _: Any, output: Any) -> None:
        if module in names and isinstance(output, Tensor):
            sizes[names[module]] = tuple(output.shape)

    floating = (t.dtype for t in model.parameters() if t.is_floating_point())
    image = torch.empty(*input_size, device="meta", dtype=next(floating, None))
    counter, hook = FlopCounterMode(display=False), register_module_forward_hook(observe)
    try:
        with counter, torch.no_grad():
            plain(image)
    finally:
        hook.remove()
    counts = counter.get_flop_counts()
    root = type(plain).__name__
    rows = [COLUMNS, *_rows(plain, sizes, {n: sum(c.values()) for n, c in counts.items()}, root)]
    total = sum(p.numel() for p in model.parameters())
    rows.append(("total", root, "", "", f"{total:,}", f"{counter.get_total_flops():,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return Summary("\n".join(lines), total, counter.get_total_flops(), tuple(input_size))


def _on_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty


def _rows(
    model: nn.Module, sizes: dict[str, tuple[int, ...]], flop: dict[str, int], root: str
) -> Iterator[tuple[str, ...]]:
    """The layers that were called and hold no others, in the order of the module."""
    for name, module in model.named_modules():
        if name not in sizes or list(module.children()):
            continue
        kernel = getattr(module, "kernel_size", "")
        kernel = "x".join(map(str, kernel)) if isinstance(kernel, tuple) else str(kernel)
        own = sum(p.numel() for p in module.parameters())
        operations = flop.get(f"{root}.{name}", 0)
        counts = (f"{own:,}" if own else "", f"{operations:,}" if operations else "")
        yield (name, type(module).__name__, kernel, "x".join(map(str, sizes[name])), *counts)
