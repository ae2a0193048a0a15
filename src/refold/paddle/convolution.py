"""Paddle's convolutions and dense maps in the engine's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from refold.algebra import affine, geometry
from refold.algebra.geometry import Window
from refold.graph.graph import Affine, Op, Opaque
from refold.paddle.operands import Shape, Shapes, arguments, channel_axis, space_of
from refold.paddle.tensors import numbers
from refold.paddle.trace import Primitive
from refold.recording.symbols import Constant, Symbol

NOT_CONSTANT = "its kernel is not a constant"


def windows_of(
    algorithm: str, taps: Sequence[int], strides: Any, dilations: Any, paddings: Any, space: Shape
) -> tuple[Window, ...]:
    """The windows of an operator along its spatial axes, by Paddle's words for its padding."""
    axes = len(taps)
    if algorithm == "SAME":
        # Paddle takes every dilation for 1 here.
        return tuple(geometry.same(t, s, 1, n) for t, s, n in zip(taps, strides, space, strict=True))
    return tuple(
        Window(t, s, d if t > 1 else 1, before, after)
        for t, s, d, (before, after) in zip(
            taps, strides, dilations, _widths(algorithm, paddings, axes), strict=True
        )
    )


def _widths(algorithm: str, paddings: Any, axes: int) -> list[tuple[int, int]]:
    """What is padded before and behind, per axis, where the sizes do not decide it."""
    if algorithm == "VALID":
        return [(0, 0)] * axes
    if len(paddings) == axes:
        return [(width, width) for width in paddings]
    return [(paddings[2 * axis], paddings[2 * axis + 1]) for axis in range(axes)]


def _conv_op(
    primitive: Primitive,
    shapes: Shapes,
    strides: Any,
    paddings: Any,
    algorithm: str,
    groups: int,
    dilations: Any,
    layout: str,
) -> Op:
    tensor, weight = primitive.args[:2]
    if not isinstance(tensor, Symbol) or not isinstance(weight, Constant):
        return Opaque(NOT_CONSTANT)
    kernel = numbers(weight.tensor)
    shape = shapes(tensor)
    axis = channel_axis(layout, len(shape))
    windows = windows_of(algorithm, kernel.shape[2:], strides, dilations, paddings, space_of(shape, axis))
    return Affine(affine.convolution(kernel, None, windows, groups), axis, biased=False)


def conv2d(primitive: Primitive, shapes: Shapes) -> Op:
    """A convolution over two axes."""
    strides, paddings, algorithm, dilations, groups, layout = primitive.args[2:8]
    return _conv_op(primitive, shapes, strides, paddings, algorithm, groups, dilations, layout)


def depthwise_or_conv3d(primitive: Primitive, shapes: Shapes) -> Op:
    """A depthwise convolution, or one over three axes."""
    strides, paddings, algorithm, groups, dilations, layout = primitive.args[2:8]
    return _conv_op(primitive, shapes, strides, paddings, algorithm, groups, dilations, layout)


def transposed(primitive: Primitive, shapes: Shapes) -> Op:
    """A transposed convolution."""
    tensor, weight, strides, paddings, extra, size, algorithm, groups, dilations, layout = primitive.args[:10]
    if not isinstance(tensor, Symbol) or not isinstance(weight, Constant):
        return Opaque(NOT_CONSTANT)
    if algorithm == "SAME" or not (isinstance(size, list | tuple) and not size):
        return Opaque("its paddings follow from the size of its output")
    kernel = numbers(weight.tensor)
    axes = kernel.ndim - 2
    more = list(extra or [0] * axes)
    crops = [(a, b - c) for (a, b), c in zip(_widths(algorithm, paddings, axes), more, strict=True)]
    windows = tuple(map(geometry.transposed, kernel.shape[2:], strides, dilations, crops))
    conv = affine.transposed_convolution(kernel, None, windows, groups)
    return Affine(conv, channel_axis(layout, axes + 2), biased=False)


def _dense(tensor: Any, weight: Any, bias: Any, rank: int) -> Op:
    if not isinstance(tensor, Symbol) or not isinstance(weight, Constant):
        return Opaque(NOT_CONSTANT)
    matrix = numbers(weight.tensor)
    if matrix.ndim != 2 or len(tensor.shape) != rank:
        return Opaque()
    if bias is not None and not isinstance(bias, Constant):
        return Opaque("its bias is not a constant")
    offset = None if bias is None else numbers(bias.tensor).reshape(-1)
    return Affine(affine.dense(matrix.T, offset, rank - 2), rank - 1, bias is not None)


def linear(primitive: Primitive, shapes: Shapes) -> Op:
    """A dense map with its bias."""
    tensor, weight, bias = primitive.args[:3]
    return _dense(tensor, weight, bias, len(primitive.outputs[0].shape))


def matmul(primitive: Primitive, shapes: Shapes) -> Op:
    """A product with a constant matrix."""
    tensor, weight, turned_tensor, turned_weight = arguments(primitive, "x", "y", "transpose_x", "transpose_y")
    if turned_tensor:
        return Opaque()
    if turned_weight and isinstance(weight, Constant):
        weight = Constant(weight.tensor.t()) if weight.tensor.ndim == 2 else weight
    op = _dense(tensor, weight, None, len(primitive.outputs[0].shape))
    return Opaque() if isinstance(op, Opaque) else op
