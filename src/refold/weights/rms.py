"""Root mean square normalization of the rows of a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from refold.weights.method import Normalization, Size
from refold.weights.namespace import Array, Namespace


@final
@dataclass(frozen=True, slots=True)
class RootMeanSquare(Normalization):
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

    def size(self, xp: Namespace, norm: Array, fan_in: int, scale: Array | float = 1.0) -> Size:
        """``|v| / sqrt(fan_in) + epsilon``."""
        slope = 1 / math.sqrt(fan_in)
        return Size(norm * slope + self.epsilon / scale, slope)
