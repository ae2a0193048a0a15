"""What others' suites hold of their layers, held of ours, and what they leave open, said to the end: TensorFlow
Addons (``wrappers_test``), Keras (``spectral_normalization_test``), torch (``test_parametrization``), flax
(``linen_test``), equinox (``test_nn``) and Paddle (``test_dygraph_weight_norm``, ``test_dygraph_spectral_norm``).
"""

import pickle
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops
from kinds import COMPILES, close, gradients, image, number, quietly, tokens

import refold
from refold.keras import OrthogonalWeights, SpectralNormalization, WeightNormalization, initialize_from_data

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


@pytest.mark.parametrize("wrapper", [WeightNormalization, SpectralNormalization])
def test_layers_without_a_kernel_are_refused(wrapper):
    for layer in (layers.MaxPooling2D(2), layers.ReLU()):
        with pytest.raises(ValueError, match="has no kernel of its own"):
            wrapper(layer)
    with pytest.raises(ValueError, match="must be at least 1, not 0"):
        SpectralNormalization(layers.Dense(2), power_iterations=0)


# ---- torch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "units"), [(None, 5), (1, 5), (0, 4), (-1, 5), ((), 1)])
def test_wrapped_and_folded_the_output_is_the_same(axis, units, tmp_path):
    layer, x = layers.Dense(5), image(3, 4)
    before = number(layer(x))
    wrapped = WeightNormalization(layer, axis=axis)
    model = keras.Sequential([keras.Input((4,)), wrapped])
    close(model(x), before)
    assert wrapped.gain.shape == (units,)
    close(refold.fold(model)(x), before)
    close(pickle.loads(pickle.dumps(wrapped))(x), before)
    model.save(tmp_path / "rich.keras")
    refold.convert(tmp_path / "rich.keras", tmp_path / "plain.keras")
    close(keras.saving.load_model(tmp_path / "plain.keras")(x), before)
    said = {None: "auto", (): "none"}.get(axis, axis)
    refold.convert(tmp_path / "plain.keras", tmp_path / "again.keras", "refold", axes=[f"weight*={said}"])
    again = keras.saving.load_model(tmp_path / "again.keras")
    close(again(x), before)
    assert again.layers[-1].gain.shape == (units,)


@pytest.mark.parametrize("trains", [True, False])
def test_in_training_and_inference(trains):
    layer, x = SpectralNormalization(layers.Dense(4), trainable=trains), image(2, 3)
    model = keras.Sequential([keras.Input((3,)), layer])
    before = number(layer.left)
    layer.layer.kernel.assign(image(3, 4))
    last = number(layer(x, training=True))
    assert np.array_equal(number(layer.left), before) is not trains
    state = [number(v) for v in layer.weights]
    for _ in range(2):
        close(layer(x, training=False), last)
    for variable, value in zip(layer.weights, state, strict=True):
        np.testing.assert_array_equal(number(variable), value)
    close(refold.fold(model)(x), last)


def stepped(kernel, u, steps, axis=-1):
    """The vectors after some power iterations, by hand."""
    matrix = np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1)
    for _ in range(steps):
        v = matrix.T @ u
        v /= np.linalg.norm(v)
        u = matrix @ v
        u /= np.linalg.norm(u)
    return u, u @ matrix @ v


def test_gradients_of_calls_in_both_modes_are_those_of_each_call():
    layer, x, weights = SpectralNormalization(layers.Dense(4, use_bias=False)), image(2, 3), image(2, 4)
    layer(x)
    kernel = image(3, 4).astype("float64")
    layer.layer.kernel.assign(kernel)
    first = number(layer.left).reshape(-1)
    sigmas = [stepped(kernel, first, count)[1] for count in (1, 2)]
    given = keras.Variable(x)

    def several():
        calls = (layer(ops.convert_to_tensor(given), training=mode) for mode in (True, False, True, False))
        return sum(ops.sum(out * ops.convert_to_tensor(weights)) for out in calls)

    # In training, then in inference with the same vectors, and again after another step.
    (found,) = gradients(several, [given])
    close(found, sum(2 * weights @ (kernel / sigma).T for sigma in sigmas), 1e-5)


