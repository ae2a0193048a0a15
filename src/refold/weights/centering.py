"""Rows without their mean, by an arithmetic in which a constant row is exactly zero."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refold.weights.namespace import Array, Namespace, dtype_name
from refold.weights.scaling import ScaledRows, scale_rows


class CenteredRows(NamedTuple):
    """``(values + mean) * scale`` are the rows, and each row of ``values`` sums to zero.

    A row whose deviation is below the rounding of its largest weight is constant: its values and its ``inverse``
    are 0, and it passes no gradient. ``values`` is ``(units, fan_in)``; ``scale``, a power of two, its ``inverse``
    ``mean`` and ``square``, the sum of the squares of the values, are ``(units, 1)``.
    """

    values: Array
    scale: Array
    inverse: Array
    mean: Array
    square: Array


def center_rows(xp: Namespace, rows: Array, axis: int = -1, *, ordinary: bool = False) -> CenteredRows:
    """Take the mean out of each row of a matrix in float32 or float64, which runs along ``axis``.

    ``ordinary`` rows need no scale: 1.
    """
    values, scale, inverse = ScaledRows(rows, 1.0, 1.0) if ordinary else scale_rows(xp, rows, axis)
    mean = xp.mean(values, axis=axis, keepdims=True)
    values = values - mean
    # The mean was rounded, and what is left of it would count as deviation in a nearly constant row.
    # It passes no gradient, for what the values pass has no mean any more.
    rest = xp.stop_gradient(xp.mean(values, axis=axis, keepdims=True))
    values = values - rest
    rounding = float(np.finfo(dtype_name(rows)).eps) / 2
    square = xp.sum(values * values, axis=axis, keepdims=True)
    # Without a scale the largest weight of a nearly constant row is about its mean.
    rounding = rounding * xp.abs(mean) if ordinary else rounding
    constant = square <= rows.shape[axis] * (rounding * rounding)
    kept = xp.where(constant, xp.zeros_like(rest), xp.ones_like(rest))
    return CenteredRows(values * kept, scale, inverse * kept, mean + rest, square * kept)
