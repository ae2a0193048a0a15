"""Which affine forms to materialize: the cheapest exact way that is dearer in nothing.

This is what technology mapping does with gates. For every linear value the possible *cuts* are listed:
sets of other values from which it can be computed by its affine form. The search starts at the model as
it is and takes steps that lower the estimated cost and raise neither multiply-adds nor operators, so
whatever it ends at is never worse than the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import final

from refold.algebra.cost import Cost
from refold.algebra.refusal import Refusal
from refold.graph import choice
from refold.graph.choice import Choice
from refold.graph.components import components
from refold.graph.cuts import Cut, Cuts, list_cuts
from refold.graph.form_cost import Helpers, no_helpers
from refold.graph.forms import NOT_FINITE, Parts, can_be_stored
from refold.graph.graph import AffineForm, Graph, Node
from refold.graph.moving import with_maps_moved
from refold.graph.outcome import outcome
from refold.graph.plan import Plan


def make_plan(
    graph: Graph, helpers: Helpers = no_helpers, evaluated: tuple[str, ...] = (), notes: tuple[str, ...] = ()
) -> Plan:
    """The plan for ``graph``. ``evaluated`` names the layers whose weights the front end evaluated, ``notes`` are
    its sentences about the reading."""

    def planned(graph: Graph) -> Plan:
        search = _Search(graph, list_cuts(graph, helpers))
        for component in components(graph):
            search.improve(component)
        return outcome(search.cuts, search.chosen, evaluated)

    return replace(with_maps_moved(planned(graph), planned), notes=notes)


@final
@dataclass
class _Search:
    """The state of one planning: the cuts of every linear value and the one chosen now."""

    graph: Graph
    cuts: Cuts
    chosen: dict[str, Cut | None] = field(init=False)

    def __post_init__(self) -> None:
        self.chosen = dict.fromkeys(self.cuts.of)

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
                self.cuts.refuse(name, cut, Refusal(NOT_FINITE))
            self.chosen.update(dict.fromkeys(component))

    def _search(self, component: list[str]) -> None:
        required = frozenset(self.graph.required)
        roots = tuple(name for name in component if name in required)
        state = {name: self.chosen[name] for name in component}
        cost = choice.total_cost(self.graph, state, roots)
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
            cost = choice.total_cost(self.graph, changed, roots)
            if cost.estimate >= before.estimate or cost.is_dearer_than(before):
                continue
            if best is None or (cost.operators, cost.estimate) < (best[1].operators, best[1].estimate):
                best = changed, cost
        return best

    def _steps(self, name: str, state: Choice, roots: tuple[str, ...]) -> Iterator[dict[str, Cut | None]]:
        """Ways to change the choice at ``name``: another cut for it, or no longer computing it at all."""
        computed = choice.computed(self.graph, state, roots)
        if name not in computed:
            return
        inputs = frozenset(self.graph.producer[name].inputs)
        for cut in self.cuts.of[name]:
            if cut.leaves != inputs and cut.may_be_chosen:
                yield {name: cut}
                anew = self._anew(cut.leaves, computed)
                if anew:
                    yield {name: cut, **anew}
        if name in roots:
            return
        missing = self.chosen.keys() - computed
        for gone in self._with_its_views(name, computed, state, roots):
            readers = [v for v in computed - gone if not gone.isdisjoint(choice.leaves(self.graph, state, v))]
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
            cuts = [cut for cut in self.cuts.of[leaf] if cut.may_be_chosen]
            best = min(cuts, key=self.cuts.flow_of, default=None)
            if best is not None:
                changes[leaf] = best
                waiting += best.leaves
        return changes

    def _with_its_views(
        self, name: str, computed: set[str], state: Choice, roots: tuple[str, ...]
    ) -> Iterator[frozenset[str]]:
        """``name``, and ``name`` with the pieces of it that cost nothing: what reads those reads it."""
        yield frozenset([name])
        free = {v for v in computed if v not in roots and choice.value_cost(self.graph, state, v) == Cost()}
        pieces = free.intersection(v for v in computed if name in choice.leaves(self.graph, state, v))
        if pieces:
            yield frozenset([name, *pieces])

    def _without(
        self, gone: frozenset[str], readers: list[str], allowed: Callable[[Cut], bool]
    ) -> Iterator[dict[str, Cut | None]]:
        """No longer computing ``gone``: every reader takes the cheapest of its other cuts that are allowed.
        The cheapest of all may read what would have to be computed anew."""
        without: dict[str, Cut | None] = {}
        for reader in readers:
            cuts = [cut for cut in self.cuts.of[reader] if gone.isdisjoint(cut.leaves) and cut.may_be_chosen]
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
        computed = choice.computed(self.graph, self.chosen, tuple(name for name in component if name in required))
        found = False
        for name in component:
            if name in computed:
                node = self.graph.producer[name]
                for parts in self._seen_further(node):
                    found = self.cuts.add(name, self.cuts.cut(node, parts)) or found
        return found

    def _seen_further(self, node: Node) -> Iterator[Parts]:
        chosen = self.chosen[node.output]
        if chosen is None:
            inputs = [self._whole(name) for name in node.inputs]
            leaves = self.cuts.leaf_forms(node)
            if len(leaves) == len(inputs):
                places = [place for place, form in enumerate(inputs) if form is not None]
                for some in [[place] for place in places] + ([places] if len(places) > 1 else []):
                    seen = [(inputs[place] if place in some else leaf) or leaf for place, leaf in enumerate(leaves)]
                    yield from self.cuts.builder.parts(node, [(form,) for form in seen])
            return
        for leaf in chosen.leaves:
            inner = self._whole(leaf)
            if inner is None:
                continue
            outer = [self.cuts.builder.seen_through(form, leaf, inner) for form in chosen.parts]
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
        leaves = self.cuts.leaf_forms(node)
        form = self.cuts.builder.combine(node, leaves) if len(leaves) == len(node.inputs) else None
        return form if isinstance(form, AffineForm) else None
