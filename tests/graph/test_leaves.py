"""What cannot be traced, cast, fused or looked into stays a call by name; the rest is fused."""

import copy
import importlib
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastres
from fastres.frontends.fast_shell import FastShell
from fastres.graph.ir import Conv2d, Linear
from fastres.graph.trace import TraceError


class EmptyNorm(nn.BatchNorm2d):
    """A subclass that says nothing."""


class NamedNorm(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels, eps=3e-3)
        self.label = "norm"

    def extra_repr(self):
        return self.label


class SplitNorm(nn.BatchNorm2d):
    def forward(self, x):
        if self.training:
            return torch.cat([super(SplitNorm, self).forward(part) for part in x.chunk(2)])
        return super().forward(x)


class FrozenNorm(nn.Module):
    """As detectron2's FrozenBatchNorm2d."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels) - eps)
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x):
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            bias = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)
        statistics = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.batch_norm(x, *statistics, training=False, eps=self.eps)


class CheckingNorm(nn.BatchNorm2d):
    def _check_input_dim(self, x):
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise ValueError("no images")


class DoublingNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) if x.shape[0] > 99 else 2 * super().forward(x)


class EvenReLU(nn.Module):
    def forward(self, x):
        return F.relu(x) if x.shape[1] % 2 == 0 else F.silu(x)


class BrightReLU(nn.Module):
    def forward(self, x):
        return F.relu(x) if x.sum() > -1e9 else x


class Pair(nn.Module):
    """Gives two values, which forward around it takes apart."""

    def forward(self, x):
        return (x, x.mean()) if x.shape[-1] > 1 else (x, x)


class Forked(nn.Module):
    """A block with convolutions that branches on its input's size."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return F.relu(y + x) if x.shape[2] > 2 else y


class Net(nn.Module):
    """conv, norm, activation; a residual block; a classifier."""

    def __init__(self, norm=nn.BatchNorm2d, act=nn.ReLU, middle=nn.Identity):
        super().__init__()
        self.conv1, self.norm1, self.act1 = nn.Conv2d(3, 8, 3, bias=False), norm(8), act()
        self.conv2, self.norm2, self.act2 = nn.Conv2d(8, 8, 3, padding=1), norm(8), act()
        self.middle = middle()
        self.conv3, self.norm3 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.act1(self.norm1(self.conv1(x)))
        x = self.act2(self.norm2(self.conv2(x)) + x)
        x = self.middle(x)
        x = F.relu(self.norm3(self.conv3(x)))
        return self.fc(x.mean((2, 3)))


def adversarial(model):
    """Weights and statistics with which every wrong norm shows."""
    generator = torch.Generator().manual_seed(0)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point():
            drawn = torch.rand(value.shape, generator=generator) + 0.2
            value.data.copy_(drawn if "var" in name else drawn - 0.6)
    return model.eval()


def exact(model, x):
    with torch.no_grad():
        return copy.deepcopy(model).double()(x.double())


def check(model, x, fast=None):
    """The copy is as near to float64 as the model is, or nearly."""
    fast = fast or fastres.optimize(model, example_input=x)
    want = exact(model, x)
    with torch.no_grad():
        own = (model(x).double() - want).norm()
    assert (fast(x).double() - want).norm() <= 2 * own + 4e-6 * want.norm()
    return fast


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def left(fast):
    return {step.where: reason for step, reason in fast.plan().fallbacks}


def convolutions(fast):
    return [step.op for step in fast.plan().steps if isinstance(step.op, Conv2d)]


@pytest.mark.fault(49)
@pytest.mark.parametrize("norm", [EmptyNorm, NamedNorm, SplitNorm, FrozenNorm])
def test_norms_that_compute_as_torchs_are_folded(norm):
    fast = check(adversarial(Net(norm)), X)
    assert not left(fast)
    assert all(op.norm for op in convolutions(fast))