def test_a_diagonal_is_divided_by_its_largest():
    for diagonal in (np.diag([0.5, -2.0]), 4 * np.eye(4)):  # flax: sigma of four times the identity is four
        layer = layers.Dense(len(diagonal))
        layer.build((None, len(diagonal)))
        layer.kernel.assign(diagonal)
        wrapped = quietly(lambda layer=layer: SpectralNormalization(layer))
        quietly(lambda wrapped=wrapped, diagonal=diagonal: wrapped.build((None, len(diagonal))))
        close(wrapped.effective_kernel(), diagonal / np.abs(diagonal).max())
        assert wrapped.left.shape == (1, len(diagonal))


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5)])
@pytest.mark.parametrize("map", ["cayley", "exponential"])
def test_orthogonal_from_the_first_and_after_what_is_assigned(map, shape):
    def is_orthogonal(layer):
        kernel = number(layer.effective_kernel())
        tall = kernel if shape[0] >= shape[1] else kernel.T
        np.testing.assert_allclose(tall.T @ tall, np.eye(min(shape)), atol=5e-6)

    def turned(kernel):
        u, _, v = np.linalg.svd(kernel, full_matrices=False)
        return u @ v

    layer, x = OrthogonalWeights(layers.Dense(shape[1]), map=map), image(3, shape[0])
    layer(x)
    first = number(layer.layer.kernel)
    is_orthogonal(layer)
    close(layer.effective_kernel(), turned(first), 1e-5)
    for new in (turned(image(*shape)), image(*shape)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Making them orthogonal")
            layer.assign_kernel(new)
        close(layer.effective_kernel(), turned(new), 1e-5)
    for _ in range(2):
        variables = layer.trainable_variables
        found = gradients(lambda: ops.sqrt(ops.sum(layer(x) ** 2)), variables)
        for variable, gradient in zip(variables, found, strict=True):
            variable.assign(number(variable) - 0.1 * gradient)
        is_orthogonal(layer)


# ---- flax, equinox and Paddle ------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [(-1,), (0,), (0, 1), ()], ids=str)
def test_any_axes_by_hand(axes):
    layer = layers.Dense(2)
    wrapped = WeightNormalization(layer, axis=axes)
    wrapped(image(1, 3))
    for variable in wrapped.trainable_variables:
        variable.assign(number(variable) + 0.5)
    kernel = number(layer.kernel)
    others = tuple(axis for axis in range(2) if axis not in {a % 2 for a in axes})
    norm = np.sqrt(np.square(kernel).sum(axis=others, keepdims=True))
    close(wrapped.effective_kernel(), number(wrapped.gain).reshape(norm.shape) * kernel / norm)


class Attention(layers.Layer):
    def __init__(self, wrapper):
        super().__init__()
        self.inner = wrapper(layers.MultiHeadAttention(2, 2))

    def call(self, x):
        return self.inner(x, x)


TRAINED = {
    "dense": lambda wrapper: wrapper(layers.Dense(4)),
    "convolution": lambda wrapper: wrapper(layers.Conv1D(4, 3, padding="same")),
    "attention": Attention,
}


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("wrapper", [WeightNormalization, SpectralNormalization])
def test_the_loss_falls_at_each_step(wrapper, kind):
    model = keras.Sequential([keras.Input((5, 4)), TRAINED[kind](wrapper)])
    model.compile(keras.optimizers.Adam(5e-3), "mse", jit_compile=COMPILES)
    x = image(8, 5, 4)
    found = model.fit(x, np.flip(x, 0), epochs=10, batch_size=8, shuffle=False, verbose=0).history["loss"]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    ("axis", "steps", "epsilon"), [(-1, 1, 1e-12), (-1, 2, 1e-12), (2, 1, 1e-12), (-1, 1, 1e-3)]
)
def test_steps_of_power_iteration_by_hand(axis, steps, epsilon):
    layer = layers.Conv2D(3, 3)
    wrapped = SpectralNormalization(layer, power_iterations=steps, epsilon=epsilon, axis=axis)
    wrapped(image(3, 4, 4, 2))
    layer.kernel.assign(image(3, 3, 2, 3))
    kernel = number(layer.kernel)
    _, sigma = stepped(kernel, number(wrapped.left).reshape(-1), steps, axis)
    wrapped(image(3, 4, 4, 2), training=True)
    close(wrapped.effective_kernel(), kernel / (sigma + epsilon), 2e-5)


@pytest.mark.parametrize("kind", ["dense", "whole", "conv3d"])
def test_equinoxs_layers_stay_what_they_are_and_pass_gradients(kind):
    layer = layers.Conv3D(3, 2) if kind == "conv3d" else layers.Dense(6)
    x = image(1, 4, 4, 4, 2) if kind == "conv3d" else image(3, 4)
    before = number(layer(x))
    wrapped = WeightNormalization(layer, axis=() if kind == "whole" else None)
    close(wrapped(x), before)
    found = gradients(lambda: ops.sum(wrapped(x) ** 2), wrapped.trainable_variables)
    assert all(np.any(gradient) for gradient in found)
