"""Spectral, orthogonal and low-rank layers on the backend that KERAS_BACKEND names: run once per backend."""

import copy
import pickle
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops
from kinds import COMPILES, KINDS, along, close, gradients, image, number

import refold
from refold.keras import LowRankAdaptation, OrthogonalWeights, SpectralNormalization, WeightNormalization
from refold.weights import SpectralState, spectral_error

SMALL_MODELS = True  # see conftest.py
pytestmark = pytest.mark.filterwarnings("error:.*(changes the weights|no direction)")

WRAPPERS = {
    "spectral": lambda layer, **given: SpectralNormalization(layer, **given),
    "sigma-reparam": lambda layer, **given: SpectralNormalization(layer, gain=True, epsilon=1e-3, **given),
    "cayley": lambda layer, **given: OrthogonalWeights(layer, **given),
    "exponential": lambda layer, **given: OrthogonalWeights(layer, "exponential", gain=True, **given),
    "lora": lambda layer, **given: LowRankAdaptation(layer, 2, alpha=3.0, **given),
    "dora": lambda layer, **given: LowRankAdaptation(layer, 2, magnitude=True, **given),
    "forced magnitude": lambda layer, **given: WeightNormalization(layer, "magnitude", force=True, **given),
}
KEEPING = ["sigma-reparam", "lora", "dora", "forced magnitude"]
STILL = ("left", "right", "base")  # parts that no optimizer moves


def matrix(kernel, axes):
    """A kernel as rows, one per output unit, by numpy."""
    kernel = number(kernel)
    axes = [axis % kernel.ndim for axis in axes]
    rest = [axis for axis in range(kernel.ndim) if axis not in axes]
    return kernel.transpose(axes + rest).reshape(int(np.prod([kernel.shape[axis] for axis in axes])), -1)


def wrapped_kinds(wrapper):
    """Wrapped layers of several kinds, their input, and (path, plain rows, effective rows) of its kernels."""
    for kind in ("einsum shared", "conv2d in groups", "conv2d transposed", "separable 1d", "embedding"):
        make, x, kernels = KINDS[kind]
        layer = make()
        before = number(layer(x))
        stored = {path: number(getattr(layer, path)) for path in kernels}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = WRAPPERS[wrapper](layer)
            after = number(wrapped(x))
        effective = wrapped.effective_kernels()
        pairs = [
            (path, matrix(stored[path], axes), matrix(effective[path], axes)) for path, axes in kernels.items()
        ]
        for path in kernels:
            np.testing.assert_array_equal(number(getattr(layer, path)), stored[path], err_msg=kind)
        yield kind, wrapped, x, before, after, pairs


# ---- what attaching does, for every kind of layer ----------------------------------------------------


@pytest.mark.parametrize("wrapper", KEEPING)
def test_attaching_changes_nothing(wrapper):
    for kind, _, _, before, after, pairs in wrapped_kinds(wrapper):
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5 * np.max(np.abs(before)), err_msg=kind)
        for path, plain, effective in pairs:
            np.testing.assert_allclose(
                effective, plain, atol=2e-6 * np.max(np.abs(plain)), err_msg=f"{kind} {path}"
            )


def test_spectral_normalization_divides_by_the_largest_singular_value_before_any_training():
    for kind, _, _, _, _, pairs in wrapped_kinds("spectral"):
        for path, plain, effective in pairs:
            expected = plain / np.linalg.norm(plain, 2)
            np.testing.assert_allclose(effective, expected, atol=1e-6, err_msg=f"{kind} {path}")


@pytest.mark.parametrize("wrapper", ["cayley", "exponential"])
def test_orthogonal_weights_start_at_the_nearest(wrapper):
    for kind, _, _, _, _, pairs in wrapped_kinds(wrapper):
        for path, plain, effective in pairs:
            left, values, right = np.linalg.svd(plain, full_matrices=False)
            expected = left @ right * (np.mean(values) if wrapper == "exponential" else 1)
            np.testing.assert_allclose(effective, expected, atol=3e-6, err_msg=f"{kind} {path}")


