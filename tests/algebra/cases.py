"""The geometry grid: small maps with integer weights, so that float64 is exact and needs no tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from refold.algebra import AffineConv, Window

SIZES = range(1, 9)


def conv(
    channels_in: int,
    channels_out: int,
    windows: tuple[Window, ...],
    groups: int = 1,
    bias: bool = True,
    seed: int = 0,
) -> AffineConv:
    draw = np.random.default_rng(seed)
    shape = (channels_out, channels_in // groups, *(w.taps for w in windows))
    kernel = draw.integers(1, 6, shape) * draw.choice([-1, 1], shape)
    offset = draw.integers(1, 6, channels_out) if bias else np.zeros(channels_out)
    return AffineConv(kernel.astype(float), offset.astype(float), windows, groups)


def windows() -> Iterator[Window]:
    for taps, stride, dilation, before, after in product((1, 2, 3), (1, 2), (1, 2), (-1, 0, 1, 2), (0, 1)):
        if taps > 1 or dilation == 1:
            yield Window(taps, stride, dilation, before, after)


def x(channels: int, *space: int, seed: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9, 10, (channels, *space)).astype(float)
