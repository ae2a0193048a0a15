"""Centered weight normalization, and scaled weight standardization, which is the same with a constant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from refold.weights.activations import activation_gain
from refold.weights.centering import center_rows
from refold.weights.namespace import Array, Namespace, widen
from refold.weights.scaling import Divisor, Parts, attached_gain, composed, divisor


@final
@dataclass(frozen=True, slots=True)
class Centered:
    """``w = g * a * (v - mean(v)) / (|v - mean(v)| + epsilon) + offset``, with the Euclidean norm of each row.

    Sources: Huang et al., "Centered Weight Normalization in Accelerating Training of Deep Neural Networks", ICCV
    2017; Brock et al., arXiv 2101.08692, and "High-Performance Large-Scale Image
    Recognition Without Normalization" (NF-Nets), arXiv 2102.06171, equation 1. Both are one formula, since
    ``sqrt(fan_in) * std(v)`` is ``|v - mean(v)|``. ``a`` is the gain of the ``activation`` in front of the layer
    (:data:`~refold.weights.activations.ACTIVATION_GAINS`), 1 by default.

    Neither paper has an epsilon, and 0 is the default; it is added to the norm. Attaching keeps the weight:
    ``g`` takes ``a`` back and the offset the mean. A constant row (a row of length 1 always is) has no
    direction: it gives its offset whatever its gain, and passes no gradient.

    Raises:
        ValueError: the gain of the activation is not known.
    """

    epsilon: float = 0.0
    activation: str = "linear"

    def __post_init__(self) -> None:
        activation_gain(self.activation)

    @property
    def centered(self) -> bool:
        """True: without an offset the row's mean is lost."""
        return True

    def decompose(self, xp: Namespace, weight: Array) -> Parts:
        """``(direction, gain, offset)``: the weight itself, ``(|v - mean(v)| + epsilon) / a``, ``mean(v)``."""
        rows = widen(xp, weight)
        parts, scale, mean = self._divisor(xp, rows)
        return Parts(rows, attached_gain(xp, parts, scale), mean * scale)

    def compose(
        self, xp: Namespace, direction: Array, gain: Array | None = None, offset: Array | None = None
    ) -> Array:
        """The formula above; ``gain`` and ``offset`` are ``(units, 1)``."""
        parts, _, _ = self._divisor(xp, widen(xp, direction))
        return composed(xp, parts, gain, offset)

    def _divisor(self, xp: Namespace, rows: Array) -> tuple[Divisor, Array, Array]:
        values, scale, mean = center_rows(xp, rows)
        parts = divisor(xp, values, scale, epsilon=self.epsilon, average=False)
        return Divisor(parts.values, parts.size / activation_gain(self.activation)), scale, mean
