"""What people do with layers that are trained through other weights, on the backend that KERAS_BACKEND names.

Each of these went wrong without a word in some other implementation.
"""

import warnings

import keras
import numpy as np
import pytest
from keras import layers
from kinds import BACKEND, COMPILES, close, image, number, tokens

import refold
from refold.keras import (
    LowRankAdaptation,
    OrthogonalWeights,
    SpectralNormalization,
    WeightNormalization,
    continue_training,
)

SMALL_MODELS = True  # see conftest.py


def network(**options):
    return keras.Sequential(
        [
            keras.Input((6,)),
            WeightNormalization(layers.Dense(5, activation="tanh", **options), "layer"),
            SpectralNormalization(layers.Dense(3), gain=True),
        ]
    )


def trained(model, x, optimizer=None):
    model.compile(optimizer or keras.optimizers.SGD(0.1), "mse", jit_compile=COMPILES)
    model.fit(x, image(len(x), 3), batch_size=4, verbose=0)
    return model


# ---- averages of the weights -------------------------------------------------------------------------


def test_the_average_of_an_optimizer_is_that_of_gains_and_directions_and_folds():
    x = image(4, 6)
    model = keras.Sequential([keras.Input((6,)), WeightNormalization(layers.Dense(3), "layer")])
    optimizer = keras.optimizers.SGD(0.2, use_ema=True, ema_momentum=0.5)
    model.compile(optimizer, "mse", jit_compile=COMPILES)
    model.train_on_batch(x, image(4, 3))
    average = [number(v) for v in model.trainable_variables]  # Keras begins with the weights after the first step
    for _ in range(2):
        model.train_on_batch(x, image(4, 3))
        average = [(a + number(v)) / 2 for a, v in zip(average, model.trainable_variables, strict=True)]
    optimizer.finalize_variable_values(model.trainable_variables)
    for variable, expected in zip(model.trainable_variables, average, strict=True):
        close(variable, expected)
    close(refold.fold(model)(x), number(model(x)))


# ---- one layer in two places -------------------------------------------------------------------------


def test_what_was_one_layer_in_two_places_is_one_after_the_fold():
    shared = WeightNormalization(layers.Dense(6, activation="tanh"))
    entry = keras.Input((6,))
    model = keras.Model(entry, shared(shared(entry)))
    plain = refold.fold(model)
    assert [type(layer) for layer in plain.layers[1:]] == [layers.Dense]
    assert plain.count_params() == 6 * 6 + 6
    close(plain(image(3, 6)), model(image(3, 6)))


def test_a_table_of_tokens_that_is_read_both_ways_is_one_after_the_fold():
    table = WeightNormalization(layers.ReversibleEmbedding(7, 4))
    entry = keras.Input((5,), dtype="int32")
    model = keras.Model(entry, table(table(entry), reverse=True))
    table.gain.assign(table.gain * 2)
    plain = refold.fold(model)
    assert plain.count_params() == 7 * 4
    close(plain(tokens(2, 5)), model(tokens(2, 5)))


def test_a_layer_that_is_wrapped_here_and_bare_there_is_two_after_the_fold():
    """The bare one computes with the direction, whose size training moves away from the gain's."""
    bare, entry = layers.Dense(6), keras.Input((6,))
    first = WeightNormalization(bare)(entry)
    model = keras.Model(entry, bare(layers.Activation("relu")(first)))
    x = image(3, 6)
    close(model(x), number(bare(np.maximum(number(bare(x)), 0))))
    bare.kernel.assign(3 * number(bare.kernel))
    expected = number(model(x))
    kernel = number(bare.kernel)
    close(expected, np.maximum(x @ kernel / 3, 0) @ kernel, 1e-5)
    plain = refold.fold(model)
    close(plain(x), expected, 1e-5)
    assert sum(type(layer) is layers.Dense for layer in plain.layers) == 2


# ---- weights that are set after wrapping -------------------------------------------------------------

SET = {
    "unit": lambda: WeightNormalization(layers.Dense(4)),
    "layer": lambda: WeightNormalization(layers.Dense(4), "layer"),
    "sigma-reparam": lambda: SpectralNormalization(layers.Dense(4), gain=True),
    "dora": lambda: LowRankAdaptation(layers.Dense(4), 2, magnitude=True),
}


@pytest.mark.parametrize("kind", SET)
def test_an_initializer_reaches_the_effective_kernel(kind):
    wrapped, x = SET[kind](), image(3, 6)
    wrapped(x)
    for variable in wrapped.trainable_variables:
        variable.assign(variable + 0.3)
    kernel = 7 * image(6, 4)
    wrapped.assign_kernel(kernel)
    close(wrapped.effective_kernel(), kernel)
    close(wrapped(x), x @ kernel + number(wrapped.layer.bias), 1e-5)


def test_a_kernel_that_cannot_be_is_told():
    for wrapped in (SpectralNormalization(layers.Dense(4)), OrthogonalWeights(layers.Dense(4))):
        wrapped.build((None, 6))
        with pytest.warns(UserWarning, match="changes the weights of 4 of its 4 output units"):
            wrapped.assign_kernel(7 * image(6, 4))
    separable = WeightNormalization(layers.SeparableConv1D(4, 3))
    with pytest.raises(ValueError, match="is not built"):
        separable.assign_kernel(image(1, 5, 4))
    separable(image(2, 5, 3))
    with pytest.raises(ValueError, match=r"say which kernel .* depthwise_kernel, pointwise_kernel"):
        separable.assign_kernel(image(1, 3, 4))
    separable.assign_kernel(image(1, 3, 4), "pointwise_kernel")
    close(separable.effective_kernels()["pointwise_kernel"], image(1, 3, 4))


