"""8-bit models in files: fused files, ONNX with QuantizeLinear, torch.export programs."""

import json
from collections import Counter

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import fastres
from fastres.errors import CheckpointError, VerificationError
from fastres.formats import export as exporting
from fastres.models.digits import digits_split, load_digits_model
from tests.support.eight_bit import MOST
from tests.support.helpers import adversarial_, real_images


def model_of(channels=3):
    torch.manual_seed(0)
    more = {"num_classes": 5, "planes": 16, "in_chans": channels}
    return adversarial_(fastres.ResNet(fastres.BasicBlock, [1, 1], **more))


def images(n=40):
    return real_images(n, 24)


def of_bytes():
    normalize = fastres.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pixels = (images() * 58 + 116).clamp(0, 255).to(torch.uint8)
    whole = nn.Sequential(normalize, model_of()).eval()
    return fastres.quantize(whole, pixels, min_agreement=None), pixels


@pytest.fixture(scope="module")
def q():
    return fastres.quantize(model_of(), images(), min_agreement=None, keep="layer2.0.conv1")


def test_a_file_gives_the_same_bits_and_the_report(q, tmp_path):
    for model, x in ((q, images()), of_bytes()):
        path = tmp_path / "int8.safetensors"
        fastres.save(model, path)
        loaded = fastres.load(path)
        assert torch.equal(loaded(x), model(x))
        assert loaded.report == model.report
        assert str(loaded.plan()) == str(model.plan())
        again = tmp_path / "again.safetensors"
        fastres.save(loaded, again)
        assert again.read_bytes() == path.read_bytes()
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["fastres"])["format"] == 2


def test_a_file_is_a_quarter_of_one_in_floats(tmp_path):
    model, sizes = model_of(), []
    x = images()
    for one in (fastres.optimize(model, x[:2]), fastres.quantize(model, x, min_agreement=None)):
        fastres.save(one, tmp_path / "m.safetensors")
        with safe_open(tmp_path / "m.safetensors", "pt") as file:
            tensors = (file.get_tensor(name) for name in list(file.keys()))
            sizes.append(sum(t.numel() * t.element_size() for t in tensors))
    assert sizes[1] < 0.28 * sizes[0]


def test_a_model_in_floats_is_of_the_first_format(tmp_path):
    path = tmp_path / "m.safetensors"
    fastres.save(fastres.optimize(model_of(), images(2)), path)
    with safe_open(path, "pt") as file:
        text = file.metadata()["fastres"]
    assert json.loads(text)["format"] == 1
    assert "grid" not in text
    assert "report" not in json.loads(text)


def first(data, kind):
    return next(step["fields"] for step in data["plan"]["steps"] if step["kind"] == kind)


def grid_of(data, name="y_grid", kind="Conv2d"):
    return dict(first(data, kind)[name]["dict"])


def put(data, value, name="y_grid", kind="Conv2d"):
    first(data, kind)[name]["dict"] = [[k, v] for k, v in value.items()]


