"""What a rearrangement is, read from where it sends the places of elements."""

from __future__ import annotations

import numpy as np
import pytest

from refold.graph.graph import Op, Select, Slice
from refold.graph.rearrangement import classify, positions


@pytest.mark.parametrize("size", [5, 20, 78, 100])
def test_a_crop_is_a_slice_at_every_size(size: int) -> None:
    """Large views too, which have gaps in memory: numpy's unravel_index takes those apart wrongly."""
    shape = (3, 4, size, size)
    rows: Op = Slice(((0, 0, 1), (0, 0, 1), (1, 1, 1), (0, 0, 1)))
    assert classify([(shape, positions(shape)[:, :, 1:-1, :])]) == rows
    columns: Op = Slice(((0, 0, 1), (0, 0, 1), (0, 0, 1), (2, 1, 1)))
    assert classify([(shape, positions(shape)[:, :, :, 2:-1])]) == columns


def test_a_shuffle_is_a_choice_of_channels() -> None:
    shape = (2, 6, 60, 60)
    moved = positions(shape).reshape(2, 2, 3, 60, 60).swapaxes(1, 2).reshape(shape)
    assert classify([(shape, moved)]) == Select((0, 3, 1, 4, 2, 5), 1)


def test_what_has_no_word_is_nothing() -> None:
    shape = (2, 3, 4, 4)
    assert classify([(shape, np.zeros(shape, dtype=np.int64))]) is None
