"""The neutral graph: what a front end makes of a model, and all that the engine sees of it.

Tensors have the framework's own shape and axis order (batch first). Linear nodes say what they do in
the engine's words; every other node is opaque, and its outputs are the atoms of affine forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import final

import numpy as np

from refold.algebra.affine import AffineConv, Array
from refold.algebra.cost import Cost

Shape = tuple[int | None, ...]


@final
@dataclass(frozen=True, slots=True)
class Value:
    """A tensor. ``shape`` has None where a size is not known; ``nominal`` is the shape that costs are
    counted with. ``dtype`` is the framework's name for it. ``body`` names the inner graph that it belongs to (a
    branch, the body of a loop), which may never run; empty in the main one."""

    name: str
    shape: Shape
    dtype: str
    nominal: tuple[int, ...]
    body: str = ""

    @property
    def itemsize(self) -> int:
        """Bytes of one element, from the digits at the end of the name of its type."""
        return _itemsize(self.dtype)


@cache
def _itemsize(dtype: str) -> int:
    digits = "".join(character for character in dtype if character.isdigit())
    return max(int(digits[-2:] or 32) // 8, 1)


# ---- What a node may do. A closed family: functions `match` on it. -----------------------------------


@final
@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """An affine convolution of the one input; ``axis`` is the tensors' channel axis. ``biased`` says that
    it has a bias, even where that happens to be 0: what it is folded into then has one too. ``summand`` is the
    largest number that goes into the bias, where it is a sum in which numbers may cancel."""

    conv: AffineConv
    axis: int
    biased: bool = True
    summand: float = 0.0


@final
@dataclass(frozen=True, slots=True)
class Gain:
    """``scale * x + shift`` with two numbers, on whatever axis: a scalar factor, an identity."""

    scale: float = 1.0
    shift: float = 0.0


@final
@dataclass(frozen=True, slots=True)
class Sum:
    """The sum of all inputs, each with a sign or factor."""

    factors: tuple[float, ...]


@final
@dataclass(frozen=True, slots=True)
class Concat:
    """The inputs, one behind the other on the channel axis ``axis``."""

    axis: int


@final
@dataclass(frozen=True, slots=True)
class Select:
    """The channels ``channels`` of the input, in that order."""

    channels: tuple[int, ...]
    axis: int


@final
@dataclass(frozen=True, slots=True)
class Slice:
    """Every ``step``-th position of each axis, without the first ``start`` and the last ``trim``:
    ``cuts`` holds ``(start, trim, step)`` per tensor axis, batch included (and never cut)."""

    cuts: tuple[tuple[int, int, int], ...]


@final
@dataclass(frozen=True, slots=True)
class Pad:
    """The input padded (or, negative, cropped) by ``widths`` per tensor axis with one number, or with one
    per channel of the axis ``axis``."""

    widths: tuple[tuple[int, int], ...]
    value: float | tuple[float, ...] = 0.0
    axis: int | None = None


@final
@dataclass(frozen=True, slots=True)
class Relayout:
    """The same tensor with its channel axis moved from ``axis_in`` to ``axis_out``, all else in order."""

    axis_in: int
    axis_out: int


@final
@dataclass(frozen=True, slots=True)
class Passage:
    """A way on which factors and shifts per channel pass through an operator: every number that it gives is a mean
    of numbers of its one input, with weights that sum to one (an average of what is there, one of them, a value in
    between), and one map per channel before it does what another one per channel does behind it.

    ``axis_in`` and ``axis_out`` are the channel axes before and behind. Means for the output channel ``outs[k]``
    are made of numbers of the input channel ``ins[k]``, over all ``k``, and of no others; None: every channel is
    made of itself. ``rising`` says that it is no mean but picks by size (a maximum), so that only positive factors
    pass."""

    axis_in: int
    axis_out: int
    ins: tuple[int, ...] | None = None
    outs: tuple[int, ...] | None = None
    rising: bool = False


@final
@dataclass(frozen=True, slots=True)
class Opaque:
    """Anything else. ``reason`` says why it is not linear (or not taken for linear), for the plan;
    empty where that goes without saying (an activation, a pooling). ``enters`` says that it is no operator, but
    stands for how an inner graph comes by a value: from run to run, or from the graph around it. ``passages``
    gives the ways on which maps per channel pass through it all the same; it may be work to find out, so it is only
    called where there is such a map."""

    reason: str = ""
    enters: bool = False
    passages: Callable[[], tuple[Passage, ...]] = field(default=tuple, compare=False, repr=False)


Op = Affine | Gain | Sum | Concat | Select | Slice | Pad | Relayout | Opaque


@final
@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One step of the computation. ``name`` is the path by which the user knows it; ``cost`` is what it
    costs as it stands, ``weights`` the number of elements of each parameter that it reads, by a name
    that tells shared ones. Only opaque nodes have more than one output."""

    name: str
    op: Op
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cost: Cost = field(default_factory=Cost)
    weights: Mapping[str, int] = field(default_factory=dict)

    @property
    def output(self) -> str:
        """The one output of a linear node."""
        return self.outputs[0]


