"""In a shell the source's own Python meets its own modules; only the forward of parts is fused."""

import copy
import pickle
import warnings
from threading import Barrier, Thread

import pytest
import torch
import torchvision
from helpers import adversarial_, real_images
from torch import nn
from zoo import _huggingface

import fastres
from fastres.errors import VerificationError
from fastres.frontends.fast_shell import FastShell


def block(ins=3, outs=8):
    return nn.Sequential(nn.Conv2d(ins, outs, 3, padding=1), nn.BatchNorm2d(outs), nn.ReLU())


class Branching(nn.Module):
    """torch.fx cannot trace it: it looks at its input."""

    def forward(self, x, *args, **kwargs):
        return x if x.sum() > 1e9 else self.run(x, *args, **kwargs)


class Options(Branching):
    def __init__(self):
        super().__init__()
        self.a, self.scale, self.fc = block(), 2.0, nn.Linear(8, 5)

    def run(self, x, tokens=None, flat=False):
        y = self.a(x) * self.scale
        if flat:
            return y.as_strided((len(y), y[0].numel()), (y[0].numel(), 1))
        return self.fc(y.mean((2, 3))) if tokens is None else y.view(len(y), -1, tokens)


@pytest.fixture
def images():
    return real_images(2, 16).double()


@pytest.fixture
def source():
    return adversarial_(Options()).double()


def hugging_face():
    small = {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8, "num_labels": 3}
    return adversarial_(_huggingface("basic", **small)).double()


def answer(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


def same(fast, source, *args, **kwargs):
    """The source's answer, at each of three calls."""
    wanted = answer(source, *args, **kwargs)
    for _ in range(3):
        found = fast(*args, **kwargs)
        assert type(found) is type(wanted)
        torch.testing.assert_close(found, wanted)


def same_eps_(model, other):
    for ours, theirs in zip(model.modules(), other.modules(), strict=True):
        if hasattr(theirs, "eps"):
            ours.eps = theirs.eps


class Whole(nn.Module):
    """torch.fx traces it."""

    def __init__(self):
        super().__init__()
        self.a, self.fc = block(), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.a(x).mean((2, 3)))


