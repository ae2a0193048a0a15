"""Which value of one model stands for which value of the other.

Only guesses are made here. Both models run once in float64 on the same random input, as small as sizes
that are free allow; values that agree are taken for counterparts. Every guess that is used must then be
proved, so a wrong one can cost a proof but never give a false one. Where the models part, the operators are
paired by what they are and in which order they come, and everything behind goes on from the original's
values, so that a fault stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np

from refold.errors import InputError
from refold.frontend import AnyArray, Lifted, Reference, unit_roundoff
from refold.graph.graph import Affine, Graph, Node, Opaque, Value
from refold.proof.cone import ranks
from refold.proof.digest import Key, Keys, same_parameters

# Values agree loosely up to this part of their largest entry: rounded weights of many layers may lie
# between. What agrees best is taken, and all that agree about as well.
_LOOSE = 1e-2
_TIGHT = 1e-6
_SAMPLE = 512
_MOST_BYTES = 2**31
# Sizes that are tried where any size will do, until none of the model's own has shrunk to nothing.
_SMALL = (8, 16, 32, 64)


@final
@dataclass(frozen=True, eq=False)
class Pairing:
    """``counterparts`` lists, for values of the second model, values of the original that seem equal,
    the likeliest first; ``reads`` are the pairs of values that paired operators read at the same place.
    ``values`` are the original's in float64 on the random ``inputs``; empty, with ``why_no_values``, where
    they could not be computed. ``seen`` are the second model's, where it goes on from the original's values
    at the ``pins``. ``u`` is the unit roundoff of the coarsest constants of either model."""

    counterparts: Mapping[str, tuple[str, ...]]
    reads: frozenset[tuple[str, str]]
    inputs: Sequence[AnyArray]
    values: Mapping[str, AnyArray]
    seen: Mapping[str, AnyArray]
    pins: Mapping[str, str]
    why_no_values: str = ""
    u: float = 0.0


def pair(
    frontend: Reference, before: Lifted, after: Lifted, inputs: Sequence[AnyArray], keys: tuple[Keys, Keys]
) -> Pairing:
    """Pair the values of two models of the same interface. ``inputs`` are random ones of the real size, of which
    a piece may do."""
    search = _Search(frontend, before, after, inputs, keys)
    search.run()
    return search.result()


@final
@dataclass(eq=False)
class _Search:
    frontend: Reference
    before: Lifted
    after: Lifted
    inputs: Sequence[AnyArray]
    keys: tuple[Keys, Keys]
    why: str = ""
    values: Mapping[str, AnyArray] = field(default_factory=dict)
    samples: dict[tuple[int, ...], tuple[list[str], AnyArray]] = field(default_factory=dict)
    partner: dict[str, Node] = field(default_factory=dict)  # by the name of a node of the second model
    used: set[str] = field(default_factory=set)
    pins: dict[str, str] = field(default_factory=dict)
    hopeless: set[str] = field(default_factory=set)
    u: float = 0.0

    def run(self) -> None:
        graph = self.before.graph
        self.rank = ranks(graph)
        self.opaque = [node for node in graph.nodes if isinstance(node.op, Opaque)]
        self.by_name = {node.name: node for node in self.opaque}
        self.u = u = max(
            (
                unit_roundoff(self.frontend.storage(lifted, node.name))
                for lifted in (self.before, self.after)
                for node in lifted.graph.nodes
                if isinstance(node.op, Affine)
            ),
            default=0.0,
        )
        self.loose, self.tight = max(_LOOSE, 64 * u), max(_TIGHT, 16 * u)
        self._run_original()
        self._sample()
        others = [node for node in self.after.graph.nodes if isinstance(node.op, Opaque)]
        self.pins = dict(zip(self.after.graph.inputs, graph.inputs, strict=True))
        if not self._match_in_order(others):
            self._search(others)

    def _search(self, others: Sequence[Node]) -> None:
        while True:
            self.seen = self._evaluate_after()
            for node in others:
                if node.name not in self.partner:
                    self._match_by_value(node)
            missing = [n for n in others if n.name not in self.partner and n.name not in self.hopeless]
            if not missing:
                break
            # Without values the order of the operators is all there is.
            for node in missing if not self.seen else missing[:1]:
                self._match_by_place(node)
        self.seen = self._evaluate_after()

    def result(self) -> Pairing:
        found: dict[str, tuple[str, ...]] = {}
        for name in self.after.graph.values:
            fixed = [self.pins[name]] if name in self.pins else []
            agreeing = self._agreeing(name) if name in self.seen else []
            if fixed or agreeing:
                found[name] = tuple(dict.fromkeys([*fixed, *agreeing]))
        self._follow_wires(found)
        # What paired operators read, argument by argument, are counterparts whether they agree or not.
        reads = [
            pair
            for node in self.after.graph.nodes
            if node.name in self.partner
            for pair in zip(node.inputs, self.partner[node.name].inputs, strict=True)
        ]
        ends = zip(self.after.graph.outputs, self.before.graph.outputs, strict=True)
        for mine, theirs in (*reads, *ends):
            if theirs not in found.get(mine, ()):
                found[mine] = (*found.get(mine, ()), theirs)
        return Pairing(found, frozenset(reads), self.inputs, self.values, self.seen, self.pins, self.why, self.u)

    def _follow_wires(self, found: dict[str, tuple[str, ...]]) -> None:
        """Where no values tell, what equal linear operators give from counterparts are counterparts too."""
        readers: dict[str, list[Node]] = {}
        for node in self.before.graph.nodes:
            for name in dict.fromkeys(node.inputs):
                readers.setdefault(name, []).append(node)
        for node in self.after.graph.nodes:
            if isinstance(node.op, Opaque) or not node.inputs or node.output in found or node.output in self.seen:
                continue
            others = [other for theirs in found.get(node.inputs[0], ()) for other in readers.get(theirs, ())]
            alike = [
                other.output
                for other in others
                if _same_op(node, other)
                and len(node.inputs) == len(other.inputs)
                and all(b in found.get(a, ()) for a, b in zip(node.inputs, other.inputs, strict=True))
            ]
            if alike:
                found[node.output] = tuple(dict.fromkeys(alike))

    # ---- values ----------------------------------------------------------------------------------

    def _run_original(self) -> None:
        """Run the original on a piece of the inputs if that shows as much as all of them."""
        graph = self.before.graph
        for piece in _pieces(graph, self.inputs):
            self.values = self._evaluate(self.before, dict(zip(graph.inputs, piece, strict=True)))
            if self.values and not any(_has_shrunk(graph.values[n], v) for n, v in self.values.items()):
                self.inputs = piece
                return
            self.why = ""
        self.values = self._evaluate(self.before, dict(zip(graph.inputs, self.inputs, strict=True)))

    def _evaluate(self, lifted: Lifted, feeds: Mapping[str, AnyArray]) -> Mapping[str, AnyArray]:
        if self.why:
            return {}
        by_body: dict[str, list[str]] = {"": []}
        for name in _worth_seeing(lifted.graph):
            if name not in feeds:
                by_body.setdefault(lifted.graph.values[name].body, []).append(name)
        found = dict(feeds)
        for body, wanted in by_body.items():
            try:
                found.update(self.frontend.evaluate(lifted, found, wanted))
            except InputError as error:
                if not body:
                    self.why = str(error)
                    return {}
                # A branch that is not taken need not run on these inputs.
        return found

    def _evaluate_after(self) -> Mapping[str, AnyArray]:
        if not self.values:
            return {}
        known = {mine: self.values[theirs] for mine, theirs in self.pins.items() if theirs in self.values}
        return self._evaluate(self.after, known)

    def _sample(self) -> None:
        groups: dict[tuple[int, ...], list[str]] = {}
        for name, value in self.values.items():
            groups.setdefault(value.shape, []).append(name)
        for shape, names in groups.items():
            rows = np.stack([_some(self.values[name]) for name in names])
            order = np.argsort(rows[:, 0]) if rows.shape[1] else range(len(names))
            self.samples[shape] = ([names[place] for place in order], rows[order])

    def _errors(self, name: str) -> dict[str, float]:
        """The values of the original near one of the second model, with the distance by the size."""
        value = self.seen[name]
        names, samples = self.samples.get(value.shape, ([], np.empty((0, 0))))
        if not names:
            return {}
        size, sample = _size(value), _some(value)
        where = _around(samples[:, :1].ravel(), sample[:1], self.loose * size)
        near = np.max(_gaps(samples[where], sample), axis=1, initial=0.0) <= self.loose * size
        candidates = [names[where][place] for place in np.flatnonzero(near)]
        errors = {c: _distance(self.values[c], value) / size for c in candidates}
        return {c: error for c, error in errors.items() if error <= self.loose}

    def _agreeing(self, name: str) -> list[str]:
        errors = self._errors(name)
        if not errors:
            return []
        # A tensor of one number only is like too many others to tell anything.
        value = self.seen[name]
        if value.size > 1 and np.all(value == value.flat[0]):
            errors = {c: e for c, e in errors.items() if c == name}
        limit = max(4 * min(errors.values(), default=0.0), self.tight)
        close = [c for c, error in errors.items() if error <= limit]
        return sorted(close, key=lambda c: (c != name, errors[c] > self.tight, self.rank[c]))

    # ---- operators -------------------------------------------------------------------------------

    def _match_in_order(self, others: Sequence[Node]) -> bool:
        """Pair equal operators, the first one with the first one, as a fold leaves them; whether all have a partner
        that reads the same. If not, nothing is paired."""
        waiting: dict[Key, list[Node]] = {}
        for node in self.opaque:
            waiting.setdefault(self.keys[0].of(node.name), []).append(node)
        pairs = []
        for node in others:
            alike = [n for n in waiting.get(self.keys[1].of(node.name), ()) if self._same_outputs(node, n)]
            if not alike or not self.values:
                return False
            other = next((n for n in alike if n.name == node.name), alike[0])
            waiting[self.keys[1].of(node.name)].remove(other)
            pairs.append((node, other))
        pins = dict(self.pins)
        for node, other in pairs:
            self._join(node, other)
        self.seen = self._evaluate_after()
        reads = [pair for node, other in pairs for pair in zip(node.inputs, other.inputs, strict=True)]
        if all(self._agree(mine, theirs) for mine, theirs in reads):
            return True
        self.pins = pins
        self.partner.clear()
        self.used.clear()
        return False

    def _agree(self, mine: str, theirs: str) -> bool:
        if mine not in self.seen or theirs not in self.values:
            return False
        one, two = self.values[theirs], self.seen[mine]
        return one.shape == two.shape and _distance(one, two) <= self.tight * _size(two)

    def _match_by_value(self, node: Node) -> None:
        if not all(name in self.seen for name in node.outputs) or not node.outputs:
            return
        near = [self._errors(name) for name in node.outputs]
        errors: dict[str, float] = {}
        for candidate in self._alike(node):
            if all(theirs in e for theirs, e in zip(candidate.outputs, near, strict=True)):
                errors[candidate.name] = max(e[theirs] for theirs, e in zip(candidate.outputs, near, strict=True))
        if not errors:
            return
        limit = max(4 * min(errors.values()), 1e-9)
        close = [self.by_name[name] for name, error in errors.items() if error <= limit]
        self._join(node, min(close, key=lambda other: self._preference(node, other)))

    def _match_by_place(self, node: Node) -> None:
        mine, theirs = self.keys[1].of(node.name), self.keys[0]
        if any(self._errors(name) for name in node.outputs if name in self.seen):
            self.hopeless.add(node.name)  # another operator gives the same values: that is for measuring
            return
        unused = [other for other in self.opaque if other.name not in self.used and _same_form(node, other)]
        fitting = [other for other in unused if self._same_outputs(node, other)]
        free = (
            [other for other in fitting if theirs.of(other.name) == mine]
            or [other for other in fitting if mine.is_edit_of(theirs.of(other.name))]
            or [other for other in unused if theirs.of(other.name) == mine]
        )
        if free:
            self._join(node, min(free, key=lambda other: self._preference(node, other)))
        else:
            self.hopeless.add(node.name)

    def _alike(self, node: Node) -> Iterable[Node]:
        mine, theirs = self.keys[1].of(node.name), self.keys[0]
        return [o for o in self.opaque if self._same_outputs(node, o) and theirs.of(o.name) == mine]

    def _same_outputs(self, node: Node, other: Node) -> bool:
        mine, theirs = self.after.graph.values, self.before.graph.values
        shapes = [mine[name].shape for name in node.outputs]
        return _same_form(node, other) and shapes == [theirs[name].shape for name in other.outputs]

    def _preference(self, node: Node, other: Node) -> tuple[bool, int, bool, int]:
        known = [
            mine in self.pins and self.pins[mine] != theirs
            for mine, theirs in zip(node.inputs, other.inputs, strict=True)
        ]
        return other.name in self.used, sum(known), other.name != node.name, self.rank[other.outputs[0]]

    def _join(self, node: Node, other: Node) -> None:
        self.partner[node.name] = other
        self.used.add(other.name)
        self.pins.update(zip(node.outputs, other.outputs, strict=True))


def _same_form(node: Node, other: Node) -> bool:
    return len(node.inputs) == len(other.inputs) and len(node.outputs) == len(other.outputs)


def _same_op(node: Node, other: Node) -> bool:
    one, two = node.op, other.op
    if not isinstance(one, Affine) or not isinstance(two, Affine):
        return type(one) is type(two) and not isinstance(one, Opaque) and one == two
    if (one.axis, one.conv.windows, one.conv.groups) != (two.axis, two.conv.windows, two.conv.groups):
        return False
    return same_parameters((one.conv.kernel, one.conv.bias), (two.conv.kernel, two.conv.bias))


def _worth_seeing(graph: Graph) -> list[str]:
    """All values; of a model whose values do not fit into memory, those that must be there anyway."""
    names = list(dict.fromkeys([*graph.inputs, *(name for node in graph.nodes for name in node.outputs)]))
    if sum(8 * int(np.prod(graph.values[name].nominal)) for name in names) <= _MOST_BYTES:
        return names
    opaque = [name for node in graph.nodes if isinstance(node.op, Opaque) for name in node.outputs]
    return list(dict.fromkeys([*graph.inputs, *opaque, *graph.required]))


def _pieces(graph: Graph, inputs: Sequence[AnyArray]) -> Iterator[list[AnyArray]]:
    """Smaller inputs, cut out of these where the sizes are free."""
    shapes = [graph.values[name].shape for name in graph.inputs]
    for size in _SMALL:
        piece = [
            array[tuple(slice(size if known is None and axis else None) for axis, known in enumerate(shape))]
            for array, shape in zip(inputs, shapes, strict=True)
        ]
        if 2 * sum(array.size for array in piece) <= sum(array.size for array in inputs):
            yield piece


def _has_shrunk(value: Value, array: AnyArray) -> bool:
    """Whether an axis that has an extent at the real size has none here."""
    return any(size <= 1 < usual for size, usual in zip(array.shape[1:], value.nominal[1:], strict=False))


def _size(value: AnyArray) -> float:
    """Its largest finite entry, and never 0."""
    return float(np.max(np.abs(value), initial=0.0, where=np.isfinite(value)) + np.finfo(np.float64).tiny)


def _around(firsts: AnyArray, first: AnyArray, gap: float) -> slice:
    """Where ascending numbers are that may be within ``gap`` of another one, if there is one: a deep network has
    many values of one shape, and few of them have to be looked at."""
    if not np.isfinite(first).all() or not first.size:
        return slice(None)
    gap *= 1 + 1e-9  # so that rounding hides none
    low, high = np.searchsorted(firsts, first - gap, "left"), np.searchsorted(firsts, first + gap, "right")
    return slice(int(low[0]), int(high[0]))


def _distance(one: AnyArray, two: AnyArray) -> float:
    return float(np.max(_gaps(one, two), initial=0.0))


def _gaps(one: AnyArray, two: AnyArray) -> AnyArray:
    """How far numbers are apart; infinities and NaNs are not apart from their like, and infinitely from others."""
    one, two = one.astype(np.float64, copy=False), two.astype(np.float64, copy=False)
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.abs(one - two)
    if np.isfinite(gaps).all():
        return np.asarray(gaps)
    alike = (one == two) | (np.isnan(one) & np.isnan(two))
    return np.asarray(np.where(alike, 0.0, np.where(np.isnan(gaps), np.inf, gaps)))


def _some(value: AnyArray) -> AnyArray:
    """A few entries of an array, always the same ones for the same shape."""
    flat = value.reshape(-1).astype(np.float64, copy=False)
    if flat.size <= _SAMPLE:
        return flat
    return np.asarray(flat[np.random.default_rng(flat.size).integers(0, flat.size, _SAMPLE)])
