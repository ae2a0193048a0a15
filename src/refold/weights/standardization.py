"""Weight standardization: each row minus its mean, over its standard deviation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from refold.weights.centering import center_rows
from refold.weights.namespace import Array, Namespace, widen
from refold.weights.scaling import Divisor, Parts, attached_gain, composed, divisor


@final
@dataclass(frozen=True, slots=True)
class Standardization:
    """``w = g * (v - mean(v)) / (std(v) + epsilon) + offset``, for each row: LayerNorm of the weights.

    Source: Qiao et al., "Weight Standardization", arXiv 1903.10520, section 3, equations 2 to 4, and Ba et al.,
    "Layer Normalization", arXiv 1607.06450, on the weights of a unit in the place of its inputs. The standard
    deviation is the biased one (mean of squares); ``epsilon`` is added to it, outside the root. With epsilon 0
    it is sqrt(fan_in) times weight normalization of the centered rows.

    A row whose deviation is below the rounding of its largest weight is constant (a row of length 1 always
    is): it has no direction, gives its offset whatever its gain, and passes no gradient.
    """

    epsilon: float = 1e-10

    @property
    def centered(self) -> bool:
        """True: without an offset the row's mean is lost."""
        return True

    def decompose(self, xp: Namespace, weight: Array) -> Parts:
        """``(direction, gain, offset)``: the weight itself, ``std(v) + epsilon``, and ``mean(v)``."""
        rows = widen(xp, weight)
        parts, scale, mean = self._divisor(xp, rows)
        return Parts(rows, attached_gain(xp, parts, scale), mean * scale)

    def compose(
        self, xp: Namespace, direction: Array, gain: Array | None = None, offset: Array | None = None
    ) -> Array:
        """``g * (v - mean(v)) / (std(v) + epsilon) + offset``; ``gain`` and ``offset`` are ``(units, 1)``."""
        parts, _, _ = self._divisor(xp, widen(xp, direction))
        return composed(xp, parts, gain, offset)

    def _divisor(self, xp: Namespace, rows: Array) -> tuple[Divisor, Array, Array]:
        values, scale, mean = center_rows(xp, rows)
        return divisor(xp, values, scale, epsilon=self.epsilon, average=True), scale, mean