@pytest.mark.fault(47)
@pytest.mark.parametrize("build", [Options, Whole, hugging_face])
def test_first_calls_of_eight_threads(build, images):
    source = build() if build is hugging_face else adversarial_(build()).double()
    images = real_images(2, 32).double()
    wanted = getattr(answer(source, images), "logits", None)
    wanted = answer(source, images) if wanted is None else wanted
    for _ in range(4):
        fast, together, found = fastres.optimize(source), Barrier(8), []

        def call(fast=fast, together=together, found=found):
            together.wait()
            output = fast(images)
            found.append(getattr(output, "logits", output))

        threads = [Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8
        for output in found:
            torch.testing.assert_close(output, wanted)


@pytest.mark.fault(47)
def test_one_thread_compares_and_the_others_wait(images):
    fast, seen, together = fastres.optimize(adversarial_(Whole()).double()), [], Barrier(4)
    check = fast._pending
    fast._pending = lambda *args: (seen.append(1), check(*args))

    def call():
        together.wait()
        fast(images)

    threads = [Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1]


@pytest.mark.fault(48)
@pytest.mark.parametrize(
    "options", [{"tokens": 16}, {"tokens": 32}, {"flat": True}, {"flat": False}]
)
def test_an_option_after_a_call_without_it(source, images, options):
    fast = fastres.optimize(source, example_input=images)
    assert fast.channels_last
    same(fast, source, images, **options)
    same(fast, source, images)


@pytest.mark.fault(48)
def test_a_view_that_only_some_values_reach(images):
    class Late(Branching):
        def __init__(self):
            super().__init__()
            self.a = block()

        def run(self, x):
            y = self.a(x)
            return y.mean((2, 3)) if x.mean() < 10 else y.view(len(y), -1)

    source = adversarial_(Late()).double()
    fast = fastres.optimize(source, example_input=images)
    same(fast, source, images)
    same(fast, source, images + 100)


@pytest.mark.fault(48)
def test_a_callers_mistake_is_the_sources_error(source, images):
    fast = fastres.optimize(source, example_input=images)
    for model in (source, fast):
        with pytest.raises(RuntimeError, match="shape '.2, -1, 7.' is invalid"):
            answer(model, images, tokens=7)


@pytest.mark.fault(48)
def test_a_state_is_advanced_once_per_call(images):
    class Counting(Branching):
        def __init__(self):
            super().__init__()
            self.a, self.calls = block(), 0
            self.register_buffer("seen", torch.zeros(()))

        def run(self, x):
            self.calls += 1
            self.seen += 1
            return self.a(x) * self.calls + self.seen

    source = adversarial_(Counting()).double()
    fast = fastres.optimize(source)
    twin = copy.deepcopy(source)
    for _ in range(3):
        torch.testing.assert_close(fast(images), answer(twin, images))
    assert (fast.calls, int(fast.seen), source.calls, int(source.seen)) == (3, 3, 0, 0)


CHANGES = {
    "a number": lambda m: setattr(m, "scale", 5.0),
    "a layer": lambda m: setattr(m, "fc", nn.Linear(8, 5, False).double().requires_grad_(False)),
    "a layer inside a part": lambda m: m.a.__setitem__(2, nn.Tanh()),
    "a number inside a part": lambda m: setattr(m.a[1], "eps", 3.0),
    "a new attribute inside a part": lambda m: setattr(m.a[2], "forward", torch.sin),
    "a stride": lambda m: setattr(m.a[0], "stride", (2, 2)),
    "other weights": lambda m: setattr(m.a[0], "weight", nn.Parameter(m.a[0].weight.flip(0))),
    "weights in place": lambda m: m.a[1].running_var.mul_(3),
    "a hook": lambda m: m.a[0].register_forward_hook(lambda module, args, out: out * 2) and None,
    "a state_dict": lambda m: m.load_state_dict(adversarial_(Options(), 7).double().state_dict()),
}


@pytest.mark.fault(50)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:a runs as ordinary PyTorch")
def test_what_is_set_on_a_shell_has_effect(source, images, change, when):
    fast = fastres.optimize(source, example_input=images if when == "after" else None)
    twin = copy.deepcopy(source)
    with torch.no_grad():
        for model in (twin, fast):
            torch.manual_seed(0)
            CHANGES[change](model)
    assert not torch.allclose(answer(twin, images), answer(source, images))
    same(fast, twin, images)
    same(copy.deepcopy(fast), twin, images)


@pytest.mark.fault(50)
def test_a_part_that_was_changed_says_so(source, images):
    fast = fastres.optimize(source, example_input=images)
    fast.a[2] = nn.Tanh()
    with pytest.warns(UserWarning, match="a runs as ordinary PyTorch: it was changed"):
        fast(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(images)
    reasons = {step.where: reason for step, reason in fast.plan().fallbacks}
    assert "it was changed" in reasons["a.0"]
    assert "around the fused parts" in reasons["fc"]
    assert not fast.plan().fused


@pytest.mark.fault(50)
def test_the_score_threshold_of_a_detector():
    options = {"weights": None, "weights_backbone": None, "min_size": 64, "max_size": 64}
    source = torchvision.models.detection.fasterrcnn_resnet50_fpn(**options)
    source = adversarial_(source)
    images = [real_images(1, 64)[0]]
    fast = fastres.optimize(source, verify=False)
    assert len(fast(images)[0]["boxes"])
    fast.roi_heads.score_thresh = 2.0
    assert not len(fast(images)[0]["boxes"])
    assert source.roi_heads.score_thresh == 0.05


@pytest.mark.fault(50)
@pytest.mark.parametrize(
    "name", ["fc", "layer1", "conv1", "inplanes", "groups", "dtype", "backend", "block_size"]
)
def test_what_cannot_have_effect_is_an_error(name, tmp_path):
    class Sized(torchvision.models.ResNet):
        block_size = 4

    block = torchvision.models.resnet.BasicBlock
    fast = fastres.optimize(adversarial_(Sized(block, [1, 1, 1, 1])), verify=False)
    fastres.save(fast, tmp_path / "fused.safetensors")
    twins = [fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))]
    if name != "block_size":  # a class's attribute that no step names is not in the file
        twins.append(fastres.load(tmp_path / "fused.safetensors"))
    for model in twins:
        with pytest.raises(AttributeError, match=f"{name} cannot be set on a FastModel"):
            setattr(model, name, nn.Identity())
    fast.out_channels = 512  # as torchvision's detectors ask of a backbone; the source has none
    assert fast.out_channels == 512


