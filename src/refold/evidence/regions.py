"""The proof for one region: an affine map is determined by zero and the unit impulses.

Both models' own operators are fed zero and unit impulses in float64. The folded responses must be those
of the original with each weight rounded once to the type that it is stored in, which bounds every entry
by ``u |W|`` (Higham 2002, section 2.2) plus the float64 rounding of the two evaluations. Neither side is
read from the engine: a mistake in a law, in a kernel's axes or in the graph shows here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import final

import numpy as np

from refold.errors import InputError
from refold.evidence.certificate import RegionResult, Verdict
from refold.frontend import AnyArray, Frontend, Lifted, unit_roundoff
from refold.graph.graph import Affine, Graph, Node, Opaque
from refold.graph.layout import channel_axes

EPS64 = float(np.finfo(np.float64).eps)

# All impulses at all positions are fed if that takes at most so many multiply-adds; else one period of
# positions in the interior, and the borders by random probes.
MOST_MULTIPLY_ADDS = 2e9
MOST_BYTES = 128 * 2**20
RANDOM_PROBES = 8


@final
@dataclass(frozen=True, eq=False)
class Side:
    """One model's part in a region: the value, the values it reads, and the linear nodes between."""

    frontend: Frontend
    lifted: Lifted
    value: str
    leaves: tuple[str, ...]
    nodes: tuple[Node, ...]

    @property
    def graph(self) -> Graph:
        """The graph of the model."""
        return self.lifted.graph


def side_of(frontend: Frontend, lifted: Lifted, value: str, stops: frozenset[str] | set[str]) -> Side:
    """``value`` seen from the nearest values that are in ``stops`` or not linear."""
    graph = lifted.graph
    inside: set[str] = set()
    leaves: dict[str, None] = {}
    waiting = [value]
    while waiting:
        name = waiting.pop()
        if name in inside:
            continue
        if name in stops or not graph.is_linear(name):
            leaves[name] = None
            continue
        inside.add(name)
        waiting += graph.producer[name].inputs
    nodes = tuple(n for n in graph.nodes if not isinstance(n.op, Opaque) and n.output in inside)
    return Side(frontend, lifted, value, tuple(leaves), nodes)


def prove_region(before: Side, after: Side, leaves: Mapping[str, str], rng: np.random.Generator) -> RegionResult:
    """Prove that two values are the same affine function of their leaves; ``leaves`` names, for each leaf
    of the first side, its counterpart. Leaves that only one side reads must have no effect on it."""
    name, counterpart = before.value, after.value
    types = {after.frontend.storage(after.lifted, node.name) for node in _stored(after)}
    roundoff = max((unit_roundoff(dtype) for dtype in types), default=0.0)
    reason = ""
    for choice in _shapes(before, after, leaves):  # the real sizes where the small ones do not run
        try:
            worst, probes, method = _prove_at(before, after, leaves, choice, roundoff, rng)
            break
        except InputError as error:
            reason = str(error)
    else:
        return RegionResult(name, counterpart, Verdict.SKIPPED, reason)
    sizes = tuple(tuple(shapes[next(iter(shapes))][1:]) for shapes in choice)
    if not worst <= 1.0:
        reason = (
            f"a weight is off by {worst:.3g} times what rounding allows"
            if np.isfinite(worst)
            else "the responses have different shapes, or are not finite"
        )
        return RegionResult(name, counterpart, Verdict.REFUTED, reason, worst, method, probes, sizes)
    return RegionResult(name, counterpart, Verdict.PROVED, "", worst, method, probes, sizes)


def _prove_at(
    before: Side,
    after: Side,
    leaves: Mapping[str, str],
    choice: Sequence[Mapping[str, tuple[int, ...]]],
    roundoff: float,
    rng: np.random.Generator,
) -> tuple[float, int, str]:
    worst, probes, method = 0.0, 0, "unit impulses"
    for shapes in choice:
        complete = _work(before, after, shapes) <= MOST_MULTIPLY_ADDS
        if not complete:
            method = "unit impulses inside and random probes at the borders"
        found, count = _compare(before, after, leaves, shapes, roundoff, complete, rng)
        worst, probes = max(worst, found), probes + count
    return worst, probes, method


# ---- at which sizes ------------------------------------------------------------------------------


