"""The contract of a weight normalization."""

from __future__ import annotations

from typing import Protocol

from refold.weights.namespace import Array, Namespace
from refold.weights.scaling import Parts


class Normalization(Protocol):
    """A way of writing the rows of a weight as a direction, a gain and perhaps an offset.

    Both functions take a matrix ``(units, fan_in)`` of floating-point numbers on any namespace of array
    functions, compute in float32 or float64 and return that: who stores a half type rounds once, at the end.
    """

    @property
    def epsilon(self) -> float:
        """What is added to the size of a row before dividing by it."""

    @property
    def centered(self) -> bool:
        """Whether the row's mean is taken out: then only an offset can give it back."""

    def decompose(self, xp: Namespace, weight: Array) -> Parts:
        """The direction (the weight itself), and the gain and offset with which ``compose`` gives it back."""

    def compose(
        self, xp: Namespace, direction: Array, gain: Array | None = None, offset: Array | None = None
    ) -> Array:
        """The weight: the normalized direction, times the gain (1 if None), plus the offset (0 if None)."""
