"""Layers and operations of Keras that take means, or maxima, of numbers of one channel: maps per channel pass
through them (see :class:`refold.graph.graph.Passage`)."""

from __future__ import annotations

from typing import Any

import keras

from refold.graph.graph import Op, Opaque
from refold.graph.passing import means, reduction
from refold.keras.reading import Entry, channel_axis
from refold.keras.trace import Call


def over_space(*, rising: bool) -> Entry:
    """Of a layer that takes the mean (or the maximum) over all positions."""

    def entry(call: Call) -> Op:
        rank = len(call.tensors[0].shape)
        axis = channel_axis(call.layer.data_format, rank)
        over = [place for place in range(1, rank) if place != axis]
        return Opaque("", passages=reduction(rank, over, keep=bool(call.layer.keepdims), rising=rising))

    return entry


def largest(call: Call) -> Op:
    """Of a layer or an operation that takes maxima over windows; what it pads is smaller than everything."""
    return Opaque("", passages=means(_axis(call), rising=True))


def upsampled(call: Call) -> Op:
    """Of a layer that repeats positions, or interpolates between them.

    TensorFlow interpolates in float32, whatever it is given: there is no reference to prove with that a map passes.
    """
    known = ("nearest",) if keras.config.backend() == "tensorflow" else ("nearest", "bilinear")
    if getattr(call.layer, "interpolation", "nearest") not in known:
        return Opaque()
    return Opaque("", passages=means(_axis(call)))


def reduced(*, rising: bool) -> Entry:
    """Of an operation that takes the mean (or the maximum) over some axes."""

    def entry(call: Call) -> Op:
        operation = call.operation
        over = operation.axis
        if over is None or len(call.tensors) != 1 or getattr(operation, "initial", None) is not None:
            return Opaque()
        axes = [over] if isinstance(over, int) else list(over)
        rank = len(call.tensors[0].shape)
        return Opaque("", passages=reduction(rank, axes, keep=bool(operation.keepdims), rising=rising))

    return entry


def _axis(call: Call) -> int:
    # An upsampling along one axis has no layout: its channels are last.
    layout: Any = getattr(call.operation, "data_format", "channels_last")
    return channel_axis(layout, len(call.tensors[0].shape))
