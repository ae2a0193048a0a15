"""Rows without their mean, by an arithmetic in which a constant row is exactly zero."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refold.weights.namespace import Array, Namespace, dtype_name
from refold.weights.scaling import scale_rows


class CenteredRows(NamedTuple):
    """``(values + mean) * scale`` are the rows, and each row of ``values`` sums to zero.

    A row whose deviation is below the rounding of its largest weight is constant: its values and its ``inverse``
    are 0, and it passes no gradient. ``values`` is ``(units, fan_in)``; ``scale``, a power of two, its ``inverse``
    and ``mean`` are ``(units, 1)``.
    """

    values: Array
    scale: Array
    inverse: Array
    mean: Array


def center_rows(xp: Namespace, rows: Array) -> CenteredRows:
    """Take the mean out of each row of a matrix in float32 or float64."""
    values, scale, inverse = scale_rows(xp, rows)
    mean = xp.mean(values, axis=-1, keepdims=True)
    values = values - mean
    # The mean was rounded, and what is left of it would count as deviation in a nearly constant row.
    rest = xp.mean(values, axis=-1, keepdims=True)
    values = values - rest
    rounding = float(np.finfo(dtype_name(rows)).eps) / 2
    constant = xp.mean(values * values, axis=-1, keepdims=True) <= rounding * rounding
    kept = xp.where(constant, xp.zeros_like(rest), xp.ones_like(rest))
    return CenteredRows(values * kept, scale, inverse * kept, mean + rest)
