"""Graphs inside of nodes: what they read from outside of them, and the bodies of If, Loop and Scan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import onnx_ir as ir

# Versions of Scan before this one read a batch of sequences.
_SCAN_SINCE = 9
# Inputs of a Loop, and of its body, before the values that it carries along; outputs of the body before those.
LOOP_INPUTS, LOOP_FORMALS, LOOP_RESULTS = 2, 2, 1


@final
@dataclass(frozen=True, eq=False)
class Body:
    """A graph that ``owner`` runs: the branch of an If, the body of a Loop or a Scan. ``attribute`` says which."""

    owner: ir.Node
    attribute: str
    graph: ir.Graph

    @cached_property
    def own(self) -> frozenset[int]:
        """The values of the graph, by identity; all others that it reads are captured."""
        return frozenset(id(value) for value in values_of(self.graph))

    @property
    def states(self) -> Sequence[ir.Value | None]:
        """The owner's inputs with which the values start that are carried from one run to the next."""
        match self.owner.op_type:
            case "Loop":
                return self.owner.inputs[LOOP_INPUTS:]
            case "Scan":
                return self.owner.inputs[: len(self.owner.inputs) - self.scanned]
            case _:
                return ()

    @property
    def scanned(self) -> int:
        """How many of a Scan's inputs are taken apart, one slice for each run."""
        return self.owner.attributes.get_int("num_scan_inputs", 0) or 0 if self.owner.op_type == "Scan" else 0

    @property
    def before_states(self) -> tuple[int, int]:
        """How many inputs and outputs the body has before those that are carried along."""
        return (LOOP_FORMALS, LOOP_RESULTS) if self.owner.op_type == "Loop" else (0, 0)


def bodies_of(node: ir.Node, version: int) -> tuple[Body, ...]:
    """The bodies of a node of which it is known how it runs them, in a fixed order: those of If, Loop and Scan that
    have as many inputs and outputs as their operator says. ``version`` is that of the node's operators."""
    names = {"If": ("then_branch", "else_branch"), "Loop": ("body",), "Scan": ("body",)}.get(node.op_type, ())
    if node.domain not in ("", "ai.onnx") or (node.op_type == "Scan" and version < _SCAN_SINCE):
        return ()
    found = []
    for name in names:
        attribute = node.attributes.get(name)
        if attribute is None or attribute.is_ref() or attribute.type != ir.AttributeType.GRAPH:
            return ()
        found.append(Body(node, name, attribute.as_graph()))
    return tuple(found) if all(map(_fits, found)) else ()


def _fits(body: Body) -> bool:
    node, graph = body.owner, body.graph
    if any(id(value) not in body.own for value in graph.outputs):
        return False
    states, (before, results) = len(body.states), body.before_states
    if node.op_type == "If":
        return len(node.inputs) == 1 and not graph.inputs and len(graph.outputs) == len(node.outputs)
    if node.op_type == "Loop" and len(node.inputs) < LOOP_INPUTS:
        return False
    required = node.inputs[LOOP_INPUTS:] if node.op_type == "Loop" else node.inputs
    settings = {"input": body.scanned, "output": len(node.outputs) - states}
    told = [
        (node.attributes.get_ints(f"scan_{side}_{what}"), count)
        for side, count in settings.items()
        for what in ("axes", "directions")
    ]
    if node.op_type == "Scan" and any(numbers and len(numbers) != count for numbers, count in told):
        return False
    return (
        all(value is not None for value in required)
        and 0 <= body.scanned <= len(node.inputs)
        and len(graph.inputs) == before + states + body.scanned
        and len(graph.outputs) == results + len(node.outputs)
        and len(node.outputs) >= states
    )


@final
@dataclass(frozen=True, eq=False)
class Scope:
    """Where a value is read: in the main graph, or in a body (in which captured values are others than outside:
    a body may run often, or not at all). ``path`` stands before the names of what is in it."""

    graph: ir.Graph
    path: str = ""
    body: Body | None = None
    parent: Scope | None = None

    def owns(self, value: ir.Value) -> bool:
        """Whether a value belongs to the scope's graph. The main graph owns whatever no body owns."""
        return self.body is None or id(value) in self.body.own


def values_of(graph: ir.Graph) -> Iterator[ir.Value]:
    """The values of a graph: its inputs, its initializers, and what its nodes give."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def captured_values(node: ir.Node) -> list[ir.Value]:
    """The values that the subgraphs of a node read from outside of them."""
    found: dict[int, ir.Value] = {}

    def visit(graph: ir.Graph) -> None:
        own = {id(value) for value in values_of(graph)}
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
