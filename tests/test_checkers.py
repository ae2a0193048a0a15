"""The checkers are checked: they reject what they must."""

from __future__ import annotations

import numpy as np
import pytest

from oracle import assert_same, run
from refold.algebra import Window, convolution


@pytest.mark.parametrize(
    "damage",
    [
        lambda x: x + 1e-3,
        lambda x: x[[1, 0]],
        lambda x: np.where(x == x.max(), np.nan, x),
        lambda x: x[:, :-1],
    ],
)
def test_the_comparison_rejects(damage: object) -> None:
    x = np.arange(6.0).reshape(2, 3)
    assert_same(x, x.copy())
    with pytest.raises(AssertionError):
        assert_same(x, damage(x))  # type: ignore[operator]


def test_nan_is_not_equal_to_itself() -> None:
    x = np.array([[np.nan]])
    with pytest.raises(AssertionError):
        assert_same(x, x)


def test_the_oracle_by_hand() -> None:
    conv = convolution([[[1, 10, 100]]], [5], (Window(3, stride=2, before=1, after=1),))
    assert_same(run(conv, np.array([[1.0, 2.0, 3.0, 4.0]])), np.array([[215.0, 437.0]]))
