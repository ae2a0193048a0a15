"""What the words mean, by literal loops in float64.

Nothing here shares code with the algebra: an affine convolution is read by its plain fields, and every
function does what the definition says. Tensors are ``(channels, *space)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def run(conv: Any, x: Array) -> Array:
    """``conv`` on ``x``, which is 0 outside, and 0 between its elements where a window spreads them."""
    spreads = [window.spread for window in conv.windows]
    value = {
        (channel, *(i * spread for i, spread in zip(place, spreads, strict=True))): float(number)
        for (channel, *place), number in np.ndenumerate(x)
    }
    windows = [_placed(window, size) for window, size in zip(conv.windows, x.shape[1:], strict=True)]
    sizes = [output_size(window, size) for window, size in zip(conv.windows, x.shape[1:], strict=True)]
    out = np.zeros((conv.channels_out, *(max(size, 0) for size in sizes)))
    per_out, per_in = conv.channels_out // conv.groups, conv.kernel.shape[1]
    for o in range(conv.channels_out):
        first = o // per_out * per_in
        weights = list(np.ndenumerate(conv.kernel[o]))
        for place in product(*(range(size) for size in out.shape[1:])):
            total = float(conv.bias[o])
            for (c, *tap), weight in weights:
                source = [w[0] * i - w[2] + w[1] * t for w, i, t in zip(windows, place, tap, strict=True)]
                total += weight * value.get((first + c, *source), 0.0)
            out[(o, *place)] = total
    return out


def output_size(window: Any, size: int) -> int:
    """How often the taps fit into the padded axis; negative where it is too short for that to mean anything."""
    _, _, before, after = _placed(window, size)
    reach = window.dilation * (window.taps - 1) + 1
    return ((size - 1) * window.spread + 1 + before + after - reach) // window.stride + 1


def matrix(window: Any, weights: Sequence[float], size: int) -> Array:
    """One channel along one axis as a matrix: the response to each unit impulse, in columns."""
    stride, dilation, before, _ = _placed(window, size)
    out = np.zeros((max(output_size(window, size), 0), size))
    for i in range(out.shape[0]):
        for t, weight in enumerate(weights):
            place = stride * i - before + dilation * t
            if place % window.spread == 0 and 0 <= place // window.spread < size:
                out[i, place // window.spread] += weight
    return out


def tensorflow_same(size: int, taps: int, stride: int, dilation: int) -> tuple[int, int]:
    """TensorFlow's padding 'same', as its documentation writes it."""
    reach = (taps - 1) * dilation + 1
    total = max(reach - stride, 0) if size % stride == 0 else max(reach - size % stride, 0)
    return total // 2, total - total // 2


def padded(x: Array, widths: Sequence[tuple[int, int]], value: Any = 0.0) -> Array:
    """``x`` with more positions around it (or, negative, fewer); ``value`` is one number or one per channel."""
    fill = np.broadcast_to(np.asarray(value, dtype=float), x.shape[0])
    out = np.zeros((x.shape[0], *(n + a + b for n, (a, b) in zip(x.shape[1:], widths, strict=True))))
    for channel, *place in np.ndindex(*out.shape):
        source = [i - before for i, (before, _) in zip(place, widths, strict=True)]
        inside = all(0 <= i < n for i, n in zip(source, x.shape[1:], strict=True))
        out[(channel, *place)] = x[(channel, *source)] if inside else fill[channel]
    return out


def picked(x: Array, channels: Sequence[int]) -> Array:
    """The channels ``channels`` of ``x``, in that order."""
    out = np.zeros((len(channels), *x.shape[1:]))
    for row, channel in enumerate(channels):
        out[row] = x[channel]
    return out


def joined(parts: Sequence[Array]) -> Array:
    """The channels of all ``parts``, one after the other."""
    rows = [row for part in parts for row in part]
    out = np.zeros((len(rows), *parts[0].shape[1:]))
    for channel, row in enumerate(rows):
        out[channel] = row
    return out


def total(parts: Sequence[Array]) -> Array:
    """The sum of tensors of one shape."""
    assert len({part.shape for part in parts}) == 1, [part.shape for part in parts]
    out = np.zeros_like(parts[0])
    for place in np.ndindex(*out.shape):
        out[place] = sum(part[place] for part in parts)
    return out


def average_pool(x: Array, windows: Sequence[Any]) -> Array:
    """The mean of each window, zeros that were padded counted."""
    sizes = [output_size(window, n) for window, n in zip(windows, x.shape[1:], strict=True)]
    out = np.zeros((x.shape[0], *sizes))
    for channel, *place in np.ndindex(*out.shape):
        seen = []
        for tap in product(*(range(window.taps) for window in windows)):
            source = [w.stride * i - w.before + w.dilation * t for w, i, t in zip(windows, place, tap, strict=True)]
            inside = all(0 <= i < n for i, n in zip(source, x.shape[1:], strict=True))
            seen.append(x[(channel, *source)] if inside else 0.0)
        out[(channel, *place)] = sum(seen) / len(seen)
    return out


def batch_norm(x: Array, mean: Any, variance: Any, epsilon: float, gamma: Any, beta: Any) -> Array:
    """Batch normalization with stored statistics, one element at a time."""
    out = np.zeros_like(x)
    for channel, *place in np.ndindex(*x.shape):
        centered = x[(channel, *place)] - mean[channel]
        out[(channel, *place)] = centered / (variance[channel] + epsilon) ** 0.5 * gamma[channel] + beta[channel]
    return out


def assert_same(one: Array, other: Array) -> None:
    """Equal shapes and equal numbers, to the last bit; NaN equals nothing."""
    assert one.shape == other.shape, (one.shape, other.shape)
    assert np.array_equal(one, other), np.abs(one - other).max()


def assert_close(one: Array, other: Array, terms: int = 1) -> None:
    """Equal shapes, and numbers as near as float64 gets when ``terms`` of them are added; NaN is near nothing."""
    assert one.shape == other.shape, (one.shape, other.shape)
    assert np.isfinite(one).all()
    assert np.isfinite(other).all()
    largest = np.abs(other).max(initial=1.0)
    assert np.all(np.abs(one - other) <= 4 * terms * np.finfo(float).eps * largest), np.abs(one - other).max()


def _placed(window: Any, size: int) -> tuple[int, int, int, int]:
    """Stride, dilation, padding before and after."""
    padding = (window.before, window.after)
    if window.floating:
        padding = tensorflow_same(size, window.taps, window.stride, window.dilation)
    return window.stride, window.dilation, *padding