@pytest.mark.fault(54)
def test_parameters_and_devices(images):
    source = adversarial_(Whole()).double()
    fast = fastres.optimize(source, example_input=images)
    first = next(fast.parameters())
    assert (first.device, first.dtype) == (fast.device, torch.float64)
    folded = sum(p.numel() for p in source.parameters()) - 2 * 8  # gamma and beta are folded
    assert sum(p.numel() for p in fast.parameters()) == folded
    assert not any(p.requires_grad for p in fast.parameters())


@pytest.mark.fault(54)
def test_a_shells_are_the_sources(images):
    source = hugging_face()
    fast = fastres.optimize(source)
    assert (fast.device, fast.dtype) == (source.device, source.dtype)
    assert fast.num_parameters() == source.num_parameters()
    for kind in ("parameters", "buffers", "modules"):
        assert len(list(getattr(fast, kind)())) == len(list(getattr(source, kind)()))
    for (name, ours), (path, theirs) in zip(
        fast.named_parameters(), source.named_parameters(), strict=True
    ):
        assert name == path
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()


@pytest.mark.fault(65)
def test_save_pretrained_writes_the_sources_state(tmp_path):
    source, images = hugging_face().float(), real_images(2, 32)
    fast = fastres.optimize(source, example_input=images)
    fast.save_pretrained(tmp_path / "fused")
    source.save_pretrained(tmp_path / "source")
    read = type(source).from_pretrained(tmp_path / "fused").eval()
    same_eps_(read, source)
    assert list(read.state_dict()) == list(source.state_dict())
    for name, tensor in source.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)
        assert torch.equal(fast.state_dict()[name], tensor)
    again = fastres.optimize(read, example_input=images)
    torch.testing.assert_close(again(images).logits, fast(images).logits)
    with pytest.raises(TypeError, match="save_pretrained"):
        fastres.save(fast, tmp_path / "fused.safetensors")


@pytest.mark.fault(65)
@pytest.mark.filterwarnings("ignore:a runs as ordinary PyTorch")
def test_a_state_that_is_loaded_is_served(source, images):
    fast = fastres.optimize(source, example_input=images)
    other = adversarial_(Options(), 3).double()
    same_eps_(other, source)
    fast.load_state_dict(other.state_dict())
    same(fast, other, images)
    holder = nn.ModuleDict({"model": fast})
    state = {f"model.{name}": tensor for name, tensor in source.state_dict().items()}
    assert list(holder.state_dict()) == list(state)
    holder.load_state_dict(state)
    same(fast, source, images)


class Loops(Branching):
    def __init__(self, ways):
        super().__init__()
        self.blocks = nn.Sequential(block(), block(8), block(8), block(8))
        self.ways = ways

    def run(self, x):
        found = []
        for way in self.ways:
            found.append(way(self.blocks, x))
        return found


def by_loop(blocks, x):
    for each in blocks:
        x = each(x)
    return x


def by_children(blocks, x):
    for _, each in blocks.named_children():
        x = each(x)
    return x