@pytest.mark.parametrize("wrapper", ["cayley", "exponential"])
def test_orthogonal_kernels_are_kept(wrapper):
    layer = layers.Dense(
        4, kernel_initializer=keras.initializers.Orthogonal(gain=1.0 if wrapper == "cayley" else 1.7)
    )
    layer.build((None, 6))
    before = number(layer(image(2, 6)))
    close(WRAPPERS[wrapper](layer)(image(2, 6)), before)


def test_a_layer_with_weights_is_told_what_changes_and_a_new_one_is_not():
    for wrapper, said in (
        ("spectral", "Spectral normalization without a gain"),
        ("cayley", "orthogonal without a gain"),
    ):
        WRAPPERS[wrapper](layers.Dense(3)).build((None, 4))
        layer = layers.Dense(3)
        layer.build((None, 4))
        with pytest.warns(UserWarning, match=f"{said} changes the weights of 3 of its 3 output units"):
            WRAPPERS[wrapper](layer).build((None, 4))


# ---- training ----------------------------------------------------------------------------------------


def tower(wrapper, first):
    """Layers of one wrapper, one after the other."""
    kinds = [first, layers.Dense(2)]
    name = wrapper.replace(" ", "_")
    return [WRAPPERS[wrapper](layer, name=f"{name}-{i}") for i, layer in enumerate(kinds)]


class Subclassed(keras.Model):
    """Not built before it is fitted, so that its variables get their values late."""

    def __init__(self):
        super().__init__()
        self.towers = [tower(wrapper, layers.Conv1D(4, 2, activation="tanh")) for wrapper in WRAPPERS]
        self.flat = layers.Flatten()

    def call(self, x, training=None):
        ends = [last(self.flat(first(x, training=training)), training=training) for first, last in self.towers]
        return sum(ends) / len(ends)


RECURRENT = ("spectral", "exponential", "dora")


def functional(wrappers=RECURRENT, recurrent=RECURRENT):
    """One tower per wrapper, side by side: what compiles once need not be compiled seven times."""
    entry = keras.Input((5, 3))
    ends = []
    for wrapper in wrappers:
        first, last = tower(wrapper, layers.GRU(4) if wrapper in recurrent else layers.Conv1D(4, 2))
        ends.append(last(layers.Flatten()(first(entry))))
    return keras.Model(entry, layers.Average()(ends))


def is_still(variable):
    """Whether no optimizer moves a variable: state, or the own weights of a layer that is adapted."""
    name = variable.path.split("/")[-1]
    adapted = "lora-" in variable.path or "dora-" in variable.path
    return name.endswith(STILL) or (adapted and name in ("kernel", "recurrent_kernel", "bias"))


@pytest.mark.parametrize("make", [functional, Subclassed])
def test_trains_under_fit(make):
    model = make()
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=COMPILES)
    x, y = image(16, 5, 3), image(16, 2)
    model.evaluate(x, y, verbose=0)
    before = {variable.path: number(variable) for variable in model.weights}
    first = model.predict(x, verbose=0)
    history = model.fit(x, y, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]
    for variable in model.weights:
        still = is_still(variable)
        assert variable.trainable != still, variable.path
        moved = np.any(number(variable) != before[variable.path])
        assert moved != (still and not variable.path.endswith(("left", "right"))), variable.path
    weights = model.get_weights()
    after = model.predict(x, verbose=0)
    assert np.any(after != first)
    model.evaluate(x, y, verbose=0)
    np.testing.assert_array_equal(model.predict(x, verbose=0), after)
    close(model(x, training=False), after, 1e-5)
    for now, then in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(now, then)


