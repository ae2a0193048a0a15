"""What an operator of the neutral graph costs."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from refold.algebra.cost import Cost, convolution_cost, elementwise_cost, turn_cost
from refold.graph.graph import Affine, Gain, Op, Opaque, Relayout, Value


def operator_cost(
    op: Op, reads: Sequence[Value], output: Value, weights: Sequence[tuple[int, ...]] = (), positions: int = 1
) -> Cost:
    """The cost of one operator that reads some values and gives another.

    ``weights`` are the shapes of the tensors that an opaque operator stores, and ``positions`` the number of
    positions at which it uses each of them: more is not known of it.
    """
    if isinstance(op, Affine) and not _only_shifts(op):
        places = prod(output.nominal) // max(op.conv.channels_out, 1)
        return convolution_cost(op.conv, prod(reads[0].nominal), places, output.itemsize)
    if op == Gain():
        return Cost(operators=1)
    shapes = [value.nominal for value in reads] or [output.nominal]
    cost = elementwise_cost(shapes, output.nominal, output.itemsize)
    match op:
        case Gain(scale) if scale != 1.0:
            return Cost(prod(output.nominal), cost.bytes, 1)
        case Relayout():
            return turn_cost(output.nominal, output.itemsize)
        case Opaque():
            multiplied = sum(prod(shape) for shape in weights if len(shape) > 1)
            stored = sum(prod(shape) for shape in weights) * output.itemsize
            return Cost(multiplied * positions, cost.bytes + stored, 1)
        case _:
            return cost


def _only_shifts(op: Affine) -> bool:
    return op.conv.is_scale and bool(np.all(op.conv.scale == 1.0))
