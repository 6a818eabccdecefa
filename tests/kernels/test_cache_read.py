"""The kernel behind the L2 ceiling reads what it says, as often as it says."""

import pytest
import torch

pytest.importorskip("triton")

from fastres.kernels.cache_read import BLOCK, cache_read, cache_read_ref

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize(
    ("blocks", "programs", "reads"), [(1, 1, 1), (3, 2, 2), (5, 4, 3), (2, 3, 7)]
)
def test_every_read_counts(device, blocks, programs, reads):
    x = torch.randint(-8, 9, (blocks * BLOCK,), device=device).float()
    # Sums of small integers are exact in float32 in any order.
    assert torch.equal(cache_read(x, programs, reads), cache_read_ref(x, programs, reads))


def test_the_reference_by_hand():
    x = torch.arange(1.0, 4.0).repeat_interleave(BLOCK)  # blocks of ones, twos and threes
    assert cache_read_ref(x, 3, 2).tolist() == [3.0 * BLOCK, 4.0 * BLOCK, 5.0 * BLOCK]


@pytest.mark.parametrize(
    ("x", "programs", "reads", "message"),
    [
        (torch.ones(BLOCK + 1), 1, 1, f"multiple of {BLOCK}, got torch.float32 of shape"),
        (torch.ones(BLOCK).half(), 1, 1, "dense vector of float32"),
        (torch.ones(2 * BLOCK)[::2], 1, 1, "dense vector"),
        (torch.ones(BLOCK), 0, 1, "programs must be at least 1, got 0"),
        (torch.ones(BLOCK), 1, 0, "reads must be at least 1, got 0"),
    ],
)
def test_mistakes_are_named(x, programs, reads, message):
    with pytest.raises(ValueError, match=message):
        cache_read(x, programs, reads)
