"""A region taken apart for people: its steps and their laws, the branches that it adds up, and their norms.

A plan needs none of this; a report does. Norms are Frobenius norms of float64 kernels, before the one rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import hypot
from typing import final

import numpy as np

from refold.algebra.affine import AffineConv
from refold.algebra.refusal import Refusal
from refold.graph.forms import FormBuilder, form_builder
from refold.graph.graph import (
    Affine,
    AffineForm,
    Concat,
    Gain,
    Graph,
    Node,
    Opaque,
    Pad,
    Relayout,
    Select,
    Slice,
    Sum,
)
from refold.graph.region import Region, describe


@final
@dataclass(frozen=True, slots=True)
class Step:
    """One original step: what it does, by which law it is taken into the region (empty: by none, it moves
    nothing or is no part of one), and the shape of its kernel, ``(out, in/groups, *taps)``, if it has one."""

    name: str
    does: str
    law: str
    kernel: tuple[int, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Kernel:
    """One map of a folded region: the tensor that it reads, its shape and its norm."""

    reads: str
    does: str
    shape: tuple[int, ...]
    norm: float


@final
@dataclass(frozen=True, slots=True)
class Branch:
    """One of the terms that a region adds up: the tensor ``value``, what it is, seen from what the region reads,
    the plain numbers that it is multiplied by on its way into the sum (a learned branch scale, a sign), and the
    norm of what it adds."""

    value: str
    does: str
    factor: float
    norm: float


@final
@dataclass(frozen=True, slots=True)
class Anatomy:
    """A region. ``branches`` are those of the last sum in it, which gives ``sum_at``; none where there is none."""

    steps: tuple[Step, ...]
    kernels: tuple[Kernel, ...]
    branches: tuple[Branch, ...]
    sum_at: str


def anatomy(graph: Graph, regions: Sequence[Region]) -> Iterator[Anatomy]:
    """The anatomy of each region, in their order. Composes the kernels of all branches anew."""
    builder = form_builder(graph)
    for region in regions:
        branches, sum_at = _branches(builder, region, region.cone)
        yield Anatomy(tuple(step(node) for node in region.cone), _kernels(region), branches, sum_at)


def step(node: Node) -> Step:
    """What a node does, in a few words."""
    match node.op:
        case Affine(conv):
            law = "identity" if conv.is_identity else "scale and shift" if conv.is_scale else "compose"
            return Step(node.name, describe(conv), law, tuple(conv.weights.shape))
        case Gain(scale, shift):
            return Step(node.name, _words_of_gain(scale, shift), "scale and shift")
        case Sum(factors):
            plain = all(factor == 1.0 for factor in factors)
            signs = "" if plain else f", times {', '.join(f'{factor:.4g}' for factor in factors)}"
            return Step(node.name, f"sum of {len(factors)}{signs}", "add")
        case Concat():
            return Step(node.name, f"concatenation of {len(node.inputs)}", "stack")
        case Select(channels):
            return Step(node.name, f"choice of {len(channels)} channels", "select")
        case Slice():
            return Step(node.name, "slice", "select")
        case Pad():
            return Step(node.name, "padding", "pad")
        case Relayout():
            return Step(node.name, "moved axis", "")
        case Opaque():
            return Step(node.name, "", "")


def _words_of_gain(scale: float, shift: float) -> str:
    return f"factor {scale:.4g}" + (f", shift {shift:.4g}" if shift else "")


def _kernels(region: Region) -> tuple[Kernel, ...]:
    return tuple(
        Kernel(name, describe(term), tuple(term.weights.shape), _norm([term])) for name, term in region.terms
    )


def _norm(terms: Sequence[AffineConv]) -> float:
    return hypot(*(float(np.linalg.norm(term.kernel.reshape(-1))) for term in terms))


def _branches(builder: FormBuilder, region: Region, cone: Sequence[Node]) -> tuple[tuple[Branch, ...], str]:
    inside = {node.output: node for node in cone}
    last = inside.get(region.value)
    while last is not None and not isinstance(last.op, Sum):
        last = inside.get(last.inputs[0]) if len(last.inputs) == 1 else None
    if last is None:
        return (), ""
    forms = _forms(builder, region, cone)
    found = []
    for value, factor in _terms(last, 1.0, inside):
        form = forms.get(value)
        if form is None:
            return (), ""
        terms = list(form.terms.values())
        does = " + ".join(describe(term) for term in terms)
        found.append(Branch(value, does, factor, abs(factor) * _norm(terms)))
    return tuple(found), last.output


def _terms(total: Node, factor: float, inside: dict[str, Node]) -> Iterator[tuple[str, float]]:
    """The values that a sum adds up, with their factors; sums of sums are one sum."""
    assert isinstance(total.op, Sum)
    for name, sign in zip(total.inputs, total.op.factors, strict=True):
        scale = factor * sign
        node = inside.get(name)
        while node is not None and isinstance(node.op, Gain) and not node.op.shift:
            scale *= node.op.scale
            name = node.inputs[0]
            node = inside.get(name)
        if node is not None and isinstance(node.op, Sum):
            yield from _terms(node, scale, inside)
        else:
            yield name, scale


def _forms(builder: FormBuilder, region: Region, cone: Sequence[Node]) -> dict[str, AffineForm]:
    """What each step of the region gives, seen from what the region reads, as far as laws carry."""
    forms: dict[str, AffineForm] = {}
    for name in region.leaves:
        leaf = builder.leaf(name)
        if not isinstance(leaf, Refusal):
            forms[name] = leaf
    for node in cone:
        if all(name in forms for name in node.inputs):
            form = builder.combine(node, [forms[name] for name in node.inputs])
            if not isinstance(form, Refusal):
                forms[node.output] = form
    return forms