def _shapes(before: Side, after: Side, leaves: Mapping[str, str]) -> list[list[dict[str, tuple[int, ...]]]]:
    """The shapes of the leaves to prove the region at, one example each, in the order to try.

    First the smallest that hold every kind of border, congruent to the real sizes modulo the stride
    (padding 'same' depends on that); where sizes are unknown, one of each residue. Then the real sizes,
    for operators that do not run at others.
    """
    graph = before.graph
    real = {leaf: tuple(graph.values[leaf].nominal) for leaf in leaves}
    axes = channel_axes(graph)
    spaces = {tuple(size for i, size in enumerate(real[leaf]) if i not in (0, axes[leaf])) for leaf in leaves}
    if len(spaces) != 1 or (not before.nodes and not after.nodes):
        return [[real]]
    (space,) = spaces
    need, stride = _extent(before, after, len(space))
    known = _known(graph, leaves, axes)
    choices: list[tuple[int, ...]] = []
    for shift in range(1 if all(known) else min(stride, 4)):
        sizes = []
        for size, fixed in zip(space, known, strict=True):
            least = need + ((size - need) % stride if fixed else shift)
            sizes.append(min(size, least) if fixed else least)
        choices.append(tuple(sizes))
    small = [
        {leaf: _with_space(real[leaf], axes[leaf], sizes) for leaf in leaves} for sizes in dict.fromkeys(choices)
    ]
    return [small, [real]]


def _known(graph: Graph, leaves: Mapping[str, str], axes: Mapping[str, int]) -> list[bool]:
    leaf = next(iter(leaves))
    shape = graph.values[leaf].shape
    return [size is not None for i, size in enumerate(shape) if i not in (0, axes[leaf])]


def _extent(before: Side, after: Side, axes: int) -> tuple[int, int]:
    """A size that shows every border of both sides, and their total stride, over all axes."""
    need, stride = 1, 1
    for side in (before, after):
        reach = total = 1
        for node in side.nodes:
            if isinstance(node.op, Affine):
                windows = node.op.conv.windows
                reach += total * max((w.reach + abs(w.before) + abs(w.after) for w in windows), default=0)
                total *= max((w.stride for w in windows), default=1)
            else:
                reach += 2 * total * _margin(node)
                total *= max((step for *_, step in getattr(node.op, "cuts", ())), default=1)
        need, stride = max(need, reach + total), max(stride, total)
    return need, stride


def _margin(node: Node) -> int:
    pairs = list(getattr(node.op, "widths", ())) + [cut[:2] for cut in getattr(node.op, "cuts", ())]
    return max((abs(width) for pair in pairs for width in pair), default=0)


def _with_space(shape: tuple[int, ...], axis: int, space: Sequence[int]) -> tuple[int, ...]:
    sizes = iter(space)
    return tuple(1 if i == 0 else (size if i == axis else next(sizes)) for i, size in enumerate(shape))


