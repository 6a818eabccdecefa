"""Cases: 8 bits."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
from fused import small
from helpers import adversarial_, real_images
from torch import nn

import fastres
from fastres.backends import select
from fastres.backends.onednn_int8 import Int8Ops
from fastres.formats.plan_json import decode_plan, encode_plan
from fastres.graph.ir import Grid, Parameter, Quantize, Ref, ReLU
from fastres.graph.plan import Plan, Step
from fastres.graph.quantize import value_grids
from fastres.models.checkpoint import read_metadata, state_dict_from_file
from messages.provoke import add, case

GRID = Grid(0.5, 0)
X = (Parameter("x", True),)
PLAN = Plan((Step("q", Quantize(GRID), ("x",)), Step("r", ReLU(), ("q",))), X, None)

add("8 bits: NaN", lambda: Int8Ops().quantize(GRID, torch.tensor([1.0, float("nan")])))
add("8 bits: a step that reads bytes", lambda: value_grids(PLAN))
add("8 bits: bytes given out", lambda: value_grids(Plan(PLAN.steps[:1], X, Ref("q"))))
add("8 bits: a file whose grids do not fit", lambda: decode_plan(encode_plan(PLAN)))


def quantized(model: Any = None, x: Any = None, **kwargs: Any) -> Any:
    given = small() if model is None else model
    images = real_images(36, 16) if x is None else x
    return fastres.quantize(given, images, **{"min_agreement": None, **kwargs})


def close_classes() -> None:
    """Of thousands of random classes the two best are close together."""
    model = fastres.ResNet(fastres.BasicBlock, [1, 1], num_classes=5000, planes=16)
    quantized(adversarial_(model), real_images(40, 24), min_agreement=1.0, holdout=0.5)


class Chosen(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).argmax(1)


class Forks(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = super().forward(x)
        return y if float(y.detach().flatten()[0]) > 0 else -y


X36 = partial(real_images, 36, 16)
REFUSED = {
    "no images": lambda: quantized(x=[]),
    "no iterable": lambda: quantized(x=3),
    "an image without channels": lambda: quantized(x=[torch.ones(16, 16)]),
    "labels of another number": lambda: quantized(x=(X36(), torch.zeros(3).long())),
    "labels that are floats": lambda: quantized(x=[(X36(), torch.rand(36))]),
    "labels outside of the classes": lambda: quantized(x=(X36(), torch.arange(36) + 100)),
    "NaN while calibrating": lambda: quantized(x=[*X36(), X36()[0] * float("nan"), *X36()[:8]]),
    "quantized already": lambda: quantized(quantized()),
    "folded in bfloat16": lambda: quantized(
        fastres.optimize(small(), verify=False, dtype=torch.bfloat16)
    ),
    "no convolution": lambda: quantized(keep="*"),
    "keep of nothing": lambda: quantized(keep=("stem",)),
    "a calibrator": lambda: quantized(calibrator="entropy"),
    "a number of images": lambda: quantized(images=1),
    "a share": lambda: quantized(holdout=1),
    "agreement": close_classes,
    "an output without floats": lambda: quantized(Chosen(small()).eval()),
    "a dtype without meaning here": lambda: quantized(dtype=torch.float64),
    "half precision in a shell": lambda: quantized(Forks(small()).eval(), dtype=torch.float16),
    "no such backend": lambda: quantized(backend="cuda"),
}
for name, call in REFUSED.items():
    add(f"quantize: {name}", call)


@case("quantize: Triton on a CPU")
def _() -> None:
    with mock.patch.object(select, "_interpreting", return_value=False):
        quantized(backend="triton")


@case("load: an 8-bit step without its scale")
def _() -> None:
    fastres.save(quantized(), "int8.safetensors")
    described = read_metadata("int8.safetensors")
    state = state_dict_from_file("int8.safetensors")
    del state["folded.scale1"]
    fastres.save_checkpoint(state, "forged.safetensors", metadata=described)
    fastres.load("forged.safetensors")


@case("export: an 8-bit file that answers otherwise")
def _() -> None:
    model = quantized()
    wrong = (lambda x: [model(x) / 2]), "a runtime"
    with mock.patch("fastres.formats.export._runner", return_value=wrong):
        fastres.export(model, "m.pt2", X36())
