"""Keras files that must be refused: layers without a counterpart here, and files that grow."""

import json
import zipfile

import pytest
import torch

from fastres.errors import CheckpointError
from fastres.formats.keras_import import from_keras
from fastres.formats.keras_layers import KerasImportError

zoo = pytest.importorskip("keras_models", exc_type=ImportError)  # it chooses Keras' backend
h5py = pytest.importorskip("h5py")

keras, layers = zoo.keras, zoo.layers

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:keras"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@keras.saving.register_keras_serializable("mine")
class Conv2D(layers.Conv2D):
    """A user's own, which happens to be called as Keras' is."""

    def call(self, x):
        return -super().call(x)


class Unregistered(layers.Dense):
    pass


def model(*calls):
    x = inputs = keras.Input((8, 8, 3))
    for call in calls:
        x = call(x)
    return keras.Model(inputs, x)


# What is said of it in .keras, and in .h5, which does not say whose class it is.
LAYERS = {
    "flip": (layers.RandomFlip("horizontal"), r"\(RandomFlip\) draws at random in training"),
    "rotation": (layers.RandomRotation(0.1), r"\(RandomRotation\) draws at random"),
    "noise": (layers.GaussianNoise(0.1), r"\(GaussianNoise\) draws at random"),
    "resizing": (layers.Resizing(4, 4), r"\(Resizing\) is not supported; these are: "),
    "rescaling": (layers.Rescaling(1 / 255), r"\(Rescaling\) is not supported"),
    "normalization": (layers.Normalization(mean=0.5, variance=2.0), r"\(Normalization\) is not"),
    "prelu": (layers.PReLU(), r"\(PReLU\) is not supported"),
    "layer norm": (layers.LayerNormalization(), r"\(LayerNormalization\) is not supported"),
    "reshape": (layers.Reshape((4, 16, 3)), r"\(Reshape\) is not supported"),
    "custom": (Conv2D(4, 3), r"\(.*test_keras_refused.Conv2D|mine>Conv2D\) is not supported"),
    "unregistered": (Unregistered(4), r"Unregistered\) is not supported"),
    "operator": (lambda x: x * 2.0, r"Multiply\) is not supported"),
    "constant": (lambda x: x + 2.0, r"Add\) is called with the constant 2\.0"),
    "constant first": (lambda x: 2.0 + x, r"Add\) is called with the constant 2\.0"),
    "in training": (
        lambda x: layers.BatchNormalization()(x, training=True),
        r"\(BatchNormalization\) is called with training=True",
    ),
}


@pytest.mark.fault(61)
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_real_reason(name, suffix, tmp_path):
    call, message = LAYERS[name]
    path = tmp_path / f"model{suffix}"
    model(call, layers.Conv2D(2, 3)).save(path)
    with pytest.raises(KerasImportError, match=message):
        from_keras(path)


@pytest.mark.fault(61)
def test_the_reason_inside_a_model(tmp_path):
    augment = keras.Sequential([layers.RandomFlip(), layers.RandomZoom(0.1)], name="augment")
    model(augment, layers.Conv2D(2, 3)).save(tmp_path / "model.keras")
    with pytest.raises(KerasImportError, match=r"'augment/random_flip.*' \(RandomFlip\) draws at"):
        from_keras(tmp_path / "model.keras")


@pytest.mark.fault(61)
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_operators_of_tensors(suffix, tmp_path):
    """``x + y`` and ``relu`` are the layers Add and ReLU by other names."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(3, 3, padding="same")(inputs)
    built = zoo.adversarial_(keras.Model(inputs, keras.ops.relu(x + inputs) + x))
    built.save(tmp_path / f"model{suffix}")
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        found = from_keras(tmp_path / f"model{suffix}")(images)
    torch.testing.assert_close([found], zoo.answers(built, images), rtol=1e-5, atol=1e-5)


@pytest.mark.fault(61)
def test_operators_of_tf_keras(tmp_path):
    """TFOpLambda, in the notation of tf.keras 2.15."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(3, 3, padding="same", name="a")(inputs)
    y = layers.Conv2D(3, 1, name="b")(inputs)
    built = zoo.adversarial_(
        keras.Model(inputs, layers.ReLU(name="r")(layers.Add(name="s")([x, y])))
    )
    path = tmp_path / "model.h5"
    built.save(path)
    zoo.as_keras_2(path)

    def operators(config):
        functions = {
            "s": ("__operators__.add", [["a", 0, 0, {"y": ["b", 0, 0], "name": None}]]),
            "r": ("nn.relu", [["s", 0, 0, {"name": None}]]),
        }
        for layer in config["config"]["layers"]:
            if layer["config"]["name"] in functions:
                function, nodes = functions[layer["config"]["name"]]
                layer["class_name"], layer["inbound_nodes"] = "TFOpLambda", nodes
                layer["config"] = {"name": layer["config"]["name"], "function": function}
        return config

    zoo.rewrite(path, operators)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        found = from_keras(path)(images)
    torch.testing.assert_close([found], zoo.answers(built, images), rtol=1e-5, atol=1e-5)

    def constant(config):
        layer = next(e for e in config["config"]["layers"] if e["config"]["name"] == "s")
        layer["inbound_nodes"][0][3]["y"] = 0.5
        return config

    zoo.rewrite(path, constant)
    with pytest.raises(KerasImportError, match=r"add\) is called with y=0\.5"):
        from_keras(path)


