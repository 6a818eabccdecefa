"""Two ranks of DistributedDataParallel on gloo, each checked against ordinary PyTorch."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from fused import assert_close, assert_fused, executions, images, plain, small
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed, gloo"
)


def second_rank(_: int, store: str) -> None:
    torch.set_num_threads(1)
    run_rank(1, store)


def run_rank(rank: int, store: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=5),  # where the other rank has failed
    )
    try:
        train_and_evaluate(rank)
    finally:
        dist.destroy_process_group()


def train_and_evaluate(rank: int) -> None:
    model, x = small(seed=rank), images(4)
    own = x[2 * rank : 2 * rank + 2] + rank
    assert_fused(model, x)
    ddp = DistributedDataParallel(model)
    assert_fused(model, x)
    assert agree(plain(model, x)), "DDP starts all ranks from the first one's weights"

    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    for _ in range(2):
        ddp.train()
        optimizer.zero_grad()
        ddp(own).square().mean().backward()
        optimizer.step()
        ddp.eval()
    assert_fused(model, x)
    assert not agree(plain(model, x)), "each rank has statistics of its own now"

    with executions() as ran, torch.no_grad():
        out = ddp(x)
    assert not ran, "buffers arrive unseen, so ordinary PyTorch runs"
    assert torch.equal(out, plain(model, x))
    assert agree(plain(model, x)), "DDP's forward has sent the first rank's statistics"
    assert_fused(ddp.module, x)

    quiet = DistributedDataParallel(model, broadcast_buffers=False).eval()
    with executions() as ran, torch.no_grad():
        out = quiet(x)
    assert len(ran) == 1
    assert_close(out, model, x)


def agree(out: torch.Tensor) -> bool:
    """Whether the first rank has the same answer."""
    first = out.clone()
    dist.broadcast(first, 0)
    differ = torch.tensor(float(not torch.equal(first, out)))
    dist.all_reduce(differ)
    return differ.item() == 0


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """This process is the first rank: importing torch and what DDP needs takes CPU seconds."""
    store = str(tmp_path / "store")
    other = multiprocessing.spawn(second_rank, args=(store,), nprocs=1, join=False, daemon=True)
    run_rank(0, store)
    while not other.join():
        pass
