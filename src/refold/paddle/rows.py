"""Rows normalized in Paddle: few passes over the weight as it is stored, and the gradient by the formula.

Differentiated step by step, a normalization reads and writes the weight two dozen times.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from refold.paddle.namespace import PADDLE
from refold.weights import Normalization, Parts, Rows, composed, dtype_name, pulled, widen


def compose(method: Normalization, rows: Rows, direction: Any, gain: Any, offset: Any) -> Any:
    """The weight, in the shape and type of ``direction``; gain and offset are ``(units,)``, or None."""
    if paddle.in_dynamic_mode():
        return _Composed.apply(direction, gain, offset, method, rows)
    return _steps(method, rows, direction, gain, offset)[0]


def decompose(method: Normalization, rows: Rows, matrix: Any) -> Parts:
    """``method.decompose`` of a matrix ``(units, fan_in)``, with the norms that :func:`compose` takes."""
    lines = rows.to_lines(PADDLE, rows.from_matrix(PADDLE, matrix))
    return method.decompose(PADDLE, lines, axis=rows.axis)


def as_lines(rows: Rows, weight: Any) -> Any:
    """A weight as :meth:`refold.weights.Rows.to_lines`, in float32 or wider."""
    return rows.to_lines(PADDLE, widen(PADDLE, paddle.reshape(weight, list(rows.shape))))


def as_weight(rows: Rows, lines: Any, like: Any) -> Any:
    """The inverse, in the shape and type of ``like``."""
    return paddle.cast(paddle.reshape(rows.from_lines(PADDLE, lines), like.shape), dtype_name(like))


def is_ordinary(weight: Any) -> bool:
    """Whether a look at the numbers says that their squares are far from overflow and from underflow."""
    if not paddle.in_dynamic_mode() or dtype_name(weight) not in ("float32", "float64"):
        return False
    with paddle.no_grad():
        row = paddle.reshape(weight.detach(), [1, -1])
        return _in_bounds(float(paddle.matmul(row, row, transpose_y=True).item()) ** 0.5, weight)


def _in_bounds(size: float, like: Any) -> bool:
    bound = float(np.finfo(dtype_name(like)).max) ** 0.375
    return bool(1 / bound < size < bound)


def _measured(method: Normalization, lines: Any, axis: int) -> Any:
    if paddle.in_dynamic_mode():
        measured = method.measure(PADDLE, lines, axis, ordinary=True)
        with paddle.no_grad():
            least, most = float(paddle.min(measured.norm)), float(paddle.max(measured.norm))
            directed = float(paddle.min(measured.inverse)) > 0  # or there seems to be a row without direction
        if directed and _in_bounds(least, lines) and _in_bounds(most, lines):
            return measured
    return method.measure(PADDLE, lines, axis)


def _steps(method: Normalization, rows: Rows, direction: Any, gain: Any, offset: Any) -> Any:
    measured = _measured(method, as_lines(rows, direction), rows.axis)
    columns = (None if part is None else rows.as_column(PADDLE, part) for part in (gain, offset))
    return as_weight(rows, composed(PADDLE, measured, *columns), direction), measured


class _Composed(paddle.autograd.PyLayer):
    """The weight from its parts."""

    @staticmethod
    def forward(ctx: Any, direction: Any, gain: Any, offset: Any, method: Normalization, rows: Rows) -> Any:
        made, ctx.measured = _steps(method, rows, direction, gain, offset)
        ctx.method, ctx.rows, ctx.parts = method, rows, (gain is not None, offset is not None)
        ctx.save_for_backward(direction, *(part for part in (gain, offset) if part is not None))
        return made

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> Any:
        rows, (with_gain, with_offset) = ctx.rows, ctx.parts
        direction, *parts = ctx.saved_tensor()
        gain = parts[0] if with_gain else None
        lines = as_lines(rows, cotangent)
        again = paddle.is_grad_enabled()  # whoever differentiates again needs every step
        measured = ctx.method.measure(PADDLE, as_lines(rows, direction), rows.axis) if again else ctx.measured
        column = None if gain is None else rows.as_column(PADDLE, gain)
        by = pulled(PADDLE, measured, column, lines, rows.axis)
        found = [as_weight(rows, by.direction, direction)]
        if gain is not None:
            found.append(paddle.reshape(by.gain, gain.shape))
        if with_offset:
            found.append(paddle.reshape(paddle.sum(lines, axis=rows.axis), parts[-1].shape))
        return tuple(found)
