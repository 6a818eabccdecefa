"""The user's module is copied wherever something would be done to it."""

from copy import deepcopy
from threading import Lock

import pytest
import torch
from helpers import adversarial_
from test_trace import compare, image, module
from torch import nn
from torch.nn.utils import prune, weight_norm

import fastres
from fastres.graph.trace import TraceError


def test_what_forward_assigns_is_not_left_behind():
    """Neither on the module nor in its containers: the tracer's values cannot even be copied."""

    def forward(self, x):
        self.seen = self.by_name["y"] = self.conv(x)
        return self.next(self.seen)

    source = module(forward)
    x = image()
    source.seen, source.by_name = None, {}
    before = source(x)
    source.seen, source.by_name = None, {}
    with pytest.raises(TraceError, match="its forward stores seen"):
        fastres.optimize(source, verify=False)
    assert source.seen is None
    assert not source.by_name
    assert torch.equal(deepcopy(source)(x), before)


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
        lambda conv: weight_norm(conv).weight_g.data.mul_(2),
    ],
    ids=["pruned", "weight_norm of old"],
)
def test_layers_whose_weight_is_a_result(change):
    """deepcopy refuses such tensors; the layer's own hook computes them anew at each call."""
    source = module(lambda self, x: self.next(self.relu(self.conv(x))))
    change(source.conv)
    assert not source.conv.weight.is_leaf
    plan = compare(source, image())
    assert [step.where for step, why in plan.fallbacks if why == "has forward hooks"] == ["conv"]


def test_a_scripted_layer_is_called_whole():
    source = module(lambda self, x: self.next(self.norm(self.conv(x))))
    source.norm = torch.jit.script(source.norm)
    (left,) = [step for step, why in compare(source, image()).fallbacks if step.where == "norm"]
    assert left.op.reason == "is of torch.jit, which torch.fx cannot look into"
    assert all(p.requires_grad for p in source.parameters())


def test_process_groups_are_shared():
    """A lock stands for the group: neither can be copied, and inference asks neither."""
    norm = nn.SyncBatchNorm(8)
    norm.process_group = Lock()
    source = adversarial_(nn.Sequential(nn.Conv2d(3, 8, 3), norm))
    found = fastres.optimize(source, example_input=image().float(), dtype=torch.bfloat16)
    assert "against float64" in found.verification.reason
    assert source[1].process_group is norm.process_group
