"""Keras files as PyTorch modules, compared with Keras itself on its PyTorch backend."""

import pytest
import torch
from helpers import real_images

import fastres
from fastres.errors import CheckpointError
from fastres.formats.keras_import import from_keras
from fastres.formats.keras_layers import KerasImportError

zoo = pytest.importorskip("keras_models", exc_type=ImportError)  # it chooses Keras' backend
h5py = pytest.importorskip("h5py")

keras, layers, answers = zoo.keras, zoo.layers, zoo.answers

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:keras"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def transfer_learning():
    """A functional network inside a Sequential with a head of its own."""
    inputs = keras.Input((20, 20, 3))
    x = layers.BatchNormalization()(layers.Conv2D(6, 3, strides=2)(inputs))
    x = layers.Add()([x, layers.Conv2D(6, 1)(x)])
    base = keras.Model(inputs, layers.ReLU()(x), name="base")
    head = [layers.Flatten(), layers.Dropout(0.5), layers.Dense(4)]
    return keras.Sequential([keras.Input((20, 20, 3)), base, *head])


def odd():
    """Whatever pads unevenly, and layers with parts left out."""
    inputs = keras.Input((33, 30, 3))
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(inputs)
    x = layers.MaxPooling2D(3, 2, padding="same")(x)
    x = layers.Conv2D(8, 4, padding="same")(x)
    x = layers.ZeroPadding2D(((1, 0), (2, 1)))(x)
    x = layers.Conv2D(8, 3, dilation_rate=2, groups=2, use_bias=False)(x)
    x = layers.BatchNormalization(scale=False)(x)
    x = layers.ZeroPadding2D(1)(x)
    x = layers.MaxPooling2D(3, 1)(x)
    x = layers.AveragePooling2D(3, 1, padding="same")(x)
    y = layers.Flatten()(x)
    y = layers.BatchNormalization(center=False)(layers.Dense(5)(y))
    return keras.Model(inputs, [layers.Softmax()(y), layers.GlobalAveragePooling2D()(x)])


def global_pool():
    inputs = keras.Input((None, None, 1))
    x = layers.Conv2D(6, 3, padding="same", use_bias=False)(inputs)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Add()([x, layers.Conv2D(6, 1)(x), x])
    x = layers.MaxPooling2D(2)(layers.ZeroPadding2D(1)(layers.Activation("relu")(x)))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(x))


MODELS = {
    "32x32, no zero padding": (lambda: zoo.resnet50(32, 10, zero_padding=False, pool=1), 32, 3),
    "64x64, zero padding": (lambda: zoo.resnet50(64, 6, zero_padding=True, pool=2), 64, 3),
    "applications": (
        lambda: keras.applications.ResNet50(weights=None, input_shape=(64, 64, 3), classes=7),
        64,
        3,
    ),
    "transfer learning": (transfer_learning, 20, 3),
    "odd": (odd, (33, 30), 3),
    "global pool": (global_pool, 20, 1),
}


