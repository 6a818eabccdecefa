"""The rule of two, as tests judge by it."""

import torch


def allowed_error(own: float, scale: float, dtype: torch.dtype, ulps: float = 4.0) -> float:
    """How far from float64 an answer may be: twice PyTorch's ``own`` error, and a floor.

    The floor, so many units in the last place of ``scale``, the size of the exact answer, covers
    answers that PyTorch happens to round well. ``own`` and ``scale`` are of one norm, root mean
    squares or maxima. A copy of fastres.runtime.tolerance on purpose: were tests to take their
    tolerance from the code that they judge, one mistake there would loosen all of them.
    """
    return 2 * own + ulps * torch.finfo(dtype).eps * scale
