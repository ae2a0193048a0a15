"""Weight normalization: the length of a row apart from its direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from refold.weights.namespace import Array, Namespace, widen
from refold.weights.scaling import Divisor, Parts, attached_gain, composed, divisor, scale_rows


@final
@dataclass(frozen=True, slots=True)
class Unit:
    """``w = g * v / (|v| + epsilon)``, with the Euclidean norm of each row.

    Source: Salimans and Kingma, "Weight Normalization", arXiv 1602.07868, section 2, equation 2. The paper has
    no epsilon, and 0 is the default; it is added to the norm. A row of zeros has no direction: it gives 0
    whatever its gain, and passes no gradient.
    """

    epsilon: float = 0.0

    @property
    def centered(self) -> bool:
        """False: the row's mean stays."""
        return False

    def decompose(self, xp: Namespace, weight: Array) -> Parts:
        """``(direction, gain, None)``: the weight itself, and ``g = |v| + epsilon``."""
        rows = widen(xp, weight)
        parts, scale = self._divisor(xp, rows)
        return Parts(rows, attached_gain(xp, parts, scale), None)

    def compose(
        self, xp: Namespace, direction: Array, gain: Array | None = None, offset: Array | None = None
    ) -> Array:
        """``g * v / (|v| + epsilon) + offset``; ``gain`` and ``offset`` are ``(units, 1)``."""
        parts, _ = self._divisor(xp, widen(xp, direction))
        return composed(xp, parts, gain, offset)

    def _divisor(self, xp: Namespace, rows: Array) -> tuple[Divisor, Array]:
        values, scale = scale_rows(xp, rows)
        return divisor(xp, values, scale, epsilon=self.epsilon, average=False), scale
