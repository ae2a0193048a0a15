"""What an operator costs: multiply-adds, bytes moved, operators launched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import final

from refold.algebra.affine import AffineConv

# What the three are worth against each other: a plain multiply-add, one byte to or from memory, and
# starting one operator, in nanoseconds on one core of a current CPU. Only their order of magnitude
# matters: a plan is never allowed to raise multiply-adds or operators, whatever the total says.
NANOSECONDS_PER_MULTIPLY_ADD = 0.03
NANOSECONDS_PER_BYTE = 0.1
NANOSECONDS_PER_OPERATOR = 5_000.0

# Fast convolutions work on this many channels at a time, and on the rest of them as if they were as many: two
# convolutions of 24 channels each take longer than one of 48.
CHANNELS_AT_ONCE = 16


@final
@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of computing one example (batch size 1). ``idle`` are the multiply-adds by which a convolution fills
    up its last block of channels; they are no work, but take their time."""

    multiply_adds: int = 0
    bytes: int = 0
    operators: int = 0
    idle: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.multiply_adds + other.multiply_adds,
            self.bytes + other.bytes,
            self.operators + other.operators,
            self.idle + other.idle,
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.multiply_adds - other.multiply_adds,
            self.bytes - other.bytes,
            self.operators - other.operators,
            self.idle - other.idle,
        )

    @property
    def estimate(self) -> float:
        """One number to compare plans by, in nanoseconds of a nominal machine."""
        return (
            (self.multiply_adds + self.idle) * NANOSECONDS_PER_MULTIPLY_ADD
            + self.bytes * NANOSECONDS_PER_BYTE
            + self.operators * NANOSECONDS_PER_OPERATOR
        )

    def is_dearer_than(self, other: Cost) -> bool:
        """More multiply-adds or more operators: a trade that no plan makes."""
        return self.multiply_adds > other.multiply_adds or self.operators > other.operators


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of costs."""
    multiply_adds = moved = operators = idle = 0
    for cost in costs:
        multiply_adds += cost.multiply_adds
        moved += cost.bytes
        operators += cost.operators
        idle += cost.idle
    return Cost(multiply_adds, moved, operators, idle)


@final
@dataclass(frozen=True, slots=True)
class Saving:
    """One thing that folding changes, counted before and after."""

    name: str
    before: int
    after: int

    @property
    def share(self) -> float:
        """After by before; 1 where there was nothing to begin with."""
        return self.after / self.before if self.before else 1.0


def savings(before: Cost, after: Cost, parameters: tuple[int, int]) -> tuple[Saving, ...]:
    """Two costs, and two numbers of parameters, side by side, the most tangible first."""
    return (
        Saving("operators", before.operators, after.operators),
        Saving("multiply-adds", before.multiply_adds, after.multiply_adds),
        Saving("bytes moved", before.bytes, after.bytes),
        Saving("parameters", *parameters),
    )


def convolution_cost(conv: AffineConv, input_elements: int, positions: int, itemsize: int) -> Cost:
    """The cost of one affine convolution as one operator.

    ``input_elements``: size of what it reads; ``positions``: output positions (product of the output's
    spatial sizes); ``itemsize``: bytes of one stored number. Multiply-adds count every tap, padded or not,
    but for the zeros between the inputs of a transposed convolution, which nobody multiplies.
    """
    weights = conv.size
    outputs = conv.channels_out * positions
    spread = prod(window.spread for window in conv.windows)
    filled_up = -conv.channels_in % CHANNELS_AT_ONCE if conv.windows and conv.groups == 1 else 0
    return Cost(
        multiply_adds=-(-outputs * conv.weights.shape[1] * conv.taps // spread),
        bytes=(input_elements + outputs + weights + conv.channels_out) * itemsize,
        operators=1,
        idle=outputs * filled_up * conv.taps // spread,
    )


def elementwise_cost(shapes_in: list[tuple[int, ...]], shape_out: tuple[int, ...], itemsize: int) -> Cost:
    """The cost of one operator that touches each element once (a sum, a concatenation, an activation).

    Combining ``n`` tensors counts ``n - 1`` multiply-adds per output element, moving them none.
    """
    outputs = prod(shape_out)
    reads = sum(prod(shape) for shape in shapes_in)
    return Cost(multiply_adds=(len(shapes_in) - 1) * outputs, bytes=(reads + outputs) * itemsize, operators=1)


def turn_cost(shape: tuple[int, ...], itemsize: int) -> Cost:
    """The cost of moving an axis of a tensor: half again what copying costs, for it reads memory in jumps."""
    copied = elementwise_cost([shape], shape, itemsize)
    return replace(copied, bytes=copied.bytes * 3 // 2)


def sum_cost(count: int, shape: tuple[int, ...], itemsize: int, pairwise: bool) -> Cost:
    """The cost of adding ``count`` tensors of one shape: at once, or (``pairwise``) one after the other."""
    if pairwise and count > 2:
        one = elementwise_cost([shape] * 2, shape, itemsize)
        return Cost(one.multiply_adds * (count - 1), one.bytes * (count - 1), count - 1)
    return elementwise_cost([shape] * count, shape, itemsize)
