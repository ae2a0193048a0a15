"""Two recordings of a model that agree.

A model is recorded twice, at two batch sizes (and two sizes wherever they may be open) and on different
numbers. Sizes that differ are not known; whatever else differs was not followed, and the module in which it
happens is taken whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from refold.recording.same import say_the_same
from refold.recording.sizes import Size
from refold.recording.steps import Perform, RetryError, Scope, StepT, Trace, UntraceableError
from refold.recording.symbols import Symbol, symbols

TraceT = TypeVar("TraceT", bound=Trace[Any])

# What a step does, whatever it does it to: two recordings of one step say the same.
Kind = Callable[[Any], Any]
# Whether two tensors or arrays hold the same numbers.
Equal = Callable[[Any, Any], bool]


class BoundError(UntraceableError):
    """The model goes another way at another size."""


def two_that_agree(
    record: Callable[[int, Mapping[int, str]], TraceT],
    model: Any,
    kind: Kind,
    equal: Equal,
    *,
    strict: bool = False,
    whole: Mapping[int, str] = MappingProxyType({}),
) -> tuple[TraceT, TraceT]:
    """Two recordings of ``model`` that agree. ``record(which, whole)`` makes the first or second; ``whole`` says of
    which modules (by identity) no more than that they were called is recorded, and why. Raises UntraceableError;
    with ``strict`` BoundError where the recordings differ, else the module in which they do is taken whole.
    """
    whole = dict(whole)
    while True:
        try:
            first, second = record(0, whole), record(1, whole)
        except RetryError as retry:
            whole = retry.whole
            continue
        difference = _difference(first, second, kind, equal)
        if difference is None:
            return first, second
        scope, reason = difference
        if strict:
            raise BoundError(f"it {reason}")
        if scope is None or scope.module is model or id(scope.module) in whole:
            raise UntraceableError(f"it {reason}")
        whole[id(scope.module)] = f"its forward {reason}"


def _difference(first: Trace[Any], second: Trace[Any], kind: Kind, equal: Equal) -> tuple[Scope | None, str] | None:
    """Where two recordings part: the innermost module, and in what."""
    for one, two in zip(first.steps, second.steps, strict=False):
        if kind(one) != kind(two) or len(one.gives) != len(two.gives):
            return one.scope, "takes another way at another size, or depends on chance"
        if not say_the_same((one.args, one.kwargs), (two.args, two.kwargs), equal):
            return one.scope, "is bound to a size of its input, or uses it in a way that is not seen"
    if len(first.steps) != len(second.steps):
        return None, "takes another way at another size, or depends on chance"
    if not say_the_same(first.outputs, second.outputs, equal):
        return None, "returns something else at another size"
    return None


def check(
    first: Trace[StepT],
    second: Trace[StepT],
    perform: Perform[StepT],
    close: Callable[[Any, Any], bool],
    words: Callable[[Exception], str],
) -> None:
    """Do the first recording's steps on the second one's inputs: they must give what the model gave. ``close``
    compares a tensor with a result, ``words`` says what an error of the framework says. Raises UntraceableError."""
    values = {s.name: tensor for s, tensor in zip(symbols(first.inputs), second.tensors, strict=True)}
    last = {symbol.name: number for number, step in enumerate(first.steps) for symbol in step.reads}
    kept = {symbol.name for symbol in symbols(first.outputs)}

    def value(symbol: Symbol) -> Any:
        return values[symbol.name]

    for number, (one, two) in enumerate(zip(first.steps, second.steps, strict=True)):
        try:
            made = perform(one, value, _in_turn(iter(two.sizes)))
        except Exception as error:  # whatever a framework raises
            raise UntraceableError(f"'{one.name}' cannot be done again: {words(error)}") from error
        values.update(zip([symbol.name for symbol in one.gives], made, strict=True))
        for symbol in one.reads:
            if last[symbol.name] == number and symbol.name not in kept:
                values.pop(symbol.name, None)
    for symbol, expected in zip(symbols(first.outputs), second.results, strict=True):
        if not close(values[symbol.name], expected):
            raise UntraceableError(
                "it does something that is not seen: what was recorded gives other numbers than the model "
                "(a tensor that is written into, or chance)"
            )


def _in_turn(sizes: Iterator[Size]) -> Callable[[Size], int]:
    return lambda _: int(next(sizes))
