"""Low-rank adaptation (LoRA) and its weight-decomposed form (DoRA) for torch modules, as a parametrization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from refold.torch.attach import ParametrizedRows, attach
from refold.torch.namespace import TORCH
from refold.torch.rows import as_matrix, as_weight
from refold.weights import LowRank, Rows, Unit, working_dtype
from refold.weights.namespace import dtype_name

Tensor = torch.Tensor


class AdaptedWeight(ParametrizedRows):
    """A parametrization: the stored weight, a constant, plus the product of two thin matrices.

    ``up`` ``(units, rank)``, ``down`` ``(rank, fan_in)`` and ``gain`` ``(units,)`` are parameters, in float32
    or wider.
    """

    def __init__(self, rows: Rows, like: Tensor, method: LowRank, rank: int) -> None:
        super().__init__(rows)
        self.method = method
        settings: Any = {"dtype": getattr(torch, working_dtype(dtype_name(like))), "device": like.device}
        self.up = nn.Parameter(torch.zeros(rows.units, rank, **settings))
        self.down = nn.Parameter(torch.empty(rank, rows.fan_in, **settings))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.gain = nn.Parameter(torch.ones(rows.units, **settings)) if method.magnitude else None

    def weight(self, *originals: Tensor) -> Tensor:
        """The sum, its rows perhaps scaled to the magnitudes."""
        base = as_matrix(self.rows, originals[0])
        gain = None if self.gain is None else self.gain.reshape(-1, 1)
        return as_weight(self.rows, self.method.compose(TORCH, base, self.up, self.down, gain), originals[0])

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight itself, with no change of it."""
        self.up.zero_()
        if self.gain is not None:
            self.gain.copy_(Unit().decompose(TORCH, as_matrix(self.rows, weight)).gain.reshape(-1))
        return weight

    def extra_repr(self) -> str:
        """Shown with the module."""
        return f"{self.rows}, {self.method}, rank={self.up.shape[1]}"


def low_rank_adaptation(
    module: nn.Module,
    rank: int,
    name: str = "weight",
    *,
    alpha: float | None = None,
    magnitude: bool = False,
    axis: int | Sequence[int] | None = None,
) -> Any:
    """Adapt the weight ``name`` of ``module`` by a product of two thin matrices; returns the module.

    ``w0 + alpha / rank * up @ down``, or (``magnitude=True``) ``gain`` times the rows of that over their norms. The
    weight is a matrix with one row per output unit (as in :func:`weight_normalization`). ``up``, which starts at
    zero, ``down`` and ``gain`` are parameters of the parametrization (``parametrizations.weight.0.up``) and train;
    all parameters that the module itself has are frozen.

    Sources: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353, whose norm is a constant for the gradient. Attaching
    changes nothing that the module computes. :func:`refold.fold` ships the sum.

    Args:
        module: a module of torch, in place.
        rank: how many columns and rows the thin matrices have.
        name: of the parameter.
        alpha: the size of the change, over the rank; by default the rank, so that the factor is 1.
        magnitude: whether each output unit has a magnitude of its own (DoRA).
        axis: as for :func:`weight_normalization`.

    Raises:
        ValueError: as for :func:`weight_normalization`; or the rank is not at least 1.
    """
    method = LowRank.of_rank(rank, alpha, magnitude)
    attach(module, name, axis, lambda rows, weight: AdaptedWeight(rows, weight, method, rank))
    own: Any = module.parametrizations
    for parameter in (*module.parameters(recurse=False), *own[name].parameters(recurse=False)):
        parameter.requires_grad_(False)
    return module
