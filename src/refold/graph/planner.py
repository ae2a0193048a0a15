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

from refold.algebra.affine import AffineConv
from refold.algebra.cost import Cost, convolution_cost, elementwise_cost
from refold.algebra.refusal import Refusal
from refold.graph.forms import NOT_FINITE, FormBuilder, can_be_stored, form_builder
from refold.graph.graph import Affine, AffineForm, Dialect, Graph, Node, Opaque
from refold.graph.plan import Kept, Plan
from refold.graph.region import Region

# How many cuts are remembered per value, and how many partial combinations while they are built.
MOST_CUTS = 10
MOST_COMBINATIONS = 32

NO_GAIN = "together they would not be cheaper"
_WORDS = {"multiply_adds": "multiply-adds", "operators": "operators", "bytes": "bytes of memory traffic"}

# How many operators beside the convolution itself a framework needs to say it, for an input of the given
# spatial sizes (a padding that its own convolution cannot express, say), or why it cannot say it.
Helpers = Callable[[AffineConv, tuple[int | None, ...]], int | Refusal]


def no_helpers(conv: AffineConv, space: tuple[int | None, ...]) -> int | Refusal:
    """For frameworks whose convolution has explicit paddings on both sides."""
    return 0


def make_plan(
    graph: Graph, helpers: Helpers = no_helpers, evaluated: tuple[str, ...] = (), notes: tuple[str, ...] = ()
) -> Plan:
    """The plan for ``graph``. ``evaluated`` names the layers whose weights the front end evaluated, ``notes`` are
    its sentences about the reading."""
    search = _Search(graph, form_builder(graph), helpers)
    search.list_cuts()
    for component in _components(graph):
        search.improve(component)
    return replace(search.plan(evaluated), notes=notes)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """One way to compute a value, straight from the leaves of ``form``, and what that costs.

    ``refusal`` says why the framework cannot say it; such a cut is never chosen, but larger ones may be
    built from it."""

    form: AffineForm
    cost: Cost
    refusal: Refusal | None = None

    @property
    def leaves(self) -> frozenset[str]:
        """The values that it reads."""
        return self.form.leaves


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

    # ---- cuts ------------------------------------------------------------------------------------

    def list_cuts(self) -> None:
        for node in self.graph.nodes:
            if not isinstance(node.op, Opaque):
                self.chosen[node.output] = None
                self.cuts[node.output] = self._cuts_of(node)

    def _cuts_of(self, node: Node) -> list[Cut]:
        best: dict[frozenset[str], Cut] = {}
        for forms in self._combinations(node):
            form = self.builder.combine(node, forms)
            if isinstance(form, Refusal):
                continue
            cut = self._cut(node.output, form)
            known = best.get(cut.leaves)
            if known is None or cut.cost.estimate < known.cost.estimate:
                best[cut.leaves] = cut
        ranked = sorted(best.values(), key=lambda cut: (len(cut.leaves), cut.cost.estimate))[:MOST_CUTS]
        one_step = best.get(frozenset(node.inputs))
        if one_step is not None and all(cut is not one_step for cut in ranked):
            ranked.append(one_step)
        return ranked

    def _combinations(self, node: Node) -> Iterator[tuple[AffineForm, ...]]:
        partial: list[tuple[frozenset[str], tuple[AffineForm, ...]]] = [(frozenset(), ())]
        for name in node.inputs:
            leaf = self.builder.leaf(name)
            if isinstance(leaf, Refusal):
                return
            options = [leaf, *(cut.form for cut in self.cuts.get(name, ()))]
            grown = [(seen | form.leaves, (*forms, form)) for seen, forms in partial for form in options]
            direct = grown[0]  # every input from itself: always kept, it is the original node
            grown.sort(key=lambda entry: len(entry[0]))
            partial = [direct, *(entry for entry in grown if entry is not direct)][:MOST_COMBINATIONS]
        for _, forms in partial:
            yield forms

    # ---- costs -----------------------------------------------------------------------------------

    def _cut(self, value: str, form: AffineForm) -> Cut:
        """``value`` computed from the leaves of ``form``."""
        output = self.graph.values[value]
        axis = self.builder.axes[value]
        positions = int(np.prod(_without(output.nominal, axis)))
        cost = Cost()
        refusal = None
        shapes = []
        bias_has_a_place = not np.any(form.bias)
        for name, term in form.terms.items():
            leaf = self.graph.values[name]
            axes = self.builder.axes[name], axis
            before, after, takes_bias = _turns(self.graph.dialect, term, *axes, len(output.shape))
            if before:
                cost += elementwise_cost([leaf.nominal], leaf.nominal, leaf.itemsize)
            if after:
                cost += elementwise_cost([output.nominal], output.nominal, output.itemsize)
            if not term.is_identity:
                helpers = self.helpers(term, self.builder.space(name))
                if isinstance(helpers, Refusal):
                    refusal, helpers = helpers, 0
                read = _padded(leaf.nominal, self.builder.axes[name], term) if helpers else leaf.nominal
                if helpers:
                    cost += elementwise_cost([leaf.nominal], read, leaf.itemsize)
                cost += Cost(operators=max(helpers - 1, 0))
                cost += convolution_cost(term, int(np.prod(read)), positions, leaf.itemsize)
                bias_has_a_place = bias_has_a_place or takes_bias
            shapes.append(output.nominal)
        if len(shapes) > 1:
            cost += elementwise_cost(shapes, output.nominal, output.itemsize)
        if not bias_has_a_place:
            cost += elementwise_cost([output.nominal], output.nominal, output.itemsize)
        return Cut(form, cost, refusal)

    def _leaves(self, value: str, chosen: Choice) -> tuple[str, ...]:
        cut = chosen[value]
        return tuple(cut.form.terms) if cut is not None else self.graph.producer[value].inputs

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
        total = Cost()
        for name in self._computed(roots, chosen):
            total += self._value_cost(name, chosen)
        return total

    # ---- search ----------------------------------------------------------------------------------

    def improve(self, component: list[str]) -> None:
        """Take improving steps within one connected set of linear values until there is none.

        The numbers of what is chosen are looked at last; a cut with weights that cannot be stored is
        struck from the list, and the search starts over."""
        while True:
            self._search(component)
            unfit = [
                (name, cut)
                for name in component
                if (cut := self.chosen[name]) is not None and not can_be_stored(cut.form, self.graph.largest)
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
        total = self._total(roots, state)
        improved = True
        while improved:
            improved = False
            for name in reversed(component):
                for changes in self._steps(name, state, roots):
                    changed = {**state, **changes}
                    cost = self._total(roots, changed)
                    if cost.estimate < total.estimate and not cost.is_dearer_than(total):
                        state, total, improved = changed, cost, True
        self.chosen.update(state)

    def _steps(self, name: str, state: Choice, roots: tuple[str, ...]) -> Iterator[dict[str, Cut | None]]:
        """Ways to change the choice at ``name``: another cut for it, or no longer computing it at all."""
        computed = self._computed(roots, state)
        if name not in computed:
            return
        inputs = frozenset(self.graph.producer[name].inputs)
        for cut in self.cuts[name]:
            if cut.leaves != inputs and cut.refusal is None:
                yield {name: cut}
        if name in roots:
            return
        readers = [other for other in computed if name in self._leaves(other, state)]
        if len(readers) > 1:
            missing = self.chosen.keys() - computed
            yield from self._without(name, readers, lambda cut: True)
            yield from self._without(name, readers, lambda cut: cut.leaves.isdisjoint(missing))

    def _without(
        self, name: str, readers: list[str], allowed: Callable[[Cut], bool]
    ) -> Iterator[dict[str, Cut | None]]:
        """No longer computing ``name``: every reader takes the cheapest of its other cuts that are allowed.
        The cheapest of all may read what would have to be computed anew."""
        without: dict[str, Cut | None] = {}
        for reader in readers:
            cuts = [cut for cut in self.cuts[reader] if name not in cut.leaves and cut.refusal is None]
            options = [cut for cut in cuts if allowed(cut)]
            if not options:
                return
            without[reader] = min(options, key=lambda cut: cut.cost.estimate)
        yield without

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
            cone = self._cone(node.output, cut.leaves)
            before = node.cost
            for inner in cone:
                if inner.name in removed and inner.name not in claimed:
                    claimed.add(inner.name)
                    before += inner.cost
            regions.append(
                Region(
                    value=node.output,
                    form=cut.form,
                    biased=bool(np.any(cut.form.bias)) or any(_is_biased(inner) for inner in cone),
                    nodes=tuple(inner.name for inner in cone),
                    before=before,
                    after=cut.cost,
                )
            )
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
        for region in regions:
            terms = [term for term in region.form.terms.values() if not term.is_identity]
            total += sum(term.size for term in terms)
            total += region.form.bias.size if terms and region.biased else 0
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
            elif node.output in computed:
                for leaf in dict.fromkeys(self._leaves(node.output, self.chosen)):
                    if leaf in self.chosen:
                        yield Kept(*self._why_apart(leaf, node))

    def _why_apart(self, leaf: str, node: Node) -> tuple[str, str]:
        """Why ``leaf`` is not folded into what ``node`` gives."""
        producer = self.graph.producer[leaf]
        where = f"{producer.name} and {node.name}"
        leaves = frozenset(self._leaves(node.output, self.chosen))
        beyond = (leaves - {leaf}) | set(self._leaves(leaf, self.chosen))
        merging = [cut for cut in self.cuts[node.output] if cut.leaves <= beyond]
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
            known = self._leaf_forms(producer)
            if len(known) < len(producer.inputs):
                return producer.name, "the number of channels that it reads is not known"
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
        return next((cut.form for cut in self.cuts.get(value, ()) if cut.leaves <= leaves), None)

    def _leaf_forms(self, node: Node) -> list[AffineForm]:
        forms = [self.builder.leaf(name) for name in node.inputs]
        return [form for form in forms if isinstance(form, AffineForm)]


def _turns(dialect: Dialect, conv: AffineConv, axis_in: int, axis_out: int, rank: int) -> tuple[bool, bool, bool]:
    """Whether the tensor is turned around before ``conv`` and after it, so that its channels come from
    ``axis_in`` and end at ``axis_out``; and whether the operator for ``conv`` takes a bias."""
    if conv.is_scale:
        return axis_in != axis_out, False, dialect.biased
    if dialect.conv_axis is None:
        return axis_in != axis_out, False, True
    if axis_in == axis_out == rank - 1 != dialect.conv_axis and conv.is_pointwise and conv.groups == 1:
        return False, False, dialect.biased  # a dense layer
    return axis_in != dialect.conv_axis, axis_out != dialect.conv_axis, True


def _padded(shape: tuple[int, ...], axis: int, conv: AffineConv) -> tuple[int, ...]:
    """The shape of a tensor after the padding (or cropping) of ``conv`` as an operator of its own."""
    windows = iter(conv.windows)
    grown = []
    for place, size in enumerate(shape):
        window = None if place in (0, axis) else next(windows)
        grown.append(size if window is None else size + window.before + window.after)
    return tuple(grown)


def _is_biased(node: Node) -> bool:
    return isinstance(node.op, Affine) and node.op.biased


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return tuple(size for place, size in enumerate(shape) if place not in (0, axis))


def _components(graph: Graph) -> list[list[str]]:
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
