"""Each kind of layer with a kernel, and what tests of layers on a backend need."""

from __future__ import annotations

import warnings

import keras
import numpy as np
from keras import layers, ops

from refold.keras import WeightNormalization

BACKEND = keras.backend.backend()
# torch compiles for minutes, and steps out of the compiled code at each Keras layer, wrapped or not.
COMPILES = BACKEND != "torch"


def image(*shape):
    return np.random.default_rng(1).normal(size=shape).astype("float32")


def tokens(*shape):
    return np.random.default_rng(1).integers(0, 7, size=shape)


# Each kind of layer: how to make it, an input, its kernels with the axes of their output units, and the
# axis of the output that numbers these units (None where several kernels or tokens share it).
KINDS = {
    "dense": (lambda: layers.Dense(3), image(4, 5), {"kernel": (1,)}),
    "dense on steps": (lambda: layers.Dense(3, activation="tanh"), image(2, 4, 5), {"kernel": (1,)}),
    "einsum": (lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3)), image(2, 3, 4), {"kernel": (1, 2)}),
    "einsum two sums": (
        lambda: layers.EinsumDense("abcd,cde->abe", (None, 3)),
        image(2, 3, 4, 5),
        {"kernel": (2,)},
    ),
    "einsum shared": (lambda: layers.EinsumDense("abc,bcd->abd", (3, 4)), image(2, 3, 5), {"kernel": (0, 2)}),
    "einsum elided": (lambda: layers.EinsumDense("...x,yx->...y", 4), image(2, 3, 5), {"kernel": (0,)}),
    "conv1d": (lambda: layers.Conv1D(3, 2, padding="causal"), image(2, 6, 4), {"kernel": (2,)}),
    "conv2d": (lambda: layers.Conv2D(4, 3, strides=2, padding="same"), image(2, 5, 5, 3), {"kernel": (3,)}),
    "conv2d in groups": (lambda: layers.Conv2D(6, 3, groups=2), image(2, 5, 5, 4), {"kernel": (3,)}),
    "conv3d": (lambda: layers.Conv3D(2, 2), image(1, 3, 3, 3, 2), {"kernel": (4,)}),
    "conv1d transposed": (lambda: layers.Conv1DTranspose(3, 2, strides=2), image(2, 4, 5), {"kernel": (1,)}),
    "conv2d transposed": (lambda: layers.Conv2DTranspose(3, 2), image(2, 4, 4, 5), {"kernel": (2,)}),
    "conv3d transposed": (lambda: layers.Conv3DTranspose(3, 2), image(1, 2, 2, 2, 4), {"kernel": (3,)}),
    "depthwise 1d": (lambda: layers.DepthwiseConv1D(3, depth_multiplier=2), image(2, 5, 3), {"kernel": (1, 2)}),
    "depthwise 2d": (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), image(2, 5, 5, 3), {"kernel": (2, 3)}),
    "separable 1d": (
        lambda: layers.SeparableConv1D(4, 3, depth_multiplier=2),
        image(2, 5, 3),
        {"depthwise_kernel": (1, 2), "pointwise_kernel": (2,)},
    ),
    "separable 2d": (
        lambda: layers.SeparableConv2D(4, 3),
        image(2, 5, 5, 3),
        {"depthwise_kernel": (2, 3), "pointwise_kernel": (3,)},
    ),
    "embedding": (lambda: layers.Embedding(7, 4), tokens(2, 5), {"embeddings": (0,)}),
}


def number(tensor):
    return np.asarray(ops.convert_to_numpy(tensor)).astype("float64")


def close(a, b, tolerance=2e-6):
    a, b = number(a), number(b)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1e-30, np.max(np.abs(b))))


def loss(layer, x, y):
    return ops.mean((layer(x) - ops.convert_to_tensor(y)) ** 2)


def gradients(function, variables):
    """d function() / d variable for each Keras variable, in numpy."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = function()
        found = tape.gradient(value, [v.value for v in variables])
    elif BACKEND == "torch":
        import torch

        for v in variables:
            v.value.grad = None
        found = torch.autograd.grad(function(), [v.value for v in variables])
    else:
        import jax

        def stateless(values):
            with keras.StatelessScope(list(zip(variables, values, strict=True))):
                return function()

        found = jax.grad(stateless)([v.value for v in variables])
    return [np.asarray(ops.convert_to_numpy(gradient)) for gradient in found]


def along(function, variables, tangents):
    """function() moved along tangents of each Keras variable, in forward mode, in numpy."""

    def stateless(*values):
        with keras.StatelessScope(list(zip(variables, values, strict=True))):
            return function()

    values = [ops.convert_to_tensor(v.value) for v in variables]
    tangents = [ops.convert_to_tensor(tangent) for tangent in tangents]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.autodiff.ForwardAccumulator(values, tangents) as accumulator:
            moved = accumulator.jvp(stateless(*values))
    elif BACKEND == "torch":
        import torch

        _, moved = torch.func.jvp(stateless, tuple(v.detach() for v in values), tuple(tangents))
    else:
        import jax

        _, moved = jax.jvp(stateless, values, tangents)
    return number(moved)


# What the rows of a weight can go through.
NORMALIZERS = {
    **{name: lambda name=name: name for name in ("layer", "rms", "unit")},
    "LayerNormalization": lambda: layers.LayerNormalization(),
    "RMSNormalization": lambda: layers.RMSNormalization(),
    "UnitNormalization": lambda: layers.UnitNormalization(),
    "GroupNormalization": lambda: layers.GroupNormalization(groups=1),
}


def quietly(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def built(name="unit", kernel=None, layer=None, **options):
    layer = layer or layers.Dense(3, use_bias=False)
    wrapped = WeightNormalization(layer, name, **options)
    quietly(lambda: wrapped.build((None, 6)))
    if kernel is not None:
        layer.set_weights([kernel.astype("float32")])
        wrapped.reset_gain()
    return wrapped
