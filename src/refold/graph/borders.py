"""Padding with something else than zeros, as people write it: zeros first, then a number per channel written over
each side (``BNAndPad`` of DiverseBranchBlock, ``SeqConv3x3`` of ECBSR).

What such steps do is read from what they make of two random tensors: the inside is the tensor that was padded, and
the border is the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from refold.algebra.affine import Array
from refold.graph.forms import form_builder
from refold.graph.graph import AffineForm, Graph, Node, Opaque, Pad, Value

# How far, in roundings of float64, a border may be from the bias for which it stands: it is computed by another
# formula.
_ROUNDINGS = 32


def bordered(pad: Pad, shapes: Sequence[Sequence[int]], run: Callable[[int, Array], Array]) -> Pad | None:
    """The padding that ``pad`` and the steps after it, which write over its zeros, amount to together.

    ``run(which, tensor)`` does these steps, the padding first, as they are in one of the recordings; ``shapes`` are
    those of what is padded there. None if they do something else.
    """
    if any(min(pair) < 0 for pair in pad.widths) or pad.widths[1] != (0, 0):
        return None
    found: list[tuple[float, ...]] = []
    for which, shape in enumerate(shapes):
        tensors = [np.random.default_rng(seed).normal(size=tuple(shape)) for seed in (0, 1)]
        results = [run(which, tensor) for tensor in tensors]
        inside = tuple(
            slice(before, size - after) for (before, after), size in zip(pad.widths, results[0].shape, strict=True)
        )
        border = np.ones(results[0].shape, dtype=bool)
        border[inside] = False
        if not all(np.array_equal(result[inside], tensor) for result, tensor in zip(results, tensors, strict=True)):
            return None
        first, second = (np.moveaxis(result, 1, 0)[:, np.moveaxis(border, 1, 0)[0]] for result in results)
        if not first.size or not np.array_equal(first, second) or np.ptp(first, axis=1).any():
            return None
        found.append(tuple(float(number) for number in first[:, 0]))
    if any(values != found[0] for values in found):
        return None
    return Pad(pad.widths, found[0], 1)


def with_exact_borders(nodes: Sequence[Node], values: dict[str, Value]) -> tuple[Node, ...]:
    """``nodes``, in which every border that is the bias before it, up to roundings of float64, is that bias."""
    if not any(isinstance(node.op, Pad) and node.op.axis is not None for node in nodes):
        return tuple(nodes)
    builder = form_builder(Graph(values, tuple(nodes), (), ()))
    forms: dict[str, AffineForm] = {}
    exact = []
    for node in nodes:
        if isinstance(node.op, Pad) and node.op.axis is not None and node.inputs[0] in forms:
            bias = forms[node.inputs[0]].bias
            gap = np.abs(np.asarray(node.op.value) - bias)
            if np.all(gap <= _ROUNDINGS * 2.0**-53 * np.max(np.abs(bias), initial=0.0)):
                node = replace(node, op=replace(node.op, value=tuple(float(number) for number in bias)))
        exact.append(node)
        if isinstance(node.op, Opaque):
            continue
        seen = [forms.get(name) or builder.leaf(name) for name in node.inputs]
        known = [form for form in seen if isinstance(form, AffineForm)]
        form = builder.combine(node, known) if len(known) == len(seen) else None
        if isinstance(form, AffineForm):
            forms[node.output] = form
    return tuple(exact)
