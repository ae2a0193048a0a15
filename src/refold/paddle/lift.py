"""From a recorded Paddle Layer to the neutral graph.

A model is recorded twice, at two batch sizes (and two sizes wherever the example leaves one open) and on
different numbers. Sizes that differ are not known; whatever else differs was not followed, and the layer in
which it happens is taken whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from typing import Any, final

import numpy as np
import paddle

from refold.algebra.affine import Array
from refold.algebra.cost import Cost
from refold.graph import rearrangement
from refold.graph.borders import bordered, with_exact_borders
from refold.graph.cost import operator_cost
from refold.graph.graph import Gain, Graph, Node, Op, Opaque, Pad, Value, alive
from refold.graph.layout import settled
from refold.paddle import linear
from refold.paddle.constants import bake
from refold.paddle.examples import array_of
from refold.paddle.patches import SET_ITEM
from refold.paddle.perform import perform, recomputed
from refold.paddle.sentences import first_line
from refold.paddle.tensors import computed_weights, stored
from refold.paddle.trace import RetryError, Scope, Step, Trace, UntraceableError, record
from refold.recording.same import say_the_same
from refold.recording.sizes import Size, formula_of, sizes_in
from refold.recording.symbols import Symbol, symbols

# Numbers of elements beyond which a rearrangement is not tried out.
MOST_ELEMENTS = 2**24

# How far what the recorded steps give may be from what the model gave, relative to its largest number.
TOLERANCE = 1e-4


@final
@dataclass(frozen=True, eq=False)
class Record:
    """Where the graph's names come from.

    ``trace`` and ``other`` are the two recordings, step by step the same. ``owners`` says which step gives a
    value, as which of its outputs; ``evaluating`` holds the scopes and steps (by identity) whose weights are
    computed from other parameters.
    """

    trace: Trace
    other: Trace
    symbols: Mapping[str, Symbol]
    owners: Mapping[str, tuple[Step, int]]
    shapes: Mapping[str, tuple[int | None, ...]]
    evaluating: frozenset[int]

    @property
    def batches(self) -> tuple[int, int]:
        """The batch sizes of the two recordings."""
        first, second = (symbols(trace.inputs)[0].shape[0] for trace in (self.trace, self.other))
        return first, second

    def step(self, value: str) -> Step:
        """The step that gives a value."""
        return self.owners[value][0]

    def is_batch(self, symbol: Symbol, axis: int) -> bool:
        """Whether an axis of a symbol is the batch."""
        other = self.others.get(symbol.name, symbol)
        return (
            axis == 0 and (symbol.shape[0], other.shape[0]) == self.batches and self.shapes[symbol.name][0] is None
        )

    @cached_property
    def others(self) -> dict[str, Symbol]:
        """The symbols of the second recording, by name."""
        given = [symbol for step in self.other.steps for symbol in step.gives]
        return {symbol.name: symbol for symbol in (*symbols(self.other.inputs), *given)}

    def open_sizes(self, step: Step) -> list[Symbol]:
        """The symbols of which a step must know a size that is neither fixed nor the batch."""
        found = [entry for size in step.sizes for entry in sizes_in(formula_of(size))]
        return [s for s, axis in found if self.shapes[s.name][axis] is None and not self.is_batch(s, axis)]


def record_twice(model: Any, feeds: Sequence[tuple[Any, ...]], names: Any) -> tuple[Trace, Trace]:
    """Two recordings that agree. ``feeds`` are the two sets of arguments. Raises UntraceableError."""
    whole: dict[int, str] = {}
    while True:
        try:
            first, second = (record(model, args, names, whole) for args in feeds)
        except RetryError as retry:
            whole = retry.whole
            continue
        difference = _difference(first, second)
        if difference is None:
            _check(first, second)
            bake(first, second)
            return first, second
        scope, reason = difference
        if scope is None or scope.layer is model or id(scope.layer) in whole:
            raise UntraceableError(f"it {reason}")
        whole[id(scope.layer)] = f"its forward {reason}"


def _difference(first: Trace, second: Trace) -> tuple[Scope | None, str] | None:
    """Where two recordings part: the innermost layer, and in what."""
    for one, two in zip(first.steps, second.steps, strict=False):
        alike = (one.name, one.function, one.layer, len(one.gives)) == (
            two.name,
            two.function,
            two.layer,
            len(two.gives),
        )
        if not alike:
            return one.scope, "takes another way at another size, or depends on chance"
        if not say_the_same((one.args, one.kwargs), (two.args, two.kwargs), _equal):
            return one.scope, "is bound to a size of its input, or uses it in a way that is not seen"
    if len(first.steps) != len(second.steps):
        return None, "takes another way at another size, or depends on chance"
    if not say_the_same(first.outputs, second.outputs, _equal):
        return None, "returns something else at another size"
    return None


def _equal(one: Any, two: Any) -> bool:
    """Whether two tensors or two arrays hold the same numbers."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    a, b = np.asarray(array_of(one)), np.asarray(array_of(two))
    return bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))


