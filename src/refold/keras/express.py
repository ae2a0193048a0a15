"""Affine convolutions as plain Keras layers."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from refold.algebra.affine import AffineConv, Array, turned_around
from refold.algebra.geometry import Window, same
from refold.algebra.refusal import Refusal
from refold.keras.axes import CONV, DEPTHWISE
from refold.keras.transposed import transposed_padding

layers = keras.layers

_CONV = {1: layers.Conv1D, 2: layers.Conv2D, 3: layers.Conv3D}
_TRANSPOSED = {1: layers.Conv1DTranspose, 2: layers.Conv2DTranspose, 3: layers.Conv3DTranspose}
_DEPTHWISE = {1: layers.DepthwiseConv1D, 2: layers.DepthwiseConv2D}
_PADDING = {1: layers.ZeroPadding1D, 2: layers.ZeroPadding2D, 3: layers.ZeroPadding3D}
_CROPPING = {1: layers.Cropping1D, 2: layers.Cropping2D, 3: layers.Cropping3D}

Space = tuple[int | None, ...]


def helpers(conv: AffineConv, space: Space) -> int | Refusal:
    """How many layers beside the convolution Keras needs for it: a padding, a cropping."""
    axes = len(conv.windows)
    if conv.is_scale:
        return 0
    if axes > 3 and not (conv.is_pointwise and conv.groups == 1):
        return Refusal(f"Keras has no convolution over {axes} axes")
    if conv.is_transposed:
        if conv.groups > 1:
            return Refusal("Keras' transposed convolutions have no groups")
        said = transposed_padding(conv.windows) is not None
        return 0 if said else Refusal("no transposed convolution of Keras pads or crops its output like this")
    if any(window.stride > 1 for window in conv.windows) and any(window.dilation > 1 for window in conv.windows):
        return Refusal("Keras' convolutions have no stride together with dilation")
    strides = {window.stride for window in conv.windows}
    if _is_depthwise(conv) and len(strides) > 1:
        return Refusal("Keras' depthwise convolutions have one stride for all axes")
    if any(window.floating for window in conv.windows):
        everywhere = all(
            window.floating or window == same(window.taps, window.stride, window.dilation, None)
            for window in conv.windows
        )
        return 0 if everywhere else Refusal("Keras pads with 'same' on all axes or on none")
    if _padding_word(conv, space) is not None:
        return 0
    pads = any(window.before > 0 or window.after > 0 for window in conv.windows)
    crops = any(window.before < 0 or window.after < 0 for window in conv.windows)
    return int(pads) + int(crops)


def layers_for(
    conv: AffineConv,
    bias: Array | None,
    space: Space,
    *,
    channel_axis: int,
    rank: int,
    dense: bool,
    name: str,
    dtype: Any,
    activation: Any = None,
) -> list[Any]:
    """The layers that compute ``activation(conv(x) + bias)``, one after the other, the named one last.

    ``space`` are the spatial sizes of the input; ``dense`` prefers a Dense layer for pointwise maps.
    The layers are not built; :func:`set_weights` gives them their numbers once they are.
    """
    common = {"name": name, "dtype": dtype}
    axes = len(conv.windows)
    data_format = "channels_last" if channel_axis == rank - 1 else "channels_first"
    if conv.is_scale:
        return [*_scaling(conv, bias, rank, channel_axis, common), *_activation(activation, f"{name}_act", dtype)]
    fits_dense = conv.is_pointwise and conv.groups == 1 and channel_axis == rank - 1
    if fits_dense and (dense or axes not in _CONV):
        layer = layers.Dense(conv.channels_out, use_bias=bias is not None, activation=activation, **common)
        return [layer]
    settings = {
        "kernel_size": tuple(window.taps for window in conv.windows),
        "dilation_rate": tuple(window.dilation for window in conv.windows),
        "data_format": data_format,
        "use_bias": bias is not None,
        "activation": activation,
        **common,
    }
    if conv.is_transposed:
        said = transposed_padding(conv.windows)
        assert said is not None
        settings["padding"], settings["output_padding"] = said
        settings["strides"] = tuple(window.spread for window in conv.windows)
        return [_TRANSPOSED[axes](conv.channels_out, **settings)]
    word = "same" if any(window.floating for window in conv.windows) else _padding_word(conv, space)
    before = [] if word else _borders(conv.windows, data_format, name, dtype)
    settings["padding"] = word or "valid"
    settings["strides"] = tuple(window.stride for window in conv.windows)
    if _is_depthwise(conv):
        settings["depth_multiplier"] = conv.channels_out // conv.channels_in
        if axes == 1:
            for key in ("kernel_size", "strides", "dilation_rate"):
                settings[key] = settings[key][0]
        return [*before, _DEPTHWISE[axes](**settings)]
    return [*before, _CONV[axes](conv.channels_out, groups=conv.groups, **settings)]


def set_weights(made: list[Any], conv: AffineConv, bias: Array | None) -> None:
    """Store the numbers of ``conv`` in the last of its layers, rounded once to the layer's type."""
    layer = made[-1]
    if isinstance(layer, layers.Rescaling | layers.Activation):
        return
    if isinstance(layer, layers.Dense):
        kernel = conv.kernel.reshape(conv.kernel.shape[:2]).T
    elif isinstance(layer, layers.DepthwiseConv1D | layers.DepthwiseConv2D):
        kernel = DEPTHWISE.from_core(conv.kernel, conv.channels_in)
    elif conv.is_transposed:
        kernel = CONV.from_core(turned_around(conv.kernel, 1), 1)
    else:
        kernel = CONV.from_core(conv.kernel, conv.groups)
    layer.set_weights([kernel] if bias is None else [kernel, bias])


