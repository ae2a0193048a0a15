"""What all row normalizations share: norms that neither overflow nor underflow, and dividing by them.

A row is first divided by a power of two near its largest magnitude. That is exact, so a row of 1e30 and one
of 1e-30 are normalized as well as a row of ones, and giving the scale back to the gain is exact too. The
scale is a constant for the gradient: what is normalized does not depend on it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refold.weights.namespace import Array, Namespace, dtype_name


class ScaledRows(NamedTuple):
    """``values * scale`` are the rows; the largest magnitude in a row of ``values`` is about 1.

    A row without any number of normal size (zeros, subnormal numbers, which some processors read as zeros)
    has zero values and scale 1. ``values`` is ``(units, fan_in)``, ``scale`` ``(units, 1)``.
    """

    values: Array
    scale: Array


class Parts(NamedTuple):
    """A weight taken apart: ``compose`` of them is the weight again.

    ``direction`` is ``(units, fan_in)``; ``gain`` and ``offset`` are ``(units, 1)``. ``offset`` is None for a
    method that does not center.
    """

    direction: Array
    gain: Array
    offset: Array | None


def scale_rows(xp: Namespace, rows: Array) -> ScaledRows:
    """Divide each row of a matrix in float32 or float64 by a power of two."""
    limits = np.finfo(dtype_name(rows))
    largest = xp.stop_gradient(xp.max(xp.abs(rows), axis=-1, keepdims=True))
    one = xp.ones_like(largest)
    empty = largest < float(limits.tiny)
    exponent = xp.floor(xp.log2(xp.where(empty, one, largest)))
    # log2 may round up to the exponent of infinity.
    exponent = xp.clip(exponent, float(limits.minexp), float(limits.maxexp - 1))
    # Not exp2, which XLA rounds.
    scale = xp.power(one + one, exponent)
    values = xp.where(empty, xp.zeros_like(rows), rows / scale)
    return ScaledRows(values, scale)


class Divisor(NamedTuple):
    """What scaled values are divided by; ``values`` are 0 in rows that have no direction."""

    values: Array
    size: Array


def divisor(xp: Namespace, values: Array, scale: Array, *, epsilon: float, average: bool) -> Divisor:
    """The root of the sum (or, with ``average``, of the mean) of squares of each row, plus ``epsilon``.

    ``epsilon`` counts in the units of the weight, so it is divided by ``scale`` as the values are. Rows of zeros
    have no direction: their values stay 0 and their root is put to 1, so that neither they nor their gradients
    divide by zero.
    """
    reduce = xp.mean if average else xp.sum
    square = reduce(values * values, axis=-1, keepdims=True)
    empty = square <= 0
    one = xp.ones_like(square)
    root = xp.sqrt(xp.where(empty, one, square))
    size = root + epsilon / scale if epsilon else root
    return Divisor(xp.where(empty, xp.zeros_like(values), values), xp.where(empty, one, size))


def composed(xp: Namespace, parts: Divisor, gain: Array | None, offset: Array | None) -> Array:
    """``gain * values / size + offset``, in an order that is exact where the gain came from ``decompose``."""
    if gain is None:
        rows = parts.values / parts.size
    else:
        rows = parts.values * (gain / parts.size)
    return rows if offset is None else rows + offset


def attached_gain(xp: Namespace, parts: Divisor, scale: Array) -> Array:
    """The gain that gives rows their size back: 0 where there is no direction.

    A size beyond the largest number is given as that number, so that it stays finite.
    """
    empty = xp.max(xp.abs(parts.values), axis=-1, keepdims=True) <= 0
    largest = float(np.finfo(dtype_name(scale)).max) / xp.where(scale > 1, scale, xp.ones_like(scale))
    gain = xp.where(parts.size > largest, largest, parts.size) * scale
    return xp.where(empty, xp.zeros_like(gain), gain)
