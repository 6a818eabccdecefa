"""Rows 9, 15, 20, 22 to 24, 26 and 28 as far as a CPU can show them.

Memory that runs out, devices that do not match, outputs that are held, threads, forks, and a
machine without GPU and Triton.
"""

import copy
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event

import pytest
import torch
from fused import assert_close, assert_fused, executions, images, plain, small
from torch import nn

import fastres
from fastres.bench.run import parse_device
from fastres.errors import BackendError

ROOT = Path(__file__).parents[2]


def live():
    return small()


def copied():
    return fastres.optimize(small(), example_input=images())


@pytest.fixture(params=[live, copied], ids=["live", "optimized"])
def model(request):
    """A model whose engine has run."""
    net = request.param()
    with torch.no_grad():
        net(images())
    return net


@pytest.mark.fault(9)
def test_aligned_and_misaligned_calls_alternate(model):
    x = images(3)
    buffer = torch.empty(x.numel() + 1)
    shifted = buffer[1:].view(x.shape).copy_(x)
    assert shifted.data_ptr() % 16 != x.data_ptr() % 16
    with torch.no_grad():
        outs = [model(t) for t in (x, shifted) * 3]
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert_close(outs[0], small(), x)


@pytest.mark.fault(15)
def test_overflow_of_float16_is_said_with_advice():
    source, x = small(), 2e4 * images()
    with pytest.warns(UserWarning, match=r"not all finite in torch.float16; try torch.bfloat16"):
        fast = fastres.optimize(source, dtype=torch.float16, example_input=x)
    with torch.no_grad():
        finite = fast(x).isfinite()
        assert torch.equal(finite, plain(small().half(), x.half()).isfinite())
    assert not finite.all()
    wide = fastres.optimize(source, dtype=torch.bfloat16, example_input=x)
    assert wide(x).isfinite().all()


@pytest.mark.fault(20)
def test_out_of_memory_is_torchs_error_and_the_model_stays_usable(model):
    x = images()
    with torch.no_grad():
        before = model(x)
        for _ in range(2):
            huge = torch.randn(1, 3, 16, 16).expand(10**12, -1, -1, -1)
            with pytest.raises(RuntimeError, match=r"[Mm]emory|storage"):
                model(huge)
            assert torch.equal(model(x), before)


@pytest.mark.fault(22)
def test_weights_on_two_devices_are_refused_or_run_as_pytorch_would():
    model, x = small(), images()
    model.layer2.to("meta")
    with pytest.raises(ValueError, match=r"model must be on one device; got cpu, meta"):
        fastres.optimize(model)
    with torch.no_grad(), pytest.raises(RuntimeError):
        model(x)
    assert_fused(small(), x)


@pytest.mark.fault(22)
def test_an_input_elsewhere_is_one_error_and_nothing_runs(model):
    """A device that the engine knows is named by its own check, in tests/gpu; others by torch."""
    with torch.no_grad(), executions() as ran, pytest.raises(RuntimeError, match="cpu.* meta"):
        model(images().to("meta"))
    assert not ran
    with torch.no_grad():
        model(images())