@pytest.mark.fault(49)
@pytest.mark.parametrize("name", ["SplitBatchNorm2d", "BatchNormAct2d", "FrozenBatchNormAct2d"])
def test_timms_norms_are_folded(name):
    layers = pytest.importorskip("timm.layers")
    fast = check(adversarial(Net(getattr(layers, name))), X)
    assert not left(fast)
    assert all(op.norm for op in convolutions(fast))


@pytest.mark.fault(49)
@pytest.mark.parametrize("name", ["EvoNorm2dS0", "FilterResponseNormTlu2d", "GroupNorm1"])
def test_timms_other_norms_are_left_and_the_rest_is_fused(name):
    layers = pytest.importorskip("timm.layers")
    kind = getattr(layers, name)
    fast = check(adversarial(Net(lambda c: kind(c, groups=4) if "Evo" in name else kind(c))), X)
    assert {where[:5] for where in left(fast)} == {"norm1", "norm2"}
    assert convolutions(fast)[-1].norm
    assert convolutions(fast)[-1].relu


@pytest.mark.fault(49)
@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"norm": CheckingNorm}, {"norm1", "norm2"}),
        ({"norm": DoublingNorm}, {"norm1", "norm2"}),
        ({"act": EvenReLU}, {"act1", "act2"}),
        ({"act": BrightReLU}, {"act1", "act2"}),
        ({"middle": lambda: Forked(8)}, {"middle"}),
    ],
)
def test_a_layer_that_cannot_be_traced_is_left_by_name(arguments, names):
    fast = check(adversarial(Net(**arguments)), X)
    reasons = left(fast)
    assert set(reasons) == names
    assert all("cannot be traced: " in reason for reason in reasons.values())
    ops = convolutions(fast)
    assert len(ops) == 3
    assert ops[-1].norm
    assert ops[-1].relu
    assert "act1" not in names or all(op.norm for op in ops)


@pytest.mark.fault(49)
def test_a_layer_whose_result_is_taken_apart():
    class Apart(Net):
        def forward(self, x):
            y, mean = self.middle(F.relu(self.norm1(self.conv1(x))))
            return F.relu(self.norm3(self.conv3(y))) * mean

    fast = check(adversarial(Apart(middle=Pair)), X)
    assert len(convolutions(fast)) == 2
    assert "middle" in left(fast)


@pytest.mark.fault(49)
def test_a_layer_called_twice_and_one_inside_another():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = BrightReLU()

        def forward(self, x):
            y = self.inner(x)
            return y if y.shape[0] < 99 else x

    class Twice(Net):
        def forward(self, x):
            x = self.middle(self.norm1(self.conv1(x)))
            return self.middle(self.norm3(self.conv3(x)))

    fast = check(adversarial(Twice(middle=Outer)), X)
    assert [step.where for step, _ in fast.plan().fallbacks] == ["middle", "middle"]
    assert all(op.norm for op in convolutions(fast))


@pytest.mark.fault(49)
def test_weights_that_a_refused_layer_has_read_are_read_anew():
    class Shared(Net):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8, 1, 1))
            self.middle = Scaled(self.scale)

        def forward(self, x):
            x = self.middle(F.relu(self.norm1(self.conv1(x))))
            return F.relu(self.norm3(self.conv3(x * self.scale)))

    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

        def forward(self, x):
            x = x * self.scale
            return x if x.shape[0] > 1 else -x

    fast = check(adversarial(Shared()), X)
    assert "middle" in left(fast)


@pytest.mark.fault(49)
@pytest.mark.parametrize("kind", ["conv", "linear", "relu"])
def test_subclasses_that_change_what_forward_does_are_not_taken_for_their_base(kind):
    class Conv(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, 2 * weight, bias)

    class Fc(nn.Linear):
        @property
        def weight(self):
            return 3 * self._parameters["weight"]

    class Act(nn.ReLU):
        def forward(self, x):
            return super().forward(x) - 1

    model = Net(act=Act if kind == "relu" else nn.ReLU)
    if kind == "conv":
        model.conv1 = Conv(3, 8, 3)
    adversarial(model)
    if kind == "linear":
        model.fc.__class__ = Fc
    check(model, X)


