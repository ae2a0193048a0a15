"""Moving a factor and a shift per channel to the other side of an operator through which they pass.

A batch norm in front of a global average and a dense layer is in the way of nothing: means commute with it, and
behind the average the dense layer takes it in. Here one such map is moved past one operator, in the graph; whether
that is worth it is a question for ``moving``.

Where the map stood, a step that changes nothing keeps its name and gives the value that the operator reads (or that
the operator's readers read), so that the operator itself stays as it is. What the map gives, or reads, in its new
place is a *new* value, which no model computes: it must be folded into something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from refold.algebra import laws
from refold.algebra.affine import AffineConv
from refold.algebra.cost import Cost
from refold.algebra.refusal import Refusal
from refold.graph.graph import Affine, Gain, Graph, Node, Op, Opaque, Passage, Relayout, Value


@final
@dataclass(frozen=True, eq=False)
class Moved:
    """A graph in which the map of ``node`` stands on the other side of some operators; ``new`` is the value that it
    gives there, or (``ahead``) reads. ``past`` is the last operator that it passed."""

    graph: Graph
    node: Node
    new: str
    ahead: bool
    past: Node


def means(axis: int, *, rising: bool = False) -> Callable[[], tuple[Passage, ...]]:
    """The passages of an operator that takes means (or maxima) over windows of every channel, channels on
    ``axis``."""
    return lambda: (Passage(axis, axis, rising=rising),)


def reduction(
    rank: int, over: Sequence[int], *, keep: bool, rising: bool = False
) -> Callable[[], tuple[Passage, ...]]:
    """The passages of a mean (or maximum) over the axes ``over`` of a tensor of ``rank`` axes; ``keep`` says that
    they stay, with one position each."""
    gone = {axis % rank for axis in over}
    if 0 in gone:
        return tuple
    others = [axis for axis in range(1, rank) if axis not in gone]
    after = {axis: axis - (0 if keep else sum(other < axis for other in gone)) for axis in others}
    return lambda: tuple(Passage(axis, after[axis], rising=rising) for axis in others)


def is_map_per_channel(op: Op) -> bool:
    """A factor and a shift per channel, or for all channels, that changes something."""
    return (isinstance(op, Affine) and op.conv.is_scale) or (isinstance(op, Gain) and op != Gain())


def is_obstacle(op: Op) -> bool:
    """Whether a map per channel stops at an operator for the planner, which takes it through other ones by laws."""
    return isinstance(op, Opaque) or (isinstance(op, Affine) and _is_mean(op.conv))


def moved_behind(graph: Graph, node: Node, done: Moved | None = None) -> Moved | Refusal | None:
    """The graph with the map of ``node`` behind the operator that reads what it gives. ``done`` is how it came to
    where it is. None if nothing lets it pass; a refusal if only these factors do not."""
    readers = graph.consumers[node.output]
    if len(readers) != 1 or node.output in graph.outputs:
        return None
    (operator,) = readers
    if len(operator.outputs) != 1 or operator.output in graph.outputs:
        return None
    if operator.inputs[0] != node.output or operator.inputs.count(node.output) != 1:
        return None
    if not _one_type(graph, (*node.inputs, node.output, operator.output)):
        return None
    op = _op_beyond(graph, node, operator, ahead=False)
    if op is None or isinstance(op, Refusal):
        return op
    new = f"{operator.output} and {node.name}"
    there = replace(node, op=op, inputs=(operator.output,), outputs=(new,))
    nodes: list[Node] = []
    for other in graph.nodes:
        if other is node:
            nodes += [] if done else [_stand_in(node)]
        elif other is operator:
            read = node.inputs[0] if done else node.output
            nodes += [replace(other, inputs=_renamed(other.inputs, node.output, read)), there]
        else:
            nodes.append(replace(other, inputs=_renamed(other.inputs, operator.output, new)))
    return Moved(_with(graph, nodes, new, operator.output), there, new, False, operator)


def moved_ahead(graph: Graph, node: Node, done: Moved | None = None) -> Moved | Refusal | None:
    """As :func:`moved_behind`, the other way: ahead of the operator that gives what the map of ``node`` reads."""
    (read,) = node.inputs
    operator = graph.producer.get(read)
    if operator is None or len(graph.consumers[read]) != 1 or read in graph.outputs or len(operator.outputs) != 1:
        return None
    source = operator.inputs[0] if operator.inputs else ""
    before = graph.producer.get(source)
    if before is None or len(before.outputs) != 1 or operator.inputs.count(source) != 1:
        return None
    if len(graph.consumers[source]) != 1 or source in graph.outputs:
        return None
    if not _one_type(graph, (source, read, node.output)):
        return None
    op = _op_beyond(graph, node, operator, ahead=True)
    if op is None or isinstance(op, Refusal):
        return op
    new = f"{source} before {node.name}"
    there = replace(node, op=op, inputs=(new,), outputs=(source,))
    nodes: list[Node] = []
    for other in graph.nodes:
        if other is before:
            nodes += [replace(other, outputs=(new,)), there]
        elif other is operator and done:
            nodes.append(replace(other, outputs=node.outputs))
        elif other is node:
            nodes += [] if done else [_stand_in(node)]
        else:
            nodes.append(other)
    return Moved(_with(graph, nodes, new, source), there, new, True, operator)


def journey(graph: Graph, node: Node, *, ahead: bool) -> Iterator[Moved | Refusal]:
    """Where the map of ``node`` may stand: one operator further each, as far as it comes. A refusal is the last."""
    step = moved_ahead if ahead else moved_behind
    found = step(graph, node)
    while found is not None:
        yield found
        found = None if isinstance(found, Refusal) else step(found.graph, found.node, found)


def passages(graph: Graph, node: Node) -> tuple[Passage, ...]:
    """The ways on which maps per channel pass through a node."""
    axes = range(1, len(graph.values[node.outputs[0]].shape))
    match node.op:
        case Opaque(passages=found):
            return found()
        case Gain(1.0, 0.0):
            return tuple(Passage(axis, axis) for axis in axes)
        case Relayout(axis_in, axis_out):
            order = list(range(len(axes) + 1))
            order.insert(axis_out, order.pop(axis_in))
            return tuple(Passage(order[axis], axis) for axis in axes)
        case Affine(conv, axis) if _is_mean(conv):
            return (Passage(axis, axis),)
        case _:
            return ()


def _is_mean(conv: AffineConv) -> bool:
    """A mean over windows that pad nothing."""
    if not conv.is_channelwise or conv.taps == 1 or np.any(conv.bias):
        return False
    whole = all(w.spread == 1 and max(w.before, w.after) <= 0 and not w.floating for w in conv.windows)
    return whole and bool(np.all(conv.kernel == 1.0 / conv.taps))


def _op_beyond(graph: Graph, node: Node, operator: Node, *, ahead: bool) -> Op | Refusal | None:
    """What the map of ``node`` is beyond ``operator``."""
    refusal = None
    for way in passages(graph, operator):
        axis, beyond = (way.axis_out, way.axis_in) if ahead else (way.axis_in, way.axis_out)
        if isinstance(node.op, Gain):
            if way.rising and node.op.scale <= 0.0:
                return Refusal(laws.NOT_POSITIVE)
            return node.op
        assert isinstance(node.op, Affine)
        if axis != node.op.axis:
            continue
        value = graph.values[operator.inputs[0] if ahead else operator.output]
        channels = value.shape[beyond]
        if channels is None:
            continue
        pairs = None
        if way.ins is not None and way.outs is not None:
            pairs = (way.outs, way.ins) if ahead else (way.ins, way.outs)
        moved = laws.pass_through(node.op.conv, pairs, channels, len(value.shape) - 2, rising=way.rising)
        if not isinstance(moved, Refusal):
            return replace(node.op, conv=moved, axis=beyond)
        refusal = moved
    return refusal


def _stand_in(node: Node) -> Node:
    return replace(node, op=Gain(), cost=Cost(), weights={})


def _renamed(names: tuple[str, ...], old: str, new: str) -> tuple[str, ...]:
    return tuple(new if name == old else name for name in names)


def _one_type(graph: Graph, names: tuple[str, ...]) -> bool:
    return len({graph.values[name].dtype for name in names}) == 1


def _with(graph: Graph, nodes: list[Node], new: str, like: str) -> Graph:
    value = graph.values[like]
    values = {**graph.values, new: Value(new, value.shape, value.dtype, value.nominal)}
    return replace(graph, nodes=tuple(nodes), values=values)
