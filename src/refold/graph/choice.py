"""What a plan chooses for each linear value, and what that makes necessary."""

from __future__ import annotations

from collections.abc import Mapping

from refold.algebra.cost import Cost, total
from refold.graph.cuts import Cut
from refold.graph.graph import Graph

# For each linear value the cut that it is computed by; None: the original node.
Choice = Mapping[str, Cut | None]


def leaves(graph: Graph, choice: Choice, value: str) -> tuple[str, ...]:
    """The values that ``value`` is computed from."""
    cut = choice[value]
    if cut is None:
        return graph.producer[value].inputs
    return tuple(dict.fromkeys(name for form in cut.parts for name in form.terms))


def value_cost(graph: Graph, choice: Choice, value: str) -> Cost:
    """What computing ``value`` costs."""
    cut = choice[value]
    return graph.producer[value].cost if cut is None else cut.cost


def computed(graph: Graph, choice: Choice, roots: tuple[str, ...]) -> set[str]:
    """The linear values that must be computed for ``roots``."""
    seen: set[str] = set()
    waiting = [name for name in roots if name in choice]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [leaf for leaf in leaves(graph, choice, name) if leaf in choice]
    return seen


def total_cost(graph: Graph, choice: Choice, roots: tuple[str, ...]) -> Cost:
    """What computing ``roots`` costs, with all that they need."""
    return total(value_cost(graph, choice, name) for name in computed(graph, choice, roots))