@pytest.mark.fault(49)
@pytest.mark.parametrize("base", [nn.Conv2d, nn.Linear, nn.ReLU, nn.MaxPool2d, nn.Dropout])
def test_subclasses_that_change_nothing_are_their_base(base):
    kind = type("Mine", (base,), {"__doc__": "of a user", "reset_parameters": lambda self: None})
    parts = {
        nn.Conv2d: lambda: nn.Conv2d(8, 8, 3),
        nn.Linear: lambda: nn.Linear(7, 8),
        nn.ReLU: nn.ReLU,
        nn.MaxPool2d: lambda: nn.MaxPool2d(2),
        nn.Dropout: nn.Dropout,
    }
    layer = parts[base]()
    layer.__class__ = kind
    model = adversarial(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), layer))
    assert not left(check(model, X))


@pytest.mark.fault(49)
def test_where_the_whole_is_refused_the_layer_is_named():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep = nn.Sequential(Forked(3))

        def forward(self, x):
            return self.deep(x)

    with pytest.raises(TraceError, match=r"deep\.0, with 1 of its 1 convolutions: Forked cannot"):
        fastres.optimize(Root().eval())


@pytest.mark.fault(49)
def test_an_empty_subclass_in_torchvisions_resnet():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(norm_layer=EmptyNorm, num_classes=10).eval()
    fast = fastres.optimize(model, example_input=torch.randn(2, 3, 64, 64))
    assert not left(fast)
    assert len(convolutions(fast)) == 20


def scripted(module):
    return torch.jit.script(module.eval())


@pytest.mark.fault(58)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")
@pytest.mark.parametrize(
    "child",
    [
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)),
        lambda: nn.Conv2d(8, 8, 1),
        lambda: nn.BatchNorm2d(8),
        lambda: Forked(8),
    ],
)
def test_a_scripted_child_is_left_and_the_rest_is_fused(child):
    model = adversarial(Net(middle=child))
    plain = copy.deepcopy(model)
    model.middle = scripted(model.middle)
    fast = check(plain, X, fastres.optimize(model, example_input=X))
    assert left(fast)["middle"] == "is of torch.jit, which torch.fx cannot look into"
    assert convolutions(fast)[-1].norm


@pytest.mark.fault(60)
@pytest.mark.parametrize("name", ["fc", "flat"])
def test_features_without_maps_are_one_clear_error(name):
    class Flat(Net):
        def __init__(self):
            super().__init__()
            self.flat = nn.Flatten(2)

        def forward(self, x):
            return self.fc(self.flat(self.norm1(self.conv1(x))).mean(2))

    with pytest.raises(ValueError, match=f"out_indices has '{name}', whose output is no map"):
        fastres.features(Flat().eval(), ("norm1", name))


@pytest.mark.fault(60)
def test_a_fused_model_inside_another():
    inner = adversarial(Net())
    outer = adversarial(
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Net(), nn.Linear(5, 2))
    )
    outer[2] = inner
    fused = copy.deepcopy(outer)
    fused[2] = fastres.optimize(inner, example_input=X)
    fast = check(outer, X, fastres.optimize(fused, example_input=X))
    assert left(fast)["2"] == "is fused already"
    assert convolutions(fast)[0].norm


class Branching(nn.Module):
    """What torch.fx cannot trace, around a module and two layers of its own."""

    def __init__(self, inner):
        super().__init__()
        self.before = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.inner = inner
        self.after = nn.Sequential(nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        return self.after(self.inner(self.before(x))) if x.sum() < 1e9 else x


def shell_inside(kind):
    """A module, and the same with its part in the middle fused before: a FastShell, which another
    module holds that can be traced whole, or that cannot, itself or a level below."""
    inner = Branching(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)))
    inner.after = nn.Sequential(nn.Conv2d(5, 5, 3), nn.BatchNorm2d(5))
    body = nn.Sequential(inner, nn.Identity()) if kind == "below" else inner
    layers = (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), body)
    outer = adversarial(nn.Sequential(*layers) if kind == "traceable" else Branching(body))
    fused = copy.deepcopy(outer)
    shell = fastres.optimize(inner, example_input=X)
    assert isinstance(shell, FastShell)
    if kind == "traceable":
        fused[2] = shell
    elif kind == "below":
        fused.inner[0] = shell
    else:
        fused.inner = shell
    return outer, fused, shell


