"""One node of a model with all that is known of it, as the readers of operators get it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import onnx_ir as ir

from refold.onnx.facts import Facts
from refold.onnx.reference import AnyArray


@final
@dataclass(frozen=True, eq=False)
class Step:
    """One node with what is known of its inputs and outputs; ``version`` is that of its operator set.
    ``output`` says which of its outputs is meant."""

    node: ir.Node
    version: int
    inputs: tuple[Facts | None, ...]
    outputs: tuple[Facts, ...]
    output: int = 0

    def input(self, place: int) -> Facts | None:
        """The facts of an input, None if it is left out."""
        return self.inputs[place] if place < len(self.inputs) else None

    def constant(self, place: int) -> AnyArray | None:
        """The numbers of an input; None if it is left out or no constant."""
        facts = self.input(place)
        return facts.array() if facts is not None and facts.is_constant else None

    def is_left_out(self, place: int) -> bool:
        """Whether an optional input is not there."""
        return self.input(place) is None

    @property
    def dynamic(self) -> list[int]:
        """The places of the inputs that are no constants."""
        return [place for place, facts in enumerate(self.inputs) if facts is not None and not facts.is_constant]

    @property
    def shape(self) -> tuple[int | None, ...]:
        """The shape of the output."""
        shape = self.outputs[self.output].shape
        assert shape is not None
        return shape

    def shape_in(self, place: int = 0) -> tuple[int | None, ...]:
        """The shape of an input."""
        facts = self.inputs[place]
        assert facts is not None
        assert facts.shape is not None
        return facts.shape

    def integer(self, name: str, default: int) -> int:
        """An attribute that is a whole number."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_int()

    def number(self, name: str, default: float) -> float:
        """An attribute that is a real number, as the 32 bits that are stored."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else float(np.float32(attribute.as_float()))

    def integers(self, name: str) -> tuple[int, ...] | None:
        """An attribute that is a list of whole numbers."""
        attribute = self.node.attributes.get(name)
        return None if attribute is None else tuple(attribute.as_ints())

    def word(self, name: str, default: str) -> str:
        """An attribute that is a word."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_string()
