"""A linear layer with normalized rows that never makes the weight: :func:`refold.weights.outputs`, differentiated.

In the forward nothing of the size of the weight is written, and ``v`` is read twice, for its norms and in the
product. Backward, the gradient by ``v`` of a row is that by ``w`` times ``f``, less what lies along the row; how
much does is a sum over the batch, of the gradient times the output. So it is the plain layer's two products and
one pass over ``v``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.nn import functional

from refold.torch.fused import is_ordinary
from refold.torch.namespace import TORCH
from refold.torch.rows import compose
from refold.weights import Normalization, Rows, outputs, pays

Tensor = torch.Tensor

# How far the mean of a row may exceed its deviation, over sqrt(fan_in): beyond, the square of one less that of the
# other is too rough.
_MEAN_OVER_NORM = 0.5


def linear(
    method: Normalization,
    rows: Rows,
    x: Tensor,
    direction: Tensor,
    gain: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
) -> Tensor | None:
    """``functional.linear`` of ``x`` ``(..., fan_in)`` and the composed weight; None where that has to be made.

    ``direction`` is ``(units, fan_in)``, in the type of ``x``. It has to be made for a large batch, where it costs
    less; for half types, which are rounded once; for forward-mode derivatives; and, but where the layer is
    compiled, on other devices than a CPU and if the norm of a row is so large or small that it needs care.
    """
    if direction.dtype not in (torch.float32, torch.float64) or x.dtype != direction.dtype:
        return None
    if not pays(x.numel(), direction.numel()) or torch.is_autocast_enabled(x.device.type):
        return None
    if torch.compiler.is_compiling():
        return _steps(method, x, direction, gain, offset, bias)
    if x.device.type != "cpu" or forward_ad._current_level >= 0:
        return None
    measured = _measured(method, direction, gain)
    if measured is None:
        return None
    made: Tensor = _OutputSide.apply(  # type: ignore[no-untyped-call] # torch's
        x, direction, gain, offset, bias, measured, method, rows
    )
    return made


def _steps(method: Normalization, x: Tensor, direction: Tensor, *parts: Tensor | None) -> Tensor:
    """The formula, for a compiler, which makes few passes of it and of its derivative."""
    gain, offset, bias = parts
    out: Tensor = outputs(TORCH, method, x, direction, gain, offset)
    return out if bias is None else out + bias


class _Measured(NamedTuple):
    """Of rows of ordinary size, ``(units,)``: their norms, without the mean where the method takes it out; their
    factors; and their means, or None if they stay."""

    norm: Tensor
    factor: Tensor
    mean: Tensor | None


@torch.no_grad()
def _measured(method: Normalization, direction: Tensor, gain: Tensor | None) -> _Measured | None:
    fan_in = direction.shape[1]
    norm = torch.linalg.vector_norm(direction, dim=1)
    mean = None
    if method.centered:
        mean = direction.mean(1)
        share = mean * (fan_in**0.5 / norm)  # the norm of the mean over that of the row
        if not share.abs().amax().item() < _MEAN_OVER_NORM:
            return None
        norm = norm * torch.sqrt(1 - share * share)
    least, most = torch.aminmax(norm)
    if not is_ordinary(least.item(), most.item(), direction.dtype):
        return None
    size = method.size(TORCH, norm, fan_in).value
    return _Measured(norm, 1 / size if gain is None else gain / size, mean)


class _OutputSide(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        direction: Tensor,
        gain: Tensor | None,
        offset: Tensor | None,
        bias: Tensor | None,
        measured: _Measured,
        method: Normalization,
        rows: Rows,
    ) -> Any:
        flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        given = flat - flat.mean(-1, keepdim=True) if method.centered else flat
        product = functional.linear(given, direction)
        out = product * measured.factor if bias is None else torch.addcmul(bias, product, measured.factor)
        if offset is not None:
            out.addcmul_(flat.sum(-1, keepdim=True), offset)
        ctx.method, ctx.rows = method, rows
        ctx.save_for_backward(x, direction, gain, offset, bias, given, product, *measured)
        return out if x.ndim == 2 else out.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> Any:
        x, direction, gain, offset, bias, given, product, norm, factor, mean = ctx.saved_tensors
        if torch.is_grad_enabled():  # whoever differentiates again needs every step
            weight = compose(ctx.method, ctx.rows, direction, gain, offset)
            inputs = (x, direction, gain, offset, bias)
            wanted = [tensor for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
            out = functional.linear(x, weight, bias)
            found = iter(torch.autograd.grad(out, wanted, cotangent, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:5]), None, None, None
        by_x = by_direction = by_gain = by_offset = by_bias = None
        flat = cotangent.reshape(-1, cotangent.shape[-1])
        scaled = flat * factor
        if ctx.needs_input_grad[0]:
            by_x = scaled @ direction
            if mean is not None:
                by_x -= by_x.mean(-1, keepdim=True)
            if offset is not None:
                by_x += flat @ offset.unsqueeze(1)
            by_x = by_x.reshape(x.shape)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            size, slope = ctx.method.size(TORCH, norm, direction.shape[1])
            by_gain = (flat * product).sum(0) / size
        if ctx.needs_input_grad[1]:
            # Of the gradient by the rows of the weight, what lies along them.
            radial = (by_gain * factor * slope / norm).unsqueeze(1)
            by_direction = scaled.T @ given
            by_direction.addcmul_(direction, radial, value=-1)
            if mean is not None:
                by_direction += radial * mean.unsqueeze(1)
        if ctx.needs_input_grad[3]:
            by_offset = flat.T @ x.reshape(-1, x.shape[-1]).sum(-1)
        if ctx.needs_input_grad[4]:
            by_bias = flat.sum(0)
        return (
            by_x,
            by_direction,
            by_gain if ctx.needs_input_grad[2] else None,
            by_offset,
            by_bias,
            None,
            None,
            None,
        )
