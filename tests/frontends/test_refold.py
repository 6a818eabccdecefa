"""What is folded again, and how much of it, when optimizers step or weights change."""

import copy
import importlib.util

import pytest
import torch
from fused import assert_close, executions, images, small
from torch import nn
from torch.optim.optimizer import Optimizer

import fastres
from fastres.errors import FoldError
from fastres.runtime import executor, guards

CONVOLUTIONS = {
    "conv1.weight",
    "layer1.0.conv1.weight",
    "layer1.0.conv2.weight",
    "layer2.0.conv1.weight",
    "layer2.0.conv2.weight",
    "layer2.0.downsample.0.weight",
}


@pytest.fixture
def folds(monkeypatch):
    """The weight tensors that are folded, in order."""
    made = []
    fold_step = executor.fold_step

    def counted(op, lookup, dtype):
        made.append(lookup(op.weight))
        return fold_step(op, lookup, dtype)

    monkeypatch.setattr(executor, "fold_step", counted)
    return made


def names(folds, model):
    """Of folded weights, sorted."""
    by_id = {id(p): name for name, p in model.named_parameters()}
    return sorted(by_id[id(weight)] for weight in folds)


def frozen(**kwargs):
    return small(**kwargs).requires_grad_(False)


def live(model):
    return model


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="fastres")


WAYS = pytest.mark.parametrize("way", [live, compiled])


def answers(call, model, x):
    """The call's answer is right for the model as it is now."""
    with torch.no_grad():
        out = call(x)
    assert_close(out, copy.deepcopy(model), x)


class Own(Optimizer):
    """Overrides step and calls no hooks of its own."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1.5)


class Wrapped(Optimizer):
    """As accelerate's: an optimizer around another, without Optimizer's own __init__."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        return self.optimizer.step(closure)


def scaled(params):
    optimizer = torch.optim.SGD(params, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)

    class Scaled:
        def step(self):
            scaler.scale(torch.zeros((), requires_grad=True) * 1)
            scaler.step(optimizer)
            scaler.update()

    return Scaled()


