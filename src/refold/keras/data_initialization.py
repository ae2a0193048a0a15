"""Data-dependent initialization of weight-normalized layers, from one batch."""

from __future__ import annotations

from typing import Any
from unittest import mock

import keras
import numpy as np
from keras import ops
from keras.src import backend

from refold.keras.normalization import WeightNormalization

layers = keras.layers

# Layers whose output has one axis for the units of their one kernel.
_DENSE = (layers.Dense,)
_CONVOLUTIONS = (
    layers.Conv1D,
    layers.Conv2D,
    layers.Conv3D,
    layers.Conv1DTranspose,
    layers.Conv2DTranspose,
    layers.Conv3DTranspose,
    layers.DepthwiseConv1D,
    layers.DepthwiseConv2D,
)


def initialize_from_data(model: Any, inputs: Any) -> list[str]:
    """Give every weight-normalized layer of ``model`` pre-activations of mean 0 and variance 1 on a batch.

    Source: Salimans and Kingma, "Weight Normalization", arXiv 1602.07868, section 3. For each output unit, with
    the mean and the deviation of its pre-activations over the batch and all positions: ``g <- g / deviation``
    and ``b <- (b - mean) / deviation``. Layers are taken in the order in which they are called, each on what
    the layers before it give by then; a layer that is called more than once is taken at its first call. A layer
    without a bias gets the variance only. A unit that gives one number on the whole batch keeps its gain.

    This changes what the model computes, and doing it twice is as doing it once.

    Args:
        model: a model or layer, called in inference.
        inputs: a batch, as the model takes it.

    Returns:
        The names of the layers that were initialized, in their order.

    Raises:
        ValueError: a weight-normalized layer has no gain, or is of a kind whose output does not have one axis
            for its units (separable and recurrent layers, embeddings, einsum); nothing is changed then.
    """
    wrapped = [layer for layer in model._flatten_layers() if isinstance(layer, WeightNormalization)]
    for layer in wrapped:
        _check(layer)
    done: dict[int, str] = {}
    original = WeightNormalization.call

    def call(layer: Any, x: Any, **kwargs: Any) -> Any:
        if id(layer) not in done:
            done[id(layer)] = layer.name
            _initialize(layer, _pre_activations(original, layer, x, kwargs))
        return original(layer, x, **kwargs)

    with mock.patch.object(WeightNormalization, "call", call):
        model(inputs, training=False)
    return list(done.values())


def _check(layer: Any) -> None:
    inner = layer.layer
    shown = f"the layer {inner.name!r} ({type(inner).__name__})"
    if not layer.use_gain:
        raise ValueError(f"{shown} is normalized without a gain, which data could set.")
    if not isinstance(inner, _DENSE + _CONVOLUTIONS) or layer.axis is not None:
        raise ValueError(
            f"data-dependent initialization does not know which output of {shown} belongs to which gain."
        )


def _pre_activations(call: Any, layer: Any, x: Any, kwargs: dict[str, Any]) -> Any:
    inner = layer.layer
    activation = inner.activation
    inner.activation = keras.activations.linear
    try:
        outputs = call(layer, x, **kwargs)
    finally:
        inner.activation = activation
    return np.asarray(backend.convert_to_numpy(ops.stop_gradient(outputs))).astype("float64")


def _initialize(layer: Any, outputs: Any) -> None:
    inner = layer.layer
    first = isinstance(inner, _CONVOLUTIONS) and inner.data_format == "channels_first"
    rows = np.moveaxis(outputs, 1 if first else -1, 0).reshape(int(layer.gain.shape[0]), -1)
    mean, deviation = rows.mean(axis=1), rows.std(axis=1)
    # What is left of a constant by rounding is no deviation.
    varies = deviation > 1e-6 * np.abs(rows).max(axis=1)
    factor = 1.0 / np.where(varies, deviation, 1.0)
    _rescale(layer.gain, factor)
    if layer.offset is not None:
        _rescale(layer.offset, factor)
    if inner.use_bias:
        inner.bias.assign((np.asarray(backend.convert_to_numpy(inner.bias), dtype="float64") - mean) * factor)


def _rescale(variable: Any, factor: Any) -> None:
    variable.assign(np.asarray(backend.convert_to_numpy(variable), dtype="float64") * factor)