WAYS = {
    "called": lambda blocks, x: blocks(x),
    "looped over": by_loop,
    "its children": by_children,
    "indexed": lambda blocks, x: blocks[0](x),
    "sliced": lambda blocks, x: blocks[:2](x),
    "by length": lambda blocks, x: blocks[len(blocks) - 4](x),
    "its weights": lambda blocks, x: x * blocks[0][0].weight.sum() + blocks[-1][1].running_mean[0],
    "forward itself": lambda blocks, x: blocks.forward(x),
}


@pytest.mark.fault(67)
@pytest.mark.parametrize("way", WAYS)
def test_containers_in_every_way(images, way):
    source = adversarial_(Loops([WAYS[way], WAYS["called"]])).double()
    fast = fastres.optimize(source)
    same(fast, source, images)
    assert len(fast.blocks) == 4
    assert fast.plan().fused


class Chain(nn.Sequential):
    def forward(self, x):
        return x if x.sum() > 1e9 else super().forward(x)


@pytest.mark.fault(67)
def test_a_shell_that_is_a_container(images):
    source = adversarial_(Chain(nn.Sequential(block(), block(8)), nn.Flatten())).double()
    for fast in (fastres.optimize(source), pickle.loads(pickle.dumps(fastres.optimize(source)))):
        assert isinstance(fast, FastShell)
        assert len(fast) == 2
        assert [type(each) for each in fast] == [type(each) for each in source]
        assert type(fast[1]) is nn.Flatten
        same(fast, source, images)


class Encoder(nn.Module):
    """As segmentation_models_pytorch's: properties, and other methods than forward."""

    classes = 3

    def __init__(self):
        super().__init__()
        self.stem, self.body = block(), block(8, 8)
        self.depth = 2

    @property
    def output_stride(self):
        return 2**self.depth

    def forward(self, x):
        return [x, self.body(self.stem(x))]

    def first(self, x):
        return self.stem(x)


ASKED = {
    "its class": lambda e, y: isinstance(e, Encoder) and type(e) is Encoder,
    "a property": lambda e, y: e.output_stride,
    "a class's attribute": lambda e, y: e.classes,
    "hasattr": lambda e, y: hasattr(e, "stem") and not hasattr(e, "folded"),
    "counts": lambda e, y: (len(list(e.modules())), sum(p.numel() for p in e.parameters())),
    "an attribute that is set": lambda e, y: setattr(e, "seen", 3) or e.seen,
    "weights": lambda e, y: e.stem[0].weight.sum(),
    "a method": lambda e, y: e.first(y[0]),
    "a child": lambda e, y: e.body(e.stem(y[0])),
    "the state": lambda e, y: list(e.state_dict()),
    "its device": lambda e, y: next(e.parameters()).device,
    "its signature": lambda e, y: __import__("inspect").signature(e.forward).parameters.keys(),
    "its training": lambda e, y: [m.training for m in e.modules()],
}


@pytest.mark.fault(83)
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.filterwarnings("ignore:encoder runs as ordinary PyTorch")
def test_what_the_sources_python_sees_of_a_part(images, asked):
    class Net(Branching):
        def __init__(self):
            super().__init__()
            self.encoder = Encoder()

        def run(self, x):
            features = self.encoder(x)
            answer = ASKED[asked](self.encoder, features)
            return answer if isinstance(answer, torch.Tensor) else ([str(answer)], features[1])

    source = adversarial_(Net()).double()
    fast = fastres.optimize(source)
    wanted = answer(source, images)
    for _ in range(2):
        found = fast(images)
        assert type(found) is type(wanted)
        if not isinstance(wanted, torch.Tensor):
            assert found[0] == wanted[0]
            found, expected = found[1], wanted[1]
        else:
            expected = wanted
        torch.testing.assert_close(found, expected)
    assert len(fast.plan().fused) == (0 if asked == "an attribute that is set" else 2)


@pytest.mark.fault(83)
def test_the_smallest_case():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

        def forward(self, x):
            if x.sum() > 1e9:
                return x
            y = self.stem(x)
            return [y] if isinstance(self.stem, nn.Sequential) else y

    source = adversarial_(Net())
    same(fastres.optimize(source), source, real_images(2, 16))


