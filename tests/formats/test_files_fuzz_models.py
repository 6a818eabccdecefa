"""Row 37 for whole models: Keras' files and fused models of our own, damaged and forged.

What is read is a model, or the file is refused with one of our errors; nothing else is opened.
"""

import io
import json
import os
import struct
import zipfile

import pytest
import torch
from fused import small
from helpers import adversarial_

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

import fastres
from fastres.errors import CheckpointError, FastresError
from fastres.formats.keras_import import from_keras

LAYERS = [
    ("InputLayer", {"name": "input", "batch_shape": [None, 8, 8, 3]}),
    (
        "Conv2D",
        {
            "name": "conv",
            "filters": 4,
            "kernel_size": [3, 3],
            "strides": [1, 1],
            "padding": "valid",
            "dilation_rate": [1, 1],
            "groups": 1,
            "activation": "relu",
            "use_bias": True,
            "data_format": "channels_last",
        },
    ),
    ("Flatten", {"name": "flatten", "data_format": "channels_last"}),
    ("Dense", {"name": "dense", "units": 5, "activation": "linear", "use_bias": True}),
]
CONFIG = {
    "class_name": "Sequential",
    "config": {
        "name": "model",
        "layers": [{"class_name": kind, "config": config} for kind, config in LAYERS],
    },
}
SHAPES = {"conv": ((3, 3, 3, 4), (4,)), "dense": ((144, 5), (5,))}


def hdf5(change=lambda file: None) -> bytes:
    """A model in an ``.h5`` file, as Keras 2 wrote it."""
    h5py = pytest.importorskip("h5py")
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs["model_config"] = json.dumps(CONFIG)
        weights = file.create_group("model_weights")
        generator = torch.Generator().manual_seed(0)
        for name, shapes in SHAPES.items():
            group = weights.create_group(name)
            names = [f"{name}/kernel:0", f"{name}/bias:0"]
            group.attrs["weight_names"] = [n.encode() for n in names]
            for full, shape in zip(names, shapes, strict=True):
                group[full] = torch.randn(shape, generator=generator).numpy()
        change(file)
    return buffer.getvalue()


def keras_zip(**members: bytes) -> bytes:
    """A model in a ``.keras`` file, as Keras 3 writes it."""
    h5py = pytest.importorskip("h5py")
    inner = io.BytesIO()
    with h5py.File(inner, "w") as file:
        generator = torch.Generator().manual_seed(0)
        for name, kind in (("conv", "conv2d"), ("dense", "dense")):
            for index, shape in enumerate(SHAPES[name]):
                file[f"layers/{kind}/vars/{index}"] = torch.randn(
                    shape, generator=generator
                ).numpy()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in {
            "config.json": json.dumps(CONFIG).encode(),
            "model.weights.h5": inner.getvalue(),
            **members,
        }.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def files():
    return {".h5": hdf5(), ".keras": keras_zip()}


def read(folder, data: bytes, suffix: str):
    """The model's answer, or None where the file was refused."""
    path = folder / f"model{suffix}"
    path.write_bytes(data)
    refusal = ""
    try:
        model = from_keras(path)
    except FastresError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert os.listdir(folder) == [path.name]
    path.unlink()
    if refusal:
        return None
    with torch.no_grad():
        return model(torch.ones(1, 3, 8, 8))


@pytest.mark.fault(37)
@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_good_keras_files_are_read(files, suffix, tmp_path):
    assert read(tmp_path, files[suffix], suffix).shape == (1, 5)


