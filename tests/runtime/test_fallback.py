"""A kernel that cannot run: under auto one warning and PyTorch's answer, else the error."""

import copy
import os
import pwd
import subprocess
import warnings
from dataclasses import replace

import pytest
import torch
from fused import assert_close, images, rms, small
from helpers import adversarial_, real_images
from tolerance import allowed_error

pytest.importorskip("triton")

from launches import auto_with_kernels, failing

import fastres
from fastres.backends import kernel_choice, select, triton
from fastres.graph import fold, plan, trace
from fastres.kernels import KernelError, _common, conv2d
from fastres.models.resnet import BasicBlock, ResNet
from fastres.runtime import cuda_graph
from fastres.runtime.executor import Executor

pytestmark = pytest.mark.interpreter
CAUSES = {  # what Triton 3.6 raises, and what the user is told to do about it
    "no compiler": (RuntimeError("Failed to find C compiler. Please specify via CC"), "gcc"),
    "no headers": (subprocess.CalledProcessError(1, ["gcc"]), "python3-dev"),
    "no ldconfig": (FileNotFoundError("No such file: '/sbin/ldconfig'"), "TRITON_LIBCUDA_PATH"),
    "no libcuda": (AssertionError("libcuda.so cannot found!"), "TRITON_LIBCUDA_PATH"),
    "no cache": (PermissionError("Permission denied: '/.triton'"), "TRITON_CACHE_DIR"),
    "disk full": (OSError(28, "No space left on device"), "TRITON_CACHE_DIR"),
    "no ptxas": (RuntimeError("Cannot find ptxas"), "TRITON_PTXAS_PATH"),
    "shared memory": (ValueError("out of resource: shared memory"), ""),
    "a new GPU": (RuntimeError("`ptxas` failed with error code 255"), "TRITON_PTXAS_PATH"),
    "refused": (NotImplementedError("input_precision must be one of ('ieee',)"), ""),
    "an old driver": (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), ""),
    "no driver": (RuntimeError("0 active drivers ([]). There should only be one."), ""),
    "a pass": (RuntimeError("PassManager::run failed"), ""),
    "no message": (TypeError(), "no message"),
}


@pytest.fixture(autouse=True)
def _kernels():
    with auto_with_kernels():
        yield


def network():
    return adversarial_(ResNet(BasicBlock, [1, 1], num_classes=8, planes=8, stem="cifar"))


def executor(model, *, auto):
    built = plan.build(fold.fold(trace.trace(model, "_forward_impl")))
    ops = select._triton_or_cudnn() if auto else select.triton_ops()
    return Executor(built, model, ops, torch.float32)


@torch.no_grad()
def assert_right(made, model, x):
    exact = copy.deepcopy(model).double()(x.double())
    error = rms(model(x) - exact)
    assert rms(made.run([x]) - exact) <= allowed_error(error, rms(exact), torch.float32)


@pytest.mark.fault(88)
@pytest.mark.parametrize("cause", CAUSES)
def test_any_cause_is_one_warning_and_the_right_answer(cause):
    error, remedy = CAUSES[cause]
    model, x = network(), real_images(2, 8)
    made = executor(model, auto=True)
    with failing(error), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        assert_right(made, model, x)
        assert_right(made, model, real_images(3, 8))
        assert_right(executor(model, auto=True), model, x)  # another model fails and says nothing
    told = [w for w in told if w.category is UserWarning]
    assert len(told) == 1
    assert "goes on without its Triton kernels on cpu" in str(told[0].message)
    assert remedy in str(told[0].message)
    assert not any("triton" in name for name in made.plan.kernels)


class Branching(torch.nn.Module):
    """Only its trunk can be traced."""

    def __init__(self):
        super().__init__()
        conv = torch.nn.Conv2d(3, 8, 3)
        self.trunk = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(8), torch.nn.ReLU())

    def forward(self, x, twice=False):
        y = self.trunk(x).mean((2, 3))
        return 2 * y if twice else y


def compiled(model):
    return torch.compile(model, backend="aot_eager")


def optimized(source, backend):
    return fastres.optimize(source, backend=backend)


def by_backend(source, backend):
    return torch.compile(source, backend="fastres", options={"backend": backend})


