"""Two recordings of a model that agree.

A model is recorded twice, at two batch sizes (and two sizes wherever they may be open) and on different
numbers. Sizes that differ are not known; whatever else differs was not followed, and the module in which it
happens is taken whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, final

import torch

from refold.recording.same import say_the_same
from refold.recording.sizes import Size, formula_of, sizes_in
from refold.recording.symbols import Constant, Symbol, mapped, symbols
from refold.torch.perform import perform
from refold.torch.trace import RetryError, Scope, Step, Trace, UntraceableError, first_line, record, untouched

Shape = tuple[int | None, ...]

# How far what the recorded steps give may be from what the model gave, relative to its largest number.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}

_RANDOM = ("rand", "bernoulli", "normal", "multinomial")


@final
@dataclass(frozen=True, eq=False)
class Record:
    """Where the graph's names come from.

    ``trace`` and ``other`` are the two recordings, step by step the same. ``owners`` says which step gives a
    value, ``shapes`` what is known of sizes; ``doubles`` keeps constants and modules in float64. ``bound`` says
    that at other sizes the model goes another way, so that what is made of this record holds at these only.
    ``prefix`` stands in front of all names. ``parted`` are the identities of the parameters and buffers of modules
    that are lifted by themselves.
    """

    trace: Trace
    other: Trace
    symbols: Mapping[str, Symbol]
    owners: Mapping[str, Step]
    shapes: Mapping[str, Shape]
    doubles: dict[int, Any] = field(default_factory=dict)
    bound: bool = False
    prefix: str = ""
    parted: frozenset[int] = frozenset()

    @property
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

    def open_sizes(self, step: Step) -> list[Symbol]:
        """The symbols of which a step must know a size that is neither fixed nor the batch."""
        found = [entry for size in step.sizes for entry in sizes_in(formula_of(size))]
        return [s for s, axis in found if self.shapes[s.name][axis] is None and not self.is_batch(s, axis)]


class BoundError(UntraceableError):
    """The model goes another way at another size."""


def record_twice(
    model: Any,
    feeds: Sequence[tuple[Any, ...]],
    names: Any,
    *,
    strict: bool = False,
    bound: bool = False,
    whole: Mapping[int, str] = MappingProxyType({}),
    prefix: str = "",
) -> Record:
    """Two recordings that agree. ``feeds`` are the two sets of arguments; ``whole`` and ``prefix`` are as for
    :func:`refold.torch.trace.record`. Raises UntraceableError; with ``strict`` BoundError where the recordings
    differ, else the module in which they do is taken whole.
    """
    whole = dict(whole)
    while True:
        try:
            first, second = (record(model, args, names, whole, prefix) for args in feeds)
        except RetryError as retry:
            whole = retry.whole
            continue
        difference = _difference(first, second)
        if difference is None:
            break
        scope, reason = difference
        if strict:
            raise BoundError(f"it {reason}")
        if scope is None or scope.module is model or id(scope.module) in whole:
            raise UntraceableError(f"it {reason}")
        whole[id(scope.module)] = f"its forward {reason}"
    with untouched(model):
        _check(first, second)
    known, owners, shapes = _tables(first, second)
    _make_constant(first, second, shapes)
    return Record(first, second, known, owners, shapes, bound=bound, prefix=prefix)


def _tables(first: Trace, second: Trace) -> tuple[dict[str, Symbol], dict[str, Step], dict[str, Shape]]:
    known = {symbol.name: symbol for symbol in symbols(first.inputs)}
    pairs = list(zip(symbols(first.inputs), symbols(second.inputs), strict=True))
    owners: dict[str, Step] = {}
    for one, two in zip(first.steps, second.steps, strict=True):
        for a, b in zip(one.gives, two.gives, strict=True):
            known[a.name], owners[a.name] = a, one
            pairs.append((a, b))
    shapes = {a.name: tuple(m if m == n else None for m, n in zip(a.shape, b.shape, strict=True)) for a, b in pairs}
    return known, owners, shapes


def _make_constant(first: Trace, second: Trace, shapes: Mapping[str, Shape]) -> None:
    """Steps that depend on nothing but sizes that are known give constants, like what has no input at all."""
    returned = {symbol.name for symbol in symbols(first.outputs)}
    for trace in (first, second):
        fixed: dict[str, Constant] = {}

        def leaf(entry: Any, fixed: dict[str, Constant] = fixed) -> Any:
            return fixed.get(entry.name, entry) if isinstance(entry, Symbol) else entry

        for step in list(trace.steps):
            step.args, step.kwargs = mapped(leaf, (step.args, step.kwargs))
            open_sizes = [
                axis
                for size in step.sizes
                for symbol, axis in sizes_in(formula_of(size))
                if shapes[symbol.name][axis] is None
            ]
            names = [symbol.name for symbol in step.gives]
            chance = any(step.what.startswith(word) for word in _RANDOM)
            if step.reads or open_sizes or step.function is None or chance or returned.intersection(names):
                continue
            made = perform(step, lambda symbol: symbol)
            for place, (name, tensor) in enumerate(zip(names, made, strict=True)):
                fixed[name] = Constant(tensor, step, place)
            trace.steps.remove(step)
        for scope in trace.scopes:
            scope.args, scope.kwargs = mapped(leaf, (scope.args, scope.kwargs))


def _difference(first: Trace, second: Trace) -> tuple[Scope | None, str] | None:
    """Where two recordings part: the innermost module, and in what."""
    for one, two in zip(first.steps, second.steps, strict=False):
        alike = one.function is two.function and one.module is two.module and len(one.gives) == len(two.gives)
        if not alike or [len(s.shape) for s in one.gives] != [len(s.shape) for s in two.gives]:
            return one.scope, "takes another way at another size, or depends on chance"
        if not say_the_same((one.args, one.kwargs), (two.args, two.kwargs), _same_tensor):
            return one.scope, "is bound to a size of its input, or uses it in a way that is not seen"
    if len(first.steps) != len(second.steps):
        return None, "takes another way at another size, or depends on chance"
    if not say_the_same(first.outputs, second.outputs, _same_tensor):
        return None, "returns something else at another size"
    return None


def _same_tensor(one: Any, two: Any) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return bool(((one == two) | ((one != one) & (two != two))).all())


def _check(first: Trace, second: Trace) -> None:
    """Do the first recording's steps on the second one's inputs: they must give what the model gave."""
    values = {s.name: tensor for s, tensor in zip(symbols(first.inputs), second.tensors, strict=True)}
    last = {symbol.name: number for number, step in enumerate(first.steps) for symbol in step.reads}
    kept = {symbol.name for symbol in symbols(first.outputs)}
    for number, (one, two) in enumerate(zip(first.steps, second.steps, strict=True)):
        sizes = iter(two.sizes)
        try:
            made = perform(one, lambda symbol: values[symbol.name], size=partial(_next, sizes))
        except Exception as error:  # whatever torch raises
            raise UntraceableError(f"'{one.name}' cannot be done again: {first_line(error)}") from error
        values.update(zip([symbol.name for symbol in one.gives], made, strict=True))
        for symbol in one.reads:
            if last[symbol.name] == number and symbol.name not in kept:
                values.pop(symbol.name, None)
    for symbol, expected in zip(symbols(first.outputs), second.results, strict=True):
        if not are_close(values[symbol.name], expected):
            raise UntraceableError(
                "it does something that is not seen: what was recorded gives other numbers than the model "
                "(a tensor that is written into, or chance)"
            )


def are_close(found: Any, wanted: Any) -> bool:
    """Whether two tensors are equal but for what rounding does to them."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if wanted.is_complex():
        found, wanted = (torch.view_as_real(tensor.resolve_conj()) for tensor in (found, wanted))
    if not wanted.is_floating_point():
        return bool((found == wanted).all())
    found, expected = found.double(), wanted.double()
    finite = expected.isfinite()
    scale = float(expected[finite].abs().max()) if bool(finite.any()) else 0.0
    limit = TOLERANCE.get(wanted.dtype, 1e-4) * scale + 1e-30
    return bool(torch.allclose(found, expected, rtol=0.0, atol=limit, equal_nan=True))


def _next(sizes: Iterator[Size], _: Size) -> int:
    return int(next(sizes))
