"""Row 11 for whole plans: random small networks, fused and by ordinary PyTorch.

A network is a list of steps that any value made so far may feed, with everything in it that a plan
could get wrong: values with several readers, shared modules, norms that follow nothing, sums of a
value with itself, in-place writes into what others still read, steps that are left to PyTorch.
In float64 the two must agree to rounding; in float32 within a few roundings of the largest value.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import fused
import torch
import torch.nn.functional as F
from helpers import adversarial_
from hypothesis import strategies as st
from tolerance import allowed_error
from torch import Tensor, nn

import fastres

Case = dict[str, Any]

near = st.sampled_from([0, 0, 0, 0, 1, 2])  # how many values ago


def convolutions(**usual: Any) -> st.SearchStrategy[Case]:
    """Convolutions of any geometry, or of the ``usual`` one."""
    geometry = {
        "k": st.sampled_from([0, 0, 1, 2, 4, 6]),  # 0: as many as come in
        "window": st.sampled_from([1, 1, 3, 3, 2, 5]),
        "stride": st.sampled_from([1, 1, 1, 2]),
        "padding": st.sampled_from(["same", "same", 0, 1, 2]),
        "dilation": st.sampled_from([1, 1, 2]),
        "groups": st.sampled_from([1, 1, 1, 2, 4]),
        "functional": st.sampled_from([False, False, False, True]),
    }
    fixed = {"op": "conv", **usual}
    return st.fixed_dictionaries(
        {"from": near, "bias": st.booleans(), **geometry}
        | {name: st.just(value) for name, value in fixed.items()}
    )


convs = convolutions()
plain = convolutions(k=0, stride=1, padding="same", dilation=1, groups=1, functional=False)
norms = st.fixed_dictionaries({"op": st.just("norm"), "from": near, "affine": st.booleans()})
relus = st.fixed_dictionaries(
    {
        "op": st.just("relu"),
        "from": near,
        "how": st.sampled_from(["module", "in place", "function", "method_"]),
    }
)
adds = st.fixed_dictionaries(
    {
        "op": st.just("add"),
        "from": near,
        "other": st.integers(0, 6),
        "how": st.sampled_from(["+", "+=", "torch.add", "add_"]),
    }
)
pools = st.fixed_dictionaries(
    {
        "op": st.just("pool"),
        "from": near,
        "kind": st.sampled_from(["max", "max", "average", "adaptive"]),
        "window": st.integers(1, 3),
        "stride": st.integers(1, 2),
        "padding": st.integers(0, 1),
        "ceil_mode": st.booleans(),
    }
)
OTHERS = ["sigmoid", "mul", "cat", "slice", "dropout", "identity", "silu_", "permute", "view"]
others = st.fixed_dictionaries(
    {"op": st.just("other"), "from": near, "kind": st.sampled_from(OTHERS)}
)
repeats = st.fixed_dictionaries({"op": st.just("again"), "from": near, "module": st.integers(0, 5)})
blocks = st.fixed_dictionaries(
    {
        "op": st.just("block"),
        "conv": st.one_of(plain, plain, convs),
        "norm": st.one_of(st.none(), norms),
        "add": st.one_of(st.none(), adds),
        "relu": st.one_of(st.none(), relus),
    }
)
common = (blocks, blocks, convs, norms, relus, adds)
steps = st.one_of(*common, *common, *common, pools, others, repeats)
cases = st.fixed_dictionaries(
    {
        "steps": st.lists(steps, min_size=4, max_size=12),
        "channels": st.sampled_from([1, 3, 4]),
        "size": st.lists(st.integers(1, 12), min_size=2, max_size=2),
        "images": st.integers(1, 3),
        "head": st.sampled_from(["map", "linear", "mean", "tuple", "dict"]),
        "channels_last": st.booleans(),
        "seed": st.integers(0, 2**16),
    }
)


class Net(nn.Module):
    """The network that a case describes; steps that cannot follow one another are left out."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.layers = nn.ModuleList()
        self.program: list[tuple[str, Any, list[int]]] = []
        shapes = [(case["channels"], *case["size"])]
        for step in _flat(case["steps"]):
            added = self._add(step, shapes)
            if added is not None:
                self.program.append(added[:3])
                shapes.append(added[3])
        self.shapes = shapes
        self.fc = nn.Linear(shapes[-1][0], 3)

    def _add(self, step: Case, shapes: list[tuple[int, ...]]) -> Any:
        """(kind, what, operands, shape of the result), or None where the step does not fit."""
        source = len(shapes) - 1 - step["from"] % len(shapes)
        shape = shapes[source]
        if step["op"] == "again":
            return self._again(step, source, shape)
        if step["op"] == "add":
            alike = [i for i, other in enumerate(shapes) if other == shape and i != source]
            other = [*alike[::-1], source][step["other"] % (len(alike) + 1)]
            return "add", step["how"], [source, other], shape
        if step["op"] == "other":
            return self._other(step["kind"], source, shape)
        layer = self._layer(step, shape)
        if layer is None:
            return None
        result = _result(layer, shape)
        if result is None:
            return None
        if step["op"] == "relu" and step["how"] in ("function", "method_"):
            return "relu", step["how"], [source], shape
        self.layers.append(layer)
        how = "functional" if step.get("functional") else "call"
        return how, len(self.layers) - 1, [source], result

    def _layer(self, step: Case, shape: tuple[int, ...]) -> nn.Module | None:
        if step["op"] == "conv":
            k, groups, padding = step["k"] or shape[0], step["groups"], step["padding"]
            if shape[0] % groups or k % groups:
                groups = 1
            if padding == "same":
                padding = step["dilation"] * (step["window"] - 1) // 2
            options = {name: step[name] for name in ("stride", "dilation", "bias")}
            options |= {"padding": padding, "groups": groups}
            return nn.Conv2d(shape[0], k, step["window"], **options)
        if step["op"] == "norm":
            return nn.BatchNorm2d(shape[0], affine=step["affine"])
        if step["op"] == "relu":
            return nn.ReLU(inplace=step["how"] == "in place")
        if step["kind"] == "adaptive":
            return nn.AdaptiveAvgPool2d(1)
        if 2 * step["padding"] > step["window"]:
            return None
        kind = nn.MaxPool2d if step["kind"] == "max" else nn.AvgPool2d
        names = ("stride", "padding", "ceil_mode")
        return kind(step["window"], **{name: step[name] for name in names})

    def _again(self, step: Case, source: int, shape: tuple[int, ...]) -> Any:
        """A module used before, once more."""
        if not len(self.layers):
            return None
        index = step["module"] % len(self.layers)
        result = _result(self.layers[index], shape)
        return None if result is None else ("call", index, [source], result)

    def _other(self, kind: str, source: int, shape: tuple[int, ...]) -> Any:
        c, h, w = shape
        results = {"cat": (2 * c, h, w), "slice": (c, (h + 1) // 2, w), "permute": (c, w, h)}
        if kind in ("dropout", "identity"):
            self.layers.append(nn.Dropout(0.5) if kind == "dropout" else nn.Identity())
            return "call", len(self.layers) - 1, [source], shape
        return "other", kind, [source], results.get(kind, shape)

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for kind, what, operands in self.program:
            values.append(self._step(kind, what, [values[i] for i in operands]))
        last = values[-1]
        head = self.case["head"]
        if head == "linear":
            return self.fc(torch.flatten(F.adaptive_avg_pool2d(last, 1), 1))
        if head == "mean":
            return self.fc(last.mean((2, 3)))
        if head == "tuple":
            return last, values[len(values) // 2]
        if head == "dict":
            return {"last": last, "other": [values[len(values) // 2]]}
        return last

    def _step(self, kind: str, what: Any, operands: list[Tensor]) -> Tensor:
        x = operands[0]
        if kind == "call":
            return self.layers[what](x)
        if kind == "functional":
            m = self.layers[what]
            return F.conv2d(x, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups)
        if kind == "relu":
            return F.relu(x) if what == "function" else x.relu_()
        if kind == "add":
            return _add(what, x, operands[1])
        return _OTHERS[what](x)


def _flat(steps: list[Case]) -> Iterator[Case]:
    """Blocks as their steps, each on the one before it."""
    for step in steps:
        if step["op"] == "block":
            yield step["conv"]
            rest = (step[name] for name in ("norm", "add", "relu"))
            yield from ({**inner, "from": 0} for inner in rest if inner)
        else:
            yield step


def _add(how: str, x: Tensor, y: Tensor) -> Tensor:
    if how == "+":
        return x + y
    if how == "+=":
        x += y
        return x
    return torch.add(x, y) if how == "torch.add" else x.add_(y)


_OTHERS = {
    "sigmoid": torch.sigmoid,
    "mul": lambda x: x * 0.5,
    "cat": lambda x: torch.cat([x, x], 1),
    "slice": lambda x: x[:, :, ::2],
    "silu_": lambda x: F.silu(x, inplace=True),
    "permute": lambda x: x.permute(0, 1, 3, 2),
    "view": lambda x: x.contiguous().view(x.shape[0], -1).view(x.shape),
}


def _result(layer: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Shape of the layer's result, or None where it does not take this shape."""
    try:
        with torch.no_grad():
            return tuple(copy.deepcopy(layer).eval()(torch.ones(1, *shape)).shape[1:])
    except (RuntimeError, ValueError):
        return None


def network(case: Case) -> nn.Module:
    """The case's network with adversarial weights, in eval mode."""
    torch.manual_seed(case["seed"])
    return adversarial_(Net(case), case["seed"])


def leaves(output: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(output)


@torch.no_grad()
def check_graph(case: Case, backend: str = "auto") -> None:
    """Two copies of the same network, one of them fused, in float64 and in float32."""
    net = network(case)
    x = torch.randn(case["images"], case["channels"], *case["size"])
    if case["channels_last"]:
        x = x.contiguous(memory_format=torch.channels_last)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    exact = copy.deepcopy(net).double()
    try:
        truth = leaves(exact(x.double()))
    except RuntimeError as error:  # a sum in place over a part of itself
        if "single memory location" in str(error):
            return
        raise
    scale = max(1.0, *(float(t.abs().max()) for t in truth if t.numel()))
    if backend == "auto":
        wide = fastres.optimize(exact, verify=False)
        compare(wide(x.double()), truth, scale, 1e-10, case)
    fast = fastres.optimize(net, verify=False, backend=backend)
    plain = leaves(net(x.clone()))
    own = max(float((p - t).abs().max()) for p, t in zip(plain, truth, strict=True) if t.numel())
    # A fold scales weights before they are summed, which may cancel differently: 64 roundings of
    # the largest value. A wrong step shows at 1e-2 of it.
    allowed = allowed_error(own / scale, 1.0, torch.float32, ulps=64)
    first = fast(x.clone())
    compare(first, truth, scale, allowed, case)
    again = fast(x.clone())
    assert all(torch.equal(a, b) for a, b in zip(leaves(first), leaves(again), strict=True))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def compare(output: Any, truth: list[Tensor], scale: float, allowed: float, case: Case) -> None:
    assert isinstance(output, {"tuple": tuple, "dict": dict}.get(case["head"], Tensor))
    outputs = leaves(output)
    assert [t.shape for t in outputs] == [t.shape for t in truth]
    for out, want in zip(outputs, truth, strict=True):
        error = float((out.double() - want).abs().max()) / scale if want.numel() else 0.0
        assert error <= allowed, f"off by {error:.3g} of the largest value, allowed {allowed:.3g}"


resnets = st.fixed_dictionaries(
    {
        "block": st.sampled_from(["BasicBlock", "Bottleneck"]),
        "layers": st.lists(st.integers(0, 2), min_size=1, max_size=3),
        "planes": st.sampled_from([4, 6, 8]),
        "groups": st.sampled_from([1, 1, 2]),
        "in_chans": st.sampled_from([1, 3, 3, 4, 17]),
        "num_classes": st.sampled_from([0, 1, 5]),
        "stem": st.sampled_from(["imagenet", "cifar"]),
        "stride_on": st.sampled_from(["3x3", "1x1"]),
        "shortcut": st.sampled_from(["A", "B", "B"]),
        "dilate": st.lists(st.booleans(), min_size=3, max_size=3),
        "dtype": st.sampled_from(["float32", "float32", "float64"]),
        "images": st.integers(0, 3),
        "size": st.lists(st.integers(1, 33), min_size=2, max_size=2),
        "layout": st.sampled_from(["contiguous", "channels_last", "cropped", "expanded"]),
        "seed": st.integers(0, 2**16),
    }
)


def tiny(case: Case) -> Case:
    """The same network at a size that an interpreter bears."""
    layers = [min(1, depth) for depth in case["layers"][:2]]
    size = [1 + side % 9 for side in case["size"]]
    return {**case, "layers": layers, "size": size, "planes": 4, "dtype": "float32"}


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "cropped":
        return F.pad(x, (1, 2, 0, 1))[:, :, : x.shape[2], 1 : 1 + x.shape[3]]
    return x[:, :1].expand_as(x) if layout == "expanded" else x


@torch.no_grad()
def check_resnet(case: Case, backend: str = "auto") -> None:
    """A ResNet of our own with random arguments: the engine runs, and keeps the rule of two."""
    torch.manual_seed(case["seed"])
    basic = case["block"] == "BasicBlock"
    model = fastres.ResNet(
        fastres.BasicBlock if basic else fastres.Bottleneck,
        case["layers"],
        case["num_classes"],
        groups=1 if basic else case["groups"],
        replace_stride_with_dilation=case["dilate"],
        stride_on="3x3" if basic else case["stride_on"],
        backend=backend,
        **{name: case[name] for name in ("planes", "in_chans", "stem", "shortcut")},
    )
    dtype = getattr(torch, case["dtype"])
    model = adversarial_(model, case["seed"]).to(dtype)
    x = torch.randn(case["images"], case["in_chans"], *case["size"]).to(dtype)
    x = laid_out(x, case["layout"])
    before = x.clone()
    with fused.executions() as ran:
        out = model(x)
    assert len(ran) == 1, "the engine did not run"
    expected, exact = fused.plain(model, x), fused.plain(copy.deepcopy(model).double(), x.double())
    assert (out.shape, out.dtype, fused.strides(out)) == (
        expected.shape,
        dtype,
        fused.strides(expected),
    )
    # As in check_graph: a single logit, in which large values cancel, may be PyTorch's lucky one.
    own, scale = fused.rms(expected - exact), max(1.0, fused.rms(exact))
    assert fused.rms(out - exact) <= allowed_error(own, scale, dtype, ulps=64)
    assert torch.equal(x, before)


PROPERTIES = {
    "graph": (cases, check_graph),
    "graph_triton": (cases, partial(check_graph, backend="triton")),
    "resnet": (resnets, check_resnet),
    "resnet_triton": (resnets.map(tiny), partial(check_resnet, backend="triton")),
}
