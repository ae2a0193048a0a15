"""Which operator of one model is which of the other.

Operators that are not linear must be the same ones in both. They are paired by what they are (kind,
settings, parameters), and among equals by what they give on a random input. A wrong pairing can make a
proof fail, but not succeed: what the paired operators read is proved to be equal afterwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np

from refold.errors import InputError
from refold.frontend import AnyArray, Frontend, Lifted
from refold.graph.graph import Graph, Node, Opaque

# Two values closer than this (relative to their size) on a random input are taken for counterparts.
CLOSE = 1e-4


@final
@dataclass(frozen=True, eq=False)
class Pairing:
    """The pairs of opaque nodes, in the order of the first graph, and those left over on both sides."""

    nodes: tuple[tuple[Node, Node], ...]
    left_before: tuple[Node, ...]
    left_after: tuple[Node, ...]


def digest(frontend: Frontend, lifted: Lifted, node: Node) -> str:
    """A digest of what an opaque node is: its kind and settings, and its parameters to the bit."""
    identity = frontend.identity(lifted, node.name)
    state = hashlib.sha256(identity.kind.encode())
    for parameter in identity.parameters:
        array = np.ascontiguousarray(parameter)
        state.update(f"{array.dtype}{array.shape}".encode())
        state.update(array.tobytes())
    return state.hexdigest()


def pair_up(frontend: Frontend, before: Lifted, after: Lifted, probe: Mapping[str, AnyArray]) -> Pairing:
    """Pair the opaque nodes of two models; ``probe`` feeds the inputs of the first."""
    values_before = _values(frontend, before, probe)
    renamed = dict(zip(after.graph.inputs, (probe[name] for name in before.graph.inputs), strict=True))
    values_after = _values(frontend, after, renamed)
    free: dict[str, list[Node]] = {}
    for node in opaque_nodes(after.graph):
        free.setdefault(digest(frontend, after, node), []).append(node)
    pairs: list[tuple[Node, Node]] = []
    left: list[Node] = []
    for node in opaque_nodes(before.graph):
        candidates = [
            other
            for other in free.get(digest(frontend, before, node), ())
            if len(other.inputs) == len(node.inputs) and len(other.outputs) == len(node.outputs)
        ]
        if not candidates:
            left.append(node)
            continue

        def distance(other: Node, node: Node = node) -> tuple[bool, bool]:
            far = _distance(values_before.get(node.outputs[0]), values_after.get(other.outputs[0])) > CLOSE
            return far, other.name != node.name

        chosen = min(candidates, key=distance)
        free[digest(frontend, before, node)].remove(chosen)
        pairs.append((node, chosen))
    return Pairing(tuple(pairs), tuple(left), tuple(node for nodes in free.values() for node in nodes))


def opaque_nodes(graph: Graph) -> list[Node]:
    """The nodes that are not linear and give something."""
    return [node for node in graph.nodes if isinstance(node.op, Opaque) and node.outputs]


def _values(frontend: Frontend, lifted: Lifted, feeds: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
    wanted = [node.outputs[0] for node in opaque_nodes(lifted.graph)]
    try:
        return frontend.evaluate(lifted, feeds, wanted)
    except InputError:
        return {}  # then equals are told apart by name and order only


def _distance(one: AnyArray | None, other: AnyArray | None) -> float:
    if one is None or other is None:
        return 0.0
    if one.shape != other.shape:
        return float("inf")
    if one.dtype.kind != "f" or one.size == 0:
        return 0.0 if np.array_equal(one, other) else float("inf")
    scale = max(float(np.abs(one).max()), 1e-30)
    gap = float(np.abs(one - other).max()) / scale
    return gap if np.isfinite(gap) else float("inf")
