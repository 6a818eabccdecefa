"""Triton kernels of fastres, imported as ``fastres.kernels``."""

if __name__ != "fastres.kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}; import it as 'fastres.kernels' "
        "(a second copy would register the same custom operators twice)"
    )

from ._common import INTERPRETED, LAUNCHES
from ._config import TileConfig
from .conv import conv2d, conv2d_ref, new_scratch
from .elementwise import add_relu, add_relu_ref, relu, relu_ref
from .global_pool import global_avg_pool, global_avg_pool_ref
from .linear import linear, linear_ref
from .pool import avg_pool2d, avg_pool2d_ref, max_pool2d, max_pool2d_ref
from .stem import pack_stem_weight, stem, stem_ref

__all__ = [
    "INTERPRETED",
    "LAUNCHES",
    "TileConfig",
    "add_relu",
    "add_relu_ref",
    "avg_pool2d",
    "avg_pool2d_ref",
    "conv2d",
    "conv2d_ref",
    "global_avg_pool",
    "global_avg_pool_ref",
    "linear",
    "linear_ref",
    "max_pool2d",
    "max_pool2d_ref",
    "new_scratch",
    "pack_stem_weight",
    "relu",
    "relu_ref",
    "stem",
    "stem_ref",
]
