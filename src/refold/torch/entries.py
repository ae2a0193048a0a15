"""What the entries of the table of torch's functions read from a recorded step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from refold.algebra.affine import Array
from refold.graph.graph import Op
from refold.recording.symbols import Constant, Symbol
from refold.torch.trace import Step

Shape = tuple[int | None, ...]


class Reader:
    """What an entry may ask about the tensors of a step: shapes, with None for sizes that may change, and the
    numbers of constants in float64."""

    def __init__(self, shape: Callable[[Symbol], Shape], numbers: Callable[[Constant], Array]) -> None:
        self.shape = shape
        self.numbers = numbers


Entry = Callable[[Step, Reader], Op]


def arguments(step: Step, *names: str, wanted: Sequence[str] = (), **defaults: Any) -> list[Any]:
    """The arguments of a step, however they were given: ``names`` in the function's order, or those ``wanted``."""
    given = {**defaults, **dict(zip(names, step.args, strict=False)), **step.kwargs}
    return [given.get(name) for name in wanted or names]


def per_axis(value: Any, axes: int) -> tuple[Any, ...]:
    """A setting per axis, from one number or from several."""
    if isinstance(value, tuple | list):
        return tuple(value) * axes if len(value) == 1 else tuple(value)
    return (value,) * axes
