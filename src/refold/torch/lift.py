"""From two recordings of a torch module to the neutral graph."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any, final

import numpy as np
import torch

from refold.algebra.affine import Array, scale_shift
from refold.algebra.cost import Cost
from refold.graph import rearrangement
from refold.graph.borders import with_exact_borders
from refold.graph.cost import operator_cost
from refold.graph.graph import (
    Affine,
    Dialect,
    Gain,
    Graph,
    Node,
    Op,
    Opaque,
    Pad,
    Passage,
    Select,
    Slice,
    Value,
    alive,
)
from refold.graph.layout import settled
from refold.recording.symbols import Constant, Symbol, symbols
from refold.torch import functions, linear
from refold.torch.borders import bordered
from refold.torch.entries import Reader
from refold.torch.examples import to_numpy
from refold.torch.perform import in_double, perform, sources
from refold.torch.record import Record
from refold.torch.trace import Step, stored

# Numbers of elements beyond which a rearrangement is not tried out.
MOST_ELEMENTS = 2**24


@final
@dataclass(frozen=True, eq=False)
class _Link:
    """A step in both recordings that moves elements or writes at a border; or, with ``op``, the padding before
    that, or a factor and a shift per channel on the way (LeViT flattens its tokens for a batch norm, and unflattens
    them)."""

    one: Step
    two: Step
    op: Affine | Pad | None = None


@final
@dataclass
class _Lift:
    """The graph while it grows; ``chains`` holds, for a value that was rearranged, how, and ``padded``, for one
    that was padded and then written into at the border, these steps."""

    record: Record
    values: dict[str, Value] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    chains: dict[str, list[_Link]] = field(default_factory=dict)
    padded: dict[str, list[_Link]] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        trace = self.record.trace
        nests = [trace.outputs, *((step.args, step.kwargs) for step in trace.steps)]
        self.read = {symbol.name for nest in nests for symbol in symbols(nest)}
        for name, symbol in self.record.symbols.items():
            shape = self.record.shapes[name]
            nominal = (1, *symbol.shape[1:]) if shape[:1] == (None,) else symbol.shape
            self.values[name] = Value(name, shape, symbol.dtype, nominal)
        self.reader = Reader(lambda symbol: self.record.shapes[symbol.name], self.numbers)

    def numbers(self, constant: Constant) -> Array:
        """A constant in float64."""
        return np.asarray(to_numpy(in_double(constant, self.record.doubles)), dtype=np.float64)


def lift_record(model: Any, record: Record) -> Graph:
    """The neutral graph of a model that was recorded twice."""
    lift = _Lift(record)
    trace = record.trace
    for one, two in zip(trace.steps, record.other.steps, strict=True):
        _lift_step(lift, one, two)
    inputs = tuple(symbol.name for symbol in symbols(trace.inputs))
    outputs = tuple(symbol.name for symbol in symbols(trace.outputs))
    nodes = with_exact_borders(settled(alive(_laid_out(lift, outputs), outputs)), lift.values)
    used = {name for node in nodes for name in (*node.inputs, *node.outputs)} | {*inputs, *outputs}
    values = {name: value for name, value in lift.values.items() if name in used}
    floats = [tensor for tensor in stored(model) if tensor.is_floating_point()]
    parameters = sum(tensor.numel() for tensor in floats)
    largest = min((torch.finfo(t.dtype).max for t in floats), default=float(np.finfo(np.float32).max))
    return Graph(values, nodes, inputs, outputs, parameters, float(largest), Dialect(conv_axis=1, adds_pairs=True))


def _laid_out(lift: _Lift, outputs: tuple[str, ...]) -> list[Node]:
    """The nodes, in which putting a tensor in order in memory is opaque where someone may need that order."""
    opaque = {name for node in lift.nodes if isinstance(node.op, Opaque) for name in node.inputs} | set(outputs)
    known = lift.record.symbols

    def orders(node: Node) -> bool:
        moves = isinstance(node.op, Gain) and node.op == Gain() and node.output in opaque
        return moves and known[node.output].dense and not known[node.inputs[0]].dense

    return [replace(node, op=Opaque()) if orders(node) else node for node in lift.nodes]


def _lift_step(lift: _Lift, one: Step, two: Step) -> None:
    if linear.is_rearrangement(one):
        _lift_rearrangement(lift, one, two)
        return
    if one.function is functions.set_item and _lift_border(lift, one, two):
        return
    op = _op_of(lift, one) if lift.read.isdisjoint(symbol.name for symbol in one.gives[1:]) else Opaque()
    inputs = [symbol.name for symbol in one.reads]
    if isinstance(op, Opaque):
        inputs += [s.name for s in lift.record.open_sizes(one) if s.name not in inputs]
    elif isinstance(op, Affine) and op.conv.is_scale and inputs[0] in lift.chains:
        moved = lift.chains[inputs[0]]
        if not any(link.op for link in moved):
            lift.chains[one.gives[0].name] = [*moved, _Link(one, two, op)]
    if isinstance(op, Pad) and op.value == 0.0:
        lift.padded[one.gives[0].name] = [_Link(one, two, op)]
    outputs = tuple(symbol.name for symbol in (one.gives if isinstance(op, Opaque) else one.gives[:1]))
    lift.nodes.append(Node(outputs[0], op, tuple(inputs), outputs, _cost(lift, one, op), _weights(lift, one)))


def _lift_border(lift: _Lift, one: Step, two: Step) -> bool:
    """Something constant written into what was padded: seen together with the padding, if it makes one."""
    written = one.args[0]
    if not isinstance(written, Symbol) or written.name not in lift.padded or len(one.reads) > 1:
        return False
    chain = [*lift.padded[written.name], _Link(one, two)]
    output = one.gives[0].name
    lift.padded[output] = chain
    pad = chain[0].op
    assert isinstance(pad, Pad)
    steps = [link.one for link in chain], [link.two for link in chain]
    op = bordered(steps, pad, lift.record.doubles)
    if op is None:
        return False
    base = chain[0].one.reads[0].name
    cost = Cost()
    for link in chain:
        cost += _cost(lift, link.one, link.op or Opaque())
    weights = {name: size for link in chain for name, size in _weights(lift, link.one).items()}
    lift.nodes.append(Node(output, op, (base,), (output,), cost, weights))
    return True


def _op_of(lift: _Lift, step: Step) -> Op:
    if step.reason:
        return Opaque(step.reason)
    tensors = [*step.reads, *step.gives[:1]]
    if not step.reads or any(len(symbol.shape) < 2 for symbol in tensors):
        return Opaque()
    types = [symbol.dtype for symbol in tensors]
    if any("float" not in dtype for dtype in types):
        weighted = step.what in linear.CONVOLUTIONS or step.what in linear.DENSE
        unreal = weighted and any(not constant.tensor.is_floating_point() for constant in step.constants)
        return Opaque(linear.NOT_REAL if unreal else "")
    op = linear.op_of(step, lift.reader)
    if len(set(types)) > 1:
        return op if isinstance(op, Opaque) else Opaque(f"the precision changes from {types[0]} to {types[-1]}")
    if not isinstance(op, Opaque | Gain) and any(
        None in lift.record.shapes[symbol.name][1:] and len(symbol.shape) < 3 for symbol in tensors
    ):
        return Opaque("its number of features is not known")
    return op


def _lift_rearrangement(lift: _Lift, one: Step, two: Step) -> None:
    """A slice, shuffle or moved axis, seen from the nearest tensor from which it is one.

    The steps in between (a reshape to five axes, say) are opaque for whoever else reads them."""
    chain = [*lift.chains.get(one.reads[0].name, []), _Link(one, two)]
    for index, symbol in enumerate(one.gives):
        lift.chains[symbol.name] = chain
        start, op = _seen_from(chain, index)
        inputs = [chain[start].one.reads[0].name]
        if isinstance(op, Opaque):
            further = (*one.reads[1:], *lift.record.open_sizes(one))
            inputs += [s.name for s in further if s.name not in inputs]
        cost = Cost()
        for link in chain[start:]:
            cost += _cost(lift, link.one, link.op or Opaque())
        if isinstance(op, Select | Slice) and all(link.one.views for link in chain[start:]):
            cost = Cost()  # a piece of what is there already
        cost = Cost(0 if isinstance(op, Opaque) else cost.multiply_adds, cost.bytes, cost.operators)
        weights = {name: size for link in chain[start:] for name, size in _weights(lift, link.one).items()}
        lift.nodes.append(
            Node(symbol.name, op, tuple(inputs), (symbol.name,), cost if index == 0 else Cost(), weights)
        )


def _seen_from(chain: list[_Link], index: int) -> tuple[int, Op]:
    """The latest step of ``chain`` from whose input on it is something that the engine has a word for."""
    for start in range(len(chain) - 1, -1, -1):
        base = chain[start].one.reads[0]
        if "float" not in base.dtype:
            break
        op = None if chain[start].op else _rearrangement(chain[start:], index)
        if op is not None:
            return start, op
    return len(chain) - 1, Opaque("", passages=partial(_passages, chain[-1:], index))


def _rearrangement(chain: list[_Link], index: int) -> Op | None:
    samples = _samples(chain, index)
    if samples is None:
        return None
    op = rearrangement.classify(samples)
    affine = next((link.op for link in chain if isinstance(link.op, Affine)), None)
    if affine is None:
        return op
    return _on_more_axes(affine, len(samples[0][0])) if op == Gain() else None


def _passages(chain: list[_Link], index: int) -> tuple[Passage, ...]:
    samples = _samples(chain, index)
    return () if samples is None else rearrangement.passages(samples)


def _samples(chain: list[_Link], index: int) -> list[tuple[tuple[int, ...], Any]] | None:
    """What a chain of steps makes of the places of the elements, in both recordings; None if it is not tried
    out."""
    samples = []
    for steps in ([link.one for link in chain], [link.two for link in chain]):
        shape = steps[0].reads[0].shape
        if len(shape) < 2 or prod(shape) > MOST_ELEMENTS:
            return None
        moved: list[Any] = [torch.from_numpy(rearrangement.positions(shape))]
        for number, step in enumerate(steps):
            source = moved[_place(steps[number - 1], step)] if number else moved[0]
            on_the_way = chain[number].op
            if isinstance(on_the_way, Affine):
                moved = [source]
                if not _has_channels_last(source.numpy(), shape[-1], on_the_way):
                    return None
            else:
                moved = perform(step, partial(_given, source, step.reads[0]), constant=_on_cpu)
        samples.append((shape, moved[index].numpy()))
    return samples


def _given(tensor: Any, symbol: Symbol, asked: Symbol) -> Any:
    return tensor if asked is symbol else torch.empty(asked.shape)


def _has_channels_last(positions: Any, channels: int, op: Affine) -> bool:
    """Whether the channel axis of ``op`` runs over the last axis of the tensor whose elements were moved."""
    if positions.shape[op.axis] != channels:
        return False
    columns = np.moveaxis(positions, op.axis, -1) % channels
    return bool(np.array_equal(columns, np.broadcast_to(np.arange(channels), columns.shape)))


def _on_more_axes(op: Affine, rank: int) -> Affine:
    """A factor and a shift per channel on a tensor of ``rank`` axes, channels last."""
    return Affine(scale_shift(op.conv.scale, op.conv.bias, rank - 2), rank - 1, op.biased)


def _on_cpu(constant: Constant) -> Any:
    return constant.tensor.cpu()


def _place(before: Step, after: Step) -> int:
    """Which output of one step another one reads."""
    return next(place for place, symbol in enumerate(before.gives) if symbol is after.reads[0])


# ---- what a step costs and stores ----------------------------------------------------------------


def _cost(lift: _Lift, step: Step, op: Op) -> Cost:
    output = lift.values[step.gives[0].name]
    reads = [lift.values[symbol.name] for symbol in step.reads]
    weights = []
    if isinstance(op, Opaque):
        own = [tensor for tensor in parameters_of(step) if id(tensor) not in lift.record.parted]
        weights = [tuple(tensor.shape) for tensor in own]
    return operator_cost(op, reads, output, weights, prod(output.nominal[2:]))


def parameters_of(step: Step) -> list[Any]:
    """The tensors with real numbers that a step reads and that do not depend on the inputs, as they are used."""
    tensors = stored(step.module) if step.module is not None else []
    tensors = [*tensors, *(constant.tensor for constant in step.constants)]
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _weights(lift: _Lift, step: Step) -> dict[str, int]:
    """The sizes of the tensors that a step reads, by names that are equal where they are shared."""
    tensors = stored(step.module) if step.module is not None else []
    for constant in step.constants:  # of what is a piece of a parameter, the whole parameter is stored
        tensors += [constant.tensor] if is_computed(constant) else sources(constant)
    own = [tensor for tensor in tensors if tensor.is_floating_point() and id(tensor) not in lift.record.parted]
    return {f"tensor {id(tensor)}": tensor.numel() for tensor in own}


def is_computed(constant: Constant) -> bool:
    """Whether a constant is a function of trained parameters, and not one of them or a piece of one."""
    if constant.origin is None or not constant.tensor.is_floating_point():
        return False
    if linear.only_moves(constant.origin):
        return any(map(is_computed, constant.origin.constants))
    return any(isinstance(tensor, torch.nn.Parameter) for tensor in sources(constant))


def evaluated(graph: Graph, step: Step) -> list[Constant]:
    """The constants of a step that are computed from parameters, and shipped as what they are. Where they are no
    weights (a table of position biases that is picked apart and added), they are computed on as before."""
    node = graph.producer.get(step.gives[0].name)
    if step.what not in linear.WEIGHTED and (node is None or isinstance(node.op, Opaque)):
        return []
    return [constant for constant in step.constants if is_computed(constant)]


def used(constant: Constant, doubles: dict[int, Any]) -> Any:
    """The tensor that a constant is shipped as: what is computed from trained parameters is computed in float64 and
    rounded once."""
    if not is_computed(constant):
        return constant.tensor
    return in_double(constant, doubles).to(constant.tensor.dtype)
