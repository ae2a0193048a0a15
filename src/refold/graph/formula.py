"""What a value of a graph is, said by other values: the engine as a witness, which a proof need not believe."""

from __future__ import annotations

from collections.abc import Sequence

from refold.algebra.refusal import Refusal
from refold.graph.forms import FormBuilder, form_builder
from refold.graph.graph import AffineForm, Formula, Graph, Node


class Formulas:
    """Says values of some graphs by other values of them."""

    def __init__(self) -> None:
        self._builders: list[tuple[Graph, FormBuilder]] = []

    def __call__(self, graph: Graph, value: str, leaves: Sequence[str], nodes: Sequence[Node]) -> Formula | None:
        """``value`` by ``leaves``, from which ``nodes``, in an order in which they can be computed, give it; None
        where no law says it as one convolution per leaf."""
        builder = self._builder(graph)
        forms: dict[str, AffineForm] = {}
        for leaf in leaves:
            form = builder.leaf(leaf)
            if isinstance(form, Refusal):
                return None
            forms[leaf] = form
        for node in nodes:
            form = builder.combine(node, [forms[name] for name in node.inputs])
            if isinstance(form, Refusal):
                return None
            forms[node.output] = form
        return Formula(forms[value], {name: builder.axes[name] for name in (value, *leaves)})

    def _builder(self, graph: Graph) -> FormBuilder:
        for known, builder in self._builders:
            if known is graph:
                return builder
        self._builders.append((graph, form_builder(graph)))
        return self._builders[-1][1]
