"""Methods that see the whole matrix: spectral normalization, low-rank adaptation, orthogonal weights."""

import numpy as np
import pytest

from refold.weights import NUMPY, LowRank, Orthogonal, Spectral, SpectralState, spectral_error

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


# ---- orthogonal weights ------------------------------------------------------------------------------

SHAPES = [(3, 8), (3, 5), (4, 4), (8, 3), (1, 5), (5, 1), (1, 1)]


def turned(chart, direction, base):
    """The formula, with matrices of the larger side."""
    if base.shape[0] > base.shape[1]:
        return turned(chart, direction.T, base.T).T
    skew = base.T @ direction - direction.T @ base
    if chart == "cayley":
        return base @ (np.eye(len(skew)) + skew / 2) @ np.linalg.inv(np.eye(len(skew)) - skew / 2)
    values, vectors = np.linalg.eigh(1j * skew)  # hermitian: exp(skew) = V exp(-i values) V*
    return base @ (vectors @ np.diag(np.exp(-1j * values)) @ vectors.conj().T).real


def gram(w):
    return w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w


@pytest.mark.parametrize("chart", ["cayley", "exponential"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3, 1.0, 3.0])
def test_a_turned_base_is_its_formula(chart, shape, size):
    rng = np.random.default_rng(6)
    parts = Orthogonal(chart).attach(rng.normal(size=shape))
    v = parts.base + size * rng.normal(size=shape)
    made = Orthogonal(chart).compose(NUMPY, v, parts.base, np.full((1, 1), 0.5))
    np.testing.assert_allclose(made, 0.5 * turned(chart, v, parts.base), atol=1e-12)


@pytest.mark.parametrize("chart", ["cayley", "exponential"])
@pytest.mark.parametrize("shape", [(3, 8), (6, 8), (8, 3), (16, 144)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 10.0, 100.0])
def test_it_stays_orthogonal_however_far_it_turns(chart, shape, size):
    rng = np.random.default_rng(7)
    parts = Orthogonal(chart).attach(rng.normal(size=shape).astype("float32"))
    v = parts.base + (size * rng.normal(size=shape) / np.sqrt(max(shape))).astype("float32")
    made = Orthogonal(chart).compose(NUMPY, v, parts.base)
    assert made.dtype == np.float32
    np.testing.assert_allclose(gram(made.astype("float64")), np.eye(min(shape)), atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_attaching_keeps_multiples_of_orthogonal_matrices_and_nothing_else(shape, size, dtype):
    rng = np.random.default_rng(8)
    left, values, right = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    weight = (size * left @ right).astype(dtype)
    parts = Orthogonal().attach(weight)
    kept = Orthogonal().compose(NUMPY, *parts)
    assert kept.dtype == dtype
    np.testing.assert_allclose(kept, weight, atol=size * (5e-7 if dtype == "float32" else 1e-14))
    # The nearest to another weight: nothing that turns it, or changes its gain, is nearer.
    other = left @ np.diag(values) @ right
    parts = Orthogonal().attach(other)
    distance = np.linalg.norm(Orthogonal().compose(NUMPY, *parts) - other)
    assert distance == pytest.approx(np.sqrt(np.sum((values - np.mean(values)) ** 2)), abs=1e-12)
    for step in (1e-2, 1e-1):
        for _ in range(5):
            moved = parts.direction + step * rng.normal(size=shape)
            gain = parts.gain * (1 + step * rng.normal())
            assert np.linalg.norm(Orthogonal().compose(NUMPY, moved, parts.base, gain) - other) >= distance - 1e-12


def test_a_change_of_nothing_is_nothing():
    for chart in ("cayley", "exponential"):
        for shape in SHAPES:
            parts = Orthogonal(chart).attach(RNG.normal(size=shape))
            made = Orthogonal(chart).compose(NUMPY, parts.direction, parts.base)
            np.testing.assert_allclose(made, parts.base, atol=4e-16)


def test_weights_without_a_nearest_one_get_some_one():
    parts = Orthogonal().attach(np.zeros((3, 5), "float32"))
    np.testing.assert_allclose(gram(parts.base), np.eye(3), atol=1e-6)
    np.testing.assert_array_equal(Orthogonal().compose(NUMPY, *parts), 0)
    with pytest.raises(ValueError, match="no map 'householder' to orthogonal matrices: choose cayley or exp"):
        Orthogonal("householder")
