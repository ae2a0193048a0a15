"""Functions that exporters write as several operators, and runtimes run as one.

GELU and the normalization of layers reach a runtime in pieces, and it puts them together again by their pattern. A
factor of such a pattern that was folded into its neighbor would be saved, and the pattern lost: the whole would be
slower. So these pieces stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import pi, sqrt
from typing import final

import numpy as np
import onnx_ir as ir

from refold.onnx.sizes import Survey

GELU = "it is a piece of a GELU, which runtimes run as one operator"
NORMALIZATION = "it is a piece of a layer normalization, which runtimes run as one operator"

# How far a constant of a pattern may be from its number: exporters store few digits.
_NEAR = 1e-3

_MOST_IDENTITIES = 8


def compounds(graph: ir.Graph, survey: Survey) -> Mapping[int, str]:
    """Why nodes of ``graph`` stay apart, by their identity: those that are pieces of a pattern."""
    reading = _Reading(survey)
    found: dict[int, str] = {}
    for node in graph:
        if node.domain not in ("", "ai.onnx"):
            continue
        match node.op_type:
            case "Erf" | "Tanh":
                found.update((id(piece), GELU) for piece in reading.gelu(node))
            case "Div" | "Mul":
                found.update((id(piece), NORMALIZATION) for piece in reading.normalization(node))
    return found


@final
@dataclass(frozen=True)
class _Reading:
    survey: Survey

    def gelu(self, middle: ir.Node) -> list[ir.Node]:
        """The linear pieces of ``0.5 x (1 + erf(x / sqrt(2)))``, or of its approximation with tanh
        (https://arxiv.org/abs/1606.08415), around the operator in its middle."""
        factor = sqrt(2 / pi) if middle.op_type == "Tanh" else sqrt(0.5)
        before = self._made_by(middle.inputs[0])
        if before is None or not self._scales(before, factor):
            return []
        for plus in self._readers(middle):
            if plus.op_type != "Add" or not self._is_number(self._constant_of(plus), 1.0):
                continue
            around = [*self._readers(plus), *(far for near in self._readers(plus) for far in self._readers(near))]
            products = [node for node in around if node.op_type == "Mul" and self._constant_of(node) is None]
            for product in products:
                near = [*(self._made_by(value) for value in product.inputs), *self._readers(product)]
                halves = [node for node in near if node is not None and self._scales(node, 0.5)]
                if halves:
                    return [before, plus, *halves]
        return []

    def normalization(self, division: ir.Node) -> list[ir.Node]:
        """The factor and the shift behind a division by the root of a mean of squares, if there are any."""
        if self._constant_of(division) is not None or not any(map(self._is_root, division.inputs)):
            return []
        found = []
        last = division
        for kind in ("Mul", "Add"):
            readers = list(self._readers(last))
            if len(readers) != 1 or readers[0].op_type != kind or self._constant_of(readers[0]) is None:
                break
            last = readers[0]
            found.append(last)
        return found

    def _is_root(self, value: ir.Value | None) -> bool:
        """Whether a value is ``sqrt(mean + epsilon)``, or one by that."""
        node = self._made_by(value)
        if node is not None and node.op_type in ("Reciprocal", "Div"):
            node = self._made_by(node.inputs[-1])
        if node is None or node.op_type != "Sqrt":
            return False
        plus = self._made_by(node.inputs[0])
        if plus is None or plus.op_type != "Add" or self._constant_of(plus) is None:
            return False
        means = [self._made_by(read) for read in plus.inputs]
        return any(mean is not None and mean.op_type == "ReduceMean" for mean in means)

    # ---- around a node ---------------------------------------------------------------------------

    def _made_by(self, value: ir.Value | None) -> ir.Node | None:
        """What gives a value, identities aside."""
        node = None if value is None else value.producer()
        for _ in range(_MOST_IDENTITIES):
            if node is None or not self._is_identity(node):
                break
            source = node.inputs[0]
            node = None if source is None else source.producer()
        return node

    def _readers(self, node: ir.Node, depth: int = 0) -> Iterator[ir.Node]:
        """The nodes that read what a node gives, identities aside."""
        for reader in node.outputs[0].consumers():
            if not self._is_identity(reader):
                yield reader
            elif depth < _MOST_IDENTITIES:
                yield from self._readers(reader, depth + 1)

    def _is_identity(self, node: ir.Node) -> bool:
        if node.op_type == "Cast":
            return self.survey.of(node.inputs[0]).dtype == self.survey.of(node.outputs[0]).dtype
        return node.op_type == "Identity"

    def _constant_of(self, node: ir.Node) -> ir.Value | None:
        return next(
            (value for value in node.inputs if value is not None and self.survey.of(value).is_constant), None
        )

    def _scales(self, node: ir.Node, factor: float) -> bool:
        """Whether a node multiplies by ``factor``."""
        if node.op_type == "Div" and node.inputs[0] is not self._constant_of(node):
            return self._is_number(self._constant_of(node), 1.0 / factor)
        return node.op_type == "Mul" and self._is_number(self._constant_of(node), factor)

    def _is_number(self, value: ir.Value | None, number: float) -> bool:
        if value is None:
            return False
        facts = self.survey.of(value)
        return facts.shapes[0] in ((), (1,)) and abs(float(np.ravel(facts.array())[0]) - number) < _NEAR * number
