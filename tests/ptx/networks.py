"""Whole networks through the machine, judged by the rule of two."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tolerance import allowed_error

import fastres
from fastres.backends.kernel_choice import KernelSelector, only
from fastres.backends.triton import TritonOps
from fastres.graph import plan
from fastres.runtime.executor import Executor

from .driver import running

FORCED = ("stem", "gemm", "dual_gemm", "b2b_gemm", "head")
BATCH = 2
SIZES = {"resnet18": 32, "resnet50": 64}


@dataclass(frozen=True)
class Verdict:
    error: float  # of the largest output, against float64
    allowed: float  # twice what PyTorch's own error is, and four units in the last place
    launches: Counter[str]
    seconds: float


def cases(target: str) -> Iterator[tuple[str, torch.dtype, bool]]:
    """(network, dtype, whether the fused kernels are forced) of a target."""
    for name in SIZES:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            yield name, dtype, False
            if target != "sm_80" and dtype is not torch.float32:  # b2b_gemm takes halves
                yield name, dtype, True


def judged(
    name: str, size: int, dtype: torch.dtype, target: str, forced: bool, early: bool = False
) -> Verdict:
    """The network ``name`` on images of this size; float32 is multiplied as TF32."""
    torch.manual_seed(0)
    model = getattr(fastres, name)(num_classes=10).train()
    with torch.no_grad():
        model(torch.randn(8, 3, size, size))
        model.eval().to(dtype)
        x = torch.randn(BATCH, 3, size, size).to(dtype)
        selector = only(*FORCED, architecture=target) if forced else KernelSelector(target)
        started = time.process_time()
        tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = True
        try:
            with running(target, early=early) as gpu:
                made = plan.of_module(model, "_forward_impl")
                out = Executor(made, model, TritonOps(selector=selector), dtype).run([x])
        finally:
            torch.backends.cudnn.allow_tf32 = tf32
        seconds = time.process_time() - started
        plain = with_tf32(model, x) if dtype is torch.float32 else model._forward_impl(x)
        due = model.double()._forward_impl(x.double())
    own = float((plain.double() - due).abs().max())
    allowed = allowed_error(own, float(due.abs().max()), dtype)
    return Verdict(float((out.double() - due).abs().max()), allowed, gpu.launches, seconds)


def with_tf32(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """PyTorch with the operands of products rounded to TF32's ten bits."""

    def cut(t: torch.Tensor) -> torch.Tensor:
        return ((t.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)

    hooks = []
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            hooks.append(module.register_forward_pre_hook(lambda m, given: (cut(given[0]),)))
    kept = {name: p.clone() for name, p in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.weight.copy_(cut(module.weight))
    try:
        return model._forward_impl(x)  # type: ignore[operator]
    finally:
        for hook in hooks:
            hook.remove()
        for name, p in model.named_parameters():
            p.copy_(kept[name])
