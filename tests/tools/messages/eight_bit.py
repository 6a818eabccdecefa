"""Cases: 8 bits."""

from __future__ import annotations

import torch

from fastres.backends.onednn_int8 import Int8Ops
from fastres.backends.select import select_int8_ops
from fastres.formats.plan_json import decode_plan, encode_plan
from fastres.graph.ir import Grid, Parameter, Quantize, Ref, ReLU
from fastres.graph.plan import Plan, Step
from fastres.graph.quantize import value_grids
from messages.provoke import add

GRID = Grid(0.5, 0)
X = (Parameter("x", True),)
PLAN = Plan((Step("q", Quantize(GRID), ("x",)), Step("r", ReLU(), ("q",))), X, None)

add("8 bits: NaN", lambda: Int8Ops().quantize(GRID, torch.tensor([1.0, float("nan")])))
add("8 bits: Triton", lambda: select_int8_ops("triton", torch.device("cpu"), torch.float32))
add("8 bits: a step that reads bytes", lambda: value_grids(PLAN))
add("8 bits: bytes given out", lambda: value_grids(Plan(PLAN.steps[:1], X, Ref("q"))))
add("8 bits: a file whose grids do not fit", lambda: decode_plan(encode_plan(PLAN)))
