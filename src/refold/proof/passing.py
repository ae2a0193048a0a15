"""Factors and shifts per channel on the other side of an operator that lets them pass.

An operator that takes means, each of numbers of single channels and with weights that sum to one, commutes with one
factor and one shift per channel: ``sum_i w_i (a x_i + b) = a sum_i w_i x_i + b``; and one that takes maxima does if
``a > 0``. So ``z = P(A(x))`` may be read as ``z = A'(P(x))``, and ``w = B(P(y))`` as ``w = P(B'(y))``. Nothing is
changed by that: every value of the model stays what it is, and one is new, ``P(x)`` or ``B'(y)``. That is the value
which a model that was folded has there.

The factors and shifts are read from the model's own operators, and each such step is tried out on random numbers
before it is used. Which steps to take is guessed from values: those after which the operator reads what its
counterpart in the other model reads. A wrong guess costs a proof and can give no false one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from refold.algebra.affine import scale_shift
from refold.errors import InputError
from refold.frontend import AnyArray, Frontend, Identity, Lifted, Reference
from refold.graph.graph import Affine, Gain, Graph, Node, Opaque, Passage, Relayout, Value
from refold.proof.digest import Keys

# Values agree up to this part of the largest, as in the pairing; what is worth a step agrees so much better than
# what there is without one.
_LOOSE = 1e-2
_BETTER = 0.25
_MOST_MAPS = 4  # in front of one operator, or behind it
# Two ways in float64 to the same numbers, as a part of the largest.
_AGREES = 1e-10
_LARGE = 2.0**20


@final
@dataclass(frozen=True, eq=False)
class _Map:
    """``scale * x + shift`` along one axis, as many numbers as that has; ``node`` is where it comes from."""

    node: str
    axis: int
    scale: AnyArray
    shift: AnyArray

    def __call__(self, data: AnyArray) -> AnyArray:
        shape = [-1 if place == self.axis else 1 for place in range(data.ndim)]
        return np.asarray(data * self.scale.reshape(shape) + self.shift.reshape(shape))


@final
@dataclass(frozen=True, eq=False)
class _Reading:
    """A model in which some maps stand elsewhere. ``base`` is the model as it was lifted, ``changed`` holds, in an
    order in which they can be computed, what is new in its graph: the nodes, with the map if it is one."""

    base: Lifted
    lifted: Lifted
    changed: tuple[tuple[Node, _Map | None], ...] = ()
    said: tuple[tuple[str, str], ...] = ()


@final
class Passed:
    """A front end whose models are read with maps on the other side of operators."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend
        self.readings: list[_Reading] = []

    def _reading(self, lifted: Lifted) -> _Reading:
        found = next((reading for reading in self.readings if reading.lifted is lifted), None)
        return found or _Reading(lifted, lifted)

    def identity(self, lifted: Lifted, node: str) -> Identity:
        """What a node is, wherever it stands."""
        reading = self._reading(lifted)
        return self.frontend.identity(reading.base, _home(reading, node))

    def storage(self, lifted: Lifted, node: str) -> str:
        """The type of a node's parameters, wherever it stands."""
        reading = self._reading(lifted)
        return self.frontend.storage(reading.base, _home(reading, node))

    def evaluate(self, lifted: Lifted, feeds: Mapping[str, AnyArray], wanted: Sequence[str]) -> dict[str, AnyArray]:
        """The values ``wanted`` in float64, by the model's own operators and the maps that were read from them."""
        return _evaluated(self.frontend, self._reading(lifted), feeds, wanted)


def _home(reading: _Reading, node: str) -> str:
    return next((moved.node for new, moved in reading.changed if moved is not None and new.name == node), node)


