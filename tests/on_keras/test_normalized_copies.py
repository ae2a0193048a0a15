"""Weight-normalized layers saved, copied, restored, folded and given other weights."""

import copy
import pickle

import keras
import numpy as np
import pytest
from keras import layers, ops
from kinds import (
    KINDS,
    NORMALIZERS,
    close,
    gradients,
    image,
    number,
    quietly,
    tokens,
)

import refold
from refold.keras.normalization import WeightNormalization, weight_normalization
from refold.weights import METHODS, NUMPY, Centered, LowRank, Spectral, TimmStandardization

NAMES = sorted(METHODS)
SMALL_MODELS = True  # see conftest.py
pytestmark = pytest.mark.filterwarnings("error:.*(Weight normalization|no direction)")


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
