"""``torch.compile(model, backend="fastres")``: right, fused, never stale, out of the way else."""

import copy
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fused import plain
from helpers import adversarial_, real_images
from torch import nn
from tutorials import MnistResNet18

from fastres import BasicBlock, Bottleneck, ResNet
from fastres.frontends.dynamo import fastres as backend

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture
def model():
    return adversarial_(MnistResNet18().net[:3]).double()


@pytest.fixture
def images():
    return real_images(3, 32, 1).double()


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="fastres")
    return lambda: [record.getMessage() for record in caplog.records]


def assert_same(compiled, model, images):
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_whole_models_are_fused(images, log, dynamic):
    model = adversarial_(ResNet(Bottleneck, [1, 1], num_classes=5)).double()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    images = real_images(3, 64).double()
    assert_same(compiled, model, images)
    assert_same(compiled, model, images[:2])
    assert_same(compiled, model, images.contiguous(memory_format=torch.channels_last))
    assert set(log()) == {"graph of 13 steps, 0 left to PyTorch"}


CHANGES = {
    "in place": lambda m: m[1][0].conv1.weight.mul_(2),
    "statistics": lambda m: m[0][1].running_mean.add_(1),
    "data": lambda m: setattr(m[0][1].weight, "data", m[0][1].weight * -2),
    "another parameter": lambda m: setattr(
        m[2][0], "shortcut", nn.Conv2d(64, 128, 1, 2, bias=False).double()
    ),
    "load_state_dict": lambda m: m.load_state_dict(
        adversarial_(MnistResNet18().net[:3], seed=1).state_dict()
    ),
    "eps": lambda m: setattr(m[0][1], "eps", 0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_are_folded_again(model, images, change):
    compiled = torch.compile(model, backend=backend)
    assert_same(compiled, model, images)
    with torch.no_grad():
        before = model(images)
        change(model)
        assert float((model(images) - before).abs().max()) > 1e-3
    assert_same(compiled, model, images)


def test_training_steps_are_seen(model, images):
    """A fused optimizer leaves versions alone, and so do batch norms in training."""
    compiled = torch.compile(model, backend=backend)
    assert_same(compiled, model, images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    model.train()
    compiled(images).square().mean().backward()
    optimizer.step()
    model.eval()
    assert_same(compiled, model, images)
    model.train()
    with torch.no_grad():
        compiled(images * 3 + 1)
    model.eval()
    assert_same(compiled, model, images)


def test_gradients_and_training_are_pytorchs(model, images, log):
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    for m in (compiled, twin):
        m.train()
        m(images).square().mean().backward()
    assert log() == ["graph left to PyTorch: gradients are wanted"]
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_is_pytorchs(model, images, log):
    model, images = model.float(), images.float()
    compiled = torch.compile(model, backend=backend)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(compiled(images), model(images))
    assert log() == ["graph left to PyTorch: autocast is on"]
    assert_same(compiled, model, images)


def test_graphs_without_convolutions_are_pytorchs(log):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    assert_same(torch.compile(model, backend=backend), model, torch.rand(2, 4))
    assert log() == ["graph left to PyTorch: it has no convolution"]


def test_writing_into_the_callers_tensor_is_pytorchs(model, images, log):
    def function(x):
        x.mul_(2)
        return model(x)

    ours, theirs = images.clone(), images.clone()
    with torch.no_grad():
        found = torch.compile(function, backend=backend)(ours)
        torch.testing.assert_close(found, function(theirs))
    assert torch.equal(ours, theirs)
    assert "left to PyTorch" in log()[0]


def test_a_graph_break_makes_two_fused_graphs(model, images, log):
    def function(x):
        y = model[0](x)
        torch._dynamo.graph_break()
        return model[2](model[1](y)), {"y": y}

    with torch.no_grad():
        found = torch.compile(function, backend=backend)(images)
        torch.testing.assert_close(found, function(images))
    assert len(log()) == 2
    assert all("0 left" in line for line in log())


def test_weights_given_as_arguments_are_not_folded(images):
    """They may differ at each call; nothing says that they live longer than it."""

    @torch.compile(backend=backend)
    def function(x, w):
        return F.conv2d(x, w).relu()

    for seed in (0, 1):
        w = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(seed)).double()
        torch.testing.assert_close(function(images, w), F.conv2d(images, w).relu())


def test_nonsense_statistics_run_as_pytorch_with_a_warning(model, images):
    model[0][1].running_var[3] = -1.0
    compiled = torch.compile(model, backend=backend)
    with pytest.warns(UserWarning, match=r"\[3\] is -1"), torch.no_grad():
        found = compiled(images)
    with torch.no_grad():
        torch.testing.assert_close(found, model(images), equal_nan=True)


def test_a_wrong_answer_is_noticed_at_the_first_call(model, images, monkeypatch):
    """The whole of the fold could be wrong: here every bias is dropped."""
    from fastres.runtime import executor

    real = executor.fold_step

    def biasless(*args):
        weight, bias = real(*args)
        return weight, None if bias is None else bias * 0

    monkeypatch.setattr(executor, "fold_step", biasless)
    compiled = torch.compile(model, backend=backend)
    with pytest.warns(UserWarning, match="leaves this graph to PyTorch: error"):
        assert_same(compiled, model, images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(compiled, model, images * 2)


def test_options(model, images):
    options = {"backend": "torch"}
    assert_same(torch.compile(model, backend=backend, options=options), model, images)
    for wrong, message in (
        ({"backend": "cudnn"}, "one of 'auto', 'triton', 'torch'"),
        ({"x": 1}, "one key"),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=message), torch.no_grad():
            torch.compile(model, backend=backend, options=wrong)(images)


@pytest.mark.slow
def test_the_entry_point(tmp_path):
    """As an installed package declares it: the name alone finds the backend."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["entry-points"]["torch_dynamo_backends"]
    assert declared == {"fastres": "fastres.frontends.dynamo:fastres"}
    info = tmp_path / "fastres-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fastres\nVersion: 0\n")
    lines = [f"{name} = {target}" for name, target in declared.items()]
    (info / "entry_points.txt").write_text("\n".join(["[torch_dynamo_backends]", *lines, ""]))
    code = (
        "import logging, torch; from torch import nn; logging.basicConfig(level=logging.INFO)\n"
        "m = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()\n"
        "x = torch.rand(2, 3, 8, 8)\n"
        "with torch.no_grad():\n"
        "    y = torch.compile(m, backend='fastres')(x)\n"
        "    torch.testing.assert_close(y, m(x)); print(*y.shape)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["2", "4", "6", "6"], done.stderr
    assert "graph of 1 steps, 0 left to PyTorch" in done.stderr


def few_outputs(outputs, seed, dtype):
    torch.manual_seed(seed)
    model = ResNet(BasicBlock, [1, 1], num_classes=outputs, stem="cifar", planes=8).eval()
    return model.to(dtype), torch.randn(1, 3, 16, 16, dtype=dtype)


@pytest.fixture
def run_compiled():
    """Folds, checks and runs what Dynamo records of a small network, at any seed: it is recorded
    once, and another network's weights are copied into it."""
    recorded = []

    def run(outputs, seed, dtype):
        model, x = few_outputs(outputs, seed, dtype)
        with torch.no_grad():
            if not recorded:
                compiled = torch.compile(
                    model, backend=lambda *given: recorded.extend((*given, model)) or given[0]
                )
                compiled(x)
            graph, inputs, owner = recorded
            owner.load_state_dict(model.state_dict())
            inputs = [x if value.shape == x.shape else value for value in inputs]
            (found,), expected = backend(graph, inputs)(*inputs), plain(model, x)
        # Far above rounding, also of the little that one output is where terms cancel; the smallest
        # of the faults below moves each by more.
        atol = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 0.02}[dtype]
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)

    return run


@pytest.mark.fault(45)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("outputs", [1, 2, 1000])
def test_right_graphs_are_admitted_at_every_seed(outputs, dtype, run_compiled, recwarn):
    for seed in range(5 if dtype is torch.float32 else 2):
        run_compiled(outputs, seed, dtype)
    assert not [str(w.message) for w in recwarn if "leaves this graph" in str(w.message)]


FAULTS = {
    "a bias": lambda weight, bias: (weight, bias + 0.05),
    "a channel": lambda weight, bias: (weight.index_fill(0, torch.tensor([1]), 0), bias),
    "a scale": lambda weight, bias: (weight * 1.01, bias),
}


@pytest.mark.fault(45)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("outputs", [1, 1000])
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_graphs_are_left_to_pytorch(fault, outputs, dtype, run_compiled, monkeypatch):
    from fastres.runtime import executor

    real = executor.fold_step

    def damaged(op, *args):
        weight, bias = real(op, *args)
        return FAULTS[fault](weight, bias) if weight.shape[:2] == (8, 8) else (weight, bias)

    monkeypatch.setattr(executor, "fold_step", damaged)
    with pytest.warns(UserWarning, match="leaves this graph to PyTorch"):
        run_compiled(outputs, 0, dtype)


@pytest.mark.fault(45)
def test_a_graph_that_also_returns_indices(recwarn):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = few_outputs(1000, 0, torch.float32)[0]

        def forward(self, x):
            y = self.net(x)
            return y, y.argmax(1)

    model, x = Both().eval(), torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for ours, theirs in zip(compiled(x), model(x), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert not [w for w in recwarn if "leaves this graph" in str(w.message)]
