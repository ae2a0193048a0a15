"""A linear layer with normalized rows that never makes the weight: it normalizes what comes out."""

from __future__ import annotations

from refold.weights.method import Normalization
from refold.weights.namespace import Array, MatrixNamespace


def outputs(
    xp: MatrixNamespace,
    method: Normalization,
    x: Array,
    direction: Array,
    gain: Array | None = None,
    offset: Array | None = None,
    *,
    axis: int = -1,
) -> Array:
    """``x @ w.T`` ``(..., units)``, with ``w`` the rows that the method composes, for ``x`` ``(..., fan_in)``.

    With ``c`` the rows (without their mean, if the method takes it out) and ``f = g / size(|c|)`` per row, that is
    ``(x c^T) f``, plus the offset times the sum of ``x``; and ``x c^T`` is ``(x - mean(x)) v^T``. So nothing of the
    size of the weight is written, and for few ``x`` that is faster. It is as exact as the composed weight while the
    mean of a row is not far above its deviation, and ``x v^T`` not beyond the largest number.

    ``gain`` and ``offset`` have one number per row; ``axis`` is as for ``method.compose``.
    """
    measured = method.measure(xp, direction, axis)
    # A gain times the inverse scale is about 1 where the row is as large as its gain.
    inverse = xp.reshape(measured.inverse, (-1,))
    factor = (inverse if gain is None else inverse * xp.reshape(gain, (-1,))) / xp.reshape(
        measured.size.value, (-1,)
    )
    given = x - xp.mean(x, axis=-1, keepdims=True) if method.centered else x
    out = xp.matmul(given, xp.transpose(direction, (1, 0)) if axis else direction) * factor
    return out if offset is None else out + xp.sum(x, axis=-1, keepdims=True) * xp.reshape(offset, (-1,))


def pays(x_size: int, weight_size: int) -> bool:
    """Whether :func:`outputs` is the faster way, by the numbers of entries of ``x`` and of the weight."""
    return 0 < 2 * x_size <= weight_size
