"""What it costs to compute a value by its affine form."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np

from refold.algebra.affine import AffineConv
from refold.algebra.cost import Cost, convolution_cost, elementwise_cost, sum_cost, total, turn_cost
from refold.algebra.refusal import Refusal
from refold.graph.forms import FormBuilder
from refold.graph.graph import AffineForm, Dialect, Value

# How many operators beside the convolution itself a framework needs to say it, for an input of the given
# spatial sizes (a padding that its own convolution cannot express, say), or why it cannot say it.
Helpers = Callable[[AffineConv, tuple[int | None, ...]], int | Refusal]


def no_helpers(conv: AffineConv, space: tuple[int | None, ...]) -> int | Refusal:
    """For frameworks whose convolution has explicit paddings on both sides."""
    return 0


def form_cost(
    builder: FormBuilder, helpers: Helpers, form: AffineForm, output: Value, axis: int
) -> tuple[Cost, Refusal | None]:
    """What it costs to compute ``output``, with its channels on ``axis``, from the leaves of ``form``; and why
    the framework cannot say it, if it cannot."""
    positions = prod(_without(output.nominal, axis))
    costs: list[Cost] = []
    refusal = None
    bias_has_a_place = not np.any(form.bias)
    for name, term in form.terms.items():
        leaf = builder.graph.values[name]
        axes = builder.axes[name], axis
        before, after, takes_bias = _turns(builder.graph.dialect, term, *axes, len(output.shape))
        if before:
            costs.append(turn_cost(leaf.nominal, leaf.itemsize))
        if after:
            costs.append(turn_cost(output.nominal, output.itemsize))
        if not term.is_identity:
            beside = helpers(term, builder.space(name))
            if isinstance(beside, Refusal):
                refusal, beside = beside, 0
            read = _padded(leaf.nominal, builder.axes[name], term) if beside else leaf.nominal
            if beside:
                costs.append(elementwise_cost([leaf.nominal], read, leaf.itemsize))
            if beside > 1:
                costs.append(Cost(operators=beside - 1))
            costs.append(convolution_cost(term, prod(read), positions, leaf.itemsize))
            bias_has_a_place = bias_has_a_place or takes_bias
    if len(form.terms) > 1:
        pairwise = builder.graph.dialect.adds_pairs
        costs.append(sum_cost(len(form.terms), output.nominal, output.itemsize, pairwise))
    if not bias_has_a_place:
        costs.append(elementwise_cost([output.nominal], output.nominal, output.itemsize))
    return total(costs), refusal


def _turns(dialect: Dialect, conv: AffineConv, axis_in: int, axis_out: int, rank: int) -> tuple[bool, bool, bool]:
    """Whether the tensor is turned around before ``conv`` and after it, so that its channels come from
    ``axis_in`` and end at ``axis_out``; and whether the operator for ``conv`` takes a bias."""
    if conv.is_scale:
        return axis_in != axis_out, False, dialect.biased
    if dialect.conv_axis is None:
        return axis_in != axis_out, False, True
    if axis_in == axis_out == rank - 1 != dialect.conv_axis and conv.is_pointwise and conv.groups == 1:
        return False, False, dialect.biased  # a dense layer
    return axis_in != dialect.conv_axis, axis_out != dialect.conv_axis, True


def _padded(shape: tuple[int, ...], axis: int, conv: AffineConv) -> tuple[int, ...]:
    """The shape of a tensor after the padding (or cropping) of ``conv`` as an operator of its own."""
    windows = iter(conv.windows)
    grown = []
    for place, size in enumerate(shape):
        window = None if place in (0, axis) else next(windows)
        grown.append(size if window is None else size + window.before + window.after)
    return tuple(grown)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return tuple(size for place, size in enumerate(shape) if place not in (0, axis))
