"""What the readers of Keras' layers and of its operations have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from refold.algebra import affine, geometry
from refold.algebra.affine import Array
from refold.algebra.geometry import Window
from refold.graph.graph import Affine, Concat, Gain, Op, Opaque, Sum
from refold.graph.passing import means
from refold.keras.trace import AnyArray, Call

Entry = Callable[[Call], Op]

BATCH_STATISTICS = "it normalizes with the statistics of the batch"
UNCOUNTED_PADDING = "Keras leaves padded positions out of the average, so at the border it is no convolution"


def channel_axis(layout: str | None, rank: int) -> int:
    """The axis of the channels, by Keras' word for a layout; None for the one that is set for all of Keras."""
    return rank - 1 if (layout or keras.config.image_data_format()) == "channels_last" else 1


def space_of(shape: Any, axis: int) -> tuple[Any, ...]:
    """The spatial sizes of a shape whose channels are on ``axis``."""
    return tuple(size for place, size in enumerate(shape) if place not in (0, axis))


def windows_of(
    padding: str, taps: Any, strides: Any, dilations: Any, space: tuple[int | None, ...]
) -> tuple[Window, ...]:
    """The windows of an operator in Keras' words, on inputs of the sizes ``space``."""
    windows = []
    for t, s, d, size in zip(taps, strides, dilations, space, strict=True):
        match padding:
            case "same":
                windows.append(geometry.same(t, s, d, size))
            case "causal":
                windows.append(Window(t, s, d, before=d * (t - 1)))
            case _:
                windows.append(Window(t, s, d))
    return tuple(windows)


def dense_matrix(equation: str, kernel: AnyArray) -> Array | None:
    """The matrix ``(out, in)`` of an einsum that maps the last axis of its first operand, else None."""
    operands, _, result = equation.replace(" ", "").partition("->")
    data, _, weights = operands.partition(",")
    if len(weights) != 2 or not data or not result or data[:-1] != result[:-1]:
        return None
    inner, outer = data[-1], result[-1]
    if inner == outer or inner in data[:-1] or outer in data:
        return None
    matrix = np.asarray(kernel, dtype=np.float64)
    if weights == inner + outer:
        return matrix.T
    return matrix if weights == outer + inner else None


def summed(call: Call, factors: tuple[float, ...]) -> Op:
    """The sum of a step's tensors, each times its factor."""
    shape = tuple(call.outputs[0].shape)
    if any(tuple(tensor.shape) != shape for tensor in call.tensors):
        return Opaque("the sum broadcasts")
    return Sum(factors)


def concatenated(call: Call, axis: int) -> Op:
    """A step's tensors joined along ``axis``."""
    if not all(isinstance(leaf, keras.KerasTensor) for leaf in keras.tree.flatten(call.args)):
        return Opaque("it joins constants to a tensor")
    rank = len(call.outputs[0].shape)
    return Concat(axis % rank) if axis % rank else Opaque("it joins examples of the batch")


def average_pooled(call: Call, pool_size: Any, strides: Any, padding: str, axis: int) -> Op:
    """The average over windows; channels are on ``axis``."""
    shape = call.tensors[0].shape
    space = space_of(shape, axis)
    taps = per_axis(pool_size, len(space))
    steps = per_axis(strides if strides is not None else pool_size, len(space))
    windows = windows_of(padding, taps, steps, (1,) * len(space), space)
    if any(window.floating or window.before or window.after for window in windows):
        return Opaque(UNCOUNTED_PADDING, passages=means(axis))
    return Affine(affine.average_pool(shape[axis], windows), axis, biased=False)


def per_axis(sizes: Any, axes: int) -> tuple[int, ...]:
    """One size per axis, where one may stand for all."""
    return (sizes,) * axes if isinstance(sizes, int) else tuple(sizes)


def scaled_and_shifted(call: Call, scale: AnyArray, shift: AnyArray) -> Op:
    """``x * scale + shift`` with constants that broadcast: numbers, or one per channel."""
    shape = call.outputs[0].shape
    if tuple(call.tensors[0].shape) != tuple(shape):
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
    per_channel = [np.broadcast_to(constant.reshape(-1), (channels,)) for constant in (scale, shift)]
    conv = affine.scale_shift(per_channel[0], per_channel[1], len(shape) - 2)
    return Affine(conv, axis, biased=bool(np.any(shift)))


def _varying_axis(constant: AnyArray, shape: Any) -> int | None:
    """The one axis (batch excepted) along which a broadcast constant changes, if it is one."""
    offset = len(shape) - constant.ndim
    axes = [offset + place for place, size in enumerate(constant.shape) if size > 1]
    if offset < 0 or len(axes) != 1 or axes[0] == 0 or shape[axes[0]] != constant.size:
        return None
    return axes[0]
