import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import refold.weights
from refold.weights import METHODS, NUMPY, RootMeanSquare, Rows, Standardization, Unit, fit_rows, method

NAMES = sorted(METHODS)
PLAIN = ["layer", "rms", "unit"]
RNG = np.random.default_rng(0)


def matrices(dtype, low=-10.0, high=10.0):
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6)
    low, high = (float(np.dtype(dtype).type(bound)) for bound in (low, high))
    return hnp.arrays(dtype, shapes, elements=st.floats(low, high, width=np.dtype(dtype).itemsize * 8))


# ---- the identities, in float64 ----------------------------------------------------------------------


def layer_norm(rows):
    return (rows - rows.mean(-1, keepdims=True)) / rows.std(-1, keepdims=True)


def test_layer_norm_of_the_weights_is_weight_normalization_of_the_centered_weights():
    rows = RNG.normal(size=(7, 12)) + 3
    centered = rows - rows.mean(-1, keepdims=True)
    expected = np.sqrt(12) * Unit().compose(NUMPY, centered)
    np.testing.assert_allclose(Standardization(0.0).compose(NUMPY, rows), expected, rtol=1e-13)
    np.testing.assert_allclose(layer_norm(rows), expected, rtol=1e-13)


def test_rms_norm_of_the_weights_is_weight_normalization():
    rows = RNG.normal(size=(7, 12))
    expected = rows / np.sqrt(np.mean(rows**2, -1, keepdims=True))
    np.testing.assert_allclose(RootMeanSquare().compose(NUMPY, rows), expected, rtol=1e-13)
    np.testing.assert_allclose(np.sqrt(12) * Unit().compose(NUMPY, rows), expected, rtol=1e-13)


@pytest.mark.parametrize("epsilon", [0.0, 1e-10, 0.5])
def test_epsilon_is_added_to_the_size(epsilon):
    rows = RNG.normal(size=(4, 9))
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    std = rows.std(-1, keepdims=True)
    centered = rows - rows.mean(-1, keepdims=True)
    expected = {
        "unit": rows / (length + epsilon),
        "rms": rows / (length / 3 + epsilon),
        "layer": centered / (std + epsilon),
    }
    for name in PLAIN:
        np.testing.assert_allclose(method(name, epsilon).compose(NUMPY, rows), expected[name], rtol=1e-13)


def test_default_epsilons():
    assert {name: method(name).epsilon for name in NAMES} == {
        "unit": 0.0,
        "rms": 0.0,
        "layer": 1e-10,
        "centered": 0.0,
        "magnitude": 1e-4,
        "official-standardization": 1e-5,
        "timm-standardization": 1e-6,
        "timm-scaled-standardization": 1e-6,
        "deepmind-scaled-standardization": 1e-4,
    }


@pytest.mark.parametrize("name", NAMES)
def test_gain_and_offset_are_per_row(name):
    rows, gain, offset = RNG.normal(size=(3, 5)), RNG.normal(size=(3, 1)), RNG.normal(size=(3, 1))
    plain = method(name).compose(NUMPY, rows)
    np.testing.assert_allclose(method(name).compose(NUMPY, rows, gain, offset), gain * plain + offset, rtol=1e-13)


# ---- laws, at random ---------------------------------------------------------------------------------


@given(st.sampled_from(NAMES), st.sampled_from([0.0, 1e-10, 1e-3]), matrices("float64"))
def test_compose_undoes_decompose(name, epsilon, weight):
    parts = method(name, epsilon).decompose(NUMPY, weight)
    again = method(name, epsilon).compose(NUMPY, *parts)
    size = np.max(np.abs(weight), -1, keepdims=True)
    assert np.all(np.abs(again - weight) <= 1e-14 * size + np.finfo("float64").tiny)


@given(st.sampled_from(["unit", "rms"]), matrices("float32", -1e30, 1e30))
def test_without_centering_the_weight_comes_back_bit_for_bit(name, weight):
    weight[np.abs(weight) < 1e-7] = 0
    again = method(name).compose(NUMPY, *method(name).decompose(NUMPY, weight))
    np.testing.assert_array_equal(again, weight)


@given(st.sampled_from(NAMES), matrices("float64"), st.integers(-60, 60))
def test_the_size_of_a_row_means_nothing(name, rows, power):
    rows[np.abs(rows) < 1e-3] = 0
    plain = method(name, 0.0).compose(NUMPY, rows)
    np.testing.assert_array_equal(method(name, 0.0).compose(NUMPY, rows * 2.0**power), plain)


@given(matrices("float64"), st.integers(-8, 8))
def test_the_mean_of_a_row_means_nothing_to_standardization(rows, shift):
    rows = np.round(rows, 2)
    plain = Standardization().compose(NUMPY, rows)
    np.testing.assert_allclose(Standardization().compose(NUMPY, rows + shift), plain, atol=1e-10)


@given(st.sampled_from(NAMES), matrices("float32", -3e38, 3e38))
def test_finite_for_every_finite_row(name, rows):
    parts = method(name).decompose(NUMPY, rows)
    assert np.all(np.isfinite(parts.gain))
    normalized = method(name).compose(NUMPY, rows)
    assert np.all(np.abs(normalized) <= np.sqrt(rows.shape[-1]) * (1 + 1e-5))


