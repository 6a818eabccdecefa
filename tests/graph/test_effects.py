"""What a forward or a hook leaves behind reaches the copy's attributes, or optimize says so."""

import copy
import warnings
from functools import partial

import pytest
import torch
from helpers import adversarial_
from torch import nn

import fastres
from fastres.frontends.fast_shell import FastShell
from fastres.graph.trace import TraceError, trace

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def block(channels=8):
    return nn.Sequential(nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU())


class Net(nn.Module):
    """Two blocks; ``keep`` says what forward does with the first one's result."""

    def __init__(self, keep=lambda self, y: None):
        super().__init__()
        self.a, self.b = block(3), block()
        self.keep = keep
        self.feat, self.feats, self.cache, self.calls = None, [], {}, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        y = self.a(x)
        self.keep(self, y)
        return self.b(y)


class Keeper(nn.Module):
    """A layer that stores its input, after a branch that no tracer follows."""

    feat = None

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        self.feat = x
        return x


def set_attribute(self, y):
    self.feat = y


def append(self, y):
    self.feats = [*self.feats, y]


def cache(self, y):
    self.cache["y"] = y


def nested(self, y):
    self.cache.setdefault("all", {})["y"] = (y, 1)


def kept(fast):
    return [
        fast.feat,
        *fast.feats[-1:],
        fast.cache.get("y"),
        *fast.cache.get("all", {}).get("y", ()),
    ]


@pytest.mark.fault(52)
@pytest.mark.parametrize("keep", [set_attribute, append, cache, nested])
def test_what_forward_stores_is_found_on_the_copy(keep):
    source = adversarial_(Net(keep)).eval()
    fast = fastres.optimize(source, example_input=X)
    assert isinstance(fast, FastShell)
    x = X + 1
    got = fast(x)
    with torch.no_grad():
        torch.testing.assert_close(got, source(x), rtol=1e-4, atol=1e-4)
        want = source.a(x)
    (feat,) = [v for v in kept(fast) if isinstance(v, torch.Tensor)]
    torch.testing.assert_close(feat, want, rtol=1e-4, atol=1e-4)
    assert all(step.where for step in fast.plan().fused)


@pytest.mark.fault(52)
def test_a_layer_that_stores_behind_a_branch():
    class Deep(Net):
        def __init__(self):
            super().__init__()
            self.keeper = Keeper()

        def forward(self, x):
            return self.b(self.keeper(self.a(x)))

    source = adversarial_(Deep()).eval()
    fast = fastres.optimize(source, example_input=X)
    fast(X)
    torch.testing.assert_close(fast.keeper.feat, source.a(X), rtol=1e-4, atol=1e-4)


@pytest.mark.fault(52)
@pytest.mark.parametrize("count", ["number", "buffer"])
def test_a_forward_that_counts_is_not_recorded(count):
    def number(self, y):
        self.calls += 1

    def buffer(self, y):
        self.seen.add_(1)

    source = Net({"number": number, "buffer": buffer}[count]).eval()
    with pytest.raises(TraceError, match="its forward stores (calls|seen), which only"):
        trace(source)
    assert source.calls == 0
    assert source.seen == 0


@pytest.mark.fault(52)
def test_a_cache_of_weights_is_no_reason_to_refuse():
    def cached(self, y):
        self.cache[str(y.device)] = self.b[0].weight * 2
        self.made = torch.ones(2)

    assert not isinstance(fastres.optimize(Net(cached).eval(), example_input=X), FastShell)


@pytest.mark.fault(52)
def test_features_of_a_network_that_stores_are_refused():
    with pytest.raises(TraceError, match="its forward stores feat"):
        fastres.features(Net(set_attribute).eval(), ("a", "b"))


class Collector:
    def __init__(self):
        self.got = []

    def take(self, module, inputs, output):
        self.got.append(output)

    def take_named(self, name, module, inputs, output):
        self.got.append(output)

    def __call__(self, module, inputs, output):
        self.got.append(output)


class Collecting(Net):
    """Keeps what its hooks see in an object of its own, as timm's FeatureHookNet does."""

    def __init__(self, how):
        super().__init__()
        self.collector = Collector()
        hook = {
            "method": self.collector.take,
            "partial": partial(self.collector.take_named, "a"),
            "object": self.collector,
            "own": self.see,
        }
        self.a.register_forward_hook(hook[how])

    def see(self, module, inputs, output):
        self.collector.got.append(output)


@pytest.mark.fault(52)
@pytest.mark.parametrize("how", ["method", "partial", "object", "own"])
def test_hooks_that_are_bound_feed_the_copy(how):
    source = adversarial_(Collecting(how)).eval()
    fast = fastres.optimize(source, example_input=X)
    before = len(source.collector.got)
    fast.collector.got.clear()
    fast(X)
    (got,) = fast.collector.got
    torch.testing.assert_close(got, source.a(X), rtol=1e-4, atol=1e-4)
    assert len(source.collector.got) == before + 1


@pytest.mark.fault(52)
def test_timms_hooked_features():
    timm = pytest.importorskip("timm")
    source = timm.create_model("resnet18", features_only=True, feature_cls="hook").eval()
    x = torch.randn(1, 3, 64, 64)
    fast = fastres.optimize(source, example_input=x)
    got = fast(x)
    with torch.no_grad():
        exact = copy.deepcopy(source).double()(x.double())
    assert len(got) == len(exact) == 5
    for ours, theirs in zip(got, exact, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.fault(52)
def test_a_hook_that_refers_to_the_source_is_warned_of():
    source = Net().eval()
    source.a.register_forward_hook(lambda module, inputs, y: setattr(source, "feat", y))
    with pytest.warns(UserWarning, match="a forward hook of a refers to modules of the") as w:
        fastres.optimize(source, example_input=X)
    assert w[-1].filename == __file__


@pytest.mark.fault(52)
def test_hooks_that_refer_to_nothing_of_the_source_are_kept_in_silence():
    source, seen = Net().eval(), []
    source.a.register_forward_hook(lambda module, inputs, y: seen.append(y))
    source.b.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = fastres.optimize(source, verify=False)
    fast(X)
    assert len(seen) == 1
    assert not any("refers to" in str(w.message) for w in caught)


@pytest.mark.fault(52)
@pytest.mark.parametrize("how", ["method", "partial", "object"])
def test_hooks_of_an_object_of_the_users_go_on_to_feed_it(how):
    source, mine = adversarial_(Net()).eval(), Collector()
    hooks = {"method": mine.take, "partial": partial(mine.take_named, "a"), "object": mine}
    source.a.register_forward_hook(hooks[how])
    fast = fastres.optimize(source, example_input=X)
    mine.got.clear()
    fast(X)
    (got,) = mine.got
    with torch.no_grad():
        torch.testing.assert_close(got, source.a(X), rtol=1e-4, atol=1e-4)
