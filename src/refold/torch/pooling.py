"""Entries of torch's pools, resampling and averages."""

from __future__ import annotations

from math import prod

from refold.algebra import affine
from refold.algebra.geometry import Window
from refold.graph.graph import Affine, Gain, Op, Opaque
from refold.graph.passing import means, reduction
from refold.recording.symbols import Symbol
from refold.torch.entries import Entry, Reader, arguments, per_axis
from refold.torch.trace import Step

UNCOUNTED_PADDING = (
    "it leaves padded positions out of the average (count_include_pad=False), so at the border it is no convolution"
)
INCOMPLETE = "it rounds its output size up (ceil_mode), so its last windows may be incomplete"

# All of them interpolate between what is there, with weights that sum to one at the border as well.
_INTERPOLATIONS = ("nearest", "nearest-exact", "linear", "bilinear", "bicubic", "trilinear", "area")


def average_pool(axes: int) -> Entry:
    """Of an average pooling over so many axes."""

    def entry(step: Step, reader: Reader) -> Op:
        tensor, taps, stride, padding, ceil_mode, counted, divisor = arguments(
            step, "input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override",
            padding=0, ceil_mode=False, count_include_pad=True,
        )  # fmt: skip
        if not isinstance(tensor, Symbol) or len(tensor.shape) != axes + 2:
            return Opaque()
        shape = reader.shape(tensor)
        channels, space = shape[1], shape[2:]
        sizes = per_axis(taps, axes)
        strides = sizes if stride is None or stride in ((), []) else per_axis(stride, axes)
        widths = per_axis(padding, axes)
        if channels is None:
            return Opaque()
        windows = tuple(
            Window(int(t), int(s), 1, int(p), int(p)) for t, s, p in zip(sizes, strides, widths, strict=True)
        )
        if any(window.before for window in windows) and not counted:
            return Opaque(UNCOUNTED_PADDING, passages=means(1) if divisor is None else tuple)
        if ceil_mode and any(
            size is None or (size - 1 + window.slack) % window.stride
            for size, window in zip(space, windows, strict=True)
        ):
            whole = divisor is None and not any(window.before for window in windows)
            return Opaque(INCOMPLETE, passages=means(1) if whole else tuple)
        conv = affine.average_pool(channels, windows)
        if divisor is not None:
            conv = conv.scaled(prod(window.taps for window in windows) / float(divisor))
        return Affine(conv, 1, biased=False)

    return entry


def adaptive_pool(axes: int) -> Entry:
    """Of an average pooling that is told the size of its output."""

    def entry(step: Step, reader: Reader) -> Op:
        tensor, wanted = arguments(step, "input", "output_size")
        if not isinstance(tensor, Symbol) or len(tensor.shape) != axes + 2:
            return Opaque()
        shape = reader.shape(tensor)
        channels, space = shape[1], shape[2:]
        sizes = [n if size is None else size for size, n in zip(per_axis(wanted, axes), space, strict=True)]
        if channels is None:
            return Opaque()
        if all(size == n and n is not None for size, n in zip(sizes, space, strict=True)):
            return Gain()
        if all(size == 1 for size in sizes):
            return Opaque(
                "", passages=means(1)
            )  # a global average: as a convolution it would have a weight per position
        if any(n is None or size is None or n % int(size) for size, n in zip(sizes, space, strict=True)):
            return Opaque(
                "its windows have different sizes, or the size of its input is not known", passages=means(1)
            )
        steps = [(n or 1) // int(size or 1) for size, n in zip(sizes, space, strict=True)]
        return Affine(affine.average_pool(channels, tuple(Window(n, n) for n in steps)), 1, biased=False)

    return entry


def max_pool(step: Step, reader: Reader) -> Op:
    """Of a maximum over windows; what it pads is smaller than everything."""
    (tensor,) = arguments(step, "input")
    if not isinstance(tensor, Symbol) or len(tensor.shape) != len(step.gives[0].shape):
        return Opaque()
    return Opaque("", passages=means(1, rising=True)) if len(tensor.shape) > 2 else Opaque()


def reduced(*, rising: bool) -> Entry:
    """Of a mean (or a maximum) over some axes."""

    def entry(step: Step, reader: Reader) -> Op:
        tensor, over, keep = arguments(step, "input", "dim", "keepdim", keepdim=False)
        if not isinstance(tensor, Symbol) or not isinstance(over, int | tuple | list) or isinstance(keep, Symbol):
            return Opaque()
        axes = [over] if isinstance(over, int) else list(over)
        if not axes or not all(isinstance(axis, int) for axis in axes):
            return Opaque()
        return Opaque("", passages=reduction(len(tensor.shape), axes, keep=bool(keep), rising=rising))

    return entry


def interpolate(step: Step, reader: Reader) -> Op:
    """Of a resampling."""
    tensor, mode = arguments(
        step, "input", "size", "scale_factor", "mode", wanted=("input", "mode"), mode="nearest"
    )
    if not isinstance(tensor, Symbol) or mode not in _INTERPOLATIONS:
        return Opaque()
    return Opaque("", passages=means(1))
