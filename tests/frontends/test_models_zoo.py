"""Every model of the zoo: the copy is the source's function, in float64, to the last digits."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from zoo import CASES, left_names

import fastres
from fastres.frontends.fast_shell import FastShell


def doubled(value):
    return value.double() if isinstance(value, Tensor) else value


def lighter(model: nn.Module) -> nn.Module:
    """The model with two blocks a stage: further ones are alike, and take gigabytes in float64."""
    for module in model.modules():
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            if isinstance(blocks := getattr(module, stage, None), nn.Sequential):
                setattr(module, stage, blocks[:2])
    return model


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_copy_is_the_sources_function(case):
    """In float64, so that rounding hides nothing and a detector's order of boxes is certain."""
    source = lighter(case.model()).double()
    before = {name: (t.data_ptr(), t._version) for name, t in source.state_dict().items()}
    arguments = tree_map(doubled, case.inputs())

    fast = fastres.optimize(source, verify=False)

    with torch.no_grad():
        expected, form = tree_flatten(source(*arguments))
    actual, actual_form = tree_flatten(fast(*arguments))
    assert actual_form == form
    assert any(t.numel() for t in expected)
    for wanted, got in zip(expected, actual, strict=True):
        assert got.dtype == wanted.dtype
        assert got.stride() == wanted.stride()
        # 1e-10 of the largest value is a million roundings of float64; any forgotten term moves
        # the outputs of adversarial weights by more than 1e-3. Detectors repeat boxes in pixels.
        scale = float(wanted.abs().max()) if wanted.numel() else 1.0
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10 * scale)
    assert isinstance(fast, FastShell) == case.shell
    assert set(left_names(fast.plan())) == case.left
    after = {name: (t.data_ptr(), t._version) for name, t in source.state_dict().items()}
    assert after == before
