"""The Keras networks of the tutorials, built as their readers would; run by Keras on PyTorch."""

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
from keras import layers


def _bottleneck(x, kernel, filters, stage, block, stride=None):
    """An identity block; with ``stride`` a convolutional block, strided on the first 1x1."""
    conv, norm = f"res{stage}{block}_branch", f"bn{stage}{block}_branch"
    f1, f2, f3 = filters
    shortcut = x
    x = layers.Conv2D(f1, 1, strides=stride or 1, padding="valid", name=conv + "2a")(x)
    x = layers.BatchNormalization(axis=3, name=norm + "2a")(x)
    x = layers.Activation("relu")(x)
    x = layers.Conv2D(f2, kernel, padding="same", name=conv + "2b")(x)
    x = layers.BatchNormalization(axis=3, name=norm + "2b")(x)
    x = layers.Activation("relu")(x)
    x = layers.Conv2D(f3, 1, padding="valid", name=conv + "2c")(x)
    x = layers.BatchNormalization(axis=3, name=norm + "2c")(x)
    if stride:
        shortcut = layers.Conv2D(f3, 1, strides=stride, padding="valid", name=conv + "1")(shortcut)
        shortcut = layers.BatchNormalization(axis=3, name=norm + "1")(shortcut)
    x = layers.Add()([x, shortcut])
    return layers.Activation("relu")(x)


def resnet50(size, classes, *, zero_padding, pool):
    """(N, size, size, 3) -> (N, classes) probabilities; He et al.'s ResNet-50, version 1."""
    inputs = keras.Input((size, size, 3))
    x = layers.ZeroPadding2D((3, 3))(inputs) if zero_padding else inputs
    x = layers.Conv2D(64, (7, 7), strides=(2, 2), name="conv1")(x)
    x = layers.BatchNormalization(axis=3, name="bn_conv1")(x)
    x = layers.Activation("relu")(x)
    x = layers.MaxPooling2D((3, 3), strides=(2, 2))(x)
    for stage, (blocks, width, stride) in enumerate(
        [(3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)], start=2
    ):
        filters = (width, width, 4 * width)
        for index in range(blocks):
            first = stride if index == 0 else None
            x = _bottleneck(x, 3, filters, stage, "abcdef"[index], stride=first)
    x = layers.AveragePooling2D(pool, name="avg_pool")(x)
    x = layers.Flatten()(x)
    x = layers.Dense(classes, activation="softmax", name=f"fc{classes}")(x)
    return keras.Model(inputs, x, name="ResNet50")


def hostile_(model, seed=0):
    """Weights under which no part can be forgotten: see ``helpers.hostile_``."""
    random = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            hostile_(layer, seed + 1)
            continue
        values = []
        for variable in layer.weights:
            shape, name = variable.shape, variable.name
            if "kernel" in name:
                fan_in = int(np.prod(shape[:-1]))
                value = random.standard_normal(shape) / np.sqrt(fan_in)
                if len(shape) == 2:
                    value *= 0.2  # a softmax near 0 or 1 would hide errors
            elif "gamma" in name:
                value = random.uniform(0.5, 1.5, shape) * random.choice([-1, 1], shape)
                value[0] = 0
            elif "variance" in name:
                value = 0.35 * 16 ** random.uniform(0, 1, shape)
            else:
                value = random.standard_normal(shape) * 0.3
            values.append(value.astype("float32"))
        layer.set_weights(values)
    return model