def test_power_iteration_follows_the_kernel_through_fit():
    """On JAX what a call assigns must come back from the compiled step, or sigma stays the first kernel's."""
    model = keras.Sequential([keras.Input((6,)), SpectralNormalization(layers.Dense(4), power_iterations=2)])
    (layer,) = model.layers
    model.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=COMPILES)
    start = SpectralState(number(layer.left), number(layer.right))
    model.fit(image(32, 6), 3 * image(32, 4), epochs=15, batch_size=8, verbose=0)
    kernel = number(layer.layer.kernel).T
    assert spectral_error(kernel, start) > 0.1  # the vectors of the start are not those of the end
    errors = layer.spectral_errors()
    assert errors["kernel"] == pytest.approx(
        spectral_error(kernel, (number(layer.left), number(layer.right))), abs=1e-6
    )
    assert errors["kernel"] < 0.2 * spectral_error(kernel, start)
    size = np.linalg.norm(number(layer.effective_kernel()), 2)
    assert size == pytest.approx(1 / (1 - errors["kernel"]), rel=1e-5)
    layer.settle()
    assert abs(layer.spectral_errors()["kernel"]) < 1e-6
    close(layer.effective_kernel(), (kernel / np.linalg.norm(kernel, 2)).T)


def test_a_call_in_training_is_one_power_iteration_and_writes_no_kernel():
    layer = SpectralNormalization(layers.Dense(4, use_bias=False))
    x = image(3, 6)
    layer(x)
    v = number(layer.layer.kernel).T + np.random.default_rng(0).normal(size=(4, 6))
    layer.layer.kernel.assign(v.T)
    left = number(layer.left)
    out = number(layer(x, training=True))
    right = left @ v / np.linalg.norm(left @ v)
    left = right @ v.T / np.linalg.norm(right @ v.T)
    close(layer.right, right)
    close(layer.left, left)
    close(out, x @ v.T / (left @ v @ right.T), 1e-5)
    close(layer(x, training=False), out)
    np.testing.assert_array_equal(number(layer.layer.kernel), v.T.astype("float32"))


def test_two_calls_in_one_step_can_be_differentiated():
    """A discriminator is called on real and on generated data before one step back."""
    layer = SpectralNormalization(layers.Dense(4, use_bias=False))
    x = image(3, 6)
    layer(x)
    kernel = number(layer.layer.kernel)

    def value(training=True):
        return ops.sum(layer(x, training=training)) + ops.sum(layer(2 * x, training=training) ** 2)

    assert np.all(np.isfinite(gradients(value, [layer.layer.kernel])[0]))
    found = gradients(lambda: value(False), [layer.layer.kernel])[0]
    left, right = number(layer.left), number(layer.right)

    def plain(k):
        w = k / (left @ k.T @ right.T)
        return np.sum(x @ w) + np.sum((2 * x @ w) ** 2)

    for place in np.ndindex(kernel.shape):
        step = np.zeros_like(kernel)
        step[place] = 1e-6
        assert found[place] == pytest.approx(
            (plain(kernel + step) - plain(kernel - step)) / 2e-6, rel=1e-3, abs=1e-4
        )


def test_a_frozen_layer_stands_still():
    for wrapper in WRAPPERS:
        layer = WRAPPERS[wrapper](layers.Dense(4))
        model = keras.Sequential([keras.Input((6,)), layer, layers.Dense(2)])
        layer.trainable = False
        before = layer.get_weights()
        assert len(model.trainable_variables) == 2
        layer.layer.kernel.assign(layer.layer.kernel + image(6, 4))
        before = layer.get_weights()
        model.compile("sgd", "mse")
        model.fit(image(4, 6), image(4, 2), verbose=0)
        for now, then in zip(layer.get_weights(), before, strict=True):
            np.testing.assert_array_equal(now, then)


