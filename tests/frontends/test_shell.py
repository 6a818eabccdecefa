"""Wholes that cannot be traced: their Python stays, their parts are fused, their form is kept."""

import copy
import inspect
import pickle
import sys

import pytest
import torch
from fused import small
from helpers import adversarial_, real_images
from torch import nn
from tutorials import MnistResNet18
from zoo import _huggingface

import fastres
from fastres.frontends.fast_shell import FastShell
from fastres.graph.trace import TraceError


class Optional(nn.Module):
    """Branches on its arguments, as many users' wrappers do."""

    def __init__(self):
        super().__init__()
        self.name = "optional"
        self.trunk = MnistResNet18(in_channels=3, width=16).net[:5]
        self.head = nn.Linear(128, 5)

    def forward(self, x, with_features=False):
        features = self.trunk(x)
        logits = self.head(features.mean((2, 3)))
        if with_features:
            return {"logits": logits, "features": features}
        return logits

    def width(self):
        return self.head.out_features


@pytest.fixture
def source():
    """In float64, where a copy that is right agrees to all the digits that are compared."""
    return adversarial_(Optional()).double()


@pytest.fixture
def images():
    return real_images(2, 64).double()


def test_every_branch_keeps_working(source, images):
    fast = fastres.optimize(source, example_input=images)
    assert isinstance(fast, FastShell)
    assert list(fast.parts) == ["trunk"]
    assert fast.verification.ok
    with torch.no_grad():
        torch.testing.assert_close(fast(images), source(images))
        found, wanted = fast(images, with_features=True), source(images, with_features=True)
    assert list(found) == ["logits", "features"]
    torch.testing.assert_close(found, wanted)
    assert found["features"].stride() == wanted["features"].stride()


def test_attributes_and_methods_are_the_copys(source, images):
    fast = fastres.optimize(source, example_input=images)
    assert fast.name == "optional"
    assert fast.width() == 5
    with pytest.raises(AttributeError, match="height"):
        fast.height  # noqa: B018


def test_the_plan_lists_parts_and_rest(source, images):
    plan = fastres.optimize(source, example_input=images).plan()
    left = {step.where: reason for step, reason in plan.fallbacks}
    assert list(left) == ["head"]
    assert "Optional cannot be traced" in left["head"]
    assert all(step.where.startswith("trunk") for step in plan.fused)
    assert len(plan.fused) == 21
    assert "trunk.0.0" in str(plan)


def test_the_source_is_untouched_and_not_shared(source, images):
    before = copy.deepcopy(source.state_dict())
    fast = fastres.optimize(source, example_input=images)
    shared = {t.data_ptr() for t in source.state_dict().values()}
    assert not shared & {t.data_ptr() for t in fast.state_dict().values()}
    assert type(source.trunk) is nn.Sequential
    assert all(p.requires_grad for p in source.parameters())
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, before[name])
    with torch.no_grad():
        source.head.weight.mul_(2)
        wanted = Optional().eval().double()
        wanted.load_state_dict(before)
        for ours, theirs in zip(wanted.modules(), source.modules(), strict=True):
            if hasattr(theirs, "eps"):
                ours.eps = theirs.eps
        torch.testing.assert_close(fast(images), wanted(images))


def test_contiguous_images_are_converted_once(source, images):
    assert fastres.optimize(source, example_input=images).channels_last


def test_layout_of_the_images_reaches_the_outputs(source, images):
    nhwc = images.contiguous(memory_format=torch.channels_last)
    fast = fastres.optimize(source, example_input=nhwc)
    with torch.no_grad():
        wanted = source(nhwc, True)["features"]
    assert fast(nhwc, True)["features"].stride() == wanted.stride()
    assert wanted.stride() == (512, 1, 256, 128)


class Viewing(Optional):
    """A view() between the parts bears no other memory format."""

    def forward(self, x, with_features=False):
        features = self.trunk(x).view(len(x), -1)
        return self.head(features.view(len(x), 128, -1).mean(2))


def test_code_that_views_memory_gets_the_layout_it_knows(images):
    source = adversarial_(Viewing()).double()
    fast = fastres.optimize(source, example_input=images)
    assert not fast.channels_last
    with torch.no_grad():
        torch.testing.assert_close(fast(images), source(images))


def test_a_part_used_twice_is_fused_once(images):
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = MnistResNet18(in_channels=3, width=16).net[:5]
            self.right = self.left

        def forward(self, x, y=None):
            return self.left(x) if y is None else self.left(x) - self.right(y)

    source = adversarial_(Siamese()).double()
    fast = fastres.optimize(source, example_input=(images, images.flip(3)))
    assert fast.left is fast.right
    with torch.no_grad():
        wanted = source(images, images.flip(3))
    torch.testing.assert_close(fast(images, images.flip(3)), wanted)


