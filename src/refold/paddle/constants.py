"""Tensors that a forward makes of nothing but sizes that never change: ``paddle.eye(x.shape[1])``.

They are recorded as steps, because a size of an input is in them. Where only the functions named here made them,
and both recordings give the same numbers, they are constants like a buffer, and what is computed with them is
linear where it would be with a buffer.
"""

from __future__ import annotations

from typing import Any

import paddle

from refold.paddle.perform import perform
from refold.paddle.trace import Step, Trace
from refold.recording.sizes import formula_of, sizes_in
from refold.recording.symbols import Constant, Symbol, mapped, symbols

# By the last part of their names: functions that give the same numbers whenever they are given the same ones.
_MAKING = ("arange", "diag", "eye", "full", "linspace", "ones", "tril", "triu", "zeros")
_MOVING = ("astype", "cast", "concat", "expand", "flatten", "reshape", "squeeze", "stack", "tile", "transpose")
_MORE_MOVING = ("__getitem__", "full_like", "ones_like", "pad", "unsqueeze", "zeros_like")
_COUNTING = ("__add__", "__mul__", "__sub__", "__truediv__", "add", "divide", "multiply", "scale", "subtract")
SURE = frozenset((*_MAKING, *_MOVING, *_MORE_MOVING, *_COUNTING))


def bake(first: Trace, second: Trace) -> None:
    """Make constants of such steps of two recordings that agree, in place; not of what the model returns."""
    kept = symbols(first.outputs)
    known: dict[Symbol, Constant] = {}

    def replaced(nest: Any) -> Any:
        return mapped(lambda leaf: known.get(leaf, leaf) if isinstance(leaf, Symbol) else leaf, nest)

    pairs = list(zip(first.steps, second.steps, strict=True))
    for pair in pairs:
        for step in pair:
            step.args, step.kwargs = replaced((step.args, step.kwargs))
            for primitive in step.inside:
                primitive.args, primitive.kwargs = replaced((primitive.args, primitive.kwargs))
        one, two = pair
        made = _numbers_of(one, two) if not any(symbol in kept for symbol in one.gives) else None
        if made is not None:
            for gives in (one.gives, two.gives):
                known.update(zip(gives, map(Constant, made), strict=True))
    for trace in (first, second):
        trace.steps = [step for step in trace.steps if not any(symbol in known for symbol in step.gives)]
        for scope in trace.scopes:
            scope.args, scope.kwargs, scope.outputs = replaced((scope.args, scope.kwargs, scope.outputs))


def _numbers_of(one: Step, two: Step) -> list[Any] | None:
    """What a step gives, if that is the same wherever the model runs."""
    if one.reads or one.layer is not None or one.function.rpartition(".")[2] not in SURE:
        return None
    sizes = [
        [symbol.shape[axis] for size in step.sizes for symbol, axis in sizes_in(formula_of(size))]
        for step in (one, two)
    ]
    if sizes[0] != sizes[1]:
        return None
    first, second = perform(one, _unread), perform(two, _unread)
    same = all(a.shape == b.shape and bool(paddle.equal_all(a, b)) for a, b in zip(first, second, strict=True))
    return first if same and len(first) == len(one.gives) else None


def _unread(symbol: Symbol) -> Any:
    raise AssertionError(f"{symbol.name} is read by a step that reads nothing")
