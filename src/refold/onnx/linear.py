"""What ONNX's operators are in the engine's words.

:data:`OPERATORS` is the whole vocabulary (moved tensors aside, see :mod:`refold.onnx.moves`). Each entry
reads one node and says what it is, or returns an opaque op, with the reason where it is not linear as it
is used. The meaning of every operator at every version is that of https://onnx.ai/onnx/operators/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from refold.algebra import affine
from refold.algebra.affine import AffineConv, Array, Deferred
from refold.algebra.geometry import Window
from refold.graph.batch_norm import batch_norm
from refold.graph.graph import Affine, Concat, Gain, Op, Opaque, Pad, Relayout, Select, Slice, Sum
from refold.onnx import averages, windows
from refold.onnx.reference import FLOATS, AnyArray
from refold.onnx.step import Step

BATCH_STATISTICS = "it normalizes with the statistics of the batch"
NOT_PER_CHANNEL = "a constant that is not one number per channel is not a convolution"

Entry = Callable[[Step], Op]


def op_of(step: Step) -> Op:
    """What a node is."""
    if step.node.domain not in ("", "ai.onnx"):
        return Opaque()
    entry = OPERATORS.get(step.node.op_type)
    if entry is None or not step.dynamic:
        return Opaque()
    facts = [*(step.inputs[place] for place in step.dynamic), step.outputs[step.output]]
    types = [f.dtype for f in facts if f is not None]
    if step.node.op_type in _SELECTING:
        types = types[:1] + types[-1:]
    if any(dtype not in FLOATS for dtype in types):
        return Opaque()
    if len(set(types)) > 1:
        return Opaque(f"the precision changes from {types[0]} to {types[-1]}")
    if any(f is None or f.rank is None or f.rank < 2 for f in (facts[0], facts[-1])):
        return Opaque()
    if any(attribute.is_ref() for attribute in step.node.attributes.values()):
        return Opaque()
    try:
        return entry(step)
    except (ValueError, IndexError, KeyError, TypeError, ZeroDivisionError):
        # Shapes and attributes that do not fit each other: no runtime takes such a node, and no law.
        return Opaque("it is against the rules of its operator")


# ---- matrices ------------------------------------------------------------------------------------


def _gemm(step: Step) -> Op:
    matrix = step.input(1)
    if step.dynamic != [0] or matrix is None or len(matrix.shapes[0] or ()) != 2:
        return Opaque("it does not multiply by a constant matrix")
    if step.integer("transA", 0):
        return Opaque("it mixes the examples of a batch")
    rows, columns = matrix.shapes[0] or (0, 0)
    alpha, beta = step.number("alpha", 1.0), step.number("beta", 1.0)
    transposed = step.integer("transB", 0) == 1
    shape = (rows, columns) if transposed else (columns, rows)

    def weights() -> Array:
        stored = np.asarray(matrix.array(), dtype=np.float64)
        return alpha * (stored if transposed else stored.T)

    bias = step.constant(2)
    offset = np.zeros(shape[0])
    if bias is not None:
        if bias.ndim > 2 or (bias.ndim == 2 and bias.shape[0] != 1) or bias.size not in (1, shape[0]):
            return Opaque(NOT_PER_CHANNEL)
        offset = offset + beta * np.asarray(bias, dtype=np.float64).reshape(-1)
    if step.shape_in()[1] not in (shape[1], None):
        return Opaque("its matrix does not fit the features that it reads")
    return Affine(AffineConv(Deferred(shape, weights), offset), 1, bias is not None)


def _matmul(step: Step) -> Op:
    if len(step.dynamic) != 1:
        return Opaque()
    (place,) = step.dynamic
    matrix, rank = step.inputs[1 - place], len(step.shape_in(place))
    if matrix is None or len(matrix.shapes[0] or ()) != 2 or len(step.shape) != rank:
        return Opaque("it does not multiply by one constant matrix")
    axis = rank - 1 if place == 0 else rank - 2
    if axis < 1:
        return Opaque("it mixes the examples of a batch")
    rows, columns = matrix.shapes[0] or (0, 0)
    spatial = (1,) * (rank - 2)
    shape = (columns, rows, *spatial) if place == 0 else (rows, columns, *spatial)

    def weights() -> Array:
        stored = np.asarray(matrix.array(), dtype=np.float64)
        return (stored.T if place == 0 else stored).reshape(shape)

    windows = (Window(),) * len(spatial)
    return Affine(AffineConv(Deferred(shape, weights), np.zeros(shape[0]), windows), axis, biased=False)


# ---- factors, sums -------------------------------------------------------------------------------


def _batch_norm(step: Step) -> Op:
    if step.integer("training_mode", 0) or len([o for o in step.node.outputs if o.name]) > 1:
        return Opaque(BATCH_STATISTICS)
    if step.version < 9 and not step.integer("spatial", 1):
        return Opaque("it normalizes every position by its own statistics (spatial=0)")
    gamma, beta, mean, variance = (step.constant(place) for place in (1, 2, 3, 4))
    if gamma is None or beta is None or mean is None or variance is None:
        return Opaque("its statistics are no constants")
    epsilon = step.number("epsilon", float(np.float32(1e-5)))
    if step.shape[1] not in (mean.size, None):
        return Opaque("its statistics do not fit the channels that it reads")
    return batch_norm(mean, variance, epsilon, gamma, beta, 1, len(step.shape))


def _with_constant(scale: Callable[[Array], Array], shift: Callable[[Array], Array], step: Step) -> Op:
    """``x * scale(c) + shift(c)`` with the one constant ``c`` of a node, per channel or a number."""
    (place,) = step.dynamic
    shape = step.shape
    if step.shape_in(place) != shape:
        return Opaque("a constant widens the tensor")
    others = [facts for other, facts in enumerate(step.inputs) if other != place and facts is not None]
    if len(others) != 1 or not others[0].is_constant or len(others[0].shapes[0] or ()) > len(shape):
        return Opaque()
    constant = np.asarray(others[0].array(), dtype=np.float64)
    constant = constant.reshape((1,) * (len(shape) - constant.ndim) + constant.shape)
    axis = _channel_axis(constant)
    if axis is None or axis == 0 or (axis > 0 and shape[axis] is None):
        return Opaque(NOT_PER_CHANNEL)
    if axis < 0:
        number = constant.reshape(-1)[:1]
        with np.errstate(divide="ignore", invalid="ignore"):
            gain, offset = float(scale(number)[0]), float(shift(number)[0])
        if not (np.isfinite(gain) and np.isfinite(offset)):
            return Opaque("a constant is not finite")
        return Gain(gain, offset)
    numbers = constant[tuple(slice(None) if other == axis else 0 for other in range(constant.ndim))]
    with np.errstate(divide="ignore", invalid="ignore"):
        conv = affine.scale_shift(scale(numbers), shift(numbers), len(shape) - 2)
    if not conv.is_finite:
        return Opaque("a constant is not finite")
    return Affine(conv, axis, biased=bool(np.any(conv.bias)))


def _channel_axis(constant: AnyArray) -> int | None:
    """The axis along which a constant has one number per channel, as :func:`varying_axis` says it; but one that
    is stored per channel is that, although all its numbers may be the same."""
    wide = [axis for axis, size in enumerate(constant.shape) if size > 1]
    return wide[0] if wide in ([1], [constant.ndim - 1]) else varying_axis(constant)


def varying_axis(constant: AnyArray) -> int | None:
    """The only axis along which an array varies; -1 if it is one number, None if there are several."""
    if constant.size == 0:
        return None
    lead = constant[(slice(0, 1),) * constant.ndim]
    if bool(np.all(constant == lead)):
        return -1
    for axis in range(constant.ndim):
        line = constant[tuple(slice(None) if other == axis else slice(0, 1) for other in range(constant.ndim))]
        if bool(np.all(constant == line)):
            return axis
    return None


def _one(numbers: Array) -> Array:
    return np.ones_like(numbers)


def _zero(numbers: Array) -> Array:
    return np.zeros_like(numbers)


def _two(step: Step, factors: tuple[float, ...]) -> Op:
    if any(step.shape_in(place) != step.shape for place in step.dynamic):
        return Opaque("the sum broadcasts")
    return Sum(factors)


def _add(step: Step) -> Op:
    if len(step.dynamic) == 2:
        return _two(step, (1.0, 1.0))
    return _with_constant(_one, lambda c: c, step)


def _sub(step: Step) -> Op:
    if len(step.dynamic) == 2:
        return _two(step, (1.0, -1.0))
    if step.dynamic == [0]:
        return _with_constant(_one, lambda c: -c, step)
    return _with_constant(lambda c: -np.ones_like(c), lambda c: c, step)


def _mul(step: Step) -> Op:
    if len(step.dynamic) == 2:
        return Opaque()
    return _with_constant(lambda c: c, _zero, step)


def _div(step: Step) -> Op:
    if step.dynamic != [0]:
        return Opaque()
    return _with_constant(lambda c: 1.0 / c, _zero, step)


def _neg(step: Step) -> Op:
    return Gain(-1.0)


def _sum(step: Step) -> Op:
    if len(step.dynamic) < len(step.inputs):
        if len(step.inputs) == 2:
            return _add(step)
        return Opaque("the sum of several tensors and a constant is not read")
    return _two(step, (1.0,) * len(step.inputs)) if len(step.inputs) > 1 else Gain()


def _mean(step: Step) -> Op:
    if len(step.dynamic) < len(step.inputs):
        return Opaque()
    count = len(step.inputs)
    return _two(step, (1.0 / count,) * count) if count > 1 else Gain()


# ---- what only moves numbers ---------------------------------------------------------------------


def _concat(step: Step) -> Op:
    axis = step.integer("axis", 0) % len(step.shape)
    if len(step.dynamic) < len(step.inputs):
        return Opaque("it joins constants to a tensor")
    if len(step.inputs) == 1:
        return Gain()
    return Concat(axis) if axis else Opaque("it joins examples of the batch")


def _identity(step: Step) -> Op:
    return Gain()


def _cast_like(step: Step) -> Op:
    return Gain() if step.dynamic == [0] else Opaque()


def _dropout(step: Step) -> Op:
    if len([output for output in step.node.outputs if output.name]) > 1:
        return Opaque("its mask is used")
    if not step.is_left_out(2):
        training = step.constant(2)
        if training is None or bool(training.any()):
            return Opaque("it drops at random")
    return Gain()


def _pad(step: Step) -> Op:
    if step.word("mode", "constant") != "constant":
        return Opaque(f"it pads by '{step.word('mode', 'constant')}', which is no convolution at the border")
    rank = len(step.shape)
    value: float | None = 0.0
    if step.version < 11:
        pads, axes = step.integers("pads"), tuple(range(rank))
        value = step.number("value", 0.0)
    else:
        given = step.constant(1)
        pads = None if given is None else tuple(int(width) for width in given)
        listed = step.constant(3)
        axes = tuple(range(rank)) if listed is None else tuple(int(axis) % rank for axis in listed)
        if not step.is_left_out(3) and listed is None:
            return Opaque("its padding is no constant")
        if not step.is_left_out(2):
            number = step.constant(2)
            value = None if number is None or number.size != 1 else float(number.reshape(()))
    if pads is None or value is None or len(pads) != 2 * len(axes):
        return Opaque("its padding is no constant")
    widths = [(0, 0)] * rank
    for place, axis in enumerate(axes):
        widths[axis] = (pads[place], pads[place + len(axes)])
    if widths[0] != (0, 0):
        return Opaque("it pads the batch")
    if all(pair == (0, 0) for pair in widths):
        return Gain()
    return Pad(tuple(widths), value)


def _slice(step: Step) -> Op:
    rank = len(step.shape)
    if step.version < 10:
        starts, ends, axes = (step.integers(name) for name in ("starts", "ends", "axes"))
        steps = None
    else:
        lists = [step.constant(place) for place in (1, 2, 3, 4)]
        if any(found is None and not step.is_left_out(place) for place, found in enumerate(lists, 1)):
            return Opaque()
        starts, ends, axes, steps = (None if one is None else tuple(int(i) for i in one) for one in lists)
    if starts is None or ends is None:
        return Opaque()
    axes = axes if axes is not None else tuple(range(len(starts)))
    steps = steps if steps is not None else (1,) * len(starts)
    cuts = [(0, 0, 1)] * rank
    for start, end, axis, every in zip(starts, ends, axes, steps, strict=True):
        cut = _cut(start, end, every, step.shape_in()[axis % rank])
        if cut is None or (axis % rank == 0 and cut != (0, 0, 1)):
            return Opaque()
        cuts[axis % rank] = cut
    if all(cut == (0, 0, 1) for cut in cuts):
        return Gain()
    return Slice(tuple(cuts))


def _cut(start: int, end: int, step: int, size: int | None) -> tuple[int, int, int] | None:
    """A slice as positions cut off at both ends; None if that depends on a size that is not known."""
    if step < 1:
        return None
    if size is not None:
        first, last, _ = slice(start, end, 1).indices(size)
        return (first, size - last, step) if last > first else None
    # Not known: counted from the start on one side and from the end on the other. A tensor that is too
    # small for that gives nothing, in a convolution as in a slice.
    if start < 0 or (0 <= end < 2**31 - 1):
        return None
    return start, 0 if end >= 0 else -end, step


def _gather(step: Step) -> Op:
    indices = step.constant(1)
    rank = len(step.shape_in())
    axis = step.integer("axis", 0) % rank
    size = step.shape_in()[axis]
    if indices is None or indices.ndim != 1 or axis == 0 or size is None or not indices.size:
        return Opaque()
    if bool(np.any((indices < -size) | (indices >= size))):
        return Opaque("it reads beyond the tensor")
    channels = tuple(int(index) % size for index in indices)
    return Gain() if channels == tuple(range(size)) else Select(channels, axis)


def _split(step: Step) -> Op:
    rank = len(step.shape_in())
    axis = step.integer("axis", 0) % rank
    size = step.shape_in()[axis]
    parts = [None if facts.shape is None else facts.shape[axis] for facts in step.outputs]
    if axis == 0 or size is None or None in parts:
        return Opaque()
    known = [int(part or 0) for part in parts]
    start = sum(known[: step.output])
    if sum(known) != size or known[step.output] == 0:
        return Opaque()
    if known[step.output] == size:
        return Gain()
    cuts = [(0, 0, 1)] * rank
    cuts[axis] = (start, size - start - known[step.output], 1)
    return Slice(tuple(cuts))


def _transpose(step: Step) -> Op:
    rank = len(step.shape)
    order = step.integers("perm") or tuple(range(rank))[::-1]
    if order == tuple(range(rank)):
        return Gain()
    for axis_in in range(1, rank):
        for axis_out in range(1, rank):
            rest = [axis for axis in range(rank) if axis != axis_in]
            rest.insert(axis_out, axis_in)
            if axis_in != axis_out and tuple(rest) == order:
                return Relayout(axis_in, axis_out)
    return Opaque()


_SELECTING = frozenset({"Gather", "Slice", "Split", "Pad", "Dropout", "Transpose"})

OPERATORS: Mapping[str, Entry] = {
    "Add": _add,
    "AveragePool": windows.average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _identity,
    "CastLike": _cast_like,
    "Concat": _concat,
    "Conv": windows.convolution,
    "ConvTranspose": windows.transposed_convolution,
    "Div": _div,
    "Dropout": _dropout,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": windows.global_average_pool,
    "GlobalMaxPool": averages.largest,
    "Identity": _identity,
    "MatMul": _matmul,
    "MaxPool": averages.largest,
    "Mean": _mean,
    "Mul": _mul,
    "Neg": _neg,
    "Pad": _pad,
    "ReduceMax": averages.reduced(rising=True),
    "ReduceMean": averages.reduced(rising=False),
    "Resize": averages.resized,
    "Slice": _slice,
    "Split": _split,
    "Sub": _sub,
    "Sum": _sum,
    "Transpose": _transpose,
    "Upsample": averages.resized,
}
