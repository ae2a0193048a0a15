"""What the front end remembers of a lifted model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, final

import onnx_ir as ir

from refold.onnx.lift import Record
from refold.onnx.reference import AnyArray
from refold.onnx.subgraphs import Scope, captured_values

# Bytes of constants in float64 that are kept.
_MOST_KEPT = 2**26


@final
@dataclass(eq=False)
class Recent:
    """The arrays that were used last, by a number; together they have ``most`` bytes at most."""

    most: int = _MOST_KEPT
    arrays: dict[int, AnyArray] = field(default_factory=dict)
    size: int = 0

    def get(self, key: int) -> AnyArray | None:
        """The array of that number, if it is still known."""
        array = self.arrays.pop(key, None)
        if array is not None:
            self.arrays[key] = array
        return array

    def put(self, key: int, array: AnyArray) -> None:
        """Know one more; those that were not used for the longest time are forgotten for it."""
        self.arrays[key] = array
        self.size += array.nbytes
        while self.size > self.most:
            self.size -= self.arrays.pop(next(iter(self.arrays))).nbytes


@final
@dataclass(eq=False)
class Session:
    """A lifted model, and what was found out about running it."""

    record: Record
    gives_proto: bool
    constants: Recent = field(default_factory=lambda: Recent())
    runtimes: dict[bool, Any] = field(default_factory=dict)  # by whether it may optimize the graph
    is_bounded: bool | None = None  # whether loops are known to end soon; None: nobody has looked
    endless: dict[int, str] = field(default_factory=dict)  # see :class:`refold.onnx.control.Runner`
    lists: dict[int, tuple[ir.Node, ...]] = field(default_factory=dict)

    def is_constant(self, value: ir.Value) -> bool:
        """Whether a value is known to be a constant; of bodies that were not looked into nothing is known."""
        facts = self.record.survey.facts.get(id(value))
        return facts is not None and facts.is_constant

    def reads(self, node: ir.Node) -> tuple[ir.Value, ...]:
        """What a node reads that is no constant, its subgraphs included."""
        given = (*node.inputs, *self.captured(node))
        return tuple(value for value in given if value is not None and not self.is_constant(value))

    def captured(self, node: ir.Node) -> tuple[ir.Value, ...]:
        """What the subgraphs of a node read from outside of them."""
        if id(node) not in self._captured:
            self._captured[id(node)] = tuple(captured_values(node))
        return self._captured[id(node)]

    @cached_property
    def _captured(self) -> dict[int, tuple[ir.Value, ...]]:
        return {}

    @cached_property
    def places(self) -> dict[int, int]:
        """The place of every node in the order of the model, by identity, those of bodies before the one that runs
        them; and of every body (by the identity of its scope), before its nodes."""
        return {id(step): place for place, step in enumerate(self._steps(self.record.scopes[0]))}

    def _steps(self, scope: Scope) -> Iterator[ir.Node | Scope]:
        for node in scope.graph:
            for inner in self.inside.get(id(node), ()):
                yield inner
                yield from self._steps(inner)
            yield node

    @cached_property
    def inside(self) -> dict[int, list[Scope]]:
        """The scopes of the bodies of each node that was looked into, by its identity."""
        found: dict[int, list[Scope]] = {}
        for scope in self.record.scopes:
            if scope.body is not None:
                found.setdefault(id(scope.body.owner), []).append(scope)
        return found

    def needed(self, graph: ir.Graph) -> tuple[ir.Node, ...]:
        """The nodes of a graph that its outputs need, in order."""
        if id(graph) not in self.lists:
            waiting = list(graph.outputs)
            inside = {id(node) for node in graph}
            needed: set[int] = set()
            while waiting:
                value = waiting.pop()
                node = value.producer()
                if node is None or id(node) not in inside or id(node) in needed or self.is_constant(value):
                    continue
                needed.add(id(node))
                waiting += self.reads(node)
            self.lists[id(graph)] = tuple(node for node in graph if id(node) in needed)
        return self.lists[id(graph)]
