"""The reference, and the bound that every output of a benchmark must keep.

The reference is the model in float64. Rounding in the tested precision is whatever PyTorch itself
shows against it (in 8 bits its ``fake_quantize_*`` operators), and an output passes when its RMS
error is at most twice that ("the rule of two", as flash-attention's tests have it). Random weights
are calibrated so that a bug shows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..backends.aten import cudnn_benchmarking
from ..models.resnet import BasicBlock, Bottleneck, ResNet
from ..runtime.tolerance import allowed_error, eps_of, rms
from .baselines import Model, eager
from .eight_bits import calibration_images, fake_quantize_
from .results import OutputError

SANE_ERROR = 0.25
DAMPED = 0.25
CALIBRATION_BATCH, CALIBRATION_SIZE = 8, 128
REFERENCE_CHUNK = 32


class AccuracyCheck:
    """Holds the float64 reference of each input and PyTorch's own rounding error per dtype.

    An instance is a ``check`` for :func:`fastres.perf.timing.measure`. ``errors`` keeps, for each
    contender, the worst output seen, by RMS.
    """

    def __init__(
        self,
        model: nn.Module,
        contenders: Mapping[str, Model],
        inputs: Sequence[Tensor],
        int8: bool = False,
    ) -> None:
        self.errors: dict[str, OutputError] = {}
        self.reference = _float64(model, inputs)
        self.rounding: dict[torch.dtype, float] = {}
        for name, call in contenders.items():
            if name.startswith("eager"):
                outputs = [call(x) for x in inputs]
                known = self.rounding.get(outputs[0].dtype, 0.0)
                self.rounding[outputs[0].dtype] = max(known, self._rounding(outputs))
        if int8:
            copied = fake_quantize_(copy.deepcopy(model), calibration_images(inputs[0]))
            plain = eager(copied, torch.float32, torch.contiguous_format)
            self.rounding[torch.int8] = self._rounding([plain(x) for x in inputs])

    def _rounding(self, outputs: list[Tensor]) -> float:
        return rms(torch.cat(outputs).double() - torch.cat(self.reference))

    def __call__(self, name: str, index: int, output: Tensor) -> str | None:
        """What is wrong with ``output`` on the input ``index``, or None."""
        reference = self.reference[index]
        if output.shape != reference.shape:
            return f"the output is {tuple(output.shape)}, not {tuple(reference.shape)}"
        difference = output.double() - reference
        if not bool(difference.isfinite().all()):
            advice = "; bfloat16 has the range" if output.dtype == torch.float16 else ""
            return f"the logits are not finite{advice}"
        dtype = torch.int8 if "int8" in name.split() else output.dtype
        error = self._error(difference, output, reference, dtype)
        if name not in self.errors or self.errors[name].rms < error.rms:
            self.errors[name] = error
        if error.rms > error.allowed_rms:
            return (
                f"wrong output: RMS error {error.rms:.2e}, allowed {error.allowed_rms:.2e}, "
                f"top-1 agreement {error.agreement:.1%}"
            )
        return None

    def _error(
        self, difference: Tensor, output: Tensor, reference: Tensor, dtype: torch.dtype
    ) -> OutputError:
        scale = rms(reference)
        return OutputError(
            rms=rms(difference),
            max_abs=difference.abs().max().item(),
            reference_rms=scale,
            allowed_rms=self._allowed(dtype, len(output), scale),
            agreement=(output.argmax(1) == reference.argmax(1)).double().mean().item(),
        )

    def _allowed(self, dtype: torch.dtype, images: int, scale: float) -> float:
        """Twice PyTorch's error, with room for chance, and never more than a quarter of the scale.

        The rounding error of one image differs from the mean by about as much as the mean, so that
        of n images does by 1/sqrt(n). The floor is a few units in the last place of the output.
        Beyond a quarter of the scale PyTorch itself is of no use as a reference.
        """
        rounding = self.rounding.get(dtype, 0.0)
        if not math.isfinite(rounding):
            return SANE_ERROR * scale
        rounding *= 1 + 1 / math.sqrt(images)
        return min(allowed_error(rounding, scale, eps_of(dtype)), SANE_ERROR * scale)


def _float64(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The logits of each input from a float64 copy of the model, a few images at a time."""
    plain = eager(model, torch.float64, torch.contiguous_format)
    with cudnn_benchmarking(False):
        return [torch.cat([plain(part) for part in x.split(REFERENCE_CHUNK)]) for x in inputs]


def calibrate_(model: ResNet, images: Tensor | None = None, seed: int = 0) -> None:
    """Give a freshly built network weights that can show a bug, and activations that stay in range.

    With initial weights a dropped mean, beta or gamma changes nothing, and deep networks overflow
    float16. Here gamma and beta are random, some gammas negative, and the running statistics are
    those of ``images``, by default of noise. The last norm of each block is damped: full-sized
    random branches amplify rounding from block to block, in ResNet-152 beyond any use of bfloat16.
    """
    if images is None:
        images = random_images(CALIBRATION_BATCH, model.conv1.in_channels, CALIBRATION_SIZE)[0]
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    blocks = [m for m in model.modules() if isinstance(m, (BasicBlock, Bottleneck))]
    last = {id(block.bn3 if isinstance(block, Bottleneck) else block.bn2) for block in blocks}
    with torch.no_grad():
        for norm in norms:
            size = DAMPED if id(norm) in last else 1.0
            sign = torch.where(torch.rand(norm.num_features, generator=generator) < 0.1, -1.0, 1.0)
            gamma = 0.5 + torch.rand(norm.num_features, generator=generator)
            norm.weight.copy_(size * sign * gamma)
            norm.bias.copy_(size * 0.5 * torch.randn(norm.num_features, generator=generator))
            norm.reset_running_stats()
            norm.momentum = None  # a plain average: after one pass, that pass's statistics
        training = model.training
        model.train()(images)
        model.train(training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def random_images(batch: int, channels: int, size: int, seed: int = 0) -> list[Tensor]:
    """Normal noise, float32 NCHW: few batches where batches are large, eight where they are 1."""
    generator = torch.Generator().manual_seed(seed)
    count = max(2, 8 // batch)
    return [torch.randn(batch, channels, size, size, generator=generator) for _ in range(count)]