@pytest.mark.fault(83)
def test_gradients_of_a_part_that_is_called_directly(source, images):
    fast = fastres.optimize(source, example_input=images)
    x, y = images.clone().requires_grad_(), images.clone().requires_grad_()
    with pytest.warns(UserWarning, match="gradients are wanted"):
        fast.a(x).square().sum().backward()
    source.a(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


class Baked(nn.Module):
    """torch.fx records the branch for what is no Tensor, without a word."""

    def __init__(self, right=lambda y: y * 2, wrong=lambda y: y):
        super().__init__()
        self.a, self.right, self.wrong = block(), right, wrong

    def forward(self, x):
        y = self.a(x)
        return self.right(y) if isinstance(x, torch.Tensor) else self.wrong(y)


FORMS = {
    "twice the value": (lambda y: y * 2, lambda y: y),
    "a list": (lambda y: [y], lambda y: y),
    "a tuple": (lambda y: (y, y), lambda y: [y, y]),
    "other keys": (lambda y: {"a": y}, lambda y: {"b": y}),
    "more": (lambda y: (y, 3), lambda y: (y, 4)),
}


@pytest.mark.fault(84)
@pytest.mark.parametrize("form", FORMS)
def test_a_copy_that_is_refused_is_never_served(images, form):
    fast = fastres.optimize(adversarial_(Baked(*FORMS[form])).double())
    unseen = copy.deepcopy(fast)
    for model in (fast, fast, copy.deepcopy(fast), unseen, unseen):
        for size in (1, 2):
            with pytest.raises(VerificationError, match="differ"):
                model(images[:size])
    with pytest.raises(VerificationError, match="differ"):
        pickle.loads(pickle.dumps(fast))(images)
    with pytest.raises(VerificationError, match="differ"):
        torch.compile(fast, backend="eager")(images)


@pytest.mark.fault(84)
@pytest.mark.parametrize("form", FORMS)
def test_a_part_that_is_wrong_is_not_fused(images, form):
    class Net(Branching):
        def __init__(self):
            super().__init__()
            self.right, self.wrong = block(), Baked(*FORMS[form])

        def run(self, x):
            return self.right(x), self.wrong(x)

    source = adversarial_(Net()).double()
    fast = fastres.optimize(source)
    with pytest.warns(UserWarning, match="wrong runs as ordinary PyTorch: .*differ"):
        fast(images)
    same(fast, source, images)
    same(copy.deepcopy(fast).cpu(), source, images)
    assert fast.verification.ok
    assert {step.where for step in fast.plan().fused} == {"right.0"}
    assert all("differ" in why for step, why in fast.plan().fallbacks)


@pytest.mark.fault(84)
def test_another_type_of_argument_is_not_what_was_checked(images):
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = block()

        def forward(self, x, weight):
            return self.a(x) * (3 if isinstance(weight, float) else weight)

    class Net(Branching):
        def __init__(self):
            super().__init__()
            self.either = Either()

        def run(self, x, weight):
            return self.either(x, weight)

    source = adversarial_(Net()).double()
    fast = fastres.optimize(source)
    same(fast, source, images, images.sum())
    assert fast.plan().fused
    with pytest.warns(UserWarning, match="other types"):
        fast(images, 2.0)
    same(fast, source, images, 2.0)


@pytest.mark.fault(84)
def test_rounding_that_reorders_boxes_is_no_fault():
    """Each part is compared on its own inputs: equal scores may come in another order."""

    class Ties(Branching):
        def __init__(self):
            super().__init__()
            self.a = block()

        def run(self, x):
            scores = self.a(x).flatten(1)
            return (scores / scores.max() * 1e-3 + 1.0).sort(1, descending=True)

    source = adversarial_(Ties())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = fastres.optimize(source, example_input=real_images(2, 16))
    assert fast.verification.ok
