"""Graph to plan: what is fused, what may be overwritten, when values die, and how it reads."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from helpers import adversarial_
from torch import nn

import fastres
from fastres.backends.select import AtenOps
from fastres.graph import fold, plan, trace
from fastres.graph.ir import Add, BatchNorm2d, Conv2d, Flatten, Linear, ReLU, refs
from fastres.graph.plan import Plan
from fastres.runtime.executor import Executor


def build(model: nn.Module) -> Plan:
    method = "_forward_impl" if hasattr(model, "_forward_impl") else "forward"
    return plan.build(fold.fold(trace.trace(model.eval(), method)))


def ours(name, **kwargs):
    return partial(fastres.create_model, name, **kwargs)


def theirs(name):
    def make():
        models = pytest.importorskip("torchvision").models
        kwargs = {"init_weights": False} if name == "googlenet" else {}
        return getattr(models, name)(**kwargs)

    return make


# Convolutions and blocks are the paper's (table 1); one ReLU per block and one per inner layer.
@pytest.mark.parametrize(
    ("name", "convolutions", "blocks", "relus"),
    [
        ("resnet18", 20, 8, 1 + 2 * 8),
        ("resnet34", 36, 16, 1 + 2 * 16),
        ("resnet50", 53, 16, 1 + 3 * 16),
        ("resnet101", 104, 33, 1 + 3 * 33),
        ("resnext50_32x4d", 53, 16, 1 + 3 * 16),
    ],
)
def test_everything_is_fused(name, convolutions, blocks, relus):
    built = build(ours(name, num_classes=10)())
    convs = [step for step in built.steps if isinstance(step.op, Conv2d)]
    assert len(convs) == convolutions
    assert all(step.op.norm is not None for step in convs)
    assert sum(step.op.relu for step in convs) == relus
    residuals = [step for step in convs if step.op.residual]
    assert len(residuals) == blocks
    assert all(step.op.relu and step.in_place for step in residuals)
    assert len(built.steps) == convolutions + 4  # max pool, global pool, flatten, linear
    assert not built.fallbacks
    assert built.fused == built.steps


def test_the_residual_is_overwritten_at_its_last_use_only():
    """The sum's other operand is needed again behind the sum: it may not be overwritten."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            y = self.stem(x)
            z = self.body(y.relu()) + y
            return self.body(z) + y

    steps = build(Twice()).steps
    assert [getattr(step.op, "residual", None) for step in steps] == [False, None, True, True]
    assert [step.in_place for step in steps] == [False, False, False, True]
    stem, relu, first, _ = (step.name for step in steps)
    assert [set(step.frees) for step in steps] == [{"x"}, set(), {relu}, {stem, first}]


def test_a_convolution_takes_no_relu_beside_another_reader():
    """What it computes before the ReLU is needed as well."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            y = self.conv(x)
            return torch.relu(y), y

    conv, relu = build(Both()).steps
    assert isinstance(relu.op, ReLU)
    assert not conv.op.relu


class Kept(nn.Module):
    """Sums whose operands must survive: the caller's image, an output, a view."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        y = self.conv(x) + x
        z = self.conv(y) + y
        flat = torch.flatten(z, 1)
        return y, self.conv(z) + z, flat


def test_what_others_hold_is_never_overwritten():
    assert not any(step.in_place for step in build(Kept()).steps)


def test_which_convolution_takes_the_residual():
    """The one with the larger window; behind a downsample the block's own, else the later one."""
    for block, wanted in (("resnet18", "conv2"), ("resnet50", "downsample.0")):
        residuals = [
            step.where
            for step in build(ours(block)()).steps
            if getattr(step.op, "residual", False) and step.where.startswith("layer2.0")
        ]
        assert residuals == [f"layer2.0.{wanted}"]


def test_sums_without_a_convolution_and_lonely_steps():
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            a = torch.relu(self.norm(y) + y.sigmoid())
            return torch.relu(a.mean([2, 3])) + torch.relu(y.mean([2, 3]) + y.mean([2, 3]))

    built = build(Loose())
    kinds = [type(step.op) for step in built.steps]
    assert kinds.count(Add) == 3
    assert [step.op.relu for step in built.steps if isinstance(step.op, Add)] == [True, True, False]
    assert kinds.count(ReLU) == 1
    assert kinds.count(BatchNorm2d) == 1


