"""What the suites of TensorFlow Addons (``wrappers_test``) and of Keras (``spectral_normalization_test``) hold of
their layers, held of ours; and what they leave open, said to the end.
"""

import keras
import numpy as np
import pytest
from keras import layers, ops
from kinds import COMPILES, close, image, number, tokens

import refold
from refold.keras import SpectralNormalization, WeightNormalization, initialize_from_data

SMALL_MODELS = True  # see conftest.py

# Addons' four kinds of layer, each with its input.
ADDONS = {
    "Dense": (lambda: layers.Dense(2), image(3, 4)),
    "SimpleRNN": (lambda: layers.SimpleRNN(4), image(2, 3, 5)),
    "Conv2D": (lambda: layers.Conv2D(3, 5), image(2, 8, 8, 3)),
    "LSTM": (lambda: layers.LSTM(4), image(2, 3, 5)),
}


# ---- TensorFlow Addons -------------------------------------------------------------------------------


def identity(size):
    return WeightNormalization(layers.Dense(size, kernel_initializer="identity", bias_initializer="zeros"))


def test_without_data_an_identity_stays_one():
    close(identity(2)(image(4, 2)), image(4, 2))


def test_with_data_inputs_of_plus_and_minus_four_come_out_as_one():
    x = np.array([[4.0, 4.0], [-4.0, -4.0]], "float32")
    layer = identity(2)
    layer(x)
    initialize_from_data(layer, x)
    close(layer(x), x / 4)
    # Their test stops at the identity, where their scale happens to be right. Any other kernel:
    other = WeightNormalization(layers.Dense(2, kernel_initializer=lambda shape, dtype: 3 * image(*shape)))
    other(x)
    initialize_from_data(other, image(64, 2))
    close(np.std(number(other(image(64, 2))), axis=0), np.ones(2), 1e-5)


@pytest.mark.parametrize("kind", ADDONS)
def test_a_layer_is_built_with_a_model_saved_and_unwrapped(kind, tmp_path):
    make, x = ADDONS[kind]
    layer = make()
    before = number(layer(x))
    wrapped = WeightNormalization(layer)
    model = keras.Sequential([keras.Input(x.shape[1:]), wrapped])
    close(model(x), before)
    for variable in wrapped.trainable_variables:
        variable.assign(variable * 1.5)
    expected = number(model(x))
    config = wrapped.get_config()
    assert config["layer"]["class_name"] == kind
    assert WeightNormalization.from_config(config).get_config() == config
    model.save_weights(tmp_path / "model.weights.h5")
    again = keras.models.clone_model(model)
    again.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(number(again(x)), expected)
    (plain,) = (one for one in refold.fold(model).layers if one.weights)
    assert type(plain) is type(layer)
    assert plain.name == layer.name
    close(plain(x), expected, 1e-5)


def test_steps_of_a_sequence_go_through_one_wrapped_layer():
    steps = layers.TimeDistributed(WeightNormalization(layers.Conv2D(4, 3)))
    x = image(2, 3, 5, 5, 2)
    out = number(steps(x))
    close(out[:, 1], steps.layer(x[:, 1]))


# ---- Keras' spectral normalization -------------------------------------------------------------------


def test_shapes_and_numbers_of_weights():
    dense = SpectralNormalization(layers.Dense(2))
    assert dense(image(10, 3, 4)).shape == (10, 3, 2)
    assert (len(dense.trainable_weights), len(dense.non_trainable_weights)) == (2, 2)
    table = SpectralNormalization(layers.Embedding(10, 4))
    assert table(tokens(2, 5)).shape == (2, 5, 4)
    assert (len(table.trainable_weights), len(table.non_trainable_weights)) == (1, 2)
    conv = SpectralNormalization(layers.Conv3D(3, 2))
    assert conv(image(1, 4, 4, 4, 2)).shape == (1, 3, 3, 3, 3)


def test_a_kernel_of_ones_in_inference_and_in_training():
    """Theirs gives 4 in inference before the first step of training, and 2 after eight; 2 is right."""
    conv = SpectralNormalization(layers.Conv2D(1, 2, kernel_initializer="ones"), power_iterations=8)
    ones = np.ones((1, 2, 2, 1), "float32")
    for training in (False, True, False):
        close(conv(ones, training=training), 2 * np.ones((1, 1, 1, 1)))


def test_a_compiled_training_ends_with_the_norm_that_inference_has():
    """Theirs runs this and looks at nothing; on JAX it then predicts with a kernel that no norm bounds."""
    layer = SpectralNormalization(layers.Dense(2, kernel_initializer="he_normal"), power_iterations=3)
    model = keras.Sequential([keras.Input((6,)), layer])
    model.compile("rmsprop", "mse", jit_compile=COMPILES)
    x = image(10, 6)
    model.fit(x, np.ones((10, 2), "float32"), epochs=3, batch_size=5, verbose=0)
    kernel = number(layer.effective_kernel())
    assert np.linalg.norm(kernel, 2) == pytest.approx(1.0, abs=1e-4)
    close(model.predict(x, verbose=0), x @ kernel + number(layer.layer.bias), 1e-5)
    close(model.predict(x, verbose=0), ops.convert_to_numpy(layer(x, training=True)), 1e-3)
