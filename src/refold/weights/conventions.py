"""Weight standardization as published implementations compute it: same idea, other functions for small rows.

They differ in the divisor, below; all else is shared. With ``var(v)`` the biased variance of a row:

- ``OFFICIAL``: ``sqrt(var(v) * n / (n - 1)) + epsilon``, epsilon 1e-5 (the repository of arXiv 1903.10520);
- ``TIMM``: ``sqrt(var(v) + epsilon)``, epsilon 1e-6 (``StdConv2d``, and with ``sqrt(n) / a`` in front
  ``ScaledStdConv2d``);
- ``DEEPMIND``: ``sqrt(max(n * var(v), epsilon))``, epsilon 1e-4 (the NF-Nets of arXiv 2102.06171, where the gain
  of the activation sits in the activation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from refold.weights.activations import activation_gain
from refold.weights.method import Normalization, Size
from refold.weights.namespace import Array, Namespace


@final
@dataclass(frozen=True, slots=True)
class OfficialStandardization(Normalization):
    """``w = g * (v - mean(v)) / (s + epsilon) + offset``, with the unbiased standard deviation ``s`` of each row.

    Source: the code that its authors published with Qiao et al., "Weight Standardization", arXiv 1903.10520. A
    row of length 1 has no unbiased deviation; like every constant row it gives its offset, and passes no gradient.
    """

    epsilon: float = 1e-5

    @property
    def centered(self) -> bool:
        """True: without an offset the row's mean is lost."""
        return True

    def size(self, xp: Namespace, norm: Array, fan_in: int, scale: Array | float = 1.0) -> Size:
        """``|c| / sqrt(fan_in - 1) + epsilon``, with the norm of the centered row."""
        slope = 1 / math.sqrt(max(1, fan_in - 1))
        return Size(norm * slope + self.epsilon / scale, slope)


@final
@dataclass(frozen=True, slots=True)
class TimmStandardization(Normalization):
    """``w = g * (v - mean(v)) / sqrt(var(v) + epsilon) + offset``; if ``scaled``, times ``a / sqrt(fan_in)``.

    Source: ``StdConv2d`` and ``ScaledStdConv2d`` of the library timm. ``a`` is the gain of the ``activation`` in
    front of the layer, for ``scaled`` only. A constant row gives its offset, and passes no gradient.

    Raises:
        ValueError: the gain of the activation is not known, or it is given and ``scaled`` is not.
    """

    epsilon: float = 1e-6
    scaled: bool = False
    activation: str = "linear"

    def __post_init__(self) -> None:
        if activation_gain(self.activation) != 1 and not self.scaled:
            raise ValueError("only scaled weight standardization has the gain of an activation")

    @property
    def centered(self) -> bool:
        """True: without an offset the row's mean is lost."""
        return True

    def size(self, xp: Namespace, norm: Array, fan_in: int, scale: Array | float = 1.0) -> Size:
        """``sqrt(|c|^2 / fan_in + epsilon)`` of the centered row; if scaled, times ``sqrt(fan_in) / a``."""
        factor = math.sqrt(fan_in) / activation_gain(self.activation) if self.scaled else 1.0
        root = math.sqrt(self.epsilon) / scale + xp.zeros_like(norm)
        # In units of the row a root much above it would overflow once squared.
        units = xp.where(root > 1, root, xp.ones_like(root))
        deviation = norm / math.sqrt(fan_in)
        size = units * xp.sqrt((deviation / units) ** 2 + (root / units) ** 2)
        return Size(factor * size, factor / math.sqrt(fan_in) * (deviation / size))


@final
@dataclass(frozen=True, slots=True)
class DeepMindScaledStandardization(Normalization):
    """``w = g * (v - mean(v)) / sqrt(max(fan_in * var(v), epsilon)) + offset``.

    Source: the code published with Brock et al., "High-Performance Large-Scale Image Recognition Without
    Normalization", arXiv 2102.06171. It is :class:`~refold.weights.centered.Centered` wherever the norm of the
    centered row is above ``sqrt(epsilon)``. A constant row gives its offset, and passes no gradient.
    """

    epsilon: float = 1e-4

    @property
    def centered(self) -> bool:
        """True: without an offset the row's mean is lost."""
        return True

    def size(self, xp: Namespace, norm: Array, fan_in: int, scale: Array | float = 1.0) -> Size:
        """``max(|c|, sqrt(epsilon))``, with the norm of the centered row."""
        smallest = math.sqrt(self.epsilon) / scale + xp.zeros_like(norm)
        below = norm < smallest
        return Size(xp.where(below, smallest, norm), xp.where(below, xp.zeros_like(norm), xp.ones_like(norm)))
