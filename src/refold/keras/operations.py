"""What Keras' operations are in the engine's words; its layers are in :mod:`refold.keras.linear`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras.src.ops import core as core_ops
from keras.src.ops import nn as nn_ops
from keras.src.ops import numpy as numpy_ops

from refold.algebra import affine
from refold.algebra.affine import AffineConv
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
    per_axis,
    scaled_and_shifted,
    space_of,
    summed,
    windows_of,
)
from refold.keras.trace import AnyArray, Call, Constant


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
        return summed(call, (1.0, 1.0))
    return _with_constant(call, first if _is_tensor(second) else second, lambda c: (np.ones(()), c))


def _subtract(call: Call) -> Op:
    first, second = _arguments(call, "x1", "x2")
    if _is_tensor(first) and _is_tensor(second):
        return summed(call, (1.0, -1.0))
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
    return Opaque() if constant is None else scaled_and_shifted(call, *pair(constant))


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
    matrix = None if kernel is None else dense_matrix(call.operation.subscripts, kernel)
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
        windows = windows_of(
            operation.padding,
            core.shape[2:],
            per_axis(operation.strides, axes),
            per_axis(operation.dilation_rate, axes),
            space_of(shape, axis),
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
    return concatenated(call, call.operation.axis)


def _average_pool_operation(call: Call) -> Op:
    operation = call.operation
    data_format = operation.data_format or keras.config.image_data_format()
    rank = len(call.outputs[0].shape)
    axis = rank - 1 if data_format == "channels_last" else 1
    return average_pooled(call, operation.pool_size, operation.strides, operation.padding, axis)


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
    numpy_ops.Max: averages.reduced(rising=True),
    numpy_ops.Mean: averages.reduced(rising=False),
    numpy_ops.Pad: _pad_operation,
    nn_ops.Conv: _conv_like(CONV),
    nn_ops.DepthwiseConv: _conv_like(DEPTHWISE),
    nn_ops.AveragePool: _average_pool_operation,
    nn_ops.MaxPool: averages.largest,
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
