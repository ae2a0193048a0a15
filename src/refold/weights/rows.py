"""A weight as a matrix with one row per output unit: where each axis goes, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from refold.weights.namespace import Array, Namespace


@final
@dataclass(frozen=True, slots=True)
class Rows:
    """A stored weight of ``shape`` seen as a matrix ``(units, fan_in)``.

    ``unit_axes`` number the output units, the first one slowest; all other axes, in stored order, are what
    a unit sums over. Without any, all of the weight is one row. Negative axes count from the end and are stored as
    positive ones.

    Raises:
        ValueError: an axis does not exist, or is named twice.
    """

    shape: tuple[int, ...]
    unit_axes: tuple[int, ...]

    def __post_init__(self) -> None:
        rank = len(self.shape)
        if any(not -rank <= axis < rank for axis in self.unit_axes):
            raise ValueError(f"a weight of shape {self.shape} has no axes {self.unit_axes}")
        axes = tuple(axis % rank for axis in self.unit_axes)
        if len(set(axes)) != len(axes):
            raise ValueError(f"axes {self.unit_axes} name one axis of a weight of shape {self.shape} twice")
        object.__setattr__(self, "unit_axes", axes)

    @property
    def summed_axes(self) -> tuple[int, ...]:
        """The axes that are not the output units'."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.unit_axes)

    @property
    def units(self) -> int:
        """The number of output units, which is the number of rows."""
        return math.prod([self.shape[axis] for axis in self.unit_axes])

    @property
    def fan_in(self) -> int:
        """How many weights an output unit has, which is the length of a row."""
        return math.prod([self.shape[axis] for axis in self.summed_axes])

    def to_matrix(self, xp: Namespace, weight: Array) -> Array:
        """A weight of ``shape`` as a matrix ``(units, fan_in)``."""
        if self._stored_in_order:
            return xp.reshape(weight, (self.units, -1))
        return xp.reshape(xp.transpose(weight, self._order), (self.units, self.fan_in))

    def from_matrix(self, xp: Namespace, matrix: Array) -> Array:
        """The inverse of :meth:`to_matrix`."""
        if self._stored_in_order:
            return xp.reshape(matrix, self.shape)
        order = self._order
        back = tuple(order.index(axis) for axis in range(len(order)))
        return xp.transpose(xp.reshape(matrix, tuple(self.shape[axis] for axis in order)), back)

    @property
    def axis(self) -> int:
        """The axis that a row runs along in :meth:`to_lines`: 0 if the units' axes are stored last, else -1."""
        rank = len(self.shape)
        last = tuple(range(rank - len(self.unit_axes), rank))
        return 0 if self.unit_axes == last and not self._stored_in_order else -1

    def to_lines(self, xp: Namespace, weight: Array) -> Array:
        """A weight of ``shape`` as a matrix with a row along :attr:`axis`, so that little has to be moved."""
        return self.to_matrix(xp, weight) if self.axis else xp.reshape(weight, (-1, self.units))

    def from_lines(self, xp: Namespace, lines: Array) -> Array:
        """The inverse of :meth:`to_lines`."""
        return self.from_matrix(xp, lines) if self.axis else xp.reshape(lines, self.shape)

    def as_column(self, xp: Namespace, part: Array) -> Array:
        """One number per unit as what goes with :meth:`to_lines`: ``(units, 1)``, or ``(1, units)``."""
        return xp.reshape(part, (self.units, 1) if self.axis else (1, self.units))

    @property
    def _stored_in_order(self) -> bool:
        """Whether the units' axes come first, so that nothing has to be moved."""
        return self.unit_axes == tuple(range(len(self.unit_axes)))

    @property
    def _order(self) -> tuple[int, ...]:
        return self.unit_axes + self.summed_axes