def later(params):
    """The parameters come in a group of their own, after the first step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer.step()
    optimizer.add_param_group({"params": params, "lr": 0.3})
    return optimizer


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "foreach Adam": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "fused Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    "Adam in one tensor each": lambda p: torch.optim.Adam(p, lr=0.1, foreach=False),
    "own step": Own,
    "wrapped": lambda p: Wrapped(torch.optim.AdamW(p, lr=0.1, fused=True)),
    "scaled": scaled,
    "a group added later": later,
}
COMPILED_TOO = ("fused AdamW", "own step", "wrapped")
EACH = pytest.mark.parametrize(
    ("way", "make"),
    [
        *(pytest.param(live, make, id=name) for name, make in OPTIMIZERS.items()),
        *(pytest.param(compiled, OPTIMIZERS[n], id=f"{n}, compiled") for n in COMPILED_TOO),
    ],
)


def with_gradients(params):
    params = list(params)
    for p in params:
        p.grad = torch.ones_like(p)
    return params


@pytest.mark.fault(46)
@EACH
def test_an_optimizer_of_others_folds_nothing(way, make, folds):
    model, head, x = frozen(), nn.Linear(5, 3), images()
    optimizer, call = make(with_gradients(head.parameters())), way(model)
    answers(call, model, x)
    first = len(folds)
    for _ in range(3):
        optimizer.step()
        answers(call, model, x)
    assert len(folds) == first


@pytest.mark.fault(46)
@EACH
def test_an_optimizer_of_some_folds_what_it_owns(way, make, folds):
    model, x = frozen(), images()
    call = way(model)
    answers(call, model, x)
    owned = [model.layer1[0].conv2.weight, model.layer2[0].bn2.weight]
    optimizer = make(with_gradients([p.requires_grad_() for p in owned]))
    before = [p.clone() for p in owned]
    for _ in range(2):
        folds.clear()
        optimizer.step()
        answers(call, model, x)
        assert set(names(folds, model)) == {"layer1.0.conv2.weight", "layer2.0.conv2.weight"}
    assert not any(torch.equal(p, old) for p, old in zip(owned, before, strict=True))


def counted(model):
    """A norm by itself in training: only its counter shows it."""
    norm = model.layer2[0].bn1.train()
    with torch.no_grad():
        norm(torch.randn(4, 16, 3, 3) + 2)
    norm.eval()


CHANGES = {
    "bias": (lambda m: m.fc.bias.add_(1), {"fc.weight"}),
    "one element": (lambda m: m.conv1.weight[0, 0, 0, 0].add_(1), {"conv1.weight"}),
    "gamma": (lambda m: m.layer1[0].bn2.weight.mul_(2), {"layer1.0.conv2.weight"}),
    "statistics": (lambda m: m.bn1.running_var.mul_(3), {"conv1.weight"}),
    "new memory": (lambda m: setattr(m.fc.bias, "data", 2 * m.fc.bias.data), {"fc.weight"}),
    "new parameter": (
        lambda m: setattr(m.fc, "weight", nn.Parameter(2 * m.fc.weight, requires_grad=False)),
        {"fc.weight"},
    ),
    "projection": (
        lambda m: m.layer2[0].downsample[1].bias.add_(1),
        {"layer2.0.downsample.0.weight"},
    ),
}


@pytest.mark.fault(46)
@WAYS
@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES.keys())
def test_one_changed_layer_folds_what_reads_it(way, change, expected, folds):
    model, x = frozen(), images()
    call = way(model)
    answers(call, model, x)
    folds.clear()
    with torch.no_grad():
        change(model)
    answers(call, model, x)
    assert set(names(folds, model)) == expected
    assert len(folds) == 1


@pytest.mark.fault(46)
def test_a_norm_that_trained_by_itself_folds_its_convolution(folds):
    model, x = frozen(), images()
    answers(model, model, x)
    folds.clear()
    counted(model)
    answers(model, model, x)
    assert set(names(folds, model)) == {"layer2.0.conv1.weight"}


@pytest.mark.fault(46)
def test_weights_in_one_memory_are_folded_together(folds):
    model, x = frozen(), images()
    first, second = model.layer1[0].conv1.weight, model.layer1[0].conv2.weight
    second.data = first.data
    assert first._version == second._version
    answers(model, model, x)
    folds.clear()
    with torch.no_grad():
        first.mul_(-1)
    answers(model, model, x)
    assert set(names(folds, model)) == {"layer1.0.conv1.weight", "layer1.0.conv2.weight"}


@pytest.mark.fault(46)
def test_an_optimizer_of_the_memory_that_holds_the_weights(folds):
    """As flattened parameters do: what the optimizer owns is no parameter of the model."""
    model, x = frozen(), images()
    flat = nn.Parameter(torch.cat([model.fc.weight.flatten(), model.fc.bias]))
    model.fc.weight.data = flat.data[: model.fc.weight.numel()].view_as(model.fc.weight)
    model.fc.bias.data = flat.data[model.fc.weight.numel() :]
    answers(model, model, x)
    folds.clear()
    torch.optim.AdamW(with_gradients([flat]), lr=0.1, fused=True).step()
    answers(model, model, x)
    assert names(folds, model) == ["fc.weight"]


@pytest.mark.fault(46)
def test_an_optimizer_of_float32_copies_of_the_weights(folds):
    """As mixed precision has it: the weights are written from the copies, without a version."""
    model, x = small().bfloat16(), images().bfloat16()
    answers(model, model, x)
    weight = model.fc.weight
    main = nn.Parameter(weight.detach().float())
    optimizer = torch.optim.SGD(with_gradients([main]), lr=0.5)
    folds.clear()
    optimizer.step()
    weight.data.copy_(main.data)
    answers(model, model, x)
    assert names(folds, model) == ["fc.weight"]
    weight.requires_grad_(False)
    optimizer.step()
    answers(model, model, x)
    assert names(folds, model) == ["fc.weight"], "nobody trains a frozen weight"


@pytest.mark.fault(46)
def test_every_precision_sees_the_change(folds):
    model, x = frozen(), images()
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(x)
        answers(model, model, x)
        with torch.no_grad():
            model.fc.weight.mul_(-1)
    folds.clear()
    answers(model, model, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    assert names(folds, model) == ["fc.weight"] * 2
    torch.testing.assert_close(half.float(), model._forward_impl(x), rtol=0.05, atol=0.1)  # bf16


@pytest.mark.fault(46)
def test_a_gradient_wanting_call_folds_nothing_again(folds):
    model, x = small(), images()
    answers(model, model, x)
    folds.clear()
    optimizer = torch.optim.AdamW(model.fc.parameters(), lr=0.1, fused=True)
    model(x).sum().backward()
    model(x.clone().requires_grad_())
    answers(model, model, x)
    assert not folds
    optimizer.step()
    answers(model, model, x)
    assert names(folds, model) == ["fc.weight"]


@pytest.mark.fault(46)
def test_a_training_step_folds_all(folds):
    model, x = small(), images()
    answers(model, model, x)
    folds.clear()
    model.layer1[0].bn1.train()
    with torch.no_grad():
        model(x)
    model.layer1[0].bn1.eval()
    answers(model, model, x)
    assert set(names(folds, model)) >= {"layer1.0.conv1.weight"}


@pytest.mark.fault(46)
def test_a_copy_that_waits_for_its_first_call():
    head, x = nn.Linear(2, 2), images()
    source = small()
    fast = fastres.optimize(source)
    torch.optim.SGD(with_gradients(head.parameters()), lr=0.1).step()
    assert_close(fast(x), source, x)
    fast = fastres.optimize(source)
    torch.optim.AdamW(with_gradients([source.fc.bias]), lr=0.1, fused=True).step()
    with pytest.raises(fastres.errors.VerificationError, match="the source changed"):
        fast(x)


@pytest.mark.fault(46)
def test_a_compiled_student_beside_a_compiled_teacher(folds):
    teacher, student, x = frozen(), small(seed=2), images()
    call = compiled(teacher)
    learn = torch.compile(student, backend="fastres")
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01, fused=True)
    answers(call, teacher, x)
    call(x)  # with gradients on, which Dynamo compiles apart
    folds.clear()
    for _ in range(2):
        student.train()
        (learn(x) - call(x)).square().mean().backward()
        optimizer.step()
        answers(call, teacher, x)
    assert not folds
    answers(learn, student.eval(), x)
    folds.clear()
    student.train()
    with torch.no_grad():
        learn(x)
    answers(learn, student.eval(), x)
    assert set(names(folds, student)) == CONVOLUTIONS


@pytest.mark.fault(46)
def test_norms_trained_outside_of_the_compiled_graph(folds):
    """A linear classifier is trained while the norms below count on, in ordinary PyTorch."""
    model, x = frozen(), images()
    call = compiled(model)
    answers(call, model, x)
    optimizer = torch.optim.SGD([p.requires_grad_() for p in model.fc.parameters()], lr=0.1)
    for _ in range(2):
        model.train()
        model(x).sum().backward()
        optimizer.step()
        folds.clear()
        answers(call, model.eval(), x)
        assert set(names(folds, model)) == CONVOLUTIONS | {"fc.weight"}


@pytest.mark.fault(46)
def test_numbers_that_cannot_be_folded_are_not_forgotten():
    model, x = frozen(), images()
    call = compiled(model)
    answers(call, model, x)
    kept = model.bn1.running_var.clone()
    model.bn1.running_var.fill_(-1)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(FoldError, match="a variance must be finite"):
            call(x)
    model.bn1.running_var.copy_(kept)
    answers(call, model, x)


@pytest.mark.fault(46)
def test_what_an_optimizer_may_hold(monkeypatch):
    """The hook runs inside a user's step and must never fail."""
    model, guard = small(), None
    guard = guards.WeightGuard(model, ["fc.bias"], "_forward_impl")

    class Sharded(torch.Tensor):
        def untyped_storage(self):
            raise NotImplementedError

    class Odd(Optimizer):
        param_groups = ()

        def __init__(self):
            pass

    guards.WEIGHT_GUARDS._stepped(Odd())
    guards.WEIGHT_GUARDS._stepped(object())
    assert guard.check() is guards.Change.NONE
    torch.optim.SGD([torch.zeros(2).as_subclass(Sharded)]).step()
    assert guard.check() is guards.Change.WEIGHTS, "what cannot be told counts as owned"
    assert guard.changed() >= {"fc.bias"}


