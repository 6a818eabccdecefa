"""Triton's model repository, read by NVIDIA's own schema; the server itself is not run.

The right values are the source network's, in PyTorch, on images that the export has not seen.
"""

import sys
import types

import pytest
import torch
from fused import images, small
from torch import nn

import fastres
from fastres.formats.triton_repo import export_repository

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")
schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
from google.protobuf import json_format, text_format  # noqa: E402

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


class Index(nn.Module):
    """Logits and the best of them."""

    def forward(self, logits):
        return logits, logits.argmax(1)


class Positive(nn.Module):
    """Logits and those above zero: unlike argmax, a fused file can hold it."""

    def forward(self, logits):
        return logits, torch.relu(logits)


def of_bytes(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator)


def network_with(head):
    return nn.Sequential(fastres.Normalize(MEAN, STD), small(), head).eval()


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "repository"  # which is made
    options = {"max_batch": 5, "backend": "python"}
    for name, head in (("onnx", Index()), ("py", Positive())):
        fast = fastres.optimize(network_with(head), example_input=of_bytes(2))
        options["backend"] = {"onnx": "onnxruntime", "py": "python"}[name]
        export_repository(fast, folder, of_bytes(2), name=name, **options)
    return folder


def wanted(head, x):
    with torch.inference_mode():
        return network_with(head)(x)


def config(repository, name):
    """As the server reads it: a field that it does not know is an error."""
    text = (repository / name / "config.pbtxt").read_text()
    return text_format.Parse(text, schema.ModelConfig())


def tensors(found):
    word = schema.DataType.Name
    return [(t.name, word(t.data_type), list(t.dims), list(t.reshape.shape)) for t in found]


def test_the_repository_has_the_layout_that_the_server_reads(repository):
    found = {p.relative_to(repository).as_posix() for p in repository.rglob("*") if p.is_file()}
    assert found == {
        *("onnx/config.pbtxt", "onnx/1/model.onnx"),
        *("py/config.pbtxt", "py/1/model.py", "py/1/fused.safetensors"),
    }


@pytest.mark.parametrize(("name", "backend"), [("onnx", "onnxruntime"), ("py", "python")])
def test_the_config_names_and_measures_the_tensors(repository, name, backend):
    read = config(repository, name)
    assert (read.name, read.backend, read.max_batch_size) == (name, backend, 5)
    assert read.HasField("dynamic_batching")
    assert tensors(read.input) == [("input", "TYPE_UINT8", [3, 16, 16], [])]
    assert tensors(read.output)[0][1:] == ("TYPE_FP32", [5], [])


def test_an_output_of_one_number_for_an_image_is_reshaped(repository):
    """Triton has no tensor of no dimensions beside the batch."""
    read = config(repository, "onnx")
    assert tensors(read.output)[1][1:] == ("TYPE_INT64", [1], [])
    assert read.output[1].HasField("reshape")


def test_the_names_are_those_of_the_file(repository):
    session = ort.InferenceSession(repository / "onnx" / "1" / "model.onnx")
    read = config(repository, "onnx")
    assert [t.name for t in read.input] == [t.name for t in session.get_inputs()]
    assert [t.name for t in read.output] == [t.name for t in session.get_outputs()]


@pytest.mark.parametrize("batch", [1, 5])
def test_the_onnx_file_answers_as_the_source(repository, batch):
    read, x = config(repository, "onnx"), of_bytes(batch, seed=1)
    session = ort.InferenceSession(repository / "onnx" / "1" / "model.onnx")
    found = session.run([t.name for t in read.output], {read.input[0].name: x.numpy()})
    logits, index = wanted(Index(), x)
    torch.testing.assert_close(torch.from_numpy(found[0]), logits, rtol=1e-4, atol=1e-4)
    assert found[1].tolist() == index.tolist()