DOORS = {  # a source, and what answers instead of it
    "live": (small, lambda source, backend: source),
    "optimize": (small, optimized),
    "shell": (Branching, optimized),
    "compiled optimize": (small, lambda *given: compiled(optimized(*given))),
    "compiled shell": (Branching, lambda *given: compiled(optimized(*given))),
    "compile backend": (small, by_backend),
}


def front_door(name, backend):
    torch._dynamo.reset()
    make, door = DOORS[name]
    source = adversarial_(make(backend=backend) if make is small else make())
    return source, door(source, backend)


@pytest.mark.fault(88)
@pytest.mark.sample(5)
@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("door", DOORS)
def test_every_front_door_goes_on_with_one_warning(door, cause):
    error, _ = CAUSES[cause]
    source, answer = front_door(door, "auto")
    with failing(error), warnings.catch_warnings(record=True) as told, torch.no_grad():
        warnings.simplefilter("always", UserWarning)
        for x in (images(2, 8), images(2, 8), images(3, 12)):
            assert_close(answer(x), source, x)
    told = [str(w.message) for w in told if "fastres" in str(w.message)]
    assert len(told) == 1
    assert "goes on without its Triton kernels on cpu" in told[0]


@pytest.mark.fault(88)
@pytest.mark.parametrize("door", ["live", "optimize", "shell", "compile backend"])
def test_every_front_door_raises_where_triton_was_asked_for(door):
    _, answer = front_door(door, "triton")
    with (
        failing(RuntimeError("Cannot find ptxas")),
        torch.no_grad(),
        pytest.raises(KernelError, match="cannot run: RuntimeError: Cannot find ptxas"),
    ):
        answer(images(2, 8))
    assert not triton.FAILED


@pytest.mark.fault(88)
@pytest.mark.parametrize("door", ["compiled optimize", "compiled shell"])
def test_a_compiled_program_runs_our_kernels_as_long_as_they_can(door):
    source, answer = front_door(door, "auto")
    launched = _common.LAUNCHES["conv2d_kernel"]
    with torch.no_grad():
        assert_close(answer(images(2, 8)), source, images(2, 8))
    assert _common.LAUNCHES["conv2d_kernel"] > launched


@pytest.mark.fault(88)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_pytorch_stands_in_for_the_operators_of_auto_alone(backend):
    torch._dynamo.reset()
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    fast = fastres.optimize(small(), backend=backend, verify=False)
    torch.compile(fast, backend=keep)(images(2, 8))
    names = {str(n.target) for graph in graphs for n in graph.graph.nodes}
    ours = {name.partition(".")[2] for name in names if name.startswith("fastres.")}
    suffix = "_or_plain" if backend == "auto" else ""
    assert ours == {f"{name}{suffix}" for name in ("conv2d", "global_avg_pool", "linear")}


@pytest.mark.fault(88)
def test_no_tile_that_fits_is_a_failure_of_the_kernel():
    model, x = network(), real_images(2, 8)
    made, before = executor(model, auto=True), _common.host(torch.device("cpu"))
    with (
        _common.hosted(replace(before, gpu=replace(before.gpu, shared_limit=1024))),
        pytest.warns(UserWarning, match="goes on without .* no tile fits 1024 bytes"),
    ):
        assert_right(made, model, x)


@pytest.mark.fault(88)
def test_a_compiled_program_tries_no_kernel_after_one_that_failed():
    _, answer = front_door("compiled optimize", "auto")
    launched = _common.LAUNCHES.total()
    with failing(RuntimeError("Cannot find ptxas")), torch.no_grad():
        with pytest.warns(UserWarning, match="goes on without"):
            answer(images(2, 8))
        answer(images(2, 8))
    assert _common.LAUNCHES.total() == launched + 1


@pytest.mark.fault(88)
def test_a_compiled_live_model_is_pytorchs_own():
    source = small()
    launched = _common.LAUNCHES.total()
    with failing(RuntimeError("Cannot find ptxas")), torch.no_grad():
        assert_close(compiled(source)(images(2, 8)), source, images(2, 8))
    assert _common.LAUNCHES.total() == launched


@pytest.mark.fault(88)
@pytest.mark.parametrize("at", range(1, 7))
def test_wherever_a_run_breaks_off_it_is_repeated_from_its_inputs(at):
    model, x = network(), real_images(2, 8)
    made, given = executor(model, auto=True), x.clone()
    error = RuntimeError("Triton Error [CUDA]: invalid device function")
    with failing(error, at), pytest.warns(UserWarning, match="goes on without"):
        assert_right(made, model, x)
    assert torch.equal(x, given)


