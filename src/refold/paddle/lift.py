"""From a recorded Paddle Layer to the neutral graph.

A model is recorded twice; see :mod:`refold.recording.twice`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, final

import numpy as np
import paddle

from refold.algebra.affine import Array
from refold.algebra.cost import Cost
from refold.frontend import AnyArray
from refold.graph import rearrangement
from refold.graph.borders import bordered, with_exact_borders
from refold.graph.cost import operator_cost
from refold.graph.graph import Gain, Graph, Node, Op, Opaque, Pad, Passage, Value, alive
from refold.graph.layout import settled
from refold.paddle import linear
from refold.paddle.constants import bake
from refold.paddle.examples import array_of
from refold.paddle.patches import SET_ITEM
from refold.paddle.perform import perform, recomputed
from refold.paddle.sentences import first_line
from refold.paddle.tensors import computed_weights, stored
from refold.paddle.trace import Step, Trace, record
from refold.recording import record as recording
from refold.recording import twice
from refold.recording.record import Shape, shape_in_both
from refold.recording.sizes import Size
from refold.recording.symbols import Symbol, symbols

# Numbers of elements beyond which a rearrangement is not tried out.
MOST_ELEMENTS = 2**24

# How far what the recorded steps give may be from what the model gave, relative to its largest number.
TOLERANCE = 1e-4


@final
@dataclass(frozen=True, eq=False)
class Record(recording.Record[Step]):
    """See :class:`refold.recording.record.Record`. ``evaluating`` holds the scopes and steps (by identity) whose
    weights are computed from other parameters."""

    trace: Trace
    other: Trace
    evaluating: frozenset[int] = frozenset()


def record_twice(model: Any, feeds: Sequence[tuple[Any, ...]], names: Any) -> tuple[Trace, Trace]:
    """Two recordings that agree. ``feeds`` are the two sets of arguments. Raises UntraceableError."""
    first, second = twice.two_that_agree(
        lambda which, whole: record(model, feeds[which], names, whole), model, _kind, _equal
    )
    twice.check(first, second, _again, _are_close, first_line)
    bake(first, second)
    return first, second


def _kind(step: Step) -> Any:
    return step.name, step.function, id(step.layer)


def _again(step: Step, tensor: Callable[[Symbol], Any], size: Callable[[Size], int]) -> list[Any]:
    return perform(step, tensor, size=size)


def _equal(one: Any, two: Any) -> bool:
    """Whether two tensors or two arrays hold the same numbers."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    a, b = np.asarray(array_of(one)), np.asarray(array_of(two))
    return bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))


def _are_close(tensor: Any, expected: AnyArray) -> bool:
    """Whether a tensor is equal to an array but for what rounding does to it."""
    found = np.asarray(tensor.astype("float64").numpy())
    wanted = expected.astype(np.float64)
    scale = np.max(np.abs(wanted), initial=0.0, where=np.isfinite(wanted))
    limit = TOLERANCE * scale + 1e-30
    return found.shape == wanted.shape and np.allclose(found, wanted, rtol=0.0, atol=limit, equal_nan=True)


# ---- the graph -------------------------------------------------------------------------------------


@final
@dataclass
class _Lift:
    """The graph while it grows; ``chains`` holds, for a value that was only rearranged, the steps in both
    recordings, and ``padded``, for one that was padded and then written into, that padding and these steps."""

    trace: Trace
    other: Trace
    model: Any
    symbols: dict[str, Symbol] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    owners: dict[str, Step] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    chains: dict[str, list[tuple[Step, Step]]] = field(default_factory=dict)
    padded: dict[str, tuple[Pad, list[tuple[Step, Step]]]] = field(default_factory=dict)
    inner: dict[Symbol, Shape] = field(default_factory=dict)
    read: set[Symbol] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.read.update(symbols(self.trace.outputs), *(step.reads for step in self.trace.steps))

    def add_value(self, one: Symbol, two: Symbol) -> None:
        shape = shape_in_both(one, two)
        nominal = (1, *one.shape[1:]) if shape[:1] == (None,) else one.shape
        self.symbols[one.name], self.shapes[one.name] = one, shape
        self.values[one.name] = Value(one.name, shape, one.dtype, nominal)

    def shape(self, symbol: Symbol) -> Shape:
        """The shape of a symbol as far as it is known."""
        return self.inner[symbol] if symbol in self.inner else self.shapes[symbol.name]


