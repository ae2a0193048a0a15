"""Running an affine convolution with numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from refold.algebra.affine import AffineConv, Array
from refold.algebra.geometry import Window, same


def evaluate(conv: AffineConv, x: npt.ArrayLike) -> Array:
    """``conv`` on ``x`` of shape ``(batch, channels, *space)``, in float64.

    Raises ValueError if ``x`` has other channels or axes than ``conv`` reads.
    """
    data = np.asarray(x, dtype=np.float64)
    axes = len(conv.windows)
    if data.ndim != axes + 2 or data.shape[1] != conv.channels_in:
        raise ValueError(
            f"an array of shape {data.shape} is not (batch, {conv.channels_in} channels, *{axes} spatial axes)"
        )
    windows = [_at_size(window, size) for window, size in zip(conv.windows, data.shape[2:], strict=True)]
    sizes = [max(window.output_size(size), 0) for window, size in zip(windows, data.shape[2:], strict=True)]
    for axis, (window, outputs) in enumerate(zip(windows, sizes, strict=True), start=2):
        if window.spread > 1:
            data = _with_zeros_between(data, axis, window.spread)
        # One zero in front stands for all that lies outside.
        wide = np.concatenate([np.zeros((*data.shape[:axis], 1, *data.shape[axis + 1 :])), data], axis=axis)
        index = window.stride * np.arange(outputs)[:, None] - window.before
        index = index + window.dilation * np.arange(window.taps)
        index = np.where((index >= 0) & (index < data.shape[axis]), index + 1, 0)
        # The taps of this axis go last: (batch, channels, *outputs so far, *space to come, *taps so far).
        data = np.moveaxis(np.take(wide, index, axis=axis), axis + 1, -1)
    batch = data.shape[0]
    per_group = conv.channels_in // conv.groups
    patches = data.reshape(batch, conv.groups, per_group, *data.shape[2:])
    # (batch, group, in, *outputs, *taps) -> (group, batch * outputs, in * taps): one product for each group
    patches = np.moveaxis(patches, (1, 2), (0, 2 + axes))
    count = int(np.prod(sizes))
    rows = conv.kernel.reshape(conv.groups, conv.channels_out // conv.groups, per_group * conv.taps)
    product = patches.reshape(conv.groups, batch * count, per_group * conv.taps) @ rows.swapaxes(1, 2)
    product = product.reshape(conv.groups, batch, count, conv.channels_out // conv.groups)
    out = product.transpose(1, 0, 3, 2).reshape(batch, conv.channels_out, *sizes)
    result: Array = out + conv.bias.reshape(-1, *(1,) * axes)
    return result


def _with_zeros_between(data: Array, axis: int, spread: int) -> Array:
    size = spread * (data.shape[axis] - 1) + 1
    wide = np.zeros((*data.shape[:axis], max(size, 0), *data.shape[axis + 1 :]))
    wide[(slice(None),) * axis + (slice(None, None, spread),)] = data
    return wide


def _at_size(window: Window, size: int) -> Window:
    return same(window.taps, window.stride, window.dilation, size) if window.floating else window
