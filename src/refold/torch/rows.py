"""Rows normalized in torch: few passes over the weight, and its gradient by the formula.

Differentiated step by step, a normalization reads and writes the weight a dozen times. Here an autograd function
knows the gradient (:func:`refold.weights.pulled`), and rows of ordinary size on a CPU go through the kernels of
torch's own weight normalization, which do not do what only extreme rows need.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from refold.torch import fused
from refold.torch.namespace import TORCH
from refold.weights import NUMPY, Normalization, Parts, Pulled, Rows, composed, pulled, widen

Tensor = torch.Tensor


def compose(
    method: Normalization, rows: Rows, direction: Tensor, gain: Tensor | None, offset: Tensor | None
) -> Tensor:
    """The weight, in the shape and type of ``direction``; gain and offset are ``(units,)``.

    Differentiable to any order, in reverse and in forward mode, and under ``torch.func``.
    """
    # A model that was converted as a whole, or is cast by FSDP, has them in half precision.
    gain, offset = (None if part is None else widen(TORCH, part) for part in (gain, offset))
    # A compiler sees through the steps, and makes its own few passes of them; what is traced needs them.
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        steps = method.compose(TORCH, as_matrix(rows, direction), _column(gain), _column(offset))
        return as_weight(rows, steps, direction)
    made = fused.compose(method, rows, direction, gain, offset)
    if made is not None:
        return made
    found = _ordinary(method, as_matrix(rows, direction.detach()), _column(gain), _column(offset))
    other: Tensor
    if found is None:
        other = _Composed.apply(direction, gain, offset, method, rows)  # type: ignore[no-untyped-call]  # torch's
    else:
        other = _Known.apply(direction, gain, offset, found, method, rows)  # type: ignore[no-untyped-call]  # torch's
    return other


def decompose(method: Normalization, rows: Rows, weight: Tensor) -> Parts:
    """``method.decompose``, with the norms that :func:`compose` takes, so that their quotient is exactly 1."""
    matrix = as_matrix(rows, weight.detach())
    found = _ordinary(method, matrix, None, None)
    if found is None:
        return method.decompose(TORCH, matrix)
    return Parts(matrix, method.size(TORCH, found.norm, rows.fan_in).value, found.mean)


def as_matrix(rows: Rows, weight: Tensor) -> Tensor:
    """A weight as ``(units, fan_in)``, in float32 or wider."""
    matrix: Tensor = rows.to_matrix(TORCH, widen(TORCH, weight.reshape(rows.shape)))
    return matrix


def as_weight(rows: Rows, matrix: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`as_matrix`, in the shape and type of ``like``."""
    weight: Tensor = rows.from_matrix(TORCH, matrix)
    return weight.reshape(like.shape).to(like.dtype)


