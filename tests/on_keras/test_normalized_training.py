"""WeightNormalization in training: what moves, what is kept and frozen, and in which precision."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from kinds import BACKEND, COMPILES, built, close, gradients, image, loss, number

from refold.keras.normalization import WeightNormalization
from refold.weights import METHODS

SMALL_MODELS = True  # see conftest.py
pytestmark = pytest.mark.filterwarnings("error:.*(Weight normalization|no direction)")


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
    exact = {"float64": 1e-12} if name in METHODS else {"float64": 1e-5}
    rounding = {"mixed_float16": 2e-3, **exact}.get(policy, 1e-2)
    close(out, before, rounding)
    effective, stored = number(wrapped.effective_kernel()), number(layer.kernel)
    close(effective, stored, {"float64": 1e-14, "bfloat16": 5e-3}.get(policy, 2e-6) if name in METHODS else 5e-3)
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
