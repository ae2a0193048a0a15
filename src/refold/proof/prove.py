"""Are two models the same function?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata

import numpy as np

from refold.frontend import AnyArray, Frontend, Lifted
from refold.proof import endtoend
from refold.proof.certificate import (
    Certificate,
    EndToEndResult,
    LocalResult,
    RegionResult,
    StructureResult,
    Verdict,
    worst,
)
from refold.proof.claims import Claims
from refold.proof.digest import Keys, digests, same_parameters
from refold.proof.pairing import pair
from refold.proof.passing import settle
from refold.proof.trial import Models, Witness


def prove(
    frontend: Frontend,
    before: Lifted,
    after: Lifted,
    inputs: Sequence[AnyArray] | None = None,
    *,
    seed: int = 0,
    versions: Mapping[str, str] | None = None,
    witness: Witness | None = None,
    end_to_end: bool = True,
) -> Certificate:
    """Prove that ``after`` computes what ``before`` computes, measure how far apart they are, or show
    where they differ. Neither model needs to be made by a fold.

    ``inputs`` are real inputs, in the order of the graph's, for the part that is measured; random ones
    are used besides. ``versions`` names the versions of the framework for the certificate.
    ``witness`` says regions as formulas, which are checked and never believed: with it wide regions are proved
    weight by weight. Without ``end_to_end`` what is proved is not measured besides.
    """
    rng = np.random.default_rng(seed)
    keys = Keys(frontend, before), Keys(frontend, after)
    structure = _interface(before, after)
    regions: list[RegionResult] = []
    local: list[LocalResult] = []
    ends: list[EndToEndResult] = []
    notes = list(dict.fromkeys((*before.notes, *after.notes)))
    if not structure:
        graph = before.graph
        normal = [endtoend.random_input(graph.values[name], rng, 1) for name in graph.inputs]
        reference, models, passages = settle(frontend, (before, after), normal, keys)
        known_keys = Keys(reference, models[0], keys[0].known), Keys(reference, models[1], keys[1].known)
        pairing = pair(reference, *models, normal, known_keys)
        if pairing.why_no_values:
            notes.append(f"no float64 reference of the whole model: {pairing.why_no_values}")
        claims = Claims(Models(reference, *models, witness), known_keys, pairing, rng)
        claims.prove()
        structure, regions, local = claims.structure(), claims.regions(), claims.local()
        structure += [StructureResult(where, Verdict.PROVED, sentence) for where, sentence in passages]
        inner = _inner(structure, regions, local)
        failures: dict[str, list[str]] = {}
        if not end_to_end and inner is Verdict.PROVED:
            notes.append("the whole models were not run: only a proof was asked for")
        else:
            sets = endtoend.input_sets(graph, inputs, normal, pairing.inputs, rng)
            notes += [f"not measured on {sentence}" for sentence in endtoend.left_out(graph)]
            for group in endtoend.together(graph, sets):
                known = pairing.values if group[0].arrays is normal and pairing.inputs is normal else None
                for found in endtoend.measure(
                    frontend, before, after, group, proved=inner is Verdict.PROVED, known=known
                ):
                    ends += found.results
                    if found.skipped:
                        failures.setdefault(found.skipped, []).append(found.inputs)
                    if found.why_no_reference:
                        why = f"no float64 reference: {found.why_no_reference}"
                        failures.setdefault(why, []).append(found.inputs)
        notes += [f"inputs {', '.join(names)}: {why}" for why, names in failures.items()]
    verdict, sentence = _summary(structure, regions, local, ends)
    return Certificate(
        verdict=verdict,
        sentence=sentence,
        structure=tuple(structure),
        regions=tuple(regions),
        local=tuple(local),
        end_to_end=tuple(ends),
        before=digests(before, keys[0]),
        after=digests(after, keys[1]),
        seed=seed,
        versions=_versions(versions),
        notes=tuple(notes),
    )


def _interface(before: Lifted, after: Lifted) -> list[StructureResult]:
    """What is wrong with the interface; nothing if all is well."""
    found = []
    for one, two in zip(before.graph.inputs, after.graph.inputs, strict=False):
        sentence = _defaults(before.defaults.get(one), after.defaults.get(two))
        if sentence:
            found.append(StructureResult(one, Verdict.REFUTED, f"{sentence} ('{two}' in the other model)"))
    for what in ("inputs", "outputs"):
        mine, theirs = getattr(before.graph, what), getattr(after.graph, what)
        if len(mine) != len(theirs):
            sentence = f"the original has {len(mine)} {what}, the other model {len(theirs)}"
            found.append(StructureResult(what, Verdict.REFUTED, sentence))
            continue
        for one, two in zip(mine, theirs, strict=True):
            first, second = before.graph.values[one], after.graph.values[two]
            # A size of an output may be known in one model only; an input must be as free as it was.
            fits = len(first.shape) == len(second.shape) and all(
                a == b or (what == "outputs" and None in (a, b))
                for a, b in zip(first.shape, second.shape, strict=True)
            )
            for words, same, a, b in (
                ("shape", fits, first.shape, second.shape),
                ("type", first.dtype == second.dtype, first.dtype, second.dtype),
            ):
                if not same:
                    sentence = f"its {words} is {a} in the original and {b} in the other model ('{two}')"
                    found.append(StructureResult(one, Verdict.REFUTED, sentence))
    return found


def _defaults(one: Callable[[], AnyArray] | None, two: Callable[[], AnyArray] | None) -> str:
    """What is wrong with what an input is where callers leave it out, if anything is."""
    if one is None and two is None:
        return ""
    if one is None or two is None:
        return "callers may leave it out in one of the two models only"
    same = same_parameters([one()], [two()])
    return "" if same else "what it is where callers leave it out is not the same"


def _inner(
    structure: Sequence[StructureResult], regions: Sequence[RegionResult], local: Sequence[LocalResult]
) -> Verdict:
    """What is known without running the whole models."""
    return worst([*(r.verdict for r in structure), *(r.verdict for r in regions), *(r.verdict for r in local)])


def _summary(
    structure: Sequence[StructureResult],
    regions: Sequence[RegionResult],
    local: Sequence[LocalResult],
    ends: Sequence[EndToEndResult],
) -> tuple[Verdict, str]:
    faults = [f"{r.where}: {r.sentence}" for r in structure if r.verdict is Verdict.REFUTED]
    faults += [f"{r.where}: {r.sentence}" for r in regions if r.verdict is Verdict.REFUTED]
    faults += [
        f"{r.where}: its error on real activations is beyond rounding"
        for r in local
        if r.verdict is Verdict.REFUTED
    ]
    faults += [f"{r.output} on {r.inputs} inputs: {r.sentence}" for r in ends if r.verdict is Verdict.REFUTED]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        return Verdict.REFUTED, f"not the same function: {faults[0]}{more}"
    inner = _inner(structure, regions, local)
    count = sum(region.verdict is Verdict.PROVED for region in regions)
    if inner is Verdict.PROVED:
        return Verdict.PROVED, (
            f"the same function: {count} region{'' if count == 1 else 's'} proved, everything else is unchanged"
        )
    if not ends:
        return Verdict.SKIPPED, "not everything is proved, and nothing could be measured (the notes say why)"
    open_ends = (Verdict.MEASURED, Verdict.SKIPPED)
    reasons = [f"{r.where}: {r.sentence}" for r in structure if r.verdict in open_ends]
    reasons += [f"{r.where}: {r.sentence}" for r in regions if r.verdict in open_ends]
    return Verdict.MEASURED, (
        f"no difference beyond rounding was measured, but {len(reasons)} place{'' if len(reasons) == 1 else 's'} "
        f"could not be proved, first {reasons[0]}"
    )


def _versions(framework: Mapping[str, str] | None) -> dict[str, str]:
    try:
        own = metadata.version("refold")
    except metadata.PackageNotFoundError:
        own = "not installed"
    python = ".".join(str(part) for part in sys.version_info[:3])
    return {"refold": own, "python": python, "numpy": np.__version__, **(framework or {})}
