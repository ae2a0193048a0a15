"""Root mean square normalization of the rows of a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from refold.weights.namespace import Array, Namespace, widen
from refold.weights.scaling import Divisor, Parts, attached_gain, composed, divisor, scale_rows


@final
@dataclass(frozen=True, slots=True)
class RootMeanSquare:
    """``w = g * v / (rms(v) + epsilon)``, with ``rms(v) = |v| / sqrt(fan_in)`` of each row.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467, section 3, equation 4,
    on the weights of a unit in the place of its inputs. With epsilon 0 it is sqrt(fan_in) times
    :class:`~refold.weights.unit.Unit`. The paper has no epsilon, and 0 is the default; it is added to the root
    (the layers of the frameworks add theirs under it). A row of zeros gives 0 whatever its gain, and passes no
    gradient.
    """

    epsilon: float = 0.0

    @property
    def centered(self) -> bool:
        """False: the row's mean stays."""
        return False

    def decompose(self, xp: Namespace, weight: Array) -> Parts:
        """``(direction, gain, None)``: the weight itself, and ``g = rms(v) + epsilon``."""
        rows = widen(xp, weight)
        parts, scale = self._divisor(xp, rows)
        return Parts(rows, attached_gain(xp, parts, scale), None)

    def compose(
        self, xp: Namespace, direction: Array, gain: Array | None = None, offset: Array | None = None
    ) -> Array:
        """``g * v / (rms(v) + epsilon) + offset``; ``gain`` and ``offset`` are ``(units, 1)``."""
        parts, _ = self._divisor(xp, widen(xp, direction))
        return composed(xp, parts, gain, offset)

    def _divisor(self, xp: Namespace, rows: Array) -> tuple[Divisor, Array]:
        values, scale = scale_rows(xp, rows)
        return divisor(xp, values, scale, epsilon=self.epsilon, average=True), scale
