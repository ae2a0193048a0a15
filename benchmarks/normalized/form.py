"""What is measured: a layer, and the forms that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final


@final
@dataclass(frozen=True)
class Layer:
    """A layer and what it is called with: a dense one with as many outputs as inputs, or a 3x3 convolution."""

    name: str
    channels: int
    batch: int
    size: int = 0  # of the image; a dense layer has none

    @property
    def dense(self) -> bool:
        return not self.size

    def shape(self, *, channels_last: bool = False) -> tuple[int, ...]:
        """The input's."""
        if self.dense:
            return (self.batch, self.channels)
        sides = (self.size, self.size)
        return (self.batch, *sides, self.channels) if channels_last else (self.batch, self.channels, *sides)


LAYERS = (
    Layer("dense 1024, batch 64", 1024, 64),
    Layer("dense 1024, batch 256", 1024, 256),
    Layer("conv 64, 3x3, 8 of 32x32", 64, 8, 32),
)


@final
@dataclass(frozen=True)
class Form:
    """One way of training the layer, and its step: forward, and backward to the parameters and the input.

    Forms of one ``method`` compute the same function, and are compared; ``plain`` is the form that it is the
    normalized one of.
    """

    name: str
    method: str
    plain: str
    step: Callable[[], Any]
