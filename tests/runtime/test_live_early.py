"""A replay launched before the checks: kept when nothing changed, thrown away when something had.

The graph is stood in for by a plain run, so this needs no GPU.
"""

import pytest
import torch
from helpers import adversarial_

import fastres
from fastres.runtime.cuda_graph import GraphRunner


@pytest.fixture
def model():
    net = fastres.create_model("resnet20", in_chans=1, num_classes=10)
    return adversarial_(net, seed=3)


@pytest.fixture
def runs(monkeypatch):
    """Every run of an executor, with graphs pretended for every input seen before."""
    seen, made = set(), []
    run = GraphRunner.__call__

    def counted(self, x):
        seen.add(tuple(x.shape))
        made.append(tuple(x.shape))
        return run(self, x)

    monkeypatch.setattr(GraphRunner, "__call__", counted)
    monkeypatch.setattr(GraphRunner, "has_graph", lambda self, x: tuple(x.shape) in seen)
    return made


def both(model, x):
    with torch.no_grad():
        return model(x), model._forward_impl(x)


def test_an_unchanged_model_runs_once(model, runs):
    x = torch.randn(2, 1, 8, 8)
    for _ in range(3):
        fused, plain = both(model, x)
        # fp32 through 20 layers: rounding of 1e-7 per layer, logits of about 1 to 10
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    assert len(runs) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda m: (m.conv1.weight.data.mul_(-1), m.refresh()),
        lambda m: m.bn1.running_var.mul_(3),
        lambda m: setattr(m.bn1, "eps", 0.5),
        lambda m: setattr(m, "fc", torch.nn.Linear(m.num_features, 10).eval()),
    ],
    ids=["refresh", "in place", "eps", "module"],
)
def test_a_changed_model_never_hands_out_the_early_result(model, runs, change):
    x = torch.randn(2, 1, 8, 8)
    before, _ = both(model, x)
    with torch.no_grad():
        change(model)
    after, plain = both(model, x)
    torch.testing.assert_close(after, plain, rtol=1e-4, atol=1e-4)  # as above
    assert not torch.allclose(after, before, rtol=1e-3)
    assert len(runs) == 3, "the early run and its replacement"


def test_a_hook_added_since_is_called(model, runs):
    x = torch.randn(2, 1, 8, 8)
    both(model, x)
    calls = []
    model.layer1.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(x)
    assert calls == [1]


def test_other_shapes_are_not_launched_early(model, runs):
    for batch in (1, 2, 3):
        both(model, torch.randn(batch, 1, 8, 8))
    assert runs == [(1, 1, 8, 8), (2, 1, 8, 8), (3, 1, 8, 8)]


def test_warmup_runs_each_shape_twice_and_answers_stay_right(model, runs):
    shapes = [(1, 1, 8, 8), (3, 1, 10, 12)]
    assert model.warmup(shapes) is model
    assert [runs.count(shape) for shape in shapes] == [2, 2]
    fused, plain = both(model, torch.randn(3, 1, 10, 12))
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)  # as above
    with pytest.raises(RuntimeError, match=r"call \.eval\(\) first"):
        model.train().warmup(shapes)