# ---- extreme rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-7, 1.0, 1e19, 1e30, 1e38])
@pytest.mark.parametrize("name", PLAIN)
def test_rows_of_any_size_are_normalized(name, size):
    rows = (size * np.array([[1, -1, 1, -1] * 4])).astype("float32")
    expected = rows / np.float32(size) / (4 if name == "unit" else 1)
    np.testing.assert_allclose(method(name, 0.0).compose(NUMPY, rows), expected, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_of_zeros_and_of_subnormal_numbers_are_zero(name, dtype):
    rows = np.zeros((2, 5), dtype)
    rows[1] = np.finfo(dtype).smallest_subnormal * np.arange(5)
    gain = np.ones((2, 1), dtype)
    np.testing.assert_array_equal(method(name).compose(NUMPY, rows, gain), 0)
    np.testing.assert_array_equal(method(name).decompose(NUMPY, rows).gain, 0)


@pytest.mark.parametrize("value", [0.1, -7.3, 1e30, 1e-30])
@pytest.mark.parametrize("length", [1, 3, 1000])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_constant_row_has_no_direction_once_centered(value, length, dtype):
    rows = np.full((1, length), value, dtype)
    for epsilon in (0.0, 1e-10):
        standardization = Standardization(epsilon)
        np.testing.assert_array_equal(standardization.compose(NUMPY, rows), 0)
        again = standardization.compose(NUMPY, *standardization.decompose(NUMPY, rows))
        np.testing.assert_allclose(again, rows, rtol=2 * np.finfo(dtype).eps)


def test_norms_of_long_rows_are_accurate():
    rows = RNG.normal(size=(2, 65536)).astype("float32")
    exact = rows / np.linalg.norm(rows.astype("float64"), axis=-1, keepdims=True)
    np.testing.assert_allclose(Unit().compose(NUMPY, rows), exact, rtol=1e-6)


# ---- types -------------------------------------------------------------------------------------------


def test_half_types_are_computed_in_float32():
    rows = RNG.normal(size=(3, 200)).astype("float16") * np.float16(300)
    for name in NAMES:
        made = method(name).compose(NUMPY, rows)
        assert made.dtype == np.float32
        np.testing.assert_array_equal(made, method(name).compose(NUMPY, rows.astype("float32")))


def test_float32_and_float64_stay_what_they_are():
    for name in NAMES:
        for dtype in ("float32", "float64"):
            parts = method(name).decompose(NUMPY, np.ones((2, 2), dtype))
            assert {np.asarray(part).dtype for part in parts if part is not None} == {np.dtype(dtype)}


def test_integers_are_refused():
    with pytest.raises(ValueError, match="int64 cannot be normalized: they are not floating-point"):
        Unit().compose(NUMPY, np.ones((2, 2), "int64"))


def test_unknown_names_and_epsilons_are_refused():
    with pytest.raises(ValueError, match="no weight normalization named 'batch': choose one of unit, layer, rms"):
        method("batch")
    for epsilon in (-1e-3, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="epsilon must be a finite number"):
            method("unit", epsilon)


# ---- fitting what only shows its result --------------------------------------------------------------


def test_a_scaling_and_a_shift_per_row_are_found():
    weight = RNG.normal(size=(4, 6)) + 1
    parts = fit_rows(NUMPY, layer_norm(weight), weight, offset=True)
    np.testing.assert_allclose(parts.gain * layer_norm(weight) + parts.offset, weight, rtol=1e-12)
    parts = fit_rows(NUMPY, weight * 7.5, weight, offset=False)
    assert parts.offset is None
    np.testing.assert_allclose(parts.gain, 1 / 7.5)


def test_a_row_of_zeros_gets_gain_one():
    assert fit_rows(NUMPY, np.zeros((1, 3)), np.zeros((1, 3)), offset=False).gain == 1


# ---- rows --------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.data())
def test_rows_there_and_back(data):
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=5, max_side=4))
    axes = data.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
    rows = Rows(shape, tuple(axes))
    weight = np.arange(np.prod(shape)).reshape(shape)
    matrix = rows.to_matrix(NUMPY, weight)
    assert matrix.shape == (rows.units, rows.fan_in)
    np.testing.assert_array_equal(rows.from_matrix(NUMPY, matrix), weight)


def test_a_row_holds_the_weights_of_one_unit():
    weight = RNG.normal(size=(3, 3, 4, 2))
    matrix = Rows(weight.shape, (-2, -1)).to_matrix(NUMPY, weight)
    for channel in range(4):
        for multiple in range(2):
            np.testing.assert_array_equal(matrix[channel * 2 + multiple], weight[:, :, channel, multiple].ravel())


def test_rows_refuse_axes_that_do_not_exist():
    with pytest.raises(ValueError, match="has no axes"):
        Rows((2, 3), (2,))
    with pytest.raises(ValueError, match="twice"):
        Rows((2, 3), (1, -1))


def test_without_axes_the_whole_weight_is_one_row():
    weight = np.arange(24.0).reshape(2, 3, 4)
    rows = Rows((2, 3, 4), ())
    assert (rows.units, rows.fan_in) == (1, 24)
    np.testing.assert_array_equal(rows.to_matrix(NUMPY, weight), weight.reshape(1, 24))
    np.testing.assert_array_equal(rows.from_matrix(NUMPY, weight.reshape(1, 24)), weight)


# ---- independence ------------------------------------------------------------------------------------


def test_no_framework_is_imported():
    source = Path(refold.weights.__file__).parents[2]
    program = (
        f"import sys; sys.path.insert(0, {str(source)!r}); import refold.weights\n"
        "print([name for name in ('keras', 'torch', 'jax', 'tensorflow', 'paddle') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
