"""Compilers, exporters and transforms see a fused model as ordinary functional operators."""

import copy
import inspect
import pickle
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from helpers import adversarial_, real_images
from tolerance import allowed_error
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18

import fastres
from fastres import BasicBlock, Bottleneck, ResNet


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def tiny(block=BasicBlock, **kwargs) -> ResNet:
    return adversarial_(ResNet(block, [1, 1], num_classes=6, planes=8, **kwargs))


@pytest.fixture(scope="module")
def source():
    """In float64: a copy that is right agrees to all the digits that are compared."""
    return tiny(Bottleneck).double()


@pytest.fixture(scope="module")
def fast(source):
    return fastres.optimize(source, example_input=real_images(2, 64).double())


@pytest.fixture
def images():
    return real_images(3, 64).double()


def reference(source, images):
    with torch.no_grad():
        return source._forward_impl(images)


class Pyramid(nn.Module):
    """A user's module with a dict of feature maps, in-place steps and a broadcast sum."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(True))
        self.gate = nn.Conv2d(8, 8, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x, scale=2.0):
        x = self.stem(x)
        gated = self.gate(x) + self.pool(x)  # (N, 8, H, W) + (N, 8, 1, 1)
        gated = torch.relu_(gated) * scale
        return OrderedDict(out=self.norm(gated), rows=x.view(x.shape[0], 8, -1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(source, fast, images, layout, dynamic):
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    wanted = reference(source, images)
    torch.testing.assert_close(compiled(images.contiguous(memory_format=layout)), wanted)
    torch.testing.assert_close(compiled(x=images[:2]), wanted[:2])


def test_batch_sizes_do_not_recompile(fast):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fast, fullgraph=True, backend=counter)
    for n in range(2, 8):
        assert compiled(real_images(n, 64).double()).shape == (n, 6)
    # Dynamo makes the batch a variable when it changes first.
    assert counter.frame_count <= 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dicts_views_and_broadcasts(images, layout):
    source = adversarial_(Pyramid()).double()
    fast = fastres.optimize(source, example_input=(images, 3.0))
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    x = images.contiguous(memory_format=layout)
    with torch.no_grad():
        wanted = OrderedDict(source(images, 3.0))
    found = compiled(x, scale=3.0)
    assert list(found) == ["out", "rows"]
    torch.testing.assert_close(dict(found), dict(wanted))
    if layout is torch.contiguous_format:
        strides = [t.stride() for t in wanted.values()]
        assert [t.stride() for t in found.values()] == strides


@pytest.mark.sweep
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_inductor(images):
    source = tiny()
    fast = fastres.optimize(source, example_input=images.float())
    compiled = torch.compile(fast, fullgraph=True)
    found = compiled(images.float())
    # Inductor's convolutions are other kernels of the same precision: 1e-5 is 80 roundings.
    torch.testing.assert_close(found, fast(images.float()), rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
def test_a_compiled_program_is_the_custom_operators_where_triton_serves(images):
    fast = fastres.optimize(tiny(), backend="triton", verify=False)
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    found = torch.compile(fast, fullgraph=True, backend=keep)(images.float())
    called = [str(n.target) for n in graphs[0].graph.nodes if n.op == "call_function"]
    assert called.count("fastres.conv2d") == 6
    assert called.count("fastres.linear") == 1
    assert "fastres.max_pool2d" in called
    assert "fastres.global_avg_pool" in called
    assert not any("batch_norm" in name or "relu" in name for name in called)
    torch.testing.assert_close(
        found.double(), reference(tiny().double(), images), rtol=1e-4, atol=1e-4
    )
    for strict in (False, True):
        exported = export(fast, (images.float(),), strict=strict).graph
        assert not any("fastres" in str(n.target) for n in exported.nodes)


@pytest.mark.slow
def test_export_with_a_dynamic_batch_loads_without_fastres(source, fast, images, tmp_path):
    program = export(fast, (images,), dynamic_shapes={"x": {0: Dim("batch")}})
    assert all("grad" not in str(n.target) for n in program.graph.nodes)
    torch.export.save(program, tmp_path / "model.pt2")
    x = real_images(5, 64).double()
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; sys.modules['fastres'] = None\n"
        "program = torch.export.load('model.pt2').module()\n"
        "torch.save(program(torch.load('x.pt')), 'y.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), reference(source, x))


@pytest.mark.filterwarnings("ignore")
def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    source = tiny(Bottleneck)
    images = real_images(2, 64)
    fast = fastres.optimize(source, example_input=images)
    path = tmp_path / "model.onnx"
    batch = {"x": {0: Dim("batch")}}
    torch.onnx.export(fast, (images,), path, dynamo=True, dynamic_shapes=batch, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (entry,) = session.get_inputs()
    assert entry.name == "x"
    for n in (1, 2, 5):
        x = real_images(n, 64)
        (found,) = session.run(None, {"x": x.numpy()})
        exact = reference(copy.deepcopy(source).double(), x.double())
        own = (reference(source, x).double() - exact).square().mean().sqrt()
        error = (torch.from_numpy(found).double() - exact).square().mean().sqrt()
        # onnxruntime's kernels sum in another order: the rule of two, with a floor of 8 roundings.
        scale = exact.square().mean().sqrt()
        assert error <= allowed_error(own, scale, torch.float32, ulps=8)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_jit_trace(source, fast, images, tmp_path):
    traced = torch.jit.trace(fast, images[:1], check_trace=False)
    torch.testing.assert_close(traced(images), reference(source, images))


def test_make_fx(source, fast, images):
    graph = make_fx(fast)(images)
    torch.testing.assert_close(graph(images), reference(source, images))
    assert "mkldnn" not in graph.code


def test_vmap(source, fast, images):
    stacked = torch.stack([images, images.flip(3)])
    found = vmap(fast)(stacked)
    wanted = torch.stack([reference(source, x) for x in stacked])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_in_the_sources_dtype_are_cast_as_in_eager_calls(dtype):
    images = real_images(3, 64)
    fast = fastres.optimize(tiny(), example_input=images, dtype=dtype)
    wanted = fast(images)
    programs = {
        "compiled": torch.compile(fast, fullgraph=True, backend="aot_eager"),
        "exported": export(fast, (images,), dynamic_shapes={"x": {0: Dim("batch")}}).module(),
        "traced": torch.jit.trace(fast, (images,), check_trace=False),
        "mapped": vmap(lambda image: fast(image[None])[0]),
    }
    # Two bfloat16 programs round each of ten layers apart, by half a unit or 2^-9 of its scale.
    tolerance = 10 * torch.finfo(dtype).eps * wanted.abs().max().item()
    for program in programs.values():
        found = program(images)
        assert found.dtype is dtype
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def test_autocast_changes_no_dtype(images):
    """float32 all through: a copy computing in bfloat16 would be off in the third digit."""
    images = images.float()
    fast = fastres.optimize(tiny(), example_input=images)
    wanted = fast(images)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False):
        counted = fast(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = compiled(images)
    torch.testing.assert_close(counted, wanted)
    torch.testing.assert_close(found, wanted)


def test_operations_are_counted_as_the_sources():
    images = real_images(1, 64)
    source = adversarial_(resnet18())
    fast = fastres.optimize(source, example_input=images)
    with FlopCounterMode(display=False) as wanted, torch.no_grad():
        source(images)
    with FlopCounterMode(display=False) as found:
        fast(images)
    assert found.get_total_flops() == wanted.get_total_flops() > 1e8


def test_the_signature_is_the_sources(images):
    source = adversarial_(Pyramid())
    fast = fastres.optimize(source, verify=False)
    assert str(inspect.signature(fast.forward)) == "(x, scale=2.0)"
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(twin).__name__ == "FastModel"
        assert isinstance(twin, fastres.FastModel)
        assert str(inspect.signature(twin.forward)) == "(x, scale=2.0)"
        found = torch.compile(twin, fullgraph=True, backend="aot_eager")(images.float())
        torch.testing.assert_close(found, fast(images.float()))
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        fast()


def test_eager_calls_keep_to_the_engine(fast, images, monkeypatch):
    monkeypatch.setattr(fast, "_program", None)
    assert fast(images).shape == (3, 6)
