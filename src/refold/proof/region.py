"""One region: are two ways from the same leaves to a value the same affine function?

An affine map is determined by its values at 0 and at the unit vectors. Both models' own operators are
run on these in float64; the second model's weights must be the first one's, each rounded once
(Higham 2002, section 2.2: ``fl(w) = w (1 + d)`` with ``|d| <= u``, and an absolute error of half the
smallest subnormal number below the normal ones). Where that would take long, the weights are compared through
formulas that random probes confirm, or, where nobody can say a formula, by impulses away from the borders and
random signs.
"""

from __future__ import annotations

from math import prod

import numpy as np

from refold.errors import InputError
from refold.graph.graph import Affine, Node
from refold.proof import formulas, signs
from refold.proof.certificate import RegionResult, Verdict
from refold.proof.digest import same_parameters
from refold.proof.grid import GridError, Grids
from refold.proof.impulses import all_impulses, inner_impulses, spread_out
from refold.proof.trial import DifferentShapesError, Evidence, Link, Models, Trial

IMPULSES = "all unit impulses"
FORMULA = "every weight of a formula that random probes confirm"
SIGNS = "±1 random probes"
MIXED = "all unit impulses inside, ±1 random probes at the border"
SAME = "the same operators"

# All impulses are fed where that takes no more multiply-adds than so many examples of the real size, or than nobody
# waits for; where nothing better than random signs could take their place, for longer.
_EXAMPLES = 4.0
_QUICK_OPERATIONS = 2e8
_FEW_OPERATIONS = 2e9
_MOST_OPERATIONS = 1e11
_MOST_IMPULSES = 200_000


def examine(models: Models, link: Link, rng: np.random.Generator) -> tuple[RegionResult, Evidence]:
    """Prove a region, or refute it."""
    trial, evidence = Trial(models, link, rng), Evidence()
    verdict, note = Verdict.PROVED, ""
    try:
        grids = _grids(trial)
        try:
            method = _examined(trial, grids, evidence)
        except (InputError, DifferentShapesError):
            if all(sizes == tuple(trial.real) for sizes in grids.sizes):
                raise
            evidence = Evidence()
            grids = _as_they_are(trial)
            method = _examined(trial, grids, evidence)
        if evidence.doubt and not evidence.roundings:
            evidence.fault = evidence.fault or evidence.doubt
        if evidence.failed():
            verdict, note = Verdict.REFUTED, evidence.fault
        elif evidence.roundings:
            verdict = Verdict.MEASURED
            note = (
                f"weights differ by up to {evidence.ratio:.3g} times what one rounding allows: by some roundings, "
                "as if they had been folded in the precision that they are stored in"
            )
        else:
            note = _claim(trial, grids, evidence, method)
            if trial.is_free() and not grids.for_every_size and method != SAME:
                verdict = Verdict.MEASURED
    except InputError as error:
        verdict, note, method = Verdict.SKIPPED, f"no float64 reference: {error}", IMPULSES
        evidence.ratio = float("nan")
    except DifferentShapesError as error:
        verdict, note, method = Verdict.REFUTED, str(error), IMPULSES
        evidence.fault = note
        evidence.ratio = float("inf")
    return (
        RegionResult(
            where=link.before.value,
            counterpart=link.after.value,
            verdict=verdict,
            ratio=None if verdict is Verdict.SKIPPED else evidence.ratio,
            impulses=evidence.impulses,
            method=method,
            sizes=tuple(evidence.sizes),
            sentence=note,
        ),
        evidence,
    )


