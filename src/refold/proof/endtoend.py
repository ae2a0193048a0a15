"""Both models as they ship, on the same inputs, against the original in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import final

import numpy as np

from refold.errors import CannotRunError, InputError
from refold.frontend import AnyArray, Frontend, Lifted
from refold.graph.graph import Graph, Value
from refold.proof.certificate import EndToEndResult, Verdict
from refold.shown import printable

# Correct folds of RepVGG stacks have ratios from 1.1 to 1.6; one layer that is off by 1e-5 has 3.8.
_WARN, _FAIL = 2.0, 4.0
_FLOOR = 4.0  # roundings of the output that nobody counts
# Runtimes may take what is smaller than the smallest normal number for zero.
_TINY = {"float16": 2.0**-22, "bfloat16": 2.0**-126, "float64": 2.0**-1022}

# What an input may have at most: a file may claim any size.
_MOST_NUMBERS = 2**30

# Of all values of examples that are run as one batch.
_MOST_BYTES = 2**28

# Why nothing was measured on some sizes.
NOT_HERE = "the original does not run"

_INTEGERS = ("int", "uint", "bool")


def is_integer(dtype: str) -> bool:
    """Whether a tensor of this type holds no real numbers."""
    return dtype.startswith(_INTEGERS)


def random_input(value: Value, rng: np.random.Generator, batch: int) -> AnyArray:
    """An input of the nominal size; whole numbers are 0 or 1, which any table of indices has. Raises InputError for
    one that no memory holds."""
    shape = (*(batch if size is None else size for size in value.shape[:1]), *value.nominal[1:])
    if prod(shape) > _MOST_NUMBERS:
        raise InputError(f"the input '{printable(value.name)}' of shape {shape} is too large to be tried")
    if is_integer(value.dtype):
        return rng.integers(0, 2, shape).astype(value.dtype)
    return rng.standard_normal(shape).astype(_numpy_type(value.dtype))


def _numpy_type(dtype: str) -> str:
    return dtype if dtype in ("float16", "float32", "float64") else "float32"


@final
@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs to measure on. ``must_run`` says that the original is known to run at these sizes: where it does
    not run at others, nothing is measured there. ``joins`` says that this is one example, which may go into a
    batch with others."""

    name: str
    arrays: Sequence[AnyArray]
    must_run: bool = True
    joins: bool = False


def input_sets(
    graph: Graph,
    given: Sequence[AnyArray] | None,
    normal: Sequence[AnyArray],
    small: Sequence[AnyArray],
    rng: np.random.Generator,
) -> list[Inputs]:
    """The inputs that the models are measured on.

    Beside the given ones: random normal numbers at the real size, alone; uniform ones, zeros, ones, large and
    subnormal numbers, and a single one in a corner and in the middle, each an example of the size of ``small``, at
    which the original runs as well; where other sizes are free, also odd ones in a batch of 3, and 1.
    """
    values = [graph.values[name] for name in graph.inputs]
    is_smaller = any(one.shape != two.shape for one, two in zip(normal, small, strict=True))
    sets = [] if given is None else [Inputs("given", list(given))]
    sets.append(Inputs("normal", normal))
    if any(array.dtype.kind == "f" for array in normal):
        fillers: Mapping[str, Callable[[AnyArray], AnyArray]] = {
            "uniform": lambda x: rng.uniform(0.0, 1.0, x.shape),
            "zeros": np.zeros_like,
            "ones": np.ones_like,
            "large": lambda x: 1000.0 * x.astype(np.float64),
            "subnormal": lambda x: x.astype(np.float64) * float(np.finfo(x.dtype).tiny) / 8,
            "one in a corner": lambda x: _one_hot(x.shape, 0.0),
            "one in the middle": lambda x: _one_hot(x.shape, 0.5),
        }
        for name, fill in fillers.items():
            filled = [x if x.dtype.kind != "f" else fill(x).astype(x.dtype) for x in small]
            sets.append(Inputs(name, filled, must_run=not is_smaller, joins=True))
    elif any(value.shape[:1] == (None,) for value in values):
        sets.append(Inputs("batch of 3", [random_input(value, rng, 3) for value in values]))
    if any(None in value.shape[1:] for value in values):
        like = [replace(value, nominal=array.shape) for value, array in zip(values, small, strict=True)]
        odd = [random_input(_resized(value, lambda size: (size | 1) + 2), rng, 3) for value in like]
        sets.append(Inputs("odd sizes", odd, must_run=False))
        sets.append(Inputs("sizes of 1", [random_input(_resized(v, lambda _: 1), rng, 1) for v in like], False))
    return sets


def left_out(graph: Graph) -> Iterator[str]:
    """Which inputs nothing is measured on, and why, as far as the graph says it."""
    values = [graph.values[name] for name in graph.inputs]
    batches = [value.shape[0] for value in values if value.shape]
    if batches and None not in batches:
        yield f"other batch sizes: the model takes batches of {' and '.join(map(str, dict.fromkeys(batches)))} only"
    if values and not any(None in value.shape[1:] for value in values):
        yield "odd sizes, sizes of 1: the model takes one size only"
    if values and all(is_integer(value.dtype) for value in values):
        yield "zeros, ones, large, subnormal: the model takes whole numbers only"


