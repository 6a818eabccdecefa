"""``fastres verify model.keras``: an import measured against Keras itself."""

import json

import numpy as np
import pytest
import torch

from fastres import cli
from fastres.formats import keras_check, keras_import
from fastres.formats.keras_import import from_keras

zoo = pytest.importorskip("keras_models", exc_type=ImportError)  # it chooses Keras' backend

keras, layers = zoo.keras, zoo.layers

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:keras"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def run(capsys):
    """``run(*arguments)`` is (exit code, standard output, standard error), joined to one line."""

    def call(*arguments):
        code = cli.run(list(map(str, arguments)))
        return code, *(" ".join(text.split()) for text in capsys.readouterr())

    return call


def flat_head():
    inputs = keras.Input((12, 9, 3))
    x = layers.BatchNormalization()(layers.Conv2D(4, 3)(inputs))
    x = layers.BatchNormalization()(layers.Flatten()(x))
    return keras.Model(inputs, [layers.Dense(5, activation="softmax")(x), layers.Dense(1)(x)])


def open_size():
    inputs = keras.Input((None, None, 3))
    x = layers.Conv2D(4, 3, strides=2, padding="same")(inputs)
    return keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling2D()(x)))


@pytest.fixture(params=[".keras", ".h5"])
def file(request, tmp_path):
    def save(build):
        path = tmp_path / f"model{request.param}"
        zoo.adversarial_(build()).save(path)
        return path

    return save


@pytest.mark.fault(42)
def test_verify_of_a_right_import(run, file):
    path = file(flat_head)
    code, out, _ = run("verify", path, "--json")
    found = json.loads(out)
    assert (code, found["ok"]) == (0, True)
    assert found["keras"] == f"{keras.__version__} on torch"
    assert [r["shape"] for r in found["runs"]] == [[8, 3, 12, 9]] * 4 + [[1, 3, 12, 9]] * 4
    assert all(0 <= run["max_abs"] <= 1e-5 for run in found["runs"])
    assert run("verify", path, "--batch", 2)[1].startswith("right against Keras")


@pytest.mark.fault(42)
def test_verify_takes_several_sizes_where_they_are_open(run, file):
    path = file(open_size)
    code, out, _ = run("verify", path, "--size", 31, "--batch", 2, "--json")
    shapes = [r["shape"] for r in json.loads(out)["runs"] if r["what"].startswith("fused")]
    assert code == 0
    assert shapes == [[2, 3, 31, 31], [2, 3, 32, 37], [1, 3, 31, 31]]


@pytest.mark.fault(42)
def test_verify_finds_features_in_the_wrong_order(run, file, monkeypatch):
    filled = keras_import.filled
    monkeypatch.setattr(keras_import, "filled", lambda m, values, _: filled(m, values, None))
    code, out, _ = run("verify", file(flat_head))
    assert code == 1
    assert out.startswith("WRONG against Keras")


WRONG = {
    "eps": lambda m: setattr(m.batch_normalization, "eps", 1e-5),
    "bias": lambda m: m.conv2d.bias.data.zero_(),
    "one weight": lambda m: m.conv2d.weight.data[2, 1, 0].mul_(1.1),
    "kernel": lambda m: m.conv2d.weight.data.copy_(m.conv2d.weight.data.transpose(2, 3).clone()),
    "one feature": lambda m: m.batch_normalization_1.running_mean[7].add_(0.1),
}


@pytest.mark.fault(42)
@pytest.mark.parametrize("name", WRONG)
def test_verify_finds_small_mistakes(name, tmp_path, run, monkeypatch):
    keras.utils.clear_session()
    zoo.adversarial_(flat_head()).save(tmp_path / "model.keras")

    def wrong(*arguments, **options):
        module = from_keras(*arguments, **options)
        WRONG[name](module)
        return module

    monkeypatch.setattr(keras_check, "from_keras", wrong)
    code, out, _ = run("verify", tmp_path / "model.keras", "--json")
    found = json.loads(out)
    assert (code, found["ok"]) == (1, False)
    assert not any(r["ok"] for r in found["runs"] if "output 1" in r["what"])


