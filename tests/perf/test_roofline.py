"""The floors against the table worked out by hand in the project's performance notes."""

import pytest
import torch

import fastres
from fastres.perf.roofline import FUSIONS, H200, Ceilings, roofline

# Thousands of images per second at 224x224, batch 256, fp16, 4.3 TB/s, 790 TFLOP/s; in brackets
# the number of kernels. None where the table has no entry.
TABLE = {
    "none": {
        "resnet18": (92.6, 68),
        "resnet34": (53.5, 124),
        "resnet50": (24.3, 174),
        "resnet101": (15.4, None),
        "resnet152": (10.8, None),
    },
    "epilogue per convolution": {
        "resnet18": (189, 23),
        "resnet34": (100, 39),
        "resnet50": (60.2, 56),
        "resnet101": (36.5, None),
        "resnet152": (25.4, None),
    },
    "fused stem": {"resnet18": (214, None), "resnet34": (107, None), "resnet50": (62.5, None)},
    "expand + next reduce": {"resnet50": (79.0, 35)},
    "shifted block": {
        "resnet50": (88.7, 19),
        "resnet101": (48.4, None),
        "resnet152": (33.3, None),
    },
}
GFLOP = {"resnet18": 3.63, "resnet34": 7.33, "resnet50": 8.18, "resnet101": 15.60}
CASES = [(f, n, *row) for f, rows in TABLE.items() for n, row in rows.items()]


@pytest.fixture(scope="module")
def models():
    return {name: fastres.create_model(name).eval() for name in TABLE["none"]}


@pytest.mark.parametrize(("fusion", "name", "thousands", "kernels"), CASES)
def test_floor_agrees_with_the_table(models, fusion, name, thousands, kernels):
    found = roofline(models[name], (256, 3, 224, 224), fusion=fusion)
    # The table gives three digits, and 1 % is what it may be off by.
    assert found.images_per_second / 1e3 == pytest.approx(thousands, rel=0.01)
    assert kernels in (None, len(found.kernels))


@pytest.mark.parametrize(("name", "gflop"), GFLOP.items())
def test_operations_agree_with_the_table_and_with_torch(models, name, gflop):
    from torch.utils.flop_counter import FlopCounterMode

    found = roofline(models[name], (1, 3, 224, 224))
    assert found.flop / 1e9 == pytest.approx(gflop, abs=0.005)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        models[name](torch.randn(1, 3, 224, 224))
    assert found.flop == counter.get_total_flops()


def test_larger_fusions_never_move_more(models):
    moved = [
        sum(k.bytes for k in roofline(models["resnet50"], (8, 3, 224, 224), fusion=f).kernels)
        for f in ("none", *FUSIONS)
    ]
    assert moved == sorted(moved, reverse=True)
    assert len(set(moved)) == len(moved)


def test_bytes_of_one_convolution_by_hand():
    net = torch.nn.Sequential(torch.nn.Conv2d(8, 4, 1, stride=2, bias=False)).eval()
    (kernel,) = roofline(net, (2, 8, 6, 6), itemsize=4).kernels
    # A quarter of the input's pixels, the output and the weights; bias-free.
    assert kernel.bytes == 4 * (2 * 8 * 9 + 2 * 4 * 9 + 4 * 8)
    assert kernel.flop == 2 * (2 * 4 * 9) * 8


def test_the_larger_term_bounds():
    net = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3, padding=1)).eval()
    shape = (4, 64, 16, 16)
    slow_memory = roofline(net, shape, ceilings=Ceilings("a", 1e6, 1e15)).kernels[0]
    slow_arithmetic = roofline(net, shape, ceilings=Ceilings("b", 1e15, 1e6)).kernels[0]
    assert slow_memory.bound == "memory"
    assert slow_memory.seconds == pytest.approx(slow_memory.bytes / 1e6)
    assert slow_arithmetic.bound == "arithmetic"
    assert slow_arithmetic.seconds == pytest.approx(slow_arithmetic.flop / 1e6)


def test_unknown_fusion_and_unknown_work_are_refused():
    with pytest.raises(ValueError, match="fusion must be one of none, epilogue"):
        roofline(fastres.create_model("resnet20").eval(), (1, 3, 32, 32), fusion="all")
    net = torch.nn.Sequential(torch.nn.GELU(), torch.nn.Conv2d(3, 4, 1)).eval()
    with pytest.raises(ValueError, match="left to PyTorch"):
        roofline(net, (1, 3, 8, 8))


def test_plain_data_has_the_totals():
    found = roofline(fastres.resnet18().eval(), (4, 3, 32, 32), ceilings=H200)
    data = found.to_dict()
    seconds = sum(kernel["seconds"] for kernel in data["kernels"])
    assert data["images_per_second"] == pytest.approx(4 / seconds)
    assert data["ceilings"]["name"] == "H200, fp16"
