"""The same formulas on a matrix that is stored the other way round, and on what a layer gives."""

from __future__ import annotations

import numpy as np
import pytest

from refold.weights import METHODS, NUMPY, Rows, Spectral, method, outputs, pays

NAMES = sorted(METHODS)
RNG = np.random.default_rng(4)
V = RNG.normal(size=(5, 12))
G, OFFSET = RNG.normal(size=(2, 5, 1))
SIZES = np.array([0.0, 1e-310, 1e-200, 1.0, 1e200])[:, None]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("v", [V, V * SIZES, np.ones((3, 7))], ids=["ordinary", "extreme", "constant"])
def test_rows_along_the_first_axis_give_the_same(name, v):
    chosen = method(name)
    across, along = chosen.decompose(NUMPY, v), chosen.decompose(NUMPY, v.T, axis=0)
    np.testing.assert_allclose(along.gain.T, across.gain, rtol=1e-13)
    assert (along.offset is None) == (across.offset is None)
    parts = [None if part is None else part.T for part in across[1:]]
    made = chosen.compose(NUMPY, v.T, *parts, axis=0)
    np.testing.assert_allclose(made.T, chosen.compose(NUMPY, *across), rtol=1e-12, atol=1e-12 * np.max(np.abs(v)))


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_a_spectral_state_is_the_same_for_the_matrix_the_other_way_round(epsilon):
    spectral, gain = Spectral(epsilon), np.full((1, 1), 3.0)
    state, _ = spectral.attach(RNG.normal(size=V.shape))
    across = spectral.advance(NUMPY, V, state, 2)
    along = spectral.advance(NUMPY, V.T, state, 2, axis=0)
    for one, other in zip(across, along, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    made = spectral.compose(NUMPY, V.T, across, gain, axis=0)
    np.testing.assert_allclose(made.T, spectral.compose(NUMPY, V, across, gain), rtol=1e-12)


def test_power_iteration_keeps_the_small_numbers_of_a_vector_for_huge_and_tiny_matrices():
    spectral, v = Spectral(), V.astype("float32")
    state, _ = spectral.attach(v)
    wanted = spectral.advance(NUMPY, v, state, 1)
    for size in (1e-36, 1e36):
        found = spectral.advance(NUMPY, v * np.float32(size), state, 1)
        np.testing.assert_allclose(found.left, wanted.left, rtol=1e-5, atol=1e-7)
        made = spectral.compose(NUMPY, v * np.float32(size), found)
        np.testing.assert_allclose(made, spectral.compose(NUMPY, v, wanted), rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 4, 1, 6)])
@pytest.mark.parametrize("unit_axes", [(0,), (-1,), (-2, -1), (1,), (0, 2), (-1, 0)])
def test_lines_are_the_rows_and_come_back(shape, unit_axes):
    rows, weight = Rows(shape, unit_axes), RNG.normal(size=shape)
    lines = rows.to_lines(NUMPY, weight)
    np.testing.assert_array_equal(lines if rows.axis else lines.T, rows.to_matrix(NUMPY, weight))
    np.testing.assert_array_equal(rows.from_lines(NUMPY, lines), weight)
    part = np.arange(float(rows.units))
    assert (lines * rows.as_column(NUMPY, part)).shape == lines.shape
    assert rows.axis == (0 if unit_axes in ((-1,), (-2, -1)) else -1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize(
    "parts", [(), (G,), (G, OFFSET), (None, OFFSET)], ids=["nothing", "gain", "both", "offset"]
)
def test_outputs_are_the_product_with_the_weight(name, axis, parts):
    x = RNG.normal(size=(2, 3, 12))
    expected = x @ method(name).compose(NUMPY, V, *parts).T
    found = outputs(NUMPY, method(name), x, V if axis else V.T, *parts, axis=axis)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_of_units_without_direction_are_their_offset(name):
    v = np.where(np.arange(5)[:, None] < 2, 0.0, V)
    x = RNG.normal(size=(3, 12))
    found = outputs(NUMPY, method(name), x, v, G, OFFSET)
    np.testing.assert_allclose(found[:, :2], x.sum(-1, keepdims=True) * OFFSET[:2, 0], rtol=1e-12)


def test_outputs_pay_for_few_inputs():
    assert pays(8 * 64, 1024)
    assert not pays(513, 1024)
    assert not pays(0, 1024)
