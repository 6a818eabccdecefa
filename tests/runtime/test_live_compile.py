"""Tracing, scripting, exporting and compiling see an ordinary model, before and after use."""

import copy

import pytest
import torch
from fused import assert_close, assert_fused, executions, images, plain, rms, small
from helpers import adversarial_
from torch import fx, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fastres
from fastres import BasicBlock, Bottleneck, ResNet


def used(**kwargs) -> ResNet:
    """A model whose engine has run."""
    model = small(**kwargs)
    assert_fused(model, images())
    return model


START = pytest.mark.parametrize("start", [small, used])


@START
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript(start, how, tmp_path):
    model, x = start(), images()
    with executions() as ran, torch.no_grad():
        if how == "script":
            made = torch.jit.script(model)
        else:
            made = torch.jit.trace(model, x, check_trace=False)
        torch.jit.save(made, tmp_path / "model.pt")
        loaded = torch.jit.load(tmp_path / "model.pt")
        for candidate in (made, loaded, torch.jit.freeze(copy.deepcopy(made))):
            out = candidate(images(3, 20))
            torch.testing.assert_close(out, plain(model, images(3, 20)))
    assert not ran
    assert_fused(model, x)


@START
def test_symbolic_trace(start):
    model, x = start(), images()
    with executions() as ran, torch.no_grad():
        traced = fx.symbolic_trace(model)
        assert torch.equal(traced(x), plain(model, x))
    assert not ran
    assert "layer1.0.conv1" in {node.target for node in traced.graph.nodes}
    assert_fused(model, x)


def by_extractor(nodes):
    from torchvision.models.feature_extraction import create_feature_extractor

    return lambda model: create_feature_extractor(model, nodes)


RECORDERS = {
    "fx": fx.symbolic_trace,
    "features": by_extractor(["layer1", "flatten"]),
    "named features": by_extractor({"layer2.0.relu": "a", "avgpool": "b"}),
}
NETWORKS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("wide_resnet50_2", "wide_resnet101_2"),
)


@pytest.mark.fault(85)
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("record", RECORDERS.values(), ids=RECORDERS.keys())
def test_what_was_recorded_scripts_as_torchvisions(record, tmp_path):
    models = pytest.importorskip("torchvision.models")
    theirs = adversarial_(models.resnet18(num_classes=5))
    ours = fastres.resnet18(num_classes=5).eval()
    ours.load_state_dict(theirs.state_dict())
    for mine, other in zip(ours.modules(), theirs.modules(), strict=True):
        mine.__dict__.update({k: v for k, v in vars(other).items() if k == "eps"})
    x = images(2, 48)
    with torch.no_grad():
        ours(x)  # the engine leaves nothing behind that scripting could stumble over
        torch.jit.save(torch.jit.script(record(ours)), tmp_path / "ours.pt")
        out = torch.jit.load(tmp_path / "ours.pt")(x)
        torch.testing.assert_close(out, record(theirs)(x), rtol=0, atol=0)


@pytest.mark.fault(85)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_recorded_as_what_can_be_scripted(name):
    """torch.jit.script takes names of types in a program for classes that it does not know."""
    with torch.device("meta"):
        model = fastres.create_model(name, num_classes=3).eval()
    recorded = fx.symbolic_trace(model)
    assert not [node for node in recorded.graph.nodes if isinstance(node.type, str)]
    assert "x : torch.Tensor) -> torch.Tensor" in recorded.code


@pytest.mark.fault(85)
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("make", [small, lambda: BasicBlock(8, 8), lambda: Bottleneck(32, 8)])
def test_small_networks_and_blocks_script_once_recorded(make):
    module = adversarial_(make())
    x = images() if isinstance(module, ResNet) else torch.randn(2, module.conv1.in_channels, 8, 8)
    with torch.no_grad():
        assert torch.equal(torch.jit.script(fx.symbolic_trace(module))(x), plain(module, x))


