"""Keras models whose layers meet in unusual ways, against Keras' own answers."""

import pytest
import torch
from helpers import real_images

import fastres
from fastres.formats.keras_import import from_keras

zoo = pytest.importorskip("keras_models", exc_type=ImportError)  # it chooses Keras' backend

keras, layers = zoo.keras, zoo.layers

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:keras"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
FORMS = ("keras 3 .keras", "keras 3 .h5", "tf.keras 2 .keras", "tf.keras 2 .h5")


def written(model, form, folder):
    path = folder / f"model.{form.rpartition('.')[2]}"
    model.save(path)
    if form.startswith("tf"):
        zoo.as_keras_2(path)
    return path


def same(build, form, folder, size):
    """The imported model and its fused copy answer as Keras does."""
    model = zoo.adversarial_(build())
    images = real_images(3, max(size))[:, :, : size[0], : size[1]].contiguous()
    wanted = zoo.answers(model, images)
    imported = from_keras(written(model, form, folder))
    for run in (imported, fastres.optimize(imported, example_input=images)):
        with torch.no_grad():
            found = run(images)
        if isinstance(found, dict):
            found = [found[key] for key in sorted(found)]
        found = found if isinstance(found, list) else [found]
        # The bound that is promised; what is wrong here moves outputs by 1e-2 and more.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    return imported


def image(*shape):
    return keras.Input(shape or (12, 12, 3))


def flattened(channels=4):
    inputs = image(6, 7, 3)
    return inputs, layers.Flatten()(layers.Conv2D(channels, 3)(inputs))


def norm():
    inputs, x = flattened()
    return keras.Model(inputs, layers.Dense(5)(layers.BatchNormalization()(x)))


def norms_without_parts():
    inputs, x = flattened()
    x = layers.BatchNormalization(scale=False)(layers.Dropout(0.5)(layers.ReLU()(x)))
    x = layers.Activation("relu")(layers.BatchNormalization(center=False)(x))
    return keras.Model(inputs, layers.BatchNormalization()(layers.Dense(5)(x)))


def flattened_output():
    inputs, x = flattened()
    return keras.Model(inputs, [x, layers.Softmax()(x), layers.BatchNormalization()(x)])


def sums_of_flattened():
    """Of two that are flattened alike, of one that is not flattened, of other channels."""
    inputs, x = flattened()
    other = layers.Flatten()(layers.AveragePooling2D(2)(layers.Conv2D(20, 3)(inputs)))
    y = layers.Add()([layers.Dense(80)(x), x])
    z = layers.Add()([x, layers.BatchNormalization()(x)])
    wide = layers.Add()([other, layers.ReLU()(other)])
    return keras.Model(inputs, [layers.Dense(3)(y), layers.Dense(3)(z), wide])


def flattened_otherwise():
    inputs = image(6, 6, 3)
    x = layers.Flatten()(layers.Conv2D(4, 3)(inputs))
    y = layers.Flatten()(layers.AveragePooling2D(2)(layers.Conv2D(16, 3)(inputs)))
    return keras.Model(inputs, layers.Dense(3)(layers.Add()([x, y])))


def one_norm_of_several():
    """One norm on maps flattened in two ways, and on what is not flattened at all."""
    inputs = image(6, 6, 3)
    x = layers.Flatten()(layers.Conv2D(4, 3)(inputs))
    y = layers.Flatten()(layers.AveragePooling2D(2)(layers.Conv2D(16, 3)(inputs)))
    shared, dense = layers.BatchNormalization(), layers.Dense(64)
    outputs = [dense(shared(x)), shared(dense(y)), shared(y)]
    return keras.Model(inputs, outputs)


def flat_head_in_a_model():
    inner = keras.Sequential([keras.Input((64,)), layers.BatchNormalization(), layers.Dense(3)])
    inputs = image(6, 6, 3)
    return keras.Model(inputs, inner(layers.Flatten()(layers.Conv2D(4, 3)(inputs))))


