"""The same parameters give the same affine convolution as in every other front end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import contract
from contract import EPSILON, SIZE


def norm(p: Mapping[str, Any], name: str, x: Any) -> Any:
    layer = layers.BatchNormalization(epsilon=EPSILON)
    y = layer(x)
    layer.set_weights([p[f"{name}.{word}"] for word in ("gamma", "beta", "mean", "variance")])
    return y


def weighted(layer: Any, x: Any, *weights: Any) -> Any:
    y = layer(x)
    layer.set_weights(list(weights))
    return y


def taps_first(kernel: Any) -> Any:
    """``(out, in, *taps)`` as Keras stores it: ``(*taps, in, out)``."""
    return np.moveaxis(kernel, (0, 1), (-1, -2))


def repvgg(p: Mapping[str, Any], x: Any) -> Any:
    three = layers.Conv2D(4, 3, padding="same", groups=2, use_bias=False)
    one = layers.Conv2D(4, 1, groups=2, use_bias=False)
    branch = norm(p, "one", weighted(one, x, taps_first(p["one"])))
    total = norm(p, "three", weighted(three, x, taps_first(p["three"]))) + branch * float(p["alpha"])
    return total + norm(p, "identity", x)


def norm_before_and_behind(p: Mapping[str, Any], x: Any) -> Any:
    conv = layers.Conv2D(5, (3, 2), strides=2)
    return norm(p, "behind", weighted(conv, norm(p, "before", x), taps_first(p["weight"]), p["bias"]))


def dense(p: Mapping[str, Any], x: Any) -> Any:
    x = weighted(layers.Dense(9), x, p["wide"].T, p["wide_bias"])
    return norm(p, "norm", weighted(layers.Dense(2), x, p["narrow"].T, p["narrow_bias"]))


def transposed(p: Mapping[str, Any], x: Any) -> Any:
    turned = layers.Conv2DTranspose(3, 4, strides=2, padding="same", use_bias=False)
    return norm(p, "norm", weighted(turned, x, taps_first(p["weight"])))


MODELS = {made.__name__: made for made in (repvgg, norm_before_and_behind, dense, transposed)}


@pytest.mark.parametrize("name", contract.CASES)
def test_the_same_parameters_are_the_same_convolution_everywhere(name: str) -> None:
    x = keras.Input((4,) if name == "dense" else (SIZE, SIZE, 4))
    model = keras.Model(x, MODELS[name](contract.CASES[name].parameters, x))
    contract.assert_lifts_to(contract.CASES[name], model, None)
