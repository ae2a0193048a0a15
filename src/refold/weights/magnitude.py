"""Magnitude preservation: unit variance in, unit variance out, whatever the size of the stored weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from refold.weights.namespace import Array, Namespace, widen
from refold.weights.scaling import Divisor, Parts, attached_gain, composed, divisor, scale_rows


@final
@dataclass(frozen=True, slots=True)
class MagnitudePreserving:
    """``w = g / sqrt(fan_in) * v / (rms(v) + epsilon)``, with ``rms(v) = |v| / sqrt(fan_in)`` of each row.

    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), arXiv
    2312.02696, and the code published with it; epsilon 1e-4, added to the root, is theirs. The paper has no
    gain per unit; attaching needs one to keep the weight. A row of zeros gives 0 whatever its gain, and passes no
    gradient.

    The paper also *forces* the stored rows to length ``sqrt(fan_in)`` before every training step:
    :meth:`force` gives them. It is a value to store after a step, never a side effect of ``compose``.
    """

    epsilon: float = 1e-4

    @property
    def centered(self) -> bool:
        """False: the row's mean stays."""
        return False

    def decompose(self, xp: Namespace, weight: Array) -> Parts:
        """``(direction, gain, None)``: the weight itself, and ``sqrt(fan_in) * (rms(v) + epsilon)``."""
        rows = widen(xp, weight)
        parts, scale = self._divisor(xp, rows)
        return Parts(rows, attached_gain(xp, parts, scale), None)

    def compose(
        self, xp: Namespace, direction: Array, gain: Array | None = None, offset: Array | None = None
    ) -> Array:
        """The formula above, plus ``offset``; ``gain`` and ``offset`` are ``(units, 1)``."""
        parts, _ = self._divisor(xp, widen(xp, direction))
        return composed(xp, parts, gain, offset)

    def force(self, xp: Namespace, direction: Array) -> Array:
        """``v / (rms(v) + epsilon)``: the rows to store in the place of ``direction`` after a training step."""
        return self.compose(xp, direction) * math.sqrt(direction.shape[-1])

    def _divisor(self, xp: Namespace, rows: Array) -> tuple[Divisor, Array]:
        values, scale = scale_rows(xp, rows)
        epsilon = self.epsilon * math.sqrt(rows.shape[-1])
        return divisor(xp, values, scale, epsilon=epsilon, average=False), scale
