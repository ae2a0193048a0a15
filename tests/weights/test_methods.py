"""Every named method against its published formula, written out here in float64."""

import math

import numpy as np
import pytest

from refold.weights import (
    ACTIVATION_GAINS,
    METHODS,
    NUMPY,
    Centered,
    DeepMindScaledStandardization,
    MagnitudePreserving,
    Standardization,
    TimmStandardization,
    Unit,
    activation_gain,
    method,
)

NAMES = sorted(METHODS)
CENTERED = [name for name in NAMES if method(name).centered]
SIZES = [1e-37, 1e-30, 1e-7, 1e-4, 1.0, 1e19, 1e30, 1e37]


def norm(x):
    return np.sqrt(np.sum(x * x, -1, keepdims=True))


def center(v):
    return v - np.mean(v, -1, keepdims=True)


FORMULAS = {
    "unit": lambda v: v / norm(v),
    "rms": lambda v: v / np.sqrt(np.mean(v**2, -1, keepdims=True)),
    "layer": lambda v: center(v) / (np.std(v, -1, keepdims=True) + 1e-10),
    "centered": lambda v: center(v) / norm(center(v)),
    "magnitude": lambda v: v / (1e-4 + norm(v) / np.sqrt(v.shape[-1])) / np.sqrt(v.shape[-1]),
    "official-standardization": lambda v: center(v) / (np.std(v, -1, ddof=1, keepdims=True) + 1e-5),
    "timm-standardization": lambda v: center(v) / np.sqrt(np.var(v, -1, keepdims=True) + 1e-6),
    "timm-scaled-standardization": lambda v: (
        center(v) / np.sqrt(np.var(v, -1, keepdims=True) + 1e-6) / np.sqrt(v.shape[-1])
    ),
    "deepmind-scaled-standardization": lambda v: (
        center(v) / np.sqrt(np.maximum(np.var(v, -1, keepdims=True) * v.shape[-1], 1e-4))
    ),
}


def rows(dtype="float64", size=1.0):
    return (size * np.random.default_rng(7).normal(0.5, 1, size=(5, 12))).astype(dtype)


def jacobian(function, v, step=1e-6):
    """d function / d v by central differences, of one row in float64."""
    columns = []
    for place in range(v.shape[-1]):
        e = np.zeros_like(v)
        e[..., place] = step
        columns.append((function(v + e) - function(v - e)) / (2 * step))
    return np.stack(columns, -1)


def test_every_method_has_its_formula_here():
    assert sorted(FORMULAS) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 1.0, 100.0])
def test_formula_in_float64(name, size):
    v = rows(size=size)
    np.testing.assert_allclose(method(name).compose(NUMPY, v), FORMULAS[name](v), rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_formula_for_float32_rows_of_any_size(name, size):
    v = rows("float32", size)
    expected = FORMULAS[name](v.astype("float64"))
    made = method(name).compose(NUMPY, v)
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=2e-7 * np.max(np.abs(expected)) + 1e-37)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_attaching_keeps_float32_rows_of_any_size(name, size):
    v = rows("float32", size)
    parts = method(name).decompose(NUMPY, v)
    assert np.all(np.isfinite(parts.gain))
    again = method(name).compose(NUMPY, *parts)
    assert np.max(np.abs(again - v) / np.max(np.abs(v))) <= 5e-7


@pytest.mark.parametrize("name", CENTERED)
def test_the_mean_means_nothing_once_centered(name):
    v = np.round(rows(), 3)
    np.testing.assert_allclose(method(name).compose(NUMPY, v + 4), method(name).compose(NUMPY, v), atol=1e-13)


