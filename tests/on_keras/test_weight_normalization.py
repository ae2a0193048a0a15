"""WeightNormalization on the backend that KERAS_BACKEND names: run once per backend."""

import copy
import pickle
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops
from kinds import BACKEND, COMPILES, KINDS, close, gradients, image, loss, number, tokens

import refold
from refold.keras.normalization import WeightNormalization, weight_normalization
from refold.weights import METHODS, NUMPY, Centered, LowRank, Spectral, TimmStandardization, method

NAMES = sorted(METHODS)
CENTERED = [name for name in NAMES if method(name).centered]

NORMALIZERS = {
    **{name: lambda name=name: name for name in ("layer", "rms", "unit")},
    "LayerNormalization": lambda: layers.LayerNormalization(),
    "RMSNormalization": lambda: layers.RMSNormalization(),
    "UnitNormalization": lambda: layers.UnitNormalization(),
    "GroupNormalization": lambda: layers.GroupNormalization(groups=1),
}


SMALL_MODELS = True  # see conftest.py
pytestmark = pytest.mark.filterwarnings("error:.*(Weight normalization|no direction)")


def weighed(wrapped, weights):
    return ops.sum(wrapped.effective_kernel() * ops.convert_to_tensor(weights))


def quietly(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


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


# ---- the document's example --------------------------------------------------------------------------


RECURRENT = {
    "SimpleRNN": lambda: layers.SimpleRNN(3),
    "GRU": lambda: layers.GRU(3, return_sequences=True),
    "LSTM": lambda: layers.LSTM(3, dropout=0.5),
    "Bidirectional": lambda: layers.Bidirectional(layers.LSTM(3)),
    "RNN": lambda: layers.RNN(layers.GRUCell(3, reset_after=False)),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_every_gate_of_a_recurrent_layer_is_a_row_of_both_kernels(kind):
    data, layer = image(4, 5, 2), RECURRENT[kind]()
    plain = number(layer(data))
    wrapped = WeightNormalization(layer)
    close(wrapped(data), plain)
    stored = {spec.path: number(wrapped._variable(spec)) for spec in wrapped.specs}
    assert len(stored) == (4 if kind == "Bidirectional" else 2)
    for spec in wrapped.specs:
        variable = wrapped._variable(spec)
        variable.assign(2.0 * number(variable))  # the size of a direction means nothing
        gain = number(getattr(wrapped, spec.prefix + "gain"))
        close(gain, np.linalg.norm(stored[spec.path], axis=0))
    close(wrapped(data), plain)


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers_train_save_and_fold(kind, tmp_path):
    data = image(4, 5, 2)
    model = keras.Sequential([keras.Input((5, 2)), WeightNormalization(RECURRENT[kind]()), layers.Dense(2)])
    before = [number(variable) for variable in model.trainable_variables]
    model.compile("sgd", "mse")
    model.fit(data, model.predict(data, verbose=0) + 1.0, verbose=0)
    assert all(
        np.any(number(variable) != old) for variable, old in zip(model.trainable_variables, before, strict=True)
    )
    expected = model.predict(data, verbose=0)
    model.save(tmp_path / "model.keras")
    close(keras.saving.load_model(tmp_path / "model.keras").predict(data, verbose=0), expected)
    plain = refold.fold(model)
    assert not any(type(layer).__module__.startswith("refold") for layer in plain.layers)
    close(plain.predict(data, verbose=0), expected, tolerance=1e-6)


WORDS = ("query", "key", "value", "output")
ATTENTION = {
    "heads": lambda: layers.MultiHeadAttention(2, 3, value_dim=4, dropout=0.5),
    "heads with outputs": lambda: layers.MultiHeadAttention(2, 3, output_shape=(2, 4), use_bias=False),
    "grouped": lambda: layers.GroupQueryAttention(3, 4, 2),
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_every_entry_of_every_head_is_a_row_of_its_projection(kind):
    """Scaling a unit's direction changes nothing; scaling its gain is scaling its column of the projection."""
    query, value, layer = image(2, 4, 6), image(2, 3, 5) + 1, ATTENTION[kind]()
    plain = number(layer(query, value))
    kernels = {f"_{word}_dense.kernel": getattr(layer, f"_{word}_dense").kernel for word in WORDS}
    wrapped = WeightNormalization(layer)
    for call in (
        lambda: wrapped(query, value),
        lambda: wrapped(query, value=value),
        lambda: wrapped([query, value]),
    ):
        close(call(), plain)
    assert set(wrapped.effective_kernels()) == set(kernels)
    for word, (path, kernel) in zip(WORDS, kernels.items(), strict=True):
        inputs = 2 if word == "output" else 1  # an output reads all heads
        units = kernel.shape[inputs:]
        scales = 2.0 ** np.arange(np.prod(units)).reshape(units)
        kernel.assign(number(kernel) * scales)
        close(wrapped(query, value), plain)
        gain = getattr(wrapped, f"{word}_gain")
        before = number(wrapped.effective_kernels()[path])
        gain.assign(number(gain) * scales.reshape(-1))
        close(wrapped.effective_kernels()[path], before * scales)
        gain.assign(number(gain) / scales.reshape(-1))
    with pytest.raises(ValueError, match="masks of an attention layer by name"):
        wrapped(query, value, value, None)


def test_attention_trains_saves_and_folds(tmp_path):
    entry = keras.Input((4, 6))
    masked = layers.Masking()(entry)
    attention, pool = layers.MultiHeadAttention(2, 3), layers.GlobalAveragePooling1D()
    before = keras.Model(entry, pool(attention(masked, masked, use_causal_mask=True)))
    x = WeightNormalization(attention, "layer")(masked, masked, use_causal_mask=True)
    model = keras.Model(entry, pool(x))
    data = image(3, 4, 6)
    data[0, 2:] = 0
    close(model(data), before(data))
    before = [number(variable) for variable in model.trainable_variables]
    assert len(before) == 4 * 4
    model.compile("sgd", "mse")
    model.fit(data, model.predict(data, verbose=0) + 1.0, verbose=0)
    moved = [np.any(number(v) != old) for v, old in zip(model.trainable_variables, before, strict=True)]
    assert sum(moved) >= 15  # the softmax does not see the bias of the keys
    expected = model.predict(data, verbose=0)
    model.save(tmp_path / "model.keras")
    close(keras.saving.load_model(tmp_path / "model.keras").predict(data, verbose=0), expected)
    plain = refold.fold(model)
    assert not any(type(layer).__module__.startswith("refold") for layer in plain.layers)
    close(plain.predict(data, verbose=0), expected)


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


# ---- gradients ---------------------------------------------------------------------------------------


def built(name="unit", kernel=None, layer=None, **options):
    layer = layer or layers.Dense(3, use_bias=False)
    wrapped = WeightNormalization(layer, name, **options)
    quietly(lambda: wrapped.build((None, 6)))
    if kernel is not None:
        layer.set_weights([kernel.astype("float32")])
        wrapped.reset_gain()
    return wrapped


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


# ---- training ----------------------------------------------------------------------------------------


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first = WeightNormalization(layers.Conv1D(4, 2), "layer")
        self.flat = layers.Flatten()
        self.last = WeightNormalization(layers.Dense(2), layers.RMSNormalization())

    def call(self, x):
        return self.last(self.flat(self.first(x)))


def functional():
    entry = keras.Input((5, 3))
    x = WeightNormalization(layers.Conv1D(4, 2), "layer")(entry)
    x = layers.TimeDistributed(WeightNormalization(layers.Dense(4, activation="tanh")))(x)
    return keras.Model(entry, WeightNormalization(layers.Dense(2), "rms")(layers.Flatten()(x)))


@pytest.mark.parametrize(("make", "jit"), [(functional, COMPILES), (Subclassed, COMPILES), (Subclassed, False)])
def test_everything_trains_under_fit(make, jit):
    model = make()
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit)
    x, y = image(16, 5, 3), image(16, 2)
    model.evaluate(x, y, verbose=0)
    before = [v.numpy() for v in model.trainable_variables]
    history = model.fit(x, y, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]
    for variable, old in zip(model.trainable_variables, before, strict=True):
        if "beta" not in variable.path and "scale" not in variable.path:
            assert np.any(variable.numpy() != old), variable.path


@pytest.mark.parametrize("jit", [COMPILES])
def test_predict_and_evaluate_change_nothing(jit):
    model = functional()
    model.compile("sgd", "mse", jit_compile=jit)
    before = model.get_weights()
    first = model.predict(image(8, 5, 3), verbose=0)
    model.evaluate(image(8, 5, 3), image(8, 2), verbose=0)
    np.testing.assert_array_equal(model.predict(image(8, 5, 3), verbose=0), first)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_trains_as_its_plain_layer_does_at_first():
    """One step from the same point: the loss of the first epoch is the plain layer's."""
    x, y = image(16, 6), image(16, 3)
    plain = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    wrapped = keras.Sequential([keras.Input((6,)), WeightNormalization(layers.Dense(3))])
    wrapped.layers[0].layer.set_weights(plain.get_weights())
    wrapped.layers[0].reset_gain()
    losses = []
    for model in (plain, wrapped):
        model.compile("sgd", "mse")
        losses.append(model.fit(x, y, batch_size=16, verbose=0).history["loss"][0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_custom_loop_trains_gain_and_direction():
    wrapped = built()
    x, y = image(16, 6), image(16, 3)
    before = [v.numpy() for v in wrapped.trainable_variables]
    optimizer = keras.optimizers.Adam(0.05)
    losses = []
    for _ in range(5):
        losses.append(float(number(loss(wrapped, x, y))))
        found = gradients(lambda: loss(wrapped, x, y), wrapped.trainable_variables)
        optimizer.apply([ops.convert_to_tensor(g) for g in found], wrapped.trainable_variables)
    assert losses[-1] < losses[0]
    assert len(before) == 2
    for variable, old in zip(wrapped.trainable_variables, before, strict=True):
        assert np.all(variable.numpy() != old)


def test_stateless_call_sees_the_given_values():
    wrapped = WeightNormalization(layers.Dense(3))
    x = image(2, 6)
    before = number(wrapped(x))
    doubled = [2 * v.value for v in wrapped.trainable_variables]
    out, rest = wrapped.stateless_call(doubled, wrapped.non_trainable_variables, x)
    assert rest == []
    close(out, 2 * before)  # the gain doubles, the direction's size means nothing, the bias is 0
    bias = np.ones(3, "float32")
    values = [wrapped.gain.value, wrapped.layer.kernel.value, ops.convert_to_tensor(bias)]
    close(wrapped.stateless_call(values, [], x)[0], before + 1)
    close(wrapped(x), before)


# ---- regularizers, losses, state of the wrapped layer ------------------------------------------------


def test_the_regularizer_sees_the_effective_kernel():
    wrapped = built(layer=layers.Dense(3, use_bias=False, kernel_regularizer=keras.regularizers.L2(0.5)))
    kernel = wrapped.layer.get_weights()[0]
    wrapped.layer.kernel.assign(7 * kernel)
    (loss,) = wrapped.losses
    close(loss, 0.5 * np.sum(number(wrapped.effective_kernel()) ** 2))
    close(loss, 0.5 * np.sum(kernel.astype("float64") ** 2))
    found = gradients(lambda: wrapped.losses[0], [wrapped.gain])[0]
    close(found, wrapped.gain, 1e-5)
    model = keras.Sequential([keras.Input((6,)), wrapped])
    model.compile(keras.optimizers.SGD(0.1), lambda y, p: 0.0 * ops.mean(p, axis=-1))
    gain = wrapped.gain.numpy()
    model.fit(image(4, 6), image(4, 3), verbose=0)
    close(wrapped.gain, 0.9 * gain, 1e-4)


def test_the_activity_regularizer_counts_once():
    def loss_of(layer):
        model = keras.Sequential([keras.Input((6,)), layer])
        model.compile("sgd", lambda y, p: 0.0 * ops.mean(p, axis=-1))
        return model.evaluate(image(4, 6), image(4, 3), verbose=0)

    plain = layers.Dense(3, activity_regularizer="l2")
    expected = loss_of(plain)
    assert expected > 0
    assert loss_of(WeightNormalization(plain)) == pytest.approx(expected, rel=1e-5)
    wrapped = WeightNormalization(layers.Dense(3, activity_regularizer="l2"))
    wrapped(image(4, 6))
    assert len(wrapped.losses) == 1


@keras.saving.register_keras_serializable(package="tests")
class Counting(layers.Dense):
    """A Dense with a variable that each call in training writes to."""

    def build(self, input_shape):
        super().build(input_shape)
        self._tracker.unlock()
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False, name="calls")

    def call(self, inputs, training=None):
        if training:
            self.calls.assign(self.calls + 1)
        return super().call(inputs)


def test_what_the_wrapped_layer_writes_is_kept():
    model = keras.Sequential([keras.Input((6,)), WeightNormalization(Counting(3))])
    model.compile("sgd", "mse")
    model.fit(image(8, 6), image(8, 3), batch_size=2, verbose=0)
    model.predict(image(8, 6), verbose=0)
    assert float(number(model.layers[0].layer.calls)) == 4
    model(image(2, 6), training=True)
    assert float(number(model.layers[0].layer.calls)) == 5


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


# ---- frozen ------------------------------------------------------------------------------------------


def test_frozen_layers_stay_frozen():
    frozen = layers.Dense(3, trainable=False)
    model = keras.Sequential([keras.Input((6,)), WeightNormalization(frozen), layers.Dense(2)])
    assert len(model.trainable_variables) == 2
    model.compile("sgd", "mse")
    before = model.layers[0].get_weights()
    model.fit(image(4, 6), image(4, 2), verbose=0)
    for now, then in zip(model.layers[0].get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_freezing_and_thawing_reaches_all_variables():
    wrapped = built("layer")
    assert len(wrapped.trainable_variables) == 3
    wrapped.trainable = False
    assert wrapped.trainable_variables == []
    assert not any(v.trainable for v in wrapped.variables)
    wrapped.trainable = True
    assert len(wrapped.trainable_variables) == 3
    late = WeightNormalization(layers.Dense(3), layers.LayerNormalization(), trainable=False)
    model = keras.Sequential([keras.Input((6,)), late])
    assert model.trainable_variables == []


# ---- mixed precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", ["unit", "layer", "LayerNormalization"])
def test_precision(policy, name):
    if policy == "float64" and BACKEND == "jax":
        pytest.skip("JAX has no float64 unless it is switched on for the process")
    layer = layers.Dense(3, dtype=policy)
    x = image(4, 6)
    before = number(layer(x))
    normalizer = layers.LayerNormalization(dtype=policy) if name == "LayerNormalization" else name
    wrapped = WeightNormalization(layer, normalizer)
    out = wrapped(x)
    assert keras.backend.standardize_dtype(out.dtype) == layer.compute_dtype == wrapped.compute_dtype
    wide = "float64" if policy == "float64" else "float32"
    assert wrapped.gain.dtype == wide
    assert layer.kernel.dtype == layer.variable_dtype
    # Keras' own LayerNormalization of float64 is computed in float32 on torch.
    exact = {"float64": 1e-12} if name in NAMES else {"float64": 1e-5}
    rounding = {"mixed_float16": 2e-3, **exact}.get(policy, 1e-2)
    close(out, before, rounding)
    effective, stored = number(wrapped.effective_kernel()), number(layer.kernel)
    close(effective, stored, {"float64": 1e-14, "bfloat16": 5e-3}.get(policy, 2e-6) if name in NAMES else 5e-3)
    symbolic = wrapped(keras.Input((6,)))
    assert symbolic.dtype == layer.compute_dtype


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_half_types_train(policy):
    model = keras.Sequential([keras.Input((6,)), WeightNormalization(layers.Dense(3, dtype=policy))])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = [v.numpy().astype("float32") for v in model.trainable_variables]
    model.fit(image(16, 6), image(16, 3), epochs=2, verbose=0)
    for variable, old in zip(model.trainable_variables, before, strict=True):
        assert np.any(variable.numpy().astype("float32") != old)


def test_the_global_policy_is_the_layers():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        wrapped = WeightNormalization(layers.Dense(3), layers.LayerNormalization())
        out = wrapped(image(2, 6))
    finally:
        keras.config.set_dtype_policy("float32")
    assert keras.backend.standardize_dtype(out.dtype) == "bfloat16"
    assert wrapped.normalizer.compute_dtype == "float32"
    close(wrapped.effective_kernel(), wrapped.layer.kernel)


def test_an_embeddings_indices_are_not_numbers():
    wrapped = WeightNormalization(layers.Embedding(5000, 4, mask_zero=True, dtype="mixed_float16"))
    indices = np.array([[0, 2049, 4099]])
    out = wrapped(indices)
    assert keras.backend.standardize_dtype(out.dtype) == "float16"
    close(out, wrapped.layer.get_weights()[0][indices], 1e-3)
    np.testing.assert_array_equal(number(wrapped.compute_mask(indices)), [[0, 1, 1]])
    assert number(wrapped(indices.astype("float32"))).tolist() == number(out).tolist()


def test_masks_pass_through():
    entry = keras.Input((5,), dtype="int32")
    x = WeightNormalization(layers.Embedding(7, 4, mask_zero=True))(entry)
    x = WeightNormalization(layers.Dense(3))(x)
    model = keras.Model(entry, layers.GlobalAveragePooling1D()(x))
    short, long = np.array([[1, 2, 0, 0, 0]]), np.array([[1, 2, 0, 0, 0]])
    close(model(short), number(model(long)))
    inner = keras.Model(entry, x)
    close(model(short), number(inner(short))[:, :2].mean(1), 1e-5)


# ---- saving and copying ------------------------------------------------------------------------------


def saved_model(normalizer):
    entry = keras.Input((6, 6, 3))
    x = WeightNormalization(layers.Conv2D(4, 3, kernel_regularizer="l2", name="conv"), normalizer(), name="wn")(
        entry
    )
    x = WeightNormalization(layers.SeparableConv2D(4, 3), normalizer())(x)
    model = keras.Model(entry, WeightNormalization(layers.Dense(2), "unit", 1e-3)(layers.Flatten()(x)))
    model.compile("sgd", "mse")
    model.fit(image(4, 6, 6, 3), image(4, 2), verbose=0)
    return model


@pytest.mark.parametrize("normalizer", ["unit", "layer", "LayerNormalization"])
def test_round_trips_of_a_model(normalizer, tmp_path):
    model = saved_model(NORMALIZERS[normalizer])
    x = image(3, 6, 6, 3)
    expected = number(model(x))
    path = tmp_path / "model.keras"
    model.save(path)
    model.save_weights(tmp_path / "model.weights.h5")
    copies = [keras.saving.load_model(path), copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for make in (keras.models.clone_model, lambda model: keras.Model.from_config(model.get_config())):
        clone = make(model)
        clone.set_weights(model.get_weights())
        copies.append(clone)
    loaded = keras.models.clone_model(model)
    loaded.load_weights(tmp_path / "model.weights.h5")
    for other in [*copies, loaded]:
        np.testing.assert_array_equal(number(other(x)), expected)
        assert [v.path.split("/")[-1] for v in other.weights] == [v.path.split("/")[-1] for v in model.weights]
        assert len(other.losses) == 1
        other.layers[1].gain.assign(other.layers[1].gain * 2)
        assert np.any(number(other(x)) != expected)
    np.testing.assert_array_equal(number(model(x)), expected)


@pytest.mark.parametrize("kind", ["dense", "einsum", "conv2d transposed", "separable 1d", "embedding"])
def test_round_trips_of_a_layer(kind):
    make, x, _ = KINDS[kind]
    wrapped = quietly(lambda: WeightNormalization(make(), "layer", 1e-5, offset=False, name="mine"))
    expected = number(quietly(lambda: wrapped(x)))
    config = wrapped.get_config()
    again = WeightNormalization.from_config(config)
    assert again.get_config() == config
    quietly(lambda: again(x))
    again.set_weights(wrapped.get_weights())
    np.testing.assert_array_equal(number(again(x)), expected)
    restored = pickle.loads(pickle.dumps(wrapped))
    np.testing.assert_array_equal(number(restored(x)), expected)


CHOSEN = [Centered(activation="relu"), TimmStandardization(1e-5, scaled=True, activation="silu")]


@pytest.mark.parametrize("normalizer", CHOSEN, ids=["centered", "timm"])
def test_a_method_with_parameters_is_attached_saved_and_restored(normalizer, tmp_path):
    layer, x = layers.Dense(3), image(4, 5)
    before = number(layer(x))
    wrapped = WeightNormalization(layer, normalizer)
    model = keras.Sequential([keras.Input((5,)), wrapped])
    close(model(x), before)
    wrapped.gain.assign(wrapped.gain * 1.5)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[-1].method == normalizer
    np.testing.assert_array_equal(number(loaded(x)), number(model(x)))
    np.testing.assert_array_equal(number(pickle.loads(pickle.dumps(wrapped))(x)), number(model(x)))
    config = {**wrapped.get_config(), "normalizer": {"method": "Centered", "command": "x"}}
    with pytest.raises(ValueError, match="no weight normalization 'Centered' with command"):
        WeightNormalization.from_config(config)


@pytest.mark.parametrize("normalizer", [*NAMES, *CHOSEN], ids=str)
def test_every_method_folds_after_training(normalizer):
    entry = keras.Input((6, 6, 3))
    x = WeightNormalization(layers.Conv2D(4, 3, activation="relu"), normalizer)(entry)
    model = keras.Model(entry, WeightNormalization(layers.Dense(2), normalizer)(layers.Flatten()(x)))
    for wrapped in (model.layers[1], model.layers[-1]):
        for variable in wrapped.trainable_variables:
            variable.assign(variable + 0.1 * keras.random.normal(variable.shape, seed=1))
    plain = refold.fold(model)
    assert not any(isinstance(layer, WeightNormalization) for layer in plain.layers)
    inputs = image(3, 6, 6, 3)
    close(plain(inputs), model(inputs), 1e-5)


def test_methods_of_the_whole_matrix_have_right_gradients_on_this_backend():
    rng = np.random.default_rng(4)
    target, base = rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
    state = Spectral().advance(NUMPY, base, Spectral().attach(rng.normal(size=(4, 6)))[0])
    gain, up, down = np.full((1, 1), 1.5), rng.normal(size=(4, 2)), rng.normal(size=(2, 6))

    def spectral(xp, w, left, right, gain):
        return Spectral(1e-3).compose(xp, w, (left, right), gain)

    def low_rank(xp, up, base, down):
        return LowRank(0.5).compose(xp, base, up, down)

    for make, value, constants in ((spectral, base, (*state, gain)), (low_rank, up, (base, down))):
        variable = keras.Variable(value, dtype="float32")
        tensors = [ops.convert_to_tensor(constant, "float32") for constant in (*constants, target)]

        def weighed_sum(make=make, variable=variable, tensors=tensors):
            return ops.sum(make(ops, ops.convert_to_tensor(variable), *tensors[:-1]) * tensors[-1])

        (found,) = gradients(weighed_sum, [variable])
        for place in np.ndindex(value.shape):
            step = np.zeros_like(value)
            step[place] = 1e-6
            high, low = (np.sum(make(NUMPY, value + change, *constants) * target) for change in (step, -step))
            assert found[place] == pytest.approx((high - low) / 2e-6, rel=1e-4, abs=1e-5)


def test_loading_says_nothing(tmp_path):
    model = quietly(lambda: keras.Sequential([keras.Input((6,)), WeightNormalization(layers.Dense(3), gain=False)]))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(number(loaded(image(2, 6))), number(model(image(2, 6))))


def test_weights_of_a_plain_layer_go_in():
    plain = layers.Dense(3, bias_initializer="normal")
    x = image(4, 6)
    expected = number(plain(x))
    for name in NAMES:
        wrapped = WeightNormalization(layers.Dense(3), name)
        wrapped(x)
        wrapped.layer.set_weights(plain.get_weights())
        wrapped.reset_gain()
        close(wrapped(x), expected)


def test_weight_normalization_builds_at_once_where_it_can():
    plain = layers.Dense(3)
    assert not weight_normalization(plain, "rms").built
    plain.build((None, 6))
    wrapped = weight_normalization(plain, "rms")
    assert wrapped.built
    assert wrapped.layer is plain
    close(pickle.loads(pickle.dumps(wrapped)).effective_kernel(), plain.kernel)


def test_one_layer_called_twice():
    wrapped = WeightNormalization(layers.Dense(6, activation="tanh"))
    entry = keras.Input((6,))
    model = keras.Model(entry, wrapped(wrapped(entry)))
    x = image(3, 6)
    close(model(x), number(wrapped.layer(wrapped.layer(x))))
    assert len(model.trainable_variables) == 3


def test_arguments_of_the_wrapped_layers_call_go_through():
    wrapped = WeightNormalization(layers.ReversibleEmbedding(7, 4))
    vectors = wrapped(tokens(2, 5))
    table = number(wrapped.effective_kernel())
    close(wrapped(vectors, reverse=True), number(vectors) @ table.T, 1e-5)


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