@pytest.mark.fault(37)
@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_damaged_keras_files(files, suffix, tmp_path):
    """Cut anywhere; bytes changed in the headers of the zip and of HDF5, and in the JSON."""
    good = files[suffix]

    @settings(max_examples=60)
    @given(
        share=st.floats(0, 0.999),
        changes=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), max_size=6),
    )
    def damage(share, changes):
        assert read(tmp_path, good[: round(share * len(good))], suffix) is None
        data = bytearray(good)
        for position, value in changes:
            data[position] = value
        answer = read(tmp_path, bytes(data), suffix)
        assert answer is None or answer.dim() >= 2

    damage()


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**40) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def places(value, path=()):
    """The path of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


def replaced(value, path, new):
    """A copy of a JSON value with something else at ``path``."""
    copy = json.loads(json.dumps(value))
    holder = copy
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = new
    return copy


@pytest.mark.fault(37)
def test_forged_keras_configurations(tmp_path):
    """Anything at any place of the JSON: other sizes, kinds, types, missing layers."""
    inner = zipfile.ZipFile(io.BytesIO(keras_zip())).read("model.weights.h5")

    @settings(max_examples=150)
    @given(path=st.sampled_from(list(places(CONFIG))), new=JSON_VALUES)
    def forge(path, new):
        config = json.dumps(replaced(CONFIG, path, new)).encode()
        data = keras_zip(**{"config.json": config, "model.weights.h5": inner})
        read_or_refused(tmp_path, data, ".keras")

    forge()


def read_or_refused(folder, data: bytes, suffix: str) -> None:
    path = folder / f"model{suffix}"
    path.write_bytes(data)
    refusal = ""
    try:
        from_keras(path)
    except FastresError as error:
        refusal = str(error)
    named = (str(path), "layer", "the model")
    assert not refusal or any(name in refusal for name in named)


@pytest.mark.fault(37)
@pytest.mark.parametrize("place", ["model_weights/conv", "model_weights/conv/conv/kernel:0"])
def test_links_to_other_files_are_not_followed(place, tmp_path):
    h5py = pytest.importorskip("h5py")
    other = tmp_path / "other"
    other.mkdir()
    (other / "secret.h5").write_bytes(hdf5())

    def link(file):
        del file[place]
        file[place] = h5py.ExternalLink(str(other / "secret.h5"), place)

    path = tmp_path / "model.h5"
    path.write_bytes(hdf5(link))
    with pytest.raises(CheckpointError, match="is a link, .* not followed"):
        from_keras(path)


@pytest.mark.fault(37)
def test_weights_kept_in_another_file_are_not_read(tmp_path):
    """HDF5 may keep a dataset's bytes in any file, such as one that only root may read."""
    h5py = pytest.importorskip("h5py")
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(range(256)) * 2)

    def point_outside(file):
        del file["model_weights/conv/conv/kernel:0"]
        file["model_weights/conv"].create_dataset(
            "conv/kernel:0", (3, 3, 3, 4), "f4", external=[(str(secret), 0, h5py.h5f.UNLIMITED)]
        )

    path = tmp_path / "model.h5"
    path.write_bytes(hdf5(point_outside))
    with pytest.raises(CheckpointError, match="another file"):
        from_keras(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A fused model's file in two parts: its JSON header and its tensors."""
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    fastres.save(fastres.optimize(adversarial_(small()), verify=False), path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.mark.fault(37)
def test_forged_fused_models(saved, tmp_path):
    """Anything at any place of the plan: a model that runs or is refused, or one error."""
    header, tensors = saved
    plan = json.loads(header["__metadata__"]["fastres"])
    everywhere = list(places(plan))
    path = tmp_path / "forged.safetensors"

    @settings(max_examples=150)
    @given(place=st.sampled_from(everywhere), new=JSON_VALUES | st.sampled_from(everywhere))
    def forge(place, new):
        forged = json.dumps(replaced(plan, place, list(new) if isinstance(new, tuple) else new))
        text = json.dumps(
            {**header, "__metadata__": {**header["__metadata__"], "fastres": forged}}
        ).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + tensors)
        model, refusal = None, ""
        try:
            model = fastres.load(path)
        except CheckpointError as error:
            refusal = str(error)
        assert isinstance(model, fastres.FastModel) or str(path) in refusal

    forge()