class Blocking(nn.Module):
    """Its forward waits half-way, while whoever records it holds torch.fx's hooks.

    Its class holds the events: a forward that changes what the module holds is not recorded."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)
        Blocking.reached, Blocking.go_on = Event(), Event()

    def forward(self, x):
        x = self.first(x)
        self.reached.set()
        self.go_on.wait(60)
        return self.last(x)


MEANWHILE = {
    "a plain module": lambda x: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())(x),
    "a first call": lambda x: small(seed=3)(x),
    "another recording": lambda x: fastres.optimize(small(seed=3), verify=False)(x),
}


@pytest.mark.fault(23)
@pytest.mark.parametrize("work", MEANWHILE.values(), ids=MEANWHILE.keys())
def test_recording_in_one_thread_leaves_the_others_alone(work):
    """torch.fx replaces nn.Module.__call__ for the whole process while it records."""
    call, look_up = nn.Module.__call__, nn.Module.__getattr__
    x, blocking = images(), Blocking().eval()
    with ThreadPoolExecutor(2) as pool:
        recording = pool.submit(fastres.optimize, blocking, verify=False)
        assert blocking.reached.wait(60)
        assert nn.Module.__call__ is not call, "torch.fx has changed its ways"
        if work is MEANWHILE["a plain module"]:
            out = work(x)
        else:
            second = pool.submit(torch.no_grad()(work), x)
            wait([second], timeout=0.2)
            blocking.go_on.set()
            out = second.result(60)
            assert_close(out, small(seed=3), x)
        blocking.go_on.set()
        fast = recording.result(60)
    assert type(out) is torch.Tensor
    assert len(fast.plan().fused) == 2
    torch.testing.assert_close(fast(x), blocking(x))  # float32's own tolerance
    assert (nn.Module.__call__, nn.Module.__getattr__) == (call, look_up)


@pytest.mark.fault(23)
def test_threads_share_a_copy_and_two_models_run_side_by_side():
    nets = [copied(), live(), fastres.optimize(small(seed=5), verify=False)]
    inputs = [images(1 + i % 3, 12 + i) for i in range(6)]
    jobs = [(net, x) for x in inputs for net in nets]

    def call(job):
        net, x = job
        with torch.inference_mode():
            return [net(x) for _ in range(3)]

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(call, jobs))
    for (net, x), outs in zip(jobs, answers, strict=True):
        assert_close(outs[0], small(seed=5 if net is nets[2] else 0), x)
        assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.fault(23)
def test_an_input_that_is_overwritten_right_after_the_call(model):
    x = images()
    with torch.no_grad():
        expected = model(x)
        out = model(x)
        x.fill_(float("nan"))
    assert torch.equal(out, expected)


@pytest.mark.fault(24)
def test_outputs_held_across_calls_stay_what_they_were(model):
    inputs = [images(n) for n in (2, 2, 1, 2)]
    with torch.no_grad():
        held = [model(x) for x in inputs]
        kept = [out.clone() for out in held]
        for x in inputs[::-1]:
            model(-x)
        assert all(torch.equal(a, b) for a, b in zip(held, kept, strict=True))
        assert len({out.data_ptr() for out in held}) == len(held)
        held[0].fill_(7.0)  # an output is the caller's to write to
        assert torch.equal(model(inputs[0]), kept[0])


@pytest.mark.fault(24)
def test_another_shape_or_stride_never_meets_a_plan_made_for_the_first(model):
    """What would broadcast must not: one image for three, one row for sixteen."""
    full = images(3)
    source = small()
    with torch.no_grad():
        model(full)
        for x in (full[:1], full[:, :, :1], full[:, :, :, :1], full.transpose(2, 3), full):
            assert_close(model(x), source, x)


@pytest.mark.fault(26)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_answers_too(model):
    x = images()
    with torch.no_grad():
        expected = model(x)
        pid = os.fork()
        if pid == 0:
            same = False
            try:
                same = torch.equal(model(x), expected)
            finally:
                os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert torch.equal(model(x), expected)


@pytest.mark.fault(26)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_answer_alike_and_go_their_own_way(model, how):
    x = images()
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(twin(x), expected)
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.mul_(0.5) if tensor.is_floating_point() else None
        assert torch.equal(model(x), expected)


@pytest.mark.slow
@pytest.mark.fault(28)
def test_without_gpu_and_triton():
    """In a process of its own, where importing triton fails: all runs on the CPU."""
    code = """
import os, sys
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.modules["triton"] = None
import torch, fastres
assert not torch.cuda.is_available()
x = torch.randn(2, 3, 32, 32)
model = fastres.resnet18(num_classes=7).eval()
with torch.inference_mode():
    out = model(x)
assert out.shape == (2, 7) and "oneDNN" in str(model.plan())
fast = fastres.optimize(model, example_input=x)
assert fast.verification.ok and fast(x).shape == (2, 7)
for make in (
    lambda: fastres.optimize(model, backend="triton")(x),
    lambda: fastres.resnet18(backend="triton").eval()(x),
):
    try:
        with torch.no_grad():
            make()
    except fastres.FastresError as error:
        print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("BackendError backend='triton' needs") for line in lines)


@pytest.mark.fault(28)
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_asked_for_without_a_gpu(capsys):
    from fastres import cli

    assert cli.run(["plan", "resnet18", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: device cuda is not here")
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match="device cuda is not here"):
        parse_device("cuda")
    assert issubclass(BackendError, RuntimeError)


@pytest.mark.fault(34)
def test_a_module_under_two_names_is_folded_with_each_of_its_norms():
    """One convolution object, two norms of its own: the fold must not mix them up."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 3, 3, padding=1)
            self.b = self.a
            self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

        def forward(self, x):
            return self.norms[1](self.b(self.norms[0](self.a(x)).relu()))

    from helpers import adversarial_

    net, x = adversarial_(Shared()).double(), images().double()
    fast = fastres.optimize(net, verify=False)
    assert sum(step.op.norm is not None for step in fast.plan().fused) == 2
    torch.testing.assert_close(fast(x), net(x))  # float64's own tolerance, 1e-7
