"""What torch's functions are in the engine's words.

:data:`OPERATORS` is the vocabulary: modules, functions and methods all end at these functions, by their names.
Each entry reads one recorded step and returns what it is, or an opaque op with the reason where it is not
linear as it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from refold.algebra import affine
from refold.algebra.affine import Array
from refold.algebra.geometry import Window, transposed
from refold.graph.batch_norm import batch_norm
from refold.graph.graph import Affine, Concat, Gain, Op, Opaque, Pad, Sum
from refold.recording.sizes import Size
from refold.recording.symbols import Constant, Symbol
from refold.torch import pooling
from refold.torch.entries import Entry, Reader, Shape, arguments, per_axis
from refold.torch.trace import Step

BATCH_STATISTICS = "it normalizes with the statistics of the batch"
NOT_CONSTANT = "its kernel is not a constant"
NOT_REAL = "its weights are not real numbers"


def op_of(step: Step, reader: Reader) -> Op:
    """What a step is."""
    if step.reason:
        return Opaque(step.reason)
    entry = OPERATORS.get(step.what)
    if entry is None or not _is_torch(step.function):
        return Opaque()
    return entry(step, reader)


def is_rearrangement(step: Step) -> bool:
    """Whether a step only moves elements of one tensor, the first that it reads; of a second one it takes the
    shape."""
    if step.what in ("reshape_as", "view_as"):
        return len(step.reads) == 2 and not step.reason
    return only_moves(step) and len(step.reads) == 1 and not step.reason


def only_moves(step: Step) -> bool:
    """Whether what a step gives is elements of what it reads, moved about."""
    return step.what in REARRANGING or (step.function is getattr and step.args[1] in ("T", "mT"))


def _is_torch(function: Any) -> bool:
    if isinstance(function, torch._ops.OpOverload):
        return str(function.namespace) == "aten"
    module = getattr(function, "__module__", None) or "torch"
    return module.split(".")[0] == "torch"


# ---- convolutions and dense layers -----------------------------------------------------------------


def _conv(axes: int) -> Entry:
    def entry(step: Step, reader: Reader) -> Op:
        tensor, weight, bias, stride, padding, dilation, groups = arguments(
            step, "input", "weight", "bias", "stride", "padding", "dilation", "groups",
            stride=1, padding=0, dilation=1, groups=1,
        )  # fmt: skip
        if reason := _unfit(tensor, weight, bias, axes):
            return Opaque(reason)
        taps = tuple(weight.tensor.shape[2:])
        strides, dilations = per_axis(stride, axes), per_axis(dilation, axes)
        widths = _widths(padding, taps, dilations)
        windows = tuple(
            Window(t, s, d if t > 1 else 1, before, after)
            for t, s, d, (before, after) in zip(taps, strides, dilations, widths, strict=True)
        )
        offset = None if bias is None else reader.numbers(bias)
        conv = affine.convolution(reader.numbers(weight), offset, windows, int(groups))
        return Affine(conv, 1, bias is not None)

    return entry


def _transposed(axes: int) -> Entry:
    def entry(step: Step, reader: Reader) -> Op:
        tensor, weight, bias, stride, padding, extra, groups, dilation = arguments(
            step, "input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation",
            stride=1, padding=0, output_padding=0, groups=1, dilation=1,
        )  # fmt: skip
        if reason := _unfit(tensor, weight, bias, axes):
            return Opaque(reason)
        if any(isinstance(size, Size) for size in per_axis(extra, axes)):
            return Opaque("the size of its output is not its own (output_size)")
        settings = zip(
            weight.tensor.shape[2:],
            *(per_axis(setting, axes) for setting in (stride, dilation, padding, extra)),
            strict=True,
        )
        windows = tuple(transposed(t, s, d, (p, p - e)) for t, s, d, p, e in settings)
        offset = None if bias is None else reader.numbers(bias)
        conv = affine.transposed_convolution(reader.numbers(weight), offset, windows, int(groups))
        return Affine(conv, 1, bias is not None)

    return entry


def _unfit(tensor: Any, weight: Any, bias: Any, axes: int) -> str:
    """Why a convolution has no constant kernel of real numbers; empty if it has."""
    if not isinstance(tensor, Symbol) or not isinstance(weight, Constant):
        return NOT_CONSTANT
    if len(tensor.shape) != axes + 2:
        return "its input has no batch"
    if bias is not None and not isinstance(bias, Constant):
        return "its bias is not a constant"
    return "" if weight.tensor.is_floating_point() else NOT_REAL


def _widths(padding: Any, taps: Sequence[int], dilations: Sequence[int]) -> list[tuple[int, int]]:
    if padding == "valid":
        return [(0, 0)] * len(taps)
    if padding == "same":  # strides are 1 here; torch pads the odd one behind
        reaches = [d * (t - 1) for t, d in zip(taps, dilations, strict=True)]
        return [(reach // 2, reach - reach // 2) for reach in reaches]
    return [(int(width), int(width)) for width in per_axis(padding, len(taps))]


def _linear(step: Step, reader: Reader) -> Op:
    tensor, weight, bias = arguments(step, "input", "weight", "bias")
    return _dense(tensor, weight, bias, reader, turned=False)


def _matmul(step: Step, reader: Reader) -> Op:
    tensor, weight = arguments(step, "input", "other")
    op = _dense(tensor, weight, None, reader, turned=True)
    return Opaque() if isinstance(op, Opaque) else op


def _dense(tensor: Any, weight: Any, bias: Any, reader: Reader, *, turned: bool) -> Op:
    if not isinstance(tensor, Symbol) or not isinstance(weight, Constant):
        return Opaque(NOT_CONSTANT)
    if bias is not None and not isinstance(bias, Constant):
        return Opaque("its bias is not a constant")
    if weight.tensor.ndim != 2 or len(tensor.shape) < 2:
        return Opaque()
    if not weight.tensor.is_floating_point():
        return Opaque(NOT_REAL)
    matrix = reader.numbers(weight)
    offset = None if bias is None else reader.numbers(bias)
    rank = len(tensor.shape)
    return Affine(affine.dense(matrix.T if turned else matrix, offset, rank - 2), rank - 1, bias is not None)


# ---- per channel -----------------------------------------------------------------------------------


def _batch_norm(step: Step, reader: Reader) -> Op:
    statistics, factors = ("running_mean", "running_var"), ("weight", "bias")
    # torch.batch_norm and its functional form have the two in different order.
    order = (*statistics, *factors) if step.function is torch.nn.functional.batch_norm else (*factors, *statistics)
    tensor, mean, variance, gamma, beta, training, epsilon = arguments(
        step,
        *("input", *order, "training", "momentum", "eps"),
        wanted=("input", *statistics, *factors, "training", "eps"),
        training=False,
        eps=1e-5,
    )
    if not isinstance(tensor, Symbol):
        return Opaque()
    if training or mean is None or variance is None:
        return Opaque(BATCH_STATISTICS)
    given = [constant for constant in (mean, variance, gamma, beta) if constant is not None]
    if not all(isinstance(constant, Constant) for constant in given):
        return Opaque("its statistics or factors are not constants")
    return batch_norm(
        reader.numbers(mean),
        reader.numbers(variance),
        float(epsilon),
        None if gamma is None else reader.numbers(gamma),
        None if beta is None else reader.numbers(beta),
        1,
        len(tensor.shape),
    )


def _scale_shift(step: Step, reader: Reader, scale: Array, shift: Array) -> Op:
    """``x * scale + shift`` with constants that broadcast: numbers, or one per channel."""
    tensor = step.reads[0]
    if tensor.shape != step.gives[0].shape:
        return Opaque("a constant widens the tensor")
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return Opaque("a constant is not finite")
    shape = reader.shape(tensor)
    if scale.size == shift.size == 1:
        return Gain(float(scale.reshape(())), float(shift.reshape(())))
    constant = scale if scale.size > 1 else shift
    axis = _varying_axis(constant, shape)
    if axis is None:
        return Opaque("a constant that is not one number per channel is not a convolution")
    per_channel = [np.broadcast_to(part.reshape(-1), (constant.size,)) for part in (scale, shift)]
    conv = affine.scale_shift(per_channel[0], per_channel[1], len(shape) - 2)
    return Affine(conv, axis, biased=bool(np.any(shift)))


def _varying_axis(constant: Array, shape: Shape) -> int | None:
    """The one axis (batch excepted) along which a broadcast constant changes, if it is one."""
    offset = len(shape) - constant.ndim
    axes = [offset + place for place, size in enumerate(constant.shape) if size > 1]
    if offset < 0 or len(axes) != 1 or axes[0] == 0 or shape[axes[0]] != constant.size:
        return None
    return axes[0]


def _constant(argument: Any, reader: Reader) -> Array | None:
    if isinstance(argument, Constant):
        real = not argument.tensor.is_complex()
        return reader.numbers(argument) if real else None
    if isinstance(argument, int | float) and not isinstance(argument, Size):
        return np.asarray(float(argument))
    return None


Pair = Callable[[Array], tuple[Array, Array]]


def _arithmetic(factors: tuple[float, float] | None, with_second: Pair | None, with_first: Pair | None) -> Entry:
    """An operator on two operands: the sum with ``factors``, or ``x * scale + shift`` where one operand is a
    constant and ``with_second`` or ``with_first`` gives scale and shift."""

    def entry(step: Step, reader: Reader) -> Op:
        first, second, alpha, rounding = arguments(step, "input", "other", "alpha", "rounding_mode", alpha=1)
        if rounding is not None or isinstance(alpha, Constant | Symbol | Size):
            return Opaque()
        if alpha != 1 and step.what == "rsub":
            return Opaque()
        if isinstance(first, Symbol) and isinstance(second, Symbol):
            if factors is None:
                return Opaque()
            alike = first.shape == second.shape and reader.shape(first) == reader.shape(second)
            weighted = (factors[0], factors[1] * float(alpha))
            return Sum(weighted) if alike else Opaque("the sum broadcasts")
        if alpha != 1:
            return Opaque()
        is_first = isinstance(first, Symbol)
        constant = _constant(second if is_first else first, reader)
        pair = with_second if is_first else with_first
        if constant is None or pair is None:
            return Opaque()
        with np.errstate(divide="ignore", invalid="ignore"):
            return _scale_shift(step, reader, *pair(constant))

    return entry


_ONE, _ZERO = np.ones(()), np.zeros(())


def _scale_then_shift(step: Step, reader: Reader) -> Op:
    """``torch.addcmul(shift, x, scale)``."""
    shift, tensor, scale, value = arguments(step, "input", "tensor1", "tensor2", "value", value=1)
    if not isinstance(tensor, Symbol) or value != 1 or len(step.reads) != 1:
        return Opaque()
    return _scale_shift(step, reader, reader.numbers(scale), reader.numbers(shift))


def _negative(step: Step, reader: Reader) -> Op:
    return Gain(-1.0)


def _same(step: Step, reader: Reader) -> Op:
    return Gain()


def _dropout(step: Step, reader: Reader) -> Op:
    (_, _, training) = arguments(step, "input", "p", "training", training=True)
    return Opaque("it acts at random in inference too") if training else Gain()


# ---- pools, paddings, joins --------------------------------------------------------------------------


def _pad(step: Step, reader: Reader) -> Op:
    tensor, widths, mode, value = arguments(step, "input", "pad", "mode", "value", mode="constant")
    if mode != "constant":
        return Opaque(f"padding with '{mode}' is not a convolution at the border")
    if not isinstance(tensor, Symbol) or any(not isinstance(n, int) or isinstance(n, Size) for n in widths):
        return Opaque()
    rank = len(tensor.shape)
    pairs = [(int(widths[i]), int(widths[i + 1])) for i in range(0, len(widths), 2)]
    per_axis = ((0, 0),) * (rank - len(pairs)) + tuple(reversed(pairs))  # the last axis comes first
    if per_axis[0] != (0, 0) or isinstance(value, Constant | Symbol):
        return Opaque("it pads the batch, or with a tensor")
    return Pad(per_axis, float(value or 0.0))


def _concat(step: Step, reader: Reader) -> Op:
    parts, axis, dim = arguments(step, "tensors", "dim", "axis")
    axis = (dim if axis is None else axis) or 0
    if not all(isinstance(part, Symbol) for part in parts):
        return Opaque("it joins constants to a tensor")
    rank = len(step.gives[0].shape)
    if any(len(part.shape) != rank for part in parts):
        return Opaque()
    return Concat(int(axis) % rank) if int(axis) % rank else Opaque("it joins examples of the batch")


_PLUS = _arithmetic((1.0, 1.0), lambda c: (_ONE, c), lambda c: (_ONE, c))
_MINUS = _arithmetic((1.0, -1.0), lambda c: (_ONE, -c), lambda c: (-_ONE, c))
_MINUS_TURNED = _arithmetic((-1.0, 1.0), lambda c: (-_ONE, c), lambda c: (_ONE, -c))
_TIMES = _arithmetic(None, lambda c: (c, _ZERO), lambda c: (c, _ZERO))
_OVER = _arithmetic(None, lambda c: (1.0 / c, _ZERO), None)
# ``x.__rdiv__(c)`` is ``c / x``, and with a tensor as ``x`` and a constant as self, ``x / c``.
_OVER_TURNED = _arithmetic(None, None, lambda c: (1.0 / c, _ZERO))

CONVOLUTIONS: dict[str, Entry] = {
    **{f"conv{axes}d": _conv(axes) for axes in (1, 2, 3)},
    **{f"conv_transpose{axes}d": _transposed(axes) for axes in (1, 2, 3)},
}

DENSE: dict[str, Entry] = {"linear": _linear, "matmul": _matmul, "mm": _matmul}

OPERATORS: dict[str, Entry] = {
    **CONVOLUTIONS,
    **DENSE,
    "batch_norm": _batch_norm,
    **dict.fromkeys(("add", "radd"), _PLUS),
    **dict.fromkeys(("sub", "subtract"), _MINUS),
    **dict.fromkeys(("rsub",), _MINUS_TURNED),
    **dict.fromkeys(("mul", "multiply", "rmul"), _TIMES),
    **dict.fromkeys(("div", "divide", "true_divide", "truediv"), _OVER),
    **dict.fromkeys(("rdiv", "rtruediv"), _OVER_TURNED),
    "addcmul": _scale_then_shift,
    **dict.fromkeys(("neg", "negative"), _negative),
    **dict.fromkeys(
        ("clone", "contiguous", "to", "float", "double", "half", "bfloat16", "type", "type_as", "to_copy"), _same
    ),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"), _dropout),
    "feature_alpha_dropout": _dropout,
    "feature_dropout": _dropout,
    **{f"avg_pool{axes}d": pooling.average_pool(axes) for axes in (1, 2, 3)},
    **{f"adaptive_avg_pool{axes}d": pooling.adaptive_pool(axes) for axes in (1, 2, 3)},
    **dict.fromkeys([f"{kind}max_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3)], pooling.max_pool),
    "mean": pooling.reduced(rising=False),
    "amax": pooling.reduced(rising=True),
    **dict.fromkeys(("interpolate", "upsample"), pooling.interpolate),
    "pad": _pad,
    **dict.fromkeys(("cat", "concat", "concatenate"), _concat),
}

# Functions that are not linear here, or not in words of the engine, but have weights that are shipped as such.
WEIGHTED = frozenset(
    [
        *(f"conv_transpose{axes}d" for axes in (1, 2, 3)),
        "bilinear",
        "embedding",
        "embedding_bag",
        "gru",
        "gru_cell",
        "lstm",
        "lstm_cell",
        "multi_head_attention_forward",
        "rnn_relu",
        "rnn_relu_cell",
        "rnn_tanh",
        "rnn_tanh_cell",
    ]
)

# Functions that only move elements.
REARRANGING = frozenset(
    [
        "reshape",
        "view",
        "flatten",
        "unflatten",
        "transpose",
        "permute",
        "swapaxes",
        "swapdims",
        "movedim",
        "moveaxis",
        "squeeze",
        "unsqueeze",
        "split",
        "split_with_sizes",
        "chunk",
        "tensor_split",
        "unbind",
        "narrow",
        "select",
        "getitem",
        "index_select",
        "gather",
        "flip",
        "roll",
        "tile",
        "repeat",
        "repeat_interleave",
        "t",
        "adjoint",
        "channel_shuffle",
        "pixel_shuffle",
        "pixel_unshuffle",
        "native_channel_shuffle",
        "slice",
        "alias",
    ]
)
