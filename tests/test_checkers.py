"""The checkers are checked: they reject what they must, and the oracle is right where a hand can follow."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import oracle
from refold.algebra import Window, convolution

DAMAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "one number off by 1e-3": lambda x: x + 1e-3 * (x == x.max()),
    "all numbers off by 1e-3": lambda x: x + 1e-3,
    "two channels swapped": lambda x: x[[1, 0]],
    "a NaN": lambda x: np.where(x == x.max(), np.nan, x),
    "an infinity": lambda x: np.where(x == x.max(), np.inf, x),
    "a position missing": lambda x: x[:, :-1],
    "an axis more": lambda x: x[None],
}
X = np.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize("compare", [oracle.assert_same, oracle.assert_close])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_comparison_rejects(compare: Callable[..., None], damage: str) -> None:
    compare(X, X.copy())
    with pytest.raises(AssertionError):
        compare(X, DAMAGES[damage](X))
    with pytest.raises(AssertionError):
        compare(DAMAGES[damage](X), X)


@pytest.mark.parametrize("compare", [oracle.assert_same, oracle.assert_close])
def test_nan_is_not_equal_to_itself(compare: Callable[..., None]) -> None:
    x = np.array([[np.nan]])
    with pytest.raises(AssertionError):
        compare(x, x)


def test_assert_close_lets_rounding_pass_and_little_more() -> None:
    oracle.assert_close(X + 1e-15, X)
    with pytest.raises(AssertionError):
        oracle.assert_close(X + 1e-13, X)


def test_a_strided_padded_convolution_by_hand() -> None:
    conv = convolution([[[1, 10, 100]]], [5], (Window(3, stride=2, before=1, after=1),))
    oracle.assert_same(oracle.run(conv, np.array([[1.0, 2.0, 3.0, 4.0]])), np.array([[215.0, 437.0]]))


def test_a_dilated_cropping_convolution_by_hand() -> None:
    conv = convolution([[[1, 10]]], [0], (Window(2, dilation=2, before=-1, after=1),))
    oracle.assert_same(oracle.run(conv, np.array([[1.0, 2.0, 3.0, 4.0]])), np.array([[42.0, 3.0]]))


def test_a_grouped_convolution_over_two_axes_by_hand() -> None:
    windows = (Window(1), Window(2))
    conv = convolution([[[[1, 2]]], [[[3, 4]]]], [0, 7], windows, groups=2)
    x = np.array([[[1.0, 2.0]], [[5.0, 6.0]]])
    oracle.assert_same(oracle.run(conv, x), np.array([[[5.0]], [[46.0]]]))


def test_a_dense_layer_by_hand() -> None:
    layer = convolution([[1, 2], [3, 4]], [10, 20])
    oracle.assert_same(oracle.run(layer, np.array([1.0, 1.0])), np.array([13.0, 27.0]))


def test_padding_cropping_picking_and_joining_by_hand() -> None:
    oracle.assert_same(oracle.padded(X, [(1, -2)], [7, 8]), np.array([[7.0, 0.0], [8.0, 3.0]]))
    oracle.assert_same(oracle.picked(X, [1, 1, 0]), np.array([[3.0, 4, 5], [3, 4, 5], [0, 1, 2]]))
    oracle.assert_same(oracle.joined([X[:1], X]), np.array([[0.0, 1, 2], [0, 1, 2], [3, 4, 5]]))
    oracle.assert_same(oracle.total([X, X]), 2 * X)
    with pytest.raises(AssertionError):
        oracle.total([X, X[:, :1]])


def test_pools_and_norms_by_hand() -> None:
    window = Window(2, stride=2, before=1, after=0)
    oracle.assert_same(oracle.average_pool(X, [window]), np.array([[0.0, 1.5], [1.5, 4.5]]))
    norm = oracle.batch_norm(np.array([[3.0], [5.0]]), [1, 2], [3, 8], 1.0, [4, 6], [5, 7])
    oracle.assert_same(norm, np.array([[9.0], [13.0]]))


@pytest.mark.parametrize("window", [Window(3, 2, 2, 1, 2), Window(2, 3, 1, -1, 1), Window(3, 2, floating=True)])
def test_a_matrix_is_the_response_to_impulses(window: Window) -> None:
    conv = convolution([[list(range(1, window.taps + 1))]], None, (window,))
    for size in range(1, 9):
        columns = [oracle.run(conv, impulse[None])[0] for impulse in np.eye(size)]
        oracle.assert_same(oracle.matrix(window, conv.kernel[0, 0].tolist(), size), np.stack(columns, axis=1))
