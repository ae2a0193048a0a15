"""Methods that see the whole matrix: spectral normalization and low-rank adaptation."""

import numpy as np
import pytest

from refold.weights import NUMPY, LowRank, Spectral, SpectralState, spectral_error

RNG = np.random.default_rng(5)


def start(rows, seed=0):
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(1, rows.shape[0])), rng.normal(size=(1, rows.shape[1]))
    return SpectralState(
        (left / np.linalg.norm(left)).astype(rows.dtype), (right / np.linalg.norm(right)).astype(rows.dtype)
    )


# ---- spectral normalization and sigma-Reparam --------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (1, 4), (4, 1)])
def test_power_iteration_arrives_at_the_largest_singular_value(shape):
    v = RNG.normal(size=shape)
    state = Spectral().advance(NUMPY, v, start(v), 2000)
    np.testing.assert_allclose(Spectral().compose(NUMPY, v, state), v / np.linalg.norm(v, 2), rtol=1e-10)
    assert abs(spectral_error(v, state)) < 1e-10


def test_one_step_is_algorithm_one():
    v = RNG.normal(size=(5, 8))
    state = start(v)
    right = v.T @ state.left[0]
    right /= np.linalg.norm(right)
    left = v @ right
    left /= np.linalg.norm(left)
    after = Spectral().advance(NUMPY, v, state)
    np.testing.assert_allclose(after.right[0], right, rtol=1e-13)
    np.testing.assert_allclose(after.left[0], left, rtol=1e-13)
    np.testing.assert_allclose(Spectral(0.5).compose(NUMPY, v, after), v / (left @ v @ right + 0.5), rtol=1e-13)


def test_composing_and_advancing_write_into_nothing():
    v = RNG.normal(size=(5, 8))
    state = start(v)
    before = [x.copy() for x in (v, *state)]
    Spectral().compose(NUMPY, v, Spectral().advance(NUMPY, v, state, 3))
    for old, new in zip(before, (v, *state), strict=True):
        np.testing.assert_array_equal(old, new)
    np.testing.assert_array_equal(Spectral().advance(NUMPY, v, state, 0).left, state.left)


@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_attaching_with_the_gain_keeps_the_weight(dtype, size, epsilon):
    v = (size * RNG.normal(size=(6, 4))).astype(dtype)
    state, gain = Spectral(epsilon).attach(v)
    assert {x.dtype for x in (*state, gain)} == {np.dtype(dtype)}
    assert abs(spectral_error(v, state)) < 1e-6
    again = Spectral(epsilon).compose(NUMPY, v, state, gain)
    np.testing.assert_allclose(again, v, rtol=2e-6 if dtype == "float32" else 1e-13)


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e30, 1e37])
def test_the_size_of_the_matrix_means_nothing(size):
    v = np.round(RNG.normal(size=(6, 4)), 2).astype("float32")
    scaled = v * np.float32(size)
    states = [Spectral().advance(NUMPY, x, start(v), 20) for x in (v, scaled)]
    expected = v / np.linalg.norm(v.astype("float64"), 2)
    made = Spectral().compose(NUMPY, scaled, states[1])
    np.testing.assert_allclose(made, Spectral().compose(NUMPY, v, states[0]), rtol=1e-5)
    np.testing.assert_allclose(made, expected, rtol=1e-2)


@pytest.mark.parametrize("value", [0.0, 1e-45])
def test_a_matrix_of_zeros_is_zero_and_leaves_the_state(value):
    v = np.full((3, 4), value, "float32")
    state = Spectral().advance(NUMPY, v, start(v), 2)
    np.testing.assert_array_equal(state.left, start(v).left)
    np.testing.assert_array_equal(state.right, start(v).right)
    np.testing.assert_array_equal(Spectral().compose(NUMPY, v, state, np.ones((1, 1), "float32")), 0)
    attached, gain = Spectral().attach(v)
    assert all(np.all(np.isfinite(x)) for x in (*attached, gain))


def test_half_types_are_computed_in_float32():
    v = RNG.normal(size=(6, 4)).astype("float16")
    state, gain = Spectral().attach(v)
    made = Spectral().compose(NUMPY, v, state, gain)
    assert made.dtype == gain.dtype == np.float32
    np.testing.assert_allclose(made, v.astype("float32"), rtol=1e-5)


def test_negative_steps_are_refused():
    v = RNG.normal(size=(2, 2))
    with pytest.raises(ValueError, match="must not be negative, and -1 is"):
        Spectral().advance(NUMPY, v, start(v), -1)


# ---- low-rank adaptation -----------------------------------------------------------------------------


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_attaching_changes_nothing(magnitude, size):
    w = (size * RNG.normal(size=(5, 7))).astype("float32")
    w[2] = 0
    adaptation = LowRank(scale=2.0, magnitude=magnitude)
    parts = adaptation.attach(NUMPY, w, RNG.normal(size=(2, 7)).astype("float32"))
    assert parts.up.shape == (5, 2)
    np.testing.assert_array_equal(adaptation.compose(NUMPY, *parts), w)


def test_lora_and_dora_are_their_formulas():
    w, up, down = RNG.normal(size=(5, 7)), RNG.normal(size=(5, 2)), RNG.normal(size=(2, 7))
    gain = RNG.normal(size=(5, 1))
    adapted = w + 0.25 * up @ down
    np.testing.assert_allclose(LowRank(0.25).compose(NUMPY, w, up, down), adapted, rtol=1e-13)
    expected = gain * adapted / np.linalg.norm(adapted, axis=-1, keepdims=True)
    np.testing.assert_allclose(LowRank(0.25, True).compose(NUMPY, w, up, down, gain), expected, rtol=1e-13)


def test_factors_that_do_not_fit_and_gains_out_of_place_are_refused():
    w = RNG.normal(size=(5, 7))
    with pytest.raises(ValueError, match=r"shape \(2, 5\) does not fit weights of 7 inputs"):
        LowRank().attach(NUMPY, w, RNG.normal(size=(2, 5)))
    parts = LowRank().attach(NUMPY, w, RNG.normal(size=(2, 7)))
    with pytest.raises(ValueError, match="DoRA needs a gain"):
        LowRank(magnitude=True).compose(NUMPY, *parts)
    with pytest.raises(ValueError, match="LoRA has none"):
        LowRank().compose(NUMPY, *parts[:3], np.ones((5, 1)))
