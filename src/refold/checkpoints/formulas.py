"""What the stored parts of a weight mean, by the library that trained it: the value, and the gain that gives it.

On matrices ``(units, fan_in)`` in float64; gains and offsets are ``(units, 1)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt

from refold.weights import NUMPY, Normalization, Unit

Matrix = npt.NDArray[np.float64]

_UNIT = Unit()
# Norms outside of these are computed with scaled rows.
_SMALL, _LARGE = 1e-140, 1e140


@final
@dataclass(frozen=True, slots=True)
class Formula:
    """``g * v / max(|v|, floor)``, or what ``method`` of :mod:`refold.weights` says.

    ``floor`` is what some libraries divide by where a row is shorter; only :class:`~refold.weights.Unit` without an
    epsilon has one. Norms neither overflow nor underflow, whatever the library's own did.
    """

    method: Normalization = _UNIT
    floor: float = 0.0

    @property
    def is_a_norm(self) -> bool:
        """Whether this is weight normalization with nothing added to the norm."""
        return self.method == _UNIT

    def weight(self, direction: Matrix, gain: Matrix | None, offset: Matrix | None) -> Matrix:
        """The rows of the weight."""
        if not self.is_a_norm or gain is None or offset is not None:
            return _matrix(self.method.compose(NUMPY, direction, gain, offset))
        size = norms(direction)
        divisor = np.maximum(size, self.floor)
        factor = gain / np.where(divisor > 0, divisor, 1.0)
        if np.isfinite(factor).all():
            return direction * factor
        return _matrix(self.method.compose(NUMPY, direction, gain))

    def parts(self, weight: Matrix) -> tuple[Matrix, Matrix | None]:
        """The gain and the offset with which the rows of ``weight`` as the direction give ``weight``."""
        parts = self.method.decompose(NUMPY, weight)
        gain = _matrix(parts.gain)
        if self.floor:
            gain = np.where((gain > 0) & (gain < self.floor), self.floor, gain)
        return gain, None if parts.offset is None else _matrix(parts.offset)

    def gain_from(self, other: Formula, direction: Matrix, gain: Matrix) -> Matrix:
        """The gain that means here what ``gain`` means by another formula; both are norms. A gain that means the
        same is that gain, to the last bit."""
        size = norms(direction)
        short = size < max(self.floor, other.floor)
        own, theirs = np.maximum(size, self.floor), np.maximum(size, other.floor)
        safe = np.where(theirs > 0, theirs, 1.0)
        return np.where(short & (theirs > 0), gain * (own / safe), gain)


def norms(rows: Matrix) -> Matrix:
    """The Euclidean norm of each row."""
    size = _matrix(np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None])
    # Squares of what was float32 or narrower are far inside of float64.
    if size.size and (size.max() > _LARGE or size.min() < _SMALL):
        return _matrix(_UNIT.decompose(NUMPY, rows).gain)
    return size


def _matrix(array: Any) -> Matrix:
    return np.asarray(array, dtype=np.float64)
