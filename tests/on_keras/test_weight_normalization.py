"""WeightNormalization: what it computes, on the backend that KERAS_BACKEND names; run once per backend."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from kinds import KINDS, NORMALIZERS, built, close, gradients, image, loss, number, quietly

from refold.keras.normalization import WeightNormalization
from refold.weights import METHODS, NUMPY, Centered, method

NAMES = sorted(METHODS)
CENTERED = [name for name in NAMES if method(name).centered]

SMALL_MODELS = True  # see conftest.py
pytestmark = pytest.mark.filterwarnings("error:.*(Weight normalization|no direction)")


def weighed(wrapped, weights):
    return ops.sum(wrapped.effective_kernel() * ops.convert_to_tensor(weights))


# ---- every kind of layer -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["dense", "conv2d in groups", "conv2d transposed", "separable 1d", "embedding"])
def test_attaching_changes_nothing(kind, name):
    make, x, kernels = KINDS[kind]
    layer = make()
    before = number(layer(x))
    stored = [v.copy() for v in layer.get_weights()]
    wrapped = WeightNormalization(layer, name)
    close(wrapped(x), before)
    for now, then in zip(layer.get_weights(), stored, strict=True):
        np.testing.assert_array_equal(now, then)
    for attribute, kernel in wrapped.effective_kernels().items():
        close(kernel, getattr(layer, attribute), 3e-7 if name == "layer" else 1e-7)
    assert set(wrapped.effective_kernels()) == set(kernels)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("kind", ["dense", "separable 2d"])
def test_attaching_a_layer_as_normalizer_changes_nothing(kind, normalizer):
    make, x, _ = KINDS[kind]
    layer = make()
    before = number(layer(x))
    close(WeightNormalization(layer, NORMALIZERS[normalizer]())(x), before, 5e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_an_output_units_direction_means_nothing(kind):
    """Scaling a unit's direction changes nothing, scaling its gain is scaling its effective weights."""
    make, x, kernels = KINDS[kind]
    layer = make()
    before = number(layer(x))
    wrapped = WeightNormalization(layer)
    close(wrapped(x), before)
    for attribute, axes in kernels.items():
        variable = getattr(wrapped.layer, attribute)
        shape = variable.shape
        scales = np.ones(shape, "float32")
        for unit in np.ndindex(*(shape[axis] for axis in axes)):
            index = [slice(None)] * len(shape)
            for axis, place in zip(axes, unit, strict=True):
                index[axis] = place
            scales[tuple(index)] = 2.0 ** (1 + sum(unit))
        variable.assign(variable.numpy() * scales)
    close(wrapped(x), before)
    for attribute, axes in kernels.items():
        prefix = attribute.removesuffix("kernel") if len(kernels) > 1 else ""
        gain = getattr(wrapped, prefix + "gain")
        units = tuple(getattr(wrapped.layer, attribute).shape[axis] for axis in axes)
        assert gain.shape == (np.prod(units),)
        effective = number(wrapped.effective_kernels()[attribute])
        factors = 1 + np.arange(gain.shape[0], dtype="float32")
        gain.assign(gain.numpy() * factors)
        along = np.ones(effective.ndim, int)
        for axis, size in zip(axes, units, strict=True):
            along[axis] = size
        close(wrapped.effective_kernels()[attribute], effective * factors.reshape(along))


@pytest.mark.parametrize("kind", ["dense", "conv2d", "conv2d transposed", "depthwise 2d"])
def test_an_output_channel_is_a_unit(kind):
    """The gain of one unit reaches one output channel and no other."""
    make, x, _ = KINDS[kind]
    layer = make()
    wrapped = WeightNormalization(layer)
    before = number(wrapped(x))
    gain = wrapped.gain.numpy()
    gain[2] *= 3
    wrapped.gain.assign(gain)
    factor = np.where(np.arange(before.shape[-1]) == 2, 3, 1)
    close(wrapped(x), before * factor)


