"""8 bits in a benchmark: what all calibrate on, other quantisers, and PyTorch's own rounding."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.onednn_int8 import int8_products
from ..models.resnet import BasicBlock, Bottleneck

IMAGES = 32


def calibration_images(example: Tensor) -> Tensor:
    """Float32 images of the example's size, at least 32, in whole batches of the example's.

    They are noise, as the images that are timed, and others than those.
    """
    batches = -(-IMAGES // len(example))
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batches * len(example), *example.shape[1:], generator=generator)


def saturates() -> bool:
    """Whether sums of two products of a byte and an int8 overflow their 16 bits here."""
    return int8_products() != "exact"


def of_onnx(model: Any, example: Tensor) -> bytes:
    """onnxruntime's static quantisation of an ONNX model: QDQ, by channel, bytes times int8.

    Its weights keep to 7 bits where 8 would saturate, as its documentation advises.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = model.graph.input[0].name
    batches = iter(calibration_images(example).split(len(example)))

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            x = next(batches, None)
            return None if x is None else {name: x.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        quant_pre_process(model, source)
        quantization.quantize_static(
            source,
            target,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=saturates(),
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return target.read_bytes()


def by_nncf(model: Any, example: Tensor) -> Any:
    """NNCF's post-training quantisation of an OpenVINO model, 7-bit weights where 8 saturate."""
    with contextlib.redirect_stdout(io.StringIO()):  # it draws its progress there
        import nncf
        from nncf.quantization.advanced_parameters import (
            AdvancedQuantizationParameters,
            OverflowFix,
        )

        nncf.set_log_level(logging.ERROR)
        images = list(calibration_images(example).split(len(example)))
        fix = OverflowFix.ENABLE if saturates() else OverflowFix.DISABLE
        return nncf.quantize(
            model,
            nncf.Dataset(images, lambda x: x.numpy()),
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(images),
            advanced_parameters=AdvancedQuantizationParameters(overflow_fix=fix),
        )


def fake_quantize_(model: nn.Module, images: Tensor) -> nn.Module:
    """The model in place with 8 bits by PyTorch's definition, ``torch.fake_quantize_*``, in floats.

    Weights of convolutions by channel; what convolutions and blocks read by tensor, from the least
    to the largest value of the images (N, C, H, W), which are taken one by one.
    """
    kinds = (nn.Conv2d, BasicBlock, Bottleneck)
    modules: list[nn.Module] = [m for m in model.modules() if isinstance(m, kinds)]
    ends = dict.fromkeys(modules, (0.0, 0.0))

    def observe(module: nn.Module, inputs: tuple[Tensor]) -> None:
        low, high = ends[module]
        ends[module] = min(low, float(inputs[0].min())), max(high, float(inputs[0].max()))

    handles = [module.register_forward_pre_hook(observe) for module in modules]
    with torch.no_grad():
        for image in images.split(1):
            model(image)
    for handle in handles:
        handle.remove()
    for module in modules:
        low, high = ends[module]
        scale = (high - low) / 255
        module.register_forward_pre_hook(partial(_rounded, scale, round(-low / scale)))
        if isinstance(module, nn.Conv2d):
            _round_weights_(module.weight, 64 if saturates() else 127)
    return model


def _rounded(scale: float, zero: int, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (torch.fake_quantize_per_tensor_affine(inputs[0], scale, zero, 0, 255),)


@torch.no_grad()
def _round_weights_(weight: Tensor, most: int) -> None:
    scale = weight.abs().amax((1, 2, 3)) / most
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    weight.copy_(torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -most, most))