def _evaluated(
    frontend: Frontend, reading: _Reading, feeds: Mapping[str, AnyArray], wanted: Sequence[str]
) -> dict[str, AnyArray]:
    base = reading.base.graph.values
    known = dict(feeds)
    for node, moved in reading.changed:  # the model itself goes on from its own values
        if node.inputs[0] in known and node.inputs[0] not in base and node.output not in known:
            known[node.output] = _stepped(frontend, reading, node, moved, known)
    makers = {node.output: (node, moved) for node, moved in reading.changed if node.output not in base}
    needed: list[str] = []
    asked: dict[str, None] = {}
    waiting = [name for name in wanted if name not in known]
    while waiting:
        name = waiting.pop()
        if name in makers:
            needed.append(name)
            waiting += [read for read in makers[name][0].inputs[:1] if read not in known]
        else:
            asked[name] = None
    own = {name: array for name, array in known.items() if name in base}
    known.update(frontend.evaluate(reading.base, own, list(asked)) if asked else {})
    for name in reversed(needed):
        node, moved = makers[name]
        if name not in known:
            known[name] = _stepped(frontend, reading, node, moved, known)
    return {name: known[name] for name in wanted}


def _stepped(
    frontend: Frontend, reading: _Reading, node: Node, moved: _Map | None, known: Mapping[str, AnyArray]
) -> AnyArray:
    """What a new node gives."""
    data = np.asarray(known[node.inputs[0]])
    if moved is not None:
        return moved(data)
    graph = reading.base.graph
    operator = next(own for own in graph.nodes if own.name == node.name)
    others = {name: known[name] for name in operator.inputs[1:] if name in known}
    feeds = {**others, operator.inputs[0]: data}
    return frontend.evaluate(reading.base, feeds, [operator.output])[operator.output]


# ---- one step ------------------------------------------------------------------------------------------


def _ways(graph: Graph, node: Node) -> tuple[Passage, ...]:
    """The ways on which maps per channel pass through a node."""
    match node.op:
        case Opaque(passages=found):
            return found()
        case Relayout(axis_in, axis_out):
            return (Passage(axis_in, axis_out),)
        case Affine(conv, axis) if conv.is_channelwise and conv.taps > 1 and not np.any(conv.bias):
            whole = all(w.spread == 1 and max(w.before, w.after) <= 0 and not w.floating for w in conv.windows)
            return (Passage(axis, axis),) if whole and np.all(conv.kernel * conv.taps == 1.0) else ()
        case _:
            return ()


def _is_map(node: Node) -> bool:
    return (isinstance(node.op, Affine) and node.op.conv.is_scale) or (
        isinstance(node.op, Gain) and node.op != Gain()
    )


def _map_of(frontend: Frontend, reading: _Reading, node: Node, axis: int) -> _Map | None:
    """The factors and shifts of a node along an axis, from what its own operator makes of 0 and of a large number
    (of which the shift takes nothing away)."""
    for new, moved in reading.changed:
        if new is node:
            return moved if moved is not None and moved.axis == axis else None
    if isinstance(node.op, Affine) and node.op.axis != axis:
        return None
    value = reading.lifted.graph.values[node.inputs[0]]
    probes = np.stack([np.zeros(value.nominal[1:]), np.full(value.nominal[1:], _LARGE)])
    found = frontend.evaluate(reading.base, {node.inputs[0]: probes}, [node.output])[node.output]
    rows = np.moveaxis(found, axis, 1).reshape(2, found.shape[axis], -1)
    if not np.all(rows == rows[:, :, :1]):
        return None
    shift = rows[0, :, 0]
    return _Map(node.name, axis, (rows[1, :, 0] - shift) / _LARGE, shift)


def _beyond(moved: _Map, way: Passage, axis: int, channels: int | None, *, ahead: bool) -> _Map | None:
    """A map on the other side of an operator."""
    if way.rising and not np.all(moved.scale > 0.0):
        return None
    if way.ins is None or way.outs is None:
        return replace(moved, axis=axis)
    here, there = (way.outs, way.ins) if ahead else (way.ins, way.outs)
    scale, shift = np.ones(channels or 0), np.zeros(channels or 0)
    for new, old in ((scale, moved.scale), (shift, moved.shift)):
        new[list(there)] = old[list(here)]
        if not np.array_equal(new[list(there)], old[list(here)]):
            return None
    return _Map(moved.node, axis, scale, shift)