@pytest.mark.parametrize("name", ["unit", "layer", "rms"])
def test_formula(name):
    layer = layers.Dense(3, use_bias=False)
    wrapped = WeightNormalization(layer, name)
    wrapped.build((None, 5))
    rng = np.random.default_rng(2)
    kernel, gain, offset = rng.normal(size=(5, 3)) + 1, rng.normal(size=3), rng.normal(size=3)
    layer.set_weights([kernel])
    wrapped.gain.assign(gain)
    if name == "layer":
        wrapped.offset.assign(offset)
    else:
        assert wrapped.offset is None
        offset = np.zeros(3)
    centered = kernel - kernel.mean(0) * (name == "layer")
    size = np.sqrt(np.sum(centered**2, 0) / (1 if name == "unit" else 5))
    close(wrapped.effective_kernel(), gain * centered / size + offset)


@pytest.mark.parametrize("name", NAMES)
def test_one_weight_per_unit(name):
    """A depthwise convolution of one tap: timm's raises there, and an unbiased deviation divides by zero."""
    layer, x = layers.DepthwiseConv2D(1, use_bias=False), image(2, 4, 4, 3)
    before = number(layer(x))
    wrapped = quietly(lambda: WeightNormalization(layer, name))
    close(quietly(lambda: wrapped(x)), before)
    found = gradients(lambda: ops.sum(wrapped(x)), wrapped.trainable_variables)
    assert all(np.isfinite(gradient).all() for gradient in found)


def test_the_axis_can_be_chosen():
    layer = layers.Embedding(7, 4)
    wrapped = WeightNormalization(layer, axis=-1)
    wrapped.build()
    assert wrapped.gain.shape == (4,)
    close(wrapped.gain, np.linalg.norm(layer.get_weights()[0], axis=0))


def test_both_kernels_of_a_separable_convolution():
    wrapped = WeightNormalization(layers.SeparableConv2D(4, 3))
    wrapped(image(2, 5, 5, 3))
    assert wrapped.depthwise_gain.shape == (3,)
    assert wrapped.pointwise_gain.shape == (4,)
    with pytest.raises(ValueError, match="several kernels: depthwise_kernel, pointwise_kernel"):
        wrapped.effective_kernel()


def test_the_documents_example():
    """Dense(64, relu), its weights minus their mean over their deviation plus 1e-10, then LayerNorm."""
    dense = layers.Dense(64, activation="relu")
    with pytest.warns(UserWarning, match=r"by 'layer' without a gain changes the weights of 64 of its 64 output"):
        model = keras.Sequential(
            [
                keras.Input((10,)),
                WeightNormalization(dense, normalizer="layer", epsilon=1e-10, gain=False),
                layers.LayerNormalization(),
            ]
        )
    x = image(8, 10)
    v = dense.get_weights()[0].astype("float64")
    w = (v - v.mean(0)) / (v.std(0) + 1e-10)
    z = np.maximum(x @ w, 0)
    expected = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-3)
    close(model(x), expected, 1e-5)
    centered = v - v.mean(0)
    close(w, np.sqrt(10) * centered / np.linalg.norm(centered, axis=0), 1e-8)
    model.compile("sgd", "mse")
    model.fit(x, image(8, 64), verbose=0)
    assert np.any(dense.get_weights()[0] != v.astype("float32"))


