"""Which copies the check admits: right ones of any number of outputs, and no wrong one; it runs a
copy of the source, whose answers must repeat."""

import os
import random
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fused import images, small
from helpers import adversarial_
from torch import nn

import fastres
from fastres.errors import VerificationError
from fastres.frontends.dynamo import fastres as compile_backend
from fastres.frontends.optimize import check_against
from fastres.graph.fold import fold_step
from fastres.graph.ir import Conv2d, attribute
from fastres.models.weights import ImageNetWeights

ROOT = Path(__file__).parents[2]
HALVES = [torch.float16, torch.bfloat16]


def initial(outputs, seed):
    """With PyTorch's first weights, as a user's network has them before training."""
    torch.manual_seed(seed)
    return fastres.resnet18(num_classes=outputs).eval(), torch.randn(1, 3, 64, 64)


@pytest.mark.slow
@pytest.mark.fault(45)
@pytest.mark.sample(2)
@pytest.mark.parametrize("seed", [4, 10, 24])
def test_a_right_copy_whose_reference_happens_to_be_exact_is_admitted(seed):
    """Seeds where PyTorch's single output was close to float64's by chance."""
    model, x = initial(1, seed)
    found = fastres.optimize(model, example_input=x).verification
    assert found.ok
    assert found.rms <= 1e-4 * found.scale


@pytest.mark.sample(3)
@pytest.mark.fault(45)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("outputs", "dtype", "seeds"),
    [
        *((outputs, torch.float32, 60) for outputs in (1, 2, 1000)),
        *((outputs, dtype, 12) for outputs in (1, 2, 1000) for dtype in (*HALVES, torch.float64)),
    ],
)
def test_right_copies_are_admitted_at_every_seed(outputs, dtype, seeds):
    for seed in range(seeds):
        torch.manual_seed(seed)
        arguments = {"num_classes": outputs, "stem": "cifar", "planes": 16}
        model = fastres.ResNet(fastres.BasicBlock, [1, 1], **arguments).eval()
        if seed % 2:
            adversarial_(model, seed)
        model = model.double() if dtype is torch.float64 else model
        x = torch.randn(1 + seed % 3, 3, 16, 16, dtype=model.fc.weight.dtype)
        assert fastres.optimize(model, example_input=x, dtype=dtype).verification.ok


CONV = "layer2.0.conv1"
NORM = "layer2.0.bn1"


def step_of(fast, path):
    return next(i for i, step in enumerate(fast.traced.steps) if step.where == path)


def with_step(fast, path, **changes):
    """The copy with another plan, as a fault in the recognition of modules would leave it."""
    steps = list(fast.traced.steps)
    index = step_of(fast, path)
    steps[index] = replace(steps[index], **changes)
    vars(fast)["traced"] = replace(fast.traced, steps=tuple(steps))  # setattr refuses


def alive(model):
    """A channel of the step that is positive somewhere, so that ReLU does not hide it."""
    seen = []
    hook = model.get_submodule(NORM).register_forward_hook(lambda m, i, y: seen.append(y))
    model._forward_impl(images().to(model.fc.weight.dtype))
    hook.remove()
    return int(seen[0].mean((0, 2, 3)).argmax())


def a_bias(model, fast):
    fast.folded.get_parameter(f"bias{step_of(fast, CONV)}")[alive(model)] += 0.2


def an_element(model, fast):
    weight = fast.folded.get_parameter(f"weight{step_of(fast, CONV)}")
    channel = alive(model)
    largest = weight[channel].abs().amax()
    weight[channel] *= torch.where(weight[channel].abs() == largest, 2, 1)


def another_eps(model, fast):
    norm = model.get_submodule(NORM)
    index = step_of(fast, CONV)
    factor = ((norm.running_var + norm.eps) / (norm.running_var + 0.1)).sqrt()
    for name in (f"weight{index}", f"bias{index}"):
        values = fast.folded.get_parameter(name)
        values *= factor.reshape(-1, *[1] * (values.dim() - 1)).to(values.dtype)


def no_mean(model, fast):
    norm = model.get_submodule(NORM)
    shift = norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()
    fast.folded.get_parameter(f"bias{step_of(fast, CONV)}").add_(shift.detach())


def a_dead_channel(model, fast):
    fast.folded.get_parameter(f"weight{step_of(fast, CONV)}")[alive(model)] = 0