def test_what_low_rank_adapts_is_frozen_whatever_is_thawed():
    frozen = layers.Dense(4, trainable=False, kernel_regularizer="l2")
    layer = LowRankAdaptation(frozen, 2, magnitude=True)
    model = keras.Sequential([keras.Input((6,)), layer])
    model.trainable = False
    assert model.trainable_variables == []
    model.trainable = True
    assert {variable.path.split("/")[-1] for variable in model.trainable_variables} == {"up", "down", "gain"}
    assert layer.losses == []
    # Weight decay would shrink the kernel if the optimizer knew it.
    kernel = number(frozen.kernel)
    model.compile(keras.optimizers.AdamW(0.1, weight_decay=0.5), "mse")
    model.fit(image(4, 6), image(4, 4), verbose=0)
    np.testing.assert_array_equal(number(frozen.kernel), kernel)


def test_low_rank_is_its_formula():
    for magnitude in (False, True):
        layer = LowRankAdaptation(layers.Conv2D(4, 3), 2, alpha=3.0, magnitude=magnitude)
        layer(image(1, 5, 5, 2))
        rng = np.random.default_rng(0)
        up, down, gain = rng.normal(size=(4, 2)), rng.normal(size=(2, 18)), rng.normal(size=4)
        layer.up.assign(up)
        layer.down.assign(down)
        expected = matrix(layer.layer.kernel, [3]) + 1.5 * up @ down
        if magnitude:
            layer.gain.assign(gain)
            expected = gain[:, None] * expected / np.linalg.norm(expected, axis=1, keepdims=True)
        close(matrix(layer.effective_kernel(), [3]), expected)


@pytest.mark.parametrize("wrapper", [*WRAPPERS, "unit", "layer"])
def test_forward_mode_and_reverse_mode_agree(wrapper):
    make = WRAPPERS.get(wrapper) or (lambda layer: WeightNormalization(layer, wrapper))
    layer, x = make(layers.Conv2D(3, 2)), image(2, 4, 4, 2)
    layer(x)
    variables = layer.trainable_variables
    for variable in variables:
        variable.assign(number(variable) + 0.1 * image(*variable.shape))
    weights, tangents = image(2, 3, 3, 3), [image(*variable.shape) for variable in variables]

    def weighed():
        return ops.sum(layer(x) * ops.convert_to_tensor(weights))

    backward = sum(np.sum(g * t) for g, t in zip(gradients(weighed, variables), tangents, strict=True))
    assert along(weighed, variables, tangents) == pytest.approx(backward, rel=1e-3)


def test_orthogonal_weights_stay_orthogonal_and_learn_a_rotation():
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(6, 6)))[0].astype("float32")
    turn[0] *= np.sign(np.linalg.det(turn))  # no rotation mirrors
    for wrapper in ("cayley", "exponential"):
        inner = layers.Dense(6, use_bias=False, kernel_initializer="identity")
        layer = WRAPPERS[wrapper](inner)
        model = keras.Sequential([keras.Input((6,)), layer])
        model.compile(keras.optimizers.Adam(0.1), "mse")
        x = image(64, 6)
        model.fit(x, x @ turn, epochs=60, batch_size=64, verbose=0)
        kernel = number(layer.effective_kernel())
        gain = number(layer.gain) if wrapper == "exponential" else 1
        np.testing.assert_allclose(kernel.T @ kernel, gain**2 * np.eye(6), atol=1e-5)
        assert np.mean((kernel - turn) ** 2) < 0.3 * np.mean((np.eye(6) - turn) ** 2)


def test_forced_rows_have_the_length_of_the_root_of_their_number():
    entry = keras.Input((6, 6, 3))
    conv = WeightNormalization(layers.Conv2DTranspose(4, 3), "magnitude", force=True)
    model = keras.Model(entry, conv(entry))
    x = image(4, 6, 6, 3)
    model.compile(keras.optimizers.SGD(0.5), "mse")
    model.fit(x, image(4, 8, 8, 4), batch_size=2, verbose=0)
    rows = matrix(conv.layer.kernel, [2])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), np.sqrt(27), rtol=2e-4)
    stored, expected = conv.layer.get_weights(), model.predict(x, verbose=0)
    model.predict(x, verbose=0)
    np.testing.assert_array_equal(conv.layer.get_weights()[0], stored[0])
    conv.layer.kernel.assign(100 * stored[0])  # the length of the rows means nothing, but for epsilon
    close(model.predict(x, verbose=0), expected, 2e-4)


