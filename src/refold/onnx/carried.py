"""Sizes in bodies: what the inputs of a body are in every run, and what its node gives after all of them.

A value that a loop carries along may change its shape from run to run. It is taken for what it is at the start;
a size of which the body gives another one is then taken for one that is not known, until nothing changes any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import final

from refold.onnx.facts import Facts, Sizes
from refold.onnx.subgraphs import Body

# After so many runs a value of which the shape still changes is one of which no size is known.
_MOST_ROUNDS = 3
# A size that grows by more than this in one run is not followed.
_MOST_GROWTH = 4
# How far sizes that are not known are from what they were in each set of sizes: different in each, other than the
# sizes of inputs, and multiples of 32 as those are.
_APART = (160, 256)


def formals(body: Body, inputs: Sequence[Facts | None], declared: Sequence[Facts]) -> list[Facts]:
    """What the inputs of a body are in its first run: ``inputs`` are those of its node, ``declared`` what the file
    says of the body's own."""
    first, _ = body.before_states
    start = len(inputs) - len(body.states) - body.scanned
    states = [_unnumbered(facts) for facts in inputs[start : start + len(body.states)] if facts is not None]
    scanned = [facts for facts in inputs[len(inputs) - body.scanned :] if facts is not None] if body.scanned else []
    axes = body.owner.attributes.get_ints("scan_input_axes") or [0] * body.scanned
    slices = [_slice(facts, axis) for facts, axis in zip(scanned, axes, strict=True)]
    kinds = ("int64", "bool")  # the number of the run, and whether there is another one
    own = [replace(facts, dtype=kind) for facts, kind in zip(declared[:first], kinds, strict=False)]
    return [*own, *states, *slices]


def _unnumbered(facts: Facts) -> Facts:
    """The same tensor with whatever numbers."""
    return Facts(facts.dtype, facts.shapes)


def _slice(facts: Facts, axis: int) -> Facts:
    if facts.rank is None or not -facts.rank <= axis < facts.rank:
        return Facts(facts.dtype, (None,) * len(facts.shapes))
    axis %= facts.rank
    return Facts(facts.dtype, tuple(None if s is None else (*s[:axis], *s[axis + 1 :]) for s in facts.shapes))


@final
@dataclass(eq=False)
class Carried:
    """The inputs of a body while it is found out what holds of them in every run."""

    body: Body
    inputs: list[Facts]
    rounds: int = 0
    loose: set[tuple[int, int]] = field(default_factory=set)

    def loosen(self, given: Sequence[Facts]) -> bool:
        """Take the inputs for less known where the outputs ``given`` of a run do not fit them. Whether anything
        changed."""
        self.rounds += 1
        before, results = self.body.before_states
        changed = False
        for number in range(len(self.body.states)):
            place = before + number
            old, new = self.inputs[place], given[results + number]
            again = self._loosened(place, old, new)
            if again.shapes != old.shapes or again.dtype != old.dtype:
                self.inputs[place] = again
                changed = True
        return changed

    def _loosened(self, place: int, old: Facts, new: Facts) -> Facts:
        dtype = old.dtype if old.dtype == new.dtype else ""
        unknown = Facts(dtype, (None,) * len(old.shapes))
        if old.rank is None or new.rank != old.rank:
            return unknown
        was, now = _axes(old), _axes(new)
        changing = [a for a in range(old.rank) if (place, a) not in self.loose and was[a] != now[a]]
        if changing and self.rounds > _MOST_ROUNDS:
            return unknown
        for axis in changing:
            growth = {b - a for a, b in zip(was[axis], now[axis], strict=True)}
            if len(growth) != 1 or abs(min(growth)) > _MOST_GROWTH:
                return unknown
            # What grows alike keeps alike sizes, and what grows otherwise gets others.
            step = min(growth) if min(growth) > 0 else _MOST_GROWTH - min(growth)
            was[axis] = tuple(size + step * apart for size, apart in zip(was[axis], _APART, strict=True))
            self.loose.add((place, axis))
        return replace(old, dtype=dtype, shapes=_shapes(was, len(old.shapes)))


def results(
    bodies: Sequence[Body], carried: Sequence[Carried], ends: Sequence[Sequence[Facts]]
) -> list[Facts | None]:
    """What a node gives, as far as its bodies tell: ``ends`` are the outputs of each body. None where shape
    inference knows better (what is stacked run by run)."""
    if bodies[0].owner.op_type == "If":
        return [_either(*facts) for facts in zip(*ends, strict=True)]
    before, _ = bodies[0].before_states
    states = carried[0].inputs[before : before + len(bodies[0].states)]
    return [*states, *[None] * (len(bodies[0].owner.outputs) - len(states))]


def _either(one: Facts, two: Facts) -> Facts:
    """What is one or the other: a size of which they differ is not known."""
    if one.dtype != two.dtype or one.rank is None or one.rank != two.rank:
        return Facts(one.dtype if one.dtype == two.dtype else "", (None,) * len(one.shapes))
    first, second = _axes(one), _axes(two)
    for axis, (a, b) in enumerate(zip(first, second, strict=True)):
        if a != b:
            first[axis] = tuple(size + apart for size, apart in zip(a, _APART, strict=True))
    return Facts(one.dtype, _shapes(first, len(one.shapes)))


def _axes(facts: Facts) -> list[Sizes]:
    """The sizes of each axis, one for each set."""
    return [tuple(sizes) for sizes in zip(*(s for s in facts.shapes if s is not None), strict=True)]


def _shapes(axes: Sequence[Sizes], sets: int) -> tuple[Sizes, ...]:
    return tuple(tuple(axis[number] for axis in axes) for number in range(sets))
