"""GPUs that exist: what the choice of a tile needs to know of each architecture's best known one.

Multiply-adds are the makers' dense peaks over multiprocessors and clock. What L2 gives was measured
on Hopper (6.5 TB/s at 1.755 GHz, 72 % of the stated peak); elsewhere it is that share of the
maker's figure, or the nearest relative's: good enough to rank tiles, no measurement.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

_PORT = 64  # bytes per cycle between one multiprocessor and L2

BYTES = {"half": 2, "tf32": 4, "ieee": 4, "int8": 1}
"""Bytes of an operand's element, by arithmetic."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the choice of a tile needs to know of a GPU.

    Attributes:
        sms: multiprocessors.
        shared_limit: bytes of shared memory that one block may have.
        matrix: multiply-adds of halves per cycle and multiprocessor; of TF32 it does half, of bytes
            twice as many.
        mma: the same where a warp multiplies from registers, as in tiles below 64 rows.
        vector: multiply-adds of float32 in full.
        l2: bytes per cycle from L2 to each multiprocessor while all of them read.
    """

    sms: int
    shared_limit: int
    matrix: int = 2048
    mma: int = 1024
    vector: int = 128
    l2: float = 28

    @property
    def asynchronous(self) -> bool:
        """Whether products read shared memory while they run (wgmma, tcgen05)."""
        return self.matrix != self.mma

    def reads_memory(self, math_mode: str) -> bool:
        """The same by arithmetic: Triton multiplies bytes by wgmma, but not by tcgen05."""
        return self.asynchronous and (math_mode != "int8" or self.matrix == 2 * self.mma)

    def multiply_adds(self, math_mode: str, rows: int) -> float:
        """Multiply-adds per cycle and multiprocessor in tiles of so many rows."""
        if math_mode == "ieee":
            return self.vector
        rate = self.matrix if rows >= 64 and self.reads_memory(math_mode) else self.mma
        return rate * {"half": 1, "tf32": 0.5, "int8": 2}[math_mode]

    def l2_bandwidth(self, programs: int) -> float:
        """Bytes per cycle from L2 to each of so many multiprocessors at a time."""
        return min(_PORT, self.l2 * self.sms / programs)


_KB = 1024
GPUS = {
    "sm_80": Gpu(108, 163 * _KB, 1024, 1024, vector=64, l2=34),  # A100
    "sm_86": Gpu(84, 99 * _KB, 512, 512, l2=15),  # A40
    "sm_89": Gpu(142, 99 * _KB, 512, 512, l2=15),  # L40S
    "sm_90": Gpu(132, 227 * _KB),  # H100, H200 (SXM)
    "sm_100": Gpu(148, 227 * _KB, 4096),  # B200
    "sm_120": Gpu(188, 99 * _KB, 512, 512, l2=15),  # RTX PRO 6000
    "gfx90a": Gpu(104, 64 * _KB, 512, 512, l2=27),  # MI250, one of its two
    "gfx942": Gpu(304, 64 * _KB, 1024, 1024, l2=39),  # MI300X
    "gfx950": Gpu(256, 160 * _KB, 2048, 2048, l2=46),  # MI355X
    "gfx1100": Gpu(96, 64 * _KB, 256, 256, l2=23),  # RX 7900 XTX
}

HOPPER = GPUS["sm_90"]
"""Predictions, the shipped tables and the tests are of this GPU."""


def record_of(architecture: str, name: str = "") -> Gpu:
    """The record of an architecture; of an unknown one its family's, or Hopper's.

    A GeForce adds up products of halves in float32 at half the rate of its professional twin.
    """
    family = [known for known in GPUS if known[:-1] == architecture[:-1]]
    record = GPUS.get(architecture) or GPUS[family[-1] if family else "sm_90"]
    if "GeForce" in name and not record.asynchronous:
        return replace(record, matrix=record.matrix // 2, mma=record.mma // 2)
    return record