@pytest.mark.parametrize("name", CENTERED)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_row_that_is_constant_but_for_rounding_has_no_direction(name, dtype):
    v = np.full((1, 1000), 3.0, dtype)
    v[0, 500] = np.nextafter(v[0, 500], np.asarray(4, dtype))
    np.testing.assert_array_equal(method(name, 0.0).compose(NUMPY, v), 0)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_orthogonal_to_the_direction_without_epsilon(name):
    v = rows()[:1]
    of = jacobian(lambda x: method(name, 0.0).compose(NUMPY, x), v)[0]
    # d w / d v along v is zero, so <v, dL/dv> is zero for every loss.
    np.testing.assert_allclose(of @ v[0], 0, atol=1e-8)
    if name in CENTERED:
        np.testing.assert_allclose(of @ np.ones_like(v[0]), 0, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_the_direction_grows_under_gradient_descent(name):
    v, target = rows()[:1], rows()[1:2]
    for _ in range(5):
        gradient = target[0] @ jacobian(lambda x: method(name, 0.0).compose(NUMPY, x), v)[0]
        after = v - 0.1 * gradient
        expected = norm(v) ** 2 + 0.01 * np.sum(gradient**2)
        np.testing.assert_allclose(norm(after) ** 2, expected, rtol=1e-7)
        assert norm(after) > norm(v)
        v = after


# ---- how the methods are related ---------------------------------------------------------------------


def test_centered_is_the_norm_of_the_centered_row_and_scaled_standardization():
    v = rows()
    np.testing.assert_allclose(Centered().compose(NUMPY, v), Unit().compose(NUMPY, center(v)), rtol=1e-12)
    scaled = Standardization(0.0).compose(NUMPY, v) / np.sqrt(v.shape[-1])
    np.testing.assert_allclose(Centered().compose(NUMPY, v), scaled, rtol=1e-12)
    np.testing.assert_allclose(TimmStandardization(0.0, scaled=True).compose(NUMPY, v), scaled, rtol=1e-12)
    np.testing.assert_allclose(DeepMindScaledStandardization().compose(NUMPY, v), scaled, rtol=1e-12)


def test_magnitude_is_the_norm_with_an_epsilon_that_grows_with_the_row():
    v = rows()
    epsilon = 1e-4 * np.sqrt(v.shape[-1])
    np.testing.assert_allclose(MagnitudePreserving().compose(NUMPY, v), Unit(epsilon).compose(NUMPY, v), rtol=1e-13)


def test_forced_rows_have_the_length_of_the_root_of_their_number_and_compute_the_same():
    v = 37 * rows()
    method = MagnitudePreserving(0.0)
    forced = method.force(NUMPY, v)
    np.testing.assert_allclose(norm(forced), np.sqrt(v.shape[-1]), rtol=1e-14)
    np.testing.assert_allclose(method.compose(NUMPY, forced), method.compose(NUMPY, v), rtol=1e-14)


def test_an_epsilon_in_the_root_does_not_standardize_small_rows():
    v = center(rows())
    v = 1e-4 * v / np.std(v, -1, keepdims=True)
    np.testing.assert_allclose(
        np.std(TimmStandardization().compose(NUMPY, v), -1), 1e-4 / np.sqrt(1.01e-6), rtol=1e-9
    )


# ---- the gains of activations ------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def elu(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


ACTIVATIONS = {
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "elu": elu,
    "gelu": lambda x: x * np.array([math.erfc(-value / math.sqrt(2)) / 2 for value in x]),
    "relu6": lambda x: np.clip(x, 0, 6),
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * elu(x)),
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "softplus": lambda x: np.logaddexp(0, x),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("name", sorted(ACTIVATION_GAINS))
def test_the_gain_gives_the_activation_unit_variance(name):
    # The trapezoidal rule, with nodes on both kinks: an integral over the normal distribution to 1e-7.
    x = np.linspace(-12, 12, 48001)
    density = np.exp(-x * x / 2) / np.sqrt(2 * np.pi) * (x[1] - x[0])
    y = activation_gain(name) * ACTIVATIONS[name](x)
    mean = np.sum(y * density)
    assert np.sum((y - mean) ** 2 * density) == pytest.approx(1, rel=1e-6)


def test_the_gain_of_the_activation_is_a_factor_and_attaching_takes_it_back():
    v, factor = rows(), math.sqrt(2 / (1 - 1 / math.pi))
    for plain, scaled in [
        (Centered(), Centered(activation="relu")),
        (TimmStandardization(scaled=True), TimmStandardization(scaled=True, activation="relu")),
    ]:
        made = scaled.compose(NUMPY, v)
        np.testing.assert_allclose(made, factor * plain.compose(NUMPY, v), rtol=1e-13)
        np.testing.assert_allclose(scaled.compose(NUMPY, *scaled.decompose(NUMPY, v)), v, rtol=1e-12)


def test_scaled_standardization_with_the_gain_keeps_the_variance_of_a_deep_network():
    rng = np.random.default_rng(0)
    he = scaled = rng.normal(size=(64, 128))
    for _ in range(50):
        v = rng.normal(size=(128, 128))
        he = np.maximum(he, 0) @ (v * np.sqrt(2 / 128)).T
        scaled = np.maximum(scaled, 0) @ Centered(activation="relu").compose(NUMPY, v).T
    assert np.mean(scaled, 0).std() < 0.5 * np.sqrt(np.mean(scaled**2))  # no mean that all inputs share
    assert 0.3 < np.mean(np.var(scaled, 0)) < 3
    assert np.mean(np.var(he, 0)) < 0.1


def test_unknown_activations_are_refused():
    with pytest.raises(ValueError, match="no gain for the activation 'leaky_relu': choose one of linear, relu"):
        Centered(activation="leaky_relu")
    with pytest.raises(ValueError, match="only scaled weight standardization"):
        TimmStandardization(activation="relu")