# ---- saving and copying ------------------------------------------------------------------------------


def test_round_trips_and_folds(tmp_path):
    model = functional(WRAPPERS, recurrent=("spectral",))
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    x = image(8, 5, 3)
    model.fit(x, image(8, 2), batch_size=8, verbose=0)
    expected = number(model(x))
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    clone = keras.models.clone_model(model)
    clone.load_weights(tmp_path / "model.weights.h5")
    for other in (loaded, clone, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(number(other(x)), expected)
        assert [v.trainable for v in other.weights] == [v.trainable for v in model.weights]
        pairs = zip(model.layers, other.layers, strict=True)
        for ours, theirs in ((own, found) for own, found in pairs if hasattr(own, "specs")):
            config, again = ours.get_config(), theirs.get_config()
            assert {**config, "layer": None} == {**again, "layer": None}
    # What was loaded goes on training as what was saved does.
    for other in (model, loaded):
        other.fit(x, image(8, 2), batch_size=8, verbose=0)
    close(loaded(x), number(model(x)), 1e-4)
    before = model.get_weights()
    plain = refold.fold(model)
    assert not any(type(layer).__module__.startswith("refold") for layer in plain.layers)
    close(plain(x), number(model(x)), 1e-5)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
@pytest.mark.parametrize("wrapper", KEEPING)
def test_precision(policy, wrapper):
    layer = layers.Dense(3, dtype=policy)
    x = image(4, 6)
    before = number(layer(x))
    wrapped = WRAPPERS[wrapper](layer)
    out = wrapped(x, training=True)
    assert keras.backend.standardize_dtype(out.dtype) == layer.compute_dtype
    close(out, before, 2e-3 if policy == "mixed_float16" else 1e-2)
    for variable in wrapped.weights:
        if not any(variable is own for own in layer.weights):
            assert variable.dtype == "float32"


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_of_a_plain_layer_go_in(wrapper):
    plain = layers.Dense(3, bias_initializer="normal", kernel_initializer=keras.initializers.Orthogonal(seed=3))
    x = image(4, 6)
    expected = number(plain(x))
    wrapped = WRAPPERS[wrapper](layers.Dense(3))
    wrapped(x)
    wrapped.layer.set_weights(plain.get_weights())
    wrapped.reset_gain()
    close(wrapped(x), expected)


REFUSED = {
    "twice": (lambda: LowRankAdaptation(WeightNormalization(layers.Dense(2)), 1), "WeightNormalization already"),
    "no kernel": (lambda: SpectralNormalization(layers.ReLU()), r"\(ReLU\) has no kernel of its own"),
    "iterations": (lambda: SpectralNormalization(layers.Dense(2), 0), "power_iterations must be at least 1, not 0"),
    "epsilon": (lambda: SpectralNormalization(layers.Dense(2), epsilon=-1), "must be a finite number"),
    "map": (lambda: OrthogonalWeights(layers.Dense(2), "householder"), "choose cayley or exponential"),
    "rank": (lambda: LowRankAdaptation(layers.Dense(2), 0), "the rank must be at least 1, not 0"),
    "force": (
        lambda: WeightNormalization(layers.Dense(2), "unit", force=True),
        "only magnitude preserving normalization has rows that can be forced",
    ),
    "force and constraint": (
        lambda: WeightNormalization(layers.Dense(2, kernel_constraint="non_neg"), "magnitude", force=True).build(
            (2, 2)
        ),
        "has a constraint on its kernel already",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    make, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        make()
