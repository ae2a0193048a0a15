"""The smallest tensors that show everything that a region does.

Along an axis that is never mixed as a whole (a spatial axis), an output is *clean at the start* if
neither it nor anything between it and the leaves looks before a first position, and clean at the end
likewise. With at least one output that is both, no output is neither; then what the region does to the
``a`` first outputs, to the last ones and to those between is the same at every larger size with the same
remainder by the total stride, because every operator does the same at every position that its
window reaches in full. So equality on one such size is equality on all larger ones. Sizes that do not
have it are taken as they are.

Where a transposed convolution gives ``u`` outputs for one input, an output reads ``1/u`` positions further
than the one before it, and what holds of the outputs repeats after several of them: the *period* of a leaf
axis is by how much it must grow to move every value on the way by whole positions, and that many outputs
must then be clean on both sides.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import ceil, floor, lcm
from typing import final

from refold.algebra.geometry import Window, same
from refold.graph.graph import Affine, Concat, Gain, Graph, Node, Opaque, Pad, Relayout, Select, Slice, Sum
from refold.proof.cone import Cone

Sizes = tuple[int, ...]
LeafAxis = tuple[int, int]  # the number of a leaf, and an axis of it (batch left out)
# For each axis of a value the leaf axes that it comes from, and the strides with which it reads them.
Way = tuple[dict[LeafAxis, set[Fraction]], ...]

# As many combinations of remainders are tried where the size is not known; more than that, and the axes
# are varied together.
_MOST_VARIANTS = 9
_GROWTH = 256


class GridError(Exception):
    """The declared geometry does not hold together at some sizes."""


@final
@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of one value. ``clean`` is the range of outputs that see no border; an output ``i``
    reads the leaves' positions ``stride*i + low .. stride*i + high``. ``of`` are the leaf axes that it
    comes from, none if it was mixed as a whole."""

    size: int
    first: int
    last: int
    stride: Fraction = Fraction(1)
    low: Fraction = Fraction(0)
    high: Fraction = Fraction(0)
    of: frozenset[LeafAxis] = frozenset()

    @property
    def is_representative(self) -> bool:
        """Whether some output sees no border."""
        return self.first <= self.last


@final
@dataclass(frozen=True, eq=False)
class Side:
    """One model's way from the leaves to the value; leaves are numbered alike in both models."""

    graph: Graph
    cone: Cone
    number: Mapping[str, int]


@final
@dataclass(frozen=True, eq=False)
class Grids:
    """``sizes`` of the leaves (batch axis left out), one entry per grid; ``free`` are the leaf axes, as
    (leaf, axis), that may be smaller or larger than they are. ``for_every_size`` says that all sizes that
    are not known are among these."""

    sizes: tuple[tuple[Sizes, ...], ...]
    free: frozenset[LeafAxis]
    for_every_size: bool


def through(side: Side, sizes: Sequence[Sizes]) -> tuple[dict[str, tuple[Axis, ...]], set[LeafAxis]]:
    """Every value of a region, axis by axis (batch left out), and the leaf axes that are mixed as a whole.

    Raises GridError where the sizes do not fit.
    """
    axes: dict[str, tuple[Axis, ...]] = {}
    whole: set[LeafAxis] = set()
    for leaf in side.cone.leaves:
        number = side.number[leaf]
        axes[leaf] = tuple(
            Axis(size, 0, size - 1, of=frozenset({(number, place)})) for place, size in enumerate(sizes[number])
        )
    for node in side.cone.nodes:
        axes[node.output] = _through(node, [axes[name] for name in node.inputs], whole)
    return axes, whole


