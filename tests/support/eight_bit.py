"""8-bit plans with grids out of hand, for what needs no calibration."""

import math

import torch

from fastres.backends.onednn_int8 import Int8Ops, int8_products
from fastres.graph import plan as planning
from fastres.graph.fold import fold_step
from fastres.graph.ir import Conv2d, Grid, attribute
from fastres.graph.quantize import quantize, quantized_weight, sharing
from fastres.runtime.executor import Executor

MOST = 127 if int8_products() == "exact" else 64  # of a weight, where bytes have no dot products


def round_grid(low, high):
    """A grid that holds low to high, whose scale is a power of two and whose zero is even."""
    scale = 2.0 ** math.ceil(math.log2(max(high - min(low, 0.0), 1e-6) / 250))
    return Grid(scale, 2 * math.ceil(-min(low, 0.0) / scale / 2))


def observed(plan, model, x):
    """The values of all steps of a plan in floating point, by name."""
    executor = Executor(plan, model, Int8Ops(), x.dtype if x.is_floating_point() else torch.float32)
    values = {plan.parameters[0].name: x}
    executor.run([x], lambda step, _, result: values.update({step.name: result.clone()}))
    return {k: v for k, v in values.items() if isinstance(v, torch.Tensor) and v.dim() == 4}


def rough_grids(plan, values):
    """By the largest values; those on one grid share it, and nothing is below 0 by accident."""
    nonnegative = {name for name, value in values.items() if value.min() >= 0}
    of = sharing(plan, nonnegative)
    ends = {}
    for name, value in values.items():
        low, high = ends.get(of[name], (0.0, 0.0))
        ends[of[name]] = min(low, float(value.min())), max(high, float(value.max()))
    return {name: round_grid(*ends[of[name]]) for name in values}


def eight_bit_plan(model, x, keep=()):
    """The model's plan with all convolutions but ``keep`` in 8 bits."""
    plan = planning.of_module(model)
    values = observed(plan, model, x)
    convolutions = {s.name for s in plan.steps if isinstance(s.op, Conv2d)} - set(keep)
    return quantize(plan, rough_grids(plan, values), convolutions)


def engine(plan, model, ops, dtype=torch.float32):
    """An executor of an 8-bit plan on the model's weights; scales are powers of two."""

    def weights(step):
        weight, bias = fold_step(step.op, lambda path: attribute(model, path), dtype)
        if not isinstance(step.op, Conv2d) or step.op.x_grid is None:
            return weight, bias
        scale = 2.0 ** quantized_weight(weight, MOST, torch.zeros(len(weight)))[1].log2().ceil()
        whole = (weight / scale.view(-1, 1, 1, 1)).round().to(torch.int8)
        bias = torch.zeros(len(weight)) if bias is None else bias
        # Multiples of 2^-12, so that sums in float32 are exact.
        wide = torch.promote_types(dtype, torch.float32)
        return whole, ((bias * 4096).round() / 4096).to(wide), scale.to(wide)

    return Executor(plan, model, ops, dtype, weights)