def save(model, folder, suffix):
    path = folder / f"model{suffix}"
    model.save(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_keras(name, tmp_path):
    build, size, channels = MODELS[name]
    model = zoo.adversarial_(build())
    height, width = (size, size) if isinstance(size, int) else size
    images = real_images(3, max(height, width), channels)[:, :, :height, :width].contiguous()
    wanted = answers(model, images)
    for suffix in (".h5", ".keras"):
        imported = from_keras(save(model, tmp_path, suffix))
        check(imported, images, wanted)
    fast = fastres.optimize(imported, verify=False)
    check(fast, images, wanted)
    if name not in ("odd", "global pool"):
        assert {reason for _, reason in fast.plan().fallbacks} <= {"Softmax is not fused"}


def check(run, images, wanted):
    with torch.no_grad():
        found = run(images)
    found = found if isinstance(found, list) else [found]
    # 1e-5 is the bound that is promised; a forgotten part moves these outputs by 1e-2.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_layers_keep_their_names_and_can_be_trained(tmp_path):
    imported = from_keras(save(zoo.resnet50(32, 4, zero_padding=True, pool=1), tmp_path, ".keras"))
    assert imported.res2a_branch2a.in_channels == 64
    assert imported.bn_conv1.eps == 1e-3
    imported.train()
    imported(torch.rand(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None for p in imported.parameters())


class TestOtherVersions:
    """Files in the notations of earlier Keras, made from today's."""

    @pytest.fixture(scope="class")
    def model(self):
        return zoo.adversarial_(global_pool())

    def compare(self, path, model):
        images = real_images(2, 20, 1)
        check(from_keras(path), images, answers(model, images))

    @pytest.mark.parametrize("suffix", [".h5", ".keras"])
    def test_keras_2(self, model, suffix, tmp_path):
        """Lists instead of objects, ``:0`` behind names, ``batch_input_shape``."""
        path = save(model, tmp_path, suffix)
        zoo.as_keras_2(path)
        self.compare(path, model)


def conv(**options):
    inputs = keras.Input((None, None, 3))
    return keras.Model(inputs, layers.Conv2D(4, 3, **options)(inputs))


REFUSED = {
    "LeakyReLU": (
        lambda: keras.Sequential([keras.Input((8, 8, 3)), layers.LeakyReLU(name="leaky")]),
        r"layer 'leaky' \(LeakyReLU\) is not supported",
    ),
    "activation": (lambda: conv(activation="gelu"), "activation='gelu'"),
    "open size": (lambda: conv(strides=2, padding="same"), r"input_size=\(H, W\)"),
    "ReLU6": (
        lambda: keras.Sequential([keras.Input((8, 8, 3)), layers.ReLU(max_value=6)]),
        "'max_value': 6",
    ),
    "axis": (
        lambda: keras.Sequential([keras.Input((8, 8, 3)), layers.BatchNormalization(axis=1)]),
        "normalises axis 1",
    ),
    "uneven mean": (
        lambda: keras.Sequential(
            [keras.Input((8, 8, 3)), layers.AveragePooling2D(2, 1, padding="same")]
        ),
        "one side more",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused_by_name(name, tmp_path):
    build, message = REFUSED[name]
    with pytest.raises(KerasImportError, match=message):
        from_keras(save(build(), tmp_path, ".keras"))


def test_an_open_size_can_be_given(tmp_path):
    model = zoo.adversarial_(conv(strides=2, padding="same"))
    imported = from_keras(save(model, tmp_path, ".keras"), input_size=(9, 12))
    images = real_images(2, 12)[:, :, :9].contiguous()
    check(imported, images, answers(model, images))
    with torch.no_grad(), pytest.raises(AssertionError, match=r"images of \(9, 12\) pixels"):
        imported(images[:, :, :8])


class TestBadFiles:
    @pytest.fixture
    def path(self, tmp_path):
        return save(zoo.adversarial_(global_pool()), tmp_path, ".keras")

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.h5"):
            from_keras(tmp_path / "none.h5")

    def test_weights_only(self, tmp_path):
        global_pool().save_weights(tmp_path / "only.weights.h5")
        with pytest.raises(CheckpointError, match="save the model itself"):
            from_keras(tmp_path / "only.weights.h5")

    @pytest.mark.parametrize("keep", [0, 100, 3000])
    def test_truncated(self, path, keep):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match="truncated or not a Keras model"):
            from_keras(path)

    def test_misshapen_weights(self, path):
        def swap(file):
            kernel = file["layers/conv2d/vars/0"][()]
            del file["layers/conv2d/vars/0"]
            file["layers/conv2d/vars/0"] = kernel.transpose(3, 0, 1, 2)

        zoo.rewrite(path, weights=swap)
        with pytest.raises(CheckpointError, match=r"kernel is float32 .* wanted \(3, 3, 1, 6\)"):
            from_keras(path)

    def test_links_to_other_files_are_not_followed(self, path, tmp_path):
        other = tmp_path / "secret.h5"
        with h5py.File(other, "w") as file:
            file["data"] = torch.zeros(3, 3, 1, 6).numpy()

        def link(file):
            del file["layers/conv2d/vars/0"]
            file["layers/conv2d/vars/0"] = h5py.ExternalLink(str(other), "data")

        zoo.rewrite(path, weights=link)
        with pytest.raises(CheckpointError, match="a link, perhaps to another file"):
            from_keras(path)