@final
@dataclass(frozen=True, slots=True)
class Dialect:
    """What one operator of the framework can say, as far as costs depend on it.

    ``conv_axis`` is the only axis on which convolutions may have their channels: on another one a tensor is
    turned before and after. None: on any axis. ``biased`` says whether dense layers on other axes, and
    factors per channel, can have a bias, or need an operator of its own for it. ``adds_pairs`` says that tensors
    are added two at a time, so that a sum of many is many operators."""

    conv_axis: int | None = None
    biased: bool = True
    adds_pairs: bool = False


@final
@dataclass(frozen=True, eq=False)
class Graph:
    """A model. ``nodes`` are in an order in which they can be computed; ``parameters`` counts the stored
    numbers of the whole model, ``largest`` is the largest number that its parameters can store."""

    values: Mapping[str, Value]
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: int = 0
    largest: float = float(np.finfo(np.float32).max)
    dialect: Dialect = Dialect()

    @cached_property
    def producer(self) -> dict[str, Node]:
        """The node that gives each value; inputs have none."""
        return {output: node for node in self.nodes for output in node.outputs}

    @cached_property
    def node(self) -> dict[str, Node]:
        """The nodes by name."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def consumers(self) -> dict[str, tuple[Node, ...]]:
        """The nodes that read each value, once per node."""
        readers: dict[str, list[Node]] = {name: [] for name in self.values}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                readers[name].append(node)
        return {name: tuple(nodes) for name, nodes in readers.items()}

    def is_linear(self, value: str) -> bool:
        """Whether a linear node gives this value."""
        node = self.producer.get(value)
        return node is not None and not isinstance(node.op, Opaque)

    @cached_property
    def required(self) -> tuple[str, ...]:
        """The values that must exist whatever is folded: outputs, and what opaque nodes read."""
        names = [name for node in self.nodes if isinstance(node.op, Opaque) for name in node.inputs]
        return tuple(dict.fromkeys([*names, *self.outputs]))


def alive(nodes: Sequence[Node], outputs: tuple[str, ...]) -> list[Node]:
    """The nodes that the outputs depend on."""
    needed = set(outputs)
    found = []
    for node in reversed(nodes):
        if needed.intersection(node.outputs):
            found.append(node)
            needed.update(node.inputs)
    return found[::-1]


@final
@dataclass(frozen=True, slots=True, eq=False)
class AffineForm:
    """What a value is, seen from others: ``sum_i terms[i] * value_i + bias``; no term has a bias.

    ``laws`` names the laws that led here, in the order of use, and ``nodes`` the nodes, for the plan.
    """

    terms: Mapping[str, AffineConv]
    bias: Array
    laws: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()

    @property
    def leaves(self) -> frozenset[str]:
        """The values that it reads."""
        return frozenset(self.terms)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Formula:
    """An affine form, and the axis of each tensor that holds its channels (batch counted): of the value itself
    and of the values that it reads."""

    form: AffineForm
    axes: Mapping[str, int]
