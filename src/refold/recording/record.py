"""Two recordings that agree, and what they say together: names, sizes, and which steps lead to a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic

from refold.errors import InputError
from refold.recording.sizes import Size, formula_of, sizes_in, value_of
from refold.recording.steps import StepT, Trace
from refold.recording.symbols import Constant, Symbol, symbols

Shape = tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Record(Generic[StepT]):
    """Where the graph's names come from.

    ``trace`` and ``other`` are the two recordings, step by step the same. ``owners`` says which step gives a
    value, ``shapes`` what is known of sizes.
    """

    trace: Trace[StepT]
    other: Trace[StepT]
    symbols: Mapping[str, Symbol]
    owners: Mapping[str, StepT]
    shapes: Mapping[str, Shape]

    @cached_property
    def batches(self) -> tuple[int, int]:
        """The batch sizes of the two recordings."""
        first, second = (symbols(trace.inputs)[0].shape[0] for trace in (self.trace, self.other))
        return first, second

    def is_batch(self, symbol: Symbol, axis: int) -> bool:
        """Whether an axis of a symbol is the batch."""
        other = self.others.get(symbol.name, symbol)
        return (
            axis == 0 and (symbol.shape[0], other.shape[0]) == self.batches and self.shapes[symbol.name][0] is None
        )

    @cached_property
    def others(self) -> dict[str, Symbol]:
        """The symbols of the second recording, by name."""
        given = [symbol for step in self.other.steps for symbol in step.gives]
        return {symbol.name: symbol for symbol in (*symbols(self.other.inputs), *given)}

    def open_sizes(self, step: StepT) -> list[Symbol]:
        """The symbols of which a step must know a size that is neither fixed nor the batch."""
        found = [entry for size in step.sizes for entry in sizes_in(formula_of(size))]
        return [s for s, axis in found if self.shapes[s.name][axis] is None and not self.is_batch(s, axis)]

    @cached_property
    def places(self) -> dict[int, int]:
        """The places of the recorded steps, by identity."""
        return {id(step): place for place, step in enumerate(self.trace.steps)}

    def steps_to(self, wanted: Sequence[str], known: Mapping[str, Any]) -> list[StepT]:
        """The steps between what is known and what is wanted, in the recorded order. Raises InputError."""
        waiting = list(wanted)
        needed: dict[int, StepT] = {}
        while waiting:
            value = waiting.pop()
            if value in known:
                continue
            if value not in self.owners:
                raise InputError(f"the value '{value}' is needed and was not given")
            step = self.owners[value]
            if id(step) not in needed:
                needed[id(step)] = step
                waiting += [symbol.name for symbol in (*step.reads, *self.open_sizes(step))]
        # Not by a look at each recorded step: a proof asks this once for every region.
        return [needed[key] for key in sorted(needed, key=self.places.__getitem__)]

    def size_among(self, known: Mapping[str, Any], batch: int) -> Callable[[Size], int]:
        """What a recorded size is where the tensors ``known`` are, by name, and the batch is ``batch``; what it
        gives raises InputError where a size is not known."""

        def size(symbol: Symbol, axis: int) -> int:
            if symbol.name in known:
                return int(known[symbol.name].shape[axis])
            if self.is_batch(symbol, axis):
                return batch
            fixed = self.shapes[symbol.name][axis]
            if fixed is None:
                raise InputError(f"a size of the value '{symbol.name}' is needed and was not given")
            return fixed

        return lambda entry: value_of(formula_of(entry), size)

    def text_of(self, leaf: Any) -> str:
        """An argument of a step as a text that is the same in two models that do the same; nothing for tensors,
        None and False."""
        if isinstance(leaf, Symbol | Constant) or leaf is None or leaf is False:
            return ""
        return self._formula_text(leaf.formula) if isinstance(leaf, Size) else repr(leaf)

    def _formula_text(self, formula: Any) -> str:
        if not isinstance(formula, tuple):
            return repr(int(formula))
        if formula[0] != "size":
            return f"({self._formula_text(formula[1])} {formula[0]} {self._formula_text(formula[2])})"
        symbol, axis = formula[1:]
        known = self.shapes[symbol.name][axis]
        return repr(known) if known is not None else f"axis {axis}"


def shape_in_both(one: Symbol, two: Symbol) -> Shape:
    """What is known of a tensor's shape from two recordings: None where they differ."""
    return tuple(a if a == b else None for a, b in zip(one.shape, two.shape, strict=True))