@pytest.mark.fault(88)
def test_new_weights_reach_what_goes_on():
    model, x = network(), real_images(2, 8)
    made = executor(model, auto=True)
    with (
        failing(RuntimeError("Cannot find ptxas")),
        pytest.warns(UserWarning, match="goes on without"),
    ):
        made.run([x])
    adversarial_(model, seed=3)
    made.refold()
    assert_right(made, model, x)


@pytest.mark.fault(88)
def test_triton_that_was_asked_for_raises():
    made = executor(network(), auto=False)
    with failing(RuntimeError("Failed to find C compiler")), pytest.raises(KernelError) as caught:
        made.run([real_images(1, 8)])
    assert "_kernel cannot run: RuntimeError: Failed to find C compiler" in str(caught.value)
    assert not triton.FAILED


@pytest.mark.fault(88)
def test_memory_that_runs_out_is_torchs_error():
    made = executor(network(), auto=True)
    with failing(torch.OutOfMemoryError("full")), pytest.raises(torch.OutOfMemoryError):
        made.run([real_images(1, 8)])
    assert made.ops.name == "triton"


@pytest.mark.fault(88)
def test_wrong_arguments_are_no_failure_of_a_kernel():
    made = executor(network(), auto=True)
    with pytest.raises(ValueError, match="channels"):
        made.run([torch.ones(1, 5, 8, 8)])
    assert made.ops.name == "triton"


CUDA = torch.device("cuda", 0)


@pytest.mark.fault(88)
@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("sm_75", "cudnn"),
        ("sm_80", "triton"),
        ("sm_86", "triton"),
        ("sm_90", "triton"),
        ("sm_120", "triton"),
        ("sm_130", "cudnn"),
        ("gfx942", "triton"),
        ("gfx1100", "cudnn"),
    ],
)
def test_auto_takes_triton_where_a_table_knows_the_gpu(monkeypatch, architecture, name):
    monkeypatch.setattr(select, "architecture_of", lambda device: architecture)
    assert select.select_ops("auto", CUDA, torch.float16).name == name
    assert select.select_ops("triton", CUDA, torch.float16).name == "triton"
    triton.FAILED[CUDA] = "a kernel failed"
    assert select.select_ops("auto", CUDA, torch.float16).name == "cudnn"


@pytest.mark.fault(88)
@pytest.mark.parametrize("error", [AttributeError("no jit"), OSError("libtriton"), ImportError()])
def test_a_broken_triton_is_one_warning_under_auto(monkeypatch, error):
    def broken(**_):
        raise error

    select._warn_of_triton.cache_clear()
    monkeypatch.setattr(select, "architecture_of", lambda device: "sm_90")
    monkeypatch.setattr(select, "triton_ops", broken)
    with pytest.warns(UserWarning, match="triton cannot be imported") as told:
        names = [select.select_ops("auto", CUDA, torch.float16).name for _ in range(2)]
    assert (names, len(told)) == (["cudnn", "cudnn"], 1)
    with pytest.raises(type(error)):
        select.select_ops("triton", CUDA, torch.float16)


@pytest.mark.fault(88)
def test_an_unknown_user_without_a_home_has_no_measurements(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "FASTRES_TUNED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    assert os.path.expanduser("~") == "~"
    assert kernel_choice.load(kernel_choice.cache_path(), lambda: "a GPU") == {}


@pytest.mark.fault(88)
@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32")],
)
def test_tf32_is_a_matter_of_float32(integers, dtype, wanted):
    given, before = [], _common.host(torch.device("cpu"))

    def run(kernel, grid, args, meta):
        given.append(meta["PRECISION"])
        before.run(kernel, grid, args, meta)

    with _common.hosted(replace(before, run=run)):
        conv2d(
            integers(1, 8, 4, 4, dtype=dtype), integers(8, 8, 1, 1, dtype=dtype), precision="tf32"
        )
    assert given == [wanted]


@pytest.mark.fault(88)
def test_a_default_device_is_not_where_random_numbers_come_from():
    given = []
    with torch.device("meta"):
        cuda_graph.warm_up(given.append, [(2, 3, 4, 4)], torch.device("cpu"), torch.float32)
    assert all(x.isfinite().all() for x in given)
    assert given
