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
    from ._common import INTERPRETED, LAUNCHES
    from ._config import TileConfig, machine_of
    from ._tma import has_copy_engine
    from .conv import conv2d, conv2d_ref, new_scratch
    from .elementwise import add_relu, add_relu_ref, relu, relu_ref
    from .gemm import gemm, gemm_pair
    from .gemm import supports as gemm_supports
    from .global_pool import global_avg_pool, global_avg_pool_ref
    from .head import head, head_ref
    from .hwnc import conv2d_hwnc
    from .hwnc import supports as hwnc_supports
    from .linear import linear, linear_ref
    from .pool import avg_pool2d, avg_pool2d_ref, max_pool2d, max_pool2d_ref
    from .rot2 import rot2
    from .rot2 import supports as rot2_supports
    from .shifted import shifted_block, shifted_block_ref
    from .stem import pack_stem_weight, stem, stem_ref

    try:
        from . import sliding_fused
    except ImportError:  # a Triton whose Gluon, which is experimental, has another form
        sliding_fused = None  # type: ignore[assignment]

__all__ = [
    "INTERPRETED",
    "LAUNCHES",
    "TileConfig",
    "add_relu",
    "add_relu_ref",
    "avg_pool2d",
    "avg_pool2d_ref",
    "conv2d",
    "conv2d_hwnc",
    "conv2d_ref",
    "gemm",
    "gemm_pair",
    "gemm_supports",
    "global_avg_pool",
    "global_avg_pool_ref",
    "has_copy_engine",
    "head",
    "head_ref",
    "hwnc_supports",
    "linear",
    "linear_ref",
    "machine_of",
    "max_pool2d",
    "max_pool2d_ref",
    "new_scratch",
    "pack_stem_weight",
    "relu",
    "relu_ref",
    "shifted_block",
    "shifted_block_ref",
    "rot2",
    "rot2_supports",
    "sliding_fused",
    "stem",
    "stem_ref",
]
