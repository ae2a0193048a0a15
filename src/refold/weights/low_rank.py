"""Low-rank adaptation: a fixed weight plus a product of two thin ones, with or without a magnitude per unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, final

from refold.weights.namespace import Array, MatrixNamespace, widen
from refold.weights.unit import Unit


class LowRankParts(NamedTuple):
    """A weight that ``compose`` adapts: all but ``base`` and ``gain`` are the two factors of the change.

    ``base`` is ``(units, fan_in)``, ``up`` ``(units, rank)``, ``down`` ``(rank, fan_in)``; ``gain`` is
    ``(units, 1)``, or None without a magnitude per unit.
    """

    base: Array
    up: Array
    down: Array
    gain: Array | None


@final
@dataclass(frozen=True, slots=True)
class LowRank:
    """``w = w0 + scale * up @ down`` (LoRA), or ``g`` times the rows of that over their norms (DoRA).

    Sources: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1
    (``scale`` is its alpha / r, ``up`` its B, ``down`` its A); Liu et al., "DoRA: Weight-Decomposed Low-Rank
    Adaptation", arXiv 2402.09353, equation 5, with one magnitude per output unit. As in section 4.3 there, the
    norm is a constant for the gradient. There is no epsilon; with a magnitude, rows of zeros give 0 and pass no
    gradient. The fold is the value of ``compose``.
    """

    scale: float = 1.0
    magnitude: bool = False

    @classmethod
    def of_rank(cls, rank: int, alpha: float | None = None, magnitude: bool = False) -> LowRank:
        """With the papers' ``alpha``, by default ``rank``: ``scale`` is ``alpha / rank``.

        Raises:
            ValueError: the rank is below 1.
        """
        if rank < 1:
            raise ValueError(f"the rank must be at least 1, not {rank}")
        return cls((rank if alpha is None else alpha) / rank, magnitude)

    def attach(self, xp: MatrixNamespace, weight: Array, down: Array) -> LowRankParts:
        """The parts of ``weight`` and of a start ``(rank, fan_in)`` for ``down``: ``up`` is 0, so nothing changes.

        Raises:
            ValueError: ``down`` is not ``(rank, fan_in)``.
        """
        if len(down.shape) != 2 or down.shape[1] != weight.shape[1]:
            raise ValueError(
                f"a factor of shape {tuple(down.shape)} does not fit weights of {weight.shape[1]} inputs: "
                "it must be (rank, inputs)"
            )
        base, factor = widen(xp, weight), widen(xp, down)
        up = xp.zeros_like(xp.matmul(base, xp.transpose(factor, (1, 0))))
        return LowRankParts(base, up, factor, Unit().decompose(xp, base).gain if self.magnitude else None)

    def compose(self, xp: MatrixNamespace, base: Array, up: Array, down: Array, gain: Array | None = None) -> Array:
        """The weight ``(units, fan_in)``, in float32 or float64.

        Raises:
            ValueError: a gain is given without ``magnitude``, or none with it.
        """
        if (gain is None) == self.magnitude:
            raise ValueError("DoRA needs a gain per unit, and LoRA has none")
        change = self.scale * xp.matmul(widen(xp, up), widen(xp, down))
        adapted = xp.stop_gradient(widen(xp, base)) + change
        if gain is None:
            return adapted
        return adapted * self._constant_ratio(xp, adapted, gain)

    @staticmethod
    def _constant_ratio(xp: MatrixNamespace, adapted: Array, gain: Array) -> Any:
        """``gain / |adapted|``, the norm a constant; 0 for rows that are zero."""
        norm = xp.stop_gradient(Unit().decompose(xp, adapted).gain)
        empty = norm <= 0
        one = xp.ones_like(norm)
        return xp.where(empty, xp.zeros_like(norm), gain / xp.where(empty, one, norm))