FLAT = {
    norm: (6, 7),
    norms_without_parts: (6, 7),
    flattened_output: (6, 7),
    sums_of_flattened: (6, 7),
    flattened_otherwise: (6, 6),
    one_norm_of_several: (6, 6),
    flat_head_in_a_model: (6, 6),
}


@pytest.mark.fault(42)
@pytest.mark.parametrize("build", FLAT)
@pytest.mark.parametrize("form", FORMS[:2])
def test_weights_per_feature_follow_keras_order(build, form, tmp_path):
    same(build, form, tmp_path, FLAT[build])


def inner(**options):
    inputs = image()
    return keras.Model(inputs, layers.Conv2D(3, 3, padding="same")(inputs), **options)


def once():
    inputs = image()
    return keras.Model(inputs, inner()(inputs))


def twice():
    base, inputs = inner(), image()
    first = base(inputs)
    second = base(first)
    return keras.Model(inputs, [first, layers.GlobalAveragePooling2D()(second)])


def thrice_backwards():
    base, inputs = inner(), image()
    first = base(inputs)
    second = base(first)
    third = base(second)
    return keras.Model(inputs, [third, layers.GlobalAveragePooling2D()(second), first])


def transfer():
    """A frozen base that is called with training=False, as the tutorials have it."""
    inputs = image(20, 20, 3)
    x = layers.Conv2D(6, 3, strides=2, padding="same")(inputs)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    base = keras.Model(inputs, layers.MaxPooling2D(3, 2)(layers.ZeroPadding2D(1)(x)), name="base")
    base.trainable = False
    outer = image(20, 20, 3)
    x = layers.GlobalAveragePooling2D()(base(outer, training=False))
    return keras.Model(outer, layers.Dense(3)(layers.Dropout(0.2)(x)))


def padding_crosses_models():
    """Zeros that the inner model ends with belong to the outer model's convolution."""
    inputs = image()
    base = keras.Model(inputs, layers.ZeroPadding2D(((1, 0), (2, 1)))(inputs))
    outer = image()
    x = base(outer)
    return keras.Model(outer, [layers.Conv2D(4, 3)(x), x])


def several_tensors():
    a = image()
    x = layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same")(a))
    two_out = keras.Model(a, [layers.Conv2D(3, 3, strides=2, padding="same")(x), x])
    c, d = image(6, 6, 3), image(12, 12, 4)
    pooled = [layers.GlobalAveragePooling2D()(layers.Conv2D(5, 1)(c))]
    pooled.append(layers.GlobalMaxPooling2D()(layers.Conv2D(5, 1)(d)))
    two_in = keras.Model([c, d], layers.Add()(pooled))
    stem = keras.Sequential([image(), layers.Conv2D(3, 1), layers.BatchNormalization()])
    inputs = image()
    small, large = two_out(stem(inputs))
    small2, large2 = two_out(stem(stem(inputs)))
    return keras.Model(inputs, [two_in([small, large2]), two_in([small2, large]), large])


def models_in_models():
    def model(depth):
        inputs = x = image()
        for _ in range(2):
            if depth:
                x = model(depth - 1)(x)
            else:
                name = {"name": "same"}
                parts = [image(), layers.Conv2D(3, 3, padding="same", **name), layers.ReLU()]
                x = keras.Sequential(parts)(x)
        return keras.Model(inputs, layers.Add()([x, inputs]))

    inputs, shared = image(), model(1)
    return keras.Model(inputs, shared(shared(inputs)))


def in_a_sequential():
    base = once()
    return keras.Sequential([image(), base, layers.Flatten(), layers.Dense(3)])


def a_model_on_two_sizes():
    inputs = keras.Input((None, None, 3))
    base = keras.Model(inputs, layers.Conv2D(3, 3, strides=2, padding="same")(inputs))
    outer = image(20, 20, 3)
    first = base(outer)
    return keras.Model(outer, [base(base(first)), first])


NESTED = {
    **dict.fromkeys((once, twice, thrice_backwards, padding_crosses_models), (12, 12)),
    **dict.fromkeys((several_tensors, models_in_models, in_a_sequential), (12, 12)),
    **dict.fromkeys((transfer, a_model_on_two_sizes), (20, 20)),
}


