"""Exports of several inputs and outputs: files answer as the source does, or one error before work.

The right values are the source's own, in PyTorch, on images that the export has not seen.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from helpers import adversarial_
from torch import nn
from torch.utils._pytree import tree_leaves

import fastres
from fastres.errors import VerificationError
from fastres.formats import export


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.d = nn.Conv2d(8, 4, 1)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class TwoOutputs(Base):
    def forward(self, x):
        y = self.c(x)
        return y.mean((2, 3)), self.d(y)


class Dictionary(Base):
    def forward(self, x):
        y = self.c(x)
        return {"out": self.d(y), "aux": y.mean((2, 3))}


class Ordered(Base):
    """Keys out of their alphabet's order, and containers inside."""

    def forward(self, x):
        y = self.c(x)
        found = OrderedDict()
        found["z"] = y
        found["a"] = [self.d(y), {"k": y * 2}]
        return found


class Named(Base):
    def forward(self, x):
        y = self.c(x)
        return Pair(y, self.d(y))


class Same(Base):
    """One tensor twice, and an input."""

    def forward(self, x):
        y = self.c(x)
        return y, y, x


class Index(Base):
    def forward(self, x):
        y = self.c(x).mean((2, 3))
        return y.argmax(1), y


class TwoInputs(Base):
    def forward(self, x, z):
        return self.d(self.c(x) + z)


class Vector(Base):
    def forward(self, x, v):
        return self.d(self.c(x)).mean((2, 3)) * v


class Keyword(Base):
    def forward(self, x, *, z, k=2.0):
        return self.d(self.c(x) + z) * k


class Default(Base):
    def forward(self, x, scale=1.5):
        return self.d(self.c(x)) * scale


def rand(seed, n, *shape):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def given(form, n, seed=0):
    x, z, v = rand(seed, n, 3, 12, 12), rand(seed + 1, n, 8, 10, 10), rand(seed + 2, n, 1)
    return {
        "one": x,
        "two": (x, z),
        "names": {"x": x, "z": z},
        "names in another order": {"z": z, "x": x},
        "vector": [x, v],
        "names and number": {"x": x, "z": z, "k": 3.0},
        "number": (x, 2.5),
    }[form]


CASES = [
    *((TwoOutputs, "one"), (Dictionary, "one"), (Ordered, "one"), (Same, "one"), (Index, "one")),
    *((TwoInputs, "two"), (TwoInputs, "names"), (TwoInputs, "names in another order")),
    *((Vector, "vector"), (Keyword, "names"), (Keyword, "names and number")),
    *((Default, "one"), (Default, "number")),
]


def call(function, arguments):
    if isinstance(arguments, dict):
        return function(**arguments)
    return function(*((arguments,) if isinstance(arguments, torch.Tensor) else arguments))


def tensors_of(arguments):
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]


def right(model, arguments):
    with torch.no_grad():
        return tree_leaves(call(model, arguments))