def _check(first: Trace, second: Trace) -> None:
    """Do the first recording's steps on the second one's inputs: they must give what the model gave."""
    values: dict[str, Any] = {}
    for symbol, tensor in zip(symbols(first.inputs), second.tensors, strict=True):
        values[symbol.name] = tensor
    for one, two in zip(first.steps, second.steps, strict=True):
        sizes = iter(two.sizes)
        try:
            made = perform(one, lambda symbol: values[symbol.name], size=partial(_next, sizes))
        except Exception as error:  # whatever Paddle raises
            raise UntraceableError(f"'{one.name}' cannot be done again: {first_line(error)}") from error
        values.update(zip([symbol.name for symbol in one.gives], made, strict=True))
    for symbol, expected in zip(symbols(first.outputs), second.results, strict=True):
        found = np.asarray(values[symbol.name].astype("float64").numpy())
        wanted = expected.astype(np.float64)
        scale = np.max(np.abs(wanted), initial=0.0, where=np.isfinite(wanted))
        if found.shape != wanted.shape or not np.allclose(
            found, wanted, rtol=0.0, atol=TOLERANCE * scale + 1e-30, equal_nan=True
        ):
            raise UntraceableError(
                "it does something that is not seen: what was recorded gives other numbers than the model "
                "(a tensor that is written into, or chance)"
            )


def _next(sizes: Iterator[Size], _: Size) -> int:
    return int(next(sizes))


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
    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    owners: dict[str, tuple[Step, int]] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    chains: dict[str, list[tuple[Step, Step]]] = field(default_factory=dict)
    padded: dict[str, tuple[Pad, list[tuple[Step, Step]]]] = field(default_factory=dict)
    inner: dict[Symbol, tuple[int | None, ...]] = field(default_factory=dict)
    read: set[Symbol] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.read.update(symbols(self.trace.outputs), *(step.reads for step in self.trace.steps))

    def add_value(self, one: Symbol, two: Symbol) -> None:
        shape = _common_shape(one, two)
        nominal = (1, *one.shape[1:]) if shape[:1] == (None,) else one.shape
        self.symbols[one.name], self.shapes[one.name] = one, shape
        self.values[one.name] = Value(one.name, shape, one.dtype, nominal)

    def shape(self, symbol: Symbol) -> tuple[int | None, ...]:
        """The shape of a symbol as far as it is known."""
        return self.inner[symbol] if symbol in self.inner else self.shapes[symbol.name]


def lift_traces(model: Any, trace: Trace, other: Trace) -> tuple[Graph, Record]:
    """The neutral graph of a model that was recorded twice."""
    lift = _Lift(trace, other, model)
    for first, second in zip(symbols(trace.inputs), symbols(other.inputs), strict=True):
        lift.add_value(first, second)
    inputs = tuple(lift.symbols)
    for one, two in zip(trace.steps, other.steps, strict=True):
        for index, (a, b) in enumerate(zip(one.gives, two.gives, strict=True)):
            lift.add_value(a, b)
            lift.owners[a.name] = one, index
        for p, q in zip(one.inside, two.inside, strict=False):
            lift.inner.update({a: _common_shape(a, b) for a, b in zip(p.outputs, q.outputs, strict=False)})
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


def _common_shape(one: Symbol, two: Symbol) -> tuple[int | None, ...]:
    return tuple(a if a == b else None for a, b in zip(one.shape, two.shape, strict=True))


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
    return len(chain) - 1, Opaque()


def _rearrangement(chain: list[tuple[Step, Step]], index: int) -> Op | None:
    samples = []
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
    return rearrangement.classify(samples)


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
        own = {id(tensor) for tensor in scope.layer.parameters()}
        if strangers and own - read:
            found.update(id(around) for around in scope.chain)
    return frozenset(found)
