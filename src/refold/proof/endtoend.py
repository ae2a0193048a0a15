"""Both models as they ship, on the same inputs, against the original in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refold.errors import InputError
from refold.frontend import AnyArray, Frontend, Lifted
from refold.graph.graph import Graph, Value
from refold.proof.certificate import EndToEndResult, Verdict

# Correct folds of RepVGG stacks have ratios from 1.1 to 1.6; one layer that is off by 1e-5 has 3.8.
_WARN, _FAIL = 2.0, 4.0
_FLOOR = 4.0  # roundings of the output that nobody counts

_INTEGERS = ("int", "uint", "bool")


def is_integer(dtype: str) -> bool:
    """Whether a tensor of this type holds no real numbers."""
    return dtype.startswith(_INTEGERS)


def random_input(value: Value, rng: np.random.Generator, batch: int) -> AnyArray:
    """An input of the nominal size; whole numbers are 0 or 1, which any table of indices has."""
    first = tuple(batch if size is None else size for size in value.shape[:1])
    shape = (*first, *value.nominal[1:])
    if is_integer(value.dtype):
        return rng.integers(0, 2, shape).astype(value.dtype)
    return rng.standard_normal(shape).astype(_numpy_type(value.dtype))


def _numpy_type(dtype: str) -> str:
    return dtype if dtype in ("float16", "float32", "float64") else "float32"


def input_sets(
    graph: Graph, given: Sequence[AnyArray] | None, rng: np.random.Generator
) -> dict[str, list[AnyArray]]:
    """The inputs that the models are measured on, by name."""
    normal = [random_input(graph.values[name], rng, 2) for name in graph.inputs]
    sets = {} if given is None else {"given": list(given)}
    sets["normal"] = normal
    for name, factor in (("zeros", 0), ("large", 1000)):
        sets[name] = [x if x.dtype.kind != "f" else (x * factor).astype(x.dtype) for x in normal]
    return sets


def measure(
    frontend: Frontend, before: Lifted, after: Lifted, name: str, inputs: Sequence[AnyArray], *, proved: bool
) -> tuple[list[EndToEndResult], str]:
    """The results for all outputs; and why there is no float64 reference, if there is none."""
    with np.errstate(all="ignore"):
        original = [np.asarray(value) for value in frontend.run(before, inputs)]
        other = [np.asarray(value) for value in frontend.run(after, inputs)]
        reference: list[AnyArray] | None = None
        why = ""
        try:
            feeds = dict(zip(before.graph.inputs, inputs, strict=True))
            found = frontend.evaluate(before, feeds, list(dict.fromkeys(before.graph.outputs)))
            reference = [np.asarray(found[output]) for output in before.graph.outputs]
        except InputError as error:
            why = f"no float64 reference: {error}"
        results = []
        for place, (output, one, two) in enumerate(zip(before.graph.outputs, original, other, strict=True)):
            exact = None if reference is None else reference[place]
            dtype = before.graph.values[output].dtype
            results.append(_output(name, output, dtype, one, two, exact, proved))
        return results, why


def _output(
    inputs: str, output: str, dtype: str, one: AnyArray, two: AnyArray, exact: AnyArray | None, proved: bool
) -> EndToEndResult:
    if one.shape != two.shape:
        sentence = f"the shapes differ: {one.shape} and {two.shape}"
        return EndToEndResult(
            inputs, output, Verdict.REFUTED, np.inf, np.inf, None, None, np.inf, False, None, sentence
        )
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
    floor = _FLOOR * u * _rms(size) + np.finfo(np.float64).tiny
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
        if _rms(error) > 1e3 * u * max(_rms(size), np.finfo(np.float64).tiny) and not proved:
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