def assert_close(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def made(kind):
    model = adversarial_(kind())
    return model, fastres.optimize(model, verify=False)


@pytest.mark.fault(57)
@pytest.mark.parametrize(("kind", "form"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_programs_answer_as_the_source(tmp_path, kind, form):
    model, fast = made(kind)
    found = fastres.export(fast, tmp_path / "m.pt2", given(form, 3))
    assert found.checked_by == "torch.export"
    program = torch.export.load(tmp_path / "m.pt2").module()
    for n in (1, 5):
        arguments = given(form, n, seed=10)
        answer = call(program, arguments)
        assert type(answer) is type(call(model, arguments))
        assert_close(tree_leaves(answer), right(model, arguments))


@pytest.mark.fault(57)
@pytest.mark.parametrize(
    ("kind", "form"),
    [(k, f) for k, f in [*CASES, (Named, "one")] if k in (Ordered, Named, Same, Index, Keyword)],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_onnx_files_answer_as_the_source(tmp_path, kind, form):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, fast = made(kind)
    found = fastres.export(fast, tmp_path / "m.onnx", given(form, 3))
    assert found.checked_by == "onnxruntime"
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    arguments = given(form, 5, seed=10)
    names = [node.name for node in session.get_inputs()]
    fed = dict(zip(names, [t.numpy() for t in tensors_of(arguments)], strict=True))
    answer = [torch.from_numpy(a) for a in session.run(None, fed)]
    assert_close(answer, right(model, arguments))


@dataclass
class Answer:
    logits: torch.Tensor


class OwnClass(Base):
    def forward(self, x):
        return Answer(self.d(self.c(x)))


class Branching(Base):
    def forward(self, x):
        y = self.c(x)
        return y if y.sum() > 0 else Answer(y)


class WithSize(Base):
    def forward(self, x):
        y = self.c(x)
        return y, y.shape[0]


class WithNone(Base):
    def forward(self, x):
        return self.c(x), None


class ListInput(Base):
    def forward(self, xs):
        return self.c(xs[0]) + self.c(xs[1])


X, Z = given("two", 3)
REFUSED = {
    "a dataclass": (OwnClass, X, ValueError, "must return tensors only to be exp.*; got Answer"),
    "a shell": (Branching, X, TypeError, r"must be a FastModel, got FastShell: .*'c'"),
    "a size": (WithSize, X, ValueError, "must return tensors only to be exported; got int"),
    "None": (WithNone, X, ValueError, "must return tensors only to be exported; got NoneType"),
    "a class in a program": (Named, X, ValueError, "must return tuples, lists and dict.*Pair"),
    "a list": (ListInput, [[X, X]], TypeError, "images must be tensors and numbers; got a list"),
    "one of two": (TwoInputs, X, TypeError, r"fit forward\(x, z\): missing a required .*'z'"),
    "another name": (TwoInputs, {"x": X, "y": Z}, TypeError, r"fit forward\(x, z\): missing"),
    "other batches": (TwoInputs, (X, Z[:2]), ValueError, r"one batch size.*\(2, 8, 10, 10\)"),
    "one image": (TwoInputs, (X[:1], Z[:1]), ValueError, "images must be at least two"),
    "no tensor": (Default, (1, 2), ValueError, "at least two.*got no tensor"),
    "other channels": (TwoInputs, (Z, X), ValueError, "channels"),
}


@pytest.mark.fault(57)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_one_error_before_work(tmp_path, monkeypatch, name):
    kind, arguments, error, message = REFUSED[name]
    _, fast = made(kind)
    monkeypatch.setattr(torch.export, "export", None)
    with pytest.raises(error, match=message) as caught:
        fastres.export(fast, tmp_path / "m.pt2", arguments)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(57)
def test_what_pytorch_cannot_export_is_one_line(tmp_path):
    class Fixed(Base):
        def forward(self, x):
            return self.c(x).view(3, -1)

    _, fast = made(Fixed)
    with pytest.raises(ValueError, match=r"PyTorch cannot export model to \.pt2: ") as caught:
        fastres.export(fast, tmp_path / "m.pt2", X)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(57)
@pytest.mark.parametrize("wrong", [0, 1])
def test_each_output_of_the_file_is_judged(tmp_path, monkeypatch, wrong):
    _, fast = made(Index)
    real = torch.export.load

    def load(file):
        program = real(file).module()
        broken = [lambda t: 1 - t, lambda t: t * 1.001]

        class Wrong:
            def module(self):
                def run(*arguments):
                    found = list(program(*arguments))
                    found[wrong] = broken[wrong](found[wrong])
                    return tuple(found)

                return run

        return Wrong()

    monkeypatch.setattr(torch.export, "load", load)
    with pytest.raises(fastres.errors.VerificationError, match="other (answers|whole numbers)"):
        fastres.export(fast, tmp_path / "m.pt2", X)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [0, 1])
def test_each_output_of_a_file_is_judged(tmp_path, monkeypatch, wrong):
    runner = export._runner

    def spoilt(file, suffix):
        run, name = runner(file, suffix)

        def changed(*args, **kwargs):
            return [y + (i == wrong) for i, y in enumerate(tree_leaves(run(*args, **kwargs)))]

        return changed, name

    model, x = adversarial_(TwoOutputs()), torch.randn(2, 3, 9, 9)
    monkeypatch.setattr(export, "_runner", spoilt)
    with pytest.raises(VerificationError, match="gives other answers"):
        fastres.export(fastres.optimize(model, example_input=x), tmp_path / "two.pt2", x)
    assert not list(tmp_path.iterdir())
