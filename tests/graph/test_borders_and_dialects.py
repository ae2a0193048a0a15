"""Borders of one number per channel, paddings of channels, and what operators of a framework can say."""

from __future__ import annotations

import numpy as np

from refold.algebra import affine
from refold.algebra.cost import Cost
from refold.algebra.geometry import Window
from refold.algebra.refusal import Refusal
from refold.graph import Graph, Node, Value, make_plan
from refold.graph.forms import form_builder
from refold.graph.graph import Affine, AffineForm, Dialect, Opaque, Pad, Sum

BIAS = (0.5, -2.0)
DEAR = Cost(10**6, 10**6, 1)  # so that anything else is chosen


def graph_of(*nodes: Node, shape: tuple[int, ...] = (1, 2, 6, 6), dialect: Dialect | None = None) -> Graph:
    names = ["x", *(node.output for node in nodes)]
    values = {name: Value(name, (None, *shape[1:]), "float32", shape) for name in names}
    return Graph(values, nodes, ("x",), (names[-1],), dialect=dialect or Dialect())


def padded(widths: tuple[tuple[int, int], ...], value: float | tuple[float, ...], axis: int | None) -> object:
    conv = affine.convolution(np.ones((2, 2, 1, 1)), np.asarray(BIAS), (Window(), Window()))
    first = Node("conv", Affine(conv, 1), ("x",), ("u",))
    graph = graph_of(first, Node("pad", Pad(widths, value, axis), ("u",), ("y",)))
    builder = form_builder(graph)
    leaf = builder.leaf("x")
    assert isinstance(leaf, AffineForm)
    inner = builder.combine(graph.nodes[0], [leaf])
    assert isinstance(inner, AffineForm)
    return builder.combine(graph.nodes[1], [inner])


def test_a_border_of_the_bias_of_each_channel_is_a_padding() -> None:
    border = ((0, 0), (0, 0), (1, 1), (1, 1))
    form = padded(border, BIAS, 1)
    assert isinstance(form, AffineForm)
    assert [window.before for window in form.terms["x"].windows] == [1, 1]
    assert isinstance(padded(border, (0.5, -2.5), 1), Refusal)
    assert isinstance(padded(border, 0.5, None), Refusal)


def test_padded_channels_are_refused() -> None:
    assert padded(((0, 0), (1, 0), (0, 0), (0, 0)), 0.0, None) == Refusal("it pads channels")


def dense_and_bias(dialect: Dialect) -> Graph:
    matrix = affine.dense(np.ones((4, 4)), None, 1)
    shift = affine.scale_shift(np.ones(4), np.ones(4), 1)
    one = Node("dense", Affine(matrix, 2, biased=False), ("x",), ("u",), DEAR)
    two = Node("relu", Opaque(), ("y",), ("z",))
    return graph_of(
        one, Node("shift", Affine(shift, 2), ("u",), ("y",), DEAR), two, shape=(1, 3, 4), dialect=dialect
    )


def test_a_bias_that_no_operator_takes_costs_one() -> None:
    assert _operators(dense_and_bias(Dialect())) == 1
    assert _operators(dense_and_bias(Dialect(conv_axis=1, biased=False))) == 2


def _operators(graph: Graph) -> int:
    return int(make_plan(graph).after.operators)


def test_convolutions_on_another_axis_pay_for_the_turns() -> None:
    conv = affine.convolution(np.ones((2, 2, 3, 3)), None, (Window(3, before=1, after=1),) * 2)
    nodes = (
        Node("one", Affine(conv, 3, biased=False), ("x",), ("u",), DEAR),
        Node("two", Affine(conv, 3, biased=False), ("x",), ("v",), DEAR),
        Node("sum", Sum((1.0, 1.0)), ("u", "v"), ("y",), DEAR),
    )
    for dialect, operators in ((Dialect(), 1), (Dialect(conv_axis=1), 3)):
        assert _operators(graph_of(*nodes, shape=(1, 6, 6, 2), dialect=dialect)) == operators
