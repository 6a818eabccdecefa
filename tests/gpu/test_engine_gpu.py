"""The engine on a GPU: right in every dtype and backend, fresh after changes, memory, threads."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from fused import assert_close, executions, plain, rms, small
from helpers import adversarial_, real_images
from tolerance import allowed_error

import fastres
from fastres.backends.select import _has_triton
from fastres.runtime.verify_steps import verify_steps

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda", 0)
BACKENDS = ["auto", "torch", *(["triton"] if _has_triton() else [])]
HALVES = [torch.float16, torch.bfloat16]


def images(n=2, size=32, dtype=torch.float32):
    return real_images(n, size).to(CUDA, dtype)


def on_gpu(**kwargs):
    return small(**kwargs).to(CUDA)


def assert_fused(model, x):
    """The engine runs and is right: at a first call, at a capture, at a replay."""
    with torch.no_grad():
        for _ in range(3):
            assert_close(model(x), model, x)
    with executions() as ran, torch.no_grad():
        model(x[:0])
    assert len(ran) == 1, "the engine does not run"


def steps(model, x):
    with torch.no_grad():
        model(x)
    (runner,) = model._live()._runners.values()
    return verify_steps(runner.executor, model, [x])


@pytest.mark.fault(41)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_float32_against_float64(name, backend):
    model = adversarial_(fastres.create_model(name, backend=backend)).to(CUDA)
    assert_fused(model, images(4, 96))
    assert_fused(model, images(1, 65).contiguous(memory_format=torch.channels_last))


@pytest.mark.fault(41)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_half_precision_by_steps(name, dtype, backend):
    model = adversarial_(fastres.create_model(name, backend=backend)).to(CUDA, dtype)
    x = images(4, 96, dtype)
    found = steps(model, x)
    assert [error for error in found if not error.ok] == []
    exact = plain(adversarial_(fastres.create_model(name)).to(CUDA).double(), x.double())
    with torch.no_grad():
        for _ in range(3):
            out = model(x)
            assert out.dtype is dtype
            # Whole networks in half precision say little: as good as PyTorch within a factor of 2.
            own = rms(plain(model, x) - exact)
            assert rms(out - exact) <= allowed_error(own, rms(exact), dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_folded_from_float32(dtype):
    source, x = adversarial_(fastres.resnet50()).to(CUDA), images(4, 96)
    fast = fastres.optimize(source, dtype=dtype, example_input=x)
    assert fast.verification.ok
    for _ in range(3):
        out = fast(x)
    assert out.dtype is dtype
    exact = plain(source.double(), x.double())
    rounded = plain(source.to(dtype), x.to(dtype))
    assert rms(out - exact) <= allowed_error(rms(rounded - exact), rms(exact), dtype)


@pytest.mark.fault(17)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tf32_follows_torchs_flags(backend, monkeypatch):
    """Allowed, it is used, and is worse than full float32 but good to three digits."""
    model, x = adversarial_(fastres.resnet18(backend=backend)).to(CUDA), images(4, 96)
    exact = plain(adversarial_(fastres.resnet18()).to(CUDA).double(), x.double())
    errors = {}
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        with torch.no_grad():
            for _ in range(3):
                out = model(x)
        errors[allowed] = rms(out - exact) / rms(exact)
        if not allowed:  # how PyTorch's own float32 does depends on the algorithm that cuDNN takes
            own = rms(plain(model, x) - exact)
            assert rms(out - exact) <= allowed_error(own, rms(exact), torch.float32)
    assert errors[True] < 1e-2
    if _has_triton() and backend != "torch" and torch.cuda.get_device_capability() >= (8, 0):
        assert errors[True] > 10 * errors[False]


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast(dtype):
    model, x = on_gpu(), images()
    half = on_gpu().to(dtype)
    with torch.autocast("cuda", dtype), torch.no_grad():
        outs = [model(x) for _ in range(3)]
        assert plain(model, x).dtype is dtype
    for out in outs:
        assert_close(out, half, x.to(dtype))
    assert_fused(model, x)


def fused_adamw(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model._forward_impl(images()).square().mean().backward()
    optimizer.step()


def foreach_sgd(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    model._forward_impl(images()).square().mean().backward()
    optimizer.step()


CHANGES = {
    "fused AdamW": fused_adamw,
    "foreach SGD": foreach_sgd,
    "load_state_dict": lambda m: m.load_state_dict(small(seed=3).state_dict()),
    "in place": torch.no_grad()(lambda m: m.conv1.weight.mul_(2)),
    "statistics": lambda m: m.bn1.running_var.mul_(3),
    "a new fc": lambda m: setattr(m, "fc", torch.nn.Linear(16, 3).to(CUDA).eval()),
    "eps": lambda m: setattr(m.layer1[0].bn2, "eps", 5.0),
    "data": lambda m: setattr(m.fc.weight, "data", 2 * m.fc.weight.data),
    "to the CPU and back": lambda m: m.cpu().to(CUDA),
    "float64 and back": lambda m: m.double().float(),
}


@pytest.mark.fault(35)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changes_behind_a_captured_graph(change):
    model, x = on_gpu(), images()
    assert_fused(model, x)
    for _ in range(2):
        change(model)
        assert_fused(model, x)


@pytest.mark.fault(22)
def test_devices_are_not_mixed():
    model = on_gpu()
    with torch.no_grad(), pytest.raises(ValueError, match="x must be on cuda:0.*got cpu"):
        model(images().cpu())
    fast = fastres.optimize(model, verify=False)
    with pytest.raises(ValueError, match="x must be on cuda:0.*got cpu"):
        fast(images().cpu())
    model.cpu()
    with torch.no_grad(), pytest.raises(ValueError, match="x must be on cpu.*got cuda:0"):
        model(images())
    with torch.no_grad():
        assert_close(model(images().cpu()), model, images().cpu())


@pytest.mark.fault(22)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    model, x = small().to("cuda:1"), real_images(2, 32).to("cuda:1")
    assert torch.cuda.current_device() == 0
    with torch.no_grad():
        for _ in range(3):
            assert_close(model(x), model, x)
    model.to("cuda:0")
    with torch.no_grad(), pytest.raises(ValueError, match="x must be on cuda:0.*got cuda:1"):
        model(x)
    assert_fused(model, x.to("cuda:0"))


@pytest.mark.fault(26)
def test_copies_and_moves_of_fast_models():
    source, x = on_gpu(), images()
    fast = fastres.optimize(source, example_input=x)
    out = fast(x)
    moved = fast.cpu()
    assert_close(moved(x.cpu()), small(), x.cpu())
    moved.to(CUDA)
    for _ in range(3):
        torch.testing.assert_close(moved(x), out)


FORKED = """
import os, sys
sys.path[:0] = ["tests/support", "."]
import torch
from fused import images, small
model, x = small().cuda(), images().cuda()
with torch.no_grad():
    expected = [model(x) for _ in range(3)][-1]
    child = os.fork()
    if child == 0:
        try:
            model(x)
        except RuntimeError as error:
            os._exit(0 if "forked subprocess" in str(error) and "spawn" in str(error) else 3)
        os._exit(4)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert torch.equal(model(x), expected)
