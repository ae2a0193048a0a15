"""What the entries of Paddle's vocabulary have in common: the shapes that they are told, and their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from refold.graph.graph import Op
from refold.paddle.trace import Primitive
from refold.recording.symbols import Symbol

Shape = tuple[int | None, ...]
# The shape of a symbol, with None for sizes that may change.
Shapes = Callable[[Symbol], Shape]
Entry = Callable[[Primitive, Shapes], Op]


def arguments(primitive: Primitive, *names: str) -> list[Any]:
    """The arguments of an operator in the order of ``names``, however they were given."""
    given = dict(zip(names, primitive.args, strict=False)) | primitive.kwargs
    return [given.get(name) for name in names]


def channel_axis(layout: str, rank: int) -> int:
    """The axis of the channels, by Paddle's word for a layout."""
    return 1 if layout.startswith("NC") else rank - 1


def space_of(shape: Shape, axis: int) -> Shape:
    """The spatial sizes of a tensor with its channels on ``axis``."""
    return tuple(size for place, size in enumerate(shape) if place not in (0, axis))
