"""Weight normalization for torch modules, as a parametrization."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from refold.torch import output_side
from refold.torch.attach import ParametrizedRows, attach
from refold.torch.namespace import TORCH
from refold.torch.rows import as_matrix, as_weight, compose, decompose
from refold.weights import MagnitudePreserving, Normalization, Parts, Rows, fit_rows, method, working_dtype


class NormalizedWeight(ParametrizedRows):
    """A parametrization: the weight from its direction, and from a gain and an offset per output unit.

    ``original0`` is the direction, in the shape and type of the weight; ``original1`` and ``original2`` are the
    gain and the offset, where there are any, of shape ``(units,)`` in float32 or wider. ``rows`` is how the weight,
    viewed as ``rows.shape``, is a matrix with one row per output unit.
    """

    def __init__(
        self, rows: Rows, normalizer: Normalization | nn.Module, *, gain: bool, offset: bool, dtype: torch.dtype
    ) -> None:
        super().__init__(rows)
        self.method: Normalization | None = None
        self.normalizer: nn.Module | None = None
        if isinstance(normalizer, nn.Module):
            self.normalizer = normalizer
        else:
            self.method = normalizer
        self.gain = gain
        self.offset = offset
        self.dtype = dtype

    def weight(self, *originals: torch.Tensor) -> torch.Tensor:
        """The weight, in the shape and type of the direction, which is the first original."""
        direction, gain, offset = self._parts(*originals)
        if self.method is not None:
            return compose(self.method, self.rows, direction, gain, offset)
        normalized = self._normalized(direction)
        normalized = normalized if gain is None else normalized * gain.reshape(-1, 1)
        normalized = normalized if offset is None else normalized + offset.reshape(-1, 1)
        return as_weight(self.rows, normalized, direction)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None, *originals: torch.Tensor) -> torch.Tensor | None:
        """The output, normalized, where that is faster than the weight: see :mod:`refold.torch.output_side`."""
        direction, gain, offset = self._parts(*originals)
        if (
            self.method is None
            or self.rows.unit_axes != (0,)
            or type(direction) not in (torch.Tensor, nn.Parameter)
        ):
            return None
        return output_side.linear(self.method, self.rows, x, direction, gain, offset, bias)

    def _parts(self, *originals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        direction, *remaining = originals
        gain = remaining.pop(0) if self.gain else None
        return direction, gain, remaining.pop(0) if self.offset else None

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Direction, gain and offset with which :meth:`forward` gives ``weight``."""
        if self.method is not None:
            parts = decompose(self.method, self.rows, weight)
        else:
            parts = fit_rows(TORCH, self._normalized(weight), as_matrix(self.rows, weight), offset=self.offset)
        return (weight.detach().clone(), *self._used(parts))

    def extra_repr(self) -> str:
        """Shown with the module."""
        shown = "" if self.method is None else f", {self.method}"
        return f"{self.rows}{shown}, gain={self.gain}, offset={self.offset}"

    def _normalized(self, weight: torch.Tensor) -> torch.Tensor:
        assert self.normalizer is not None
        normalized: torch.Tensor = self.normalizer(as_matrix(self.rows, weight))
        return normalized

    def _used(self, parts: Parts) -> list[torch.Tensor]:
        wide = getattr(torch, working_dtype(str(self.dtype).removeprefix("torch.")))
        zeros = torch.zeros(self.rows.units, 1, dtype=wide, device=parts.direction.device)
        used = [parts.gain] if self.gain else []
        used += [zeros if parts.offset is None else parts.offset] if self.offset else []
        return [part.detach().reshape(-1).to(wide).clone() for part in used]