def _is_depthwise(conv: AffineConv) -> bool:
    return conv.groups == conv.channels_in > 1 and len(conv.windows) in _DEPTHWISE


def _padding_word(conv: AffineConv, space: Space) -> str | None:
    """The padding in Keras' words, if it has one for it at this size."""
    windows = conv.windows
    if not any(window.before or window.after for window in windows):
        return "valid"
    if all(
        window == same(window.taps, window.stride, window.dilation, size)
        for window, size in zip(windows, space, strict=True)
    ):
        return "same"
    if len(windows) == 1 and not _is_depthwise(conv):
        (window,) = windows
        if window.before == window.reach and window.after == 0:
            return "causal"
    return None


def _borders(windows: tuple[Window, ...], data_format: str, name: str, dtype: Any) -> list[Any]:
    axes = len(windows)
    borders = []
    for kinds, sign, word in ((_PADDING, 1, "pad"), (_CROPPING, -1, "crop")):
        widths = tuple((max(sign * w.before, 0), max(sign * w.after, 0)) for w in windows)
        if any(any(pair) for pair in widths):
            argument = widths[0] if axes == 1 else widths
            if kinds is _CROPPING and axes == 1:
                borders += _cropping_1d(argument, data_format, f"{name}_{word}", dtype)
            else:
                borders.append(kinds[axes](argument, data_format=data_format, name=f"{name}_{word}", dtype=dtype))
    return borders


def _cropping_1d(widths: Any, data_format: str, name: str, dtype: Any) -> list[Any]:
    # This one of Keras' layers knows no data format and crops the middle axis.
    crop = layers.Cropping1D(widths, name=name, dtype=dtype)
    if data_format == "channels_last":
        return [crop]
    to, back = (layers.Permute((2, 1), name=f"{name}_{way}", dtype=dtype) for way in ("to", "back"))
    return [to, crop, back]


def _scaling(
    conv: AffineConv, bias: Array | None, rank: int, channel_axis: int, common: dict[str, Any]
) -> list[Any]:
    shape = [-1 if axis == channel_axis else 1 for axis in range(1, rank)]
    shift = np.zeros(conv.channels_out) if bias is None else bias
    # Constants of a Rescaling are saved as numpy arrays, which have no bfloat16.
    stored = "float64" if keras.dtype_policies.get(common["dtype"]).variable_dtype == "float64" else "float32"
    scale, shift = (numbers.astype(stored).reshape(shape) for numbers in (conv.scale, shift))
    return [layers.Rescaling(scale, shift, **common)]


def _activation(activation: Any, name: str, dtype: Any) -> list[Any]:
    return [] if activation is None else [layers.Activation(activation, name=name, dtype=dtype)]