def together(graph: Graph, sets: Sequence[Inputs]) -> Iterator[tuple[Inputs, ...]]:
    """The inputs, in groups that are run as one batch: single examples, where batches are free, and as many as
    fit into some memory."""
    ends = [graph.values[name] for name in (*graph.inputs, *graph.outputs)]
    waiting: list[Inputs] = []
    most = 1
    for inputs in sets:
        if not inputs.joins or any(value.shape[:1] != (None,) for value in ends):
            if waiting:
                yield tuple(waiting)
                waiting.clear()
            yield (inputs,)
            continue
        if not waiting:
            most = max(_MOST_BYTES // _bytes(graph, inputs.arrays), 2)
        waiting.append(inputs)
        if len(waiting) == most:
            yield tuple(waiting)
            waiting.clear()
    if waiting:
        yield tuple(waiting)


def _bytes(graph: Graph, arrays: Sequence[AnyArray]) -> int:
    """About what all values of one example take in float64, if they grow with the inputs."""
    usual = sum(prod(graph.values[name].nominal[1:]) for name in graph.inputs)
    share = sum(prod(array.shape[1:]) for array in arrays) / max(usual, 1)
    return max(int(8 * share * sum(prod(value.nominal[1:]) for value in graph.values.values())), 1)


def _one_hot(shape: tuple[int, ...], place: float) -> AnyArray:
    """In each example a single one, that far along each of its axes."""
    found = np.zeros(shape)
    if found.size:
        examples = found.reshape((*shape[:1], -1)) if shape else found.reshape(1, 1)
        spot = [int(place * size) for size in shape[1:]]
        examples[:, np.ravel_multi_index(spot, shape[1:]) if spot else 0] = 1.0
    return found


def _resized(value: Value, size: Callable[[int], int]) -> Value:
    """The value at another nominal size where its sizes are free."""
    nominal = tuple(
        size(old) if known is None and axis else old
        for axis, (known, old) in enumerate(zip(value.shape, value.nominal, strict=True))
    )
    return replace(value, nominal=nominal)


@final
@dataclass(frozen=True, eq=False)
class Measurement:
    """What was found on one set of inputs, and why there is no float64 reference, if there is none. ``skipped``
    says why the original does not run there."""

    inputs: str
    results: Sequence[EndToEndResult]
    why_no_reference: str = ""
    skipped: str = ""


@final
@dataclass(frozen=True, eq=False)
class _Run:
    """What both models, and the original in float64, make of some inputs."""

    original: Sequence[AnyArray]
    other: Sequence[AnyArray]
    exact: Sequence[AnyArray] | None
    why_no_reference: str = ""


def measure(
    frontend: Frontend,
    before: Lifted,
    after: Lifted,
    group: Sequence[Inputs],
    *,
    proved: bool,
    known: Mapping[str, AnyArray] | None = None,
) -> list[Measurement]:
    """The errors of all outputs on some inputs, which are run as one batch if there are several. ``proved`` says
    that the functions are known to be equal, so that errors are only told; ``known`` are values of the original in
    float64 on these inputs, where they were computed already."""
    with np.errstate(all="ignore"):
        if len(group) == 1:
            found = _run(frontend, before, after, group[0], known)
            if isinstance(found, Measurement):
                return [found]
            return [_measured(before.graph, group[0].name, found, proved)]
        arrays = [np.concatenate(parts) for parts in zip(*(inputs.arrays for inputs in group), strict=True)]
        try:
            batch = _run(frontend, before, after, Inputs("", arrays), None)
        except Exception:  # whatever the framework raises on more examples than one
            batch = None
        if isinstance(batch, _Run) and not batch.why_no_reference:
            ends = (*batch.original, *batch.other, *(batch.exact or ()))
            if all(end.ndim and len(end) == len(group) for end in ends):
                rows = [_row(batch, place) for place in range(len(group))]
                return [_measured(before.graph, i.name, r, proved) for i, r in zip(group, rows, strict=True)]
        # Together they do not run, or not as so many examples: then one by one, so that it is said of which.
        return [one for inputs in group for one in measure(frontend, before, after, [inputs], proved=proved)]


def _row(run: _Run, place: int) -> _Run:
    def row(ends: Sequence[AnyArray]) -> list[AnyArray]:
        return [end[place : place + 1] for end in ends]

    return _Run(row(run.original), row(run.other), None if run.exact is None else row(run.exact))


def _run(
    frontend: Frontend, before: Lifted, after: Lifted, inputs: Inputs, known: Mapping[str, AnyArray] | None
) -> _Run | Measurement:
    """Run the models, or say what came of it where one does not run."""
    name, outputs = inputs.name, before.graph.outputs
    try:
        original = [np.asarray(value) for value in frontend.run(before, inputs.arrays)]
    except CannotRunError as error:
        return Measurement(name, (), skipped=str(error))
    except Exception:  # whatever the framework raises on sizes that do not fit
        if inputs.must_run:
            raise
        return Measurement(name, (), skipped=NOT_HERE)
    if not inputs.must_run and not any(value.size for value in original):
        # Where nothing comes out, runtimes may refuse to compute it.
        return Measurement(name, (), skipped=NOT_HERE)
    try:
        other = [np.asarray(value) for value in frontend.run(after, inputs.arrays)]
    except Exception as error:  # likewise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        sentence = f"the other model does not run on what the original runs on ({reason})"
        return Measurement(name, [_refuted(name, output, sentence) for output in dict.fromkeys(outputs)])
    try:
        feeds = dict(zip(before.graph.inputs, inputs.arrays, strict=True))
        wanted = list(dict.fromkeys(outputs))
        seen = known is not None and all(output in known for output in wanted)
        found = known if known is not None and seen else frontend.evaluate(before, feeds, wanted)
    except InputError as error:
        return _Run(original, other, None, str(error))
    return _Run(original, other, [np.asarray(found[output]) for output in outputs])


def _measured(graph: Graph, name: str, run: _Run, proved: bool) -> Measurement:
    """The errors on one set of inputs."""
    results = []
    for place, (output, one, two) in enumerate(zip(graph.outputs, run.original, run.other, strict=True)):
        exact = None if run.exact is None else run.exact[place]
        results.append(_output(name, output, graph.values[output].dtype, one, two, exact, proved))
    return Measurement(name, results, run.why_no_reference)


def _refuted(inputs: str, output: str, sentence: str) -> EndToEndResult:
    return EndToEndResult(
        inputs, output, Verdict.REFUTED, np.inf, np.inf, None, None, np.inf, False, None, sentence
    )


def _output(
    inputs: str, output: str, dtype: str, one: AnyArray, two: AnyArray, exact: AnyArray | None, proved: bool
) -> EndToEndResult:
    if one.shape != two.shape:
        return _refuted(inputs, output, f"the shapes differ: {one.shape} and {two.shape}")
    precision = str(one.dtype)
    one, two = one.astype(np.float64), two.astype(np.float64)
    top1 = _top1(one, two)
    u = _roundoff(dtype, precision)
    finite = np.isfinite(one) & np.isfinite(two)
    # Where only the original overflowed, the other model does better, which is no fault.
    lost = np.isfinite(one) & ~np.isfinite(two)
    gained = ~np.isfinite(one) & np.isfinite(two)
    if exact is not None and exact.shape == one.shape:
        gained &= ~np.isfinite(exact)
    alike = not bool(lost.any() or gained.any())
    truth = exact if exact is not None and exact.shape == one.shape else one
    finite &= np.isfinite(truth)
    error, size = np.where(finite, two - truth, 0.0), np.where(finite, truth, 0.0)
    floor = _FLOOR * u * _rms(size) + max(_TINY.get(name, 2.0**-126) for name in (dtype, precision))
    mine: tuple[float | None, float | None] = (None, None)
    if truth is not one:
        own = np.where(finite, one - truth, 0.0)
        mine = (float(np.max(np.abs(own), initial=0.0)), _rms(own))
    ratio = _rms(error) / max(mine[1] or 0.0, floor)
    verdict: Verdict = Verdict.MEASURED
    sentence = ""
    if not alike:
        verdict, sentence = Verdict.REFUTED, "they are not finite at the same places"
    elif truth is one:
        # Two float results differ by what rounding makes of them; without a reference that is a guess.
        if _rms(error) > 1e3 * floor / _FLOOR and not proved:
            verdict, sentence = Verdict.REFUTED, "the two models differ by far more than roundings of the output"
    elif ratio > _FAIL and not proved:
        verdict, sentence = Verdict.REFUTED, f"the error is {ratio:.3g} times the original's own"
    elif ratio > _WARN:
        sentence = f"the error is {ratio:.3g} times the original's own"
    return EndToEndResult(
        inputs,
        output,
        verdict,
        float(np.max(np.abs(error), initial=0.0)),
        _rms(error),
        *mine,
        ratio,
        alike,
        top1,
        sentence,
    )


def _rms(values: AnyArray) -> float:
    if not values.size:
        return 0.0
    largest = float(np.max(np.abs(values)))
    if largest == 0.0 or not np.isfinite(largest):
        return largest
    return largest * float(np.sqrt(np.mean((values / largest) ** 2)))


def _roundoff(*dtypes: str) -> float:
    known = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float64": 2.0**-53}
    return max(known.get(dtype, 2.0**-24) for dtype in dtypes)


def _top1(one: AnyArray, two: AnyArray) -> float | None:
    if one.ndim != 2 or one.shape[1] < 2 or not one.shape[0]:
        return None
    return float(np.mean(np.argmax(one, axis=1) == np.argmax(two, axis=1)))
