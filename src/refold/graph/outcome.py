"""What a choice comes to: the plan, with its regions, its costs, and why the rest stays apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np

from refold.algebra.cost import Cost
from refold.algebra.refusal import Refusal
from refold.graph import choice
from refold.graph.choice import Choice
from refold.graph.cuts import Cuts
from refold.graph.graph import Affine, AffineForm, Gain, Graph, Node, Opaque
from refold.graph.plan import Kept, Plan
from refold.graph.region import Part, Region

NO_GAIN = "together they would not be cheaper"
_WORDS = {"multiply_adds": "multiply-adds", "operators": "operators", "bytes": "bytes of memory traffic"}


def outcome(cuts: Cuts, chosen: Choice, evaluated: tuple[str, ...]) -> Plan:
    """The plan that follows from what is ``chosen``; ``evaluated`` names the layers whose weights the front end
    evaluated."""
    return _Outcome(cuts.graph, cuts, chosen).plan(evaluated)


@final
@dataclass(frozen=True)
class _Outcome:
    graph: Graph
    cuts: Cuts
    chosen: Choice

    def plan(self, evaluated: tuple[str, ...]) -> Plan:
        graph = self.graph
        computed = choice.computed(self.graph, self.chosen, graph.required)
        removed = frozenset(
            node.name for node in graph.nodes if not isinstance(node.op, Opaque) and node.output not in computed
        )
        regions = []
        claimed: set[str] = set()
        for node in graph.nodes:
            if isinstance(node.op, Opaque) or node.output not in computed:
                continue
            cut = self.chosen[node.output]
            if cut is None:
                continue
            inside = self._cone(node.output, cut.leaves)
            before = node.cost
            for inner in inside:
                if inner.name in removed and inner.name not in claimed:
                    claimed.add(inner.name)
                    before += inner.cost
            parts = tuple(_part(form, inside) for form in cut.parts)
            regions.append(Region(node.output, parts, tuple(inside), before, cut.cost))
        before, after = Cost(), Cost()
        for node in graph.nodes:
            before += node.cost
            if isinstance(node.op, Opaque):
                after += node.cost
            elif node.output in computed:
                after += choice.value_cost(self.graph, self.chosen, node.output)
        return Plan(
            graph=graph,
            regions=tuple(regions),
            kept=tuple(self._kept(computed)),
            before=before,
            after=after,
            removed=removed,
            computed=frozenset(computed),
            evaluated=evaluated,
            parameters_after=self._parameters(regions, computed),
        )

    def _parameters(self, regions: list[Region], computed: set[str]) -> int:
        """Stored numbers of the model that follows the plan; shared ones count once."""
        stored: dict[str, int] = {}
        replaced = {region.value for region in regions}
        for node in self.graph.nodes:
            if isinstance(node.op, Opaque) or (node.output in computed and node.output not in replaced):
                stored.update(node.weights)
        total = sum(stored.values())
        for part in (part for region in regions for part in region.parts):
            terms = [term for term in part.form.terms.values() if not term.is_identity]
            total += sum(term.size for term in terms)
            total += part.form.bias.size if terms and part.biased else 0
        return total

    def _cone(self, value: str, leaves: frozenset[str]) -> list[Node]:
        """The nodes on the way from ``leaves`` to ``value``, in the order of the graph."""
        inside: set[str] = set()
        waiting = [value]
        while waiting:
            name = waiting.pop()
            if name in inside or (name in leaves and name != value):
                continue
            inside.add(name)
            waiting += [leaf for leaf in self.graph.producer[name].inputs if leaf not in leaves]
        return [node for node in self.graph.nodes if node.outputs and node.outputs[0] in inside]

    def _kept(self, computed: set[str]) -> Iterator[Kept]:
        for node in self.graph.nodes:
            if isinstance(node.op, Opaque):
                if node.op.reason:
                    yield Kept(node.name, node.op.reason)
            elif node.output in computed and node.op != Gain():
                for leaf in dict.fromkeys(choice.leaves(self.graph, self.chosen, node.output)):
                    if leaf in self.chosen:
                        yield Kept(*self._why_apart(leaf, node))

    def _why_apart(self, leaf: str, node: Node) -> tuple[str, str]:
        """Why ``leaf`` is not folded into what ``node`` gives."""
        producer = self.graph.producer[leaf]
        where = f"{producer.name} and {node.name}"
        leaves = frozenset(choice.leaves(self.graph, self.chosen, node.output))
        beyond = (leaves - {leaf}) | set(choice.leaves(self.graph, self.chosen, leaf))
        merging = [cut for cut in self.cuts.of[node.output] if cut.leaves <= beyond and not cut.is_concat]
        merged = [cut.cost for cut in merging if cut.refusal is None]
        if not merged and merging and merging[0].refusal is not None:
            return where, merging[0].refusal.reason
        if merged:
            apart = choice.value_cost(self.graph, self.chosen, node.output)
            readers = [reader.name for reader in self.graph.consumers[leaf]]
            if len(readers) > 1 or leaf in self.graph.required:
                return (
                    where,
                    f"what {producer.name} gives is needed elsewhere too, so folding it in would do it twice",
                )
            apart += choice.value_cost(self.graph, self.chosen, leaf)
            together = min(merged, key=lambda cost: cost.estimate)
            for what in ("multiply_adds", "operators", "bytes"):
                one, two = getattr(together, what), getattr(apart, what)
                if one > two:
                    return where, f"together they would take {one:,} {_WORDS[what]} instead of {two:,}"
            return where, NO_GAIN
        met = self._refusal_between(leaf, self._cone(node.output, leaves), beyond)
        return met or (where, NO_GAIN)

    def _refusal_between(self, leaf: str, cone: list[Node], beyond: frozenset[str]) -> tuple[str, str] | None:
        """The first refusal met when the form of ``leaf`` is carried through the nodes of ``cone``, every
        other input being seen from ``beyond`` where it can be."""
        producer = self.graph.producer[leaf]
        carried = self._form_over(leaf, beyond)
        if carried is None:
            seen = [self.cuts.builder.leaf(name) for name in producer.inputs]
            unknown = next((form for form in seen if isinstance(form, Refusal)), None)
            if unknown is not None:
                return producer.name, unknown.reason
            known = self.cuts.leaf_forms(producer)
            own = self.cuts.builder.combine(producer, known)
            return (producer.name, own.reason) if isinstance(own, Refusal) else None
        forms = {leaf: carried}
        for node in cone:
            if not any(name in forms for name in node.inputs):
                continue
            inputs = [forms.get(name) or self._form_over(name, beyond) for name in node.inputs]
            solid = [form or direct for form, direct in zip(inputs, self.cuts.leaf_forms(node), strict=False)]
            combined = self.cuts.builder.combine(node, solid)
            if isinstance(combined, Refusal):
                return f"{producer.name} and {node.name}", combined.reason
            forms[node.output] = combined
        return None

    def _form_over(self, value: str, leaves: frozenset[str]) -> AffineForm | None:
        """The form of ``value`` over some of ``leaves``, the fewest."""
        cuts = self.cuts.of.get(value, ())
        return next((cut.parts[0] for cut in cuts if len(cut.parts) == 1 and cut.leaves <= leaves), None)


def _part(form: AffineForm, inside: list[Node]) -> Part:
    """A form as part of a region; ``inside`` are the nodes of the whole region, in the order of the graph."""
    own = [node for node in inside if node.name in form.nodes]
    biased = bool(np.any(form.bias)) or any(_is_biased(node) for node in own)
    return Part(form, biased, tuple(node.name for node in own))


def _is_biased(node: Node) -> bool:
    return isinstance(node.op, Affine) and node.op.biased
