"""Graphs inside of nodes, and what they read from outside of them."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir


def captured_values(node: ir.Node) -> list[ir.Value]:
    """The values that the subgraphs of a node read from outside of them."""
    found: dict[int, ir.Value] = {}

    def visit(graph: ir.Graph) -> None:
        own = {id(value) for value in (*graph.inputs, *graph.initializers.values())}
        for inner in graph:
            own.update(id(value) for value in inner.outputs)
        for inner in graph:
            reads = [value for value in inner.inputs if value is not None]
            reads += captured_values(inner)
            for value in reads:
                if id(value) not in own:
                    found[id(value)] = value
        for value in graph.outputs:
            if id(value) not in own:
                found[id(value)] = value

    for graph in graphs_of(node):
        visit(graph)
    return list(found.values())


def graphs_of(node: ir.Node) -> Iterator[ir.Graph]:
    """The subgraphs of a node: the branches of an If, the body of a Loop."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()
