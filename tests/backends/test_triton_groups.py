"""Networks through every kernel for groups of steps, forced one by one and all together."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from fused import plain, rms, shallow
from helpers import adversarial_, real_images
from tolerance import allowed_error
from torch import nn

from fastres import BasicBlock, Bottleneck, ResNet
from fastres.backends import fused_experimental
from fastres.backends.fused import EXPERIMENTAL, KERNELS
from fastres.backends.kernel_choice import KernelSelector, only
from fastres.backends.select import triton_ops
from fastres.backends.triton import TritonOps
from fastres.graph import fold, plan, trace
from fastres.runtime.executor import Executor

kernels = pytest.importorskip("fastres.kernels")
pytestmark = pytest.mark.interpreter
LAUNCHES = kernels.LAUNCHES

HALF = torch.float16


def bottlenecks(planes=64, **kwargs):
    """Two stages of bottlenecks, the first with a seam between blocks: wide enough for all."""
    net = ResNet(Bottleneck, [2, 1], num_classes=8, planes=planes, **kwargs)
    return adversarial_(net)


def basic(**kwargs):
    return adversarial_(ResNet(BasicBlock, [1, 1], num_classes=8, planes=64, **kwargs))


def executor(model, dtype, *kernels, device="cpu"):
    """The model with these kernels wherever they can run, and no others."""
    built = plan.build(fold.fold(trace.trace(model, "_forward_impl")))
    ops = triton_ops(cudnn=True, selector=only(*kernels))
    return Executor(built, model.to(device), ops, dtype)


@torch.no_grad()
def assert_right(made, model, x):
    """No more than twice the error of eager PyTorch in the same dtype, against float64.

    The floor is a rounding of the logits in that dtype, and in float32 of the order of sums too.
    """
    rounded = copy.deepcopy(model).to(made.dtype)
    exact = plain(copy.deepcopy(rounded).double(), x.double())
    out = made.run([x])
    assert out.dtype is made.dtype
    error = rms(plain(rounded, x) - exact)
    assert rms(out - exact) <= allowed_error(error, rms(exact), made.dtype)
    return out


SWEEP = pytest.mark.sweep

# kernel: network, dtype, name of what is launched, how often (a classifier is a conv2d as well)
SERVED = {
    "stem": (basic, torch.float32, "stem_kernel", 1),
    "head": (basic, HALF, "head_kernel", 1),
    "gemm": (bottlenecks, HALF, "gemm_kernel", 7),
    "dual_gemm": (bottlenecks, HALF, "gemm_kernel", 2),
    "b2b_gemm": (bottlenecks, HALF, "b2b_gemm_kernel", 2),
    "conv2d_hwnc": (bottlenecks, HALF, "conv2d_hwnc_kernel", 4),
    "cudnn": (basic, torch.float32, "conv2d_kernel", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", SERVED)
@pytest.mark.parametrize("batch", [pytest.param(1, marks=SWEEP), 3])
def test_one_kernel_at_a_time(kernel, batch, device):
    network, dtype, launched, times = SERVED[kernel]
    model = network().to(device)
    x = real_images(batch, 20 if kernel == "stem" else 32).to(device, dtype)
    made = executor(model, dtype, kernel, device=device)
    LAUNCHES.clear()
    assert_right(made, model, x)
    assert LAUNCHES[launched] == times
    served = set(made.plan.kernels)
    assert any(kernel in name.lower() for name in served), served
    assert set(made.plan.reasons) == {"", "asked for", "as above"} - (
        set() if kernel in ("stem", "head", "dual_gemm", "b2b_gemm") else {"as above"}
    )


@pytest.mark.sweep
@pytest.mark.slow
def test_hwnc_stays_inside_and_gives_the_sources_layout_back(device):
    """The layout is the network's own affair: outputs have the strides of the source's."""

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            net = bottlenecks()
            self.stem = nn.Sequential(net.conv1, net.bn1, nn.ReLU(), net.maxpool)
            self.blocks = nn.Sequential(net.layer1, net.layer2)

        def forward(self, x):
            return self.blocks(self.stem(x))

    model = Features().eval().to(device)
    built = plan.build(fold.fold(trace.trace(model)))
    ops = triton_ops(selector=only("stem", "conv2d_hwnc", "gemm", "dual_gemm"))
    made = Executor(built, model, ops, HALF)
    x = real_images(2, 32).to(device, HALF)
    assert made.plan.kernels.count("triton stem") == 2
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        for view in (x, x.contiguous(memory_format=torch.channels_last)):
            out = made.run([view])
            expected = copy.deepcopy(model).to(HALF)(view)
            assert out.stride() == expected.stride()
            assert rms(out - exact) <= 2 * rms(expected - exact) + 4e-3 * rms(exact)


SLIDING = {  # forced beside conv2d_hwnc: launches of each kernel for two stages, 2 + 1 blocks
    (): {"conv3x3_hwnc_kernel": 2, "conv2d_hwnc_kernel": 2, "bottleneck_hwnc_kernel": 0},
    ("bottleneck_hwnc",): {
        "conv3x3_hwnc_kernel": 1,
        "conv2d_hwnc_kernel": 2,
        "bottleneck_hwnc_kernel": 1,
    },
}


@pytest.mark.parametrize("more", SLIDING, ids=str)
def test_a_network_through_the_sliding_kernels(more, device, hopper, monkeypatch):
    """The second block's 3x3 ends with the next stage's reduction."""
    from fastres.kernels.experimental import conv3x3_hwnc

    if device.type == "cpu":
        monkeypatch.setattr(conv3x3_hwnc, "estimated_cycles", lambda *_: 0.0)
    model = bottlenecks().to(device)
    made = executor(model, HALF, "stem", "gemm", "conv2d_hwnc", *more, device=device)
    LAUNCHES.clear()
    assert_right(made, model, real_images(3, 32).to(device, HALF))
    if device.type == "cpu":
        assert {name: LAUNCHES[name] for name in SLIDING[more]} == SLIDING[more]


def test_experimental_kernels_bring_their_layout_where_they_can_run(device, monkeypatch):
    if device.type == "cuda":
        pytest.skip("plans for a GPU that is not there")
    from fastres.kernels.experimental import bottleneck_hwnc

    monkeypatch.setattr(bottleneck_hwnc, "runs_on", lambda device: True)

    def chosen(model, *forced):
        ops = triton_ops(selector=KernelSelector("sm_90", {}, dict.fromkeys(forced, True)))
        whole = plan.of_module(model)
        groups = ops.group_steps(whole, whole.shapes((64, 3, 32, 32)), HALF, device).groups
        return {name: sum(g.kernel == name for g in groups) for name in EXPERIMENTAL}

    block, conv = "bottleneck_hwnc", "conv2d_hwnc"
    assert chosen(bottlenecks(), block) == {block: 1, conv: 0}
    assert chosen(bottlenecks(), conv) == {block: 0, conv: 3}
    assert chosen(bottlenecks(), block, conv) == {block: 1, conv: 2}
    assert chosen(basic(), block) == {block: 0, conv: 0}, "no bottleneck that it could run"
    assert chosen(bottlenecks(), "b2b_gemm") == {block: 0, conv: 0}


@pytest.mark.sweep
def test_experimental_kernels_are_loaded_only_where_they_are_named():
    """Neither the package of kernels nor an ordinary network imports them."""
    use = (
        "import sys, torch, fastres; from fastres.backends.select import triton_ops;"
        "triton_ops(); m = fastres.resnet20(backend='triton').eval(); m.plan();"
        "print([name for name in sys.modules if 'experimental' in name and 'fastres' in name])"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    for forced, loaded in (("", False), ("-conv2d_hwnc", False), ("conv2d_hwnc", True)):
        environment["FASTRES_KERNELS"] = forced
        command = [sys.executable, "-c", use]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (done.stdout.strip() != "[]") is loaded, (forced, done.stdout)


FLAT = "stem,head,gemm"
NETWORKS = [
    pytest.param("resnet18", 32, FLAT, 11, id="resnet18"),
    pytest.param("resnet18", 32, f"{FLAT},conv2d_hwnc", 0, id="resnet18-hwnc", marks=SWEEP),
    pytest.param("resnet50", 64, f"{FLAT},dual_gemm,b2b_gemm", 8, id="resnet50", marks=SWEEP),
    pytest.param(
        "resnet50", 64, f"{FLAT},dual_gemm,b2b_gemm,conv2d_hwnc", 0, id="resnet50-hwnc", marks=SWEEP
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "forced", "others"), NETWORKS)
def test_whole_networks(name, size, forced, others, device, monkeypatch):
    """As users force them, through the environment; in fp16, which all of the kernels take."""
    kept = {"b2b_gemm"} - set(forced.split(","))
    monkeypatch.setenv("FASTRES_KERNELS", ",".join([forced, *(f"-{name}" for name in kept)]))
    model = shallow(name, 1 if name == "resnet18" else 2).to(device, HALF)
    built = plan.build(fold.fold(trace.trace(model, "_forward_impl")))
    made = Executor(built, model, triton_ops(), HALF)
    x = real_images(2, size).to(device, HALF)
    LAUNCHES.clear()
    assert_right(made, model, x)
    shown = {label.split()[-1] for label in served(made)}
    flat = set() if name == "resnet18" else {"gemm"}
    assert set(forced.split(",")) - {"gemm"} | flat <= shown
    assert LAUNCHES["conv2d_kernel"] == others


def served(made):
    return [name for name in made.plan.kernels if name and name != "view"]


@pytest.mark.parametrize(
    ("batch", "planes"),
    [(33, 64), (100, 16), pytest.param(255, 16, marks=SWEEP)],
    ids=["hwnc", "nhwc", "nhwc-most"],
)
def test_ragged_batches(batch, planes, device):
    """More images than a tile has rows, in no multiple of it.

    The layout [H, W, N, C] wants 64 channels; a program of the stem never sees two images.
    """
    model = bottlenecks(planes).to(device)
    x = real_images(batch, 7).to(device, HALF)
    every = (name for name in KERNELS | EXPERIMENTAL if name not in ("cudnn", "stem"))
    chosen = [name for name in every if planes == 64 or name != "conv2d_hwnc"]
    LAUNCHES.clear()
    assert_right(executor(model, HALF, *chosen, device=device), model, x)
    assert LAUNCHES["conv2d_hwnc_kernel"] == (3 if planes == 64 else 0)
    assert LAUNCHES["b2b_gemm_kernel"] == LAUNCHES["head_kernel"] == 1


def test_an_empty_batch_and_misaligned_images(device):
    model = bottlenecks(stem="cifar").to(device)
    every = tuple(name for name in KERNELS | EXPERIMENTAL if name != "cudnn")
    made = executor(model, HALF, *every, device=device)
    with torch.no_grad():
        assert made.run([torch.empty(0, 3, 8, 8, dtype=HALF, device=device)]).shape == (0, 8)
    first = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU()).to(device)
    built = plan.build(fold.fold(trace.trace(first.eval())))
    single = Executor(built, first, TritonOps(selector=only("gemm")), HALF)
    x = torch.randn(2 * 8 * 9 + 1, device=device).to(HALF)[1:].view(2, 3, 3, 8).permute(0, 3, 1, 2)
    LAUNCHES.clear()
    with torch.no_grad():
        out = single.run([x])
    assert LAUNCHES == {"conv2d_kernel": 1}, "TMA cannot read these rows"
    torch.testing.assert_close(out, first.half()(x), rtol=1e-3, atol=1e-3)  # two ulp of fp16


def test_a_residual_that_broadcasts_is_not_fused(device):
    class Broadcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

        def forward(self, x):
            return torch.relu(self.b(torch.relu(self.a(x))) + x.mean((2, 3), keepdim=True))

    model = Broadcast().eval().to(device)
    built = plan.build(fold.fold(trace.trace(model)))
    made = Executor(built, model, TritonOps(selector=only("gemm")), torch.float32)
    x = torch.randn(2, 16, 5, 4, device=device)
    LAUNCHES.clear()
    with torch.no_grad():
        torch.testing.assert_close(made.run([x]), model(x), rtol=1e-5, atol=1e-6)  # 16 products
    assert LAUNCHES["gemm_kernel"] == 1
    assert LAUNCHES["conv2d_kernel"] == 1


@pytest.mark.parametrize("left", [False, True], ids=["captured", "step by step"])
def test_descriptors_only_where_a_graph_hides_their_launch(left, device):
    """A plan with PyTorch calls in it gets no CUDA graph, and rows go to conv2d unless forced."""
    layers = [nn.Conv2d(64, 64, 1), nn.ReLU(), *([nn.GELU()] if left else [])]
    built = plan.build(fold.fold(trace.trace(nn.Sequential(*layers).eval())))
    shapes = built.shapes((32, 64, 56, 56))
    assert bool(built.fallbacks) is left
    for selector, expected in ((KernelSelector("sm_90"), not left), (only("gemm"), True)):
        groups = TritonOps(selector=selector).group_steps(built, shapes, HALF, device).groups
        assert ("gemm" in [group.kernel for group in groups]) is expected


def test_new_weights_reach_every_kernel(device):
    """Refolding writes into the same storage, as captured graphs need, prepared extras too."""
    model = bottlenecks().to(device)
    made = executor(model, HALF, "stem", "dual_gemm", "gemm", "b2b_gemm", "cudnn", device=device)
    x = real_images(1, 32).to(device, HALF)
    before = {name: [t.data_ptr() for t in extra] for name, extra in made._prepared_groups.items()}
    assert_right(made, model, x)
    adversarial_(model, seed=5)
    made.refold()
    assert_right(made, model, x)
    after = {name: [t.data_ptr() for t in extra] for name, extra in made._prepared_groups.items()}
    assert before == after
    assert any(before.values())


def test_a_group_runs_in_the_layout_that_any_of_its_inputs_has():
    """So that images in [H, W, N, C] stay so, a residual beside them or not."""
    ops = fused_experimental.HwncOps(selector=only("conv2d_hwnc", "gemm"))
    x = torch.randn(2, 3, 4, 5).permute(2, 3, 0, 1)  # [H, W, N, C] as (N, C, H, W)
    plain = torch.randn(4, 5, 2, 3)
    inputs = [x], [x, x], [plain, x], [plain], [plain, plain]
    hwnc, nhwc = fused_experimental.HWNC, fused_experimental.NHWC
    assert list(map(ops.layout_of, inputs)) == [hwnc, hwnc, hwnc, nhwc, nhwc]
