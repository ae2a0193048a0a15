"""What Keras' layers and operations are in the engine's words.

:data:`LAYERS` and :data:`OPERATIONS` are the whole vocabulary. Each entry reads one recorded step and
returns what it is, or an opaque op with the reason where it is not linear as it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras.src import backend
from keras.src.ops import core as core_ops
from keras.src.ops import nn as nn_ops
from keras.src.ops import numpy as numpy_ops

from refold.algebra import affine, geometry
from refold.algebra.affine import AffineConv, Array
from refold.algebra.geometry import Window
from refold.graph.batch_norm import batch_norm
from refold.graph.graph import Affine, Concat, Gain, Op, Opaque, Pad, Sum
from refold.keras.axes import CONV, DEPTHWISE, KernelAxes
from refold.keras.trace import AnyArray, Call, Constant
from refold.keras.transposed import transposed_windows

layers = keras.layers

Entry = Callable[[Call], Op]

BATCH_STATISTICS = "it normalizes with the statistics of the batch"
UNCOUNTED_PADDING = "Keras leaves padded positions out of the average, so at the border it is no convolution"


# ---- layers --------------------------------------------------------------------------------------


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


def _space(shape: Any, axis: int) -> tuple[Any, ...]:
    return tuple(size for place, size in enumerate(shape) if place not in (0, axis))


def _windows(
    padding: str, taps: Any, strides: Any, dilations: Any, space: tuple[int | None, ...]
) -> tuple[Window, ...]:
    windows = []
    for t, s, d, size in zip(taps, strides, dilations, space, strict=True):
        match padding:
            case "same":
                windows.append(geometry.same(t, s, d, size))
            case "causal":
                windows.append(Window(t, s, d, before=d * (t - 1)))
            case _:
                windows.append(Window(t, s, d))
    return tuple(windows)


def _kernel_op(
    call: Call, kernel: Any, bias: Any, layout: KernelAxes, groups: int, padding: str, strides: Any, dilations: Any
) -> Op:
    shape = call.tensors[0].shape
    axis = _channel_axis(call.layer, len(shape))
    core = layout.to_core(_required(call, kernel))
    windows = _windows(padding, core.shape[2:], strides, dilations, _space(shape, axis))
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


def _dense_matrix(equation: str, kernel: AnyArray) -> Array | None:
    """The matrix ``(out, in)`` of an einsum that maps the last axis of its first operand, else None."""
    operands, _, result = equation.replace(" ", "").partition("->")
    data, _, weights = operands.partition(",")
    if len(weights) != 2 or not data or not result or data[:-1] != result[:-1]:
        return None
    inner, outer = data[-1], result[-1]
    if inner == outer or inner in data[:-1] or outer in data:
        return None
    matrix = np.asarray(kernel, dtype=np.float64)
    if weights == inner + outer:
        return matrix.T
    return matrix if weights == outer + inner else None


def _einsum_dense(call: Call) -> Op:
    layer = call.layer
    matrix = _dense_matrix(layer.equation, _required(call, layer.kernel))
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
        return _sum(call, factors(len(call.tensors)))

    return entry


def _sum(call: Call, factors: tuple[float, ...]) -> Op:
    shape = tuple(call.outputs[0].shape)
    if any(tuple(tensor.shape) != shape for tensor in call.tensors):
        return Opaque("the sum broadcasts")
    return Sum(factors)


def _concat_layer(call: Call) -> Op:
    return _concat(call, call.layer.axis)


def _concat(call: Call, axis: int) -> Op:
    if not all(isinstance(leaf, keras.KerasTensor) for leaf in keras.tree.flatten(call.args)):
        return Opaque("it joins constants to a tensor")
    rank = len(call.outputs[0].shape)
    return Concat(axis % rank) if axis % rank else Opaque("it joins examples of the batch")


def _average_pool_layer(call: Call) -> Op:
    layer = call.layer
    axis = _channel_axis(layer, len(call.outputs[0].shape))
    return _average_pool(call, layer.pool_size, layer.strides, layer.padding, axis)


def _average_pool(call: Call, pool_size: Any, strides: Any, padding: str, axis: int) -> Op:
    shape = call.tensors[0].shape
    space = _space(shape, axis)
    taps = _per_axis(pool_size, len(space))
    steps = _per_axis(strides if strides is not None else pool_size, len(space))
    windows = _windows(padding, taps, steps, (1,) * len(space), space)
    if any(window.floating or window.before or window.after for window in windows):
        return Opaque(UNCOUNTED_PADDING)
    return Affine(affine.average_pool(shape[axis], windows), axis, biased=False)


def _per_axis(sizes: Any, axes: int) -> tuple[int, ...]:
    return (sizes,) * axes if isinstance(sizes, int) else tuple(sizes)


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
    return _scale_shift(call, scale, offset)


def _normalization(call: Call) -> Op:
    layer = call.layer
    if layer.invert or layer.mean is None:
        return Opaque("its statistics are not fixed, or it works backwards")
    mean = np.asarray(backend.convert_to_numpy(layer.mean), dtype=np.float64)
    deviation = np.sqrt(np.asarray(backend.convert_to_numpy(layer.variance), dtype=np.float64))
    scale = 1.0 / np.maximum(deviation, keras.config.epsilon())
    return _scale_shift(call, scale, -mean * scale)


def _scale_shift(call: Call, scale: AnyArray, shift: AnyArray) -> Op:
    """``x * scale + shift`` with constants that broadcast: numbers, or one per channel."""
    shape = call.outputs[0].shape
    if tuple(call.tensors[0].shape) != tuple(shape):
        return Opaque("a constant widens the tensor")
    scale, shift = np.asarray(scale, dtype=np.float64), np.asarray(shift, dtype=np.float64)
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return Opaque("a constant is not finite")
    if scale.size == shift.size == 1:
        return Gain(float(scale.reshape(())), float(shift.reshape(())))
    axes = {_varying_axis(constant, shape) for constant in (scale, shift) if constant.size > 1}
    axis = axes.pop()
    if axes or axis is None:
        return Opaque("a constant that is not one number per channel is not a convolution")
    channels = shape[axis]
    per_channel = [np.broadcast_to(constant.reshape(-1), (channels,)) for constant in (scale, shift)]
    conv = affine.scale_shift(per_channel[0], per_channel[1], len(shape) - 2)
    return Affine(conv, axis, biased=bool(np.any(shift)))


def _varying_axis(constant: AnyArray, shape: Any) -> int | None:
    """The one axis (batch excepted) along which a broadcast constant changes, if it is one."""
    offset = len(shape) - constant.ndim
    axes = [offset + place for place, size in enumerate(constant.shape) if size > 1]
    if offset < 0 or len(axes) != 1 or axes[0] == 0 or shape[axes[0]] != constant.size:
        return None
    return axes[0]


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


# ---- operations ----------------------------------------------------------------------------------


def _constant(argument: Any) -> AnyArray | None:
    if isinstance(argument, Constant):
        return argument.value
    if isinstance(argument, bool | int | float | np.number):
        return np.asarray(argument)
    return None


def _arguments(call: Call, *names: str) -> list[Any]:
    """The arguments of an operation in the order of ``names``, however they were given."""
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    return [given.get(name) for name in names]


def _is_tensor(argument: Any) -> bool:
    return isinstance(argument, keras.KerasTensor)


def _add(call: Call) -> Op:
    first, second = _arguments(call, "x1", "x2")
    if _is_tensor(first) and _is_tensor(second):
        return _sum(call, (1.0, 1.0))
    return _with_constant(call, first if _is_tensor(second) else second, lambda c: (np.ones(()), c))


def _subtract(call: Call) -> Op:
    first, second = _arguments(call, "x1", "x2")
    if _is_tensor(first) and _is_tensor(second):
        return _sum(call, (1.0, -1.0))
    if _is_tensor(second):
        return _with_constant(call, first, lambda c: (-np.ones(()), c))
    return _with_constant(call, second, lambda c: (np.ones(()), -np.asarray(c, dtype=np.float64)))


def _multiply(call: Call) -> Op:
    first, second = _arguments(call, "x1", "x2")
    return _with_constant(call, first if _is_tensor(second) else second, lambda c: (c, np.zeros(())))


def _divide(call: Call) -> Op:
    first, second = _arguments(call, "x1", "x2")
    if not _is_tensor(first):
        return Opaque()
    with np.errstate(divide="ignore"):
        return _with_constant(call, second, lambda c: (1.0 / np.asarray(c, dtype=np.float64), np.zeros(())))


def _with_constant(call: Call, argument: Any, pair: Callable[[AnyArray], tuple[AnyArray, AnyArray]]) -> Op:
    constant = _constant(argument)
    return Opaque() if constant is None else _scale_shift(call, *pair(constant))


def _negative(call: Call) -> Op:
    return Gain(-1.0)


def _matmul(call: Call) -> Op:
    first, second = _arguments(call, "x1", "x2")
    matrix = _constant(second)
    if not _is_tensor(first) or matrix is None or matrix.ndim != 2:
        return Opaque()
    rank = len(call.outputs[0].shape)
    return Affine(affine.dense(np.asarray(matrix, dtype=np.float64).T, axes=rank - 2), rank - 1, biased=False)


def _einsum(call: Call) -> Op:
    if len(call.args) != 2 or not _is_tensor(call.args[0]):
        return Opaque()
    kernel = _constant(call.args[1])
    matrix = None if kernel is None else _dense_matrix(call.operation.subscripts, kernel)
    if matrix is None:
        return Opaque()
    rank = len(call.outputs[0].shape)
    return Affine(affine.dense(matrix, axes=rank - 2), rank - 1, biased=False)


def _conv_like(layout: KernelAxes) -> Entry:
    def entry(call: Call) -> Op:
        tensor, kernel = _arguments(call, "inputs", "kernel")
        weights = _constant(kernel)
        if weights is None or not _is_tensor(tensor):
            return Opaque("its kernel is not a constant")
        operation, shape = call.operation, tensor.shape
        rank = len(shape)
        data_format = operation.data_format or keras.config.image_data_format()
        axis = rank - 1 if data_format == "channels_last" else 1
        core = layout.to_core(weights)
        axes = rank - 2
        windows = _windows(
            operation.padding,
            core.shape[2:],
            _per_axis(operation.strides, axes),
            _per_axis(operation.dilation_rate, axes),
            _space(shape, axis),
        )
        groups = shape[axis] // core.shape[1]
        return Affine(AffineConv(core, np.zeros(core.shape[0]), windows, groups), axis, biased=False)

    return entry


def _batch_norm_operation(call: Call) -> Op:
    _, mean, variance, offset, scale = _arguments(call, "x", "mean", "variance", "offset", "scale")
    center, spread = _constant(mean), _constant(variance)
    if center is None or spread is None:
        return Opaque(BATCH_STATISTICS)
    rank = len(call.outputs[0].shape)
    axis, epsilon = call.operation.axis, call.operation.epsilon
    return batch_norm(center, spread, epsilon, _constant(scale), _constant(offset), axis, rank)


def _concat_operation(call: Call) -> Op:
    return _concat(call, call.operation.axis)


def _average_pool_operation(call: Call) -> Op:
    operation = call.operation
    data_format = operation.data_format or keras.config.image_data_format()
    rank = len(call.outputs[0].shape)
    axis = rank - 1 if data_format == "channels_last" else 1
    return _average_pool(call, operation.pool_size, operation.strides, operation.padding, axis)


def _pad_operation(call: Call) -> Op:
    operation = call.operation
    if operation.mode != "constant":
        return Opaque(f"padding with '{operation.mode}' is not a convolution at the border")
    (value,) = _arguments(call, "x", "constant_values")[1:]
    constant = np.zeros(()) if value is None else _constant(value)
    rank = len(call.outputs[0].shape)
    widths = np.broadcast_to(np.asarray(operation.pad_width, dtype=np.int64), (rank, 2))
    if constant is None or constant.size != 1 or np.any(widths[0]):
        return Opaque("it pads the batch, or with several numbers")
    return Pad(tuple((int(before), int(after)) for before, after in widths), float(constant.reshape(())))


def _same_type(call: Call) -> Op:
    return Gain()


OPERATIONS: dict[type[Any], Entry] = {
    numpy_ops.Add: _add,
    numpy_ops.Subtract: _subtract,
    numpy_ops.Multiply: _multiply,
    numpy_ops.Divide: _divide,
    numpy_ops.TrueDivide: _divide,
    numpy_ops.Negative: _negative,
    numpy_ops.Matmul: _matmul,
    numpy_ops.Dot: _matmul,
    numpy_ops.Einsum: _einsum,
    numpy_ops.Concatenate: _concat_operation,
    numpy_ops.Pad: _pad_operation,
    nn_ops.Conv: _conv_like(CONV),
    nn_ops.DepthwiseConv: _conv_like(DEPTHWISE),
    nn_ops.AveragePool: _average_pool_operation,
    nn_ops.BatchNorm: _batch_norm_operation,
    core_ops.Cast: _same_type,
    core_ops.ConvertToTensor: _same_type,
}

REARRANGING_OPERATIONS: tuple[type[Any], ...] = (
    numpy_ops.Reshape,
    numpy_ops.Transpose,
    numpy_ops.GetItem,
    numpy_ops.Split,
    numpy_ops.ArraySplit,
    numpy_ops.Take,
    numpy_ops.Squeeze,
    numpy_ops.ExpandDims,
    numpy_ops.Moveaxis,
    numpy_ops.Swapaxes,
    numpy_ops.Flip,
    numpy_ops.Roll,
)