def _through(node: Node, inputs: list[tuple[Axis, ...]], whole: set[LeafAxis]) -> tuple[Axis, ...]:
    first = inputs[0]
    match node.op:
        case Affine(conv, axis):
            windows = iter(conv.windows)
            whole |= first[axis - 1].of
            if first[axis - 1].size != conv.channels_in:
                raise GridError("the number of channels does not fit")
            return tuple(
                _mixed(conv.channels_out) if place == axis - 1 else _window(entry, next(windows))
                for place, entry in enumerate(first)
            )
        case Gain():
            return first
        case Sum():
            return tuple(_met(entries, whole) for entries in _aligned(inputs))
        case Concat(axis):
            for entry in inputs:
                whole |= entry[axis - 1].of
            return tuple(
                _mixed(sum(e.size for e in entries)) if place == axis - 1 else _met(entries, whole)
                for place, entries in enumerate(_aligned(inputs))
            )
        case Select(channels, axis):
            whole |= first[axis - 1].of
            return tuple(_mixed(len(channels)) if p == axis - 1 else entry for p, entry in enumerate(first))
        case Slice(cuts):
            return tuple(
                entry if cut == (0, 0, 1) else _window(entry, Window(1, cut[2], 1, -cut[0], -cut[1]))
                for entry, cut in zip(first, cuts[1:], strict=True)
            )
        case Pad(widths):
            return tuple(
                _window(entry, Window(1, 1, 1, *pair)) for entry, pair in zip(first, widths[1:], strict=True)
            )
        case Relayout(axis_in, axis_out):
            entries = list(first)
            entries.insert(axis_out - 1, entries.pop(axis_in - 1))
            return tuple(entries)
        case Opaque():
            raise GridError("not linear")


def _mixed(size: int) -> Axis:
    return Axis(size, 0, size - 1)


def _aligned(inputs: list[tuple[Axis, ...]]) -> list[tuple[Axis, ...]]:
    if len({len(entry) for entry in inputs}) > 1:
        raise GridError("the numbers of axes differ")
    return list(zip(*inputs, strict=True))


def _met(entries: tuple[Axis, ...], whole: set[LeafAxis]) -> Axis:
    """The axis where several tensors meet."""
    if len({entry.size for entry in entries}) > 1:
        raise GridError("the sizes differ")
    of = frozenset().union(*(entry.of for entry in entries))
    strides = {entry.stride for entry in entries if entry.of}
    if any(not entry.of for entry in entries) and of:
        whole |= of
    return Axis(
        entries[0].size,
        max(entry.first for entry in entries),
        min(entry.last for entry in entries),
        max(strides, default=Fraction(1)),
        min(entry.low for entry in entries),
        max(entry.high for entry in entries),
        of,
    )


