"""Weight standardization: each row minus its mean, over its standard deviation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from refold.weights.method import Normalization, Size
from refold.weights.namespace import Array, Namespace


@final
@dataclass(frozen=True, slots=True)
class Standardization(Normalization):
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

    def size(self, xp: Namespace, norm: Array, fan_in: int, scale: Array | float = 1.0) -> Size:
        """``|c| / sqrt(fan_in) + epsilon``, with the norm of the centered row."""
        slope = 1 / math.sqrt(fan_in)
        return Size(norm * slope + self.epsilon / scale, slope)