def lift_traces(model: Any, trace: Trace, other: Trace) -> tuple[Graph, Record]:
    """The neutral graph of a model that was recorded twice."""
    lift = _Lift(trace, other, model)
    for first, second in zip(symbols(trace.inputs), symbols(other.inputs), strict=True):
        lift.add_value(first, second)
    inputs = tuple(lift.symbols)
    for one, two in zip(trace.steps, other.steps, strict=True):
        for a, b in zip(one.gives, two.gives, strict=True):
            lift.add_value(a, b)
            lift.owners[a.name] = one
        for p, q in zip(one.inside, two.inside, strict=False):
            lift.inner.update({a: shape_in_both(a, b) for a, b in zip(p.outputs, q.outputs, strict=False)})
    evaluating = _evaluating(model, trace)
    record = Record(trace, other, lift.symbols, lift.owners, lift.shapes, evaluating)
    for one, two in zip(trace.steps, other.steps, strict=True):
        _lift_step(lift, record, one, two)
    outputs = tuple(symbol.name for symbol in symbols(trace.outputs))
    nodes = with_exact_borders(settled(alive(lift.nodes, outputs)), lift.values)
    used = {name for node in nodes for name in (*node.inputs, *node.outputs)} | {*inputs, *outputs}
    values = {name: value for name, value in lift.values.items() if name in used}
    floats = [tensor for tensor in stored(model) if "float" in str(tensor.dtype)]
    parameters = sum(prod(tensor.shape) for tensor in floats)
    largest = min((largest_number(str(t.dtype)) for t in floats), default=float(np.finfo(np.float32).max))
    return Graph(values, nodes, inputs, outputs, parameters, largest), record


def largest_number(dtype: str) -> float:
    """The largest number of a type."""
    name = dtype.removeprefix("paddle.")
    if name == "bfloat16":
        return float(np.float32(2.0) ** 127 * np.float32(2.0 - 2.0**-7))
    return float(np.finfo(name).max) if name in ("float16", "float64") else float(np.finfo(np.float32).max)


def _lift_step(lift: _Lift, record: Record, one: Step, two: Step) -> None:
    if linear.is_rearrangement(one) and len(one.reads) == 1:
        _lift_rearrangement(lift, record, one, two)
        return
    if one.function == SET_ITEM and _lift_border(lift, one, two):
        return
    op = _op_of(lift, one) if lift.read.isdisjoint(one.gives[1:]) else Opaque()
    reads = one.reads if isinstance(op, Opaque) else linear.reads_of(one)
    inputs = [symbol.name for symbol in reads]
    if isinstance(op, Pad) and op.value == 0.0:
        lift.padded[one.gives[0].name] = op, [(one, two)]
    if isinstance(op, Opaque):
        inputs += [symbol.name for symbol in record.open_sizes(one) if symbol.name not in inputs]
    outputs = tuple(symbol.name for symbol in (one.gives if isinstance(op, Opaque) else one.gives[:1]))
    cost = _cost(lift, one, op)
    lift.nodes.append(Node(outputs[0], op, tuple(inputs), outputs, cost, _weights(one)))


def _lift_border(lift: _Lift, one: Step, two: Step) -> bool:
    """Something constant written into what was padded: seen together with the padding, if it makes one."""
    written = one.args[0]
    if written.name not in lift.padded or len(one.reads) > 1:
        return False
    pad, before = lift.padded[written.name]
    chain = [*before, (one, two)]
    output = one.gives[0].name
    lift.padded[output] = pad, chain

    exact = partial(recomputed, origins={**lift.trace.origins, **lift.other.origins})

    def run(which: int, array: Array) -> Array:
        tensor = paddle.to_tensor(array)
        for steps in chain:
            (tensor,) = perform(steps[which], partial(_always, tensor), constant=exact)
        return np.asarray(tensor.numpy())

    op = bordered(pad, [step.reads[0].shape for step in chain[0]], run)
    if op is None:
        return False
    cost = Cost()
    for step, _ in chain:
        cost += _cost(lift, step, pad if step is chain[0][0] else Opaque())
    lift.nodes.append(Node(output, op, (chain[0][0].reads[0].name,), (output,), cost, _weights(one)))
    return True


def _op_of(lift: _Lift, step: Step) -> Op:
    if step.reason:
        return Opaque(step.reason)
    if step.function == SET_ITEM:
        return Opaque("it writes over a piece of a tensor")
    tensors = [*step.reads, *step.gives[:1]]
    if not step.reads or any(len(symbol.shape) < 2 for symbol in tensors):
        return Opaque()
    types = [symbol.dtype for symbol in tensors]
    if any("float" not in dtype for dtype in types):
        return Opaque()
    op = linear.op_of(step, lift.shape)
    if len(set(types)) > 1:
        return op if isinstance(op, Opaque) else Opaque(f"the precision changes from {types[0]} to {types[-1]}")
    if not isinstance(op, Opaque | Gain) and any(
        None in lift.shape(symbol)[1:] and len(symbol.shape) < 3 for symbol in tensors
    ):
        return Opaque("its number of features is not known")
    return op


