"""A region: one tensor that is computed anew from the nearest tensors that stay; and maps in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from refold.algebra.affine import AffineConv
from refold.algebra.cost import Cost
from refold.graph.graph import AffineForm, Node


@final
@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some channels of a tensor, straight from ``form``'s leaves.

    ``biased`` says whether they get a bias. ``nodes`` are the original steps between the leaves and them.
    """

    form: AffineForm
    biased: bool
    nodes: tuple[str, ...]

    @property
    def operator(self) -> str:
        """What it becomes, in a few words."""
        words = [describe(term) for term in self.form.terms.values() if not term.is_identity]
        if not words:
            return "nothing" if len(self.form.terms) == 1 else "a sum"
        return " + ".join(words)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """One tensor that is computed anew: ``value``, whose ``parts`` stand one behind the other on its channel axis.

    ``cone`` are the original steps between the leaves and the value; ``before`` is the cost of those of them that
    are no longer computed, ``after`` that of what takes their place. ``moved`` says where the one step that stood
    here went, if the value is now simply the one that it reads: to the other side of an operator that lets it pass.
    """

    value: str
    parts: tuple[Part, ...]
    cone: tuple[Node, ...]
    before: Cost
    after: Cost
    moved: str = ""

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of the original steps between the leaves and the value."""
        return tuple(dict.fromkeys(node.name for node in self.cone))

    @property
    def terms(self) -> tuple[tuple[str, AffineConv], ...]:
        """Every affine convolution in it, with the value that it reads."""
        return tuple(term for part in self.parts for term in part.form.terms.items())

    @property
    def leaves(self) -> tuple[str, ...]:
        """The values that it reads."""
        return tuple(dict.fromkeys(name for name, _ in self.terms))

    @property
    def laws(self) -> tuple[str, ...]:
        """The laws used, each once, in the order of first use."""
        used = (law for part in self.parts for law in part.form.laws)
        return tuple(dict.fromkeys(law for law in used if law != "identity"))

    @property
    def operator(self) -> str:
        """What takes the region's place, in a few words."""
        if self.moved:
            return f"nothing: it goes {self.moved}"
        words = [part.operator for part in self.parts]
        return words[0] if len(words) == 1 else f"one behind the other: {'; '.join(words)}"


def is_convolution(conv: AffineConv) -> bool:
    """Whether a map is more than factors per channel and means over windows."""
    is_mean = conv.is_channelwise and not np.any(conv.kernel != conv.kernel.reshape(-1)[0])
    return not conv.is_scale and not is_mean


def describe(conv: AffineConv) -> str:
    """A map in a few words: what it is, its channels, and what is unusual about its windows."""
    size = "x".join(str(window.taps) for window in conv.windows)
    channels = f"{conv.channels_in} to {conv.channels_out}"
    if conv.is_scale:
        return f"scale and shift of {conv.channels_out} channels"
    if conv.is_pointwise and conv.groups == 1:
        return f"{'1x1 convolution' if len(conv.windows) == 2 else 'dense layer'}, {channels}"
    details = [channels]
    if conv.is_transposed:
        details.append("stride " + "x".join(str(window.spread) for window in conv.windows))
    if any(window.stride > 1 for window in conv.windows):
        details.append("stride " + "x".join(str(window.stride) for window in conv.windows))
    if any(window.dilation > 1 for window in conv.windows):
        details.append("dilation " + "x".join(str(window.dilation) for window in conv.windows))
    if conv.groups > 1:
        details.append(f"{conv.groups} groups")
    kind = "transposed convolution" if conv.is_transposed else "convolution"
    return f"{size} {kind}, {', '.join(details)}"
