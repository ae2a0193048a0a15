"""Initialization from a batch: mean 0 and variance 1, layer by layer, once or twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from refold.keras import WeightNormalization, initialize_from_data

RNG = np.random.default_rng(0)
CHANNELS_FIRST = keras.config.backend() != "tensorflow"  # which has no such convolutions on a CPU


def number(tensor: Any) -> Any:
    return np.asarray(keras.ops.convert_to_numpy(tensor)).astype("float64")


def weights(model: Any) -> list[Any]:
    return [number(variable) for variable in model.weights]


def statistics(layer: Any, x: Any, axis: int = -1) -> tuple[Any, Any]:
    y = np.moveaxis(number(layer(x)), axis, 0)
    y = y.reshape(len(y), -1)
    return y.mean(axis=1), y.std(axis=1)


KINDS: dict[str, Callable[[], Any]] = {
    "conv": lambda: layers.Conv2D(4, 3, padding="same"),
    "strided": lambda: layers.Conv2D(4, 3, strides=2),
    "depthwise": lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
    "transposed": lambda: layers.Conv2DTranspose(4, 3, strides=2),
    "dense": lambda: layers.Dense(5),
}


@pytest.mark.parametrize("normalizer", ["unit", "layer", "rms"])
@pytest.mark.parametrize("kind", KINDS)
def test_units_have_mean_0_and_variance_1(kind: str, normalizer: str) -> None:
    x = RNG.normal(2.0, 3.0, (8, 6, 6, 3)).astype("float32")
    layer = WeightNormalization(KINDS[kind](), normalizer=normalizer)
    layer(x)
    assert initialize_from_data(layer, x) == [layer.name]
    mean, deviation = statistics(layer, x)
    np.testing.assert_allclose(mean, 0.0, atol=1e-5)
    np.testing.assert_allclose(deviation, 1.0, atol=1e-5)


@pytest.mark.skipif(not CHANNELS_FIRST, reason="TensorFlow has no channels-first convolutions on a CPU")
def test_channels_first() -> None:
    x = RNG.normal(size=(8, 3, 6, 6)).astype("float32")
    layer = WeightNormalization(layers.Conv2D(4, 3, data_format="channels_first"))
    layer(x)
    initialize_from_data(layer, x)
    np.testing.assert_allclose(statistics(layer, x, axis=1)[1], 1.0, atol=1e-5)


def deep() -> Any:
    """Activations, a layer that is called twice, and one that is none of ours in between."""
    shared = WeightNormalization(layers.Dense(6, activation="relu"), name="shared")
    inputs = keras.Input((6,))
    x = WeightNormalization(layers.Dense(6, activation="tanh"), name="first")(inputs)
    x = layers.LayerNormalization()(shared(x))
    return keras.Model(inputs, WeightNormalization(layers.Dense(2), name="last")(shared(x)))


def test_layers_are_taken_in_order_and_twice_is_once() -> None:
    model, x = deep(), RNG.normal(size=(64, 6)).astype("float32")
    assert initialize_from_data(model, x) == ["first", "shared", "last"]
    np.testing.assert_allclose(statistics(model, x)[1], 1.0, atol=1e-4)
    once = weights(model)
    initialize_from_data(model, x)
    for first, second in zip(once, weights(model), strict=True):
        np.testing.assert_allclose(second, first, atol=1e-4)


def test_activations_are_put_back_and_directions_stay() -> None:
    model, x = deep(), RNG.normal(size=(64, 6)).astype("float32")
    layer = model.get_layer("first").layer
    kernel = number(layer.kernel)
    initialize_from_data(model, x)
    assert layer.activation is keras.activations.tanh
    np.testing.assert_array_equal(number(layer.kernel), kernel)


def test_a_layer_without_bias_gets_the_variance_and_a_dead_unit_keeps_its_gain() -> None:
    x = RNG.normal(size=(64, 3)).astype("float32")
    plain = layers.Dense(3, use_bias=False)
    plain(x)
    kernel = number(plain.kernel)
    kernel[:, 1] = 0.0
    plain.kernel.assign(kernel)
    layer = WeightNormalization(plain)
    with pytest.warns(UserWarning, match="no direction"):
        layer(x)
    gain = number(layer.gain)
    initialize_from_data(layer, x)
    assert number(layer.gain)[1] == gain[1]
    np.testing.assert_allclose(statistics(layer, x)[1], [1.0, 0.0, 1.0], atol=1e-5)


@pytest.mark.parametrize(
    ("make", "shape", "said"),
    [
        (lambda: WeightNormalization(layers.LSTM(2)), (4, 5, 3), "does not know which output"),
        (lambda: WeightNormalization(layers.SeparableConv1D(2, 2)), (4, 5, 3), "does not know which output"),
    ],
    ids=["recurrent", "separable"],
)
def test_what_cannot_be_initialized_is_refused_and_nothing_changed(make: Any, shape: Any, said: str) -> None:
    x = RNG.normal(size=shape).astype("float32")
    model = keras.Sequential([WeightNormalization(layers.Dense(3)), make()])
    model(x)
    before = weights(model)
    with pytest.raises(ValueError, match=said):
        initialize_from_data(model, x)
    assert all(np.array_equal(old, new) for old, new in zip(before, weights(model), strict=True))


@pytest.mark.filterwarnings("ignore:Weight normalization")
def test_without_a_gain_there_is_nothing_to_set() -> None:
    x = RNG.normal(size=(4, 3)).astype("float32")
    layer = WeightNormalization(layers.Dense(2), gain=False)
    layer(x)
    with pytest.raises(ValueError, match="without a gain"):
        initialize_from_data(layer, x)
