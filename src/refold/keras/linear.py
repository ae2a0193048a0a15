"""What Keras' layers are in the engine's words.

:data:`LAYERS` and :data:`refold.keras.operations.OPERATIONS` are the whole vocabulary. Each entry reads one
recorded step and returns what it is, or an opaque op with the reason where it is not linear as it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras.src import backend

from refold.algebra import affine
from refold.graph.batch_norm import batch_norm
from refold.graph.graph import Affine, Gain, Op, Opaque, Pad
from refold.keras import averages
from refold.keras.axes import CONV, DEPTHWISE, KernelAxes
from refold.keras.reading import (
    BATCH_STATISTICS,
    Entry,
    average_pooled,
    concatenated,
    dense_matrix,
    scaled_and_shifted,
    space_of,
    summed,
    windows_of,
)
from refold.keras.trace import AnyArray, Call
from refold.keras.transposed import transposed_windows

layers = keras.layers


def _weight(call: Call, variable: Any) -> AnyArray | None:
    """The value of a variable of the call's layer when it was recorded."""
    if variable is None:
        return None
    for own, value in zip(call.layer.weights, call.weights, strict=True):
        if own is variable:
            return value
    # Not a stored variable but computed from several (a low-rank addition, say).
    return np.asarray(backend.convert_to_numpy(variable))


def _required(call: Call, variable: Any) -> AnyArray:
    value = _weight(call, variable)
    assert value is not None
    return value


def _channel_axis(layer: Any, rank: int) -> int:
    return rank - 1 if getattr(layer, "data_format", "channels_last") == "channels_last" else 1


def _kernel_op(
    call: Call, kernel: Any, bias: Any, layout: KernelAxes, groups: int, padding: str, strides: Any, dilations: Any
) -> Op:
    shape = call.tensors[0].shape
    axis = _channel_axis(call.layer, len(shape))
    core = layout.to_core(_required(call, kernel))
    windows = windows_of(padding, core.shape[2:], strides, dilations, space_of(shape, axis))
    return Affine(affine.convolution(core, _weight(call, bias), windows, groups), axis, bias is not None)


def _conv(call: Call) -> Op:
    layer = call.layer
    return _kernel_op(
        call, layer.kernel, layer.bias, CONV, layer.groups, layer.padding, layer.strides, layer.dilation_rate
    )


def _conv_transpose(call: Call) -> Op:
    layer = call.layer
    kernel = CONV.to_core(_required(call, layer.kernel))  # (in, out, *taps), for the two are the other way round
    windows = transposed_windows(
        kernel.shape[2:], layer.strides, layer.dilation_rate, layer.padding, layer.output_padding
    )
    conv = affine.transposed_convolution(kernel, _weight(call, layer.bias), windows)
    return Affine(conv, _channel_axis(layer, kernel.ndim), layer.bias is not None)


def _depthwise(call: Call) -> Op:
    layer = call.layer
    channels = layer.kernel.shape[-2]
    return _kernel_op(
        call, layer.kernel, layer.bias, DEPTHWISE, channels, layer.padding, layer.strides, layer.dilation_rate
    )


def _separable(call: Call) -> Op:
    layer = call.layer
    if call.part == "depthwise":
        kernel = layer.depthwise_kernel
        return _kernel_op(
            call, kernel, None, DEPTHWISE, kernel.shape[-2], layer.padding, layer.strides, layer.dilation_rate
        )
    ones = (1,) * (len(call.outputs[0].shape) - 2)
    return _kernel_op(call, layer.pointwise_kernel, layer.bias, CONV, 1, "valid", ones, ones)


def _dense(call: Call) -> Op:
    rank = len(call.outputs[0].shape)
    matrix = np.asarray(_required(call, call.layer.kernel), dtype=np.float64).T
    bias = _weight(call, call.layer.bias)
    return Affine(affine.dense(matrix, bias, rank - 2), rank - 1, bias is not None)


def _einsum_dense(call: Call) -> Op:
    layer = call.layer
    matrix = dense_matrix(layer.equation, _required(call, layer.kernel))
    bias = _weight(call, layer.bias)
    if matrix is None or (bias is not None and bias.size != matrix.shape[0]):
        return Opaque(f"the equation '{layer.equation}' is not that of a dense layer")
    rank = len(call.outputs[0].shape)
    flat = None if bias is None else bias.reshape(-1)
    return Affine(affine.dense(matrix, flat, rank - 2), rank - 1, bias is not None)


def _batch_norm(call: Call) -> Op:
    layer = call.layer
    if call.kwargs.get("training"):
        return Opaque(BATCH_STATISTICS)
    if layer.renorm:
        return Opaque("batch renormalization is not read")
    return batch_norm(
        _required(call, layer.moving_mean),
        _required(call, layer.moving_variance),
        layer.epsilon,
        _weight(call, layer.gamma),
        _weight(call, layer.beta),
        layer.axis,
        len(call.outputs[0].shape),
    )


