"""Batch norm into convolution: the numbers, and which are refused."""

import pytest
import torch
import torch.nn.functional as F
from helpers import adversarial_
from torch import nn

from fastres.errors import FoldError
from fastres.graph import fold, plan, trace
from fastres.graph.ir import Conv2d, attribute


def folded(module: nn.Module, dtype=torch.float64):
    """The first convolution of a folded module: its operation, weight and bias."""
    graph = fold.fold(trace.trace(module))
    op = next(node.op for node in graph.nodes if isinstance(node.op, Conv2d))
    return op, *fold.folded_conv(op, lambda path: attribute(module, path), dtype)


@pytest.mark.fault(30)
@pytest.mark.parametrize("conv_bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.7])
def test_numbers_in_float64(conv_bias, affine, groups, eps):
    """Tiny variances: there a wrong eps, or one forgotten, changes the result by its whole size."""
    conv = nn.Conv2d(6, 12, 3, stride=2, padding=1, dilation=2, groups=groups, bias=conv_bias)
    module = adversarial_(nn.Sequential(conv, nn.BatchNorm2d(12, affine=affine))).double()
    module[1].eps = eps
    module[1].running_var.copy_(10.0 ** torch.linspace(-12, 0, 12))
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64)

    op, weight, bias = folded(module)
    out = F.conv2d(x, weight, bias, op.stride, op.padding, op.dilation, op.groups)

    with torch.no_grad():
        exact = module(x)
    # A dozen float64 roundings of values that the smallest variance makes a million times larger.
    assert (out - exact).abs().max() <= 1e-13 * exact.abs().max()
    assert op.norm.eps == eps
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_without_a_norm_the_layer_stays_as_it_is():
    conv = nn.Conv2d(3, 4, 3)
    _, weight, bias = folded(nn.Sequential(conv), torch.float32)
    assert torch.equal(weight, conv.weight)
    assert torch.equal(bias, conv.bias)
    _, _, missing = folded(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False)))
    assert missing is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", [nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3), nn.Linear(8, 4)])
def test_folded_weights_are_copies(layer, dtype):
    """Whatever the dtype and the layout of the source, its memory is not shared."""
    module = nn.Sequential(layer).to(dtype)
    if isinstance(layer, nn.Conv2d):
        module.to(memory_format=torch.channels_last)
    (step,) = plan.build(fold.fold(trace.trace(module))).steps
    pair = fold.fold_step(step.op, lambda path: attribute(module, path), dtype)
    for made, source in zip(pair, module.parameters(), strict=True):
        assert made.untyped_storage().data_ptr() != source.untyped_storage().data_ptr()
        assert torch.equal(made, source)


@pytest.mark.fault(32)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fold_first_cast_last(dtype):
    """float32 sources: the float64 result is rounded once. Biases stay float32."""
    module = adversarial_(nn.Sequential(nn.Conv2d(5, 7, 3), nn.BatchNorm2d(7)))
    _, exact, exact_bias = folded(module)
    _, weight, bias = folded(module, dtype)
    assert torch.equal(weight, exact.to(dtype))
    assert torch.equal(bias, exact_bias.float())
    rounded = module.to(dtype)
    _, from_rounded, _ = folded(rounded, dtype)
    if dtype is not torch.float32:
        assert not torch.equal(weight, from_rounded)


def test_half_precision_sources_are_folded_as_they_are():
    """``.half()`` has rounded the parameters; from there on everything is float64 again."""
    module = adversarial_(nn.Sequential(nn.Conv2d(5, 7, 3), nn.BatchNorm2d(7))).half()
    _, weight, bias = folded(module, torch.float16)
    _, exact, exact_bias = folded(module.double(), torch.float64)
    assert torch.equal(weight, exact.half())
    assert torch.equal(bias, exact_bias.float())


@pytest.mark.fault(32)
@pytest.mark.parametrize("variance", [-0.1, -1e-30, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("eps", [1e-5, 1.0])
def test_nonsense_variance_is_refused_by_name(variance, eps):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=eps)).eval()
    module[1].running_var[2] = variance
    with pytest.raises(FoldError, match=r"1\.running_var\[2\] is .*finite and not negative"):
        folded(module)


@pytest.mark.fault(32)
def test_zero_variance_is_no_nonsense():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    module[1].running_var.zero_()
    assert folded(module)[1].isfinite().all()
    module[1].eps = 0.0
    with pytest.raises(FoldError, match=r"1\.running_var\[0\] is 0"):
        folded(module)


@pytest.mark.fault(33)
def test_a_weight_too_large_for_float16_is_refused_with_advice():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    module[1].running_var[1] = 1e-8
    module[1].eps = 1e-9
    with torch.no_grad():
        module[1].weight[1] = 100.0
        module[0].weight[1, 1, 1, 1] = 1.0
    message = r"0\.weight: folded, a value of .* does not fit torch\.float16; use torch\.bfloat16"
    with pytest.raises(FoldError, match=message):
        folded(module, torch.float16)
    assert folded(module, torch.bfloat16)[1].isfinite().all()
    assert folded(module, torch.float32)[1].isfinite().all()


@pytest.mark.fault(33)
def test_a_bias_too_large_for_float16_is_refused():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    module[1].running_mean[2] = -7e4
    with pytest.raises(FoldError, match=r"1\.running_mean: folded, a value of 69999"):
        folded(module, torch.float16)
    assert folded(module, torch.bfloat16)[2].isfinite().all()