def no_relu(model, fast):
    op = fast.traced.steps[step_of(fast, CONV)].op
    with_step(fast, CONV, op=replace(op, relu=False))


def no_residual(model, fast):
    steps = fast.traced.steps
    step = next(s for s in steps if isinstance(s.op, Conv2d) and len(s.inputs) == 2)
    with_step(fast, step.where, inputs=step.inputs[:1], op=replace(step.op, residual=False))


def an_eps_misread(model, fast):
    """Read wrong from the source, so that each step seems right."""
    index = step_of(fast, CONV)
    op = fast.traced.steps[index].op
    op = replace(op, norm=replace(op.norm, eps=0.1))
    weight, bias = fold_step(op, lambda path: attribute(model, path), fast.dtype)
    fast.folded.get_parameter(f"weight{index}").copy_(weight)
    fast.folded.get_parameter(f"bias{index}").copy_(bias)
    with_step(fast, CONV, op=op)


def no_classifier_bias(model, fast):
    fast.folded.get_parameter(f"bias{step_of(fast, 'fc')}").zero_()


FAULTS = [
    *(a_bias, an_element, another_eps, no_mean, a_dead_channel, no_relu, no_residual),
    *(an_eps_misread, no_classifier_bias),
]


def _pairwise():
    """Each fault at each dtype and each number of outputs, and each number at each dtype."""
    dtypes = (torch.float32, torch.float64, *HALVES)
    for i, fault in enumerate(FAULTS):
        for j, dtype in enumerate(dtypes):
            outputs = (1, 2, 1000)[(i + j) % 3]
            yield pytest.param(fault, outputs, dtype, id=f"{fault.__name__}-{outputs}-{dtype}")


@pytest.mark.fault(45)
@torch.no_grad()
@pytest.mark.parametrize(("fault", "outputs", "dtype"), _pairwise())
def test_faults_stay_refused(fault, outputs, dtype):
    source = torch.float64 if dtype is torch.float64 else torch.float32
    for seed in range(2):
        model = small(seed=seed, num_classes=outputs).to(source)
        x = images(1 + seed % 2).to(source)
        fast = fastres.optimize(model, verify=False, dtype=dtype)
        assert check_against(model, fast, [x]).ok
        fault(model, fast)
        fast._settle()
        with pytest.raises(VerificationError, match="differ|wrong"):
            check_against(model, fast, [x])


def source_of(forward):
    class Source(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.block = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            self.calls, self.seen = 0, []
            self.register_buffer("count", torch.zeros(()))
            self.extra = None

        def forward(self, x):
            return forward(self, self.block(self.conv(x)))

    return adversarial_(Source())


RANDOM = {
    "randn": lambda m, y: y + torch.randn(8, 1, 1),
    "rand of the batch": lambda m, y: y + torch.rand(y.shape[0], 1, 1, 1),
    "bernoulli": lambda m, y: y * torch.bernoulli(torch.full((8, 1, 1), 0.5)),
    "randperm": lambda m, y: y[:, torch.randperm(8)],
    "rand_like": lambda m, y: y + torch.rand_like(y),
    "little noise": lambda m, y: y + 1e-3 * torch.randn_like(y),
    "normal_": lambda m, y: y + y.new_empty(8, 1, 1).normal_(),
    "dropout": lambda m, y: F.dropout(y, 0.5, training=True),
    "dropout2d": lambda m, y: F.dropout2d(y, 0.5),
    "numpy": lambda m, y: y + torch.from_numpy(np.random.randn(8, 1, 1)).float(),
    "Python": lambda m, y: y * random.random(),
}


@pytest.mark.fault(51)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("verify_with", [images(), None], ids=["example", "first call"])
@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_are_drawn_anew_or_refused(name, verify_with):
    source, x = source_of(RANDOM[name]), images()
    try:
        fast = fastres.optimize(source, example_input=verify_with)
        first, second = fast(x), fast(x)
    except VerificationError as error:
        assert "draws random numbers" in str(error)  # noqa: PT017
    else:
        assert not torch.equal(first, second)


@pytest.mark.fault(51)
@pytest.mark.parametrize("name", ["randn", "bernoulli", "randperm"])
def test_a_draw_of_fixed_shape_is_frozen_in_no_copy(name):
    """Not even in one that nobody checks."""
    source = nn.Sequential(source_of(RANDOM[name])).eval()
    fast = fastres.optimize(source, verify=False)
    x = images()
    answers = [fast(x) for _ in range(8)]
    assert not all(torch.equal(answers[0], answer) for answer in answers)


@pytest.mark.fault(51)
def test_dropout_that_is_off_is_not_random():
    source = source_of(lambda m, y: F.dropout(y, 0.5, training=m.training))
    assert fastres.optimize(source, example_input=images()).verification.ok


def counting(m, y):
    m.calls += 1
    m.seen.append(m.calls)
    m.count += 1
    m.extra = m.calls
    return y


def caching(m, y):
    if not m.seen:
        m.seen.append(torch.ones(8, 1, 1))
    return y + m.seen[0]


def state(source):
    tensors = {name: value.clone() for name, value in source.state_dict().items()}
    return tensors, source.calls, list(source.seen), source.extra


@pytest.mark.fault(53)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("forward", [counting, caching], ids=lambda f: f.__name__)
def test_a_source_with_a_state_is_left_as_it_was(forward, example, dtype):
    source, x = source_of(forward), images()
    before, drawn = state(source), (torch.get_rng_state(), random.getstate())
    fast = fastres.optimize(source, example_input=x if example else None, dtype=dtype)
    fast(x)
    assert fast.verification.ok
    after = state(source)
    assert after[1:] == before[1:]
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]


