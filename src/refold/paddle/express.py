"""Affine convolutions as plain Paddle layers."""

from __future__ import annotations

from typing import Any

import paddle

from refold.algebra import geometry
from refold.algebra.affine import AffineConv, Array, turned_around
from refold.algebra.geometry import Window, same
from refold.algebra.refusal import Refusal
from refold.paddle.axes import dense_weight, layout
from refold.paddle.perform import rounded

nn = paddle.nn

_CONV = {1: nn.Conv1D, 2: nn.Conv2D, 3: nn.Conv3D}
_TRANSPOSED = {1: nn.Conv1DTranspose, 2: nn.Conv2DTranspose, 3: nn.Conv3DTranspose}
_NORM = {0: nn.BatchNorm1D, 1: nn.BatchNorm1D, 2: nn.BatchNorm2D, 3: nn.BatchNorm3D}

Space = tuple[int | None, ...]

UNSAID = "no transposed convolution of Paddle pads or crops its output like this"


def helpers(conv: AffineConv, space: Space) -> int | Refusal:
    """How many operators beside the convolution Paddle needs for it: a cropping."""
    axes = len(conv.windows)
    if axes > 3 and not (conv.is_pointwise and conv.groups == 1):
        return Refusal(f"Paddle has no convolution over {axes} axes")
    if conv.is_scale:
        return 0
    if axes == 0 and conv.groups > 1:
        return Refusal("Paddle has no dense layer with groups")
    floating = [window for window in conv.windows if window.floating]
    if floating:
        if any(window.dilation > 1 for window in floating):
            return Refusal("Paddle does not dilate where it pads with 'SAME'")
        if not all(_is_same(window) for window in conv.windows):
            return Refusal("Paddle pads with 'SAME' on all axes or on none")
    if conv.is_transposed:
        return 0 if all(_is_said_transposed(window) for window in conv.windows) else Refusal(UNSAID)
    return int(any(window.before < 0 or window.after < 0 for window in conv.windows))


def _is_said_transposed(window: Window) -> bool:
    """Whether Paddle's transposed convolution has such a window: it crops before, and adds less than a step
    behind."""
    before, after = geometry.crop(window)
    return window.stride == 1 and before >= 0 and -after < max(window.spread, window.dilation)


def crops(conv: AffineConv) -> tuple[tuple[int, int], ...]:
    """The positions that are cut off, per spatial axis, before Paddle's convolution."""
    if conv.is_transposed:
        return ((0, 0),) * len(conv.windows)
    return tuple((max(-window.before, 0), max(-window.after, 0)) for window in conv.windows)


def layer_for(
    conv: AffineConv, bias: Array | None, *, channel_axis: int, dense: bool, dtype: str, trainable: bool
) -> Any:
    """The layer that computes ``conv(x) + bias``, with its numbers rounded once to ``dtype``.

    ``channel_axis`` is 1 or the last one; ``dense`` prefers a Linear for pointwise maps.
    """
    axes = len(conv.windows)
    if conv.is_scale:
        layer = _norm(conv, bias, axes, channel_axis)
    elif conv.is_pointwise and conv.groups == 1 and channel_axis == axes + 1 and (dense or axes not in _CONV):
        layer = nn.Linear(conv.channels_in, conv.channels_out, bias_attr=None if bias is not None else False)
    else:
        sizes = (conv.channels_in, conv.channels_out, [window.taps for window in conv.windows])
        settings = {
            "dilation": [window.dilation for window in conv.windows],
            "groups": conv.groups,
            "bias_attr": None if bias is not None else False,
            "data_format": layout(axes, channel_axis),
        }
        if conv.is_transposed:
            settings["stride"] = [window.spread for window in conv.windows]
            settings |= _cropping([geometry.crop(window) for window in conv.windows], conv.windows)
            layer = _TRANSPOSED[axes](*sizes, **settings)
        else:
            settings["stride"] = [window.stride for window in conv.windows]
            settings["padding"] = _padding(conv.windows)
            layer = _CONV[axes](*sizes, **settings)
    if dtype != "float32":
        layer.to(dtype=dtype)
    _set(layer, conv, bias, dtype)
    for parameter in layer.parameters():
        parameter.stop_gradient = not trainable
    layer.eval()
    return layer


def _set(layer: Any, conv: AffineConv, bias: Array | None, dtype: str) -> None:
    if conv.is_scale:
        weight = conv.scale
    elif isinstance(layer, nn.Linear):
        weight = dense_weight(conv)
    else:
        weight = turned_around(conv.kernel, conv.groups) if conv.is_transposed else conv.kernel
    layer.weight.set_value(rounded(weight, dtype))
    if bias is not None:
        layer.bias.set_value(rounded(bias, dtype))


def _norm(conv: AffineConv, bias: Array | None, axes: int, channel_axis: int) -> Any:
    """A factor and a shift per channel: a batch norm of mean 0 and variance 1, training or not.

    Its epsilon is 0 and the root of 1 is exact, so nothing is rounded."""
    return _NORM[axes](
        conv.channels_out,
        epsilon=0.0,
        bias_attr=None if bias is not None else False,
        data_format=layout(axes, channel_axis),
        use_global_stats=True,
    )


def _padding(windows: tuple[Window, ...]) -> Any:
    if any(window.floating for window in windows):
        return "SAME"
    widths = [(max(window.before, 0), max(window.after, 0)) for window in windows]
    if all(before == after for before, after in widths):
        return [before for before, _ in widths]
    return [width for pair in widths for width in pair]


def _cropping(widths: list[tuple[int, int]], windows: tuple[Window, ...]) -> dict[str, Any]:
    """How a transposed convolution is told what to crop: the same on both sides if it can be."""
    more = [before - after for before, after in widths]
    if all(0 <= n < max(window.spread, window.dilation) for n, window in zip(more, windows, strict=True)):
        return {"padding": [before for before, _ in widths], "output_padding": more}
    both = [width for before, after in widths for width in (before, max(after, 0))]
    return {"padding": both, "output_padding": [max(-after, 0) for _, after in widths]}


def _is_same(window: Window) -> bool:
    return window.floating or window == same(window.taps, window.stride, window.dilation, None)


def shift_shape(channels: int, channel_axis: int, rank: int) -> list[int]:
    """The shape in which a number per channel broadcasts."""
    return [channels if axis == channel_axis else 1 for axis in range(rank)]
