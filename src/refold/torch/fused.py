"""Rows of ordinary size on a CPU in one call of torch's own kernels.

Each call from Python costs as much as a pass over a small weight, so the fewer the faster.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.autograd import forward_ad

from refold.torch.namespace import TORCH
from refold.weights import NUMPY, Normalization, Rows, TimmStandardization, pulled

Tensor = torch.Tensor

# torch's batch norm takes more time per weight than it saves in calls for matrices with more entries than this.
_SMALL = 2**17
# It computes ``x * a - mean * a``: how far the mean of a row may exceed its deviation.
_MEAN_OVER_DEVIATION = 2.0


def compose(
    method: Normalization, rows: Rows, direction: Tensor, gain: Tensor | None, offset: Tensor | None
) -> Tensor | None:
    """The weight, in the shape of ``direction``; gain and offset are ``(units,)``.

    None where another way is needed: what one of torch's kernels does is not the method, a row is so large, so
    small or so nearly constant that it needs care, or somebody wants forward-mode derivatives or a transform.
    """
    if not _is_plain(direction, rows) or torch._C._are_functorch_transforms_active():
        return None
    if forward_ad._current_level >= 0:
        return None
    if not method.centered:
        return _over_norms(method, rows, direction, gain) if offset is None else None
    return _standardized(method, rows, direction, gain, offset) if direction.numel() <= _SMALL else None


def is_ordinary(least: float, most: float, dtype: torch.dtype) -> bool:
    """Whether norms between these have squares as far from overflow as from underflow. A NaN never is."""
    bound = torch.finfo(dtype).max ** 0.375
    return bool(1 / bound < least and most < bound)


def _is_plain(direction: Tensor, rows: Rows) -> bool:
    return (
        type(direction) in (Tensor, nn.Parameter)
        and direction.device.type == "cpu"
        and direction.dtype in (torch.float32, torch.float64)
        and rows.unit_axes == (0,)
        and direction.shape == rows.shape
        and direction.is_contiguous()
    )


def _over_norms(method: Normalization, rows: Rows, direction: Tensor, gain: Tensor | None) -> Tensor | None:
    if method.epsilon:
        return None
    steep = slope(method, rows.fan_in)
    factor = direction.new_ones(rows.units) if gain is None else gain
    factor = factor if steep == 1 else factor / steep
    factor = factor.detach().reshape(-1, *[1] * (direction.ndim - 1))
    made, norm = torch.ops.aten._weight_norm_interface(direction.detach(), factor, 0)
    found = span(norm)
    if found is None or not is_ordinary(*found, direction.dtype):
        return None
    known = _Known(made, norm, factor, steep, method, rows)
    differentiable: Tensor = _OverNorms.apply(direction, gain, known)  # type: ignore[no-untyped-call]  # torch's
    return differentiable


class _Known(NamedTuple):
    made: Tensor
    norm: Tensor
    factor: Tensor
    steep: float
    method: Normalization
    rows: Rows


class _OverNorms(torch.autograd.Function):
    """The rows over their norms. What torch itself says of the second derivative of its kernel is wrong (2.13)."""

    @staticmethod
    def forward(ctx: Any, direction: Tensor, gain: Tensor | None, known: _Known) -> Tensor:
        ctx.save_for_backward(direction, gain, known.norm, known.factor)
        ctx.known = known.steep, known.method, known.rows
        return known.made

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        direction, gain, norm, factor = ctx.saved_tensors
        steep, method, rows = ctx.known
        if torch.is_grad_enabled():  # whoever differentiates again needs every step
            column = None if gain is None else gain.reshape(-1, 1)
            measured = method.measure(TORCH, rows.to_matrix(TORCH, direction))
            parts = pulled(TORCH, measured, column, rows.to_matrix(TORCH, cotangent))
            by_gain = None if gain is None else parts.gain.reshape(gain.shape)
            return rows.from_matrix(TORCH, parts.direction), by_gain, None
        kernel = torch.ops.aten._weight_norm_interface_backward
        by_direction, along = kernel(cotangent.contiguous(), direction, factor, norm, 0)
        if gain is None:
            return by_direction, None, None
        along = along.reshape(gain.shape)
        return by_direction, along if steep == 1 else along / steep, None


def _standardized(
    method: Normalization, rows: Rows, direction: Tensor, gain: Tensor | None, offset: Tensor | None
) -> Tensor | None:
    fan_in = rows.fan_in
    if fan_in < 2:
        return None
    in_root = method.epsilon if isinstance(method, TimmStandardization) else 0.0
    ratio = slope(replace(method, epsilon=0.0), fan_in) * sqrt(fan_in)  # type: ignore[type-var]  # all are dataclasses
    factor = None if gain is None and ratio == 1 else direction.new_ones(rows.units) if gain is None else gain
    factor = factor if factor is None or ratio == 1 else factor / ratio
    made, mean, inverse = torch.native_batch_norm(
        direction.reshape(1, rows.units, fan_in), factor, offset, None, None, True, 0.0, in_root
    )
    found = span(inverse)
    if found is None or found[0] <= 0:
        return None
    least, most = sqrt(fan_in) / found[1], sqrt(fan_in) / found[0]
    if not is_ordinary(least, most, direction.dtype) or 2 * sqrt(in_root) * found[1] > 1:
        return None
    if not (mean * inverse).abs().amax().item() < _MEAN_OVER_DEVIATION:
        return None
    if not in_root and method.epsilon:
        size = float(method.size(NUMPY, np.float64(least), fan_in).value)
        # An epsilon counts the more the smaller the norm.
        if abs(size - ratio * least / sqrt(fan_in)) > torch.finfo(direction.dtype).eps * size:
            return None
    return made.reshape(direction.shape)


def span(numbers: Tensor) -> tuple[float, float] | None:
    """The smallest and the largest; None where there are no numbers, in a fake tensor."""
    least, most = torch.aminmax(numbers.detach())
    try:
        return least.item(), most.item()
    except RuntimeError:
        return None


@cache
def slope(method: Normalization, fan_in: int) -> float:
    """What a row's size grows by with its norm, where that is a number."""
    return float(method.size(NUMPY, np.float64(1.0), fan_in).slope)