@pytest.mark.fault(53)
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, y: y * m.count.add_(1),
        lambda m, y: setattr(m, "calls", m.calls + 1) or y * m.calls,
    ],
)
def test_an_answer_that_depends_on_the_calls_before_is_not_frozen(forward):
    source, x = source_of(forward), images()
    try:
        fast = fastres.optimize(source, example_input=x)
        first, second = fast(x), fast(x)
    except VerificationError as error:
        assert "gives two answers to one input" in str(error)  # noqa: PT017
    else:
        assert not torch.equal(first, second)
    assert (source.calls, float(source.count)) == (0, 0.0)


@pytest.mark.fault(53)
def test_what_cannot_be_copied_is_refused_by_name():
    source = source_of(lambda m, y: y)
    source.block.stream = (i for i in range(3))
    with pytest.raises(VerificationError, match=r"attribute block.stream: .*verify=False"):
        fastres.optimize(source)
    assert fastres.optimize(source, verify=False)(images()).shape == (2, 8, 12, 12)


@pytest.mark.fault(53)
def test_a_lock_is_shared():
    source = source_of(lambda m, y: y)
    source.lock = threading.Lock()
    assert fastres.optimize(source, example_input=images()).verification.ok


@pytest.mark.fault(53)
def test_verify_itself_runs_a_copy():
    source = source_of(counting)
    assert fastres.verify(source, source_of(lambda m, y: y).requires_grad_(False), images()).ok
    assert source.calls == 0


@pytest.mark.fault(86)
@pytest.mark.parametrize("depth", [2, 40])
def test_a_float64_network_of_any_depth_is_admitted(depth):
    """Norms in front of ReLU keep the scale, and each layer's rounding is amplified by the next."""
    torch.manual_seed(depth)
    layers = []
    for _ in range(depth):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *layers).double()
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 12, 12).double())
    model.eval()
    x = images().double()
    fast = fastres.optimize(model, example_input=x)
    assert fast.verification.ok
    fast.folded.bias0[0] += 1e-11
    fast._settle()
    with pytest.raises(VerificationError):
        check_against(model, fast, [x])


