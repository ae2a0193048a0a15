"""Weight normalization: the length of a row apart from its direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from refold.weights.method import Normalization, Size
from refold.weights.namespace import Array, Namespace


@final
@dataclass(frozen=True, slots=True)
class Unit(Normalization):
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

    def size(self, xp: Namespace, norm: Array, fan_in: int, scale: Array | float = 1.0) -> Size:
        """``|v| + epsilon``."""
        return Size(norm + self.epsilon / scale, 1.0)
