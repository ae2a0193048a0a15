"""What stays the user's own when a plan is followed: modules that are called whole, and what is read then."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

from refold.graph.graph import Graph
from refold.graph.plan import Plan
from refold.recording.steps import Scope
from refold.recording.symbols import Symbol, leaves, symbols
from refold.torch.lift import evaluated
from refold.torch.record import Record
from refold.torch.trace import Step


@final
@dataclass(eq=False)
class Staying:
    """Which modules stay whole (``whole``, by the identities of their calls), and which values are needed then.
    ``inside`` holds the steps inside of each call."""

    graph: Graph
    record: Record
    plan: Plan
    model: Any
    inside: dict[int, list[Step]] = field(default_factory=dict)
    whole: dict[int, Scope] = field(default_factory=dict)
    needed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.inside: dict[int, list[Step]] = {}
        self.readers: dict[str, set[int]] = {}
        for step in self.record.trace.steps:
            for scope in step.scope.chain if step.scope else []:
                self.inside.setdefault(id(scope), []).append(step)
            for symbol in (*step.reads, *self.record.open_sizes(step)):
                self.readers.setdefault(symbol.name, set()).add(id(step))
        # What is read by whatever happens to the steps.
        self.kept = {leaf for region in self.plan.regions for leaf in region.leaves}
        self.kept |= {symbol.name for symbol in symbols(self.record.trace.outputs)}

    def decide(self) -> None:
        """Find the modules that stay whole, and the values that are needed then."""
        trace = self.record.trace
        changed = {region.value for region in self.plan.regions} | self.plan.removed
        refused = {
            id(around) for scope in trace.scopes if self.must_be_taken_apart(scope) for around in scope.chain
        }
        for scope in trace.scopes:
            if scope.parent is not None and id(scope.parent) in self.whole:
                self.whole[id(scope)] = self.whole[id(scope.parent)]
            elif id(scope) not in refused and self._is_untouched(scope, changed):
                self.whole[id(scope)] = scope
        waiting = [symbol.name for symbol in symbols(trace.outputs)]
        while waiting:
            value = waiting.pop()
            if value not in self.needed:
                self.needed.add(value)
                waiting += self._sources(value)

    def must_be_taken_apart(self, scope: Scope) -> bool:
        """Modules whose weights are computed become plain ones, and refold's own never stay."""
        if type(scope.module).__module__.startswith("refold."):
            return True
        own = [step for step in self.inside.get(id(scope), []) if step.scope is scope]
        return any(evaluated(self.graph, step) for step in own)

    def _is_untouched(self, scope: Scope, changed: set[str]) -> bool:
        inside = self.inside.get(id(scope), [])
        if scope.module is self.model or not inside or not _is_plain_nest(scope.outputs):
            return False
        results = {symbol.name for symbol in symbols(scope.outputs)}
        values = {symbol.name for step in inside for symbol in step.gives}
        if values & changed:
            return False
        numbers = {id(step) for step in inside}
        hidden = values - results
        if hidden & self.kept or any(self.readers.get(value, set()) - numbers for value in hidden):
            return False
        given = {symbol.name for symbol in symbols((scope.args, scope.kwargs))}
        written = {step.reads[0].name for step in inside if step.writes and step.reads}
        return written <= values | given

    def _sources(self, value: str) -> list[str]:
        region = self.plan.chosen.get(value)
        if region is not None:
            return list(region.leaves)
        step = self.record.owners.get(value)
        if step is None:
            return []
        scope = self.whole_scope(step)
        if scope is not None:
            return [symbol.name for symbol in symbols((scope.args, scope.kwargs))]
        return [symbol.name for symbol in (*step.reads, *self.record.open_sizes(step))]

    def whole_scope(self, step: Step) -> Scope | None:
        """The outermost module around a step that stays whole, if one does."""
        return self.whole.get(id(step.scope)) if step.scope else None


def _is_plain_nest(nest: Any) -> bool:
    """Whether everything in a nest is a tensor or a simple value."""
    return all(isinstance(leaf, Symbol | int | float | str | None) for leaf in leaves(nest))