def _lift_rearrangement(lift: _Lift, record: Record, one: Step, two: Step) -> None:
    """A slice, shuffle or moved axis, seen from the nearest tensor from which it is one.

    The steps in between (a reshape to five axes, say) are opaque for whoever else reads them."""
    chain = [*lift.chains.get(one.reads[0].name, []), (one, two)]
    for index, symbol in enumerate(one.gives):
        lift.chains[symbol.name] = chain
        start, op = _seen_from(chain, index)
        inputs = [chain[start][0].reads[0].name]
        if isinstance(op, Opaque):
            inputs += [s.name for s in record.open_sizes(one) if s.name not in inputs]
        cost = Cost()
        for step, _ in chain[start:]:
            cost += _cost(lift, step, Opaque())
        cost = Cost(0, cost.bytes, cost.operators) if index == 0 else Cost()
        lift.nodes.append(Node(symbol.name, op, tuple(inputs), (symbol.name,), cost))


def _seen_from(chain: list[tuple[Step, Step]], index: int) -> tuple[int, Op]:
    """The latest step of ``chain`` from whose input on it is something that the engine has a word for."""
    for start in range(len(chain) - 1, -1, -1):
        base = chain[start][0].reads[0]
        if "float" not in base.dtype:
            break
        op = _rearrangement(chain[start:], index)
        if op is not None:
            return start, op
    return len(chain) - 1, Opaque("", passages=partial(_passages, chain[-1:], index))


def _rearrangement(chain: list[tuple[Step, Step]], index: int) -> Op | None:
    samples = _samples(chain, index)
    return None if samples is None else rearrangement.classify(samples)


def _passages(chain: list[tuple[Step, Step]], index: int) -> tuple[Passage, ...]:
    samples = _samples(chain, index)
    return () if samples is None else rearrangement.passages(samples)


def _samples(chain: list[tuple[Step, Step]], index: int) -> list[tuple[tuple[int, ...], Any]] | None:
    """What a chain of steps makes of the places of the elements, in both recordings; None if it is not tried
    out."""
    samples: list[tuple[tuple[int, ...], Any]] = []
    for steps in zip(*chain, strict=True):
        shape = steps[0].reads[0].shape
        if len(shape) < 2 or prod(shape) > MOST_ELEMENTS:
            return None
        moved: list[Any] = [paddle.to_tensor(rearrangement.positions(shape).astype("float64"))]
        for number, step in enumerate(steps):
            source = moved[_place(steps[number - 1], step)] if number else moved[0]
            try:
                moved = perform(step, partial(_always, source))
            except Exception:  # an operator without a float64 kernel, in whatever words of Paddle
                return None
        samples.append((shape, moved[index].numpy().astype(np.int64)))
    return samples


def _always(tensor: Any, _: Symbol) -> Any:
    return tensor


def _place(before: Step, after: Step) -> int:
    """Which output of one step another one reads."""
    return next(place for place, symbol in enumerate(before.gives) if symbol is after.reads[0])


# ---- what a step costs and stores ----------------------------------------------------------------


def _cost(lift: _Lift, step: Step, op: Op) -> Cost:
    output = lift.values[step.gives[0].name]
    reads = [lift.values[symbol.name] for symbol in step.reads]
    weights = [tuple(tensor.shape) for tensor in parameters_of(step)] if isinstance(op, Opaque) else []
    return operator_cost(op, reads, output, weights, prod(output.nominal[2:]))


def parameters_of(step: Step) -> list[Any]:
    """The tensors with real numbers that a step reads and that do not depend on the inputs."""
    if step.layer is not None:
        tensors = stored(step.layer) if step.reason else list(step.weights.values())
    else:
        tensors = []
    tensors = [*tensors, *(constant.tensor for constant in step.constants)]
    return [tensor for tensor in tensors if "float" in str(tensor.dtype)]


def _weights(step: Step) -> dict[str, int]:
    """The sizes of the tensors that a step reads, by names that are equal where they are shared."""
    return {f"tensor {id(tensor)}": prod(tensor.shape) for tensor in parameters_of(step)}


# ---- weights that are functions of other parameters ------------------------------------------------


def computed(step: Step) -> dict[str, Any]:
    """The weights of a layer that are not its stored ones: a hook computed them."""
    if step.layer is None or step.reason:
        return {}
    return {name: step.weights[name] for name in computed_weights(step.layer)}


def _evaluating(model: Any, trace: Trace) -> frozenset[int]:
    """The scopes and steps, by identity, in which weights are computed from other parameters: a step read
    numbers that are stored nowhere, and a parameter of the scope was read by no step."""
    known = {id(tensor) for tensor in stored(model)}
    found: set[int] = set()
    for step in trace.steps:
        if computed(step):
            found.add(id(step))
            found.update(id(scope) for scope in (step.scope.chain if step.scope else []))
    for scope in trace.scopes:
        inside = [step for step in trace.steps if step.scope is not None and scope in step.scope.chain]
        read = {id(tensor) for step in inside for tensor in parameters_of(step)}
        strangers = [
            constant.tensor
            for step in inside
            for constant in step.constants
            if id(constant.tensor) not in known and prod(constant.tensor.shape) > 1
        ]
        own = {id(tensor) for tensor in scope.module.parameters()}
        if strangers and own - read:
            found.update(id(around) for around in scope.chain)
    return frozenset(found)
