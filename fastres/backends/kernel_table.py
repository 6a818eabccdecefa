"""Which kernel serves which work on which GPU, as shipped: one rule per choice, with its evidence.

A rule is in force for the GPUs named in :data:`TABLES`; what no rule admits is served step by step
by ``conv2d`` and the other kernels for single operations. ``predicted`` stands for the model of
tiles, waves and traffic in :mod:`fastres.perf.forecast`, on 132 SMs; a rule that was measured names
the GPU. What was measured on the machine at hand goes before these rules, and the
environment variable FASTRES_KERNELS before both: names to use wherever they can run, and, after
``-``, names never to use, such as ``FASTRES_KERNELS=gemm,-b2b_gemm``.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..graph.patterns import Workload

HALF = ("half",)
TENSOR = ("half", "tf32")
ANY = ("half", "tf32", "ieee")


@dataclass(frozen=True)
class ChoiceRule:
    """A kernel is chosen for workloads within these bounds, which both ends belong to.

    Attributes:
        math_mode: which of them.
        widths: channels that the first step reads; empty for any.
        batch: images.
        pixels: pixels of the first step's result, over all images.
        evidence: how it is known to be faster.
    """

    kernel: str
    evidence: str
    math_mode: tuple[str, ...] = ANY
    widths: tuple[int, ...] = ()
    batch: tuple[int, float] = (1, float("inf"))
    pixels: tuple[int, float] = (1, float("inf"))

    def admits(self, kernel: str, workload: Workload) -> bool:
        """Whether the rule chooses this kernel for the workload."""
        return (
            kernel == self.kernel
            and workload.math_mode in self.math_mode
            and (not self.widths or workload.width in self.widths)
            and self.batch[0] <= workload.batch <= self.batch[1]
            and self.pixels[0] <= workload.pixels <= self.pixels[1]
        )


PORTABLE = (
    ChoiceRule(
        "stem", "predicted: 1.4x at batch 64; below 16 equal, but spares converting NCHW images"
    ),
    ChoiceRule("head", "predicted: 1.1x, one launch instead of two", batch=(1, 4)),
)
HOPPER_RULES = (
    *PORTABLE,
    ChoiceRule("dual_gemm", "predicted: 1.05x to 2x, the projection stays on the chip", TENSOR),
    ChoiceRule(
        "gemm",
        "predicted: conv2d's tiles, without its address arithmetic",
        TENSOR,
        batch=(32, float("inf")),
    ),
    ChoiceRule(
        "b2b_gemm", "predicted: 1.3x at batch 32", HALF, (64,), pixels=(32 * 56 * 56, float("inf"))
    ),
    ChoiceRule(
        "b2b_gemm",
        "predicted: 1.3x at batch 128, 1.03x into the next stage",
        HALF,
        (128,),
        pixels=(128 * 28 * 28, float("inf")),
    ),
)
TABLES: dict[str, tuple[ChoiceRule, ...]] = {
    "sm_80": PORTABLE,
    "sm_89": PORTABLE,
    "sm_90": HOPPER_RULES,
    "sm_100": tuple(rule for rule in HOPPER_RULES if rule.kernel != "b2b_gemm"),
    "gfx942": PORTABLE,
}
"""Rules by architecture; their order has no meaning.

Not chosen because unmeasured and doubtful: ``cudnn``; ``b2b_gemm`` of width 256, whose prediction
is within 2 % of its parts', and on sm_100, where its widest tile does not reach the matrix units
(mma.sync). The kernels in ``kernels/experimental`` have no rules.
"""

_LIKE = {"sm_86": "sm_80", "sm_87": "sm_80", "sm_103": "sm_100", "sm_120": "sm_89"}


def family(architecture: str) -> str:
    """The key of :data:`TABLES` for a GPU; ``""`` for one that has no rules."""
    architecture = _LIKE.get(architecture, architecture)
    return architecture if architecture in TABLES else ""


def shipped(architecture: str, kernel: str, workload: Workload) -> ChoiceRule | None:
    """The rule by which the kernel serves the workload on this architecture, if there is one."""
    rules = TABLES.get(family(architecture), PORTABLE)
    return next((rule for rule in rules if rule.admits(kernel, workload)), None)
