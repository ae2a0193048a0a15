"""The contract of a weight normalization: a size that rows are divided by, and whether their mean goes first.

``w = g * c / size(|c|) + offset`` for each row, with ``c = v`` or ``c = v - mean(v)`` and the Euclidean norm. The
gradient is written out as well, because frameworks that differentiate the formula step by step read and write
the matrix several times as often.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from refold.weights.centering import center_rows
from refold.weights.namespace import Array, Namespace, widen
from refold.weights.scaling import Parts, ScaledRows, attached_gain, scale_rows


class Size(NamedTuple):
    """What rows are divided by, and its derivative by their norm: ``(units, 1)``, the slope perhaps a number."""

    value: Array
    slope: Array | float


class Measured(NamedTuple):
    """Rows with all that the method says of them.

    ``values`` are ``rows * inverse``, the mean taken out if the method does that. ``scale`` is a power of two,
    ``inverse`` its inverse, or 0 in rows that have no direction: their values are 0, and they pass no gradient.
    ``norm`` is that of the values (1 where there is no direction), ``size`` what they are divided by, both in
    units of ``scale``, as is ``mean``, which is None if it stays. All but the values are ``(units, 1)``.
    """

    values: Array
    scale: Array
    inverse: Array
    norm: Array
    size: Size
    mean: Array | None


class Pulled(NamedTuple):
    """The gradients by the direction, ``(units, fan_in)``, and by the gain, ``(units, 1)``."""

    direction: Array
    gain: Array


class Normalization(ABC):
    """A way of writing the rows of a weight as a direction, a gain and perhaps an offset.

    Its functions take a matrix ``(units, fan_in)`` of floating-point numbers on any namespace of array functions,
    compute in float32 or float64 and return that: who stores a half type rounds once, at the end. With ``axis`` 0
    the matrix is ``(fan_in, units)``, so that a weight that is stored like this need not be moved; then all that
    is said to be ``(units, 1)`` is ``(1, units)``. A method is a frozen dataclass with an ``epsilon`` that says
    where it sits.
    """

    __slots__ = ()
    epsilon: float

    @property
    @abstractmethod
    def centered(self) -> bool:
        """Whether the row's mean is taken out: then only an offset can give it back."""

    @abstractmethod
    def size(self, xp: Namespace, norm: Array, fan_in: int, scale: Array | float = 1.0) -> Size:
        """What rows of such norms, ``(units, 1)``, are divided by; norms and result count in units of ``scale``.

        Its share of the norm may only grow with the norm, so that an epsilon matters most in the smallest row.
        """

    def decompose(self, xp: Namespace, weight: Array, *, axis: int = -1) -> Parts:
        """``(direction, gain, offset)``: the weight itself, the size, and the mean if the method takes it out."""
        rows = widen(xp, weight)
        measured = self.measure(xp, rows, axis)
        gain = attached_gain(xp, measured.values, measured.size.value, measured.scale, axis)
        return Parts(rows, gain, None if measured.mean is None else measured.mean * measured.scale)

    def compose(
        self,
        xp: Namespace,
        direction: Array,
        gain: Array | None = None,
        offset: Array | None = None,
        *,
        axis: int = -1,
    ) -> Array:
        """The method's formula; ``gain`` and ``offset`` are ``(units, 1)``."""
        return composed(xp, self.measure(xp, widen(xp, direction), axis), gain, offset)

    def measure(self, xp: Namespace, rows: Array, axis: int = -1, *, ordinary: bool = False) -> Measured:
        """What the method says of the rows of a matrix in float32 or float64.

        ``ordinary``: that the squares of all norms are far from overflow and from underflow, which the caller has
        to see to, for then no row is scaled.
        """
        if self.centered:
            values, scale, inverse, mean, square = center_rows(xp, rows, axis, ordinary=ordinary)
        else:
            values, scale, inverse = ScaledRows(rows, 1.0, 1.0) if ordinary else scale_rows(xp, rows, axis)
            square = xp.sum(values * values, axis=axis, keepdims=True)
            mean = None
        empty = square <= 0
        one = xp.ones_like(square)
        if ordinary:
            inverse = xp.where(empty, xp.zeros_like(square), inverse)
        norm = xp.sqrt(xp.where(empty, one, square))
        size = self.size(xp, norm, rows.shape[axis], scale)
        return Measured(values, scale, inverse, norm, Size(xp.where(empty, one, size.value), size.slope), mean)


def composed(xp: Namespace, measured: Measured, gain: Array | None, offset: Array | None) -> Array:
    """``gain * values / size + offset``, in an order that is exact where the gain came from ``decompose``."""
    size = measured.size.value
    rows = measured.values * ((xp.ones_like(size) if gain is None else gain) / size)
    return rows if offset is None else rows + offset


def pulled(xp: Namespace, measured: Measured, gain: Array | None, cotangent: Array, axis: int = -1) -> Pulled:
    """The gradients of a number by the parts, given the one by the composed rows, ``(units, fan_in)``.

    With ``p = <cotangent, c>`` for each row: ``p / size`` by the gain, and
    ``(g / size) * (cotangent - mean(cotangent) - c * p * slope / (size * |c|))`` by the direction, the mean only if
    the method takes it out. The last is a symmetric matrix times the cotangent, so it is the tangent of the
    composed rows for a tangent of the direction too.
    """
    size, slope = measured.size
    along = xp.sum(cotangent * measured.values, axis=axis, keepdims=True)
    by_gain = along / size
    factor = (xp.ones_like(size) if gain is None else gain) / size
    inside = cotangent
    if measured.mean is not None:
        inside = cotangent - xp.mean(cotangent, axis=axis, keepdims=True)
        # What rounding left of a large mean would move the mean of the direction, which nothing brings back.
        inside = inside - xp.mean(inside, axis=axis, keepdims=True)
    radial = by_gain * (slope / measured.norm)
    direction = (inside - measured.values * radial) * (factor * measured.inverse)
    return Pulled(direction, by_gain)
