"""From an ONNX model to the neutral graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import final

import numpy as np
import onnx_ir as ir

from refold.algebra.cost import Cost, sum_cost
from refold.algebra.refusal import Refusal
from refold.errors import InputError
from refold.frontend import unit_roundoff
from refold.graph.cost import operator_cost
from refold.graph.forms import form_builder
from refold.graph.graph import (
    Affine,
    AffineForm,
    Concat,
    Dialect,
    Gain,
    Graph,
    Node,
    Op,
    Opaque,
    Pad,
    Relayout,
    Sum,
    Value,
    alive,
)
from refold.graph.layout import demanded_axis
from refold.onnx.compounds import compounds
from refold.onnx.facts import Facts
from refold.onnx.linear import op_of
from refold.onnx.moves import Found, Moves
from refold.onnx.reference import FLOATS, AnyArray, Operators
from refold.onnx.sizes import MOVING, Survey, survey
from refold.onnx.step import Step
from refold.onnx.subgraphs import Body, Scope, captured_values
from refold.shown import printable

# Convolutions have their channels on axis 1; neither MatMul nor Mul has a bias. ONNX Runtime takes a Sum two at
# a time as well, and would join an Add with the convolution before it.
DIALECT = Dialect(conv_axis=1, biased=False, adds_pairs=True)

# The constant with which an exporter pads, and the bias that it stands for, were each computed in the
# model's own precision, in different orders: so many roundings of the largest of them may lie between.
_ROUNDINGS = 32

# Versions of ONNX's operator set: before 7 operators broadcast otherwise.
_OLDEST = 7

# Operators that read channels on axis 1.
_CHANNELS_FIRST = frozenset({"AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "GlobalAveragePool"})

# Operators that only say another shape of a tensor.
_VIEWS = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})

_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": float(np.finfo(np.float32).max)}


@final
@dataclass(frozen=True, eq=False)
class Record:
    """Where the graph's names come from.

    ``values`` and ``nodes`` lead from the graph's names to the model's own: a value with the scope in which it
    is read, as what a body captures has a name for each body. ``entries`` are the nodes that stand for how a body
    comes by one of its inputs or by a captured value. ``scopes`` are those of the main graph and of every
    body that was looked into. ``exact`` holds the constants (by identity) that are taken for the biases that
    they stand for. ``computed`` lists, for linear nodes whose weights are computed from other parameters, which
    of their inputs those are.
    """

    model: ir.Model
    operators: Operators
    survey: Survey
    inputs: tuple[ir.Value, ...]
    values: Mapping[str, tuple[Scope, ir.Value]]
    nodes: Mapping[str, ir.Node]
    entries: Mapping[str, tuple[Body, ir.Value]]
    scopes: tuple[Scope, ...]
    exact: Mapping[int, AnyArray]
    computed: Mapping[str, tuple[int, ...]]


def callers_inputs(model: ir.Model) -> tuple[ir.Value, ...]:
    """The inputs that callers give. Before version 4 of the format every initializer had to be listed as
    an input as well; since then one that is may be replaced by a caller, so it is no constant."""
    if (model.ir_version or 0) >= 4:
        return tuple(model.graph.inputs)
    return tuple(value for value in model.graph.inputs if value.name not in model.graph.initializers)


def lift_model(model: ir.Model) -> tuple[Graph, Record, tuple[str, ...]]:
    """The neutral graph of a model, where it comes from, and notes on the reading. Raises InputError."""
    _check_versions(model)
    functions = [ir.to_proto(function) for function in model.functions.values()]
    operators = Operators(dict(model.opset_imports), functions)
    inputs = callers_inputs(model)
    found = survey(model, inputs, operators)
    apart = {
        key: reason for graph in _graphs(model.graph, found) for key, reason in compounds(graph, found).items()
    }
    lift = _Lift(found, Moves(found, operators), apart, Scope(model.graph))
    for value in inputs:
        lift.add_value(value)
    for node in model.graph:
        lift.add(node)
    outputs = tuple(
        lift.add_value(value) if lift.is_constant(value) else lift.name(value) for value in model.graph.outputs
    )
    nodes, exact, notes = lift.with_exact_borders(alive(lift.nodes, outputs))
    used = {name for node in nodes for name in (*node.inputs, *node.outputs)}
    used.update(outputs, (str(value.name) for value in inputs))
    values = {name: value for name, value in lift.values.items() if name in used}
    names = tuple(str(value.name) for value in inputs)
    parameters, largest = _stored_numbers(model, found)
    graph = Graph(values, tuple(nodes), names, outputs, parameters, largest, DIALECT)
    computed = {node.name: lift.computed[node.name] for node in nodes if node.name in lift.computed}
    record = Record(
        model,
        operators,
        found,
        inputs,
        lift.originals,
        lift.steps,
        lift.entries,
        tuple(lift.scopes),
        exact,
        computed,
    )
    return graph, record, tuple(notes)


def _check_versions(model: ir.Model) -> None:
    from onnx.defs import onnx_opset_version

    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if version is None:
        return
    if version < _OLDEST:
        raise InputError(
            f"the model uses version {version} of ONNX's operators; versions before {_OLDEST} are not read "
            "(onnx.version_converter brings it to a newer one)"
        )
    if version > onnx_opset_version():
        raise InputError(
            f"the model uses version {version} of ONNX's operators; the installed onnx knows them up to "
            f"{onnx_opset_version()}: a newer onnx is needed"
        )


def _graphs(graph: ir.Graph, found: Survey) -> Iterator[ir.Graph]:
    """A graph and all that were looked into inside of it."""
    yield graph
    for node in graph:
        for body in found.opened.get(id(node), ()):
            yield from _graphs(body.graph, found)


@final
@dataclass(eq=False)
class _Lift:
    """The graph while it grows. Bodies become part of it: an opaque node stands for how a body comes by its inputs,
    one for each value that it captures, and the node that runs the body reads what the body gives. So no form
    reaches across the border of a body, and everything else holds inside of it as outside."""

    survey: Survey
    moves: Moves
    apart: Mapping[int, str]  # why nodes are left alone, by their identity
    scope: Scope
    scopes: list[Scope] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    originals: dict[str, tuple[Scope, ir.Value]] = field(default_factory=dict)
    names: dict[tuple[int, int], str] = field(default_factory=dict)  # by the identities of scope and value
    nodes: list[Node] = field(default_factory=list)
    steps: dict[str, ir.Node] = field(default_factory=dict)
    entries: dict[str, tuple[Body, ir.Value]] = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)
    borders: dict[str, Found] = field(default_factory=dict)
    computed: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scopes.append(self.scope)

    def is_constant(self, value: ir.Value) -> bool:
        return self.survey.of(value).is_constant

    def add_value(self, value: ir.Value) -> str:
        """The name of a value in the scope that it belongs to or is captured in, now known."""
        known = self.names.get((id(self.scope), id(value)))
        if known is not None:
            return known
        facts = self.survey.of(value)
        name = self.scope.path + str(value.name)
        while name in self.originals:
            name += "~"
        shape, first = facts.shape, facts.shapes[0] or ()
        if shape is None and value.shape is not None:
            # Behind an operator that nobody knows: what the file says of the sizes, if it is only their number.
            shape = tuple(size if isinstance(size, int) and size >= 0 else None for size in value.shape)
            first = tuple(size or 1 for size in shape)
        nominal = (1, *first[1:]) if shape else first  # costs are those of one example
        self.values[name] = Value(
            name, shape or (), facts.dtype or "unknown", nominal if shape is not None else (), self.scope.path
        )
        self.originals[name] = self.scope, value
        self.names[id(self.scope), id(value)] = name
        return name

    def name(self, value: ir.Value) -> str:
        """The name of a value as it is read in the scope that is worked on."""
        known = self.names.get((id(self.scope), id(value)))
        if known is not None or self.scope.owns(value):
            return known or str(value.name)
        scope, outer = self.scope, self.scope.parent
        assert scope.body is not None
        assert outer is not None
        self.scope = outer
        source = self.name(value)
        self.scope = scope
        name = self.add_value(value)
        self._append_entry(f"{name} (captured)", (source,), (name,), (scope.body, value))
        if source in self.axes:
            self.axes[name] = self.axes[source]
        return name

    def is_known(self, value: ir.Value) -> bool:
        """Whether a value has a name where it belongs."""
        return (id(self._home(value)), id(value)) in self.names

    def _home(self, value: ir.Value) -> Scope:
        """The scope that a value belongs to, seen from the one that is worked on."""
        scope = self.scope
        while scope.parent is not None and not scope.owns(value):
            scope = scope.parent
        return scope

    # ---- bodies ----------------------------------------------------------------------------------

    def _body(self, body: Body, read: tuple[str, ...]) -> list[str]:
        """The nodes of a body, whose owner reads ``read``; gives the names of what the body gives."""
        outer = self.scope
        owner = body.owner.name or str(body.owner.outputs[0].name)
        self.scope = Scope(body.graph, f"{outer.path}{owner}/{body.attribute}/", body, outer)
        self.scopes.append(self.scope)
        for value in body.graph.inputs:
            name = self.add_value(value)
            self._append_entry(f"{name} (input)", read, (name,), (body, value))
        for node in body.graph:
            self.add(node)
        found = [self.name(value) for value in body.graph.outputs if not self.is_constant(value)]
        self.scope = outer
        return found

    def _append_entry(
        self,
        wanted: str,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        entry: tuple[Body, ir.Value],
    ) -> None:
        name = self._unique(wanted)
        self.entries[name] = entry
        self.nodes.append(Node(name, Opaque(enters=True), inputs, outputs))

    # ---- nodes -----------------------------------------------------------------------------------

    def add(self, node: ir.Node) -> None:
        """The graph's nodes for one of the model's."""
        outputs = [value for value in node.outputs if value.name]
        if all(self.is_constant(value) for value in outputs):
            return
        bodies = self.survey.opened.get(id(node), ())
        if bodies:
            read = tuple(self.name(v) for v in node.inputs if v is not None and not self.is_constant(v))
            ends = [name for body in bodies for name in self._body(body, read)]
            names = tuple(self.add_value(value) for value in outputs)
            place = list(node.outputs).index(outputs[0])
            self._append(node, place, Opaque(), (*read, *ends), names, (node,))
            return
        for value in outputs:
            self.add_value(value)
        ops = {place: self._op(node, place) for place, value in enumerate(node.outputs) if value.name}
        known = all(not isinstance(op, Opaque) for op in ops.values())
        found = self.moves.follow(node, known)
        rest = []
        for place, op in ops.items():
            output = self.name(node.outputs[place])
            if isinstance(op, Opaque) and place in found and self.is_known(found[place].base):
                told = found[place]
                self._append(node, place, told.op, (self.name(told.base),), (output,), told.steps)
                if isinstance(told.op, Pad):
                    self.borders[output] = told
            elif isinstance(op, Opaque):
                rest.append(place)
            else:
                sources = tuple(self.name(v) for v in node.inputs if v is not None and not self.is_constant(v))
                self._append(node, place, op, sources, (output,), (node,))
                if isinstance(op, Affine) and op.conv.is_scale:
                    self.moves.scale(self.originals[sources[0]][1], node, op)
        if rest:
            given = [v for v in (*node.inputs, *captured_values(node)) if v is not None]
            read = tuple(self.name(value) for value in given if not self.is_constant(value))
            names = tuple(self.name(node.outputs[place]) for place in rest)
            op = ops[rest[0]]
            if node.op_type in MOVING and isinstance(op, Opaque) and len(rest) == 1:
                op = replace(op, passages=partial(self.moves.passages, node, rest[0]))
            self._append(node, rest[0], op, read, names, (node,))

    def _op(self, node: ir.Node, place: int) -> Op:
        if id(node) in self.apart:
            return Opaque(self.apart[id(node)])
        facts = tuple(None if value is None else self.survey.of(value) for value in node.inputs)
        outputs = tuple(self.survey.of(value) for value in node.outputs)
        if any(known is not None and not known.is_constant and known.rank is None for known in facts):
            return Opaque()  # nothing is known of it, whatever the file says of the result
        version = self.moves.operators.opsets.get(node.domain, 1)
        op = op_of(Step(node, version, facts, outputs, place))
        if isinstance(op, Relayout) and abs(op.axis_in - op.axis_out) == 1:
            # Swapping two neighbors moves either of them: that which holds the channels.
            source = self.name(node.inputs[0]) if node.inputs[0] is not None else ""
            readers = {reader.op_type for reader in node.outputs[0].consumers()}
            known = self.axes.get(source)
            if known == op.axis_out or (known is None and op.axis_in == 1 and readers & _CHANNELS_FIRST):
                return Relayout(op.axis_out, op.axis_in)
        return op

    def _append(
        self,
        node: ir.Node,
        place: int,
        op: Op,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        steps: tuple[ir.Node, ...],
    ) -> None:
        ranks = {len(self.values[name].shape) for name in (*inputs, *outputs)}
        if isinstance(op, Affine | Concat | Sum) and len(ranks) > 1:
            op = Opaque()  # where the file says another shape than the operator can give
        if op == Gain() and node.outputs[place] in self.scope.graph.outputs:
            op = Opaque()  # an output needs a name of its own
        name = self._name(node, place)
        cost = self._cost(op, inputs, outputs[0], node)
        for step in steps[:-1]:
            if isinstance(op, Affine) and (step.op_type in _VIEWS or step.op_type not in MOVING):
                continue  # a batch norm between reshapes costs what it would without them
            known = self.names.get((id(self.scope), id(step.outputs[0])), "")
            cost += self._cost(Opaque(), (), known, step)
        if isinstance(op, Affine):
            computed = tuple(
                spot
                for spot, value in enumerate(node.inputs)
                if value is not None and self._is_computed(self.survey.of(value))
            )
            if computed:
                self.computed[name] = computed
        self.steps[name] = node
        weights = {read: size for step in steps for read, size in self._weights(step).items()}
        self.nodes.append(Node(name, op, inputs, outputs, cost, weights))
        self._remember_axis(self.nodes[-1])

    def _is_computed(self, facts: Facts) -> bool:
        sizes = facts.shapes[0]
        return facts.arithmetic and facts.dtype in FLOATS and sizes is not None and prod(sizes) > 1

    def _name(self, node: ir.Node, place: int) -> str:
        wanted = node.name or str(node.outputs[place].name)
        if place and node.name:
            wanted = f"{node.name}:{place}"
        wanted = self.scope.path + wanted
        return self._unique(wanted if wanted not in self.steps else self.name(node.outputs[place]))

    def _unique(self, wanted: str) -> str:
        name, count = wanted, 1
        while name in self.steps or name in self.entries:
            count += 1
            name = f"{wanted}~{count}"
        return name

    def _remember_axis(self, node: Node) -> None:
        """Where the channels of what a node gives are, as far as that can be told from what came before."""
        if len(node.outputs) != 1:
            return
        _, written = demanded_axis(node)
        known = [self.axes[name] for name in node.inputs if name in self.axes]
        if written is not None:
            self.axes[node.output] = written
        elif known and node.inputs and self._same_rank(node):
            self.axes[node.output] = known[0]

    def _same_rank(self, node: Node) -> bool:
        return len(self.values[node.inputs[0]].shape) == len(self.values[node.output].shape)

    # ---- what a node costs and stores ------------------------------------------------------------

    def _cost(self, op: Op, inputs: tuple[str, ...], output: str, node: ir.Node) -> Cost:
        if output not in self.values:
            return Cost(operators=1)
        result = self.values[output]
        reads = [self.values[name] for name in inputs]
        if isinstance(op, Sum):
            return sum_cost(len(reads), result.nominal, result.itemsize, DIALECT.adds_pairs)
        weights = []
        if isinstance(op, Opaque):
            read = [facts for facts in map(self.survey.of, node.inputs) if facts.is_constant]
            weights = [facts.shapes[0] or () for facts in read if facts.dtype in FLOATS]
        positions = prod(result.nominal[2:]) if node.op_type.startswith("Conv") else 1
        return operator_cost(op, reads, result, weights, positions)

    def _weights(self, node: ir.Node) -> dict[str, int]:
        found = {}
        for value in node.inputs:
            if value is None:
                continue
            facts = self.survey.of(value)
            if facts.is_constant and facts.dtype in FLOATS:
                found[self._home(value).path + str(value.name)] = prod(facts.shapes[0] or ())
        return found

    # ---- borders that are biases -----------------------------------------------------------------

    def with_exact_borders(self, nodes: list[Node]) -> tuple[list[Node], dict[int, AnyArray], list[str]]:
        """The nodes with every border that stands for the bias before it made that bias; the constants
        that are read so, by identity; and what to say about it.

        A border of zeros around ``conv`` becomes one around ``conv + bias`` if it is padded with the bias,
        which exporters compute apart from it: the two differ by roundings, and would not fold."""
        candidates = {node.output for node in nodes if isinstance(node.op, Pad) and node.output in self.borders}
        if not candidates:
            return nodes, {}, []
        values = {name: self.values[name] for node in nodes for name in (*node.inputs, *node.outputs)}
        builder = form_builder(Graph(values, tuple(nodes), (), ()))
        forms: dict[str, AffineForm] = {}
        exact: dict[int, AnyArray] = {}
        notes: list[str] = []
        changed = []
        for node in nodes:
            if isinstance(node.op, Pad) and node.output in candidates:
                node = self._exact_border(node, forms.get(node.inputs[0]), exact, notes)
            changed.append(node)
            if isinstance(node.op, Opaque):
                continue
            seen = [forms.get(name) or builder.leaf(name) for name in node.inputs]
            if any(isinstance(form, Refusal) for form in seen):
                continue
            form = builder.combine(node, [form for form in seen if isinstance(form, AffineForm)])
            if isinstance(form, AffineForm):
                forms[node.output] = form
        return changed, exact, notes

    def _exact_border(
        self, node: Node, form: AffineForm | None, exact: dict[int, AnyArray], notes: list[str]
    ) -> Node:
        assert isinstance(node.op, Pad)
        if form is None:
            return node
        channels = form.bias.size
        border = np.broadcast_to(np.asarray(node.op.value), (channels,))
        gap = np.abs(border - form.bias)
        dtype = self.values[node.output].dtype
        u = unit_roundoff(dtype) if dtype in FLOATS else 0.0
        scale = float(np.max(np.abs(form.bias), initial=0.0))
        told = self.borders[node.output]
        if not np.any(gap) or len(told.constants) != channels or not np.all(gap <= _ROUNDINGS * u * scale):
            return node
        changes: dict[int, AnyArray] = {}
        for channel, sources in enumerate(told.constants):
            if not sources and gap[channel]:
                return node
            for value, spot in sources:
                known = exact.get(id(value))
                numbers = changes.setdefault(
                    id(value), np.array(self.survey.of(value).array() if known is None else known)
                )
                if known is not None and numbers.reshape(-1)[spot] != form.bias[channel]:
                    return node
                numbers.reshape(-1)[spot] = form.bias[channel]
        exact.update(changes)
        notes.append(
            f"'{printable(node.output)}' is padded with the bias before it, as far as roundings show (the largest "
            f"difference is {float(np.max(gap)):.2g}); it is taken for that bias"
        )
        axis = node.op.axis if node.op.axis is not None else 1
        op = Pad(node.op.widths, tuple(float(number) for number in form.bias), axis)
        return replace(node, op=op)


def _stored_numbers(model: ir.Model, found: Survey) -> tuple[int, float]:
    """How many real numbers a model stores, and the largest that all their types can hold."""
    total, largest = 0, float(np.finfo(np.float64).max)
    seen = False
    for facts in _stored(model, found):
        if facts.dtype in FLOATS:
            total += prod(facts.shapes[0] or ())
            largest = min(largest, _LARGEST.get(facts.dtype, largest))
            seen = True
    return total, largest if seen else _LARGEST["float32"]


def _stored(model: ir.Model, found: Survey) -> Iterator[Facts]:
    given = {id(value) for value in callers_inputs(model)}
    for graph in _graphs(model.graph, found):
        given.update(id(value) for value in graph.inputs if graph is not model.graph)
        for value in graph.initializers.values():
            if id(value) not in given:
                yield found.of(value)
        for node in graph:
            if node.op_type == "Constant" and node.domain == "":
                yield found.of(node.outputs[0])