class Backend(types.ModuleType):
    """What Triton gives a model.py, as its documentation describes it."""

    class Tensor:
        def __init__(self, name, value):
            self.name, self.value = name, value

        @staticmethod
        def from_dlpack(name, value):
            return Backend.Tensor(name, torch.from_dlpack(value))

        def to_dlpack(self):
            return torch.utils.dlpack.to_dlpack(self.value)

    class TritonError:
        def __init__(self, text):
            self.text = text

    class InferenceResponse:
        def __init__(self, output_tensors, error=None):
            self.tensors = {t.name: t.value for t in output_tensors}
            self.error = error and error.text

    @staticmethod
    def get_input_tensor_by_name(request, name):
        return Backend.Tensor(name, request[name]) if name in request else None


@pytest.fixture
def serving(repository, monkeypatch):
    """A function that runs a model of the repository as the Python backend does."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Backend("backend"))

    def start(name):
        code = {}
        exec((repository / name / "1" / "model.py").read_text(), code)
        model = code["TritonPythonModel"]()
        read = config(repository, name)
        fields = {"preserving_proto_field_name": True, "always_print_fields_with_no_presence": True}
        model.initialize(
            {
                "model_config": json_format.MessageToJson(read, **fields),
                "model_repository": str(repository / name),
                "model_version": "1",
                "model_instance_kind": "CPU",
                "model_instance_device_id": "0",
            }
        )
        return model.execute

    return start


def assert_right(response, x):
    assert response.error is None
    for name, output in zip(("output", "output_1"), wanted(Positive(), x), strict=True):
        torch.testing.assert_close(response.tensors[name], output, rtol=1e-4, atol=1e-4)


def test_the_python_model_answers_each_request_as_the_source(serving):
    given = [of_bytes(2, seed=1), of_bytes(1, seed=2), of_bytes(2, seed=3)]
    for x, response in zip(given, serving("py")([{"input": x} for x in given]), strict=True):
        assert_right(response, x)


@pytest.mark.fault(90)
@pytest.mark.parametrize(
    ("bad", "got"),
    [
        ({"input": of_bytes(1)[:, :, :8]}, "(3, 8, 16)"),
        ({"input": images(1)}, "TYPE_FP32"),
        ({"other": of_bytes(1)}, "()"),
    ],
    ids=["size", "dtype", "missing"],
)
def test_a_bad_request_of_three_is_an_error_for_it_alone(serving, bad, got):
    good = of_bytes(2, seed=1)
    first, second, third = serving("py")([{"input": good[:1]}, bad, {"input": good[1:]}])
    assert second.tensors == {}
    assert second.error.startswith("input must be TYPE_UINT8 of (3, 16, 16)")
    assert got in second.error
    assert_right(first, good[:1])
    assert_right(third, good[1:])


def test_requests_of_which_none_fits_are_errors(serving):
    found = serving("py")([{"input": images(1)}, {"input": images(2)}])
    assert all(response.error for response in found)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"name": "a/b"}, ValueError, "name must be"),
        ({"name": ".hidden"}, ValueError, "name must be"),
        ({"backend": "pytorch"}, ValueError, "backend must be one of onnxruntime, python"),
        ({"max_batch": 0}, ValueError, "max_batch must be at least 1"),
        ({"name": "onnx"}, FileExistsError, "is kept"),
    ],
)
def test_what_cannot_be_written_is_refused_and_the_rest_kept(repository, options, error, text):
    before = {p: p.stat().st_mtime_ns for p in repository.rglob("*")}
    with pytest.raises(error, match=text):
        export_repository(None, repository, of_bytes(2), **{"name": "new", **options})
    assert {p: p.stat().st_mtime_ns for p in repository.rglob("*")} == before


def test_a_write_that_fails_leaves_no_half_of_a_model(tmp_path, monkeypatch):
    fast = fastres.optimize(small(), example_input=images(2))
    monkeypatch.setattr("fastres.formats.triton_repo._read_model", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_repository(fast, tmp_path, of_bytes(2), name="m", backend="python")
    assert list(tmp_path.iterdir()) == []
