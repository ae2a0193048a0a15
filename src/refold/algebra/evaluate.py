"""Running an affine convolution with numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from refold.algebra.affine import AffineConv, Array


def evaluate(conv: AffineConv, x: npt.ArrayLike) -> Array:
    """``conv`` on ``x`` of shape ``(batch, channels, *space)``, in float64."""
    data = np.asarray(x, dtype=np.float64)
    sizes = tuple(
        max(window.output_size(size), 0) for window, size in zip(conv.windows, data.shape[2:], strict=True)
    )
    for axis, window in enumerate(conv.windows, start=2):
        index = window.stride * np.arange(sizes[axis - 2])[:, None] - window.before
        index = index + window.dilation * np.arange(window.taps)
        inside = (index >= 0) & (index < data.shape[axis])
        taken = np.take(data, np.clip(index, 0, data.shape[axis] - 1), axis=axis)
        shape = [1] * taken.ndim
        shape[axis : axis + 2] = index.shape
        # The taps of this axis go last: (batch, channels, *outputs so far, *space to come, *taps so far).
        data = np.moveaxis(np.where(inside.reshape(shape), taken, 0.0), axis + 1, -1)
    batch, taps = data.shape[0], len(conv.windows)
    grouped = data.reshape(batch, conv.groups, -1, *data.shape[2:])
    # (batch, group, in, *space, *taps) -> (group, batch, *space, in * taps)
    moved = np.moveaxis(grouped, 2, 2 + taps).reshape(batch, conv.groups, *sizes, -1)
    kernel = conv.kernel.reshape(conv.groups, -1, moved.shape[-1])
    out = np.einsum("bg...k,gok->bgo...", moved, kernel).reshape(batch, conv.channels_out, *sizes)
    result: Array = out + conv.bias.reshape(-1, *(1,) * taps)
    return result