# ---- quantized, exported -----------------------------------------------------------------------------


def test_quantizing_is_for_the_folded_model():
    x, model = image(8, 6), network()
    plain = refold.fold(model)
    expected = number(plain(x))
    plain.quantize("int8")
    assert np.max(np.abs(number(plain(x)) - expected)) < 0.05 * np.max(np.abs(expected))
    model.quantize("int8")
    with pytest.raises(ValueError, match="fold the model first"):
        model(x)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras exports no SavedModel of a batch of any size there")
def test_a_saved_model_computes_the_same(tmp_path):
    import tensorflow as tf

    x, model = image(4, 6), network()
    trained(model, x)
    before = model.get_weights()
    for number_of, one in enumerate((model, refold.fold(model))):
        one.export(tmp_path / str(number_of), format="tf_saved_model", verbose=False)
        loaded = tf.saved_model.load(tmp_path / str(number_of))
        close(loaded.serve(x), number(model(x)), 1e-5)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.skipif(BACKEND == "jax", reason="Keras writes ONNX there with jax2onnx, which is not installed")
def test_an_onnx_file_computes_the_same(tmp_path):
    import onnxruntime

    x, model = image(4, 6), network()
    trained(model, x)
    for number_of, one in enumerate((model, refold.fold(model))):
        path = tmp_path / f"{number_of}.onnx"
        one(x)
        one.export(path, format="onnx", verbose=False)
        session = onnxruntime.InferenceSession(path)
        close(session.run(None, {session.get_inputs()[0].name: x})[0], number(model(x)), 1e-5)


# ---- trained on --------------------------------------------------------------------------------------


def test_the_folded_model_trains_on_from_where_the_rich_one_was():
    x, y, model = image(8, 6), image(8, 3), network()
    optimizer = keras.optimizers.Adam(0.01)
    trained(model, x, optimizer)
    steps = int(number(optimizer.iterations))
    plain = refold.fold(model)
    # The fold makes other variables, so an optimizer's state has nothing to belong to: there is none.
    assert not plain.compiled
    assert model.optimizer is optimizer
    assert int(number(optimizer.iterations)) == steps
    plain.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=COMPILES)
    loss = float(plain.evaluate(x, y, verbose=0))
    assert loss == pytest.approx(float(model.evaluate(x, y, verbose=0)), rel=1e-5)
    plain.fit(x, y, epochs=2, verbose=0)
    assert float(plain.evaluate(x, y, verbose=0)) < loss
    assert all(variable.trainable for variable in plain.variables)


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.05, 10, 0.9)),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "plain": lambda: keras.optimizers.SGD(0.1),
    "averaged": lambda: keras.optimizers.AdamW(0.02, use_ema=True),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.02), initial_scale=8.0),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_goes_on_with_what_was_not_folded(kind):
    x, y = image(8, 6), image(8, 3)
    entry = keras.Input((6,))
    hidden = layers.Dense(5, activation="tanh", name="kept")(entry)
    wrapped = WeightNormalization(layers.Dense(3), name="folded")(layers.PReLU(name="slope")(hidden))
    model = keras.Model(entry, wrapped)
    optimizer = OPTIMIZERS[kind]()
    trained(model, x, optimizer)
    plain = refold.fold(model)
    again, anew = continue_training(optimizer, model, plain)
    assert [path.rpartition("/")[2] for path in anew] == ["kernel"]  # of the folded layer
    assert int(number(again.iterations)) == int(number(optimizer.iterations)) > 0
    close(again.learning_rate, number(optimizer.learning_rate))
    inner = [getattr(one, "inner_optimizer", one) for one in (optimizer, again)]
    for attribute in ("_momentums", "momentums", "_velocities", "_model_variables_moving_average"):
        before, after = (getattr(one, attribute, []) for one in inner)
        for place in range(3 if before else 0):  # the kept layer's and the slope come first
            assert np.any(number(before[place]))
            np.testing.assert_array_equal(number(before[place]), number(after[place]))
    plain.compile(again, "mse", jit_compile=COMPILES)
    loss = float(plain.evaluate(x, y, verbose=0))
    plain.fit(x, y, epochs=3, verbose=0)
    assert float(plain.evaluate(x, y, verbose=0)) < loss
    with pytest.raises(ValueError, match="was not built for the trainable variables of this model"):
        continue_training(optimizer, plain, model)


def test_what_is_frozen_is_frozen_after_the_fold():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = network(trainable=False)
    assert [v.path.split("/")[-1] for v in model.trainable_variables] == ["gain", "kernel", "bias"]
    plain = refold.fold(model)
    assert [layer.trainable for layer in plain.layers[-2:]] == [False, True]


def test_what_adapts_a_frozen_layer_trains_and_so_does_its_fold():
    entry = keras.Input((6,))
    model = keras.Model(entry, LowRankAdaptation(layers.Dense(3, trainable=False), 2)(entry))
    assert refold.fold(model).layers[-1].trainable
    model.trainable = False
    assert refold.fold(model).trainable_variables == []
