"""One region: are two ways from the same leaves to a value the same affine function?

An affine map is determined by its values at 0 and at the unit vectors. Both models' own operators are
run on these in float64; the second model's weights must be the first one's, each rounded once
(Higham 2002, section 2.2: ``fl(w) = w (1 + d)`` with ``|d| <= u``, and an absolute error of half the
smallest subnormal number below the normal ones).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import final

import numpy as np

from refold.errors import InputError
from refold.frontend import AnyArray, Frontend, Lifted, unit_roundoff
from refold.graph.graph import Affine, Gain, Node, Pad
from refold.proof import grid
from refold.proof.certificate import RegionResult, Verdict
from refold.proof.cone import Cone
from refold.proof.grid import GridError, Grids, Side, Sizes

IMPULSES = "all unit impulses"
PROBES = "±1 random probes"
MIXED = "all unit impulses inside, ±1 random probes at the border"
SAME = "the same operator"

EPS = float(np.finfo(np.float64).eps)

# Half the smallest number of each type.
_ETA = {"float64": 0.0, "float32": 2.0**-150, "bfloat16": 2.0**-134, "float16": 2.0**-25}

_MOST_BYTES = 2**27  # of one batch of probes, with all that is computed from it
_MOST_ROWS = 2048
_FEW_OPERATIONS = 2e9  # multiply-adds that nobody waits for
_MOST_OPERATIONS = 1e11
_MOST_IMPULSES = 200_000
_PROBES = 40
# A sum of n terms d_i w_i x_i with |d_i| <= u and random signs x_i is above t u |w|_2 with a probability
# below 2 exp(-t*t/2) (Hoeffding 1963, theorem 2). |w|_2 itself is estimated from the probes, by at most
# a factor of 2 too low but for a probability below 1e-7.
_DEVIATIONS = 16.0


@final
@dataclass(frozen=True, eq=False)
class Link:
    """Two ways to a value. ``leaves`` pairs the leaves: one of the second model with those of the
    original that equal it."""

    leaves: tuple[tuple[str, tuple[str, ...]], ...]
    before: Cone
    after: Cone


@final
@dataclass(frozen=True, eq=False)
class Models:
    """What is compared."""

    frontend: Frontend
    before: Lifted
    after: Lifted


@final
@dataclass(eq=False)
class Evidence:
    """What came out of a region. ``sums`` holds, for each leaf, ``sum |W|`` by output, in a shape that
    broadcasts to the real one; empty where it is not known."""

    ratio: float = 0.0
    impulses: int = 0
    method: str = IMPULSES
    sizes: list[str] = field(default_factory=list)
    sums: list[AnyArray] = field(default_factory=list)
    bias: AnyArray | None = None
    fault: str = ""

    def add(self, ratio: float, what: str) -> None:
        """Note the worst ratio of some weights."""
        self.ratio = max(self.ratio, ratio)
        if not ratio <= 1.0 and not self.fault:
            self.fault = what


def examine(models: Models, link: Link, rng: np.random.Generator) -> tuple[RegionResult, Evidence]:
    """Prove a region, or refute it."""
    return _Examination(models, link, rng).result()


def respond(models: Models, link: Link, batches: Sequence[AnyArray], which: int) -> dict[str, AnyArray]:
    """All values of a region in one of the models, from batches for the leaves."""
    lifted, cone = ((models.before, link.before), (models.after, link.after))[which]
    feeds: dict[str, AnyArray] = {}
    for batch, (mine, theirs) in zip(batches, link.leaves, strict=True):
        feeds.update(dict.fromkeys(theirs if which == 0 else (mine,), batch))
    feeds = {name: feeds[name] for name in cone.leaves}
    wanted = [node.output for node in cone.nodes]
    found = models.frontend.evaluate(lifted, feeds, wanted) if wanted else {}
    return {**found, **feeds}


def roundoff(models: Models, cone: Cone) -> tuple[float, float]:
    """The relative and the absolute part of one rounding in the type that the region's constants have."""
    types = {models.frontend.storage(models.after, node.name) for node in cone.nodes if _has_constants(node)}
    return (
        max((unit_roundoff(dtype) for dtype in types), default=0.0),
        max((_ETA[dtype] for dtype in types), default=0.0),
    )