@START
def test_make_fx(start):
    model, x = start(), images()
    with executions() as ran, torch.no_grad():
        graph = make_fx(model)(x).graph
    assert not ran
    assert sum(n.target is torch.ops.aten.convolution.default for n in graph.nodes) == 6


@START
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(start, strict):
    model, x = start(), images()
    batch = torch.export.Dim("batch", min=1, max=64)
    with executions() as ran:
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not ran
    assert "aten.conv2d.default" in targets
    assert all(t.startswith("aten.") for t in targets)
    out = program.module()(images(5))
    torch.testing.assert_close(out, model._forward_impl(images(5)))
    assert_fused(model, x)


@pytest.mark.parametrize(
    ("start", "backend", "mode"),
    [
        (small, "eager", "inference"),
        (used, "eager", "inference"),
        (used, "eager", "gradient"),
        (used, "eager", "training"),
        (used, "aot_eager", "inference"),
    ],
)
def test_compile_without_graph_breaks(start, backend, mode):
    torch._dynamo.reset()
    model, x = start(), images()
    if mode == "training":
        model.train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with executions() as ran, torch.set_grad_enabled(mode != "inference"):
        out = compiled(x)
        expected = twin._forward_impl(x)
    assert not ran
    assert out.requires_grad == (mode != "inference")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(model.bn1.running_var, twin.bn1.running_var)
    assert_fused(model.eval(), x)


def test_a_compiled_part_is_followed_by_the_engine():
    """``model.compile()`` compiles the call; the plain model stays fused in eager."""
    torch._dynamo.reset()
    model, x = used(), images()
    model.compile(backend="eager", fullgraph=True)
    with executions() as ran, torch.no_grad():
        assert torch.equal(model(x), plain(model, x))
    assert not ran


def test_ensembles_by_vmap():
    models, x = [used(seed=seed) for seed in (1, 2, 3)], images()
    params, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")

    def call(params, buffers, x):
        return functional_call(skeleton, (params, buffers), (x,))

    with executions() as ran, torch.no_grad():
        outs = vmap(call, in_dims=(0, 0, None))(params, buffers, x)
    assert not ran
    for out, model in zip(outs, models, strict=True):
        exact = plain(copy.deepcopy(model).double(), x.double())
        # A batched convolution adds in another order; both are a few roundings away from float64.
        assert rms(out - exact) <= 4 * rms(plain(model, x) - exact)
        assert_fused(model, x)


def test_feature_extractor_of_torchvision():
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, x = used(), images()
    with executions() as ran, torch.no_grad():
        extractor = feature_extraction.create_feature_extractor(model, ["layer1", "flatten"])
        found = extractor(x)
        assert torch.equal(model.fc(found["flatten"]), plain(model, x))
    assert not ran
    assert found["layer1"].shape == (2, 8, 16, 16)
    assert "layer1.0.conv1" in feature_extraction.get_graph_node_names(model)[1]
    assert_fused(model, x)


def test_activation_checkpointing():
    model, x = used(), images().requires_grad_()
    with executions() as ran:
        checkpoint(model, x, use_reentrant=False).sum().backward()
    assert not ran
    gradient, x.grad = x.grad, None
    model._forward_impl(x).sum().backward()
    assert torch.equal(gradient, x.grad)


def test_a_fused_model_inside_another_module():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = small()
            self.head = nn.Linear(5, 2)

        def forward(self, x):
            return self.head(self.backbone(x))

    wrapper, x = Wrapper().eval(), images()
    with executions() as ran, torch.no_grad():
        out = wrapper(x)
        traced = fx.symbolic_trace(wrapper)
        assert torch.equal(traced(x), wrapper.head(plain(wrapper.backbone, x)))
    assert len(ran) == 1
    assert_close(out, nn.Sequential(Plain(wrapper.backbone), wrapper.head), x)


class Plain(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model._forward_impl(x)


def test_blocks_are_ordinary_modules():
    block = BasicBlock(8, 8).eval()
    with executions() as ran, torch.no_grad():
        block(torch.randn(1, 8, 4, 4))
    assert not ran
