"""Keras on the backend of the process: Keras' own forms, and on JAX those of flax and equinox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from normalized.form import Form, Layer
from refold.keras import SpectralNormalization, WeightNormalization

BACKEND = keras.config.backend()
PACKAGES = {"jax": ("keras", "jax", "flax", "equinox"), "tensorflow": ("keras", "tensorflow-cpu")}.get(
    BACKEND, ("keras", BACKEND)
)
# On torch Keras trains eagerly, and its layers are not made for torch's compiler.
MODES = ("eager",) if BACKEND == "torch" else ("eager", "compiled")

_WAYS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "keras": ("plain", lambda layer: layer),
    'refold "unit"': ("unit", WeightNormalization),
    'refold "layer"': ("layer", lambda layer: WeightNormalization(layer, "layer")),
    "keras SpectralNormalization": ("spectral", keras.layers.SpectralNormalization),
    "refold spectral": ("spectral", SpectralNormalization),
}


def forms(layer: Layer, *, compiled: bool) -> list[Form]:
    keras.utils.set_random_seed(0)
    keras.config.set_image_data_format("channels_last")
    random = np.random.default_rng(0)
    shape = layer.shape(channels_last=True)
    x, cotangent = (random.normal(size=shape).astype("float32") for _ in range(2))
    step = {"jax": _on_jax, "tensorflow": _on_tensorflow, "torch": _on_torch}[BACKEND]
    found = []
    for name, (method, make) in _WAYS.items():
        channels = layer.channels
        dense = keras.layers.Dense(channels)
        plain = dense if layer.dense else keras.layers.Conv2D(channels, 3, padding="same")
        made = make(plain)
        made.build(shape)
        found.append(Form(name, method, "keras", step(made, x, cotangent, compiled)))
    if BACKEND == "jax":
        from normalized import on_jax

        found += on_jax.forms(layer, compiled=compiled)
    return found


def _on_jax(layer: Any, x: Any, cotangent: Any, compiled: bool) -> Callable[[], Any]:
    import jax

    def product(trained: Any, x: Any, others: Any) -> Any:
        given = {"training": True} if layer._call_has_training_arg else {}
        y, others = layer.stateless_call(trained, others, x, **given)
        return (y * cotangent).sum(), others

    trained, others = (
        [v.value for v in found] for found in (layer.trainable_variables, layer.non_trainable_variables)
    )
    cotangent = jax.numpy.asarray(cotangent)
    x = jax.numpy.asarray(x)
    step = jax.value_and_grad(product, argnums=(0, 1), has_aux=True)
    step = jax.jit(step) if compiled else step
    return lambda: jax.block_until_ready(step(trained, x, others))


def _on_tensorflow(layer: Any, x: Any, cotangent: Any, compiled: bool) -> Callable[[], Any]:
    import tensorflow as tf

    x, cotangent = tf.constant(x), tf.constant(cotangent)
    trained = [v.value for v in layer.trainable_variables]

    def step() -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return tape.gradient(y, [*trained, x], output_gradients=cotangent)

    return tf.function(step, jit_compile=True) if compiled else step


def _on_torch(layer: Any, x: Any, cotangent: Any, compiled: bool) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(1)
    x, cotangent = torch.from_numpy(x).requires_grad_(), torch.from_numpy(cotangent)
    assert not compiled
    parameters = list(layer.parameters())

    def step() -> None:
        for tensor in (x, *parameters):
            tensor.grad = None
        layer(x, training=True).backward(cotangent)

    return step
