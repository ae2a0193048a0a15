"""One region: are two ways from the same leaves to a value the same affine function?

An affine map is determined by its values at 0 and at the unit vectors. Both models' own operators are
run on these in float64; the second model's weights must be the first one's, each rounded once
(Higham 2002, section 2.2: ``fl(w) = w (1 + d)`` with ``|d| <= u``, and an absolute error of half the
smallest subnormal number below the normal ones).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod, sqrt
from typing import final

import numpy as np

from refold.errors import InputError
from refold.frontend import AnyArray, Frontend, Lifted, unit_roundoff
from refold.graph.graph import Affine, Gain, Node, Pad
from refold.proof import grid
from refold.proof.certificate import RegionResult, Verdict
from refold.proof.cone import Cone
from refold.proof.digest import same_parameters
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
_PER_BYTE = 4.0  # multiply-adds in the time in which one byte is moved
_MOST_OPERATIONS = 1e11
_MOST_IMPULSES = 200_000
_PROBES = 40
_HEAD = 4  # rows of the first batch that are not probes
# A sum of n terms d_i w_i x_i with |d_i| <= u and random signs x_i is above t u |w|_2 with a probability
# below 2 exp(-t*t/2) (Hoeffding 1963, theorem 2). |w|_2 itself is estimated from the probes, by at most
# a factor of 2 too low but for a probability below 1e-7.
_DEVIATIONS = 16.0


# Writes the probes of some numbers into rows of the batches, one batch per leaf.
Fill = Callable[[list[AnyArray], AnyArray, AnyArray], None]
# The numbers of some probes, what both models make of them, and the largest number on the way of each.
Responses = tuple[AnyArray, AnyArray, AnyArray, AnyArray]


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

    def failed(self) -> bool:
        """Whether something was found that rounding does not explain."""
        return bool(self.fault)

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
    wanted = [name for node in cone.nodes for name in node.outputs]
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
            if evidence.failed():
                verdict, note = Verdict.REFUTED, evidence.fault
            else:
                note = self._claim(grids, evidence)
                if self._is_free() and not grids.for_every_size and evidence.method != SAME:
                    verdict = Verdict.MEASURED
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

    def _is_free(self) -> bool:
        """Whether some size is not known."""
        return any(not all(leaf) for leaf in self.known)

    def _claim(self, grids: Grids, evidence: Evidence) -> str:
        if evidence.method == SAME:
            return "one operator with the same settings and parameters in both models"
        reach = "for every input"
        if self._is_free():
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

    def _work(self, sizes: Sequence[Sizes]) -> float:
        """What one probe costs, in multiply-adds: numbers have to be moved too."""
        operations, numbers = self._cost(sizes)
        return operations + _PER_BYTE * numbers

    # ---- the examination -------------------------------------------------------------------------

    def _examine(self, grids: Grids, evidence: Evidence) -> None:
        if self._is_same_operator():
            evidence.method = SAME
            return
        impulses = sum(prod(leaf) for leaf in grids.sizes[0])
        operations = sum(self._work(sizes) * sum(prod(leaf) for leaf in sizes) for sizes in grids.sizes)
        allowed = _FEW_OPERATIONS if grids.free else _MOST_OPERATIONS
        everywhere = impulses <= _MOST_IMPULSES and operations <= allowed
        for sizes in grids.sizes:
            evidence.sizes.append(" + ".join("x".join(map(str, leaf)) for leaf in sizes))
            if everywhere:
                self._impulses(sizes, evidence)
            else:
                self._probes(sizes, evidence)
            if evidence.failed():
                break
        if not everywhere:
            evidence.method = PROBES
            inside = self._spread_out(grids)
            if inside is not None:
                evidence.method = MIXED
                evidence.sizes.append(" + ".join("x".join(map(str, leaf)) for leaf in inside.sizes))
                self._inside(inside, evidence)

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
        frontend = self.models.frontend
        mine = frontend.identity(self.models.before, first[0].name)
        theirs = frontend.identity(self.models.after, second[0].name)
        if mine.kind != theirs.kind or not same_parameters(mine.parameters, theirs.parameters):
            return False
        del mine, theirs  # not both these and the kernels, which may be large
        return same_parameters((one.conv.kernel, one.conv.bias), (two.conv.kernel, two.conv.bias))

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
        if not values[0].size:
            raise InputError("at this size nothing comes out")
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

    def _responses(self, sizes: Sequence[Sizes], count: int, fill: Fill, evidence: Evidence) -> Iterator[Responses]:
        """The linear part of both models on ``count`` probes, in batches of one size.

        The first batch starts with zero, which gives the constant part, and with two random inputs and
        their sum, for which ``f(a + b) - f(a) - f(b) + f(0) = 0`` must hold."""
        room = int(_MOST_BYTES / max(self._cost(sizes)[1], 1.0))
        room = max(min(room, _MOST_ROWS, count + _HEAD), _HEAD + 1)
        noise, done, head = self._noise(sizes), 0, _HEAD
        constant: tuple[AnyArray, AnyArray] | None = None
        largest = 0.0
        while done < count:
            numbers = np.arange(done, min(done + room - head, count))
            batches = [np.zeros((room, *leaf)) for leaf in sizes]
            if head:
                for batch in batches:
                    batch[2:_HEAD] = self.rng.standard_normal(batch[2:_HEAD].shape)
                    batch[1] = batch[2] + batch[3]
            fill(batches, head + np.arange(len(numbers)), numbers)
            one, two, scales = self._both(batches)
            if constant is None:
                constant, largest = (one[:1], two[:1]), float(scales[0])
                if evidence.bias is None:
                    evidence.bias = one[:1]
                self._compare(one[:1], two[:1], scales[:1], noise, evidence, "the constant part")
                if evidence.failed():
                    return
                for values, model in ((one, "the original"), (two, "the other model")):
                    gap = float(np.max(np.abs(values[1] - values[2] - values[3] + values[0]), initial=0.0))
                    if not gap <= 64 * noise * float(np.max(scales[:_HEAD])):
                        evidence.add(float("inf"), f"{model} is not affine here, although its graph says so")
                if evidence.failed():
                    return
            rows = slice(head, head + len(numbers))
            yield numbers, one[rows] - constant[0], two[rows] - constant[1], np.maximum(scales[rows], largest)
            done, head = done + len(numbers), 0

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

    # ---- all unit impulses -----------------------------------------------------------------------

    def _impulses(self, sizes: Sequence[Sizes], evidence: Evidence) -> None:
        starts = np.cumsum([0, *(prod(leaf) for leaf in sizes)])
        sums: list[AnyArray] = [np.zeros(()) for _ in sizes]

        def fill(batches: list[AnyArray], rows: AnyArray, numbers: AnyArray) -> None:
            for place, batch in enumerate(batches):
                own = (numbers >= starts[place]) & (numbers < starts[place + 1])
                batch.reshape(len(batch), -1)[rows[own], numbers[own] - starts[place]] = 1.0

        for numbers, one, two, scales in self._responses(sizes, int(starts[-1]), fill, evidence):
            self._compare(one, two, scales, self._noise(sizes), evidence, "a weight")
            for place in range(len(sizes)):
                own = (numbers >= starts[place]) & (numbers < starts[place + 1])
                sums[place] = sums[place] + np.sum(np.abs(one[own]), axis=0)
        evidence.impulses += int(starts[-1])
        evidence.sums = evidence.sums or sums

    # ---- random signs ----------------------------------------------------------------------------

    def _probes(self, sizes: Sequence[Sizes], evidence: Evidence) -> None:
        """Random signs on all leaves at once. The difference is a random sum of the errors of the weights,
        see ``_DEVIATIONS``."""

        def fill(batches: list[AnyArray], rows: AnyArray, numbers: AnyArray) -> None:
            for batch in batches:
                batch[rows] = self.rng.choice([-1.0, 1.0], size=(len(rows), *batch.shape[1:]))

        squares: AnyArray = np.zeros(())
        differences, largest = [], 0.0
        for _, one, two, scales in self._responses(sizes, _PROBES, fill, evidence):
            if not (np.isfinite(one).all() and np.isfinite(two).all()):
                evidence.add(float("inf"), "the response to a probe is not finite")
                return
            squares = squares + np.sum(one**2, axis=0)
            differences.append(np.max(np.abs(two - one), axis=0))
            largest = max(largest, float(np.max(scales)))
        if not differences:
            return
        evidence.impulses += _PROBES
        norm = np.sqrt(squares / _PROBES)
        allowed = _DEVIATIONS * self.u * norm + sum(prod(leaf) for leaf in sizes) * self.eta
        ratio = _ratio(np.max(differences, axis=0), allowed + self._noise(sizes) * largest)
        worst = float(np.max(ratio, initial=0.0))
        evidence.add(worst, f"random probes differ by {worst:.3g} times what rounding explains")

    # ---- many impulses in one tensor -------------------------------------------------------------

    def _spread_out(self, grids: Grids) -> Spread | None:
        """Where to put impulses so far from each other and from the borders that no output sees two."""
        if not grids.free:
            return None
        try:
            slots = {1: 64, 2: 8, 3: 4}.get(max(len(leaf) - 1 for leaf in grids.sizes[0]), 3)
            near = grid.spacing(self.sides, grids.sizes[0])
            if near is None:
                return None
            larger = grid.choose(self.sides, self.real, self.known, slots * near)
            if larger.free != grids.free:
                return None
            return Spread(larger.sizes[0], grid.places(self.sides, larger.sizes[0], larger.free))
        except GridError:
            return None

    def _inside(self, spread: Spread, evidence: Evidence) -> None:
        """All unit impulses away from the borders. Every output sees at most one of them, so what it gives
        is one weight."""
        sizes = spread.sizes
        every = [spread.impulses(number) for number in range(len(sizes))]
        starts = np.cumsum([0, *(rows for rows, _ in every)])
        sums: list[AnyArray] = [np.zeros(()) for _ in sizes]

        def fill(batches: list[AnyArray], rows: AnyArray, numbers: AnyArray) -> None:
            for place, batch in enumerate(batches):
                own = (numbers >= starts[place]) & (numbers < starts[place + 1])
                for row, number in zip(rows[own], numbers[own] - starts[place], strict=True):
                    batch[row].reshape(-1)[every[place][1][number]] = 1.0

        for numbers, one, two, scales in self._responses(sizes, int(starts[-1]), fill, evidence):
            self._compare(one, two, scales, self._noise(sizes), evidence, "a weight")
            shrunk = tuple(axis for axis in range(1, one.ndim) if axis - 1 in spread.free_outputs(self.sides[0]))
            for place in range(len(sizes)):
                own = (numbers >= starts[place]) & (numbers < starts[place + 1])
                # Twice the sum, for outputs at the border may see more of what cancels inside.
                part = 2 * np.sum(np.abs(one[own]), axis=(0, *shrunk), keepdims=True)[0]
                sums[place] = sums[place] + part
        evidence.impulses += sum(len(flat) for _, rows in every for flat in rows)
        evidence.sums = sums


@final
@dataclass(frozen=True, eq=False)
class Spread:
    """Impulses that no output sees two of. ``places`` gives, for each leaf axis that is not mixed as a
    whole, the positions by their remainder by the stride."""

    sizes: tuple[Sizes, ...]
    places: Mapping[tuple[int, int], tuple[tuple[int, ...], ...]]

    def impulses(self, leaf: int) -> tuple[int, list[AnyArray]]:
        """How many tensors are needed for a leaf, and the flat places of the impulses in each."""
        shape = self.sizes[leaf]
        free = [axis for axis in range(len(shape)) if (leaf, axis) in self.places]
        whole = [axis for axis in range(len(shape)) if axis not in free]
        kinds = list(np.ndindex(*(shape[axis] for axis in whole)))
        rows: list[AnyArray] = []
        for remainders in product(*(self.places[leaf, axis] for axis in free)):
            slots = list(product(*remainders))
            for start in range(0, len(kinds), len(slots)):
                spots = np.zeros((min(len(slots), len(kinds) - start), len(shape)), dtype=np.int64)
                for row, (kind, slot) in enumerate(zip(kinds[start:], slots, strict=False)):
                    spots[row, whole], spots[row, free] = kind, slot
                rows.append(np.asarray(np.ravel_multi_index(tuple(spots.T), shape)))
        return len(rows), rows

    def free_outputs(self, side: Side) -> set[int]:
        """The axes of the output that come from the free axes of the leaves."""
        axes, _ = grid.through(side, self.sizes)
        return {place for place, axis in enumerate(axes[side.cone.value]) if axis.of & set(self.places)}


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
