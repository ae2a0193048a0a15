"""Cuts: sets of other values from which a linear value can be computed by its affine form, and what that costs.

As in technology mapping with gates, only a short list is kept for each value, of the smallest cuts and of those
that promise most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import final

from refold.algebra.cost import Cost, elementwise_cost, total
from refold.algebra.refusal import Refusal
from refold.graph.form_cost import Helpers, form_cost
from refold.graph.forms import FormBuilder, Parts, form_builder
from refold.graph.graph import AffineForm, Concat, Gain, Graph, Node, Opaque

# How many cuts are remembered per value: of those with the fewest leaves, of those that promise most, and of those
# in several parts; and how many partial combinations while they are built.
MOST_CUTS = 10
MOST_PROMISING = 4
MOST_JOINED = 4
MOST_COMBINATIONS = 32


@final
@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """One way to compute a value, straight from the leaves of its ``parts``, and what that costs.

    ``refusal`` says why the framework cannot say it; such a cut is never chosen, but larger ones may be
    built from it. So it is with a concatenation in parts (``is_concat``): each of its inputs has its own cuts."""

    parts: Parts
    cost: Cost
    refusal: Refusal | None = None
    is_concat: bool = False
    leaves: frozenset[str] = field(init=False)
    """The values that it reads."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "leaves", frozenset(name for form in self.parts for name in form.terms))

    @property
    def may_be_chosen(self) -> bool:
        """Whether a plan may have it."""
        return self.refusal is None and not self.is_concat


