"""Paddle's pools, paddings and joins in the engine's words."""

from __future__ import annotations

from collections.abc import Sequence

from refold.algebra import affine
from refold.algebra.geometry import Window
from refold.graph.graph import Affine, Concat, Gain, Op, Opaque, Pad
from refold.graph.passing import means, reduction
from refold.paddle.convolution import windows_of
from refold.paddle.operands import Entry, Shape, Shapes, arguments, channel_axis, space_of
from refold.paddle.trace import Primitive
from refold.recording.symbols import Constant, Symbol

UNCOUNTED_PADDING = (
    "Paddle leaves padded positions out of the average (exclusive=True), so at the border it is no convolution"
)


# All of them interpolate between what is there, with weights that sum to one at the border as well.
INTERPOLATIONS = ("nearest_interp", "linear_interp", "bilinear_interp", "bicubic_interp", "trilinear_interp")


def pool(primitive: Primitive, shapes: Shapes) -> Op:
    """A pool: an average is a convolution where each window has its size."""
    tensor, taps, strides, paddings, ceil_mode, exclusive, layout, kind, whole, adaptive, algorithm = (
        primitive.args[:11]
    )
    if not isinstance(tensor, Symbol):
        return Opaque()
    shape = shapes(tensor)
    axis = channel_axis(layout, len(shape))
    if kind != "avg" or whole:
        return Opaque("", passages=means(axis, rising=kind != "avg"))
    space, channels = space_of(shape, axis), shape[axis]
    if channels is None or not all(isinstance(size, int) for size in (*taps, *strides)):
        return Opaque()
    if adaptive:
        return _adaptive_pool(taps, space, channels, axis)
    windows = windows_of(algorithm, taps, strides, (1,) * len(taps), paddings, space)
    padded = any(window.floating or window.before or window.after for window in windows)
    if padded and (exclusive or algorithm != "EXPLICIT"):
        return Opaque(UNCOUNTED_PADDING, passages=means(axis) if exclusive else tuple)
    if ceil_mode and any(
        size is None or (size - 1 + window.slack) % window.stride
        for size, window in zip(space, windows, strict=True)
    ):
        return Opaque(
            "it rounds its output size up (ceil_mode), so its last windows may be incomplete",
            passages=means(axis) if exclusive else tuple,
        )
    return Affine(affine.average_pool(channels, windows), axis, biased=False)


def _adaptive_pool(sizes: Sequence[int], space: Shape, channels: int, axis: int) -> Op:
    if all(wanted == size for wanted, size in zip(sizes, space, strict=True)):
        return Gain()
    if all(wanted == 1 for wanted in sizes):
        return Opaque(
            "", passages=means(axis)
        )  # a global average: as a convolution it would have a weight per position
    if any(size is None or size % wanted for wanted, size in zip(sizes, space, strict=True)):
        return Opaque(
            "its windows have different sizes, or the size of its input is not known", passages=means(axis)
        )
    steps = [(size or 1) // wanted for wanted, size in zip(sizes, space, strict=True)]
    windows = tuple(Window(step, step) for step in steps)
    return Affine(affine.average_pool(channels, windows), axis, biased=False)


def largest(primitive: Primitive, shapes: Shapes) -> Op:
    """A maximum over windows, channels first."""
    return Opaque("", passages=means(1, rising=True))


def interpolated(primitive: Primitive, shapes: Shapes) -> Op:
    """A resampling between what is there, with weights that sum to one at the border as well."""
    tensor, layout = primitive.args[0], primitive.args[4]
    if not isinstance(tensor, Symbol):
        return Opaque()
    return Opaque("", passages=means(channel_axis(layout, len(tensor.shape))))


def reduced(*, rising: bool) -> Entry:
    """A mean (or a maximum) over some axes."""

    def entry(primitive: Primitive, shapes: Shapes) -> Op:
        tensor, over, keep = arguments(primitive, "x", "axis", "keepdim")
        axes = [over] if isinstance(over, int) else over
        if not isinstance(tensor, Symbol) or not isinstance(axes, list | tuple) or not axes:
            return Opaque()
        if not all(isinstance(axis, int) for axis in axes):
            return Opaque()
        return Opaque("", passages=reduction(len(tensor.shape), axes, keep=bool(keep), rising=rising))

    return entry


def pad3d(primitive: Primitive, shapes: Shapes) -> Op:
    """A padding of the spatial axes."""
    tensor, paddings, mode, value, layout = primitive.args[:5]
    if mode != "constant":
        return Opaque(f"padding with '{mode}' is not a convolution at the border")
    if not isinstance(tensor, Symbol) or not all(isinstance(width, int) for width in paddings):
        return Opaque()
    rank = len(tensor.shape)
    axis = channel_axis(layout, rank)
    widths = [(0, 0)] * rank
    places = [place for place in range(rank) if place not in (0, axis)]
    for number, place in enumerate(reversed(places)):  # the last axis comes first
        widths[place] = int(paddings[2 * number]), int(paddings[2 * number + 1])
    return Pad(tuple(widths), float(value))


def pad(primitive: Primitive, shapes: Shapes) -> Op:
    """A padding of any axes."""
    tensor, paddings, value = primitive.args[:3]
    if not isinstance(tensor, Symbol) or not all(isinstance(width, int) for width in paddings):
        return Opaque()
    widths = tuple((int(paddings[2 * i]), int(paddings[2 * i + 1])) for i in range(len(tensor.shape)))
    if widths[0] != (0, 0) or isinstance(value, Constant):
        return Opaque("it pads the batch, or with a tensor")
    return Pad(widths, float(value))


def concat(primitive: Primitive, shapes: Shapes) -> Op:
    """Tensors one behind the other."""
    parts, axis = arguments(primitive, "x", "axis")
    axis = 0 if axis is None else axis
    if not isinstance(axis, int) or not all(isinstance(part, Symbol) for part in parts):
        return Opaque("it joins constants to a tensor")
    rank = len(primitive.outputs[0].shape)
    return Concat(axis % rank) if axis % rank else Opaque("it joins examples of the batch")
