"""Orthogonal weights for torch modules, as a parametrization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from refold.torch.attach import ParametrizedRows, attach
from refold.torch.namespace import TORCH
from refold.torch.rows import as_matrix, as_weight
from refold.weights import Orthogonal, Rows, working_dtype
from refold.weights.namespace import dtype_name

Tensor = torch.Tensor


class OrthogonalWeight(ParametrizedRows):
    """A parametrization: a constant matrix with orthonormal rows that the stored weight, a free matrix, turns.

    ``base`` ``(units, fan_in)`` is a buffer, ``gain`` ``(1,)`` a parameter, both in float32 or wider.
    """

    base: Tensor

    def __init__(self, rows: Rows, like: Tensor, method: Orthogonal, gain: bool) -> None:
        super().__init__(rows)
        self.method = method
        settings: Any = {"dtype": getattr(torch, working_dtype(dtype_name(like))), "device": like.device}
        self.gain = nn.Parameter(torch.ones(1, **settings), like.requires_grad) if gain else None
        self.register_buffer("base", torch.zeros(rows.units, rows.fan_in, **settings))

    def weight(self, *originals: Tensor) -> Tensor:
        """The base, turned."""
        gain = None if self.gain is None else self.gain.reshape(1, 1)
        matrix = self.method.compose(TORCH, as_matrix(self.rows, originals[0]), self.base, gain)
        return as_weight(self.rows, matrix, originals[0])

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The direction that starts at the multiple of an orthogonal matrix that is nearest to ``weight``."""
        parts = self.method.attach(as_matrix(self.rows, weight.detach()).cpu().numpy())
        direction = as_weight(self.rows, torch.from_numpy(parts.direction).to(weight.device), weight)
        # Rounded as the direction is stored: where nothing has turned, nothing is to turn.
        self.base.copy_(as_matrix(self.rows, direction))
        if self.gain is not None:
            self.gain.copy_(torch.from_numpy(parts.gain).reshape(1))
        return direction

    def extra_repr(self) -> str:
        """Shown with the module."""
        return f"{self.rows}, {self.method}{', gain' if self.gain is not None else ''}"


def orthogonal_weights(
    module: nn.Module,
    name: str = "weight",
    map: str = "cayley",
    *,
    gain: bool = False,
    axis: int | Sequence[int] | None = None,
) -> Any:
    """Train the weight ``name`` of ``module`` as a matrix with orthonormal rows; returns the module.

    The weight is a matrix with one row per output unit (as in :func:`weight_normalization`). Its rows are
    orthonormal, or its columns where there are more units than inputs: a constant, ``base``, turned by a rotation
    that the stored weight, a free matrix, parameterizes. Formula and sources:
    :class:`refold.weights.Orthogonal`. The weight stays orthogonal to rounding however long it trains, and nothing
    is ever written into the stored one.

    Attaching keeps a weight whose singular values are all equal (with ``gain=False``: all 1), such as
    ``nn.init.orthogonal_`` gives, and replaces any other by the nearest. :func:`refold.fold` ships the value.

    Args:
        module: a module of torch, in place.
        name: of the parameter.
        map: ``"cayley"``, or ``"exponential"``, which takes longer.
        gain: whether to learn one number that multiplies the weight, and that starts as its mean singular value.
        axis: as for :func:`weight_normalization`.

    Of a convolution the matrix is ``(filters, channels * taps)``: the convolution as a map of images is not
    orthogonal then.

    Raises:
        ValueError: as for :func:`weight_normalization`, or there is no such map.
    """
    method = Orthogonal(map)
    attach(module, name, axis, lambda rows, weight: OrthogonalWeight(rows, weight, method, gain))
    return module