@final
@dataclass
class Cuts:
    """The cuts of every linear value of a graph."""

    graph: Graph
    builder: FormBuilder
    helpers: Helpers
    of: dict[str, list[Cut]] = field(default_factory=dict)
    flow: dict[str, float] = field(default_factory=dict)
    flows: dict[Cut, float] = field(default_factory=dict)
    cost_of: dict[str, Cost] = field(init=False)

    def __post_init__(self) -> None:
        self.cost_of = {}
        for node in self.graph.nodes:
            self.cost_of[node.name] = self.cost_of.get(node.name, Cost()) + node.cost

    def list_all(self) -> None:
        """List the cuts of each value, those that it is computed from first."""
        for node in self.graph.nodes:
            if not isinstance(node.op, Opaque):
                cuts = self.of[node.output] = self._cuts_of(node)
                own = node.cost.estimate + sum(self.flow.get(name, 0.0) for name in node.inputs)
                least = min([own, *map(self.flow_of, cuts)])
                self.flow[node.output] = least / max(len(self.graph.consumers[node.output]), 1)

    def add(self, name: str, cut: Cut) -> bool:
        """List one more cut, unless there is one that reads the same and is not dearer; whether it was added."""
        for other in self.of[name]:
            alike = (len(other.parts) > 1, other.leaves) == (len(cut.parts) > 1, cut.leaves)
            if alike and other.cost.estimate <= cut.cost.estimate:
                return False
        self.of[name].append(cut)
        return True

    def refuse(self, name: str, cut: Cut, why: Refusal) -> None:
        """Let no plan have this cut."""
        refused = replace(cut, refusal=why)
        self.of[name] = [refused if other is cut else other for other in self.of[name]]

    def cut(self, node: Node, parts: Parts) -> Cut:
        """What ``node`` gives, computed from the leaves of ``parts``."""
        output = self.graph.values[node.output]
        axis = self.builder.axes[node.output]
        if len(parts) == 1:
            cost, refusal = form_cost(self.builder, self.helpers, parts[0], output, axis)
            return Cut(parts, cost, refusal)
        cost = Cost()
        refusals = []
        shapes = []
        for form in parts:
            shapes.append((*output.nominal[:axis], form.bias.size, *output.nominal[axis + 1 :]))
            own, refusal = form_cost(self.builder, self.helpers, form, replace(output, nominal=shapes[-1]), axis)
            cost += own
            refusals += [refusal] if refusal else []
        joined = elementwise_cost(shapes, output.nominal, output.itemsize)
        cost += replace(joined, multiply_adds=0)
        return Cut(parts, cost, next(iter(refusals), None), isinstance(node.op, Concat))

    def leaf_forms(self, node: Node) -> list[AffineForm]:
        """Each input of ``node`` as the form that reads just it, where there is one."""
        forms = [self.builder.leaf(name) for name in node.inputs]
        return [form for form in forms if isinstance(form, AffineForm)]

    def _cuts_of(self, node: Node) -> list[Cut]:
        best: dict[tuple[bool, frozenset[str]], Cut] = {}
        for inputs in self._combinations(node):
            for parts in self.builder.parts(node, inputs):
                cut = self.cut(node, parts)
                key = len(parts) > 1, cut.leaves
                if key not in best or cut.cost.estimate < best[key].cost.estimate:
                    best[key] = cut
        ranked = sorted(best.items(), key=lambda entry: (len(entry[1].leaves), entry[1].cost.estimate))
        joined = sorted((cut for (in_parts, _), cut in ranked if in_parts), key=self._promise)[:MOST_JOINED]
        whole = [cut for (in_parts, _), cut in ranked if not in_parts]
        # Behind a long chain the cuts that reach furthest are not among the smallest.
        kept = [*whole[:MOST_CUTS], *sorted(whole[MOST_CUTS:], key=self._promise)[:MOST_PROMISING]]
        one_step = best.get((False, frozenset(map(self._same_as, node.inputs))))
        if one_step is not None and all(cut is not one_step for cut in kept):
            kept.append(one_step)
        return kept + joined

    def _identities(self, name: str) -> list[Node]:
        """The identities that lead to a value, the last one first: who reads it may as well read what the first one
        reads."""
        found = []
        while (node := self.graph.producer.get(name)) is not None and node.op == Gain():
            if self.builder.axes[node.inputs[0]] != self.builder.axes[name]:
                break
            found.append(node)
            name = node.inputs[0]
        return found

    def _same_as(self, name: str) -> str:
        """The value that ``name`` is, behind identities."""
        identities = self._identities(name)
        return identities[-1].inputs[0] if identities else name

    def flow_of(self, cut: Cut) -> float:
        """What a cut costs with all that it reads, shared by whoever reads that (the area flow of technology
        mapping: Manohararajah, Brown and Vranesic 2006); infinite if it is dearer than all that it replaces."""
        if cut not in self.flows:  # what it reads comes before it, and has its flow by now
            replaced = total(self.cost_of[name] for name in {name for form in cut.parts for name in form.nodes})
            own = cut.cost.estimate + sum(self.flow.get(leaf, 0.0) for leaf in cut.leaves)
            self.flows[cut] = float("inf") if cut.cost.is_dearer_than(replaced) else own
        return self.flows[cut]

    def _promise(self, cut: Cut) -> tuple[bool, float, float]:
        """What cuts in parts are ordered by, the best first: among equal flows (but for rounding, in nanoseconds)
        the one that reaches furthest, since more can be folded into it."""
        flow = self.flow_of(cut)
        return flow == float("inf"), round(flow, 0), -cut.cost.estimate

    def _combinations(self, node: Node) -> Iterator[tuple[Parts, ...]]:
        partial: list[tuple[frozenset[str], float, tuple[Parts, ...]]] = [(frozenset(), 0.0, ())]
        best: tuple[Parts, ...] = ()
        for name in node.inputs:
            source = self._same_as(name)
            leaf = self.builder.leaf(source)
            if isinstance(leaf, Refusal):
                return
            leaf = replace(leaf, nodes=tuple(step.name for step in reversed(self._identities(name))))
            options: list[tuple[frozenset[str], float, Parts]] = [
                (frozenset([source]), self.flow.get(source, 0.0), (leaf,)),
                *((cut.leaves, self.flow_of(cut), cut.parts) for cut in self.of.get(source, [])),
            ]
            grown = [
                (seen | leaves, flow + more, (*inputs, parts))
                for seen, flow, inputs in partial
                for leaves, more, parts in options
            ]
            direct = grown[0]  # every input from itself: always kept, it is the original node
            grown.sort(key=lambda entry: (len(entry[0]), entry[1]))
            partial = [direct, *(entry for entry in grown if entry is not direct)][:MOST_COMBINATIONS]
            # The inputs do not depend on each other, but for what they share: the best of each is good.
            best = (*best, min(options[1:] or options, key=lambda option: option[1])[2])
        for _, _, inputs in partial:
            yield inputs
        if all(inputs != best for _, _, inputs in partial):
            yield best


def list_cuts(graph: Graph, helpers: Helpers) -> Cuts:
    """The cuts of every linear value of ``graph``, for a framework with these ``helpers``."""
    cuts = Cuts(graph, form_builder(graph), helpers)
    cuts.list_all()
    return cuts
