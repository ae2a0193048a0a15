"""Low-rank adaptation (LoRA) and its weight-decomposed form (DoRA) for Paddle's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import paddle

from refold.paddle.attach import ComputedWeight, Start, attach
from refold.paddle.namespace import PADDLE
from refold.weights import LowRank, Rows, Unit


@final
class AdaptedWeight(ComputedWeight):
    """The stored weight, a constant, plus the product of two thin matrices.

    ``weight_up`` ``(units, rank)``, ``weight_down`` ``(rank, fan_in)`` and ``weight_gain`` ``(units, 1)`` are
    parameters, in float32 or wider.
    """

    def __init__(self, name: str, rows: Rows, method: LowRank, rank: int) -> None:
        super().__init__(name, rows)
        self.method = method
        self.rank = rank

    def starts(self, matrix: Any) -> Mapping[str, Start]:
        """No change."""
        bound = self.rows.fan_in**-0.5
        down = paddle.uniform([self.rank, self.rows.fan_in], matrix.dtype, -bound, bound)
        starts = {"up": Start(paddle.zeros([self.rows.units, self.rank], matrix.dtype)), "down": Start(down)}
        if self.method.magnitude:
            starts["gain"] = Start(Unit().decompose(PADDLE, matrix).gain)
        return starts

    def compose(self, layer: Any, matrix: Any) -> Any:
        """The sum, its rows perhaps scaled to the magnitudes."""
        parts = (self.part(layer, end) for end in ("up", "down", "gain"))
        return self.method.compose(PADDLE, matrix, *parts)


def low_rank_adaptation(
    layer: Any,
    rank: int,
    name: str = "weight",
    *,
    alpha: float | None = None,
    magnitude: bool = False,
    axis: int | Sequence[int] | None = None,
) -> Any:
    """Adapt the weight ``name`` of ``layer`` by a product of two thin matrices; returns the layer.

    ``w0 + alpha / rank * up @ down``, or (``magnitude=True``) ``gain`` times the rows of that over their norms. The
    weight is a matrix with one row per output unit (as in :func:`weight_normalization`). ``weight_up``, which
    starts at zero, ``weight_down`` and ``weight_gain`` are parameters and train; all parameters that the layer
    itself has are frozen.

    Sources: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353, whose norm is a constant for the gradient. Attaching
    changes nothing that the layer computes. :func:`refold.fold` ships the sum.

    Args:
        layer: a layer of Paddle, in place.
        rank: how many columns and rows the thin matrices have.
        name: of the parameter.
        alpha: the size of the change, over the rank; by default the rank, so that the factor is 1.
        magnitude: whether each output unit has a magnitude of its own (DoRA).
        axis: as for :func:`weight_normalization`.

    Raises:
        ValueError: as for :func:`weight_normalization`; or the rank is not at least 1.
    """
    method = LowRank.of_rank(rank, alpha, magnitude)
    hook = attach(layer, name, axis, lambda name, rows: AdaptedWeight(name, rows, method, rank))
    parts = {f"{name}_{end}" for end in ("up", "down", "gain")}
    for own, parameter in layer._parameters.items():
        if parameter is not None:
            parameter.stop_gradient = own not in parts
    hook.renew(layer)
    return layer