@keras.saving.register_keras_serializable(package="tests")
class Own(layers.Layer):
    """A layer that nobody knows, with a kernel (units, inputs)."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(3, input_shape[-1]), name="kernel")

    def call(self, inputs):
        return ops.matmul(inputs, ops.transpose(self.kernel))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 3)


def test_a_layer_of_ones_own_with_its_axis():
    layer = Own()
    before = number(layer(image(2, 5)))
    wrapped = WeightNormalization(layer, axis=0)
    close(wrapped(image(2, 5)), before)
    assert wrapped.gain.shape == (3,)


# ---- gradients ---------------------------------------------------------------------------------------


def test_the_gradient_is_orthogonal_to_the_direction():
    wrapped = built()
    x, y = image(9, 6), image(9, 3)
    (found,) = gradients(lambda: loss(wrapped, x, y), [wrapped.layer.kernel])
    v = wrapped.layer.get_weights()[0]
    assert np.max(np.abs(found)) > 1e-2
    np.testing.assert_allclose(np.sum(found * v, 0), 0, atol=1e-6)


def test_the_gradient_sums_to_zero_once_centered():
    wrapped = built("layer")
    x, y = image(9, 6), image(9, 3)
    (found,) = gradients(lambda: loss(wrapped, x, y), [wrapped.layer.kernel])
    assert np.max(np.abs(found)) > 1e-2
    np.testing.assert_allclose(np.sum(found, 0), 0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_against_differences_in_float64(name):
    rng = np.random.default_rng(3)
    kernel = rng.normal(size=(6, 3)).astype("float32").astype("float64")
    wrapped = built(name, kernel)
    target = rng.normal(size=(6, 3)).astype("float32")
    variables = [wrapped.layer.kernel, wrapped.gain] + ([wrapped.offset] if name in CENTERED else [])
    found = gradients(lambda: weighed(wrapped, target), variables)
    values = [v.numpy().astype("float64") for v in variables]

    def weighed_in_float64(values):
        columns = [value[:, None] for value in values[1:]]
        return np.sum(method(name).compose(NUMPY, values[0].T, *columns) * target.T)

    for i, gradient in enumerate(found):
        for place in np.ndindex(gradient.shape):
            step = np.zeros_like(values[i])
            step[place] = 1e-6
            up = [value + step if j == i else value for j, value in enumerate(values)]
            down = [value - step if j == i else value for j, value in enumerate(values)]
            assert gradient[place] == pytest.approx(
                (weighed_in_float64(up) - weighed_in_float64(down)) / 2e-6, rel=1e-4, abs=1e-5
            )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gain", [True, False])
def test_extreme_rows_are_finite_forward_and_backward(name, gain):
    pattern = np.array([1.0, -2.0, 3.0, -4.0, 5.0, 0.5])[:, None]
    sizes = np.array([0.0, 1e-45, 1e-40, 1e-30, 1.0, 1e30, 1e37])
    layer = layers.Dense(len(sizes), use_bias=False)
    wrapped = built(name, (pattern * sizes).astype("float32"), layer, gain=gain, epsilon=0.0)
    made = number(wrapped.effective_kernel())
    assert np.all(np.isfinite(made))
    assert np.all(made[:, :3] == 0)
    if gain:
        close(made[:, 3:] / sizes[3:], np.broadcast_to(pattern, (6, 4)))
    else:
        close(made[:, 3:], np.broadcast_to(made[:, 4:5], (6, 4)), 1e-5)
    variables = [layer.kernel] + ([wrapped.gain] if gain else [])
    weigh = image(6, len(sizes))
    for found in gradients(lambda: weighed(wrapped, weigh), variables):
        assert np.all(np.isfinite(found))
    assert np.all(np.isfinite(number(wrapped(np.zeros((2, 6), "float32")))))


def test_units_without_direction_are_told():
    layer = layers.Dense(3, kernel_initializer="zeros")
    with pytest.warns(UserWarning, match=r"of 3 of the 3 output units .* are all zero, which is no direction"):
        WeightNormalization(layer).build((None, 4))
    with pytest.warns(UserWarning, match="all equal"):
        WeightNormalization(layers.Dense(3, kernel_initializer="ones"), "layer").build((None, 4))


# ---- options that change the function ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gain": False}, "by 'unit' without a gain changes the weights of 3 of its 3 output units"),
        ({"normalizer": "layer", "offset": False}, "by 'layer' without an offset for the mean that it takes out"),
        (
            {"normalizer": layers.GroupNormalization(groups=2, name="gn")},
            r"by 'gn' \(GroupNormalization\) changes the weights",
        ),
    ],
)
def test_changing_what_the_layer_computes_is_said(options, said):
    with pytest.warns(UserWarning, match=said):
        WeightNormalization(layers.Dense(3, name="d"), **options).build((None, 4))


def test_it_is_said_too_where_the_model_builds_itself():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.head = WeightNormalization(layers.Dense(3), gain=False)

        def call(self, x):
            return self.head(x)

    model = Net()
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="without a gain"):
        model.fit(image(4, 5), image(4, 3), verbose=0)


# ---- called on symbolic tensors ----------------------------------------------------------------------


def test_call_on_a_symbolic_tensor_hands_the_effective_kernel_to_the_wrapped_layer():
    seen = []

    class Seen(layers.Dense):
        def compute_output_spec(self, inputs):
            seen.append(number(self.kernel))
            return super().compute_output_spec(inputs)

    wrapped = WeightNormalization(Seen(3, use_bias=False))
    wrapped(image(2, 6))
    wrapped.gain.assign(wrapped.gain * 2)
    seen.clear()
    out = wrapped.call(keras.KerasTensor((2, 6)))
    assert isinstance(out, keras.KerasTensor)
    assert out.shape == (2, 3)
    close(seen[-1], 2 * number(wrapped.layer.kernel))


# ---- refusals ----------------------------------------------------------------------------------------


class Quiet(layers.Layer):
    def call(self, inputs):
        return inputs


class LastAxis(layers.Layer):
    def call(self, inputs):
        return inputs[:, :1]

    def compute_output_shape(self, input_shape):
        return (input_shape[0], 1)


REFUSED = {
    "no layer": (lambda: WeightNormalization("dense"), "isn't a supported layer type"),
    "no kernel": (lambda: WeightNormalization(layers.ReLU()), r"\(ReLU\) has no kernel of its own"),
    "attention": (lambda: WeightNormalization(layers.Attention()), "has no kernel of its own"),
    "time distributed": (lambda: WeightNormalization(layers.TimeDistributed(layers.Dense(2))), "has no kernel"),
    "cell": (lambda: WeightNormalization(layers.GRUCell(2)), r"\(GRUCell\) is a recurrent cell, or"),
    "other cells": (lambda: WeightNormalization(layers.ConvLSTM1D(2, 2)), "with cells of another kind than"),
    "stacked cells": (
        lambda: WeightNormalization(layers.RNN([layers.GRUCell(2)] * 2)),
        "with cells of another kind",
    ),
    "twice": (
        lambda: WeightNormalization(WeightNormalization(layers.Dense(2))),
        "WeightNormalization already",
    ),
    "unknown": (lambda: WeightNormalization(Own()), "which axes of the kernel of the layer .* pass axis"),
    "unknown without kernel": (
        lambda: WeightNormalization(Quiet(), axis=0).build((2, 2)),
        "has no kernel of its own",
    ),
    "einsum": (
        lambda: WeightNormalization(layers.EinsumDense("ab,bc->a", ())),
        "does not tell its output units",
    ),
    "axis of several": (lambda: WeightNormalization(layers.SeparableConv2D(2, 2), axis=0), "several kernels"),
    "no such axis": (lambda: WeightNormalization(layers.Dense(2), axis=4).build((2, 2)), "has no axes"),
    "lora": (lambda: WeightNormalization(layers.Dense(2, lora_rank=1)).build((2, 2)), "adapted by LoRA"),
    "name": (lambda: WeightNormalization(layers.Dense(2), "weight"), "no weight normalization named 'weight'"),
    "epsilon of a method": (
        lambda: WeightNormalization(layers.Dense(2), Centered(), 1e-3),
        r"epsilon is for named normalizers: Centered\(.*\) has its own",
    ),
    "normalizer": (
        lambda: WeightNormalization(layers.Dense(2), 3),
        "must be a name, a method or a Keras layer, not 3",
    ),
    "epsilon": (lambda: WeightNormalization(layers.Dense(2), epsilon=-1.0), "epsilon must be a finite number"),
    "epsilon twice": (
        lambda: WeightNormalization(layers.Dense(2), layers.LayerNormalization(), 1e-3),
        "epsilon is for named normalizers",
    ),
    "batch": (lambda: WeightNormalization(layers.Dense(2), layers.BatchNormalization()), "over the output units"),
    "other axis": (
        lambda: WeightNormalization(layers.Dense(2), layers.LayerNormalization(axis=0)),
        "normalizes over axis 0",
    ),
    "other shape": (
        lambda: WeightNormalization(layers.Dense(2), LastAxis()).build((2, 3)),
        "must keep their shape",
    ),
    "not built": (lambda: WeightNormalization(layers.Dense(2)).effective_kernel(), "is not built"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    make, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        make()
