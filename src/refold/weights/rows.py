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
    def _stored_in_order(self) -> bool:
        """Whether the units' axes come first, so that nothing has to be moved."""
        return self.unit_axes == tuple(range(len(self.unit_axes)))

    @property
    def _order(self) -> tuple[int, ...]:
        return self.unit_axes + self.summed_axes