def _has_constants(node: Node) -> bool:
    match node.op:
        case Affine():
            return True
        case Gain(scale, shift):
            return (scale, shift) != (1.0, 0.0)
        case Pad(value=value):
            return value != 0.0
        case _:
            return False


class _DifferentShapesError(Exception):
    """The two values have different shapes."""


@final
class _Examination:
    def __init__(self, models: Models, link: Link, rng: np.random.Generator) -> None:
        self.models, self.link, self.rng = models, link, rng
        self.u, self.eta = roundoff(models, link.after)
        numbers: tuple[dict[str, int], dict[str, int]] = ({}, {})
        for number, (mine, theirs) in enumerate(link.leaves):
            numbers[1][mine] = number
            numbers[0].update(dict.fromkeys(theirs, number))
        self.sides = (
            Side(models.before.graph, link.before, numbers[0]),
            Side(models.after.graph, link.after, numbers[1]),
        )
        leaves = [models.after.graph.values[mine] for mine, _ in link.leaves]
        self.known = [tuple(size is not None for size in leaf.shape[1:]) for leaf in leaves]
        self.real: list[Sizes] = [
            tuple(size or small for size, small in zip(leaf.shape[1:], leaf.nominal[1:], strict=True))
            for leaf in leaves
        ]

    # ---- the verdict -----------------------------------------------------------------------------

    def result(self) -> tuple[RegionResult, Evidence]:
        evidence = Evidence()
        verdict, note = Verdict.PROVED, ""
        try:
            grids = self._grids(0)
            try:
                self._examine(grids, evidence)
            except (InputError, _DifferentShapesError):
                if all(sizes == tuple(self.real) for sizes in grids.sizes):
                    raise
                evidence = Evidence()
                grids = self._as_they_are()
                self._examine(grids, evidence)
            if evidence.fault:
                verdict, note = Verdict.REFUTED, evidence.fault
            else:
                note = self._claim(grids, evidence)
        except InputError as error:
            verdict, note = Verdict.SKIPPED, f"no float64 reference: {error}"
            evidence.ratio = float("nan")
        except _DifferentShapesError as error:
            verdict, note = Verdict.REFUTED, str(error)
            evidence.fault = note
            evidence.ratio = float("inf")
        return (
            RegionResult(
                where=self.link.before.value,
                counterpart=self.link.after.value,
                verdict=verdict,
                ratio=None if verdict is Verdict.SKIPPED else evidence.ratio,
                impulses=evidence.impulses,
                method=evidence.method,
                sizes=tuple(evidence.sizes),
                sentence=note,
            ),
            evidence,
        )

    def _claim(self, grids: Grids, evidence: Evidence) -> str:
        if evidence.method == SAME:
            return "one operator with the same settings and parameters in both models"
        reach = "for every input"
        if any(not all(leaf) for leaf in self.known):
            if grids.for_every_size:
                reach += " of these sizes and of larger ones with the same remainders by the stride"
            else:
                reach += " of these sizes"
        weights = "equal" if evidence.ratio == 0 else "the original's, each rounded once,"
        sentence = f"the weights are {weights} {reach}"
        if evidence.method != IMPULSES:
            sentence += (
                f"; a difference of {2 * _DEVIATIONS:.0f} u |row| or more that only the "
                f"probes see is missed with a probability of at most 2^-{_PROBES}"
            )
        return sentence

    # ---- sizes -----------------------------------------------------------------------------------

    def _grids(self, room: int) -> Grids:
        try:
            return grid.choose(self.sides, self.real, self.known, room)
        except GridError:
            return self._as_they_are()

    def _as_they_are(self) -> Grids:
        return Grids((tuple(self.real),), frozenset(), False)

    def _cost(self, sizes: Sequence[Sizes]) -> tuple[float, float]:
        """Multiply-adds and bytes for one probe."""
        operations, numbers = 0.0, float(sum(prod(leaf) for leaf in sizes))
        for side in self.sides:
            try:
                axes, _ = grid.through(side, sizes)
            except GridError:
                continue
            for node in side.cone.nodes:
                out = [axis.size for axis in axes[node.output]]
                numbers += prod(out)
                if isinstance(node.op, Affine):
                    positions = prod(out) // max(node.op.conv.channels_out, 1)
                    operations += positions * prod(node.op.conv.weights.shape)
        return operations, 8 * numbers

    # ---- the examination -------------------------------------------------------------------------

    def _examine(self, grids: Grids, evidence: Evidence) -> None:
        if self._is_same_operator():
            evidence.method = SAME
            return
        impulses = sum(prod(leaf) for leaf in grids.sizes[0])
        operations = sum(self._cost(sizes)[0] * sum(prod(leaf) for leaf in sizes) for sizes in grids.sizes)
        spatial = any(len(leaf) > 1 for leaf in grids.sizes[0])
        if impulses <= _MOST_IMPULSES and operations <= (_FEW_OPERATIONS if spatial else _MOST_OPERATIONS):
            designs = [(sizes, True) for sizes in grids.sizes]
        else:
            designs = [(sizes, False) for sizes in grids.sizes]
            evidence.method = PROBES
        for sizes, whole in designs:
            evidence.sizes.append(" + ".join("x".join(map(str, leaf)) for leaf in sizes))
            constant, scale = self._constant(sizes, evidence)
            if evidence.fault:
                return
            if whole:
                self._impulses(sizes, constant, scale, evidence)
            else:
                self._probes(sizes, constant, scale, evidence)
            self._affinity(sizes, constant, scale, evidence)
        if evidence.method == PROBES and not evidence.fault:
            self._inside(grids, evidence)

    def _is_same_operator(self) -> bool:
        """One operator on both sides, of which the front end says that it is the same and the graph says
        that it does the same."""
        first, second = self.link.before.nodes, self.link.after.nodes
        if len(first) != 1 or len(second) != 1 or len(self.link.leaves) != 1:
            return False
        one, two = first[0].op, second[0].op
        if not isinstance(one, Affine) or not isinstance(two, Affine) or one.axis != two.axis:
            return False
        if one.conv.windows != two.conv.windows or one.conv.groups != two.conv.groups:
            return False
        if one.conv.weights.shape != two.conv.weights.shape:
            return False
        frontend = self.models.frontend
        mine = frontend.identity(self.models.before, first[0].name)
        theirs = frontend.identity(self.models.after, second[0].name)
        arrays = [(one.conv.kernel, two.conv.kernel), (one.conv.bias, two.conv.bias)]
        if mine.kind != theirs.kind or len(mine.parameters) != len(theirs.parameters):
            return False
        arrays += list(zip(mine.parameters, theirs.parameters, strict=True))
        return all(
            np.shape(a) == np.shape(b) and np.asarray(a).dtype == np.asarray(b).dtype and bool(np.all(a == b))
            for a, b in arrays
        )

    def _both(self, batches: Sequence[AnyArray]) -> tuple[AnyArray, AnyArray, AnyArray]:
        """What both models make of some probes, and for each probe the largest number on the way."""
        values = []
        scale = np.zeros(len(batches[0]))
        with np.errstate(all="ignore"):
            for which, cone in enumerate((self.link.before, self.link.after)):
                found = respond(self.models, self.link, batches, which)
                values.append(np.asarray(found[cone.value]))
                for value in found.values():
                    if value.shape[:1] != scale.shape:
                        raise InputError("an operator mixes the examples of a batch")
                    scale = np.maximum(scale, np.max(np.abs(value.reshape(len(value), -1)), axis=1, initial=0.0))
        if values[0].shape != values[1].shape:
            raise _DifferentShapesError(
                f"the original gives the shape {values[0].shape[1:]}, the other model {values[1].shape[1:]}"
            )
        return values[0], values[1], scale

    def _noise(self, sizes: Sequence[Sizes]) -> float:
        """How far float64 may be off, as a part of the largest number on the way.

        A sum of n terms is off by n eps at worst; rounding errors being independent, by sqrt(n) eps
        (Higham 2002, section 3.1 on the rule of thumb), for which the factor gives room."""
        return 8 * EPS * (8 + sqrt(sum(prod(leaf) for leaf in sizes)))

    def _constant(self, sizes: Sequence[Sizes], evidence: Evidence) -> tuple[tuple[AnyArray, AnyArray], float]:
        one, two, scales = self._both([np.zeros((1, *leaf)) for leaf in sizes])
        evidence.bias = one if evidence.bias is None else evidence.bias
        scale = float(scales[0])
        self._compare(one, two, scales, self._noise(sizes), evidence, "the constant part")
        return (one, two), scale

    def _compare(
        self, one: AnyArray, two: AnyArray, scales: AnyArray, noise: float, evidence: Evidence, what: str
    ) -> None:
        if not (np.isfinite(one).all() and np.isfinite(two).all()):
            evidence.add(float("inf"), f"{what} is not finite")
            return
        lead = (-1,) + (1,) * (one.ndim - 1)
        allowed = self.u * np.abs(one) + self.eta + noise * scales.reshape(lead)
        difference = np.abs(two - one)
        ratio = _ratio(difference, allowed)
        worst = float(np.max(ratio, initial=0.0))
        place = np.unravel_index(int(np.argmax(ratio)), ratio.shape) if ratio.size else ()
        at = ", ".join(str(int(i)) for i in place[1:])
        evidence.add(
            worst,
            f"{what} differs by {float(difference[place]) if place else 0.0:.3g} at output [{at}], "
            f"{worst:.3g} times what one rounding allows",
        )

    def _impulses(
        self,
        sizes: Sequence[Sizes],
        constant: tuple[AnyArray, AnyArray],
        scale: float,
        evidence: Evidence,
    ) -> None:
        sums: list[AnyArray] = []
        for number, leaf in enumerate(sizes):
            total: AnyArray = np.zeros(())
            for chunk in self._chunks(sizes, prod(leaf)):
                batches = [np.zeros((len(chunk), *other)) for other in sizes]
                batches[number].reshape(len(chunk), -1)[
                    np.arange(len(chunk)), np.minimum(chunk, prod(leaf) - 1)
                ] = 1.0
                one, two, scales = self._both(batches)
                one, two = one - constant[0], two - constant[1]
                self._compare(one, two, np.maximum(scales, scale), self._noise(sizes), evidence, "a weight")
                total = total + np.sum(np.abs(one[chunk < prod(leaf)]), axis=0)
            evidence.impulses += prod(leaf)
            sums.append(total)
        evidence.sums = evidence.sums or sums

    def _chunks(self, sizes: Sequence[Sizes], rows: int) -> Iterator[AnyArray]:
        """Row numbers in batches of one size; the last one runs over."""
        room = max(1, min(_MOST_ROWS, int(_MOST_BYTES / max(self._cost(sizes)[1], 1.0)), rows))
        for start in range(0, rows, room):
            yield np.arange(start, start + room)

    def _probes(
        self, sizes: Sequence[Sizes], constant: tuple[AnyArray, AnyArray], scale: float, evidence: Evidence
    ) -> None:
        """Random signs on all leaves at once. The difference is a random sum of the errors of the weights,
        see ``_DEVIATIONS``."""
        squares: AnyArray = np.zeros(())
        differences, largest = [], scale
        for chunk in self._chunks(sizes, _PROBES):
            batches = [self.rng.choice([-1.0, 1.0], size=(len(chunk), *leaf)) for leaf in sizes]
            one, two, scales = self._both(batches)
            one, two = one - constant[0], two - constant[1]
            if not (np.isfinite(one).all() and np.isfinite(two).all()):
                evidence.add(float("inf"), "the response to a probe is not finite")
                return
            squares = squares + np.sum(one**2, axis=0)
            differences.append(np.max(np.abs(two - one), axis=0))
            largest = max(largest, float(np.max(scales)))
            evidence.impulses += len(chunk)
        norm = np.sqrt(squares / _PROBES)
        allowed = _DEVIATIONS * self.u * norm + sum(prod(leaf) for leaf in sizes) * self.eta
        ratio = _ratio(np.max(differences, axis=0), allowed + self._noise(sizes) * largest)
        worst = float(np.max(ratio, initial=0.0))
        evidence.add(worst, f"random probes differ by {worst:.3g} times what rounding explains")

    def _affinity(
        self, sizes: Sequence[Sizes], constant: tuple[AnyArray, AnyArray], scale: float, evidence: Evidence
    ) -> None:
        """``f(a + b) - f(a) - f(b) + f(0) = 0`` for both."""
        first = [self.rng.standard_normal((1, *leaf)) for leaf in sizes]
        second = [self.rng.standard_normal((1, *leaf)) for leaf in sizes]
        batches = [np.concatenate([a + b, a, b]) for a, b in zip(first, second, strict=True)]
        *results, scales = self._both(batches)
        limit = 64 * self._noise(sizes) * max(scale, float(np.max(scales)), np.finfo(np.float64).tiny)
        for result, zero, model in zip(results, constant, ("the original", "the other model"), strict=True):
            gap = float(np.max(np.abs(result[0] - result[1] - result[2] + zero[0]), initial=0.0))
            if not gap <= limit:
                evidence.add(float("inf"), f"{model} is not affine here, although its graph says so")

    def _inside(self, grids: Grids, evidence: Evidence) -> None:
        """All unit impulses away from the border, many of them in one tensor."""


