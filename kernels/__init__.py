"""Triton kernels of fastres, imported as ``fastres.kernels``.

At the root of a checkout this folder hides Hugging Face's package ``kernels``, which transformers
looks for. Imported by that name it gives way: to the installed package, else to an empty one.
"""

if __name__ == "kernels":
    from ._hidden import step_aside

    step_aside(globals())
elif __name__ != "fastres.kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}; import it as 'fastres.kernels' "
        "(a second copy would register the same custom operators twice)"
    )
else:
    from . import (
        b2b_gemm,
        conv,
        conv_int8,
        elementwise,
        gemm,
        global_pool,
        head,
        linear,
        pool,
        stem,
    )
    from ._ahead import compile_ahead
    from ._common import COMPILING, INTERPRETED, LAUNCHES, OPERATORS, KernelError, runs_on
    from ._config import TileConfig, gpu_of
    from ._split_k import new_workspace
    from ._tma import has_tma
    from .conv import conv2d, conv2d_ref
    from .elementwise import add_relu, add_relu_ref, relu, relu_ref
    from .global_pool import global_avg_pool, global_avg_pool_ref
    from .pool import avg_pool2d, avg_pool2d_ref, max_pool2d, max_pool2d_ref

__all__ = [
    "COMPILING",
    "INTERPRETED",
    "LAUNCHES",
    "OPERATORS",
    "KernelError",
    "TileConfig",
    "add_relu",
    "add_relu_ref",
    "avg_pool2d",
    "avg_pool2d_ref",
    "compile_ahead",
    "conv",
    "conv2d",
    "conv2d_ref",
    "conv_int8",
    "elementwise",
    "gemm",
    "global_avg_pool",
    "global_avg_pool_ref",
    "global_pool",
    "has_tma",
    "head",
    "linear",
    "gpu_of",
    "max_pool2d",
    "max_pool2d_ref",
    "new_workspace",
    "pool",
    "relu",
    "relu_ref",
    "runs_on",
    "b2b_gemm",
    "stem",
]
