"""From a recorded Keras model to the neutral graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from typing import Any, final

import keras
import numpy as np
from keras.src import backend
from keras.src.ops import core as core_ops

from refold.algebra.cost import Cost
from refold.graph import rearrangement
from refold.graph.cost import operator_cost
from refold.graph.graph import Graph, Node, Op, Opaque, Passage, Value, alive
from refold.keras import linear, operations
from refold.keras.trace import Call, Constant, Scope, Trace, symbolic_tensors

# Sizes that stand in for unknown ones where rearrangements are tried out.
TRIAL_SIZES = ((6, 10, 14, 22), (8, 12, 18, 26))


@final
@dataclass(frozen=True, eq=False)
class Record:
    """Where the graph's names come from.

    ``names`` gives every symbolic tensor (by identity) its name, ``tensors`` is the way back;
    ``producers`` says which step gives a tensor, as which of its outputs; ``evaluating`` holds the scopes
    (by identity) in which weights are computed from other parameters.
    """

    trace: Trace
    names: Mapping[int, str]
    tensors: Mapping[str, Any]
    producers: Mapping[int, tuple[Call, int]]
    evaluating: frozenset[int]

    def step(self, value: str) -> Call:
        """The step that gives a value."""
        return self.producers[id(self.tensors[value])][0]

    @cached_property
    def places(self) -> dict[int, int]:
        """The places of the recorded steps, by identity."""
        return {id(call): place for place, call in enumerate(self.trace.calls)}

    def canonical(self, tensor: Any) -> Any:
        """The symbolic tensor that stands for this one and all that equal it."""
        return self.tensors[self.names[id(tensor)]]


@final
@dataclass
class _Lift:
    """The graph while it grows; ``chains`` holds, for a tensor that was only rearranged, the steps."""

    nominal: Mapping[int, tuple[int, ...]]
    names: dict[int, str] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    chains: dict[int, list[Call]] = field(default_factory=dict)
    casts: dict[tuple[str, str], str] = field(default_factory=dict)

    def converted(self, call: Call) -> str | None:
        """The value that a conversion gives, if there is one already: the tensor itself where it has the
        type, or what an earlier conversion made of it. Keras puts one in front of every layer that
        computes in another type than its input has."""
        (tensor,), (output,) = call.tensors, call.outputs
        source = self.names[id(tensor)]
        if tensor.dtype == output.dtype:
            return source
        known = self.casts.setdefault((source, output.dtype), call.name)
        return None if known == call.name else known

    def add_value(self, tensor: Any, wanted: str) -> str:
        name, count = wanted, 1
        while name in self.tensors:
            count += 1
            name = f"{wanted}~{count}"
        self.names[id(tensor)] = name
        self.tensors[name] = tensor
        self.values[name] = Value(name, tuple(tensor.shape), tensor.dtype, self.nominal[id(tensor)])
        return name


def lift_trace(
    trace: Trace, nominal: Mapping[int, tuple[int, ...]], parameters: int, largest: float
) -> tuple[Graph, Record]:
    """The neutral graph of a recorded model. ``nominal`` gives every symbolic tensor (by identity) a shape
    without unknown sizes; ``parameters`` and ``largest`` are the graph's."""
    lift = _Lift(nominal)
    for index, tensor in enumerate(symbolic_tensors(trace.inputs)):
        lift.add_value(tensor, tensor.name or f"input{index}")
    inputs = tuple(lift.tensors)
    for call in trace.calls:
        if isinstance(call.operation, core_ops.Cast | core_ops.ConvertToTensor):
            known = lift.converted(call)
            if known is not None:
                lift.names[id(call.outputs[0])] = known
                continue
        for index, output in enumerate(call.outputs):
            lift.add_value(output, call.name if index == 0 else f"{call.name}:{index}")
        _lift_call(lift, call)
    outputs = tuple(lift.names[id(tensor)] for tensor in symbolic_tensors(trace.outputs))
    nodes = alive(lift.nodes, outputs)
    used = {name for node in nodes for name in (*node.inputs, *node.outputs)} | {*inputs, *outputs}
    values = {name: value for name, value in lift.values.items() if name in used}
    graph = Graph(values, tuple(nodes), inputs, outputs, parameters, largest)
    evaluating = frozenset(id(scope) for scope in trace.scopes if _evaluates(scope, trace.calls))
    return graph, Record(trace, lift.names, lift.tensors, trace.producers(), evaluating)


