"""What only a GPU can show of the kernels: every tile as compiled code, sizes, streams, graphs.

The tests beside this folder run on the GPU too where there is one; these need it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from helpers import nearest_tf32

from fastres.kernels import (
    INTERPRETED,
    add_relu,
    add_relu_ref,
    conv2d,
    conv2d_ref,
    global_avg_pool,
    global_avg_pool_ref,
    max_pool2d,
    max_pool2d_ref,
)
from fastres.kernels._config import ProblemSize, candidates, gpu_of
from fastres.kernels._split_k import workspace_size
from fastres.kernels.conv import CONFIGS, conv2d_kernel, conv2d_op
from fastres.kernels.linear import linear, linear_ref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: nothing is compiled"),
]

CUDA = torch.device("cuda", 0)
KINDS = {
    "half": (torch.float16, torch.bfloat16),
    "tf32": (torch.float32,),
    "ieee": (torch.float32,),
}
ROWS = [(kind, dtype, row) for kind in KINDS for dtype in KINDS[kind] for row in CONFIGS[kind]]


def nhwc(*shape: int, dtype=torch.float32, scale: float = 1.0) -> torch.Tensor:
    t = torch.randn(shape, device=CUDA) * scale
    return t.to(dtype, memory_format=torch.channels_last)


def fitted(kind: str, dtype: torch.dtype, row, split_k: int = 1):
    """The row as this GPU can run it, or a skip that names it."""
    used = row.fitted(kind, gpu_of(CUDA))
    if used is None:
        pytest.skip(f"{row} needs more shared memory than this GPU has: pruned")
    return replace(used, split_k=split_k if used.can_split_k else 1)


@pytest.mark.fault(19)
@pytest.mark.parametrize("split_k", [1, 4])
@pytest.mark.parametrize(("kind", "dtype", "row"), ROWS, ids=str)
def test_every_config_is_exact_on_the_device(integers, poisoned, kind, dtype, row, split_k):
    config = fitted(kind, dtype, row, split_k)
    precision = "ieee" if kind == "half" else kind
    for channels, outputs, window in [(128, 136, 3), (row.block_k + 8, 72, 3), (4, 64, 7)]:
        x = integers(5, channels, 15, 14, dtype=dtype)
        w, b = integers(outputs, channels, window, window, dtype=dtype), integers(outputs)
        shape = {"stride": 2 if window == 7 else 1, "padding": window // 2}
        bare = conv2d_ref(x, w, b, upcast=True, **shape)
        residual = integers(*bare.shape, dtype=dtype)
        guarded = poisoned(bare.shape, dtype)
        conv2d(
            x,
            w,
            b,
            residual=residual,
            relu=True,
            precision=precision,
            out=guarded.out,
            config=config,
            **shape,
        )
        guarded.check()
        assert torch.equal(guarded.out, (bare + residual).relu().to(dtype))


LAYERS = {
    "stem": (3, 64, 7, 2, 56),
    "1x1": (256, 64, 1, 1, 28),
    "3x3": (128, 128, 3, 1, 14),
    "3x3/2": (256, 256, 3, 2, 14),
    "expand": (512, 2048, 1, 1, 7),
}


@pytest.mark.parametrize("batch", [1, 8, 33])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "ieee", "tf32"])
def test_the_layers_of_a_resnet_keep_the_rule_of_two(rule_of_two, kind, layer, batch):
    channels, outputs, window, stride, size = LAYERS[layer]
    dtype = getattr(torch, kind, torch.float32)
    x = nhwc(batch, channels, size, size, dtype=dtype)
    w = nhwc(outputs, channels, window, window, dtype=dtype, scale=(channels * window**2) ** -0.5)
    b = torch.randn(outputs, device=CUDA)
    shape = {"stride": stride, "padding": window // 2, "relu": True}
    pt = conv2d_ref(x, w, b, **shape)
    precision = "tf32" if kind == "tf32" else "ieee"
    if kind == "tf32":  # cuDNN may take it as a permission only
        pt = conv2d_ref(nearest_tf32(x), nearest_tf32(w), b, upcast=True, **shape).float()
    got = conv2d(x, w, b, precision=precision, **shape)
    rule_of_two(got, pt, conv2d_ref(x, w, b, upcast=True, **shape))


@pytest.mark.fault(5)
def test_more_than_65535_tiles(integers):
    x, w = integers(70_000, 16, 1, 16, dtype=torch.float16), integers(16, 16, 1, 1).half()
    config = fitted("half", torch.float16, CONFIGS["half"][-1])
    assert ProblemSize(70_000 * 16, 16, 16, 1, 1, 2).tiles(config) > 65_535
    assert torch.equal(conv2d(x, w, config=config), conv2d_ref(x, w, upcast=True).half())


@pytest.mark.fault(6)
@pytest.mark.xdist_group("memory")
def test_more_than_2_to_the_31_elements():
    needed = 14 * 2**30
    if torch.cuda.mem_get_info(CUDA)[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    images = 2**31 // (64 * 56 * 56) + 3
    x = torch.empty(
        images, 64, 56, 56, dtype=torch.float16, device=CUDA, memory_format=torch.channels_last
    )
    for i in range(0, images, 64):
        x[i : i + 64] = torch.randint(-3, 4, (1, 64, 56, 56), device=CUDA)
        x[i] += 1
    x[-1] -= 2
    w = torch.randint(-1, 2, (64, 64, 3, 3), device=CUDA).half()
    w = w.contiguous(memory_format=torch.channels_last)
    y = conv2d(x, w, padding=1, relu=True)
    last = images - 1
    for i in (0, 1, images // 2, last - 1, last):
        exact = conv2d_ref(x[i : i + 1], w, padding=1, relu=True, upcast=True)
        assert torch.equal(y[i : i + 1], exact.half())
    del w
    pooled = max_pool2d(x, 3, stride=2, padding=1)
    assert torch.equal(pooled[last], max_pool2d_ref(x[last:], 3, stride=2, padding=1)[0])
    mean = global_avg_pool(x)
    assert torch.equal(mean[last], global_avg_pool(x[last:])[0])
    torch.testing.assert_close(mean[last], global_avg_pool_ref(x[last:])[0])
    want = add_relu_ref(x[last], y[last])
    add_relu(x, y, out=y)
    assert torch.equal(y[last], want)


@pytest.mark.fault(9)
def test_alignment_may_change_from_call_to_call(integers):
    x, w = integers(2, 64, 9, 9, dtype=torch.float16), integers(40, 64, 3, 3, dtype=torch.float16)
    want = conv2d_ref(x, w, padding=1, upcast=True).half()
    for offset in (0, 1, 0, 4, 8, 3, 0):
        flat = torch.empty(x.numel() + offset, dtype=x.dtype, device=CUDA)
        shifted = flat[offset:].view(2, 9, 9, 64).permute(0, 3, 1, 2).copy_(x)
        assert torch.equal(conv2d(shifted, w, padding=1), want)


@pytest.mark.fault(18)
@pytest.mark.parametrize("split_k", [1, 8])
def test_a_hundred_calls_give_the_same_bits(split_k):
    x, w = nhwc(2, 256, 7, 7), nhwc(512, 256, 3, 3)
    config = fitted("ieee", torch.float32, CONFIGS["ieee"][1], split_k)
    workspace = torch.zeros(workspace_size(ProblemSize(98, 512, 256, 9, 1, 4), config), device=CUDA)
    first = conv2d(x, w, padding=1, config=config)
    for _ in range(100):
        assert torch.equal(conv2d(x, w, padding=1, config=config, workspace=workspace), first)


@pytest.mark.fault(21)
def test_batch_sizes_share_their_compilations():
    w = nhwc(64, 64, 3, 3, dtype=torch.float16)
    config = fitted("half", torch.float16, CONFIGS["half"][6])

    def compiled() -> int:
        return len(conv2d_kernel.device_caches[0][0])

    conv2d(nhwc(1, 64, 14, 14, dtype=torch.float16), w, padding=1, config=config)
    before = compiled()
    for batch in range(2, 52):
        conv2d(nhwc(batch, 64, 14, 14, dtype=torch.float16), w, padding=1, config=config)
    for size in (16, 17, 31, 32):
        conv2d(nhwc(1, 64, size, size, dtype=torch.float16), w, padding=1, config=config)
    assert compiled() == before


@pytest.mark.fault(22)
def test_a_tensor_on_another_gpu_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, w = nhwc(1, 16, 5, 5).to("cuda:1"), nhwc(8, 16, 3, 3).to("cuda:1")
    with torch.cuda.device(0):
        got = conv2d(x, w)
    torch.testing.assert_close(got, conv2d_ref(x, w))
    with pytest.raises(ValueError, match="w must be on cuda:1 as the input is, got cuda:0"):
        conv2d(x, w.to("cuda:0"))


@pytest.mark.fault(22)
def test_cpu_tensors_are_refused():
    with pytest.raises(RuntimeError, match="x is on cpu; Triton kernels take CUDA tensors"):
        conv2d(torch.randn(1, 1, 3, 3), torch.randn(1, 1, 1, 1))


@pytest.mark.fault(23)
def test_another_stream_and_an_input_freed_at_once(integers):
    w = integers(64, 64, 3, 3, dtype=torch.float16)
    x = integers(8, 64, 28, 28, dtype=torch.float16)
    want = conv2d_ref(x, w, padding=1, upcast=True).half()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = [conv2d(x.clone(), w, padding=1) for _ in range(20)]
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(y, want) for y in got)


@pytest.mark.fault(25)
@pytest.mark.parametrize("own_workspace", [False, True])
@pytest.mark.parametrize("split_k", [1, 4])
def test_a_captured_call_replays_on_new_values(integers, split_k, own_workspace):
    x = integers(2, 128, 7, 7, dtype=torch.float16)
    w = integers(64, 128, 3, 3, dtype=torch.float16)
    config = fitted("half", torch.float16, CONFIGS["half"][6], split_k)
    size = workspace_size(ProblemSize(98, 64, 128, 9, 1, 2), config)
    workspace = torch.zeros(size, device=CUDA) if own_workspace else None
    conv2d(x, w, padding=1, config=config, workspace=workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = conv2d(x, w, padding=1, config=config, workspace=workspace)
    for _ in range(5):
        x.copy_(integers(*x.shape, dtype=x.dtype))
        graph.replay()
        assert torch.equal(y, conv2d_ref(x, w, padding=1, upcast=True).half())


@pytest.mark.fault(27)
def test_every_candidate_runs_on_this_gpu(integers):
    x, w = integers(1, 512, 7, 7, dtype=torch.float16), integers(512, 512, 3, 3).half()
    w = w.contiguous(memory_format=torch.channels_last)
    want = conv2d_ref(x, w, padding=1, upcast=True).half()
    problem = ProblemSize(49, 512, 512, 9, 1, 2)
    for config in candidates(CONFIGS["half"], problem, "half", gpu_of(CUDA)):
        assert torch.equal(conv2d(x, w, padding=1, config=config), want), config


@pytest.mark.fault(40)
def test_opcheck_and_compile_on_the_device():
    x, w = nhwc(2, 16, 6, 6, dtype=torch.float16), nhwc(8, 16, 3, 3, dtype=torch.float16)
    arguments = (x, w, torch.randn(8, device=CUDA), None, [1, 1], [1, 1], [1, 1], 1, True, "ieee")
    torch.library.opcheck(conv2d_op, arguments)
    compiled = torch.compile(lambda x, w: torch.ops.fastres.conv2d(x, w, *arguments[2:]) * 2)
    assert torch.equal(compiled(x, w), conv2d(x, w, arguments[2], padding=1, relu=True) * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 32, 300])
def test_the_classifier_keeps_the_rule_of_two(rule_of_two, dtype, batch):
    x = torch.randn(batch, 2048, device=CUDA).to(dtype)
    w = (torch.randn(1000, 2048, device=CUDA) / 45).to(dtype)
    b = torch.randn(1000, device=CUDA)
    rule_of_two(linear(x, w, b), linear_ref(x, w, b), linear_ref(x, w, b, upcast=True))
