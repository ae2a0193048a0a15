"""Digests of a model: what it stores, and how it is wired."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np

from refold.frontend import AnyArray, Lifted, Reference
from refold.graph.graph import Affine, Opaque
from refold.proof.certificate import Digests


@final
@dataclass(frozen=True, slots=True)
class Key:
    """What an operator is: its kind with all settings, and for each parameter its type, shape and
    digest. ``unseen`` says why two that are equal are not proved to be the same function."""

    kind: str
    parameters: tuple[tuple[str, tuple[int, ...], str], ...]
    unseen: str = ""

    def is_edit_of(self, other: Key) -> bool:
        """The same operator with parameters of the same shapes, but other numbers in them."""
        shapes, others = ([p[1] for p in key.parameters] for key in (self, other))
        return self != other and self.kind == other.kind and shapes == others


@final
@dataclass(eq=False)
class Keys:
    """The keys of the nodes of one model, computed once."""

    frontend: Reference
    lifted: Lifted
    known: dict[str, Key] = field(default_factory=dict)

    def of(self, node: str) -> Key:
        """The key of a node."""
        if node not in self.known:
            found = self.frontend.identity(self.lifted, node)
            self.known[node] = Key(found.kind, tuple(map(_parameter, found.parameters)), found.unseen)
        return self.known[node]


def _parameter(array: AnyArray) -> tuple[str, tuple[int, ...], str]:
    return str(array.dtype), tuple(np.shape(array)), hashlib.sha256(_bytes(array).data).hexdigest()


def digests(lifted: Lifted, keys: Keys) -> Digests:
    """The digests of a model. Names do not count, wiring does."""
    graph = lifted.graph
    number = {name: place for place, name in enumerate(graph.inputs)}
    for node in graph.nodes:
        for name in node.outputs:
            number[name] = len(number)
    parameters, structure = hashlib.sha256(), hashlib.sha256()
    for name in graph.inputs:
        _tell(structure, "input", graph.values[name].shape, graph.values[name].dtype)
    for node in graph.nodes:
        wiring = [number[name] for name in node.inputs], [number[name] for name in node.outputs]
        match node.op:
            case Opaque():
                key = keys.of(node.name)
                _tell(structure, "opaque", key.kind, [p[:2] for p in key.parameters], *wiring)
                _tell(parameters, key.parameters)
            case Affine(conv, axis):
                _tell(structure, "affine", conv.weights.shape, conv.windows, conv.groups, axis, *wiring)
                _tell(parameters, _parameter(conv.kernel), _parameter(conv.bias))
            case op:
                _tell(structure, repr(op), *wiring)
    for name in (name for name in graph.outputs if name not in number):  # a constant
        _tell(parameters, _parameter(keys.frontend.evaluate(lifted, {}, [name])[name]))
    _tell(structure, [number.get(name) for name in graph.outputs])
    return Digests(parameters.hexdigest(), structure.hexdigest())


def _tell(digest: Any, *facts: Any) -> None:
    digest.update(repr(facts).encode())


def same_parameters(first: Sequence[AnyArray], second: Sequence[AnyArray]) -> bool:
    """Whether all arrays are byte for byte the same."""
    return len(first) == len(second) and all(
        one.dtype == two.dtype and one.shape == two.shape and np.array_equal(_bytes(one), _bytes(two))
        for one, two in zip(first, second, strict=True)
    )


def _bytes(array: AnyArray) -> AnyArray:
    return np.ascontiguousarray(array).view(np.uint8)
