"""A slow executor of affine convolutions by literal loops. It shares no code with the algebra: it reads the
plain fields of a map and does what the definition says."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def run(conv: Any, x: Array) -> Array:
    """``conv`` on ``x`` of shape ``(channels, *space)``; ``x`` is 0 outside."""
    space = x.shape[1:]
    sizes = []
    for n, w in zip(space, conv.windows, strict=True):
        before, after = (w.before, w.after) if not w.floating else tensorflow_same(n, w.taps, w.stride, w.dilation)
        reach = w.dilation * (w.taps - 1) + 1
        span = n + before + after - reach
        sizes.append(max(span // w.stride + 1, 0) if span >= 0 else 0)
    out = np.zeros((conv.channels_out, *sizes))
    per_out, per_in = conv.channels_out // conv.groups, conv.kernel.shape[1]
    for o in range(conv.channels_out):
        group = o // per_out
        for place in product(*(range(size) for size in sizes)):
            total = conv.bias[o]
            for c in range(per_in):
                for tap in product(*(range(w.taps) for w in conv.windows)):
                    source = []
                    for i, t, n, w in zip(place, tap, space, conv.windows, strict=True):
                        before = w.before if not w.floating else tensorflow_same(n, w.taps, w.stride, w.dilation)[0]
                        source.append(w.stride * i - before + w.dilation * t)
                    if all(0 <= s < n for s, n in zip(source, space, strict=True)):
                        total += conv.kernel[(o, c, *tap)] * x[(group * per_in + c, *source)]
            out[(o, *place)] = total
    return out


def tensorflow_same(n: int, taps: int, stride: int, dilation: int) -> tuple[int, int]:
    """TensorFlow's padding 'same': as its documentation writes it."""
    reach = (taps - 1) * dilation + 1
    total = max(reach - stride, 0) if n % stride == 0 else max(reach - n % stride, 0)
    return total // 2, total - total // 2


def padded(x: Array, widths: Any, value: Any) -> Array:
    """``x`` with more positions around it (or, negative, fewer)."""
    for axis, (before, after) in enumerate(widths, start=1):
        parts = [x]
        for place, width in ((0, before), (1, after)):
            if width > 0:
                shape = [width if i == axis else n for i, n in enumerate(x.shape)]
                filler = np.broadcast_to(np.reshape(value, (-1,) + (1,) * (x.ndim - 1)), shape)
                parts.insert(0 if place == 0 else len(parts), filler)
        x = np.concatenate(parts, axis=axis)
        cut = [slice(None)] * x.ndim
        cut[axis] = slice(max(-before, 0), x.shape[axis] - max(-after, 0))
        x = x[tuple(cut)]
    return x


def assert_same(one: Array, other: Array) -> None:
    """Equal shapes and equal numbers, to the last bit; NaN equals nothing."""
    assert one.shape == other.shape, (one.shape, other.shape)
    assert np.array_equal(one, other), np.abs(one - other).max()
