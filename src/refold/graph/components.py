"""Which linear values belong together: what is folded in one set of them does not depend on the others."""

from __future__ import annotations

from refold.graph.graph import Graph, Opaque


def components(graph: Graph) -> list[list[str]]:
    """The linear values, in sets that are connected through linear nodes, each in the graph's order."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for node in graph.nodes:
        if not isinstance(node.op, Opaque):
            parent[node.output] = node.output
            for name in node.inputs:
                if name in parent:
                    parent[root(name)] = node.output
    members: dict[str, list[str]] = {}
    for name in parent:
        members.setdefault(root(name), []).append(name)
    return list(members.values())