@pytest.mark.fault(43)
@pytest.mark.parametrize("build", NESTED)
@pytest.mark.parametrize("form", FORMS)
def test_models_in_models(build, form, tmp_path):
    same(build, form, tmp_path, NESTED[build])


@pytest.mark.fault(43)
def test_outputs_keep_their_names(tmp_path):
    base, inputs = inner(), image()
    x = base(inputs)
    outputs = {"z": x, "a": layers.GlobalAveragePooling2D()(base(x))}
    imported = same(lambda: keras.Model(inputs, outputs), FORMS[0], tmp_path, (12, 12))
    assert set(imported(torch.zeros(1, 3, 12, 12))) == {"a", "z"}


@pytest.mark.fault(43)
def test_weights_of_two_models_at_once(tmp_path):
    """A layer that two inner models share: both hold it in .h5; .keras holds it for one."""
    inputs = image()
    x = layers.Conv2D(3, 3, padding="same")(inputs)
    whole, part = keras.Model(inputs, layers.ReLU()(x)), keras.Model(inputs, x)
    outer = image()
    model = keras.Model(outer, part(whole(outer)))
    same(lambda: model, FORMS[1], tmp_path, (12, 12))
    with pytest.raises(fastres.errors.CheckpointError, match="holds? one: save as .h5"):
        from_keras(written(model, FORMS[0], tmp_path))


def pool_on_three_sizes():
    inputs = image(20, 20, 3)
    pool, mean = layers.MaxPooling2D(3, 2, padding="same"), layers.GlobalAveragePooling2D()
    a = pool(inputs)
    return keras.Model(inputs, [mean(a), mean(pool(pool(a)))])


def convolution_on_three_sizes():
    inputs = image(20, 21, 3)
    conv, norm = layers.Conv2D(3, 3, strides=2, padding="same"), layers.BatchNormalization()
    a = conv(inputs)
    return keras.Model(inputs, [norm(a), norm(conv(conv(a)))])


def sum_that_broadcasts():
    """The sum is as large as the larger, whichever comes first."""
    inputs = image(20, 21, 3)
    mean = layers.GlobalAveragePooling2D(keepdims=True)(inputs)
    sums = [layers.Add()([mean, inputs]), layers.Add()([inputs, mean])]
    return keras.Model(inputs, [layers.Conv2D(2, 3, strides=2, padding="same")(s) for s in sums])


NAMES = (
    *("conv-1", "conv_1", "conv 1", "conv_1_1", "conv_1_activation", "conv_1_activation_1"),
    *("type", "half", "train", "forward", "training", "float", "parameters", "_modules", "add"),
    *("graph", "code", "recompile", "input_size", "x", "self", "torch", "output", "getattr"),
    *("in", "class", "None", "1st", "_1st", "é", "ё", "层", "__class__", "_"),
)


def names_that_collide():
    x = inputs = image(20, 21, 3)
    for name in NAMES:
        x = layers.Conv2D(3, 3, padding="same", activation="relu", name=name)(x)
        x = layers.BatchNormalization()(x)
    return keras.Model(inputs, x)


def suffixes_that_collide():
    inputs = image(20, 21, 3)
    x = layers.ZeroPadding2D(((1, 0), (2, 1)), name="a")(inputs)
    x = layers.Conv2D(3, 3, strides=2, padding="same", activation="relu", name="c")(x)
    x = layers.Conv2D(3, 1, activation="relu", name="c_activation")(x)
    x = layers.ZeroPadding2D(((0, 1), (0, 1)), name="c_pad")(x)
    x = layers.MaxPooling2D(3, 2, padding="same", name="c_pad_pad")(x)
    y = layers.GlobalAveragePooling2D(name="g")(x)
    z = layers.Flatten(name="g_flatten")(x)
    return keras.Model(inputs, [layers.BatchNormalization(name="d_activation")(z), y, x])


def models_named_as_layers():
    def model(name):
        inputs = image()
        x = layers.Conv2D(3, 3, padding="same", name="conv")(inputs)
        return keras.Model(inputs, x, name=name)

    inputs = image()
    x = layers.Conv2D(3, 1, name="conv-")(inputs)
    for name in ("conv", "conv_", "type", "conv_1"):
        x = model(name)(x)
    return keras.Model(inputs, x)