sys.exit(status)
"""


@pytest.mark.fault(26)
def test_a_fork_after_cuda_has_started_is_refused_with_advice():
    """torch's own error, which advises spawn; the parent goes on as before."""
    done = subprocess.run([sys.executable, "-c", FORKED], cwd=ROOT, check=False)
    assert done.returncode == 0


@pytest.mark.fault(20)
@pytest.mark.xdist_group("memory")
def test_out_of_memory_leaves_the_model_usable():
    model = adversarial_(fastres.resnet50()).to(CUDA)
    small_images = images(2, 64)
    assert_fused(model, small_images)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    limit = torch.cuda.memory_reserved(CUDA) + 2**30
    torch.cuda.set_per_process_memory_fraction(limit / total, CUDA)
    try:
        large = torch.randn(512, 3, 224, 224, device=CUDA)
        for _ in range(3):
            with torch.no_grad(), pytest.raises(torch.cuda.OutOfMemoryError):
                model(large)
        del large
        torch.cuda.empty_cache()
        assert_fused(model, small_images)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
    assert_fused(model, images(3, 64))


@pytest.mark.fault(21)
@pytest.mark.xdist_group("memory")
def test_fifty_batch_sizes_leave_memory_flat():
    model = on_gpu()
    inputs = [images(n, 32) for n in range(1, 51)]

    def sweep():
        with torch.no_grad():
            for x in inputs:
                for _ in range(3):
                    model(x)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()  # what is reserved depends on the allocator's segments

    sweep()
    first, second = sweep(), sweep()
    assert second <= first + 2**20
    (runner,) = model._live()._runners.values()
    assert len(runner.shapes) <= runner.limit
    for x in (inputs[0], inputs[24], inputs[49]):
        assert_close(_without_grad(model, x), model, x)


def _without_grad(model, x):
    with torch.no_grad():
        return model(x)


@pytest.mark.fault(21)
@pytest.mark.xdist_group("memory")
def test_training_gives_the_memory_back():
    model, x = adversarial_(fastres.resnet50()).to(CUDA), images(4, 128)
    assert_close(plain(model, x), model, x)  # cuBLAS takes its workspaces, and keeps them
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    assert_fused(model, x)
    held = torch.cuda.memory_allocated()
    model.train()
    torch.cuda.synchronize()
    assert held > before + 90 * 2**20, "the folded weights of a ResNet-50 are 98 MiB"
    assert torch.cuda.memory_allocated() < before + 45 * 2**20, "workspaces of a stream or two"
    assert_fused(model.eval(), x)


@pytest.mark.fault(23)
def test_threads_on_streams_of_their_own():
    model = on_gpu()
    inputs = [images(1 + i % 3, 32) + i for i in range(8)]
    torch.cuda.synchronize()

    def call(x):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.no_grad():
            outs = [model(x) for _ in range(10)]
        stream.synchronize()
        return outs

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(call, inputs))
    for x, outs in zip(inputs, answers, strict=True):
        for out in outs:
            assert_close(out, model, x)


@pytest.mark.fault(23)
def test_two_models_do_not_mix():
    first, second, x = on_gpu(), on_gpu(seed=5), images()
    for _ in range(4):
        for model in (first, second):
            assert_close(_without_grad(model, x), model, x)


@pytest.mark.fault(18)
def test_the_same_call_gives_the_same_bits():
    model, x = (
        adversarial_(fastres.resnet50()).to(CUDA, torch.float16),
        images(4, 64, torch.float16),
    )
    with torch.no_grad():
        outs = [model(x) for _ in range(100)]
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.fault(14)
def test_nan_stays_in_its_image():
    model, x = on_gpu(), images(3)
    x[1, 0, 5, 5] = float("nan")
    with torch.no_grad():
        for _ in range(3):
            out = model(x)
            assert out[1].isnan().all()
            assert out[[0, 2]].isfinite().all()
