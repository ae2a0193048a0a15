"""Paddle's operators that act on each channel for itself, and sums, in the engine's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from refold.algebra import affine
from refold.graph.batch_norm import batch_norm as batch_norm_op
from refold.graph.graph import Affine, Gain, Op, Opaque, Sum
from refold.paddle.operands import Entry, Shape, Shapes, channel_axis
from refold.paddle.tensors import numbers
from refold.paddle.trace import Primitive
from refold.recording.sizes import Size
from refold.recording.symbols import Constant, Symbol, symbols

AnyArray = npt.NDArray[Any]

BATCH_STATISTICS = "it normalizes with the statistics of the batch"


def batch_norm(primitive: Primitive, shapes: Shapes) -> Op:
    """A batch norm with stored statistics."""
    tensor, mean, variance, gamma, beta, is_test, _, epsilon, layout, use_global_stats = primitive.args[:10]
    statistics = (mean, variance)
    if not isinstance(tensor, Symbol) or not all(isinstance(c, Constant) for c in statistics):
        return Opaque()
    if not (is_test or use_global_stats):
        return Opaque(BATCH_STATISTICS)
    rank = len(tensor.shape)
    return batch_norm_op(
        numbers(mean.tensor),
        numbers(variance.tensor),
        float(np.float32(epsilon)),  # as Paddle's kernels have it
        None if gamma is None else numbers(gamma.tensor),
        None if beta is None else numbers(beta.tensor),
        channel_axis(layout, rank),
        rank,
    )


def _scale_shift(primitive: Primitive, shapes: Shapes, scale: AnyArray, shift: AnyArray) -> Op:
    """``x * scale + shift`` with constants that broadcast: numbers, or one per channel."""
    (tensor,) = symbols(primitive.args)
    shape = shapes(tensor)
    if tensor.shape != primitive.outputs[0].shape:
        return Opaque("a constant widens the tensor")
    scale, shift = np.asarray(scale, dtype=np.float64), np.asarray(shift, dtype=np.float64)
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return Opaque("a constant is not finite")
    if scale.size == shift.size == 1:
        return Gain(float(scale.reshape(())), float(shift.reshape(())))
    axes = {_varying_axis(constant, shape) for constant in (scale, shift) if constant.size > 1}
    axis = axes.pop()
    if axes or axis is None:
        return Opaque("a constant that is not one number per channel is not a convolution")
    channels = shape[axis]
    assert channels is not None
    per_channel = [np.broadcast_to(constant.reshape(-1), (channels,)) for constant in (scale, shift)]
    conv = affine.scale_shift(per_channel[0], per_channel[1], len(shape) - 2)
    return Affine(conv, axis, biased=bool(np.any(shift)))


def _varying_axis(constant: AnyArray, shape: Shape) -> int | None:
    """The one axis (batch excepted) along which a broadcast constant changes, if it is one."""
    offset = len(shape) - constant.ndim
    axes = [offset + place for place, size in enumerate(constant.shape) if size > 1]
    if offset < 0 or len(axes) != 1 or axes[0] == 0 or shape[axes[0]] != constant.size:
        return None
    return axes[0]


def _constant(argument: Any) -> AnyArray | None:
    if isinstance(argument, Constant):
        return numbers(argument.tensor)
    if isinstance(argument, Size):
        return None
    if isinstance(argument, bool | int | float | np.number | np.ndarray):
        return np.asarray(argument, dtype=np.float64)
    return None


def arithmetic(
    factors: tuple[float, float] | None,
    with_second: Callable[[AnyArray], tuple[AnyArray, AnyArray]] | None,
    with_first: Callable[[AnyArray], tuple[AnyArray, AnyArray]] | None,
) -> Entry:
    """An operator on two operands: the sum with ``factors``, or ``x * scale + shift`` where one operand is a
    constant and ``with_second`` or ``with_first`` gives scale and shift."""

    def entry(primitive: Primitive, shapes: Shapes) -> Op:
        first, second = primitive.args[:2]
        if isinstance(first, Symbol) and isinstance(second, Symbol):
            if factors is None:
                return Opaque()
            alike = first.shape == second.shape and shapes(first) == shapes(second)
            return Sum(factors) if alike else Opaque("the sum broadcasts")
        is_first = isinstance(first, Symbol)
        constant = _constant(second if is_first else first)
        pair = with_second if is_first else with_first
        if constant is None or pair is None:
            return Opaque()
        with np.errstate(divide="ignore"):
            return _scale_shift(primitive, shapes, *pair(constant))

    return entry


ONE, ZERO = np.ones(()), np.zeros(())


def scale(primitive: Primitive, shapes: Shapes) -> Op:
    """A factor and a shift, both numbers."""
    tensor, by, bias, bias_after_scale = primitive.args[:4]
    factor, offset = _constant(by), _constant(bias)
    if not isinstance(tensor, Symbol) or factor is None or offset is None or factor.size * offset.size != 1:
        return Opaque()
    return _scale_shift(primitive, shapes, factor, offset if bias_after_scale else factor * offset)


def add_n(primitive: Primitive, shapes: Shapes) -> Op:
    """A sum of several tensors."""
    (terms,) = primitive.args[:1]
    if not all(isinstance(term, Symbol) for term in terms):
        return Opaque("it adds constants to a tensor")
    if len({shapes(term) for term in terms}) > 1:
        return Opaque("the sum broadcasts")
    return Sum((1.0,) * len(terms))


def dropout(primitive: Primitive, shapes: Shapes) -> Op:
    """A dropout, which in inference is a factor at most."""
    _, _, probability, is_test, mode = primitive.args[:5]
    if not is_test or isinstance(probability, Constant):
        return Opaque("it acts at random in inference too")
    if mode == "upscale_in_train":
        return Gain()
    return Gain(float(np.float32(1.0) - np.float32(probability)))  # as Paddle's kernels have it


def same(primitive: Primitive, shapes: Shapes) -> Op:
    """What gives what it was given."""
    return Gain()


def negative(primitive: Primitive, shapes: Shapes) -> Op:
    """The factor -1."""
    return Gain(-1.0)
