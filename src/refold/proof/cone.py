"""What a value is computed from: the nodes between it and the values at which one stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from refold.graph.graph import Graph, Node, Opaque


@final
@dataclass(frozen=True, eq=False)
class Cone:
    """``nodes``, in an order in which they can be computed, give ``value`` from ``leaves``. With no
    nodes the value is its own leaf."""

    value: str
    leaves: tuple[str, ...]
    nodes: tuple[Node, ...]

    @property
    def is_linear(self) -> bool:
        """Whether every node is linear."""
        return not any(isinstance(node.op, Opaque) for node in self.nodes)


def ranks(graph: Graph) -> dict[str, int]:
    """The place of every value in the order of the computation; inputs and constant outputs come first."""
    order = dict.fromkeys((*graph.outputs, *graph.inputs), -1)
    for place, node in enumerate(graph.nodes):
        order.update(dict.fromkeys(node.outputs, place))
    return order


def cone(
    graph: Graph,
    rank: dict[str, int],
    value: str,
    stops: Callable[[str], bool],
    *,
    at_once: bool = True,
    black: bool = False,
) -> Cone:
    """Walk back from ``value`` to where ``stops`` says so, to inputs and to what opaque nodes give.

    ``at_once`` says whether the walk may stop at ``value`` itself; ``black`` walks on through opaque
    nodes. ``rank`` is that of :func:`ranks`.
    """
    leaves: dict[str, None] = {}
    inside: dict[int, Node] = {}
    waiting = [value]
    while waiting:
        name = waiting.pop()
        node = graph.producer.get(name)
        ends_here = (at_once or name != value) and stops(name)
        if node is None or ends_here or (isinstance(node.op, Opaque) and not black):
            leaves[name] = None
        elif rank[name] not in inside:
            inside[rank[name]] = node
            waiting += reversed(node.inputs)
    return Cone(value, tuple(leaves), tuple(inside[place] for place in sorted(inside)))
