"""What Paddle's operators are in the engine's words.

:data:`OPERATORS` is the vocabulary, by the names of ``paddle._C_ops``: layers, public functions and arithmetic
all end there, with paddings and axes in one form. Each entry reads one recorded operator and returns what
it is, or an opaque op with the reason where it is not linear as it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from refold.algebra import affine, geometry
from refold.algebra.affine import AffineConv, Array
from refold.algebra.geometry import Window
from refold.graph.batch_norm import batch_norm
from refold.graph.graph import Affine, Concat, Gain, Op, Opaque, Pad, Sum
from refold.paddle.trace import Primitive, Step
from refold.recording.sizes import Size
from refold.recording.symbols import Constant, Symbol, symbols

AnyArray = npt.NDArray[Any]
Shape = tuple[int | None, ...]
# The shape of a symbol, with None for sizes that may change.
Shapes = Callable[[Symbol], Shape]
Entry = Callable[[Primitive, Shapes], Op]

BATCH_STATISTICS = "it normalizes with the statistics of the batch"
UNCOUNTED_PADDING = (
    "Paddle leaves padded positions out of the average (exclusive=True), so at the border it is no convolution"
)
NOT_CONSTANT = "its kernel is not a constant"


def numbers(tensor: Any) -> Array:
    """The numbers of a tensor in float64, which holds every narrower type exactly."""
    return np.asarray(tensor.astype("float64").numpy())


# Entries that read what is given by name, too; all others go by position alone.
BY_NAME = frozenset({"matmul", "concat"})


def op_of(step: Step, shapes: Shapes) -> Op:
    """What a step is, from the operators that it consists of."""
    if step.reason:
        return Opaque(step.reason)
    if not _is_chain(step):
        return Opaque()
    return _chain(step.inside, shapes)


def is_rearrangement(step: Step) -> bool:
    """Whether a step only moves elements of one tensor."""
    return bool(step.inside) and not step.reason and all(p.name in REARRANGING for p in step.inside)


def _is_chain(step: Step) -> bool:
    """Whether each operator inside reads what the one before it gave, and nothing else."""
    inside = step.inside
    if not inside or not inside[-1].outputs or inside[-1].outputs[0] is not step.result:
        return False
    return all(later.reads == earlier.outputs[:1] for earlier, later in pairwise(inside)) and (
        set(inside[0].reads) <= set(step.reads)
        if len(inside) == 1
        else set(inside[0].reads) == {step.reads[0]} == set(step.reads)
    )


def reads_of(step: Step) -> list[Symbol]:
    """What a step that is no opaque one reads, in the order of its operator and not of the call: keywords may
    have turned them around."""
    return step.inside[0].reads


def _chain(inside: Sequence[Primitive], shapes: Shapes) -> Op:
    first, last = inside[0], inside[-1]
    if len(inside) > 2 and first.name == "unsqueeze" and last.name == "squeeze":
        return _with_one_axis_less(inside, shapes)
    op = _single(first, shapes)
    if len(inside) == 1 or not isinstance(op, Affine) or op.biased:
        return op if len(inside) == 1 else Opaque(_reason_of(inside, shapes))
    if len(inside) == 2:
        shift = _single(last, shapes)
        if isinstance(shift, Affine) and shift.axis == op.axis and shift.conv.is_identity:
            return Affine(op.conv.with_bias(shift.conv.bias), op.axis)
        if isinstance(shift, Gain) and shift.scale == 1.0:
            return Affine(op.conv.with_bias(np.full(op.conv.channels_out, shift.shift)), op.axis)
    return Opaque(_reason_of(inside, shapes))


def _single(primitive: Primitive, shapes: Shapes) -> Op:
    entry = OPERATORS.get(primitive.name)
    if entry is None:
        return Opaque()
    # A function of the user may give what no layer would; such an operator is simply not ours.
    if any(not isinstance(leaf, Symbol) for leaf in primitive.outputs):
        return Opaque()
    if any(value is not None for value in primitive.kwargs.values()) and primitive.name not in BY_NAME:
        return Opaque()
    return entry(primitive, shapes)


def _reason_of(inside: Sequence[Primitive], shapes: Shapes) -> str:
    """Why one of several operators is not linear, if it says so."""
    found = [_single(primitive, shapes) for primitive in inside]
    return next((op.reason for op in found if isinstance(op, Opaque) and op.reason), "")


def _with_one_axis_less(inside: Sequence[Primitive], shapes: Shapes) -> Op:
    """Paddle computes on one spatial axis by adding others of size 1: the same without those."""
    rank = len(inside[0].outputs[0].shape)
    added, removed = (_added_axes(p, rank) for p in (inside[0], inside[-1]))
    if added is None or added != removed:
        return Opaque()

    op = _chain(inside[1:-1], shapes)
    match op:
        case Affine(conv, axis, biased):
            places = [place for place in range(rank) if place not in (0, axis)]
            gone = [number for number, place in enumerate(places) if place in added]
            if any(not conv.windows[number].is_unit for number in gone) or axis in added:
                return Opaque()
            kernel = conv.kernel.squeeze(tuple(number + 2 for number in gone))
            windows = tuple(window for number, window in enumerate(conv.windows) if number not in gone)
            smaller = AffineConv(kernel, conv.bias, windows, conv.groups)
            return Affine(smaller, axis - sum(place < axis for place in added), biased)
        case Pad(widths):
            if any(widths[place] != (0, 0) for place in added):
                return Opaque()
            return replace(op, widths=tuple(pair for place, pair in enumerate(widths) if place not in added))
        case Gain() | Opaque():
            return op
        case _:
            return Opaque()


def _added_axes(primitive: Primitive, rank: int) -> tuple[int, ...] | None:
    _, axes = _arguments(primitive, "x", "axis")
    if isinstance(axes, int):
        axes = [axes]
    if not isinstance(axes, list | tuple) or not all(isinstance(axis, int) for axis in axes):
        return None
    return tuple(sorted(int(axis) % rank for axis in axes))


# ---- convolutions ----------------------------------------------------------------------------------


def _channel_axis(layout: str, rank: int) -> int:
    return 1 if layout.startswith("NC") else rank - 1


def _space(shape: Shape, axis: int) -> Shape:
    return tuple(size for place, size in enumerate(shape) if place not in (0, axis))


def _windows(
    algorithm: str, taps: Sequence[int], strides: Any, dilations: Any, paddings: Any, space: Shape
) -> tuple[Window, ...]:
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
    axis = _channel_axis(layout, len(shape))
    windows = _windows(algorithm, kernel.shape[2:], strides, dilations, paddings, _space(shape, axis))
    return Affine(affine.convolution(kernel, None, windows, groups), axis, biased=False)


def _conv2d(primitive: Primitive, shapes: Shapes) -> Op:
    strides, paddings, algorithm, dilations, groups, layout = primitive.args[2:8]
    return _conv_op(primitive, shapes, strides, paddings, algorithm, groups, dilations, layout)


def _depthwise_or_conv3d(primitive: Primitive, shapes: Shapes) -> Op:
    strides, paddings, algorithm, groups, dilations, layout = primitive.args[2:8]
    return _conv_op(primitive, shapes, strides, paddings, algorithm, groups, dilations, layout)


def _transposed(primitive: Primitive, shapes: Shapes) -> Op:
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
    return Affine(conv, _channel_axis(layout, axes + 2), biased=False)


# ---- dense -----------------------------------------------------------------------------------------


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


def _arguments(primitive: Primitive, *names: str) -> list[Any]:
    """The arguments of an operator in the order of ``names``, however they were given."""
    given = dict(zip(names, primitive.args, strict=False)) | primitive.kwargs
    return [given.get(name) for name in names]


def _linear(primitive: Primitive, shapes: Shapes) -> Op:
    tensor, weight, bias = primitive.args[:3]
    return _dense(tensor, weight, bias, len(primitive.outputs[0].shape))


def _matmul(primitive: Primitive, shapes: Shapes) -> Op:
    tensor, weight, turned_tensor, turned_weight = _arguments(primitive, "x", "y", "transpose_x", "transpose_y")
    if turned_tensor:
        return Opaque()
    if turned_weight and isinstance(weight, Constant):
        weight = Constant(weight.tensor.t()) if weight.tensor.ndim == 2 else weight
    op = _dense(tensor, weight, None, len(primitive.outputs[0].shape))
    return Opaque() if isinstance(op, Opaque) else op


# ---- per channel -----------------------------------------------------------------------------------


def _batch_norm(primitive: Primitive, shapes: Shapes) -> Op:
    tensor, mean, variance, gamma, beta, is_test, _, epsilon, layout, use_global_stats = primitive.args[:10]
    statistics = (mean, variance)
    if not isinstance(tensor, Symbol) or not all(isinstance(c, Constant) for c in statistics):
        return Opaque()
    if not (is_test or use_global_stats):
        return Opaque(BATCH_STATISTICS)
    rank = len(tensor.shape)
    return batch_norm(
        numbers(mean.tensor),
        numbers(variance.tensor),
        float(np.float32(epsilon)),  # as Paddle's kernels have it
        None if gamma is None else numbers(gamma.tensor),
        None if beta is None else numbers(beta.tensor),
        _channel_axis(layout, rank),
        rank,
    )


def _scale_shift(primitive: Primitive, shapes: Shapes, scale: AnyArray, shift: AnyArray) -> Op:
    """``x * scale + shift`` with constants that broadcast: numbers, or one per channel."""
    (tensor,) = symbols(primitive.args)
    shape = shapes(tensor)
    if tensor.shape != primitive.outputs[0].shape:
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
    assert channels is not None
    per_channel = [np.broadcast_to(constant.reshape(-1), (channels,)) for constant in (scale, shift)]
    conv = affine.scale_shift(per_channel[0], per_channel[1], len(shape) - 2)
    return Affine(conv, axis, biased=bool(np.any(shift)))


def _varying_axis(constant: AnyArray, shape: Shape) -> int | None:
    """The one axis (batch excepted) along which a broadcast constant changes, if it is one."""
    offset = len(shape) - constant.ndim
    axes = [offset + place for place, size in enumerate(constant.shape) if size > 1]
    if offset < 0 or len(axes) != 1 or axes[0] == 0 or shape[axes[0]] != constant.size:
        return None
    return axes[0]


def _constant(argument: Any) -> AnyArray | None:
    if isinstance(argument, Constant):
        return numbers(argument.tensor)
    if isinstance(argument, Size):
        return None
    if isinstance(argument, bool | int | float | np.number | np.ndarray):
        return np.asarray(argument, dtype=np.float64)
    return None


def _arithmetic(
    factors: tuple[float, float] | None,
    with_second: Callable[[AnyArray], tuple[AnyArray, AnyArray]] | None,
    with_first: Callable[[AnyArray], tuple[AnyArray, AnyArray]] | None,
) -> Entry:
    """An operator on two operands: the sum with ``factors``, or ``x * scale + shift`` where one operand is a
    constant and ``with_second`` or ``with_first`` gives scale and shift."""

    def entry(primitive: Primitive, shapes: Shapes) -> Op:
        first, second = primitive.args[:2]
        if isinstance(first, Symbol) and isinstance(second, Symbol):
            if factors is None:
                return Opaque()
            alike = first.shape == second.shape and shapes(first) == shapes(second)
            return Sum(factors) if alike else Opaque("the sum broadcasts")
        is_first = isinstance(first, Symbol)
        constant = _constant(second if is_first else first)
        pair = with_second if is_first else with_first
        if constant is None or pair is None:
            return Opaque()
        with np.errstate(divide="ignore"):
            return _scale_shift(primitive, shapes, *pair(constant))

    return entry


_ONE, _ZERO = np.ones(()), np.zeros(())


def _scale(primitive: Primitive, shapes: Shapes) -> Op:
    tensor, scale, bias, bias_after_scale = primitive.args[:4]
    factor, offset = _constant(scale), _constant(bias)
    if not isinstance(tensor, Symbol) or factor is None or offset is None or factor.size * offset.size != 1:
        return Opaque()
    return _scale_shift(primitive, shapes, factor, offset if bias_after_scale else factor * offset)


def _add_n(primitive: Primitive, shapes: Shapes) -> Op:
    (terms,) = primitive.args[:1]
    if not all(isinstance(term, Symbol) for term in terms):
        return Opaque("it adds constants to a tensor")
    if len({shapes(term) for term in terms}) > 1:
        return Opaque("the sum broadcasts")
    return Sum((1.0,) * len(terms))


def _dropout(primitive: Primitive, shapes: Shapes) -> Op:
    _, _, probability, is_test, mode = primitive.args[:5]
    if not is_test or isinstance(probability, Constant):
        return Opaque("it acts at random in inference too")
    if mode == "upscale_in_train":
        return Gain()
    return Gain(float(np.float32(1.0) - np.float32(probability)))  # as Paddle's kernels have it


def _same(primitive: Primitive, shapes: Shapes) -> Op:
    return Gain()


def _negative(primitive: Primitive, shapes: Shapes) -> Op:
    return Gain(-1.0)


# ---- pools, paddings, joins --------------------------------------------------------------------------


def _pool(primitive: Primitive, shapes: Shapes) -> Op:
    tensor, taps, strides, paddings, ceil_mode, exclusive, layout, kind, whole, adaptive, algorithm = (
        primitive.args[:11]
    )
    if kind != "avg" or whole or not isinstance(tensor, Symbol):
        return Opaque()
    shape = shapes(tensor)
    axis = _channel_axis(layout, len(shape))
    space, channels = _space(shape, axis), shape[axis]
    if channels is None or not all(isinstance(size, int) for size in (*taps, *strides)):
        return Opaque()
    if adaptive:
        return _adaptive_pool(taps, space, channels, axis)
    windows = _windows(algorithm, taps, strides, (1,) * len(taps), paddings, space)
    padded = any(window.floating or window.before or window.after for window in windows)
    if padded and (exclusive or algorithm != "EXPLICIT"):
        return Opaque(UNCOUNTED_PADDING)
    if ceil_mode and any(
        size is None or (size - 1 + window.slack) % window.stride
        for size, window in zip(space, windows, strict=True)
    ):
        return Opaque("it rounds its output size up (ceil_mode), so its last windows may be incomplete")
    return Affine(affine.average_pool(channels, windows), axis, biased=False)


def _adaptive_pool(sizes: Sequence[int], space: Shape, channels: int, axis: int) -> Op:
    if all(wanted == size for wanted, size in zip(sizes, space, strict=True)):
        return Gain()
    if all(wanted == 1 for wanted in sizes):
        return Opaque()  # a global average: as a convolution it would have a weight per position
    if any(size is None or size % wanted for wanted, size in zip(sizes, space, strict=True)):
        return Opaque("its windows have different sizes, or the size of its input is not known")
    steps = [(size or 1) // wanted for wanted, size in zip(sizes, space, strict=True)]
    windows = tuple(Window(step, step) for step in steps)
    return Affine(affine.average_pool(channels, windows), axis, biased=False)


def _pad3d(primitive: Primitive, shapes: Shapes) -> Op:
    tensor, paddings, mode, value, layout = primitive.args[:5]
    if mode != "constant":
        return Opaque(f"padding with '{mode}' is not a convolution at the border")
    if not isinstance(tensor, Symbol) or not all(isinstance(width, int) for width in paddings):
        return Opaque()
    rank = len(tensor.shape)
    axis = _channel_axis(layout, rank)
    widths = [(0, 0)] * rank
    places = [place for place in range(rank) if place not in (0, axis)]
    for number, place in enumerate(reversed(places)):  # the last axis comes first
        widths[place] = int(paddings[2 * number]), int(paddings[2 * number + 1])
    return Pad(tuple(widths), float(value))


def _pad(primitive: Primitive, shapes: Shapes) -> Op:
    tensor, paddings, value = primitive.args[:3]
    if not isinstance(tensor, Symbol) or not all(isinstance(width, int) for width in paddings):
        return Opaque()
    widths = tuple((int(paddings[2 * i]), int(paddings[2 * i + 1])) for i in range(len(tensor.shape)))
    if widths[0] != (0, 0) or isinstance(value, Constant):
        return Opaque("it pads the batch, or with a tensor")
    return Pad(widths, float(value))


def _concat(primitive: Primitive, shapes: Shapes) -> Op:
    parts, axis = _arguments(primitive, "x", "axis")
    axis = 0 if axis is None else axis
    if not isinstance(axis, int) or not all(isinstance(part, Symbol) for part in parts):
        return Opaque("it joins constants to a tensor")
    rank = len(primitive.outputs[0].shape)
    return Concat(axis % rank) if axis % rank else Opaque("it joins examples of the batch")


CONVOLUTIONS: dict[str, Entry] = {
    "conv2d": _conv2d,
    "depthwise_conv2d": _depthwise_or_conv3d,
    "conv3d": _depthwise_or_conv3d,
    "conv2d_transpose": _transposed,
    "depthwise_conv2d_transpose": _transposed,
    "conv3d_transpose": _transposed,
}

DENSE: dict[str, Entry] = {"linear": _linear, "matmul": _matmul}

OPERATORS: dict[str, Entry] = {
    **CONVOLUTIONS,
    **DENSE,
    "batch_norm": _batch_norm,
    "add": _arithmetic((1.0, 1.0), lambda c: (_ONE, c), lambda c: (_ONE, c)),
    "subtract": _arithmetic((1.0, -1.0), lambda c: (_ONE, -c), lambda c: (-_ONE, c)),
    "rsub": _arithmetic((-1.0, 1.0), lambda c: (-_ONE, c), lambda c: (_ONE, -c)),
    "multiply": _arithmetic(None, lambda c: (c, _ZERO), lambda c: (c, _ZERO)),
    "divide": _arithmetic(None, lambda c: (1.0 / c, _ZERO), None),
    "rdiv": _arithmetic(None, None, lambda c: (1.0 / c, _ZERO)),
    "add_n": _add_n,
    "scale": _scale,
    "neg": _negative,
    "dropout": _dropout,
    "assign": _same,
    "clone": _same,
    "detach": _same,
    "contiguous": _same,
    "cast": _same,
    "astype": _same,
    "pool2d": _pool,
    "pool3d": _pool,
    "pad3d": _pad3d,
    "pad": _pad,
    "concat": _concat,
}

# Operators that only move elements.
REARRANGING = frozenset(
    {
        "reshape",
        "flatten",
        "transpose",
        "squeeze",
        "unsqueeze",
        "split",
        "split_with_num",
        "getitem",
        "slice",
        "strided_slice",
        "index_select",
        "gather",
        "flip",
        "roll",
        "tile",
        "unbind",
        "channel_shuffle",
        "pixel_shuffle",
        "pixel_unshuffle",
        "crop",
    }
)
