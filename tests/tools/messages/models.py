"""Cases: building, calling, optimising and comparing models."""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from fused import small
from helpers import real_images
from torch import nn

import fastres
from fastres.backends import kernel_choice, select
from fastres.frontends.dynamo import fastres as compile_backend
from fastres.graph import fold
from fastres.models.features import features
from fastres.models.preprocess import Normalize
from fastres.runtime import live
from messages.provoke import add, case


def images(n: int = 2, size: int = 16) -> torch.Tensor:
    return real_images(n, size)


def quiet(model: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(*args, **kwargs)


def half_in_half() -> nn.Module:
    model = small()
    model.fc.half()
    return model


def fast(source: nn.Module | None = None, **kwargs: Any) -> Any:
    return fastres.optimize(source or small(), verify=False, **kwargs)


RESNET = {
    "no such stem": {"stem": "tiny"},
    "no such stride_on": {"stride_on": "5x5"},
    "no channels": {"in_chans": 0},
    "classes that are no integer": {"num_classes": 2.5},
    "no stages": {"layers": []},
    "v1 of a BasicBlock": {"stride_on": "1x1"},
    "two flags of dilation": {"replace_stride_with_dilation": [True, False]},
    "groups of a BasicBlock": {"groups": 2},
    "no such backend": {"backend": "tpu"},
}
for name, kwargs in RESNET.items():
    arguments = {"layers": [1, 1], "num_classes": 5, "planes": 8, **kwargs}
    add(f"ResNet: {name}", lambda a=arguments: fastres.ResNet(fastres.BasicBlock, **a))

add("create_model: a name that is close", lambda: fastres.create_model("resnet5"))
add("create_model: a name that is not", lambda: fastres.create_model("vgg"))
add(
    "create_model: an argument that makes the variant",
    lambda: fastres.create_model("resnext50_32x4d", groups=2),
)

add("reset_classifier: another pooling", lambda: small().reset_classifier(7, "max"))
add("reset_classifier: classes of no pooling", lambda: small().reset_classifier(7, ""))

add("call: another rank", lambda: quiet(small(), images()[0]))
add("call: another number of channels", lambda: quiet(small(), images()[:, :2]))
add("call: another dtype", lambda: quiet(small(), images().double()))
add("call: an image that is too small", lambda: quiet(small(stem="imagenet"), images()[..., :0]))
add("call: no image at all", lambda: quiet(fast(), "photo.jpg"))


@case("call: weights on another device")
def _() -> None:
    model = small()
    with mock.patch.object(live.Live, "_first_weight", return_value=torch.empty(1, device="meta")):
        quiet(model, images())


@case("call: Triton on a CPU tensor")
def _() -> None:
    with mock.patch.object(select, "_interpreting", return_value=False):
        quiet(small(backend="triton"), images())


@case("call: Triton that is not installed")
def _() -> None:
    saved = sys.modules.pop("fastres.kernels", None)
    kept = fastres.__dict__.pop("kernels", None)
    try:
        with mock.patch.dict(sys.modules, {"fastres.kernels": None}):
            select.select_ops("triton", torch.device("cuda"), torch.float16)
    finally:
        if saved is not None:
            sys.modules["fastres.kernels"] = saved
        if kept is not None:
            fastres.kernels = kept


@case("call: new weights inside a capture")
def _() -> None:
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True):
        live._refuse_during_capture(SimpleNamespace(device=torch.device("cuda")))


def measurements(content: str) -> None:
    Path("tuned.json").write_text(content)
    kernel_choice._machines(Path("tuned.json"))


add("kernels: no such kernel", lambda: kernel_choice.only("winograd"))


@case("kernels: no time to measure for")
def _() -> None:
    with mock.patch.dict(os.environ, {"FASTRES_TUNE": "fast"}):
        kernel_choice.tuning_seconds()


add("measurements: no such thing", lambda: measurements("[]"))
add("measurements: another format", lambda: measurements('{"format": 99}'))
add("measurements: no batch size", lambda: kernel_choice._batch("-1"))
add(
    "measurements: negative seconds",
    lambda: kernel_choice._measurement({"seconds": {"unfused": -1}, "excluded": {}}),
)


