"""Two recordings of a torch module that agree; see :mod:`refold.recording.twice`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any, final

import torch

from refold.recording import record as recording
from refold.recording import twice
from refold.recording.sizes import Size, formula_of, sizes_in
from refold.recording.steps import UntraceableError
from refold.recording.symbols import Constant, Symbol, leaves, mapped, symbols
from refold.recording.twice import BoundError
from refold.torch.perform import perform
from refold.torch.trace import Step, Trace, first_line, record, untouched

# How far what the recorded steps give may be from what the model gave, relative to its largest number.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}

_RANDOM = ("rand", "bernoulli", "normal", "multinomial")


@final
@dataclass(frozen=True, eq=False)
class Record(recording.Record[Step]):
    """See :class:`refold.recording.record.Record`.

    ``doubles`` keeps constants and modules in float64. ``bound`` says that at other sizes the model goes another
    way, so that what is made of this record holds at these only. ``prefix`` stands in front of all names.
    ``parted`` are the identities of the parameters and buffers of modules that are lifted by themselves.
    """

    doubles: dict[int, Any] = field(default_factory=dict)
    bound: bool = False
    prefix: str = ""
    parted: frozenset[int] = frozenset()


# Recordings that were made already, by what they were made of: several attempts may share one.
Made = dict[Any, Trace]


def record_twice(
    model: Any,
    feeds: Sequence[tuple[Any, ...]],
    names: Any,
    *,
    strict: bool = False,
    bound: bool = False,
    whole: Mapping[int, str] = MappingProxyType({}),
    prefix: str = "",
    made: Made | None = None,
) -> Record:
    """Two recordings that agree. ``feeds`` are the two sets of arguments; ``whole`` and ``prefix`` are as for
    :func:`refold.torch.trace.record`. Raises UntraceableError; with ``strict`` BoundError where the recordings
    differ, else the module in which they do is taken whole. ``made`` keeps recordings of this model for others of
    its attempts, whose first arguments are the same.
    """
    made = {} if made is None else made
    sizes = [[tuple(leaf.shape) for leaf in leaves(args) if isinstance(leaf, torch.Tensor)] for args in feeds]
    larger = int(sum(map(prod, sizes[1])) >= sum(map(prod, sizes[0])))

    def two(*, strict: bool, hollow: bool) -> tuple[Trace, Trace]:
        def one(which: int, whole: Mapping[int, str]) -> Trace:
            is_hollow = hollow and which == larger and not whole
            key = which, str(sizes[which]), tuple(whole.items()), is_hollow
            if key not in made:
                made[key] = record(model, feeds[which], names, whole, prefix, is_hollow=is_hollow)
            return made[key]

        return twice.two_that_agree(one, model, _kind, _same_tensor, strict=strict, whole=whole)

    try:
        # The numbers of the larger one are not needed if the two agree.
        first, second = two(strict=True, hollow=True)
    except UntraceableError as error:
        if strict and not isinstance(error, BoundError):
            raise
        first, second = two(strict=strict, hollow=False)
    with untouched(model):
        twice.check(*((first, second) if larger == 0 else (second, first)), _again, are_close, first_line)
    known, owners, shapes = _tables(first, second)
    _make_constant(first, second, shapes)
    return Record(first, second, known, owners, shapes, bound=bound, prefix=prefix)


def _kind(step: Step) -> Any:
    return step.function, id(step.module), [len(symbol.shape) for symbol in step.gives]


def _again(step: Step, tensor: Callable[[Symbol], Any], size: Callable[[Size], int]) -> list[Any]:
    return perform(step, tensor, size=size)


def _tables(first: Trace, second: Trace) -> tuple[dict[str, Symbol], dict[str, Step], dict[str, recording.Shape]]:
    known = {symbol.name: symbol for symbol in symbols(first.inputs)}
    pairs = list(zip(symbols(first.inputs), symbols(second.inputs), strict=True))
    owners: dict[str, Step] = {}
    for one, two in zip(first.steps, second.steps, strict=True):
        for a, b in zip(one.gives, two.gives, strict=True):
            known[a.name], owners[a.name] = a, one
            pairs.append((a, b))
    shapes = {a.name: recording.shape_in_both(a, b) for a, b in pairs}
    return known, owners, shapes


def _make_constant(first: Trace, second: Trace, shapes: Mapping[str, recording.Shape]) -> None:
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


def _same_tensor(one: Any, two: Any) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return bool(((one == two) | ((one != one) & (two != two))).all())


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