FORGED = {
    "no scale": ("must be a JSON object|lacks|Grid", lambda d, t: put(d, {"zero": 0})),
    "scale 0": ("y_grid must be Grid", lambda d, t: put(d, {"scale": 0.0, "zero": 0})),
    "a negative scale": ("y_grid must be Grid", lambda d, t: put(d, {"scale": -1.0, "zero": 0})),
    "a scale without end": (
        "y_grid must be Grid",
        lambda d, t: put(d, {"scale": {"float": "inf"}, "zero": 0}),
    ),
    "no number": (
        "y_grid must be Grid",
        lambda d, t: put(d, {"scale": {"float": "nan"}, "zero": 0}),
    ),
    "a scale that is text": ("must be float", lambda d, t: put(d, {"scale": "1", "zero": 0})),
    "zero 256": ("y_grid must be Grid", lambda d, t: put(d, {"scale": 1.0, "zero": 256})),
    "zero -1": ("y_grid must be Grid", lambda d, t: put(d, {"scale": 1.0, "zero": -1})),
    "another grid": ("reads other bytes", lambda d, t: put(d, {"scale": 1.0, "zero": 0})),
    "a grid of its own": (
        "reads other bytes",
        lambda d, t: put(d, {"scale": 1.0, "zero": 0}, "grid", "Quantize"),
    ),
    "none at all": ("reads other bytes", lambda d, t: first(d, "Conv2d").pop("x_grid")),
    "weights in floats": (
        "weight1' must be torch.int8",
        lambda d, t: t.update({"folded.weight1": t["folded.weight1"].float()}),
    ),
    "no scales": ("scale too few", lambda d, t: t.pop("folded.scale1")),
    "scales in half": (
        "scale1' must be torch.float32",
        lambda d, t: t.update({"folded.scale1": t["folded.scale1"].half()}),
    ),
    "a scale too few": (
        "scale1' must be torch.float32",
        lambda d, t: t.update({"folded.scale1": t["folded.scale1"][1:].clone()}),
    ),
    "no bias": ("bias1' must be torch.float32", lambda d, t: t.pop("folded.bias1")),
    "a report without figures": ("lacks", lambda d, t: d["report"]["dict"].pop()),
    "a report that is none": ("must be a JSON object", lambda d, t: d.update(report=3)),
    "format 3": ("of format 3; this fastres reads 1 and 2", lambda d, t: d.update(format=3)),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_files_are_refused(q, name, tmp_path):
    path = tmp_path / "int8.safetensors"
    fastres.save(q, path)
    with safe_open(path, "pt") as file:
        data = json.loads(file.metadata()["fastres"])
        tensors = {key: file.get_tensor(key) for key in list(file.keys())}
    message, forge = FORGED[name]
    forge(data, tensors)
    save_file(tensors, path, {"fastres": json.dumps(data)})
    with pytest.raises(CheckpointError, match=message):
        fastres.load(path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnx_has_quantize_linear_and_a_runtime_agrees(tmp_path):
    """On trained weights: random ones make much of a byte that rounds the other way."""
    pytest.importorskip("onnxscript")
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model, (x, _) = load_digits_model(), digits_split("train")
    q = fastres.quantize(model, x)
    path, (test, _) = tmp_path / "int8.onnx", digits_split("heldout")
    found = fastres.export(q, path, test[:8])
    assert found.checked_by == "onnxruntime"
    graph = onnx.load(path).graph
    counts = Counter(node.op_type for node in graph.node)
    assert counts["Conv"] == 19
    assert counts["QuantizeLinear"] >= 20
    assert counts["Round"] == counts["Div"] == 0
    names = {i.name: onnx.TensorProto.DataType.Name(i.data_type) for i in graph.initializer}
    assert sum(kind == "INT8" for kind in names.values()) == 19
    content = onnx.load(path)
    bytes_of = [n.output[0] for n in content.graph.node if n.op_type == "QuantizeLinear"]
    kind = onnx.TensorProto.UINT8
    content.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, kind, None) for name in bytes_of
    )
    ours = []

    def observe(step, _, result):
        if getattr(step.op, "y_grid", None) is not None:
            ours.append(result.numpy().astype(int))

    q.executor().run([test], observe)

    def differ(level):
        options = runtime.SessionOptions()
        options.graph_optimization_level = level
        session = runtime.InferenceSession(
            content.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        answer, *theirs = session.run(None, {session.get_inputs()[0].name: test.numpy()})
        assert (answer.argmax(1) == q(test).argmax(1).numpy()).all()
        return [abs(a.astype(int) - b) for a, b in zip(theirs[1:], ours, strict=True)]

    # As the file says, in floats: sums in another order turn a byte in some thousands over by one.
    plain = differ(runtime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    assert all(d.max() <= 1 and (d > 0).mean() < 0.001 for d in plain[:4])
    assert all(d.max() <= 4 and (d > 0).mean() < 0.01 and (d > 1).mean() < 0.002 for d in plain)
    # In integers their bias is rounded to a multiple of the scales' product, which 7-bit weights
    # double; what comes after makes more of it.
    fused = differ(runtime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    assert all(d.max() <= 2 and (d > 0).mean() < 0.01 * 127 / MOST for d in fused[:4])
    assert all(d.max() <= 8 and (d > 1).mean() < 0.05 for d in fused)
    assert not q.for_onnx


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_exported_files_of_8_bit_images(suffix, tmp_path):
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    q, x = of_bytes()
    found = fastres.export(q, tmp_path / f"m{suffix}", x[:3])
    assert found.max_abs is None or found.max_abs < 0.2 * float(q(x).std())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_exported_files_with_half_precision(suffix, tmp_path):
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    x, more = images(), {"keep": "conv1", "dtype": torch.float16}
    q = fastres.quantize(model_of(), x, min_agreement=None, **more)
    found = fastres.export(q, tmp_path / f"m{suffix}", x[:3])
    assert found.max_abs < 0.2 * float(q(x).float().std())


def test_a_file_that_answers_otherwise_is_not_written(q, monkeypatch, tmp_path):
    def wrong(file, suffix):
        return (lambda x: [q(x) * 0.5]), "a runtime"

    monkeypatch.setattr(exporting, "_runner", wrong)
    with pytest.raises(VerificationError, match="a runtime gives other answers: it is 6.0 dB from"):
        fastres.export(q, tmp_path / "m.pt2", images(3))
    assert list(tmp_path.iterdir()) == []