class Branching(nn.Module):
    """Python that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else -self.conv(x)


class Starred(nn.Module):
    """Arguments that torch.fx records wrongly."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, *xs):
        return self.conv(xs[0])


class Parts(Branching):
    """One part that can be fused, inside Python that cannot; ``also`` goes into the answer."""

    def __init__(self, also: Any = None) -> None:
        super().__init__()
        self.conv, self.also = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), also

    def forward(self, x):
        found = super().forward(x)
        return found if self.also is None else (found, self.also(self))


add("plan: of a model in training mode", lambda: small().train().plan())
add("warmup: of a model in training mode", lambda: small().train().warmup([(1, 3, 16, 16)]))
add("LiveModule: without _forward_impl", lambda: live.LiveModule("auto")(images()))

add("optimize: a name instead of a model", lambda: fastres.optimize("resnet18"))
add("optimize: twice", lambda: fastres.optimize(fast()))
add("optimize: training mode", lambda: fastres.optimize(small().train()))
add("optimize: no such backend", lambda: fast(backend="cuda"))
add("optimize: no such dtype", lambda: fast(dtype=torch.int8))
add("optimize: a dictionary as example", lambda: fast(example_input={"x": images()}))
add("optimize: a script", lambda: fast(torch.jit.script(small())))
add("optimize: no values", lambda: fast(small().to("meta")))
add("optimize: half of it in another dtype", lambda: fast(half_in_half(), dtype=torch.half))
add("optimize: Python that cannot be traced", lambda: fast(Branching().eval()))
add(
    "optimize: a part with all convolutions that cannot be traced",
    lambda: fast(nn.Sequential(Branching()).eval()),
)
add("optimize: arguments that cannot be traced", lambda: fast(Starred().eval()))
add(
    "optimize: an example that is not finite",
    lambda: fastres.optimize(small(), example_input=images() * float("inf")),
)


@case("optimize: a forward that stores what it computes")
def _() -> None:
    class Storing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = x
            return x

    fast(Storing().eval())


@case("optimize: a hook of an object's, on all that there is to fuse")
def _() -> None:
    class Owner:
        def hook(self, *_: Any) -> None: ...

    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1))).eval()
    model[0].register_forward_hook(Owner().hook)
    fast(model)


@case("optimize: hooks on the model")
def _() -> None:
    model = small()
    model.register_forward_hook(lambda *_: None)
    fastres.optimize(model)


@case("optimize: a forward of the instance")
def _() -> None:
    model = small()
    model.forward = lambda x: x
    fastres.optimize(model)


@case("optimize: two devices")
def _() -> None:
    fastres.optimize(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1, device="meta")).eval())


@case("optimize: a negative variance")
def _() -> None:
    model = small()
    model.layer2[0].bn2.running_var[1] = -1
    fast(model)


@case("optimize: a fold that float16 cannot hold")
def _() -> None:
    model = small()
    with torch.no_grad():
        model.bn1.bias[2] = 1e5
    fast(model, dtype=torch.float16)


def wrong_fold(dtype: torch.dtype) -> None:
    exact = fold.folded_conv

    def shifted(op, *rest):
        weight, bias = exact(op, *rest)
        return weight, bias + 1

    with mock.patch.object(fold, "folded_conv", shifted):
        fastres.optimize(small(), example_input=images(), dtype=dtype)


add("optimize: an answer that is wrong", lambda: wrong_fold(torch.float32))


class AsTuple(Branching):
    """torch.fx records the other branch."""

    def forward(self, x):
        y = self.conv(x)
        return (y,) if isinstance(x, torch.Tensor) else [y]


@case("optimize: an answer of another form")
def _() -> None:
    fastres.optimize(AsTuple().eval(), example_input=images())


@case("optimize: a step that is wrong")
def _() -> None:
    right = SimpleNamespace(ok=True, finite=True)
    with mock.patch("fastres.frontends.optimize.verify", return_value=right):
        wrong_fold(torch.bfloat16)


@case("optimize: a source that changes before the first call")
def _() -> None:
    source = small()
    copied = fastres.optimize(source)
    with torch.no_grad():
        source.fc.weight.mul_(2)
    copied(images())


