"""fastres: ResNets from PyTorch, folded, fused and checked.

``fastres.resnet50()`` takes the place of ``torchvision.models.resnet50()``;
``fastres.optimize(model)`` makes a fused copy of any ResNet that torch.fx can trace.
"""

from .bench.run import benchmark
from .errors import FastresError
from .formats.export import export
from .formats.fused_file import load, save
from .formats.keras_import import from_keras
from .frontends.dynamo import refresh
from .frontends.optimize import FastModel, optimize
from .frontends.quantize import Quantization, quantize
from .graph.diagram import plot_model
from .models.checkpoint import load_checkpoint, save_checkpoint
from .models.features import Features, features
from .models.preprocess import Normalize
from .models.registry import (
    create_model,
    list_models,
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet44,
    resnet50,
    resnet56,
    resnet101,
    resnet110,
    resnet152,
    resnet1202,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from .models.resnet import BasicBlock, Bottleneck, ResNet
from .models.summary import Summary, summary
from .perf.host_memory import HostMemory, keep_memory
from .runtime.verify import Verification, verify
from .train.loop import fit
from .version import __version__ as __version__

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "FastModel",
    "FastresError",
    "Features",
    "HostMemory",
    "Normalize",
    "Quantization",
    "ResNet",
    "Summary",
    "Verification",
    "benchmark",
    "create_model",
    "export",
    "features",
    "fit",
    "from_keras",
    "keep_memory",
    "list_models",
    "load",
    "load_checkpoint",
    "optimize",
    "plot_model",
    "quantize",
    "refresh",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "resnet152",
    "resnet1202",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "save",
    "save_checkpoint",
    "summary",
    "verify",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