def weight_normalization(
    module: nn.Module,
    name: str = "weight",
    normalizer: str | Normalization | nn.Module = "unit",
    *,
    epsilon: float | None = None,
    gain: bool = True,
    offset: bool | None = None,
    axis: int | Sequence[int] | None = None,
) -> Any:
    """Train the weight ``name`` of ``module`` as a direction and a gain per output unit; returns the module.

    The weight is seen as a matrix with one row per output unit: a row of a Linear's weight, a filter of a
    convolution (of transposed and grouped ones too), a row of an Embedding, a gate of one unit of a recurrent cell
    or layer (``name="weight_hh_l0"``), a row of a projection of attention (``name="in_proj_weight"``).
    It becomes a parametrization of torch (``torch.nn.utils.parametrize``), whose tools keep working:
    ``module.weight`` is the weight, ``module.parametrizations.weight.original0`` the direction, ``original1`` the
    gain and, where the normalizer takes the row's mean out, ``original2`` the offset. They start such that nothing
    changes that the module computes. :func:`refold.fold` makes plain weights of them again.

    Args:
        module: a module of torch, in place.
        name: of the parameter.
        normalizer: ``"unit"``, weight normalization (arXiv:1602.07868); ``"layer"``, weight standardization
            (arXiv:1903.10520); or another name, or an object, of :mod:`refold.weights`; or a module that is applied
            to the matrix, such as ``nn.LayerNorm(fan_in)`` or ``nn.RMSNorm(fan_in)``.
        epsilon: added to the size of each row, not under the root; by default the normalizer's own.
        gain: whether each unit has a learnable gain. Without it the rows keep the size that the normalizer
            gives them, which changes what the module computes.
        offset: whether each unit has a learnable offset; by default where it is needed to change nothing.
        axis: the axes of the weight that number the output units, for other modules than those above, or in their
            place; ``()`` for one norm over the whole weight.

    The norms are computed in float32 or wider and rounded once to the weight's type. A weight that is frozen stays
    so, gain and offset included. Attach before the optimizer is made: it has to see the new parameters.

    Raises:
        ValueError: the module has no such parameter or none yet, it is parametrized already, or nothing tells its
            output units.
    """
    chosen = method(normalizer, epsilon) if isinstance(normalizer, str) else normalizer
    centered = isinstance(chosen, nn.Module) or chosen.centered
    use_offset = centered and gain if offset is None else offset

    def make(rows: Rows, weight: nn.Parameter) -> NormalizedWeight:
        if isinstance(chosen, nn.Module):
            _check_normalizer(chosen, epsilon, rows)
        return NormalizedWeight(rows, chosen, gain=gain, offset=use_offset, dtype=weight.dtype)

    attach(module, name, axis, make, in_pieces=True)
    return module


def _check_normalizer(normalizer: nn.Module, epsilon: float | None, rows: Rows) -> None:
    called = f"the normalizer {type(normalizer).__name__}"
    if epsilon is not None:
        raise ValueError(f"epsilon is for named normalizers: {called} has its own")
    if isinstance(normalizer, nn.modules.batchnorm._NormBase):
        raise ValueError(f"{called} normalizes over the output units, not over the weights of each")
    shape = getattr(normalizer, "normalized_shape", None)
    if shape is not None and prod(shape) != rows.fan_in:
        raise ValueError(f"{called} is for rows of {prod(shape)} weights; an output unit has {rows.fan_in}")


def force_magnitudes(model: nn.Module) -> None:
    """Set the stored rows of every weight that is normalized by ``"magnitude"`` to length sqrt(fan-in).

    To be called after each step of the optimizer, as EDM2 (arXiv 2312.02696) does before each: a forward never
    writes here. What the model computes stays the same, but for what epsilon is beside the old length.
    """
    for module in model.modules():
        if not parametrize.is_parametrized(module):
            continue
        parametrizations: Any = module.parametrizations
        for found in parametrizations.values():
            own = found[0]
            if isinstance(own, NormalizedWeight) and isinstance(own.method, MagnitudePreserving):
                with torch.no_grad():
                    forced = own.method.force(TORCH, as_matrix(own.rows, found.original0))
                    found.original0.copy_(as_weight(own.rows, forced, found.original0))
