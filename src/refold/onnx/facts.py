"""What is known of one tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import numpy as np
import onnx_ir as ir

from refold.onnx.reference import AnyArray, to_double

Sizes = tuple[int, ...]


@final
@dataclass(frozen=True, eq=False)
class Facts:
    """What is known of a tensor. ``dtype`` is numpy's name of its type, empty where it is no tensor or not
    known. ``shapes`` holds its shape for each set of sizes, None where that cannot be told; ``numbers``
    likewise its numbers (floating ones in float64). ``free`` marks those that depend on sizes that are not
    known. ``stored`` is the tensor of the file behind a constant, or a :class:`Computed` one; ``arithmetic`` says
    that it is computed from stored ones by more than moving them."""

    dtype: str
    shapes: tuple[Sizes | None, ...]
    numbers: tuple[AnyArray, ...] | None = None
    free: AnyArray | None = None
    stored: Any = None
    arithmetic: bool = False

    @property
    def rank(self) -> int | None:
        """The number of axes."""
        first = self.shapes[0]
        return None if first is None or any(s is None or len(s) != len(first) for s in self.shapes) else len(first)

    @cached_property
    def shape(self) -> tuple[int | None, ...] | None:
        """The shape, with None for sizes that are not known."""
        if self.rank is None:
            return None
        known = [shape for shape in self.shapes if shape is not None]
        return tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*known, strict=True))

    @property
    def is_constant(self) -> bool:
        """Whether its numbers are the same at all sizes."""
        return self.stored is not None or (self.numbers is not None and self.free is None)

    def array(self) -> AnyArray:
        """The numbers of a constant."""
        return self.numbers[0] if self.numbers is not None else to_double(_read(self.stored))

    def as_stored(self) -> AnyArray:
        """The numbers of a constant in the type that they are stored in."""
        return self.numbers[0] if self.numbers is not None else _read(self.stored)

    def at(self, place: int) -> AnyArray | None:
        """Its numbers at one set of sizes."""
        if self.numbers is not None:
            return self.numbers[place % len(self.numbers)]
        return None if self.stored is None else self.array()


def _read(tensor: Any) -> AnyArray:
    """The numbers of a stored tensor. What of a file lies in memory to be read is let go of again."""
    if not isinstance(tensor, ir.ExternalTensor) or tensor.raw is not None:
        return np.asarray(tensor.numpy())
    array = np.array(tensor.numpy())
    tensor.release()
    return array


@final
@dataclass(frozen=True, eq=False)
class Computed:
    """A large constant that follows from others, computed whenever it is read: it stands where a stored
    tensor would. ``run`` gives its numbers."""

    run: Callable[[], AnyArray]

    def numpy(self) -> AnyArray:
        """Its numbers."""
        return self.run()
