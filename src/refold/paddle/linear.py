"""What Paddle's operators are in the engine's words.

:data:`OPERATORS` is the vocabulary, by the names of ``paddle._C_ops``: layers, public functions and arithmetic
all end there, with paddings and axes in one form. Each entry reads one recorded operator and returns what
it is, or an opaque op with the reason where it is not linear as it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from refold.algebra.affine import AffineConv
from refold.graph.graph import Affine, Gain, Op, Opaque, Pad, Passage
from refold.paddle import pooling
from refold.paddle.channels import ONE, ZERO, add_n, arithmetic, batch_norm, dropout, negative, same, scale
from refold.paddle.convolution import conv2d, depthwise_or_conv3d, linear, matmul, transposed
from refold.paddle.operands import Entry, Shapes, arguments
from refold.paddle.pooling import concat, pad, pad3d, pool
from refold.paddle.trace import Primitive, Step
from refold.recording.symbols import Symbol

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
        case Gain():
            return op
        case Opaque(reason, passages=found):
            return Opaque(reason, passages=lambda: _with_less(found(), added))
        case _:
            return Opaque()


def _with_less(found: Sequence[Passage], added: Sequence[int]) -> tuple[Passage, ...]:
    """Passages of a tensor without the axes that were added to it."""
    kept = [way for way in found if way.axis_in not in added and way.axis_out not in added]
    return tuple(
        replace(
            way,
            axis_in=way.axis_in - sum(place < way.axis_in for place in added),
            axis_out=way.axis_out - sum(place < way.axis_out for place in added),
        )
        for way in kept
    )


def _added_axes(primitive: Primitive, rank: int) -> tuple[int, ...] | None:
    _, axes = arguments(primitive, "x", "axis")
    if isinstance(axes, int):
        axes = [axes]
    if not isinstance(axes, list | tuple) or not all(isinstance(axis, int) for axis in axes):
        return None
    return tuple(sorted(int(axis) % rank for axis in axes))


CONVOLUTIONS: dict[str, Entry] = {
    "conv2d": conv2d,
    "depthwise_conv2d": depthwise_or_conv3d,
    "conv3d": depthwise_or_conv3d,
    "conv2d_transpose": transposed,
    "depthwise_conv2d_transpose": transposed,
    "conv3d_transpose": transposed,
}

DENSE: dict[str, Entry] = {"linear": linear, "matmul": matmul}

OPERATORS: dict[str, Entry] = {
    **CONVOLUTIONS,
    **DENSE,
    "batch_norm": batch_norm,
    "add": arithmetic((1.0, 1.0), lambda c: (ONE, c), lambda c: (ONE, c)),
    "subtract": arithmetic((1.0, -1.0), lambda c: (ONE, -c), lambda c: (-ONE, c)),
    "rsub": arithmetic((-1.0, 1.0), lambda c: (-ONE, c), lambda c: (ONE, -c)),
    "multiply": arithmetic(None, lambda c: (c, ZERO), lambda c: (c, ZERO)),
    "divide": arithmetic(None, lambda c: (1.0 / c, ZERO), None),
    "rdiv": arithmetic(None, None, lambda c: (1.0 / c, ZERO)),
    "add_n": add_n,
    "scale": scale,
    "neg": negative,
    "dropout": dropout,
    "assign": same,
    "clone": same,
    "detach": same,
    "contiguous": same,
    "cast": same,
    "astype": same,
    "pool2d": pool,
    "pool3d": pool,
    **dict.fromkeys(("max_pool2d_with_index", "max_pool3d_with_index"), pooling.largest),
    **dict.fromkeys(pooling.INTERPOLATIONS, pooling.interpolated),
    "mean": pooling.reduced(rising=False),
    **dict.fromkeys(("max", "amax"), pooling.reduced(rising=True)),
    "pad3d": pad3d,
    "pad": pad,
    "concat": concat,
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