def _column(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.reshape(-1, 1)


class _Ordinary(NamedTuple):
    """A matrix whose rows are all of ordinary size, composed.

    ``values`` are its rows, without their ``mean`` where the method takes it out, and ``norm`` their norms. If the
    size of a row is its norm times a number, to all digits, that is ``slope``; else it is None.
    """

    weight: Tensor
    values: Tensor
    mean: Tensor | None
    norm: Tensor
    slope: float | None


# How far the mean of a row may exceed its deviation before what rounding leaves of it has to be taken out again.
_MEAN_OVER_DEVIATION = 16.0


@torch.no_grad()
def _ordinary(
    method: Normalization, matrix: Tensor, gain: Tensor | None, offset: Tensor | None
) -> _Ordinary | None:
    """The composed matrix, if a look at its numbers costs little and says that no row needs more than this."""
    plain = type(matrix) is Tensor and matrix.device.type == "cpu"  # and not in pieces on several processes
    if not plain or torch._C._are_functorch_transforms_active():
        return None
    fan_in = matrix.shape[-1]
    mean = matrix.mean(-1, keepdim=True) if method.centered else None
    values = matrix if mean is None else matrix - mean
    factor = torch.ones_like(matrix[:, :1]) if gain is None else gain.detach()
    slope = fused.slope(method, fan_in)
    # In one pass: the norms, and the rows over them.
    weight, norm = torch.ops.aten._weight_norm_interface(
        values.contiguous(), factor if slope == 1 else factor / slope, 0
    )
    try:
        least, most = norm.amin().item(), norm.amax().item()
        farthest = 0.0 if mean is None else (mean.abs() / norm).amax().item() * fan_in**0.5
    except RuntimeError:  # the numbers are not there: in a fake tensor
        return None
    if not (fused.is_ordinary(least, most, matrix.dtype) and farthest < _MEAN_OVER_DEVIATION):
        return None
    # An epsilon counts the more the smaller the norm.
    smallest = method.size(NUMPY, np.float64(least), fan_in).value
    straight = abs(smallest - slope * least) <= torch.finfo(matrix.dtype).eps * smallest
    if not straight:
        weight = values * (factor / method.size(TORCH, norm, fan_in).value)
    if offset is not None:
        weight = weight.add_(offset.detach())
    return _Ordinary(weight, values, mean, norm, slope if straight else None)


def _jvp(ctx: Any, direction: Any, gain: Any, offset: Any, *_: Any) -> Any:
    given, given_gain = ctx.saved_tensors[:2]
    measured = ctx.method.measure(TORCH, as_matrix(ctx.rows, given))
    total = torch.zeros_like(measured.values)
    if direction is not None:
        moved = as_matrix(ctx.rows, direction)
        total = total + pulled(TORCH, measured, _column(given_gain), moved).direction
    if gain is not None:
        total = total + composed(TORCH, measured, _column(gain), None)
    if offset is not None:
        total = total + offset.reshape(-1, 1)
    return as_weight(ctx.rows, total, given)


def _backward(ctx: Any, cotangent: Tensor, known: _Ordinary | None) -> Any:
    direction, gain = ctx.saved_tensors[:2]
    by_row = as_matrix(ctx.rows, cotangent)
    if known is None:
        measured = ctx.method.measure(TORCH, as_matrix(ctx.rows, direction))
        parts = pulled(TORCH, measured, _column(gain), by_row)
    else:
        parts = _pulled(ctx.method, known, _column(gain), by_row)
    by_direction = as_weight(ctx.rows, parts.direction, direction)
    by_gain = None if gain is None else parts.gain.reshape(gain.shape)
    return by_direction, by_gain, by_row.sum(-1) if ctx.with_offset else None


class _Composed(torch.autograd.Function):
    """The weight from its parts."""

    generate_vmap_rule = True
    jvp = staticmethod(_jvp)

    @staticmethod
    def forward(
        direction: Tensor, gain: Tensor | None, offset: Tensor | None, method: Normalization, rows: Rows
    ) -> Any:
        measured = method.measure(TORCH, as_matrix(rows, direction))
        return as_weight(rows, composed(TORCH, measured, _column(gain), _column(offset)), direction)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        direction, gain, offset, ctx.method, ctx.rows = inputs
        ctx.with_offset = offset is not None
        ctx.save_for_backward(direction, gain)
        ctx.save_for_forward(direction, gain)

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> Any:
        return *_backward(ctx, cotangent, None), None, None


class _Known(torch.autograd.Function):
    """The same where the weight is known already; in the old form, which costs half as much to call."""

    jvp = staticmethod(_jvp)

    @staticmethod
    def forward(
        ctx: Any,
        direction: Tensor,
        gain: Tensor | None,
        offset: Tensor | None,
        known: _Ordinary,
        method: Normalization,
        rows: Rows,
    ) -> Any:
        ctx.method, ctx.rows, ctx.slope = method, rows, known.slope
        ctx.with_offset = offset is not None
        ctx.save_for_backward(direction, gain, known.values, known.norm)
        ctx.save_for_forward(direction, gain)
        return as_weight(rows, known.weight, direction)

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> Any:
        _, _, values, norm = ctx.saved_tensors
        # Whoever differentiates again needs every step.
        again = torch.is_grad_enabled()
        known = None if again else _Ordinary(values, values, None, norm, ctx.slope)
        return *_backward(ctx, cotangent, known), None, None, None


def _pulled(method: Normalization, known: _Ordinary, gain: Tensor | None, cotangent: Tensor) -> Pulled:
    """:func:`refold.weights.pulled` for ordinary rows."""
    # torch's kernel is for rows over their norms.
    kernel = torch.ops.aten._weight_norm_interface_backward
    values, norm, slope = known.values.contiguous(), known.norm, known.slope
    cotangent = cotangent.contiguous()
    factor = torch.ones_like(norm) if gain is None else gain
    if slope is not None:
        direction, along = kernel(cotangent, values, factor if slope == 1 else factor / slope, norm, 0)
        by_gain = along / slope
    else:
        size, steep = method.size(TORCH, norm, values.shape[-1])
        direction, along = kernel(cotangent, values, factor / size * norm, norm, 0)
        by_gain = along * norm / size
        # The size grows less than the norm, and so less of the gradient along the row is taken out.
        direction.addcmul_(values, factor * by_gain / norm * (1 / norm - steep / size))
    if method.centered:
        direction.sub_(direction.mean(-1, keepdim=True))
    return Pulled(direction, by_gain)