def _step(frontend: Frontend, reading: _Reading, operator: Node, *, ahead: bool) -> _Reading | None:
    """The reading with the map in front of an operator behind it; or ``ahead``, the one behind in front."""
    graph = reading.lifted.graph
    node = _map_at(graph, operator, ahead=ahead)
    if node is None:
        return None
    for way in _ways(graph, operator):
        own, other = (way.axis_out, way.axis_in) if ahead else (way.axis_in, way.axis_out)
        found = _map_of(frontend, reading, node, own)
        like = graph.values[operator.inputs[0] if ahead else operator.output]
        moved = found and _beyond(found, way, other, like.shape[other], ahead=ahead)
        if moved:
            done = _rewritten(reading, operator, node, moved, ahead=ahead)
            return done if _holds(frontend, reading, done, operator, node, ahead=ahead) else None
    return None


def _rewritten(reading: _Reading, operator: Node, node: Node, moved: _Map, *, ahead: bool) -> _Reading:
    graph = reading.lifted.graph
    like = graph.values[operator.inputs[0] if ahead else operator.output]
    new = f"{like.name}, {len(reading.said)} times read anew"
    conv = scale_shift(moved.scale, moved.shift, len(like.shape) - 2)
    # The weights are stored where they were; that they might cancel is said by the values.
    op = Affine(conv, moved.axis)
    name = f"{node.name}, {'ahead of' if ahead else 'behind'} {operator.name}"
    if ahead:
        there = Node(name, op, (operator.inputs[0],), (new,))
        passed = replace(operator, inputs=(new, *operator.inputs[1:]), outputs=node.outputs)
        made = [there, passed]
        gone, place = [operator, node], node
    else:
        passed = replace(operator, inputs=(node.inputs[0], *operator.inputs[1:]), outputs=(new,))
        there = Node(name, op, (new,), operator.outputs)
        made = [passed, there]
        gone, place = [operator], operator
    nodes: list[Node] = []
    for other in graph.nodes:
        if other is place:
            nodes += made
        elif not any(other is own for own in gone):
            nodes.append(other)
    values = {**graph.values, new: Value(new, like.shape, like.dtype, like.nominal)}
    kept = [entry for entry in reading.changed if not any(entry[0] is own for own in gone)]
    order = {id(own): number for number, own in enumerate(nodes)}
    changed = [*kept, (there, moved), (passed, None)]
    changed.sort(key=lambda entry: order[id(entry[0])])
    said = (
        operator.name,
        f"'{node.name}' passes through it: a factor and a shift per channel are the same on both sides",
    )
    lifted = replace(reading.lifted, graph=replace(graph, nodes=tuple(nodes), values=values))
    return _Reading(reading.base, lifted, tuple(changed), (*reading.said, said))


def _holds(
    frontend: Frontend, before: _Reading, after: _Reading, operator: Node, node: Node, *, ahead: bool
) -> bool:
    """Whether a map and an operator do the same in both orders, on random numbers."""
    read, given = (operator.inputs[0], node.output) if ahead else (node.inputs[0], operator.output)
    shape = before.lifted.graph.values[read].nominal[1:]
    rows = [np.random.default_rng(place).normal(scale=scale, size=shape) for place, scale in enumerate((1.0, 1e3))]
    feeds = {read: np.stack(rows)}
    new = next(entry[0] for entry in after.changed if entry[0].name == operator.name)
    (one,) = _evaluated(frontend, before, feeds, [given]).values()
    if ahead:
        fed = _evaluated(frontend, after, feeds, [new.inputs[0]])
        (two,) = _evaluated(frontend, after, fed, [given]).values()
    else:
        fed = _evaluated(frontend, after, feeds, [new.output])
        (two,) = _evaluated(frontend, after, fed, [given]).values()
    return one.shape == two.shape and bool(np.max(np.abs(one - two)) <= _AGREES * np.max(np.abs(one)))


# ---- which steps ---------------------------------------------------------------------------------------


