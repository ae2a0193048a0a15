"""Sizes of tensors that remember where they come from.

While a model is recorded, the shape of every tensor that depends on its inputs is made of these: numbers
like any others, except that what is computed from them by whole-number arithmetic is known as a formula
of the sizes. So ``x.reshape([b, 2, c // 2, h, w])`` is not bound to the sizes that it was recorded at.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, final

from refold.paddle.symbols import Symbol

# ("size", symbol, axis), or an operation and its two operands: formulas and plain numbers.
Formula = tuple[Any, ...]

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}


@final
class Size(int):
    """A size: its value where it was recorded, and its formula."""

    formula: Formula

    def __new__(cls, value: int, formula: Formula) -> Size:
        """``value``, known by ``formula``."""
        made = super().__new__(cls, value)
        made.formula = formula
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)

    def _with(self, sign: str, other: object, swapped: bool = False) -> Any:
        if not isinstance(other, int) or isinstance(other, bool):
            return NotImplemented
        first, second = (other, self) if swapped else (self, other)
        value = OPERATIONS[sign](int(first), int(second))
        return Size(value, (sign, formula_of(first), formula_of(second)))

    def __add__(self, other: Any) -> Any:
        return self._with("+", other)

    def __radd__(self, other: Any) -> Any:
        return self._with("+", other, swapped=True)

    def __sub__(self, other: Any) -> Any:
        return self._with("-", other)

    def __rsub__(self, other: Any) -> Any:
        return self._with("-", other, swapped=True)

    def __mul__(self, other: Any) -> Any:
        return self._with("*", other)

    def __rmul__(self, other: Any) -> Any:
        return self._with("*", other, swapped=True)

    def __floordiv__(self, other: Any) -> Any:
        return self._with("//", other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._with("//", other, swapped=True)

    def __mod__(self, other: Any) -> Any:
        return self._with("%", other)

    def __rmod__(self, other: Any) -> Any:
        return self._with("%", other, swapped=True)


def formula_of(number: int) -> Any:
    """The formula of a size; a plain number is its own."""
    return number.formula if isinstance(number, Size) else int(number)


def sizes_in(formula: Any) -> Iterator[tuple[Symbol, int]]:
    """The sizes that a formula reads: symbols and their axes."""
    if isinstance(formula, tuple):
        if formula[0] == "size":
            yield formula[1], formula[2]
        else:
            for operand in formula[1:]:
                yield from sizes_in(operand)


def value_of(formula: Any, size: Callable[[Symbol, int], int]) -> int:
    """What a formula gives where the size of an axis of a symbol is ``size(symbol, axis)``."""
    if not isinstance(formula, tuple):
        return int(formula)
    if formula[0] == "size":
        return size(formula[1], formula[2])
    first, second = (value_of(operand, size) for operand in formula[1:])
    return OPERATIONS[formula[0]](first, second)
