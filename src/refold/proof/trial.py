"""A region on trial: both models' own operators in float64, on whatever its leaves are given.

Which probes are worth giving is the business of ``impulses``, ``signs`` and ``formulas``; what the answers mean is
said in ``region``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any, TypeVar, final

import numpy as np

from refold.errors import InputError
from refold.frontend import AnyArray, Lifted, Reference, unit_roundoff
from refold.graph.graph import Affine, Formula, Gain, Graph, Node, Pad
from refold.proof import grid
from refold.proof.cone import Cone
from refold.proof.grid import GridError, Grids, Side, Sizes

T = TypeVar("T")

EPS = float(np.finfo(np.float64).eps)

# Half the smallest number of each type.
_ETA = {"float64": 0.0, "float32": 2.0**-150, "bfloat16": 2.0**-134, "float16": 2.0**-25}

_MOST_BYTES = 2**27  # of one batch of probes, with all that is computed from it
_MOST_ROWS = 2048
_PER_BYTE = 4.0  # multiply-adds in the time in which one byte is moved
_HEAD = 4  # rows of the first batch that are not probes

CONSTANT = "the constant part"
# Others fold in the type that they store: some roundings of each weight. Where weights show that, constants may be
# off by as many roundings of the largest number on the way, for their terms may cancel.
_ROUNDINGS = 8.0

# Says a value by the values that are listed, through the nodes between; None where it cannot.
Witness = Callable[[Graph, str, Sequence[str], Sequence[Node]], Formula | None]
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
    """What is compared. ``witness`` says formulas, which are not believed. ``known`` keeps what follows from the
    geometry of a region alone, for the next one that is built alike."""

    frontend: Reference
    before: Lifted
    after: Lifted
    witness: Witness | None = None
    known: dict[Hashable, Any] = field(default_factory=dict)


@final
@dataclass(eq=False)
class Evidence:
    """What came out of a region. ``roundings`` says that weights are off by more than one rounding, but by no
    more than some; ``doubt`` what is wrong unless they are. ``sums`` holds, for each leaf, ``sum |W|`` by output,
    in a shape that broadcasts to the real one; empty where it is not known. ``resolution`` is how far formulas
    may be off, as a part of the largest response."""

    ratio: float = 0.0
    impulses: int = 0
    sizes: list[str] = field(default_factory=list)
    sums: list[AnyArray] = field(default_factory=list)
    bias: AnyArray | None = None
    fault: str = ""
    resolution: float = 0.0
    roundings: bool = False
    doubt: str = ""

    def failed(self) -> bool:
        """Whether something was found that rounding does not explain."""
        return bool(self.fault)

    def take(self, other: Evidence) -> None:
        """Note what somebody else found, who found no fault."""
        self.ratio = max(self.ratio, other.ratio)
        self.impulses += other.impulses
        self.sums, self.bias, self.resolution = other.sums, other.bias, other.resolution
        self.roundings, self.doubt = self.roundings or other.roundings, self.doubt or other.doubt

    def add(self, ratio: float, what: str) -> None:
        """Note the worst ratio of some weights."""
        self.ratio = max(self.ratio, ratio)
        if not ratio <= 1.0 and not self.fault:
            self.fault = what


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


class DifferentShapesError(Exception):
    """The two values have different shapes."""


@final
class Trial:
    """A region of two models, with what every way of examining it needs."""

    def __init__(self, models: Models, link: Link, rng: np.random.Generator) -> None:
        self.models, self.link, self.rng = models, link, rng
        self.u, self.eta = roundoff(models, link.after)
        # Numbers that may cancel inside of an operator, where no value on the way shows them.
        nodes = (*link.before.nodes, *link.after.nodes)
        self.summand = max((node.op.summand for node in nodes if isinstance(node.op, Affine)), default=0.0)
        numbers: tuple[dict[str, int], dict[str, int]] = ({}, {})
        for number, (mine, theirs) in enumerate(link.leaves):
            numbers[1][mine] = number
            numbers[0].update(dict.fromkeys(theirs, number))
        self.sides = (
            Side(models.before.graph, link.before, numbers[0]),
            Side(models.after.graph, link.after, numbers[1]),
        )
        leaves = [models.after.graph.values[mine] for mine, _ in link.leaves]
        self.shapes = tuple(map(grid.shape_of, self.sides))
        self.known = [tuple(size is not None for size in leaf.shape[1:]) for leaf in leaves]
        self.real: list[Sizes] = [
            tuple(size or small for size, small in zip(leaf.shape[1:], leaf.nominal[1:], strict=True))
            for leaf in leaves
        ]

    def is_free(self) -> bool:
        """Whether some size is not known."""
        return any(not all(leaf) for leaf in self.known)

    def grids(self, room: int = 0) -> Grids:
        """See :func:`refold.proof.grid.choose`."""
        what = ("grids", self.shapes, tuple(self.real), tuple(self.known), room)
        return self._once(what, lambda: grid.choose(self.sides, self.real, self.known, room))

    def cost(self, sizes: Sequence[Sizes]) -> tuple[float, float]:
        """Multiply-adds and bytes for one probe."""
        return self._once(("cost", self.shapes, tuple(sizes)), lambda: self._cost(sizes))

    def _once(self, what: Hashable, compute: Callable[[], T]) -> T:
        known = self.models.known
        if what not in known:
            known[what] = compute()
        found: T = known[what]
        return found

    def _cost(self, sizes: Sequence[Sizes]) -> tuple[float, float]:
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

    def work(self, sizes: Sequence[Sizes]) -> float:
        """What one probe costs, in multiply-adds: numbers have to be moved too."""
        operations, numbers = self.cost(sizes)
        return operations + _PER_BYTE * numbers

    def both(self, batches: Sequence[AnyArray]) -> tuple[AnyArray, AnyArray, AnyArray]:
        """What both models make of some probes, and for each probe the largest number on the way."""
        values = []
        scale = np.full(len(batches[0]), self.summand)
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
            raise DifferentShapesError(
                f"the original gives the shape {values[0].shape[1:]}, the other model {values[1].shape[1:]}"
            )
        return values[0], values[1], scale

    def noise(self, sizes: Sequence[Sizes]) -> float:
        """How far float64 may be off, as a part of the largest number on the way.

        A sum of n terms is off by n eps at worst; rounding errors being independent, by sqrt(n) eps
        (Higham 2002, section 3.1 on the rule of thumb), for which the factor gives room."""
        return 8 * EPS * (8 + sqrt(sum(prod(leaf) for leaf in sizes)))

    def responses(self, sizes: Sequence[Sizes], count: int, fill: Fill, evidence: Evidence) -> Iterator[Responses]:
        """The linear part of both models on ``count`` probes, in batches of one size.

        The first batch starts with zero, which gives the constant part, and with two random inputs and
        their sum, for which ``f(a + b) - f(a) - f(b) + f(0) = 0`` must hold."""
        room = int(_MOST_BYTES / max(self.cost(sizes)[1], 1.0))
        room = max(min(room, _MOST_ROWS, count + _HEAD), _HEAD + 1)
        noise, done, head = self.noise(sizes), 0, _HEAD
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
            one, two, scales = self.both(batches)
            if constant is None:
                # Copies: a view would keep the whole batch for as long as the evidence is kept.
                constant, largest = (one[:1].copy(), two[:1].copy()), float(scales[0])
                if evidence.bias is None:
                    evidence.bias = constant[0]
                self.compare(one[:1], two[:1], scales[:1], noise, evidence, CONSTANT)
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

    def compare(
        self, one: AnyArray, two: AnyArray, scales: AnyArray, noise: float, evidence: Evidence, what: str
    ) -> None:
        """Hold some numbers of the second model against the original's, each rounded once."""
        if not (np.isfinite(one).all() and np.isfinite(two).all()):
            evidence.add(float("inf"), f"{what} is not finite")
            return
        lead = (-1,) + (1,) * (one.ndim - 1)
        allowed = self.u * np.abs(one) + self.eta + noise * scales.reshape(lead)
        difference = np.abs(two - one)
        shares = ratio(difference, allowed)
        worst = float(np.max(shares, initial=0.0))
        place = np.unravel_index(int(np.argmax(shares)), shares.shape) if shares.size else ()
        at = ", ".join(str(int(i)) for i in place[1:])
        sentence = (
            f"{what} differs by {float(difference[place]) if place else 0.0:.3g} at output [{at}], "
            f"{worst:.3g} times what one rounding allows"
        )
        if worst > 1.0:
            most = scales.reshape(lead) if what == CONSTANT else np.abs(one)
            if np.all(difference <= allowed + _ROUNDINGS * self.u * most):
                evidence.ratio = max(evidence.ratio, worst)
                evidence.roundings |= what != CONSTANT
                evidence.doubt = evidence.doubt or (sentence if what == CONSTANT else "")
                return
        evidence.add(worst, sentence)


def ratio(difference: AnyArray, allowed: AnyArray) -> AnyArray:
    """Differences as shares of what is allowed."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0.0, 0.0, difference / allowed)
