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
from refold.weights.centering import center_rows
from refold.weights.namespace import Array, Namespace, widen
from refold.weights.scaling import Divisor, Parts, attached_gain, composed, divisor


@final
@dataclass(frozen=True, slots=True)
class OfficialStandardization:
    """``w = g * (v - mean(v)) / (s + epsilon) + offset``, with the unbiased standard deviation ``s`` of each row.

    Source: the code that its authors published with Qiao et al., "Weight Standardization", arXiv 1903.10520. A
    row of length 1 has no unbiased deviation; like every constant row it gives its offset, and passes no gradient.
    """

    epsilon: float = 1e-5

    @property
    def centered(self) -> bool:
        """True: without an offset the row's mean is lost."""
        return True

    def decompose(self, xp: Namespace, weight: Array) -> Parts:
        """``(direction, gain, offset)``: the weight itself, ``s + epsilon``, and ``mean(v)``."""
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
        bessel = math.sqrt(1 - 1 / max(2, rows.shape[-1]))
        parts = divisor(xp, values, scale, epsilon=self.epsilon * bessel, average=True)
        return Divisor(parts.values, parts.size / bessel), scale, mean


@final
@dataclass(frozen=True, slots=True)
class TimmStandardization:
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

    def decompose(self, xp: Namespace, weight: Array) -> Parts:
        """``(direction, gain, offset)``: the weight itself, the divisor, and ``mean(v)``."""
        rows = widen(xp, weight)
        parts, size_scale, mean = self._divisor(xp, rows)
        return Parts(rows, attached_gain(xp, parts, size_scale), mean)

    def compose(
        self, xp: Namespace, direction: Array, gain: Array | None = None, offset: Array | None = None
    ) -> Array:
        """The formula above; ``gain`` and ``offset`` are ``(units, 1)``."""
        parts, _, _ = self._divisor(xp, widen(xp, direction))
        return composed(xp, parts, gain, offset)

    def _divisor(self, xp: Namespace, rows: Array) -> tuple[Divisor, Array, Array]:
        values, scale, mean = center_rows(xp, rows)
        root = math.sqrt(self.epsilon)
        # In units of the row a root much above it would overflow once squared, so units are at least the root's.
        floor = 2.0 ** math.ceil(math.log2(root)) if root else 0.0
        units = xp.where(scale < floor, floor * xp.ones_like(scale), scale)
        values = values * (scale / units)
        square = xp.mean(values * values, axis=-1, keepdims=True) + (root / units) ** 2
        constant = xp.max(xp.abs(values), axis=-1, keepdims=True) <= 0
        size = xp.sqrt(xp.where(constant, xp.ones_like(square), square))
        if self.scaled:
            size = size * (math.sqrt(rows.shape[-1]) / activation_gain(self.activation))
        return Divisor(values, size), units, mean * scale


@final
@dataclass(frozen=True, slots=True)
class DeepMindScaledStandardization:
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

    def decompose(self, xp: Namespace, weight: Array) -> Parts:
        """``(direction, gain, offset)``: the weight itself, the divisor, and ``mean(v)``."""
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
        parts = divisor(xp, values, scale, epsilon=0.0, average=False)
        smallest = math.sqrt(self.epsilon) / scale
        return Divisor(parts.values, xp.where(parts.size < smallest, smallest, parts.size)), scale, mean
