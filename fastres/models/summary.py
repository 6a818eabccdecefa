"""What a network consists of before it is folded: torchinfo's table and an operation count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import MissingDependencyError


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

    Args:
        model: any module that takes one image tensor.
        input_size: shape of its input, (N, C, H, W).

    Raises:
        MissingDependencyError: torchinfo is not installed.
    """
    try:
        import torchinfo
    except ImportError as error:
        raise MissingDependencyError(
            f"the summary is torchinfo's, which cannot be imported ({error}); "
            "install fastres[report]"
        ) from error
    from torch.utils.flop_counter import FlopCounterMode  # it imports Triton

    columns = ("input_size", "output_size", "num_params", "kernel_size")
    described = torchinfo.summary(
        model,
        input_size=tuple(input_size),
        col_names=columns,
        row_settings=("var_names",),
        verbose=0,
    )
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(*input_size))
    return Summary(
        str(described), described.total_params, counter.get_total_flops(), tuple(input_size)
    )
