"""Which affine forms to materialize: the cheapest exact way that is dearer in nothing.

This is what technology mapping does with gates. For every linear value the possible *cuts* are listed:
sets of other values from which it can be computed by its affine form. The search starts at the model as
it is and takes steps that lower the estimated cost and raise neither multiply-adds nor operators, so
whatever it ends at is never worse than the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np

from refold.algebra.cost import Cost, elementwise_cost, total
from refold.algebra.refusal import Refusal
from refold.graph.components import components
from refold.graph.form_cost import Helpers, form_cost, no_helpers
from refold.graph.forms import NOT_FINITE, FormBuilder, Parts, can_be_stored, form_builder
from refold.graph.graph import Affine, AffineForm, Concat, Gain, Graph, Node, Opaque
from refold.graph.moving import with_maps_moved
from refold.graph.plan import Kept, Plan
from refold.graph.region import Part, Region

# How many cuts are remembered per value: of those with the fewest leaves, of those that promise most, and of those
# in several parts; and how many partial combinations while they are built.
MOST_CUTS = 10
MOST_PROMISING = 4
MOST_JOINED = 4
MOST_COMBINATIONS = 32

NO_GAIN = "together they would not be cheaper"
_WORDS = {"multiply_adds": "multiply-adds", "operators": "operators", "bytes": "bytes of memory traffic"}


def make_plan(
    graph: Graph, helpers: Helpers = no_helpers, evaluated: tuple[str, ...] = (), notes: tuple[str, ...] = ()
) -> Plan:
    """The plan for ``graph``. ``evaluated`` names the layers whose weights the front end evaluated, ``notes`` are
    its sentences about the reading."""

    def planned(graph: Graph) -> Plan:
        search = _Search(graph, form_builder(graph), helpers)
        search.list_cuts()
        for component in components(graph):
            search.improve(component)
        return search.plan(evaluated)

    return replace(with_maps_moved(planned(graph), planned), notes=notes)


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


# What is chosen for each linear value; None: the original node.
Choice = Mapping[str, Cut | None]


@final
@dataclass
class _Search:
    """The state of one planning: the cuts of every linear value and the one chosen now."""

    graph: Graph
    builder: FormBuilder
    helpers: Helpers
    cuts: dict[str, list[Cut]] = field(default_factory=dict)
    chosen: dict[str, Cut | None] = field(default_factory=dict)
    flow: dict[str, float] = field(default_factory=dict)
    flows: dict[Cut, float] = field(default_factory=dict)
    cost_of: dict[str, Cost] = field(init=False)

    def __post_init__(self) -> None:
        self.cost_of = {}
        for node in self.graph.nodes:
            self.cost_of[node.name] = self.cost_of.get(node.name, Cost()) + node.cost

    # ---- cuts ------------------------------------------------------------------------------------

    def list_cuts(self) -> None:
        for node in self.graph.nodes:
            if not isinstance(node.op, Opaque):
                self.chosen[node.output] = None
                cuts = self.cuts[node.output] = self._cuts_of(node)
                own = node.cost.estimate + sum(self.flow.get(name, 0.0) for name in node.inputs)
                least = min([own, *map(self._flow_of, cuts)])
                self.flow[node.output] = least / max(len(self.graph.consumers[node.output]), 1)

    def _cuts_of(self, node: Node) -> list[Cut]:
        best: dict[tuple[bool, frozenset[str]], Cut] = {}
        for inputs in self._combinations(node):
            for parts in self.builder.parts(node, inputs):
                cut = self._cut(node, parts)
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

    def _flow_of(self, cut: Cut) -> float:
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
        flow = self._flow_of(cut)
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
                *((cut.leaves, self._flow_of(cut), cut.parts) for cut in self.cuts.get(source, [])),
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

    # ---- costs -----------------------------------------------------------------------------------

    def _cut(self, node: Node, parts: Parts) -> Cut:
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

    def _leaves(self, value: str, chosen: Choice) -> tuple[str, ...]:
        cut = chosen[value]
        if cut is None:
            return self.graph.producer[value].inputs
        return tuple(dict.fromkeys(name for form in cut.parts for name in form.terms))

    def _value_cost(self, value: str, chosen: Choice) -> Cost:
        cut = chosen[value]
        return self.graph.producer[value].cost if cut is None else cut.cost

    def _computed(self, roots: tuple[str, ...], chosen: Choice) -> set[str]:
        """The linear values that must be computed for ``roots``."""
        seen: set[str] = set()
        waiting = [name for name in roots if name in chosen]
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += [leaf for leaf in self._leaves(name, chosen) if leaf in chosen]
        return seen

    def _total(self, roots: tuple[str, ...], chosen: Choice) -> Cost:
        return total(self._value_cost(name, chosen) for name in self._computed(roots, chosen))

    # ---- search ----------------------------------------------------------------------------------

    def improve(self, component: list[str]) -> None:
        """Take improving steps within one connected set of linear values until there is none.

        What is chosen lists further cuts (see :meth:`_look_further`), with which the search goes on. The numbers
        of what is chosen are looked at last; a cut with weights that cannot be stored is struck from the list, and
        the search starts over."""
        while True:
            self._search(component)
            while self._look_further(component):
                self._search(component)
            unfit = [
                (name, cut)
                for name in component
                if (cut := self.chosen[name]) is not None and not can_be_stored(cut.parts, self.graph.largest)
            ]
            if not unfit:
                return
            for name, cut in unfit:
                refused = replace(cut, refusal=Refusal(NOT_FINITE))
                self.cuts[name] = [refused if other is cut else other for other in self.cuts[name]]
            self.chosen.update(dict.fromkeys(component))

    def _search(self, component: list[str]) -> None:
        required = frozenset(self.graph.required)
        roots = tuple(name for name in component if name in required)
        state = {name: self.chosen[name] for name in component}
        cost = self._total(roots, state)
        improved = True
        while improved:
            improved = False
            for name in reversed(component):
                while better := self._best_step(name, state, cost, roots):
                    state, cost = better
                    improved = True
        self.chosen.update(state)

    def _best_step(
        self, name: str, state: dict[str, Cut | None], before: Cost, roots: tuple[str, ...]
    ) -> tuple[dict[str, Cut | None], Cost] | None:
        """The step at ``name`` that leaves the fewest operators, the cheapest of these; None if none is better.

        The cheapest of all could be the sum of several convolutions where one behind a concatenation would do:
        the estimate takes the concatenation for dearer than it mostly is, and the way back is closed."""
        best: tuple[dict[str, Cut | None], Cost] | None = None
        for changes in self._steps(name, state, roots):
            changed = {**state, **changes}
            cost = self._total(roots, changed)
            if cost.estimate >= before.estimate or cost.is_dearer_than(before):
                continue
            if best is None or (cost.operators, cost.estimate) < (best[1].operators, best[1].estimate):
                best = changed, cost
        return best

    def _steps(self, name: str, state: Choice, roots: tuple[str, ...]) -> Iterator[dict[str, Cut | None]]:
        """Ways to change the choice at ``name``: another cut for it, or no longer computing it at all."""
        computed = self._computed(roots, state)
        if name not in computed:
            return
        inputs = frozenset(self.graph.producer[name].inputs)
        for cut in self.cuts[name]:
            if cut.leaves != inputs and cut.may_be_chosen:
                yield {name: cut}
                anew = self._anew(cut.leaves, computed)
                if anew:
                    yield {name: cut, **anew}
        if name in roots:
            return
        missing = self.chosen.keys() - computed
        for gone in self._with_its_views(name, computed, state, roots):
            readers = [v for v in computed - gone if not gone.isdisjoint(self._leaves(v, state))]
            if len(readers) > 1:
                yield from self._without(gone, readers, lambda cut: True)
                yield from self._without(gone, readers, lambda cut: cut.leaves.isdisjoint(missing))

    def _anew(self, leaves: frozenset[str], computed: set[str]) -> dict[str, Cut | None]:
        """The choices of least flow for those of ``leaves`` which nothing needed until now, and for what they need
        in turn: the ones that they had are of no account."""
        changes: dict[str, Cut | None] = {}
        waiting = list(leaves)
        while waiting:
            leaf = waiting.pop()
            if leaf in changes or leaf in computed or leaf not in self.chosen:
                continue
            cuts = [cut for cut in self.cuts[leaf] if cut.may_be_chosen]
            best = min(cuts, key=self._flow_of, default=None)
            if best is not None:
                changes[leaf] = best
                waiting += best.leaves
        return changes

    def _with_its_views(
        self, name: str, computed: set[str], state: Choice, roots: tuple[str, ...]
    ) -> Iterator[frozenset[str]]:
        """``name``, and ``name`` with the pieces of it that cost nothing: what reads those reads it."""
        yield frozenset([name])
        free = {v for v in computed if v not in roots and self._value_cost(v, state) == Cost()}
        pieces = free.intersection(v for v in computed if name in self._leaves(v, state))
        if pieces:
            yield frozenset([name, *pieces])

    def _without(
        self, gone: frozenset[str], readers: list[str], allowed: Callable[[Cut], bool]
    ) -> Iterator[dict[str, Cut | None]]:
        """No longer computing ``gone``: every reader takes the cheapest of its other cuts that are allowed.
        The cheapest of all may read what would have to be computed anew."""
        without: dict[str, Cut | None] = {}
        for reader in readers:
            cuts = [cut for cut in self.cuts[reader] if gone.isdisjoint(cut.leaves) and cut.may_be_chosen]
            options = [cut for cut in cuts if allowed(cut)]
            if not options:
                return
            without[reader] = min(options, key=lambda cut: cut.cost.estimate)
        yield without

    # ---- further cuts ----------------------------------------------------------------------------

    def _look_further(self, component: list[str]) -> bool:
        """List what the chosen cuts give when they are seen through what their leaves are computed from, which is
        what planning the folded model would look at; whether there is anything new.

        Lists of cuts are short, so the one that would join two choices may have been dropped from them."""
        required = frozenset(self.graph.required)
        computed = self._computed(tuple(name for name in component if name in required), self.chosen)
        before = sum(len(self.cuts[name]) for name in component)
        for name in component:
            if name in computed:
                node = self.graph.producer[name]
                for parts in self._seen_further(node):
                    self._list(name, self._cut(node, parts))
        return sum(len(self.cuts[name]) for name in component) > before

    def _list(self, name: str, cut: Cut) -> None:
        """Add a cut, unless there is one that reads the same and is not dearer."""
        for other in self.cuts[name]:
            alike = (len(other.parts) > 1, other.leaves) == (len(cut.parts) > 1, cut.leaves)
            if alike and other.cost.estimate <= cut.cost.estimate:
                return
        self.cuts[name].append(cut)

    def _seen_further(self, node: Node) -> Iterator[Parts]:
        chosen = self.chosen[node.output]
        if chosen is None:
            inputs = [self._whole(name) for name in node.inputs]
            leaves = self._leaf_forms(node)
            if len(leaves) == len(inputs):
                places = [place for place, form in enumerate(inputs) if form is not None]
                for some in [[place] for place in places] + ([places] if len(places) > 1 else []):
                    seen = [(inputs[place] if place in some else leaf) or leaf for place, leaf in enumerate(leaves)]
                    yield from self.builder.parts(node, [(form,) for form in seen])
            return
        for leaf in chosen.leaves:
            inner = self._whole(leaf)
            if inner is None:
                continue
            outer = [self.builder.seen_through(form, leaf, inner) for form in chosen.parts]
            parts = tuple(form for form in outer if isinstance(form, AffineForm))
            if len(parts) == len(outer):
                yield parts

    def _whole(self, name: str) -> AffineForm | None:
        """What a linear value is as it is computed now, if that is one form."""
        if name not in self.chosen:
            return None
        cut = self.chosen[name]
        if cut is not None:
            return cut.parts[0] if len(cut.parts) == 1 else None
        node = self.graph.producer[name]
        leaves = self._leaf_forms(node)
        form = self.builder.combine(node, leaves) if len(leaves) == len(node.inputs) else None
        return form if isinstance(form, AffineForm) else None

    # ---- result ----------------------------------------------------------------------------------

    def plan(self, evaluated: tuple[str, ...]) -> Plan:
        graph = self.graph
        computed = self._computed(graph.required, self.chosen)
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
                after += self._value_cost(node.output, self.chosen)
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
                for leaf in dict.fromkeys(self._leaves(node.output, self.chosen)):
                    if leaf in self.chosen:
                        yield Kept(*self._why_apart(leaf, node))

    def _why_apart(self, leaf: str, node: Node) -> tuple[str, str]:
        """Why ``leaf`` is not folded into what ``node`` gives."""
        producer = self.graph.producer[leaf]
        where = f"{producer.name} and {node.name}"
        leaves = frozenset(self._leaves(node.output, self.chosen))
        beyond = (leaves - {leaf}) | set(self._leaves(leaf, self.chosen))
        merging = [cut for cut in self.cuts[node.output] if cut.leaves <= beyond and not cut.is_concat]
        merged = [cut.cost for cut in merging if cut.refusal is None]
        if not merged and merging and merging[0].refusal is not None:
            return where, merging[0].refusal.reason
        if merged:
            apart = self._value_cost(node.output, self.chosen)
            readers = [reader.name for reader in self.graph.consumers[leaf]]
            if len(readers) > 1 or leaf in self.graph.required:
                return (
                    where,
                    f"what {producer.name} gives is needed elsewhere too, so folding it in would do it twice",
                )
            apart += self._value_cost(leaf, self.chosen)
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
            seen = [self.builder.leaf(name) for name in producer.inputs]
            unknown = next((form for form in seen if isinstance(form, Refusal)), None)
            if unknown is not None:
                return producer.name, unknown.reason
            known = self._leaf_forms(producer)
            own = self.builder.combine(producer, known)
            return (producer.name, own.reason) if isinstance(own, Refusal) else None
        forms = {leaf: carried}
        for node in cone:
            if not any(name in forms for name in node.inputs):
                continue
            inputs = [forms.get(name) or self._form_over(name, beyond) for name in node.inputs]
            solid = [form or direct for form, direct in zip(inputs, self._leaf_forms(node), strict=False)]
            combined = self.builder.combine(node, solid)
            if isinstance(combined, Refusal):
                return f"{producer.name} and {node.name}", combined.reason
            forms[node.output] = combined
        return None

    def _form_over(self, value: str, leaves: frozenset[str]) -> AffineForm | None:
        """The form of ``value`` over some of ``leaves``, the fewest."""
        cuts = self.cuts.get(value, ())
        return next((cut.parts[0] for cut in cuts if len(cut.parts) == 1 and cut.leaves <= leaves), None)

    def _leaf_forms(self, node: Node) -> list[AffineForm]:
        forms = [self.builder.leaf(name) for name in node.inputs]
        return [form for form in forms if isinstance(form, AffineForm)]


def _part(form: AffineForm, inside: list[Node]) -> Part:
    """A form as part of a region; ``inside`` are the nodes of the whole region, in the order of the graph."""
    own = [node for node in inside if node.name in form.nodes]
    biased = bool(np.any(form.bias)) or any(_is_biased(node) for node in own)
    return Part(form, biased, tuple(node.name for node in own))


def _is_biased(node: Node) -> bool:
    return isinstance(node.op, Affine) and node.op.biased