def _ratio(difference: AnyArray, allowed: AnyArray) -> AnyArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0.0, 0.0, difference / allowed)


def local(
    models: Models, link: Link, evidence: Evidence, values: Mapping[str, AnyArray]
) -> tuple[float, float] | None:
    """The largest error of a region on real values of its leaves, and its ratio to a bound that holds for
    every input; None if there are no values, or no bound is known."""
    if any(theirs[0] not in values for _, theirs in link.leaves) or not evidence.sums or evidence.bias is None:
        return None
    batches = [np.asarray(values[theirs[0]], dtype=np.float64) for _, theirs in link.leaves]
    with np.errstate(all="ignore"):
        one = respond(models, link, batches, 0)[link.before.value]
        two = respond(models, link, batches, 1)[link.after.value]
        if one.shape != two.shape or not np.isfinite(one).all():
            return None
        difference = np.abs(two - one)
        error = float(np.max(difference, initial=0.0))
        u, eta = roundoff(models, link.after)
        bound: AnyArray = _widened(np.abs(evidence.bias[0]), one.shape[1:])
        terms = 1.0
        for batch, total in zip(batches, evidence.sums, strict=True):
            largest = float(np.max(np.abs(batch), initial=0.0))
            bound = bound + _widened(total, one.shape[1:]) * largest
            terms += prod(batch.shape[1:])
        scale = float(np.max(bound, initial=0.0))
        allowed = u * bound * (1 + 1e-6) + eta * terms + 8 * EPS * (8 + sqrt(terms)) * scale
        return error, float(np.max(_ratio(difference, allowed), initial=0.0))


def _widened(array: AnyArray, shape: Sequence[int]) -> AnyArray:
    """The largest entries along the axes that are smaller here than they really are."""
    shrunk = tuple(axis for axis, size in enumerate(shape) if array.shape[axis] != size)
    return np.broadcast_to(np.max(array, axis=shrunk, keepdims=True), tuple(shape))