SHARED = {
    pool_on_three_sizes: (20, 20),
    convolution_on_three_sizes: (20, 21),
    sum_that_broadcasts: (20, 21),
    names_that_collide: (20, 21),
    suffixes_that_collide: (20, 21),
    models_named_as_layers: (12, 12),
}


@pytest.mark.fault(44)
@pytest.mark.parametrize("build", SHARED)
@pytest.mark.parametrize("form", FORMS)
def test_each_call_and_each_name_is_its_own(build, form, tmp_path):
    same(build, form, tmp_path, SHARED[build])


@pytest.mark.fault(43)
def test_other_notations(tmp_path):
    """Lists of names too long for one attribute, and groups as tf.keras called them until 2.13."""

    def in_pieces(weights):
        for group in weights.values():
            names = list(group.attrs["weight_names"])
            del group.attrs["weight_names"]
            for i, name in enumerate(names):
                group.attrs[f"weight_names{i}"] = [name]

    def early(weights):
        for group in (weights, weights["layers/functional"]):
            group.move("layers", "_layer_checkpoint_dependencies")

    images = real_images(2, 20)
    for form, change in (("tf.keras 2 .h5", in_pieces), ("tf.keras 2 .keras", early)):
        model = zoo.adversarial_(transfer())
        path = written(model, form, tmp_path)
        zoo.rewrite(path, weights=change)
        with torch.no_grad():
            found = from_keras(path)(images)
        torch.testing.assert_close([found], zoo.answers(model, images), rtol=1e-5, atol=1e-5)


@pytest.mark.fault(44)
@pytest.mark.parametrize("frozen", [(), (1,), (0, 2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("form", [FORMS[1], FORMS[3]])
def test_layers_that_were_renamed(form, frozen, tmp_path):
    """As before two models of one kind are joined: in .h5 the variables keep the old names."""
    inputs = image()
    x = layers.Conv2D(3, 3, padding="same", name="a")(inputs)
    x = layers.BatchNormalization(name="b")(x)
    x = layers.Conv2D(3, 3, padding="same", name="c")(x)
    base = keras.Model(inputs, layers.BatchNormalization(name="d")(x))
    for index in frozen:
        base.layers[1 + index].trainable = False
    for layer in base.layers[1:]:
        layer.name = f"old_{layer.name}"
    outer = image()
    same(lambda: keras.Model(outer, base(outer)), form, tmp_path, (12, 12))


@pytest.mark.fault(44)
@pytest.mark.parametrize("form", FORMS[:2])
def test_names_with_slashes(form, tmp_path):
    """tf.keras 2 allows them (its DenseNet); in .h5 they are groups in groups."""
    model = zoo.adversarial_(convolution_on_three_sizes())
    images = real_images(2, 21)[:, :, :20].contiguous()
    path = written(model, form, tmp_path)
    names = [layer.name for layer in model.layers if layer.weights]

    def config(found):
        text = zoo.json.dumps(found)
        for name in names:
            text = text.replace(f'"{name}"', f'"block/{name}/a"')
        return zoo.json.loads(text)

    def weights(groups):
        for name in names:
            if path.suffix == ".h5":
                groups.move(name, f"block/{name}/a")
            else:
                groups[f"layers/{name_of(name)}/vars"].attrs["name"] = f"block/{name}/a"

    zoo.rewrite(path, config, weights)
    with torch.no_grad():
        found = from_keras(path)(images)
    torch.testing.assert_close(found, zoo.answers(model, images), rtol=1e-5, atol=1e-5)


def name_of(layer):
    return "conv2d" if layer.startswith("conv2d") else "batch_normalization"


@pytest.mark.fault(44)
def test_a_layer_called_twice_has_one_set_of_weights(tmp_path):
    imported = same(convolution_on_three_sizes, FORMS[0], tmp_path, (20, 21))
    assert len(list(imported.parameters())) == 4