@pytest.mark.fault(46)
def test_watches_are_not_kept_alive():
    guard = guards.WeightGuard(small(), ["fc.bias"], "_forward_impl")
    assert guard in guards.WEIGHT_GUARDS._all
    count = len(guards.WEIGHT_GUARDS._all)
    del guard
    assert len(guards.WEIGHT_GUARDS._all) == count - 1


@pytest.mark.fault(46)
@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
def test_accelerate(folds):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, x = frozen(), images()
    answers(model, model, x)
    folds.clear()
    owned = with_gradients([model.fc.bias])
    accelerator.prepare_optimizer(torch.optim.AdamW(owned, lr=0.1, fused=True)).step()
    answers(model, model, x)
    assert names(folds, model) == ["fc.weight"]


@pytest.mark.fault(46)
def test_zero_redundancy_optimizer(folds, tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch without distributed")
    from torch.distributed.optim import ZeroRedundancyOptimizer

    distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model, x = frozen(), images()
        answers(model, model, x)
        folds.clear()
        owned = with_gradients([model.fc.bias])
        ZeroRedundancyOptimizer(owned, torch.optim.AdamW, lr=0.1, fused=True).step()
        answers(model, model, x)
        assert names(folds, model) == ["fc.weight"]
    finally:
        distributed.destroy_process_group()


def unseen(model):
    """Changes that leave identity, version and address alone."""
    model.fc.weight.data.mul_(-2)
    model.conv1.weight.detach().numpy()[...] *= 3


WRAPPERS = {
    "itself": lambda model, call: model,
    "what is called": lambda model, call: call,
    "a module around it": lambda model, call: nn.Sequential(nn.Identity(), call),
    "DataParallel": lambda model, call: nn.DataParallel(model),
}


@pytest.mark.fault(63)
@WAYS
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_refresh(way, wrap, folds):
    model, x = frozen(), images()
    call = way(model)
    answers(call, model, x)
    with torch.no_grad():
        before = call(x)
        unseen(model)
        assert torch.equal(call(x), before), "the change was seen, so this test shows nothing"
    fastres.refresh(wrap(model, call))
    answers(call, model, x)
    folds.clear()
    answers(call, model, x)
    assert not folds


@pytest.mark.fault(63)
def test_refresh_of_compiled_functions_and_foreign_modules():
    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

        def forward(self, x):
            return self.fc(self.conv(x).relu().mean((2, 3)))

    torch._dynamo.reset()
    model, x = Foreign().eval(), images()
    in_place = copy.deepcopy(model)
    in_place.compile(backend="fastres")

    @torch.compile(backend="fastres")
    def call(x):
        return model(x) + 1

    with torch.no_grad():
        for run, module, more in ((call, model, 1), (in_place, in_place, 0)):
            run(x)
            for p in module.parameters():
                p.data.mul_(-2)
            fastres.refresh(module)
            expected = module.fc(module.conv(x).relu().mean((2, 3))) + more
            torch.testing.assert_close(run(x), expected)


@pytest.mark.fault(63)
def test_new_data_needs_no_refresh():
    model, x = frozen(), images()
    call = compiled(model)
    answers(call, model, x)
    for factor in (2, 3):
        for p in model.parameters():
            p.data = p.data * factor
        with executions() as ran:
            answers(call, model, x)
        assert len(ran) == 1


@pytest.mark.fault(63)
def test_what_cannot_be_refreshed():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module; got function"):
        fastres.refresh(torch.compile(lambda x: x, backend="fastres"))
    fast = fastres.optimize(small(), verify=False)
    for model in (fast, nn.DataParallel(fast)):
        with pytest.raises(TypeError, match="a frozen copy: optimize its source again"):
            fastres.refresh(model)