add("FastModel: training", lambda: fast().train())
add("FastModel: another dtype", lambda: fast().half())
add("FastModel: another layer", lambda: setattr(fast(), "fc", nn.Identity()))
add("FastModel: an input that wants gradients", lambda: fast()(images().requires_grad_()))


@case("FastModel: an input elsewhere")
def _() -> None:
    model = fast()
    with mock.patch.object(type(model), "_home", return_value=torch.device("cuda:0")):
        model(images())


@case("FastModel: the second call of a copy that was refused")
def _() -> None:
    model = fast()
    model._refused = "small and its fused copy differ: error 1 against float64, allowed 0.1"
    model(images())


add("FastShell: training", lambda: fast(Parts().eval()).train())
add("FastShell: another dtype", lambda: fast(Parts().eval()).half())


add("FastShell: another body", lambda: setattr(fast(Parts().eval()), "body", nn.Identity()))
add("verify: no tensor in the answer", lambda: fastres.verify(len, len, [images()]))
add("verify: answers of other shapes", lambda: fastres.verify(torch.sin, torch.sum, [images()]))


@case("verify: a source of random numbers")
def _() -> None:
    fastres.verify(Noisy().eval(), torch.relu, [images()])


@case("optimize: random numbers of fixed shape")
def _() -> None:
    fastres.optimize(Noisy().eval())


@case("optimize: what cannot be copied")
def _() -> None:
    source = small()
    source.names = (name for name in "ab")
    fastres.optimize(source)


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn(3, 1, 1)


def word() -> nn.Module:
    return nn.Sequential(OrderedDict({"in": nn.Conv2d(3, 4, 1)})).eval()


add("features: no model", lambda: features("resnet18", [1]))
add("features: nothing wanted", lambda: features(small(), []))
add("features: a name alone", lambda: features(small(), "layer4"))
add("features: no images", lambda: features(nn.Sequential(nn.Linear(3, 4)), ["0"]))
add("features: numbers and names", lambda: features(small(), [1, "layer1"]))
add("features: no such module", lambda: features(small(), ["layer9"]))
add("features: no map", lambda: features(small(), ["fc"]))
add("features: a word of Python", lambda: features(word(), ["in"]))
add("features: no such map", lambda: features(small(), [7]))
add(
    "features: numbers of another network", lambda: features(nn.Sequential(nn.Conv2d(3, 4, 1)), [0])
)


@case("features: a module that is never called")
def _() -> None:
    model = small()
    model.spare = nn.Conv2d(3, 4, 1)
    features(model.eval(), ["spare"])(images())


add("compile: another option", lambda: torch_compile({"backend": "auto", "fast": True}))
add("compile: another mode", lambda: torch_compile({}, "fastest"))
add("compile: another backend", lambda: torch_compile({"backend": "tpu"}))
add("refresh: no module", lambda: fastres.refresh(len))  # type: ignore[arg-type]
add("refresh: a frozen copy", lambda: fastres.refresh(fastres.optimize(small(), verify=False)))


def torch_compile(options: dict[str, Any], mode: str | None = None) -> None:
    graph = torch.fx.symbolic_trace(nn.Conv2d(3, 4, 1))
    compile_backend(graph, [images()], mode=mode, options=options)


add("Normalize: lengths that differ", lambda: Normalize([0.5], [0.2, 0.2]))
add("Normalize: no spread", lambda: Normalize([0.5], [0.0]))
add("Normalize: one number", lambda: Normalize(0.5, 0.2))  # type: ignore[arg-type]
add("Normalize: not finite", lambda: Normalize([float("nan")], [0.2]))
add("Normalize: no such layout", lambda: Normalize([0.5], [0.2], layout="HWC"))
add("Normalize: transforms without numbers", lambda: Normalize.like(object()))
add("Normalize: floats", lambda: Normalize([0.5] * 3, [0.2] * 3)(images()))
add(
    "Normalize: another rank",
    lambda: Normalize([0.5] * 3, [0.2] * 3)(images().to(torch.uint8)[0]),
)
