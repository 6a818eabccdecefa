"""A fastres network and its torchvision twin, put through the same random life.

Whatever is done to both, they answer the same: bit for bit where ordinary PyTorch runs, within
twice PyTorch's own error where the engine runs; and the engine runs exactly where it should.
"""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import torch
from fused import executions, rms
from helpers import adversarial_, real_images
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tolerance import allowed_error
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torchvision.models.resnet import BasicBlock, ResNet

import fastres

PATHS = ("", "conv1", "bn1", "layer1", "layer1.0.bn2", "layer2.0", "layer2.0.downsample.1", "fc")
CONVS = ("conv1", "layer1.0.conv2", "layer2.0.downsample.0")
NORMS = ("bn1", "layer1.0.bn1", "layer2.0.downsample.1")
OPTIMIZERS = {
    "SGD": lambda p, **how: torch.optim.SGD(p, lr=0.02, momentum=0.5, **how),
    "AdamW": lambda p, **how: torch.optim.AdamW(p, lr=0.01, **how),
}
SEEN: Counter[str] = Counter()
"""How often each way of running was compared, over all examples."""

paths, convs, norms, seeds = map(st.sampled_from, (PATHS, CONVS, NORMS, range(4)))


def pair(seed: int) -> tuple[nn.Module, nn.Module]:
    """Ours and torchvision's, of two stages, with the same adversarial weights, in eval mode."""
    theirs = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=6)
    theirs.layer3, theirs.layer4 = nn.Sequential(), nn.Sequential()
    theirs.fc = nn.Linear(128, 6)
    ours = fastres.ResNet(fastres.BasicBlock, [1, 1], num_classes=6)
    return adversarial_(ours, seed), adversarial_(theirs, seed)