def _merge(factors: Callable[[int], tuple[float, ...]]) -> Entry:
    def entry(call: Call) -> Op:
        return summed(call, factors(len(call.tensors)))

    return entry


def _concat_layer(call: Call) -> Op:
    return concatenated(call, call.layer.axis)


def _average_pool_layer(call: Call) -> Op:
    layer = call.layer
    axis = _channel_axis(layer, len(call.outputs[0].shape))
    return average_pooled(call, layer.pool_size, layer.strides, layer.padding, axis)


def _padding_layer(sign: int, attribute: str) -> Entry:
    def entry(call: Call) -> Op:
        widths = getattr(call.layer, attribute)
        rank = len(call.outputs[0].shape)
        if rank == 3:
            widths = (widths,)
        axis = _channel_axis(call.layer, rank)
        pairs = iter(widths)
        per_axis = [(0, 0) if place in (0, axis) else next(pairs) for place in range(rank)]
        return Pad(tuple((sign * before, sign * after) for before, after in per_axis))

    return entry


def _rescaling(call: Call) -> Op:
    scale, offset = np.asarray(call.layer.scale), np.asarray(call.layer.offset)
    return scaled_and_shifted(call, scale, offset)


def _normalization(call: Call) -> Op:
    layer = call.layer
    if layer.invert or layer.mean is None:
        return Opaque("its statistics are not fixed, or it works backwards")
    mean = np.asarray(backend.convert_to_numpy(layer.mean), dtype=np.float64)
    deviation = np.sqrt(np.asarray(backend.convert_to_numpy(layer.variance), dtype=np.float64))
    scale = 1.0 / np.maximum(deviation, keras.config.epsilon())
    return scaled_and_shifted(call, scale, -mean * scale)


def _nothing(call: Call) -> Op:
    """A layer that does nothing in inference."""
    return Opaque("it acts at random in inference too") if call.kwargs.get("training") else Gain()


def _equal_factors(count: int) -> tuple[float, ...]:
    return (1.0,) * count


LAYERS: dict[type[Any], Entry] = {
    layers.Conv1D: _conv,
    layers.Conv2D: _conv,
    layers.Conv3D: _conv,
    layers.Conv1DTranspose: _conv_transpose,
    layers.Conv2DTranspose: _conv_transpose,
    layers.Conv3DTranspose: _conv_transpose,
    layers.DepthwiseConv1D: _depthwise,
    layers.DepthwiseConv2D: _depthwise,
    layers.SeparableConv1D: _separable,
    layers.SeparableConv2D: _separable,
    layers.Dense: _dense,
    layers.EinsumDense: _einsum_dense,
    layers.BatchNormalization: _batch_norm,
    layers.Add: _merge(_equal_factors),
    layers.Average: _merge(lambda count: (1.0 / count,) * count),
    layers.Subtract: _merge(lambda count: (1.0, -1.0)),
    layers.Concatenate: _concat_layer,
    layers.AveragePooling1D: _average_pool_layer,
    layers.AveragePooling2D: _average_pool_layer,
    layers.AveragePooling3D: _average_pool_layer,
    layers.GlobalAveragePooling1D: averages.over_space(rising=False),
    layers.GlobalAveragePooling2D: averages.over_space(rising=False),
    layers.GlobalAveragePooling3D: averages.over_space(rising=False),
    layers.GlobalMaxPooling1D: averages.over_space(rising=True),
    layers.GlobalMaxPooling2D: averages.over_space(rising=True),
    layers.GlobalMaxPooling3D: averages.over_space(rising=True),
    layers.MaxPooling1D: averages.largest,
    layers.MaxPooling2D: averages.largest,
    layers.MaxPooling3D: averages.largest,
    layers.UpSampling1D: averages.upsampled,
    layers.UpSampling2D: averages.upsampled,
    layers.UpSampling3D: averages.upsampled,
    layers.ZeroPadding1D: _padding_layer(1, "padding"),
    layers.ZeroPadding2D: _padding_layer(1, "padding"),
    layers.ZeroPadding3D: _padding_layer(1, "padding"),
    layers.Cropping1D: _padding_layer(-1, "cropping"),
    layers.Cropping2D: _padding_layer(-1, "cropping"),
    layers.Cropping3D: _padding_layer(-1, "cropping"),
    layers.Rescaling: _rescaling,
    layers.Normalization: _normalization,
    layers.Dropout: _nothing,
    layers.SpatialDropout1D: _nothing,
    layers.SpatialDropout2D: _nothing,
    layers.SpatialDropout3D: _nothing,
    layers.AlphaDropout: _nothing,
    layers.GaussianDropout: _nothing,
    layers.GaussianNoise: _nothing,
    layers.ActivityRegularization: _nothing,
    layers.Identity: _nothing,
}

REARRANGING_LAYERS: tuple[type[Any], ...] = (layers.Permute, layers.Reshape, layers.Flatten)