# ---- one step ------------------------------------------------------------------------------------


def _lift_call(lift: _Lift, call: Call) -> None:
    tensors = call.tensors
    if _rearranges(call) and len(tensors) == 1:
        _lift_rearrangement(lift, call)
        return
    op = _op_of(call)
    inputs = tuple(lift.names[id(tensor)] for tensor in tensors)
    outputs = tuple(lift.names[id(tensor)] for tensor in call.outputs)
    lift.nodes.append(
        Node(outputs[0] if outputs else call.name, op, inputs, outputs, _cost(lift, call, op), _weights(call))
    )


def _op_of(call: Call) -> Op:
    if call.reason:
        return Opaque(call.reason)
    if isinstance(call.operation, keras.Layer):
        entry = linear.LAYERS.get(type(call.operation))
    else:
        entry = operations.OPERATIONS.get(type(call.operation))
    if entry is None:
        return Opaque()
    masked = [*call.tensors, *call.outputs]
    if any(backend.get_keras_mask(tensor) is not None for tensor in masked):
        return Opaque("it carries a mask")
    types = [tensor.dtype for tensor in (*call.tensors, *call.outputs)]
    if any(not backend.is_float_dtype(dtype) for dtype in types):
        return Opaque()
    if len(set(types)) > 1:
        return Opaque(f"the precision changes from {types[0]} to {types[-1]}")
    if any(None in tensor.shape[1:] and len(tensor.shape) < 3 for tensor in call.tensors):
        return Opaque("its number of features is not known")
    if any(len(tensor.shape) < 2 for tensor in masked):
        return Opaque()
    return entry(call)


def _rearranges(call: Call) -> bool:
    return isinstance(call.operation, linear.REARRANGING_LAYERS + operations.REARRANGING_OPERATIONS)


def _lift_rearrangement(lift: _Lift, call: Call) -> None:
    """A slice, shuffle or moved axis, seen from the nearest tensor from which it is one.

    The steps in between (a reshape to five axes, say) are opaque for whoever else reads them."""
    (tensor,) = call.tensors
    chain = [*lift.chains.get(id(tensor), []), call]
    for output in call.outputs:
        lift.chains[id(output)] = chain
    for index, output in enumerate(call.outputs):
        name = lift.names[id(output)]
        start, op = _seen_from(chain, index)
        source = lift.names[id(chain[start].tensors[0])]
        cost = Cost()
        for step in chain[start:]:
            cost += _cost(lift, step, Opaque())
        cost = Cost(0, cost.bytes, cost.operators) if index == 0 else Cost()
        lift.nodes.append(Node(name, op, (source,), (name,), cost))


def _seen_from(chain: list[Call], index: int) -> tuple[int, Op]:
    """The latest step of ``chain`` from whose input on it is something that the engine has a word for."""
    for start in range(len(chain) - 1, -1, -1):
        base = chain[start].tensors[0]
        if backend.get_keras_mask(base) is not None or not backend.is_float_dtype(base.dtype):
            break
        op = _rearrangement(chain[start:], base.shape, index)
        if op is not None:
            return start, op
    last = chain[-1:]
    return len(chain) - 1, Opaque("", passages=partial(_passages, last, last[0].tensors[0].shape, index))


def _rearrangement(chain: list[Call], shape: tuple[int | None, ...], index: int) -> Op | None:
    samples = _samples(chain, shape, index)
    return None if samples is None else rearrangement.classify(samples)


def _passages(chain: list[Call], shape: tuple[int | None, ...], index: int) -> tuple[Passage, ...]:
    samples = _samples(chain, shape, index)
    return () if samples is None else rearrangement.passages(samples)