def doubling(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
    """A forward hook; at module level, so that it pickles."""
    return 2 * out


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """Bounded, so that no number of steps makes the weights diverge."""
    return model(x).tanh().square().mean()


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    """The same bits; NaN is equal to NaN."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(3.5), b.nan_to_num(3.5))


class Pair(RuleBasedStateMachine):
    """Each rule does one thing to both; after each the two are compared."""

    @initialize(seed=seeds)
    def build(self, seed: int) -> None:
        self.both = pair(seed)
        self.handles: list[tuple] = []
        self.dtype = torch.float32

    @property
    def ours(self) -> nn.Module:
        return self.both[0]

    @property
    def theirs(self) -> nn.Module:
        return self.both[1]

    def parts(self, path: str) -> list[nn.Module]:
        return [m.get_submodule(path) for m in self.both]

    def parametrized(self) -> bool:
        return any(parametrize.is_parametrized(m) for m in self.theirs.modules())

    def fusible(self) -> bool:
        """Whether inference without gradients should run the engine."""
        norms = (m for m in self.theirs.modules() if isinstance(m, nn.BatchNorm2d))
        training = any(m.training for m in (self.theirs, *norms))  # the others do not heed it
        return not (training or self.handles or self.parametrized())

    @invariant()
    def same_answers(self) -> None:
        if hasattr(self, "both"):
            self.compare(real_images(3, 24).to(self.dtype))

    @torch.no_grad()
    def compare(self, x: Tensor) -> None:
        """Both answer ``x`` alike; training forwards move both statistics alike."""
        before = x.clone()
        with executions() as ran:
            ours = self.ours(x)
        theirs = self.theirs(x)
        assert torch.equal(x, before)
        self.judge(ours, theirs, x, bool(ran))

    def judge(self, ours: Tensor, theirs: Tensor, x: Tensor, ran: bool) -> None:
        assert ran == self.fusible(), f"engine ran: {ran}"
        SEEN["engine" if ran else "PyTorch"] += 1
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        if not ran:
            assert equal(ours, theirs)
            return
        with torch.autocast("cpu", enabled=False):
            exact = copy.deepcopy(self.theirs).double()(x.double())
        # The rule of two; the floor of four units covers answers that PyTorch rounds well. Float64
        # has no wider truth: PyTorch's error is 0 there, and large values cancel in small answers.
        units = 256 if ours.dtype is torch.float64 else 4
        error, own = rms(ours - exact), rms(theirs - exact)
        allowed = allowed_error(own, rms(exact), ours.dtype, units)
        assert error <= allowed, f"error {error:.3g}, PyTorch's {own:.3g}"

    def same_state(self) -> None:
        ours, theirs = (m.state_dict() for m in self.both)
        assert list(ours) == list(theirs)
        assert not [name for name in ours if not equal(ours[name], theirs[name])]
        for name, parameter in self.ours.named_parameters():
            other = self.theirs.get_parameter(name)
            assert parameter.requires_grad == other.requires_grad, name
            assert equal(parameter.grad, other.grad), f"gradient of {name}"

    @rule(n=st.integers(0, 3), size=st.sampled_from([7, 17, 32]), last=st.booleans())
    def other_sizes(self, n: int, size: int, last: bool) -> None:
        x = real_images(4, size)[:n].to(self.dtype)
        training = any(m.training for m in self.theirs.modules())
        if n > 1 or not training:  # statistics of one pixel are refused
            self.compare(x.contiguous(memory_format=torch.channels_last) if last else x)

    @rule()
    def inference_mode(self) -> None:
        with torch.inference_mode():
            self.compare(real_images(3, 24).to(self.dtype))

    @precondition(lambda self: self.dtype is torch.float32)
    @rule(dtype=st.sampled_from([torch.bfloat16, torch.float16]))
    def autocast(self, dtype: torch.dtype) -> None:
        with torch.autocast("cpu", dtype):
            self.compare(real_images(4, 24))

    @rule(of_input=st.booleans())
    def backward(self, of_input: bool) -> None:
        """Gradients of both, in whatever mode they are."""
        grads = []
        for m in self.both:
            m.zero_grad()
            x = real_images(3, 24).to(self.dtype).requires_grad_(of_input)
            with executions() as ran:
                loss = loss_of(m, x)
            if loss.requires_grad:
                assert not ran
                loss.backward()
            grads.append(x.grad)
        assert equal(*grads)
        self.same_state()

    @precondition(lambda self: any(p.requires_grad for p in self.theirs.parameters()))
    @rule(name=st.sampled_from(list(OPTIMIZERS)), how=st.sampled_from(["fused", "foreach", "loop"]))
    def optimizer_step(self, name: str, how: str) -> None:
        options = {"fused": how == "fused", "foreach": how == "foreach"}
        for m in self.both:
            wanted = [p for p in m.parameters() if p.requires_grad]
            optimizer = OPTIMIZERS[name](wanted, **options)
            optimizer.zero_grad()
            loss_of(m, real_images(3, 24).to(self.dtype)).backward()
            optimizer.step()
        self.same_state()

    @rule(path=paths | norms, training=st.booleans())
    def mode(self, path: str, training: bool) -> None:
        for m in self.parts(path):
            m.train(training)

    @rule()
    def all_in_eval_mode(self) -> None:
        for m in self.both:
            m.eval()

    @rule(path=paths, wanted=st.booleans())
    def requires_grad(self, path: str, wanted: bool) -> None:
        for m in self.parts(path):
            m.requires_grad_(wanted)

    @rule(dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64]))
    def to(self, dtype: torch.dtype) -> None:
        for m in self.both:
            m.to(dtype)
        self.dtype = dtype

    @precondition(lambda self: not self.parametrized())
    @rule(seed=seeds, assign=st.booleans())
    def load_state_dict(self, seed: int, assign: bool) -> None:
        classes = self.theirs.fc.out_features
        for m, source in zip(self.both, pair(seed), strict=True):
            state = source.to(self.dtype).state_dict()
            state["fc.weight"], state["fc.bias"] = (
                state[name][:classes].clone() for name in ("fc.weight", "fc.bias")
            )
            m.load_state_dict(state, assign=assign)
        self.same_state()

    @precondition(lambda self: not self.parametrized())
    @rule(seed=seeds)
    def functional_call(self, seed: int) -> None:
        state = pair(seed)[1].to(self.dtype).state_dict()
        for name in ("fc.weight", "fc.bias"):
            state[name] = state[name][: self.theirs.fc.out_features]
        x = real_images(3, 24).to(self.dtype)
        with torch.no_grad():
            with executions() as ran:
                ours = functional_call(self.ours, copy.deepcopy(state), (x,))
            theirs = functional_call(self.theirs, copy.deepcopy(state), (x,))
            if not ran:
                assert equal(ours, theirs)
                return
            kept = copy.deepcopy(self.theirs.state_dict())
            self.theirs.load_state_dict(state)
            self.judge(ours, theirs, x, bool(ran))
            self.theirs.load_state_dict(kept)

    @rule(classes=st.integers(2, 6))
    def swap_fc(self, classes: int) -> None:
        fc = adversarial_(nn.Linear(128, classes), classes).to(self.dtype)
        fc.train(self.theirs.fc.training)
        for m in self.both:
            m.fc = copy.deepcopy(fc)
        self.handles = [h for h in self.handles if h[0] != "fc"]

    @precondition(lambda self: len(self.handles) < 2)
    @rule(path=st.sampled_from([p for p in PATHS if p]))
    def hook(self, path: str) -> None:
        self.handles.append((path, [m.register_forward_hook(doubling) for m in self.parts(path)]))

    @precondition(lambda self: self.handles)
    @rule()
    def unhook(self) -> None:
        for m in self.both:
            for inner in m.modules():
                inner._forward_hooks.clear()
        self.handles = []

    @rule(how=st.sampled_from(["deepcopy", "copy", "pickle"]))
    def replace_by_copies(self, how: str) -> None:
        if how == "pickle" and self.parametrized():
            return
        copies = {
            "deepcopy": copy.deepcopy,
            "copy": copy.copy,
            "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        }
        self.both = tuple(map(copies[how], self.both))

    @rule(path=convs, factor=st.sampled_from([-1.0, 0.5, 1.25]), data=st.booleans())
    def change_weight(self, path: str, factor: float, data: bool) -> None:
        """In place, or a new tensor behind ``.data``."""
        for m in self.parts(path):
            tensors = [p for name, p in m.named_parameters() if name != "bias"]
            with torch.no_grad():
                for p in tensors:
                    if data:
                        p.data = p.data * factor
                    else:
                        p.mul_(factor)

    @rule(path=norms, what=st.sampled_from(["mean", "var", "eps", "reset", "affine"]))
    def change_norm(self, path: str, what: str) -> None:
        for m in self.parts(path):
            with torch.no_grad():
                if what == "mean":
                    m.running_mean += 0.25
                elif what == "var":
                    m.running_var = m.running_var * 1.5
                elif what == "eps":
                    m.eps = 0.5 if m.eps < 0.4 else 1e-3
                elif what == "reset":
                    m.reset_running_stats()
                else:
                    m.weight, m.bias = nn.Parameter(-m.weight), nn.Parameter(m.bias + 0.5)

    @rule(path=convs, on=st.booleans())
    def weight_norm(self, path: str, on: bool) -> None:
        for m in self.parts(path):
            if on and not parametrize.is_parametrized(m):
                parametrizations.weight_norm(m)
            elif not on and parametrize.is_parametrized(m):
                parametrize.remove_parametrizations(m, "weight")