def test_hooks_on_a_part_run(source, images):
    seen = []
    source.trunk[4].register_forward_hook(lambda m, args, out: seen.append(out.shape))
    fast = fastres.optimize(source, verify=False)
    with torch.no_grad():
        wanted = source(images)
    del seen[:]
    torch.testing.assert_close(fast(images), wanted)
    assert seen == [(2, 128, 2, 2)]


def test_other_dtypes_are_folded_from_the_source(source, images):
    fast = fastres.optimize(source, example_input=images, dtype=torch.bfloat16)
    found = fast(images)
    assert found.dtype is torch.bfloat16
    with torch.no_grad():
        wanted = source(images)
    # bfloat16 keeps 8 bits; 20 layers of rounding to 2**-9 each stay below 5 % of the logits.
    assert float((found.double() - wanted).norm() / wanted.norm()) < 0.05
    with pytest.raises(TypeError, match=r"fixed \(torch.bfloat16\)"):
        fast.half()


def test_a_shell_copies_and_pickles(source, images):
    fast = fastres.optimize(source, example_input=images)
    wanted = fast(images)
    assert torch.equal(copy.deepcopy(fast)(images), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(fast))(images), wanted)


def test_a_shell_compiles_whole(source, images):
    fast = fastres.optimize(source, example_input=images)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        wanted = source(images, with_features=True)
    torch.testing.assert_close(compiled(images, with_features=True), wanted)


def test_a_shell_is_exported_by_the_sources_names(source, images):
    fast = fastres.optimize(source, example_input=images)
    assert list(inspect.signature(fast.forward).parameters) == ["x", "with_features"]
    for twin in (fast, pickle.loads(pickle.dumps(fast))):
        shapes = {"x": {0: torch.export.Dim("batch")}}
        program = torch.export.export(twin, (images,), dynamic_shapes=shapes).module()
        more = real_images(3, 64).double()
        with torch.no_grad():
            torch.testing.assert_close(program(more), source(more))


def test_training_is_refused(source):
    fast = fastres.optimize(source, verify=False)
    with pytest.raises(RuntimeError, match="inference only"):
        fast.train()


def test_nothing_traceable_is_refused_by_name():
    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(TraceError, match="Opaque cannot be traced.*nor can any part"):
        fastres.optimize(Opaque().eval())


def test_a_branch_baked_in_by_the_trace_is_caught(images):
    """fx sees a Proxy, not a Tensor: it records the wrong branch without a word."""

    class Checked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = MnistResNet18(in_channels=3, width=16)

        def forward(self, x):
            return self.net(x) if isinstance(x, torch.Tensor) else self.net(x) * 2

    with pytest.raises(fastres.FastresError, match="differ"):
        fastres.optimize(adversarial_(Checked()).double(), example_input=images)


@pytest.fixture(scope="module")
def both():
    sizes = {"depths": [2, 2, 2, 2], "hidden_sizes": [16, 24, 32, 40], "embedding_size": 16}
    source = adversarial_(_huggingface("basic", **sizes)).double()
    return source, fastres.optimize(source, example_input=real_images(2, 64).double())


class TestHuggingFace:
    def test_outputs_are_the_sources_dataclasses(self, both, images):
        source, fast = both
        labels = torch.tensor([0, 1])
        with torch.no_grad():
            wanted = source(images, labels=labels, output_hidden_states=True)
        found = fast(images, labels=labels, output_hidden_states=True)
        assert type(found) is type(wanted)
        assert list(found) == list(wanted) == ["loss", "logits", "hidden_states"]
        torch.testing.assert_close(found.to_tuple(), wanted.to_tuple())
        strides = [h.stride() for h in wanted.hidden_states]
        assert [h.stride() for h in found.hidden_states] == strides

    def test_tuples_and_keywords(self, both, images):
        source, fast = both
        with torch.no_grad():
            wanted = source(pixel_values=images, return_dict=False)
        found = fast(pixel_values=images, return_dict=False)
        assert type(found) is tuple
        torch.testing.assert_close(found, wanted)

    def test_its_errors_are_its_own(self, both):
        with pytest.raises(ValueError, match="channel dimension"):
            both[1](torch.rand(1, 4, 32, 32))

    def test_the_configuration_is_kept(self, both):
        assert both[1].config.num_channels == 3
        assert "transformers" in sys.modules


def test_wrappers_are_looked_through(images):
    source = small().double()
    wrapped = nn.DataParallel(torch.compile(source))
    fast = fastres.optimize(wrapped.eval(), example_input=images)
    with torch.no_grad():
        torch.testing.assert_close(fast(images), source(images))
    assert not fast.plan().fallbacks


def test_a_shell_is_not_optimized_again(source, images):
    fast = fastres.optimize(source, verify=False)
    with pytest.raises(TypeError, match="FastShell already"):
        fastres.optimize(fast)