@pytest.mark.fault(60)
@pytest.mark.parametrize("kind", ["traceable", "untraceable", "below"])
def test_a_fused_shell_inside_another_module(kind):
    outer, fused, shell = shell_inside(kind)
    fast = fastres.optimize(fused, example_input=X)
    assert isinstance(fast, FastShell) == (kind != "traceable")
    for model in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        with torch.no_grad():
            torch.testing.assert_close(model(X), outer(X), rtol=1e-4, atol=1e-4)
    reasons = [
        reason for step, reason in fast.plan().fallbacks if step.where.startswith(("inner", "2"))
    ]
    assert set(reasons) == {"is fused already"}
    assert fast.plan().fused
    assert list(shell.parts) == ["before", "inner", "after"]  # the user's own is as it was


@pytest.mark.fault(60)
@pytest.mark.parametrize("kind", ["traceable", "untraceable", "below"])
def test_a_fused_shell_inside_keeps_its_dtype(kind):
    _, fused, _ = shell_inside(kind)
    with pytest.raises(TypeError, match=r"the dtype of a FastShell is fixed .*optimize\(source"):
        fastres.optimize(fused, dtype=torch.bfloat16)


class Cast(nn.Module):
    """Computes in half of float32's bits in some of its layers, and gives float32."""

    def __init__(self, how, dtype=torch.bfloat16):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 5)
        self.how, self.dtype = how, dtype

    def cast(self):
        self.body.to(self.dtype if self.how != "between" else torch.float32)
        self.fc.to(self.dtype if self.how == "all" else torch.float32)
        return self

    def forward(self, x):
        if self.how == "between":
            return self.fc(self.body(x).to(self.dtype).float().mean((2, 3)))
        if self.how == "all":
            return self.fc(self.body(x.to(self.dtype)).mean((2, 3))).float()
        x = x.bfloat16() if self.dtype is torch.bfloat16 else x.half()
        return self.fc(self.body(x).float().mean((2, 3)))


@pytest.mark.fault(60)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["body", "between", "all"])
def test_casts_inside_with_a_float32_answer(how, dtype):
    model = adversarial(Cast(how, dtype)).cast()
    with torch.no_grad():
        want = model(X)
    fast = fastres.optimize(model, example_input=X)
    got = fast(X)
    assert got.dtype is torch.float32
    scale = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert (got - want).norm() <= scale * want.norm()
    steps = {type(step.op): step.op for step in fast.plan().steps}
    assert steps[Conv2d].norm
    assert steps[Conv2d].relu
    assert (Linear in steps) == (how != "body")  # whose weight alone is float32
    assert fast.verification.ok


@pytest.mark.fault(62)
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU()), (1, 3, 5, 5, 5)),
        (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU()), (2, 3, 9)),
        (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.Linear(7, 4), nn.ReLU()), (2, 3, 9)),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()), (2, 3, 9, 9)),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh()), (2, 3)),
    ],
)
def test_one_warning_where_nothing_is_fused(model, shape):
    with pytest.warns(UserWarning, match="could be fused") as caught:
        fast = fastres.optimize(model().eval(), example_input=torch.randn(shape))
    assert len([w for w in caught if "could be fused" in str(w.message)]) == 1
    assert caught[0].filename == __file__
    assert ("nothing is fused" in str(fast.plan())) == (fast.plan().fuses is False)