def _window(axis: Axis, window: Window) -> Axis:
    if window.floating:
        window = same(window.taps, window.stride, window.dilation, axis.size)
    size = window.output_size(axis.size)
    if size < 1 or window.spread * (axis.size - 1) + 1 + window.before + window.after <= window.reach:
        raise GridError("the tensor is too small")
    stride, reach, spread = window.stride, window.reach, window.spread
    step = axis.stride / spread
    return Axis(
        size,
        max(0, -(-(spread * axis.first + window.before) // stride)),
        min(size - 1, (spread * axis.last - (reach - window.before)) // stride),
        step * stride,
        step * -window.before + axis.low,
        step * (reach - window.before) + axis.high,
        axis.of,
    )


def shape_of(side: Side) -> Hashable:
    """All that the functions here read of a region: two regions of which this is equal have the same grids,
    whatever their values are called and their weights are."""
    place = {leaf: (number, len(side.graph.values[leaf].shape)) for leaf, number in side.number.items()}
    leaves = tuple(place[leaf] for leaf in side.cone.leaves)
    names: dict[str, Hashable] = {leaf: side.number[leaf] for leaf in side.cone.leaves}
    nodes = []
    for count, node in enumerate(side.cone.nodes):
        nodes.append((_moves(node), tuple(names[name] for name in node.inputs)))
        names.update((name, (count, output)) for output, name in enumerate(node.outputs))
    return leaves, tuple(nodes), names[side.cone.value]


def _moves(node: Node) -> Hashable:
    """An operator without its weights."""
    match node.op:
        case Affine(conv, axis):
            return axis, conv.windows, conv.weights.shape, conv.groups
        case Select(channels, axis):
            return "select", len(channels), axis
        case op:
            return op


# ---- choosing sizes ------------------------------------------------------------------------------


def choose(sides: Sequence[Side], real: Sequence[Sizes], known: Sequence[Sequence[bool]], room: int = 0) -> Grids:
    """The smallest sizes of the leaves that show everything that the region does, in both models.

    ``real`` are their real sizes, or nominal ones where ``known`` says that they are not known. ``room``
    asks for so many clean outputs more. Raises GridError where the geometry does not hold together.
    """
    strides, periods = _steps(sides)
    real = _large_enough(sides, real, known, periods)
    whole: set[LeafAxis] = set()
    groups: list[set[LeafAxis]] = []
    for side in sides:
        axes, mixed = through(side, real)
        whole |= mixed
        groups += [set(axis.of) for value in axes.values() for axis in value if axis.of]
    values = [through(side, real)[0][side.cone.value] for side in sides]
    for entries in zip(*values, strict=False):
        groups.append(set().union(*(entry.of for entry in entries)))
        if any(not entry.of for entry in entries):
            whole |= set().union(*(entry.of for entry in entries))
    free: set[LeafAxis] = set()
    options: list[list[dict[LeafAxis, int]]] = []
    for group in _connected(groups):
        if group & whole or any(len(strides.get(member, ())) != 1 for member in group):
            continue
        step = {member: periods[member] for member in group}
        sure = all(known[number][place] for number, place in group)
        found = _smaller(sides, real, step, sure, room)
        if found:
            free |= group
            options.append(found)
    combinations = list(product(*options))
    if len(combinations) > _MOST_VARIANTS:
        most = max(len(option) for option in options)
        combinations = [tuple(option[i % len(option)] for option in options) for i in range(most)]
    chosen = []
    for combination in combinations:
        sizes = [list(leaf) for leaf in real]
        for part in combination:
            for (number, place), size in part.items():
                sizes[number][place] = size
        chosen.append(tuple(tuple(entry) for entry in sizes))
    unknown = {(i, j) for i, leaf in enumerate(known) for j, sure in enumerate(leaf) if not sure}
    return Grids(tuple(dict.fromkeys(chosen)), frozenset(free), bool(unknown) and unknown <= free)


def _large_enough(
    sides: Sequence[Side],
    real: Sequence[Sizes],
    known: Sequence[Sequence[bool]],
    periods: Mapping[LeafAxis, int],
) -> Sequence[Sizes]:
    """Nominal sizes at which something comes out; sizes that are known stay."""
    for count in (0, 8, 32, 128):
        trial = [
            tuple(
                size if sure else size + count * periods.get((leaf, place), 1)
                for place, (size, sure) in enumerate(zip(entry, known[leaf], strict=True))
            )
            for leaf, entry in enumerate(real)
        ]
        try:
            for side in sides:
                through(side, trial)
        except GridError:
            continue
        return trial
    raise GridError("nothing comes out at any size that was tried")


def spacing(sides: Sequence[Side], sizes: Sequence[Sizes]) -> int | None:
    """How many outputs next to each other an impulse can touch, at most; None where leaves are read with
    different strides."""
    own = [_steps([side])[0] for side in sides]
    if any(len(found) != 1 for strides in own for found in strides.values()):
        return None
    widest = 1
    for side, strides in zip(sides, own, strict=True):
        axes, _ = through(side, sizes)
        for axis in axes[side.cone.value]:
            if len({stride for member in axis.of for stride in strides.get(member, ())}) > 1:
                return None
            if axis.of:
                widest = max(widest, (axis.high - axis.low) // axis.stride + 1)
    return widest


def places(
    sides: Sequence[Side], sizes: Sequence[Sizes], free: frozenset[LeafAxis]
) -> dict[LeafAxis, tuple[tuple[int, ...], ...]]:
    """Positions along the free leaf axes, by their remainder by the period, so far apart that no output
    reads two of them, and read only by outputs that see no border. Raises GridError if there are none."""
    found: dict[LeafAxis, tuple[tuple[int, ...], ...]] = {}
    ends = [through(side, sizes)[0][side.cone.value] for side in sides]
    _, periods = _steps(sides)
    for member in sorted(free):
        seen = [axis for end in ends for axis in end if member in axis.of]
        if not seen:
            raise GridError("a leaf is not read")
        period = periods[member]
        low = ceil(max(axis.stride * axis.first + axis.high for axis in seen))
        high = floor(min(axis.stride * axis.last + axis.low for axis in seen))
        step = floor(max(axis.high - axis.low for axis in seen)) + 1
        step = -(-step // period) * period
        rows = tuple(tuple(range(low + shift, high + 1, step)) for shift in range(period))
        if not all(rows):
            raise GridError("there is no room inside")
        found[member] = rows
    return found


def _steps(sides: Sequence[Side]) -> tuple[dict[LeafAxis, set[Fraction]], dict[LeafAxis, int]]:
    """For each leaf axis the strides with which the values read it, over all ways, and its period."""
    strides: dict[LeafAxis, set[Fraction]] = {}
    periods: dict[LeafAxis, int] = {}
    for side in sides:
        ways: dict[str, Way] = {}
        for leaf in side.cone.leaves:
            axes = range(len(side.graph.values[leaf].shape) - 1)
            ways[leaf] = tuple({(side.number[leaf], place): {Fraction(1)}} for place in axes)
        for node in side.cone.nodes:
            ways[node.output] = _way(node, [ways[name] for name in node.inputs])
        for way in ways.values():
            for member, found in ((member, found) for axis in way for member, found in axis.items()):
                periods[member] = lcm(periods.get(member, 1), *(stride.numerator for stride in found))
        for axis in ways[side.cone.value]:
            for member, found in axis.items():
                strides.setdefault(member, set()).update(found)
    return strides, periods


def _way(node: Node, read: list[Way]) -> Way:
    """By how many leaf positions two neighbors along each axis of what ``node`` gives are apart."""
    steps = [Fraction(1)] * len(read[0])
    match node.op:
        case Affine(conv, axis):
            windows = iter(conv.windows)
            for place in range(len(steps)):
                if place != axis - 1:
                    window = next(windows)
                    steps[place] = Fraction(window.stride, window.spread)
        case Slice(cuts):
            steps = [Fraction(step) for _, _, step in cuts[1:]]
        case Relayout(axis_in, axis_out):
            moved = list(read[0])
            moved.insert(axis_out - 1, moved.pop(axis_in - 1))
            read = [tuple(moved)]
        case _:
            pass
    merged: list[dict[LeafAxis, set[Fraction]]] = [{} for _ in steps]
    for way in read:
        for place, (step, entry) in enumerate(zip(steps, way, strict=True)):
            for member, found in entry.items():
                merged[place].setdefault(member, set()).update(step * stride for stride in found)
    return tuple(merged)


def _connected(groups: list[set[LeafAxis]]) -> list[set[LeafAxis]]:
    merged: list[set[LeafAxis]] = []
    for group in groups:
        touching = [other for other in merged if other & group]
        merged = [other for other in merged if not other & group]
        merged.append(set(group).union(*touching))
    return [group for group in merged if group]


def _smaller(
    sides: Sequence[Side], real: Sequence[Sizes], steps: Mapping[LeafAxis, int], sure: bool, room: int
) -> list[dict[LeafAxis, int]]:
    """The smallest representative sizes of some leaf axes that belong together; if the sizes are not
    known, for every remainder by the period. Empty if there are none."""
    members = sorted(steps)
    remainders = [range(1 if sure else steps[member]) for member in members]
    found = []
    for shifts in list(product(*remainders))[: 4 * _MOST_VARIANTS]:
        base = {member: real[member[0]][member[1]] - shift for member, shift in zip(members, shifts, strict=True)}
        shrink = min((size - 1) // steps[member] for member, size in base.items())
        # Known sizes may grow for the sake of more room only, not to become representative at all.
        least = 0 if sure and not room else -_GROWTH - room
        for count in range(shrink, least - 1, -1):
            sizes = {member: size - count * steps[member] for member, size in base.items()}
            if all(_is_representative(side, real, sizes, steps, room) for side in sides):
                found.append(sizes)
                break
    return found


def _is_representative(
    side: Side, real: Sequence[Sizes], sizes: Mapping[LeafAxis, int], steps: Mapping[LeafAxis, int], room: int
) -> bool:
    trial = [
        tuple(sizes.get((leaf, place), size) for place, size in enumerate(entry)) for leaf, entry in enumerate(real)
    ]
    try:
        axes, _ = through(side, trial)
    except GridError:
        return False
    members = set(sizes)
    touched = [axis for value in axes.values() for axis in value if axis.of & members]
    if not all(axis.is_representative for axis in touched):
        return False
    for axis in axes[side.cone.value]:
        # By so many outputs the axis grows with its leaves.
        growth = max((int(steps[member] / axis.stride) for member in axis.of & members), default=1)
        if axis.of & members and axis.last - axis.first < max(room, growth - 1):
            return False
    return True