CHANNELS = 1 << 14


@pytest.fixture
def large(tmp_path):
    """A model whose kernel is 9.4 MB and, being zeros, a few kB when compressed."""
    built = model(layers.Conv2D(16, 3, name="a"), layers.Conv2D(CHANNELS, 3, name="b"))
    built.get_layer("b").set_weights([0 * abs(w) for w in built.get_layer("b").get_weights()])

    def save(suffix):
        built.save(tmp_path / f"model{suffix}")
        return tmp_path / f"model{suffix}"

    return save


def kernel_of(weights):
    found = []
    weights.visititems(lambda _, item: found.append(item) if is_kernel(item) else None)
    return found[0]


def is_kernel(item):
    return isinstance(item, h5py.Dataset) and item.shape == (3, 3, 16, CHANNELS)


def replaced(**options):
    def change(weights):
        kernel = kernel_of(weights)
        group, name, shape = kernel.parent, kernel.name.rpartition("/")[2], kernel.shape
        del group[name]
        group.create_dataset(name, shape, "float32", **options)

    return change


BOMBS = {
    "declared": ({}, "declared, .* but not stored"),
    "declared in chunks": ({"chunks": (3, 3, 16, 1024)}, "declared, .* but not stored"),
    "compressed": (
        {"chunks": (3, 3, 16, CHANNELS), "compression": "gzip", "data": 0.0},
        "declares 9437184 bytes, far more",
    ),
}


@pytest.mark.fault(69)
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("name", BOMBS)
def test_arrays_that_are_not_there(name, suffix, large, tmp_path):
    options, message = BOMBS[name]
    options = dict(options)
    filled = options.pop("data", None)
    path = large(suffix)

    def change(weights):
        replaced(**options)(weights)
        if filled is not None:
            kernel_of(weights)[...] = filled

    zoo.rewrite(path, weights=change)
    repack(path)
    with pytest.raises(CheckpointError, match=message):
        from_keras(path)


@pytest.mark.fault(69)
def test_one_chunk_missing(large):
    path = large(".h5")

    def change(weights):
        replaced(chunks=(3, 3, 16, 1024))(weights)
        kernel_of(weights)[..., 1024:] = 1.0

    zoo.rewrite(path, weights=change)
    with pytest.raises(CheckpointError, match="but not stored"):
        from_keras(path)


@pytest.mark.fault(69)
def test_one_array_under_many_names(tmp_path):
    """Hard links: 200 layers that all hold the same 2.4 MB."""
    path = tmp_path / "model.h5"
    shape = (1, 1, 768, 768)
    model(layers.Conv2D(768, 1, use_bias=False, name="a")).save(path)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        first, last = config["config"]["layers"]
        text = json.dumps(last)
        names = [f"b{i}" for i in range(60)]
        first["config"]["batch_shape"] = [None, 8, 8, 768]
        config["class_name"] = "Sequential"
        config["config"] = {"name": "m", "layers": [first]}
        config["config"]["layers"] += [json.loads(text.replace('"a"', f'"{n}"')) for n in names]
        file.attrs["model_config"] = json.dumps(config)
        data = file.create_dataset("data", data=torch.randn(shape).numpy())
        for name in names:
            group = file["model_weights"].create_group(name)
            group["kernel"], group.attrs["weight_names"] = data, ["kernel"]
    with pytest.raises(CheckpointError, match="far more than a file of its size"):
        from_keras(path)


def repack(path):
    """The file anew, without the room that deleted arrays leave behind."""
    if path.suffix == ".h5":
        with h5py.File(path) as old, h5py.File(path.with_suffix(".new"), "w") as new:
            new.attrs.update(old.attrs)
            old.copy("model_weights", new)
        path.with_suffix(".new").replace(path)
        return
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    inner = path.with_suffix(".h5")
    inner.write_bytes(members["model.weights.h5"])
    with h5py.File(inner) as old, h5py.File(path.with_suffix(".new"), "w") as new:
        for name in old:
            old.copy(name, new)
    members["model.weights.h5"] = path.with_suffix(".new").read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.fault(69)
def test_a_zip_that_grows(large):
    path = large(".keras")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match=r"model\.weights\.h5 declares 9\d{6} bytes, far"):
        from_keras(path)


@pytest.mark.fault(69)
def test_a_compressed_file_of_real_numbers_is_read(tmp_path):
    built = model(layers.Conv2D(64, 3), layers.Conv2D(64, 3))
    built.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(tmp_path / "model.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    images = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        found = from_keras(tmp_path / "model.keras")(images)
    torch.testing.assert_close([found], zoo.answers(built, images), rtol=1e-5, atol=1e-5)


@pytest.mark.fault(69)
def test_a_layer_of_any_size_takes_no_memory_before_its_weights(tmp_path):
    """Its configuration says 216 TB, more than there are addresses; the file holds 8 filters."""
    path = tmp_path / "model.h5"
    model(layers.Conv2D(8, 3, name="a")).save(path)

    def config(found):
        found["config"]["layers"][1]["config"]["filters"] = 2 * 10**12
        return found

    zoo.rewrite(path, config)
    with pytest.raises(CheckpointError, match=r"a/kernel is float32 \(3, 3, 3, 8\), wanted"):
        from_keras(path)
