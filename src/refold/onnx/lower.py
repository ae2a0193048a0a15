"""From a plan back to an ONNX model.

The model is copied, with its tensors shared. What the plan leaves alone is the same node with the same
names and attributes; what it folds is replaced by new nodes, and what only served that is removed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import numpy as np
import onnx_ir as ir

from refold.algebra.affine import AffineConv
from refold.graph.forms import FormBuilder, form_builder
from refold.graph.graph import Gain, Graph, Node
from refold.graph.plan import Plan
from refold.graph.region import Part, Region
from refold.onnx.express import Writer
from refold.onnx.lift import Record
from refold.onnx.subgraphs import captured_values, graphs_of, values_of

# The first version of the format in which initializers need not be inputs.
_FREE_INITIALIZERS = 4


def lower_plan(graph: Graph, record: Record, plan: Plan) -> ir.Model:
    """A new model that follows ``plan``."""
    model = record.model.clone()
    model.meta.update(record.model.meta)
    lowering = _Lowering(graph, record, plan, model, form_builder(graph))
    lowering.map_values()
    if model.ir_version < _FREE_INITIALIZERS:
        listed = [value for value in model.graph.inputs if value.name in model.graph.initializers]
        for value in listed:
            model.graph.inputs.remove(value)
        model.ir_version = _FREE_INITIALIZERS
    for region in plan.regions:
        lowering.replace(region)
    for node in graph.nodes:
        if node.name in record.computed:
            lowering.store_computed(node)
    lowering.remove_unused()
    return model


@final
@dataclass(eq=False)
class _Lowering:
    """The new model while it changes; ``made`` is what now stands for each value of the graph."""

    graph: Graph
    record: Record
    plan: Plan
    model: ir.Model
    forms: FormBuilder
    made: dict[str, ir.Value] = field(default_factory=dict)
    copies: dict[int, ir.Node] = field(default_factory=dict)
    dead: list[ir.Node] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    def map_values(self) -> None:
        """Pair the nodes and values of the copy with the original's, and note every name that is taken."""
        values = self.pair(self.record.model.graph, self.model.graph)
        for name, (_, value) in self.record.values.items():
            self.made[name] = values[id(value)]
        for graph in self.model.graphs():
            self.names.update(str(value.name) for value in values_of(graph))
            self.names.update(str(node.name) for node in graph)

    def pair(self, old: ir.Graph, new: ir.Graph) -> dict[int, ir.Value]:
        """The values of a copied graph, and of those inside of it, by the identities of the original's."""
        found = {id(one): two for one, two in zip(old.inputs, new.inputs, strict=True)}
        found.update((id(value), new.initializers[name]) for name, value in old.initializers.items())
        for first, second in zip(old, new, strict=True):
            self.copies[id(first)] = second
            found.update((id(one), two) for one, two in zip(first.outputs, second.outputs, strict=True))
            for outer, inner in zip(graphs_of(first), graphs_of(second), strict=True):
                found.update(self.pair(outer, inner))
        return found

    def unique(self, wanted: str) -> str:
        name, count = wanted, 1
        while name in self.names:
            count += 1
            name = f"{wanted}_{count}"
        self.names.add(name)
        return name

    # ---- regions ---------------------------------------------------------------------------------

    def replace(self, region: Region) -> None:
        """Put new nodes where the value of a region was computed; they take over its name."""
        old = self.made[region.value]
        producer = old.producer()
        assert producer is not None
        writer = self.writer(region.value, producer)
        same = self.made[region.leaves[0]] if region.moved else self.rewired(region)
        if same is not None:
            self.take_over(old, same, producer, writer)
            return
        axis = self.forms.axes[region.value]
        rank = len(self.graph.values[region.value].shape)
        results = [self.part(writer, part, axis, rank) for part in region.parts]
        name = self.name_for(region.nodes)
        result = results[0] if len(results) == 1 else writer.joined(results, axis, name)
        if not writer.nodes and old.is_graph_output():
            result = writer.node("Identity", [result], name)
        self.take_over(old, result, producer, writer)

    def rewired(self, region: Region) -> ir.Value | None:
        """What a region gives if all it leaves out are identities: its one other node, as it was, now reads what
        they read. None for other regions."""
        nodes = {node.output: node for node in self.graph.nodes if node.name in region.nodes}
        others = [node for node in nodes.values() if node.op != Gain()]
        if len(others) != 1:
            return None
        original = self.record.nodes[others[0].name]
        names = {id(self.record.values[name][1]): name for name in others[0].inputs}
        read = {place: names[id(value)] for place, value in enumerate(original.inputs) if id(value) in names}
        copy, made = self.copies[id(original)], self.made[others[0].output]
        if set(read.values()) != set(others[0].inputs) or made not in copy.outputs:
            return None  # it stands for several of the model's nodes, or was replaced already
        for place, name in read.items():
            while name in nodes:
                self.dead.append(self.copies[id(self.record.nodes[nodes[name].name])])
                (name,) = nodes[name].inputs
            copy.replace_input_with(place, self.made[name])
        return made

    def part(self, writer: Writer, part: Part, axis: int, rank: int) -> ir.Value:
        """Write ``sum_i conv_i(leaf_i) + bias``, with its channels on ``axis``."""
        name = self.name_for(part.nodes)
        terms = part.form.terms
        bias = part.form.bias if part.biased or np.any(part.form.bias) else None
        # Where no operator has a bias it stands right behind a MatMul, where runtimes look for it.
        weighted = [leaf for leaf, term in terms.items() if not term.is_scale]
        holder = next((leaf for leaf in weighted if self.takes_bias(leaf, terms[leaf], axis)), None)
        holder = holder or next(iter(weighted), None)
        results = []
        for leaf, term in terms.items():
            own = None
            if leaf == holder:
                own, bias = bias, None
            results.append(writer.affine(self.made[leaf], term, own, (self.forms.axes[leaf], axis), rank, name))
        return writer.shifted(writer.total(results, name), bias, axis, rank, name)

    def takes_bias(self, leaf: str, term: AffineConv, axis: int) -> bool:
        """Whether the node for a term has a bias of its own: a Conv or a Gemm."""
        if term.is_scale:
            return False
        last = len(term.windows) + 1
        dense = self.forms.axes[leaf] == axis == last != 1 and term.is_pointwise and term.groups == 1
        return not dense

    def writer(self, value: str, producer: ir.Node) -> Writer:
        versions = self.model.opset_imports
        graph = producer.graph
        assert isinstance(graph, ir.Graph)
        dtype = self.record.survey.of(self.record.values[value][1]).dtype
        kind = next(k for k in _FLOAT_TYPES if k.numpy().name == dtype)
        return Writer(graph, versions.get("", versions.get("ai.onnx", 1)), kind, self.unique, [])

    def take_over(self, old: ir.Value, result: ir.Value, producer: ir.Node, writer: Writer) -> None:
        """Let ``result`` be what ``old`` was, for whoever reads it."""
        if result is old:
            return
        name, is_new = str(old.name), bool(writer.nodes)
        graph = producer.graph
        assert isinstance(graph, ir.Graph)
        graph.insert_before(producer, writer.nodes)
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        if is_new:
            result.type, result.shape = old.type, old.shape
            result.doc_string = old.doc_string
            result.metadata_props.update(old.metadata_props)
            old.name = self.unique(f"{name}_before")
            result.name = name
        for known, value in self.made.items():
            if value is old:
                self.made[known] = result
        self.dead.append(producer)

    def name_for(self, nodes: tuple[str, ...]) -> str:
        """What takes the place of nodes is named by the last convolution or matrix among them, else by the last."""
        steps = [self.record.nodes[name] for name in nodes]
        kernels = [step for step in steps if step.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
        last = (kernels or steps)[-1]
        return f"{last.name or last.outputs[0].name}_folded"

    # ---- weights that were computed --------------------------------------------------------------

    def store_computed(self, step: Node) -> None:
        """Give a node that stays its weights as plain initializers."""
        original = self.record.nodes[step.name]
        node = self.copies[id(original)]
        if node in self.dead or any(self.made[output] not in node.outputs for output in step.outputs):
            return
        for place in self.record.computed[step.name]:
            old = node.inputs[place]
            source = original.inputs[place]
            assert old is not None
            assert source is not None
            facts = self.record.survey.of(source)
            kind = next(k for k in _FLOAT_TYPES if k.numpy().name == facts.dtype)
            graph = node.graph
            assert isinstance(graph, ir.Graph)
            writer = Writer(graph, 1, kind, self.unique, [])
            shape = facts.shapes[0]
            assert shape is not None
            value = writer.computed(f"{original.name or node.outputs[0].name}_weight", shape, facts.array)
            node.replace_input_with(place, value)
            producer = old.producer()
            if producer is not None:
                self.dead.append(producer)

    # ---- what is not needed any more -------------------------------------------------------------

    def remove_unused(self) -> None:
        """Remove the nodes that were replaced and what only they read, with what nobody read before: such
        a node would keep alive what is folded."""
        scopes = [self.model.graph]
        for scope in self.record.scopes:
            if scope.body is not None:
                places = [id(graph) for graph in graphs_of(scope.body.owner)]
                scopes.append(list(graphs_of(self.copies[id(scope.body.owner)]))[places.index(id(scope.graph))])
        waiting = [node for graph in scopes for node in graph] if self.dead else []
        removed: set[int] = set()
        while waiting:
            node = waiting.pop()
            if id(node) in removed or any(o.uses() or o.is_graph_output() for o in node.outputs):
                continue
            removed.add(id(node))
            graph = node.graph
            assert isinstance(graph, ir.Graph)
            read = [*_let_go(node), *(value for value in node.inputs if value is not None)]
            graph.remove(node, safe=True)
            for value in read:
                producer = value.producer()
                if producer is not None:
                    waiting.append(producer)
                elif _is_unused_initializer(value):
                    assert value.graph is not None
                    del value.graph.initializers[str(value.name)]


def _let_go(node: ir.Node) -> list[ir.Value]:
    """What the graphs inside of a node captured, which they do not read any more: the node is removed."""
    captured = captured_values(node)
    for graph in graphs_of(node):
        for inner in ir.traversal.RecursiveGraphIterator(graph):
            for place in range(len(inner.inputs)):
                inner.replace_input_with(place, None)
    return captured


def _is_unused_initializer(value: ir.Value) -> bool:
    used = value.uses() or value.is_graph_output() or value.is_graph_input()
    return value.is_initializer() and not used


_FLOAT_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