@pytest.mark.sample(2)
@pytest.mark.fault(86)
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_float64_backbone_of_a_detector_is_admitted(seed):
    """Its many convolutions without norms round four times as much in channels_last, where both
    the copy and the float32 network that it is measured by run."""
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(seed)
    sizes = {"num_classes": 5, "min_size": 96, "max_size": 128}
    model = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, **sizes)
    model = model.backbone.double().eval()
    x = torch.randn(1, 3, 96, 128, dtype=torch.float64)
    fast = fastres.optimize(model, example_input=x)
    with torch.no_grad():
        for ours, theirs in zip(fast(x).values(), model(x).values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.fault(68)
@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize(("layers", "size", "outputs"), [([2, 2, 2, 2], 32, 1000), ([1, 1], 16, 1)])
def test_files_of_small_images_are_admitted(layers, size, outputs, suffix, tmp_path):
    """With first weights, whose rounding is far above twenty units where maps are single pixels."""
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    for seed in range(2):
        torch.manual_seed(seed)
        model = fastres.ResNet(fastres.BasicBlock, layers, num_classes=outputs, planes=16).eval()
        fast = fastres.optimize(model, verify=False)
        x = torch.randn(2, 3, size, size)
        found = fastres.export(fast, tmp_path / f"m{suffix}", x)
        assert found.max_abs is None or found.max_abs < 1e-4


@pytest.mark.fault(68)
@pytest.mark.parametrize("outputs", [1, 1000])
def test_a_file_that_is_a_little_wrong_is_refused(outputs, tmp_path, monkeypatch):
    model = small(num_classes=outputs)
    fast = fastres.optimize(model, verify=False)
    load = torch.export.load

    def damaged(file):
        program = load(file)
        bias = next(v for k, v in program.state_dict.items() if k.endswith("bias0"))
        bias.add_(1e-3)
        return program

    monkeypatch.setattr(torch.export, "load", damaged)
    with torch.no_grad(), pytest.raises(VerificationError, match="gives other answers"):
        fastres.export(fast, tmp_path / "m.pt2", images(2))


CPU = """
import torch, fastres, warnings
model = fastres.ResNet(fastres.BasicBlock, [1, 1], planes=8, stem="cifar").eval()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for dtype in (torch.float32, torch.{dtype}, torch.{dtype}):
        fast = fastres.optimize(model, dtype=dtype, verify=False)
        fast(torch.randn(1, 3, 16, 16))
print([str(w.message) for w in caught if "emulated" in str(w.message)])
print("emulated" in str(fast.plan()))
"""


@pytest.mark.fault(79)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_without_instructions_is_said_once(dtype):
    """oneDNN held at AVX2 stands for a processor that has no more."""
    script = CPU.format(dtype=dtype)
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False
    )
    warned, planned = done.stdout.splitlines()
    assert warned.count("is emulated on this processor") == 1, done.stderr
    assert planned == "True"


README = """
import torch
import fastres

path = "file"
"""
CALLS = r"`(fastres\.(?:save|load|export|load_checkpoint|from_keras|features)\([^`]+\))`"


@pytest.mark.fault(81)
@pytest.mark.slow
def test_the_readme_is_well_typed(tmp_path):
    pytest.importorskip("mypy")
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    calls = re.findall(CALLS, text + (ROOT / "docs/which-call.md").read_text())
    assert len(blocks) == 1
    assert {"save", "load", "export"} <= {re.split(r"[.(]", call)[1] for call in calls}
    file = tmp_path / "readme.py"
    file.write_text(README + blocks[0] + "\n".join(calls) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.fault(81)
@pytest.mark.parametrize("name", ["bfloat16", "torch.float16", "float64"])
def test_dtypes_by_name_and_the_example_by_position(name):
    fast = fastres.optimize(small(), [images()], dtype=name)
    assert fast.dtype is getattr(torch, name.removeprefix("torch."))
    assert fast.verification.ok


@pytest.mark.fault(81)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_modes_of_torch_compile(mode):
    graph = torch.fx.symbolic_trace(nn.Conv2d(3, 8, 3).eval())
    assert callable(compile_backend(graph, [images()], mode=mode))
    with pytest.raises(ValueError, match="mode must be one of 'default'.*got 'fastest'"):
        compile_backend(graph, [images()], mode="fastest")


@pytest.mark.fault(81)
def test_a_pretrained_network_with_other_classes(monkeypatch):
    """As timm does: the weights of the body, and a new classifier."""
    state = fastres.resnet18().state_dict()
    offer = lambda self, **kwargs: state  # noqa: E731
    monkeypatch.setattr(ImageNetWeights, "get_state_dict", offer)
    with pytest.warns(UserWarning, match="'pretrained' is deprecated"):
        model = fastres.resnet18(pretrained=True, num_classes=10)
    assert model.fc.weight.shape == (10, 512)
    assert model.num_classes == 10
    assert torch.equal(model.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_advice_to_what_is_not_finite_is_of_use(dtype):
    """bfloat16 reaches further than float16, and no further than float32."""
    model = adversarial_(small()).eval()
    with torch.no_grad():
        next(model.parameters())[0, 0, 0, 0] = float("nan")
    with pytest.warns(UserWarning, match="outputs are not all finite") as said:
        fastres.optimize(model, example_input=images(), dtype=dtype)
    advised = ["try torch.bfloat16" in str(w.message) for w in said if "finite" in str(w.message)]
    assert advised == [dtype is torch.float16]
