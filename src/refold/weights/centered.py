"""Centered weight normalization, and scaled weight standardization, which is the same with a constant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from refold.weights.activations import activation_gain
from refold.weights.method import Normalization, Size
from refold.weights.namespace import Array, Namespace


@final
@dataclass(frozen=True, slots=True)
class Centered(Normalization):
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

    def size(self, xp: Namespace, norm: Array, fan_in: int, scale: Array | float = 1.0) -> Size:
        """``(|c| + epsilon) / a``, with the norm of the centered row."""
        slope = 1 / activation_gain(self.activation)
        return Size((norm + self.epsilon / scale) * slope, slope)