def _work(before: Side, after: Side, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Multiply-adds of feeding every impulse at every position."""
    impulses = sum(prod(shape) for shape in shapes.values())
    positions = max(prod(shape) // max(max(shape), 1) for shape in shapes.values())
    weights = sum(n.op.conv.size for side in (before, after) for n in side.nodes if isinstance(n.op, Affine))
    return float(impulses) * weights * positions


# ---- the comparison ------------------------------------------------------------------------------


def _compare(
    before: Side,
    after: Side,
    leaves: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    roundoff: float,
    complete: bool,
    rng: np.random.Generator,
) -> tuple[float, int]:
    """The largest deviation as a share of what is allowed, and how many inputs were fed."""
    worst, count = 0.0, 0
    limit = max(1, int(MOST_BYTES // (8 * _largest(before, after, shapes))))
    for leaf, shape in shapes.items():
        size = prod(shape)
        places = np.arange(size) if complete else _interior(shape, before, leaf)
        # Every batch has one size, zero first: backends that compile do so once per size.
        rows = min(limit, len(places))
        for start in range(0, len(places), rows):
            chosen = places[start : start + rows]
            feed = {other: np.zeros((rows + 1, *s[1:])) for other, s in shapes.items()}
            feed[leaf].reshape(rows + 1, size)[np.arange(1, len(chosen) + 1), chosen] = 1.0
            first, second = (_responses(side, names, feed) for side, names in _both(before, after, leaves))
            worst = max(worst, _share(first, second, roundoff, before, after))
            count += len(chosen)
    if not complete:
        for _ in range(RANDOM_PROBES):
            feed = {leaf: rng.choice([-1.0, 1.0], size=shape) for leaf, shape in shapes.items()}
            pair = [_responses(side, names, feed) for side, names in _both(before, after, leaves)]
            reads = sum(prod(shape) for shape in shapes.values())
            difference = float(np.abs(pair[0][before.value] - pair[1][after.value]).max())
            scale = max(float(np.abs(values).max()) for values in pair[0].values())
            # A border that is wrong is wrong by whole weights; the rounding of them all stays below this.
            worst = max(worst, difference / (np.sqrt(reads) * (roundoff + EPS64) * 8 * scale + 1e-300))
            count += 1
    return worst, count


def _both(before: Side, after: Side, leaves: Mapping[str, str]) -> list[tuple[Side, dict[str, str]]]:
    return [(before, {leaf: leaf for leaf in leaves}), (after, dict(leaves))]


def _responses(side: Side, names: Mapping[str, str], feed: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
    """The value and all linear values on the way to it."""
    wanted = list(dict.fromkeys([side.value, *(node.output for node in side.nodes)]))
    return side.frontend.evaluate(side.lifted, {names[leaf]: array for leaf, array in feed.items()}, wanted)


def _share(
    first: Mapping[str, AnyArray],
    second: Mapping[str, AnyArray],
    roundoff: float,
    before: Side,
    after: Side,
) -> float:
    """The largest deviation between two sets of responses, the first of each to zero, as a share of what
    is allowed."""
    wanted, given = first[before.value], second[after.value]
    if wanted.shape != given.shape or not (np.isfinite(wanted).all() and np.isfinite(given).all()):
        return float("inf")
    exact, stored = _without_offset(wanted), _without_offset(given)
    sized = np.abs(exact)
    if len(_stored(after)) > 1:
        # Several rounded operators: where their responses are summed, each is off by its own rounding.
        for node in after.nodes:
            value = second[node.output]
            if node.output != after.value and value.shape == exact.shape:
                sized = sized + np.abs(_without_offset(value))
    fan = max((n.op.conv.channels_in * n.op.conv.taps for n in before.nodes if isinstance(n.op, Affine)), default=1)
    largest = _row_max(first) + _row_max(second)
    largest = (largest + largest[:1]).reshape(-1, *(1,) * (wanted.ndim - 1))
    # The second term: sums of `fan` products of such numbers, in float64, on both sides.
    allowed = roundoff * sized * (1 + 4 * roundoff) + 8 * EPS64 * np.sqrt(fan) * largest + 1e-300
    return float((np.abs(stored - exact) / allowed).max()) if exact.size else 0.0


def _without_offset(responses: AnyArray) -> AnyArray:
    """The response to zero, then what each impulse adds to it."""
    return np.concatenate([responses[:1], responses[1:] - responses[:1]])


def _row_max(values: Mapping[str, AnyArray]) -> AnyArray:
    """The largest number among all values, for each row."""
    parts = [np.abs(value).reshape(value.shape[0], -1).max(axis=1) for value in values.values() if value.size]
    result: AnyArray = np.max(parts, axis=0)
    return result


def _stored(side: Side) -> list[Node]:
    """The nodes of a side that hold rounded numbers."""
    return [node for node in side.nodes if isinstance(node.op, Affine)]


def _largest(before: Side, after: Side, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Numbers held at a time per example: all values of the region."""
    positions = max(prod(shape) // max(shape) for shape in shapes.values())
    held = sum(prod(shape) for shape in shapes.values())
    for side in (before, after):
        axes = channel_axes(side.graph)
        for node in side.nodes:
            shape = side.graph.values[node.output].nominal
            held += shape[axes[node.output]] * positions * 2
    return max(held, 1)


def _interior(shape: tuple[int, ...], before: Side, leaf: str) -> AnyArray:
    """The places of all channels at one position in the middle, and at the next ones of a period."""
    axis = channel_axes(before.graph)[leaf]
    _, stride = _extent(before, before, len(shape) - 2)
    index: list[AnyArray] = []
    for i, size in enumerate(shape):
        if i == 0:
            index.append(np.zeros(1, dtype=int))
        elif i == axis:
            index.append(np.arange(size))
        else:
            index.append(np.unique(np.minimum(size // 2 + np.arange(stride), size - 1)))
    return np.ravel_multi_index(np.ix_(*index), shape).reshape(-1)