def _samples(
    chain: list[Call], shape: tuple[int | None, ...], index: int
) -> list[tuple[tuple[int, ...], rearrangement.Indices]] | None:
    """What a chain of steps makes of the places of the elements, at sizes that are tried; None where it fails."""
    samples: list[tuple[tuple[int, ...], rearrangement.Indices]] = []
    for sizes in TRIAL_SIZES if None in shape[1:] else TRIAL_SIZES[:1]:
        trial = (2, *(size or sizes[axis % len(sizes)] for axis, size in enumerate(shape[1:])))
        if len(trial) < 2 or prod(trial) > 2**22:
            return None
        try:
            moved = backend.convert_to_tensor(rearrangement.positions(trial).astype("int32"))
            for step in chain:
                moved = _run_on(step, moved)
            if isinstance(moved, list | tuple):
                moved = moved[index]
            samples.append((trial, np.asarray(backend.convert_to_numpy(moved))))
        except Exception:  # a reshape that does not divide these sizes, in whatever words of the backend
            return None
    return samples


def _run_on(step: Call, array: Any) -> Any:
    args, kwargs = keras.tree.map_structure(
        lambda leaf: array if isinstance(leaf, keras.KerasTensor) else _plain(leaf), (step.args, step.kwargs)
    )
    return step.operation.call(*args, **kwargs)


def _plain(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, Constant) else leaf


# ---- what a step costs and stores ----------------------------------------------------------------


def _cost(lift: _Lift, call: Call, op: Op) -> Cost:
    if isinstance(call.operation, core_ops.Cast):
        return Cost()  # Keras casts on its own where layers of different precision meet
    output = lift.values[lift.names[id(call.outputs[0])]] if call.outputs else None
    if output is None:
        return Cost()
    reads = [lift.values[lift.names[id(tensor)]] for tensor in call.tensors]
    weights = [weight.shape for weight in call.weights] if isinstance(op, Opaque) else []
    return operator_cost(op, reads, output, weights, prod(output.nominal[1:-1]))


def _weights(call: Call) -> dict[str, int]:
    """The sizes of the parameters that a step reads, by names that are equal where they are shared."""
    if isinstance(call.operation, keras.Layer):
        variables = call.operation.weights
        if call.part in ("depthwise", "pointwise"):
            first = variables[:1]
            variables = first if call.part == "depthwise" else variables[1:]
        return {f"variable {id(v)}": prod(v.shape) for v in variables if backend.is_float_dtype(v.dtype)}
    constants = [leaf for leaf in keras.tree.flatten((call.args, call.kwargs)) if isinstance(leaf, Constant)]
    return {
        f"variable {id(c.variable)}" if c.variable is not None else f"{call.name} {i}": c.value.size
        for i, c in enumerate(constants)
        if c.variable is not None or c.value.size > 1
    }


# ---- weights that are functions of other parameters ------------------------------------------------


def _evaluates(scope: Scope, calls: list[Call]) -> bool:
    """Whether parameters of the scope's layer are used otherwise than as they are stored.

    So it is if a layer inside ran with other weights than its own, if an operation inside read an array
    that is none of the parameters, or if a parameter was not read by any step (but by the computation
    of a weight)."""
    inside = [call for call in calls if call.scope is not None and scope in call.scope.chain]
    own = {id(v): v for v in scope.layer.weights if backend.is_float_dtype(v.dtype)}
    stored = {key: _raw(variable) for key, variable in own.items()}
    read: set[int] = set()
    for call in inside:
        if isinstance(call.operation, keras.Layer):
            for variable, value in zip(call.operation.weights, call.weights, strict=True):
                read.add(id(variable))
                if id(variable) in stored and not np.array_equal(stored[id(variable)], value):
                    return True
            continue
        for leaf in keras.tree.flatten((call.args, call.kwargs)):
            if not isinstance(leaf, Constant):
                continue
            source = id(leaf.variable) if leaf.variable is not None else _same_numbers(leaf.value, stored)
            if source is not None:
                read.add(source)
            elif leaf.value.size > 1:
                return True
    return bool(set(own) - read)


def _raw(variable: Any) -> Any:
    return np.asarray(backend.convert_to_numpy(variable._value))


def _same_numbers(array: Any, stored: Mapping[int, Any]) -> int | None:
    for key, value in stored.items():
        if value.size == array.size and np.array_equal(value.reshape(-1), array.reshape(-1)):
            return key
    return None