def test_linear_takes_a_relu():
    built = build(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    assert [step.op.relu for step in built.steps if isinstance(step.op, Linear)] == [True, False]


MODELS = {
    "resnet18": ours("resnet18"),
    "resnet50": ours("resnet50"),
    "resnet20": ours("resnet20"),
    "dilated": ours("resnet50", replace_stride_with_dilation=[False, True, True]),
    "densenet121": theirs("densenet121"),
    "googlenet": theirs("googlenet"),
    "mobilenet_v2": theirs("mobilenet_v2"),
    "mobilenet_v3_small": theirs("mobilenet_v3_small"),
    "regnet_y_400mf": theirs("regnet_y_400mf"),
    "shufflenet_v2_x0_5": theirs("shufflenet_v2_x0_5"),
    "squeezenet1_1": theirs("squeezenet1_1"),
    "Kept": Kept,
}


@pytest.mark.parametrize("name", MODELS)
def test_values_live_exactly_as_long_as_they_are_read(name):
    built = build(MODELS[name]())
    alive = {parameter.name for parameter in built.parameters}
    freed: set[str] = set()
    for step in built.steps:
        assert set(step.inputs) <= alive, "reads a value that is gone"
        assert step.name not in alive | freed
        alive.add(step.name)
        if step.in_place:
            overwritten = step.inputs[-1] if isinstance(step.op, Conv2d) else step.inputs[0]
            assert overwritten in step.frees, "overwrites a value that is read later"
            assert overwritten not in {parameter.name for parameter in built.parameters}
        assert set(step.frees) <= alive
        alive -= set(step.frees)
        freed |= set(step.frees)
    assert alive == set(refs(built.output))


def test_one_plan_serves_every_size():
    model = adversarial_(fastres.resnet18(num_classes=3)).double()
    executor = Executor(build(model), model, AtenOps(), torch.float64)
    for shape in ((1, 3, 32, 32), (3, 3, 33, 47), (2, 3, 7, 64)):
        x = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            out, expected = executor.run([x]), model._forward_impl(x)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)  # float64, 20 layers


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "squeezenet1_1", "googlenet"])
@pytest.mark.parametrize("size", [(2, 3, 64, 64), (1, 3, 97, 71)])
def test_shapes_are_foretold(name, size):
    """Ceiled pools and odd sizes included; None only behind a step left to PyTorch."""
    model = MODELS[name]()
    built = build(model)
    executor = Executor(built, model, AtenOps(), torch.float32)
    foretold = built.shapes(size)
    seen = {}
    with torch.no_grad():
        executor.run([torch.randn(size)], lambda step, _, result: seen.update({step.name: result}))
    known = [name for name in seen if foretold[name] is not None]
    assert len(known) > 3
    assert all(foretold[name] == tuple(seen[name].shape) for name in known)
    if not built.fallbacks:
        assert len(known) == len(built.steps)


def test_peak_is_unknown_behind_unknown_steps():
    built = build(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid()))
    assert built.peak_activation_bytes((1, 3, 8, 8), 4) is None


def test_a_plan_cannot_be_changed():
    built = build(ours("resnet20")())
    for target in (built, built.steps[0], built.steps[0].op):
        field = dataclasses.fields(target)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(target, field, None)
    assert isinstance(built.steps, tuple)
    assert build(ours("resnet20")()) == built


def test_the_table_can_be_read():
    model = adversarial_(fastres.resnet18())
    text = str(model.plan())
    lines = text.splitlines()
    assert lines[0].split() == ["step", "what", "kernel", "in", "place", "source"]
    assert "conv 7x7/2 3->64 + bias + ReLU" in text
    assert "conv 3x3 64->64 + bias + residual + ReLU" in text
    assert "conv 1x1/2 64->128 + bias" in text
    assert "max pool" in text
    assert "linear 512->1000" in text
    assert "layer4.1.conv2" in text
    assert lines[-1] == "24 steps, 0 left to PyTorch"
    assert max(map(len, lines)) <= 110
    assert all(line == line.rstrip() for line in lines)


def test_the_table_lists_what_is_left_with_the_reason():
    source = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardswish(), nn.BatchNorm2d(4))
    text = str(build(source))
    count, *left, last = text.splitlines()[-4:]
    assert count == "3 steps, 2 left to PyTorch:"
    assert left[0].strip() == "1: Hardswish is not fused"
    assert "2: batch norm that does not directly follow a convolution" in left[1]
    assert last == "nothing is fused: each step is one layer"


def test_plain_data_for_json():
    built = build(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Sigmoid(), nn.Flatten()))
    data = json.loads(json.dumps(built.to_dict()))
    assert [row["what"] for row in data["steps"]][0] == "conv 3x3/2 3->4 + bias"
    assert data["steps"][0]["stride"] == [2, 2]
    assert data["fused"] == 2
    assert data["left_to_pytorch"] == [{"step": "1", "reason": "Sigmoid is not fused"}]
    assert isinstance(built.steps[-1].op, Flatten)
