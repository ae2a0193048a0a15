"""Magnitude preservation: unit variance in, unit variance out, whatever the size of the stored weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from refold.weights.method import Normalization, Size
from refold.weights.namespace import Array, Namespace


@final
@dataclass(frozen=True, slots=True)
class MagnitudePreserving(Normalization):
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

    def size(self, xp: Namespace, norm: Array, fan_in: int, scale: Array | float = 1.0) -> Size:
        """``|v| + sqrt(fan_in) * epsilon``."""
        return Size(norm + math.sqrt(fan_in) * self.epsilon / scale, 1.0)

    def force(self, xp: Namespace, direction: Array) -> Array:
        """``v / (rms(v) + epsilon)``: the rows to store in the place of ``direction`` after a training step."""
        return self.compose(xp, direction) * math.sqrt(direction.shape[-1])