@pytest.mark.fault(62)
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("last", [nn.ReLU, nn.Sigmoid])
def test_no_warning_where_something_is_fused(last):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), last()).eval()
    assert "nothing is fused" not in str(fastres.optimize(model, example_input=X).plan())


@pytest.mark.fault(62)
def test_a_video_network():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.video.r3d_18(num_classes=5).eval()
    with pytest.warns(UserWarning, match="nothing of VideoResNet could be fused"):
        fast = fastres.optimize(model, verify=False)
    assert "nothing is fused" in str(fast.plan())


@pytest.mark.fault(55)
@pytest.mark.filterwarnings("ignore:torch.ao.quantization", "ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["fx fuse", "fx", "fuse_modules", "dynamic", "linear"])
def test_what_torchs_own_tools_have_made_is_taken(how):
    from torch.ao.quantization import fuse_modules, quantize_dynamic
    from torch.fx.experimental.optimization import fuse

    model = adversarial(nn.Sequential(Net(), nn.ReLU(), nn.Linear(5, 4), nn.ReLU()))
    names = [["0.conv1", "0.norm1", "0.act1"], ["0.conv2", "0.norm2"]]
    tools = {
        "fx fuse": lambda: fuse(model),
        "fx": lambda: torch.fx.symbolic_trace(model),
        "fuse_modules": lambda: fuse_modules(model, names),
        "linear": lambda: fuse_modules(model, [["2", "3"]]),
        "dynamic": lambda: quantize_dynamic(model, {nn.Linear}),
    }
    made = tools[how]()
    fast = fastres.optimize(made, example_input=X)
    with torch.no_grad():
        want = made(X)
    assert (fast(X) - want).norm() <= (2**-6 if how == "dynamic" else 1e-5) * want.norm()
    assert all(op.relu for op in convolutions(fast))
    assert len(convolutions(fast)) == 3


class Dressed(nn.Module):
    """Keeps a network, and gives a dictionary."""

    def __init__(self):
        super().__init__()
        self.net = Net(middle=nn.Dropout)

    def forward(self, x):
        return {"logits": self.net(x), "mean": x.mean()}


def fastres_copy_of_export(dynamic):
    batch = {"x": {0: torch.export.Dim("batch", min=1, max=8)}} if dynamic else None
    model = adversarial(Dressed())
    program = torch.export.export(model, (X,), dynamic_shapes=batch).module()
    with pytest.raises(NotImplementedError):
        program.eval()
    return model, fastres.optimize(program, example_input=X)


@pytest.mark.fault(55)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_program_is_taken_though_it_has_no_eval(dynamic):
    model, fast = fastres_copy_of_export(dynamic)
    got, want = fast(X), exact(model, X)
    assert list(got) == list(want)
    assert (got["logits"].double() - want["logits"]).norm() <= 1e-5 * want["logits"].norm()
    assert all(op.norm for op in convolutions(fast))
    assert all(op.relu for op in convolutions(fast))
    other = torch.cat([X, X[:1]])
    if dynamic:
        assert fast(other)["logits"].shape == (3, 5)
    else:
        with pytest.raises(AssertionError, match="Guard failed"):
            fast(other)


@pytest.mark.fault(55)
def test_the_reason_where_int8_layers_differ():
    from torch.ao.nn.quantized.dynamic import Linear as Int8

    of_int8 = importlib.import_module("fastres.frontends.optimize")._of_int8
    source = nn.Sequential(Net(), Int8(5, 4)).eval()
    assert "1 computes in int8" in of_int8(source)
    assert of_int8(source[0]) == ""


@pytest.mark.fault(60)
def test_casts_around_parts_of_what_cannot_be_traced():
    class Branching(Cast):
        def forward(self, x):
            return super().forward(x) if x.sum() < 1e9 else x

    model = adversarial(Branching("body")).cast()
    with torch.no_grad():
        want = model(X)
    fast = fastres.optimize(model, example_input=X)
    assert (fast(X) - want).norm() <= 2**-7 * want.norm()
    assert fast.fc.weight.dtype is torch.float32