@pytest.mark.fault(42)
@pytest.mark.parametrize("channels", [1, 3])
def test_verify_on_photographs(channels, tmp_path, run, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), "uint8")
    image.fromarray(pixels).save(tmp_path / "a.png")
    inputs = keras.Input((9, 7, channels))
    x = layers.GlobalMaxPooling2D()(layers.Conv2D(4, 3)(inputs))
    zoo.adversarial_(keras.Model(inputs, x)).save(tmp_path / "model.keras")
    seen = []
    call = keras_check.KerasModel.__call__
    monkeypatch.setattr(
        keras_check.KerasModel, "__call__", lambda self, x: (seen.append(x), call(self, x))[1]
    )
    photograph = ("--images", tmp_path / "a.png")
    code, out, _ = run("verify", tmp_path / "model.keras", *photograph, *photograph)
    assert code == 0, out
    (images,) = seen
    assert images.shape == (2, channels, 9, 7)
    if channels == 3:  # of its own size, so that nothing is resized
        assert torch.equal(images[0], torch.from_numpy(pixels).permute(2, 0, 1).float())
    code, _, err = run("verify", tmp_path / "model.keras", "--images", tmp_path / "gone.png")
    assert code == 2
    assert "there is no such file" in err


@pytest.mark.fault(42)
def test_verify_of_mixed_precision(run, file):
    """Keras' own rounding to bfloat16, 1e-3 here, would hide what is wrong with an import."""

    def mixed():
        keras.config.set_dtype_policy("mixed_bfloat16")
        try:
            return flat_head()
        finally:
            keras.config.set_dtype_policy("float32")

    code, out, _ = run("verify", file(mixed), "--json")
    assert code == 0
    assert all(0 <= run["max_abs"] <= 1e-5 for run in json.loads(out)["runs"])


@pytest.mark.fault(42)
def test_verify_loads_safely(run, file, monkeypatch):
    """Keras is asked for its safe mode, and not at all where a file names other modules."""
    path, asked = file(open_size), []
    load = keras.models.load_model

    def watched(path, **options):
        asked.append(options)
        return load(path, **options)

    monkeypatch.setattr(keras.models, "load_model", watched)
    assert run("verify", path, "--size", 16, "--batch", 1)[0] == 0
    assert asked == [{"compile": False, "safe_mode": True}]

    def foreign(config):
        layer = next(e for e in config["config"]["layers"] if e["class_name"] == "Conv2D")
        payload = {"module": "os", "class_name": "function", "config": "system"}
        layer["config"]["kernel_initializer"] = payload
        return config

    zoo.rewrite(path, foreign)
    code, _, err = run("verify", path, "--size", 16)
    assert (code, len(asked)) == (2, 1)
    assert "names 'os', no module of Keras: it is not loaded" in err


@pytest.mark.fault(42)
def test_verify_never_shows_keras_a_lambda(run, file, monkeypatch):
    monkeypatch.setattr(keras.models, "load_model", lambda *_, **__: pytest.fail("loaded"))
    path = file(lambda: keras.Sequential([keras.Input((8, 8, 3)), layers.Lambda(lambda x: x)]))
    code, _, err = run("verify", path)
    assert code == 2
    assert "(Lambda) is not supported" in err


@pytest.mark.fault(43)
def test_verify_of_a_file_that_this_keras_cannot_load(run, file):
    def nested():
        inputs = keras.Input((12, 9, 3))
        x = layers.Conv2D(4, 3)(inputs)
        outer = keras.Input((12, 9, 3))
        return keras.Model(outer, layers.Flatten()(keras.Model(inputs, x)(outer)))

    path = file(nested)
    assert run("verify", path)[0] == 0
    zoo.as_keras_2(path)
    code, _, err = run("verify", path)
    assert code == 2
    assert "compare where the Keras that wrote it is installed" in err


def test_outputs_of_another_shape_are_wrong():
    one, two = torch.ones(2, 3), torch.ones(2, 4)
    found = keras_check._compared("x", torch.ones(2, 3, 4, 4), one, two, two, two.double())
    assert (found.ok, found.max_abs) == (False, None)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_none_must_agree(value):
    one = torch.tensor([[1.0, value]])
    for other, ok in ((one, True), (torch.tensor([[1.0, 2.0]]), False)):
        exact = other.nan_to_num(posinf=0.0).double()
        found = keras_check._compared("x", torch.ones(1), one, other, exact.float(), exact)
        assert found.ok == ok
