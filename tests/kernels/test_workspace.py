"""One workspace serves every split reduction that the tables can select."""

from dataclasses import replace

import pytest
import torch

from fastres.kernels import TileConfig, conv2d, conv2d_ref, new_workspace
from fastres.kernels._config import ProblemSize, select_config, split_elements
from fastres.kernels._gpu import GPUS, HOPPER
from fastres.kernels._split_k import WORKSPACE_COUNTS, workspace_size
from fastres.kernels.conv import CONFIGS

SMALL = replace(GPUS["sm_89"], sms=20)


@pytest.mark.parametrize("gpu", [HOPPER, SMALL], ids=["Hopper", "small"])
@pytest.mark.parametrize("math_mode", CONFIGS)
def test_workspace_suffices_for_every_selected_tile(gpu, math_mode):
    room = WORKSPACE_COUNTS.value + split_elements(gpu)
    split = 0
    for pixels in (49, 196, 784, 3136, 12544):
        for batch in (1, 2, 8, 33):
            for n, channels, taps in ((64, 64, 9), (256, 64, 1), (512, 512, 9), (512, 2048, 1)):
                itemsize = 2 if math_mode == "half" else 4
                problem = ProblemSize(batch * pixels, n, channels, taps, 1, itemsize)
                row = select_config(CONFIGS[math_mode], problem, math_mode, gpu)
                split += row.split_k > 1
                assert workspace_size(problem, row) <= room
    assert split or gpu is SMALL, "no shape split_k, so nothing was shown"


def test_calls_in_a_row_share_one_workspace(device):
    generator = torch.Generator().manual_seed(5)
    workspace = new_workspace(device)
    for channels, split_k in ((64, 4), (48, 2), (64, 3), (32, 2)):
        x = torch.randint(-3, 4, (1, channels, 5, 6), generator=generator).float()
        w = torch.randint(-3, 4, (24, channels, 3, 3), generator=generator).float()
        x, w = (t.to(device, memory_format=torch.channels_last) for t in (x, w))
        row = TileConfig(16, 16, 16, 4, 2, split_k)
        y = conv2d(x, w, padding=1, config=row, workspace=workspace)
        exact = conv2d_ref(x, w, padding=1, upcast=True).float()
        assert torch.equal(y, exact), "integers are exact in any order"
    assert not workspace[: WORKSPACE_COUNTS.value].any(), "the counters are left at zero"
