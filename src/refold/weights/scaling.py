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

    ``inverse`` is that of ``scale``. A row without any number of normal size (zeros, subnormal numbers, which some
    processors read as zeros) has zero values, scale 1 and inverse 0. ``values`` is ``(units, fan_in)``, the others
    are ``(units, 1)``.
    """

    values: Array
    scale: Array
    inverse: Array


class Parts(NamedTuple):
    """A weight taken apart: ``compose`` of them is the weight again.

    ``direction`` is ``(units, fan_in)``; ``gain`` and ``offset`` are ``(units, 1)``. ``offset`` is None for a
    method that does not center.
    """

    direction: Array
    gain: Array
    offset: Array | None


def scale_rows(xp: Namespace, rows: Array, axis: int = -1) -> ScaledRows:
    """Divide each row of a matrix in float32 or float64, which runs along ``axis``, by a power of two."""
    limits = np.finfo(dtype_name(rows))
    largest = xp.stop_gradient(xp.max(xp.abs(rows), axis=axis, keepdims=True))
    one = xp.ones_like(largest)
    empty = largest < float(limits.tiny)
    exponent = xp.floor(xp.log2(xp.where(empty, one, largest)))
    # Where the inverse is a number of normal size too: some processors read others as zeros.
    exponent = xp.clip(exponent, float(limits.minexp), float(-limits.minexp))
    # Not exp2, which XLA rounds.
    scale = xp.power(one + one, exponent)
    # One product per weight: a division, or a choice, costs several times as much.
    inverse = xp.where(empty, xp.zeros_like(scale), one / scale)
    return ScaledRows(rows * inverse, scale, inverse)


def attached_gain(xp: Namespace, values: Array, size: Array, scale: Array, axis: int = -1) -> Array:
    """The gain that gives rows their size back, which counts in units of ``scale``: 0 where there is no direction.

    A size beyond the largest number is given as that number, so that it stays finite.
    """
    empty = xp.max(xp.abs(values), axis=axis, keepdims=True) <= 0
    largest = float(np.finfo(dtype_name(scale)).max) / xp.where(scale > 1, scale, xp.ones_like(scale))
    gain = xp.where(size > largest, largest, size) * scale
    return xp.where(empty, xp.zeros_like(gain), gain)
