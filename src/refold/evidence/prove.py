"""Proving that two models are one function: structure, algebra, real activations, end to end."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from refold.errors import InputError
from refold.evidence.certificate import Certificate, EndToEnd, RegionResult, Verdict
from refold.evidence.matching import Pairing, digest, pair_up
from refold.evidence.regions import Side, prove_region, side_of
from refold.frontend import AnyArray, Frontend, Lifted
from refold.graph.graph import Graph

# Without a proof of every part, the folded model's error may be this many times the original's own.
MOST_ERROR_RATIO = 4.0


def prove(
    frontend: Frontend,
    before: Lifted,
    after: Lifted,
    inputs: Sequence[AnyArray] | None = None,
    *,
    seed: int = 0,
    versions: Mapping[str, str] | None = None,
) -> Certificate:
    """The certificate for two lifted models of one framework, ``before`` being the one to hold to.

    ``inputs`` are arrays for the graph's inputs, in order; without them random, zero and large ones are
    made. The models need not come from :func:`refold.fold`. Deterministic for a given ``seed``.
    """
    rng = np.random.default_rng(seed)
    structure = _interface(before.graph, after.graph)
    digests = {"before": _digest(frontend, before), "after": _digest(frontend, after)}
    known = {"python": platform.python_version(), "numpy": np.__version__, **(versions or {})}
    if structure:
        return Certificate(
            Verdict.REFUTED, False, structure, (), (), (), digests=digests, versions=known, seed=seed
        )
    probe = dict(zip(before.graph.inputs, _random_inputs(before.graph, rng, 2), strict=True))
    pairing = pair_up(frontend, before, after, probe)
    regions = _prove_regions(frontend, before, after, pairing, rng)
    regions = _locally(frontend, before, after, regions, probe)
    kinds = {"given": list(inputs)} if inputs is not None else _input_kinds(before.graph, rng)
    end_to_end = tuple(_run_both(frontend, before, after, kind, arrays) for kind, arrays in kinds.items())
    unmatched = tuple(
        [f"{node.name} of the first model" for node in pairing.left_before]
        + [f"{node.name} of the second model" for node in pairing.left_after]
    )
    verdict, ok = _verdict(regions, end_to_end, unmatched)
    return Certificate(
        verdict=verdict,
        ok=ok,
        structure=structure,
        unmatched=unmatched,
        regions=regions,
        end_to_end=end_to_end,
        matched=len(pairing.nodes),
        digests=digests,
        versions=known,
        seed=seed,
    )


def _verdict(
    regions: Sequence[RegionResult], end_to_end: Sequence[EndToEnd], unmatched: Sequence[str]
) -> tuple[Verdict, bool]:
    if any(not entry.finite for entry in end_to_end):
        return Verdict.REFUTED, False
    if not unmatched and any(region.verdict is Verdict.REFUTED for region in regions):
        return Verdict.REFUTED, False
    if not unmatched and all(region.verdict is Verdict.PROVED for region in regions):
        return Verdict.PROVED, True
    ratios = [entry.ratio for entry in end_to_end]
    measured = [ratio for ratio in ratios if ratio is not None]
    if not measured:
        return Verdict.SKIPPED, False
    if max(measured) > MOST_ERROR_RATIO:
        return Verdict.REFUTED, False
    return Verdict.MEASURED, True


# ---- structure -----------------------------------------------------------------------------------


def _interface(before: Graph, after: Graph) -> tuple[str, ...]:
    different = []
    for what, one, other in (
        ("inputs", before.inputs, after.inputs),
        ("outputs", before.outputs, after.outputs),
    ):
        if len(one) != len(other):
            different.append(f"the first model has {len(one)} {what}, the second {len(other)}")
            continue
        for a, b in zip(one, other, strict=True):
            first, second = before.values[a], after.values[b]
            # An output may be known better after folding; an input must be as free as it was.
            same_shape = len(first.shape) == len(second.shape) and all(
                one == other or (one is None and what == "outputs")
                for one, other in zip(first.shape, second.shape, strict=True)
            )
            if not same_shape or first.dtype != second.dtype:
                different.append(
                    f"{what[:-1]} {a} is {first.dtype} {first.shape} in the first model and "
                    f"{second.dtype} {second.shape} in the second"
                )
    return tuple(different)


def _digest(frontend: Frontend, lifted: Lifted) -> str:
    """A digest of a model: its nodes, how they hang together, and all numbers in them."""
    state = hashlib.sha256()
    for node in lifted.graph.nodes:
        state.update(f"{node.name} {node.inputs} {node.outputs}".encode())
        state.update(digest(frontend, lifted, node).encode())
    state.update(repr((lifted.graph.inputs, lifted.graph.outputs)).encode())
    return state.hexdigest()


# ---- algebra -------------------------------------------------------------------------------------


def _prove_regions(
    frontend: Frontend, before: Lifted, after: Lifted, pairing: Pairing, rng: np.random.Generator
) -> tuple[RegionResult, ...]:
    """Prove every linear tensor that an operator or an output reads, in order, each from those before it."""
    atoms: dict[str, str] = dict(zip(before.graph.inputs, after.graph.inputs, strict=True))
    for one, other in pairing.nodes:
        atoms.update(zip(one.outputs, other.outputs, strict=True))
    wanted: list[tuple[str, str]] = []
    for one, other in pairing.nodes:
        wanted += zip(one.inputs, other.inputs, strict=True)
    wanted += zip(before.graph.outputs, after.graph.outputs, strict=True)
    order = {node.outputs[0]: i for i, node in enumerate(before.graph.nodes) if node.outputs}
    results: list[RegionResult] = []
    proved = dict(atoms)
    done: set[tuple[str, str]] = set()
    for a, b in sorted(wanted, key=lambda entry: order.get(entry[0], -1)):
        if proved.get(a) == b or (a, b) in done:
            continue
        done.add((a, b))
        result = _prove_one(frontend, before, after, a, b, proved, atoms, rng)
        results.append(result)
        if result.verdict is Verdict.PROVED:
            proved.setdefault(a, b)
    return tuple(results)


def _prove_one(
    frontend: Frontend,
    before: Lifted,
    after: Lifted,
    a: str,
    b: str,
    proved: Mapping[str, str],
    atoms: Mapping[str, str],
    rng: np.random.Generator,
) -> RegionResult:
    for stops in (proved, atoms):  # from the nearest equal tensors if both sides have them, else from afar
        one = side_of(frontend, before, a, set(stops) - {a})
        other = side_of(frontend, after, b, set(stops.values()) - {b})
        strangers = [leaf for leaf in one.leaves if leaf not in stops]
        known = set(stops.values())
        strangers += [leaf for leaf in other.leaves if leaf not in known]
        if strangers:
            reason = f"it depends on {strangers[0]}, which has no counterpart"
            return RegionResult(a, b, Verdict.SKIPPED, reason)
        if {stops[leaf] for leaf in one.leaves} == set(other.leaves):
            return prove_region(one, other, {leaf: stops[leaf] for leaf in one.leaves}, rng)
    return _with_all_leaves(one, other, atoms, rng)


def _with_all_leaves(one: Side, other: Side, atoms: Mapping[str, str], rng: np.random.Generator) -> RegionResult:
    """The two sides read different tensors: equal only if what just one of them reads has no effect."""
    back = {theirs: ours for ours, theirs in atoms.items()}
    leaves = {leaf: atoms[leaf] for leaf in (*one.leaves, *(back[leaf] for leaf in other.leaves))}
    return prove_region(one, other, leaves, rng)


# ---- on real activations, and end to end -----------------------------------------------------------


def _locally(
    frontend: Frontend,
    before: Lifted,
    after: Lifted,
    regions: tuple[RegionResult, ...],
    feeds: Mapping[str, AnyArray],
) -> tuple[RegionResult, ...]:
    """Add to each region how far the two models are apart there on real activations, in float64."""
    renamed = dict(zip(after.graph.inputs, (feeds[name] for name in before.graph.inputs), strict=True))
    try:
        first = frontend.evaluate(before, feeds, [region.where for region in regions])
        second = frontend.evaluate(after, renamed, [region.counterpart for region in regions])
    except InputError:
        return regions
    found = []
    for region in regions:
        one, other = first[region.where], second[region.counterpart]
        local = float("inf")
        if one.shape == other.shape:
            scale = max(float(np.abs(one).max()), 1e-30)
            local = float(np.abs(one - other).max()) / scale
        found.append(replace(region, local=local))
    return tuple(found)


def _random_inputs(graph: Graph, rng: np.random.Generator, batch: int) -> list[AnyArray]:
    arrays: list[AnyArray] = []
    for name in graph.inputs:
        value = graph.values[name]
        shape = (batch, *value.nominal[1:])
        if "float" in value.dtype:
            arrays.append(rng.normal(size=shape).astype("float32"))
        else:
            arrays.append(rng.integers(0, 2, size=shape).astype(value.dtype))
    return arrays


def _input_kinds(graph: Graph, rng: np.random.Generator) -> dict[str, list[AnyArray]]:
    random = _random_inputs(graph, rng, 2)
    return {
        "random": random,
        "zeros": [np.zeros_like(array) for array in random],
        "large": [array * array.dtype.type(100) if array.dtype.kind == "f" else array for array in random],
    }


def _run_both(frontend: Frontend, before: Lifted, after: Lifted, kind: str, inputs: Sequence[AnyArray]) -> EndToEnd:
    first = [np.asarray(output, dtype=np.float64) for output in frontend.run(before, inputs)]
    second = [np.asarray(output, dtype=np.float64) for output in frontend.run(after, inputs)]
    finite = all(
        one.shape == other.shape and np.array_equal(np.isfinite(one), np.isfinite(other))
        for one, other in zip(first, second, strict=True)
    )
    if not finite:
        return EndToEnd(kind, None, None, None, None, float("inf"), False)
    try:
        feeds = dict(zip(before.graph.inputs, inputs, strict=True))
        values = frontend.evaluate(before, feeds, before.graph.outputs)
    except InputError as error:
        gap, _, _ = _error(second, first)
        return EndToEnd(kind, None, None, None, None, gap, True, _same_top(first, second), str(error))
    reference = [values[name] for name in before.graph.outputs]
    original, original_rms, _ = _error(first, reference)
    folded, folded_rms, _ = _error(second, reference)
    gap, _, _ = _error(second, first)
    return EndToEnd(kind, original, folded, original_rms, folded_rms, gap, True, _same_top(first, second))


def _error(given: Sequence[AnyArray], wanted: Sequence[AnyArray]) -> tuple[float, float, float]:
    """Largest and root mean square error over all outputs, relative to the largest number wanted."""
    good = [np.isfinite(a) & np.isfinite(b) for a, b in zip(given, wanted, strict=True)]
    gaps = np.concatenate([(a - b)[m].reshape(-1) for a, b, m in zip(given, wanted, good, strict=True)])
    sizes = np.concatenate([np.abs(b[m]).reshape(-1) for b, m in zip(wanted, good, strict=True)])
    if gaps.size == 0:
        return 0.0, 0.0, 0.0
    scale = max(float(sizes.max()), 1e-30)
    return float(np.abs(gaps).max()) / scale, float(np.sqrt(np.mean(gaps**2))) / scale, scale


def _same_top(first: Sequence[AnyArray], second: Sequence[AnyArray]) -> float | None:
    """How often both put the same class first, where the one output looks like classes."""
    if len(first) != 1 or first[0].ndim != 2 or first[0].shape[1] < 2:
        return None
    return float(np.mean(first[0].argmax(axis=1) == second[0].argmax(axis=1)))
