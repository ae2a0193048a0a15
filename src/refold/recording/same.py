"""Whether two recordings of one model say the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from refold.recording.sizes import Size, formula_of
from refold.recording.symbols import Constant, Symbol, leaves, mapped


def say_the_same(one: Any, two: Any, equal: Callable[[Any, Any], bool]) -> bool:
    """Whether two nests of arguments do: the same symbols, by name, and the same formulas of sizes; ``equal`` tells
    whether two tensors or arrays, or other things that are not compared by ``==``, are."""
    first, second = list(leaves(one)), list(leaves(two))
    return len(first) == len(second) and all(_same_leaf(a, b, equal) for a, b in zip(first, second, strict=True))


def _same_leaf(one: Any, two: Any, equal: Callable[[Any, Any], bool]) -> bool:
    if isinstance(one, Symbol) or isinstance(two, Symbol):
        return isinstance(one, Symbol) and isinstance(two, Symbol) and one.name == two.name
    if isinstance(one, Constant) and isinstance(two, Constant):
        return one.tensor is two.tensor or equal(one.tensor, two.tensor)
    if isinstance(one, Size) or isinstance(two, Size):
        return bool(_names_in(one) == _names_in(two))
    if hasattr(one, "shape") and hasattr(two, "shape"):
        return one is two or equal(one, two)
    return bool(type(one) is type(two) and (one is two or one == two or one != one))


def _names_in(number: Any) -> Any:
    """A formula with names in the place of symbols."""
    return mapped(lambda leaf: leaf.name if isinstance(leaf, Symbol) else leaf, formula_of(number))