def _claim(trial: Trial, grids: Grids, evidence: Evidence, method: str) -> str:
    if method == SAME:
        return "the same operators with the same settings and parameters in both models"
    reach = "for every input"
    if trial.is_free():
        if grids.for_every_size:
            reach += " of these sizes and of larger ones with the same remainders by the stride"
        else:
            reach += " of these sizes"
    weights = "equal" if evidence.ratio == 0 else "the original's, each rounded once,"
    sentence = f"the weights are {weights} {reach}"
    if method == FORMULA:
        sentence += (
            f"; that the operators' weights are these up to {evidence.resolution:.1g} of the largest response is "
            f"wrong with a probability of at most 2^-{formulas.MISSED}"
        )
    elif method != IMPULSES:
        sentence += (
            f"; a difference of {2 * signs.DEVIATIONS:.0f} u |row| or more that only the "
            f"probes see is missed with a probability of at most 2^-{signs.PROBES}"
        )
    return sentence


def _grids(trial: Trial) -> Grids:
    try:
        return trial.grids()
    except GridError:
        return _as_they_are(trial)


def _as_they_are(trial: Trial) -> Grids:
    return Grids((tuple(trial.real),), frozenset(), False)


def _examined(trial: Trial, grids: Grids, evidence: Evidence) -> str:
    """Note what comes out of a region; gives the method."""
    if _are_same_operators(trial):
        return SAME
    evidence.sizes += [_written(sizes) for sizes in grids.sizes]
    impulses = sum(prod(leaf) for leaf in grids.sizes[0])
    operations = sum(trial.work(sizes) * sum(prod(leaf) for leaf in sizes) for sizes in grids.sizes)
    fits = impulses <= _MOST_IMPULSES
    if not fits or operations > max(_QUICK_OPERATIONS, _EXAMPLES * trial.work(trial.real)):
        if formulas.by_formula(trial, grids, evidence):
            return FORMULA
        fits = fits and operations <= (_FEW_OPERATIONS if grids.free else _MOST_OPERATIONS)
    for sizes in grids.sizes:
        if fits:
            all_impulses(trial, sizes, evidence)
        else:
            signs.random_signs(trial, sizes, evidence)
        if evidence.failed():
            break
    if fits:
        return IMPULSES
    spread = spread_out(trial, grids)
    if spread is None:
        return SIGNS
    evidence.sizes.append(_written(spread.sizes))
    inner_impulses(trial, spread, evidence)
    return MIXED


def _written(sizes: tuple[tuple[int, ...], ...]) -> str:
    return " + ".join("x".join(map(str, leaf)) for leaf in sizes)


def _are_same_operators(trial: Trial) -> bool:
    """The same operators on both sides, wired alike, of which the front end says that they are the same and
    the graph says that they do the same. Then nothing has to be computed, whatever they make of numbers."""
    before, after = trial.link.before, trial.link.after
    if len(before.nodes) != len(after.nodes) or not after.nodes:
        return False
    stands = {mine: frozenset(theirs) for mine, theirs in trial.link.leaves}
    for one, two in zip(before.nodes, after.nodes, strict=True):
        if len(one.inputs) != len(two.inputs) or len(one.outputs) != len(two.outputs):
            return False
        if not all(a in stands.get(b, ()) for a, b in zip(one.inputs, two.inputs, strict=True)):
            return False
        if not _is_same_operator(trial.models, one, two):
            return False
        stands.update((b, frozenset([a])) for a, b in zip(one.outputs, two.outputs, strict=True))
    return before.value in stands.get(after.value, ())


def _is_same_operator(models: Models, first: Node, second: Node) -> bool:
    one, two = first.op, second.op
    if isinstance(one, Affine) and isinstance(two, Affine):
        if (one.axis, one.conv.windows, one.conv.groups) != (two.axis, two.conv.windows, two.conv.groups):
            return False
    elif repr(one) != repr(two):  # as NaN is the same as NaN
        return False
    mine = models.frontend.identity(models.before, first.name)
    theirs = models.frontend.identity(models.after, second.name)
    if mine.unseen or theirs.unseen:
        return False
    if mine.kind != theirs.kind or not same_parameters(mine.parameters, theirs.parameters):
        return False
    if not isinstance(one, Affine) or not isinstance(two, Affine):
        return True
    del mine, theirs  # not both these and the kernels, which may be large
    return same_parameters((one.conv.kernel, one.conv.bias), (two.conv.kernel, two.conv.bias))