def settle(
    frontend: Frontend, models: tuple[Lifted, Lifted], inputs: Sequence[AnyArray], keys: tuple[Keys, Keys]
) -> tuple[Reference, tuple[Lifted, Lifted], tuple[tuple[str, str], ...]]:
    """Both models, read so that operators through which maps pass read the same in both, as far as that is found;
    with what asks their operators, and, for each step, of which operator something was used, and what."""
    passed = Passed(frontend)
    passed.readings = [_Reading(lifted, lifted) for lifted in models]
    search = _Search(frontend, passed.readings, inputs, keys)
    for which in (0, 1):
        while (found := search.better(which)) is not None:
            passed.readings[which] = found
    first, second = passed.readings
    return passed, (first.lifted, second.lifted), (*first.said, *second.said)


@final
class _Search:
    """Looks for steps after which an operator reads what its counterpart in the other model reads."""

    def __init__(
        self, frontend: Frontend, readings: list[_Reading], inputs: Sequence[AnyArray], keys: tuple[Keys, Keys]
    ) -> None:
        self.frontend, self.readings, self.keys = frontend, readings, keys
        self.values: list[dict[str, AnyArray]] = [
            dict(zip(reading.base.graph.inputs, inputs, strict=True)) for reading in readings
        ]

    def better(self, which: int) -> _Reading | None:
        """A reading of one of the models in which one operator more reads what its counterpart reads."""
        reading = self.readings[which]
        for node in reading.lifted.graph.nodes:
            ahead = _has_map(reading.lifted.graph, node, ahead=True)
            if not ahead and not _has_map(reading.lifted.graph, node, ahead=False):
                continue
            try:
                found = self._better_at(which, node)
            except InputError:  # an operator that does not run in float64 alone
                continue
            if found is not None:
                return found
        return None

    def _better_at(self, which: int, node: Node) -> _Reading | None:
        reading, other = self.readings[which], self.readings[1 - which]
        if len(node.outputs) != 1 or not node.inputs or not _ways(reading.lifted.graph, node):
            return None
        key = self.keys[which].of(node.name)
        alike = [
            twin.inputs[0]
            for twin in other.lifted.graph.nodes
            if type(twin.op) is type(node.op) and twin.inputs and self.keys[1 - which].of(twin.name) == key
        ]
        theirs = [self._value(1 - which, other, name) for name in alike]
        best, least = None, _BETTER * self._error(self._value(which, reading, node.inputs[0]), theirs)
        for ahead in (False, True):
            step = reading
            for _ in range(_MOST_MAPS):
                operator = next(own for own in step.lifted.graph.nodes if own.name == node.name)
                further = _step(self.frontend, step, operator, ahead=ahead)
                if further is None:
                    break
                step = further
                read = next(own for own, _ in step.changed if own.name == node.name).inputs[0]
                error = self._error(self._value(which, step, read), theirs)
                if error < min(least, _LOOSE):
                    best, least = step, error
        return best

    def _value(self, which: int, reading: _Reading, name: str) -> AnyArray:
        known = self.values[which]
        if name not in reading.base.graph.values:
            return _evaluated(self.frontend, reading, known, [name])[name]
        if name not in known:
            known.update(self.frontend.evaluate(reading.base, known, [name]))
        return known[name]

    def _error(self, value: AnyArray, others: Sequence[AnyArray]) -> float:
        """How far a value is from the nearest of others, as a part of its largest number."""
        size = float(np.max(np.abs(value), initial=0.0)) + float(np.finfo(np.float64).tiny)
        gaps = [float(np.max(np.abs(value - other), initial=0.0)) for other in others if other.shape == value.shape]
        return min((gap / size for gap in gaps if np.isfinite(gap)), default=float("inf"))


def _has_map(graph: Graph, node: Node, *, ahead: bool) -> bool:
    """Whether there is a map right in front of a node, or (``ahead``) right behind it."""
    if not isinstance(node.op, Opaque | Relayout | Affine) or len(node.outputs) != 1 or not node.inputs:
        return False
    return _map_at(graph, node, ahead=ahead) is not None


def _map_at(graph: Graph, node: Node, *, ahead: bool) -> Node | None:
    if ahead:
        readers = graph.consumers[node.output]
        found = readers[0] if len(readers) == 1 and node.output not in graph.outputs else None
    else:
        found = graph.producer.get(node.inputs[0])
        while found is not None and found.op == Gain():
            found = graph.producer.get(found.inputs[0])
    return found if found is not None and _is_map(found) else None
