"""The gain and offset that undo a normalization of which nothing but its result is known."""

from __future__ import annotations

from refold.weights.namespace import Array, Namespace, widen
from refold.weights.scaling import Parts, scale_rows


def fit_rows(xp: Namespace, normalized: Array, weight: Array, *, offset: bool) -> Parts:
    """Least squares, row by row: ``gain * normalized + offset`` nearest to ``weight``.

    Both are ``(units, fan_in)``. Exact (to rounding) where the normalization scales each row, and with
    ``offset`` also where it shifts each row. A row that the normalization makes constant gets gain 1, so that
    it can still learn.
    """
    source = widen(xp, normalized)
    target = widen(xp, weight)
    values, scale, _ = scale_rows(xp, target)
    source_mean = target_mean = None
    if offset:
        source_mean = xp.mean(source, axis=-1, keepdims=True)
        target_mean = xp.mean(values, axis=-1, keepdims=True)
        source, values = source - source_mean, values - target_mean
    square = xp.sum(source * source, axis=-1, keepdims=True)
    one = xp.ones_like(square)
    empty = square <= 0
    ratio = xp.sum(source * values, axis=-1, keepdims=True) / xp.where(empty, one, square)
    gain = xp.where(empty, one, ratio * scale)
    if source_mean is None or target_mean is None:
        return Parts(target, gain, None)
    return Parts(target, gain, target_mean * scale - gain * source_mean)
