"""Small maps with integer weights, so that float64 is exact and needs no tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from refold import algebra as real

# Asymmetric and negative ones too: where "before" and "after" are mixed up, symmetric padding shows nothing.
PADDINGS = ((0, 0), (1, 1), (1, 0), (0, 1), (2, 1), (-1, 0), (0, -1))


def windows(strides: tuple[int, ...] = (1, 2), paddings: tuple[tuple[int, int], ...] = PADDINGS) -> Iterator[Any]:
    """The geometries of one axis."""
    for taps, stride, dilation, (before, after) in product((1, 2, 3), strides, (1, 2), paddings):
        if taps > 1 or dilation == 1:
            yield real.Window(taps, stride, dilation, before, after)


def spread_windows() -> Iterator[Any]:
    """Geometries of transposed convolutions along one axis, and of what slices leave of them."""
    for taps, stride, dilation, spread in product((1, 2, 3, 4), (1, 2), (1, 2), (2, 3)):
        for before, after in ((0, 0), (1, 0), (0, 2), (2, 3), (3, 3), (-1, -1)):
            if taps > 1 or dilation == 1:
                yield real.Window(taps, stride, dilation, before, after, spread=spread)


def weights(taps: int, seed: int) -> list[float]:
    """No two alike and all of one sign: nothing cancels, nothing is symmetric."""
    return np.random.default_rng(seed).permutation(np.arange(1.0, 20.0))[:taps].tolist()


def conv(
    channels_in: int,
    channels_out: int,
    windows: tuple[Any, ...],
    groups: int = 1,
    bias: bool = True,
    seed: int = 0,
    algebra: Any = real,
) -> Any:
    """A map with weights other than 0."""
    draw = np.random.default_rng(seed)
    shape = (channels_out, channels_in // groups, *(w.taps for w in windows))
    kernel = draw.integers(1, 6, shape) * draw.choice([-1, 1], shape)
    offset = draw.integers(1, 6, channels_out) if bias else np.zeros(channels_out)
    return algebra.convolution(kernel, offset, tuple(windows), groups)


def x(channels: int, *space: int, seed: int = 9) -> np.ndarray:
    """A tensor of integers."""
    return np.random.default_rng(seed).integers(-9, 10, (channels, *space)).astype(float)
