"""The planner on graphs of its own: the cheapest exact way, and never a dearer one."""

from __future__ import annotations

from typing import Any

import numpy as np

from refold.algebra import Refusal, Window, batch_norm, convolution, dense
from refold.algebra.affine import AffineConv
from refold.algebra.cost import Cost, convolution_cost
from refold.graph import Graph, Node, Plan, Value, make_plan
from refold.graph.graph import Affine, Concat, Gain, Opaque, Pad, Sum

SPACE = (8, 8)


class Sketch:
    """A graph that grows by its nodes; every tensor has the same spatial sizes."""

    def __init__(self, channels: int, space: tuple[int, ...] = ()) -> None:
        self.space = space
        self.values: dict[str, Value] = {}
        self.nodes: list[Node] = []
        self.value("x", channels)

    def value(self, name: str, channels: int) -> None:
        shape = (*self.space, channels)
        self.values[name] = Value(name, (None, *shape), "float32", (1, *shape))

    def affine(self, name: str, conv: AffineConv, source: str) -> str:
        self.value(name, conv.channels_out)
        positions = int(np.prod(self.space))
        cost = convolution_cost(conv, positions * conv.channels_in, positions, 4)
        axis = len(self.space) + 1
        self.nodes.append(Node(name, Affine(conv, axis), (source,), (name,), cost, {name: conv.kernel.size}))
        return name

    def node(self, name: str, op: Any, channels: int, *sources: str) -> str:
        self.value(name, channels)
        self.nodes.append(Node(name, op, sources, (name,)))
        return name

    def plan(self, *outputs: str, **options: Any) -> Plan:
        return make_plan(Graph(self.values, tuple(self.nodes), ("x",), outputs), **options)


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape)


def linear(inside: int, outside: int, taps: int = 0) -> AffineConv:
    """A dense layer, or a convolution that keeps the size."""
    if not taps:
        return dense(numbers(outside, inside), numbers(outside))
    window = Window(taps, before=taps // 2, after=taps // 2)
    return convolution(numbers(outside, inside, taps, taps), numbers(outside), (window,) * 2)


def norm(channels: int, axes: int = 0) -> AffineConv:
    return batch_norm(np.ones(channels), np.ones(channels), 1e-3, axes=axes)


def test_a_chain_becomes_one_operator() -> None:
    graph = Sketch(8)
    graph.affine("a", linear(8, 8), "x")
    graph.affine("b", norm(8), "a")
    graph.affine("c", linear(8, 8), "b")
    plan = graph.plan("c")
    assert [region.nodes for region in plan.regions] == [("a", "b", "c")]
    assert plan.after.operators == 1


def test_a_long_chain_behind_branches_folds_in_one_pass() -> None:
    graph = Sketch(8)

    def chain(name: str, first: AffineConv) -> str:
        last = graph.affine(name, first, "x")
        for step in range(14):
            last = graph.node(f"{name}_same{step}", Gain(), 8, last)
            last = graph.affine(f"{name}_{step}", norm(8), last)
        return last

    graph.node("sum", Sum((1.0, 1.0)), 8, chain("a", linear(8, 8)), chain("b", linear(8, 8)))
    (region,) = graph.plan("sum").regions
    assert len(region.nodes) == 59
    assert region.after.operators == 1


def test_identities_between_readers_that_stay_apart_go_in_one_pass() -> None:
    graph = Sketch(64)
    graph.node("relu", Opaque(), 64, "x")
    graph.nodes.append(Node("same", Gain(), ("relu",), ("same",), Cost(operators=1)))
    graph.value("same", 64)
    for name in ("a", "b", "c"):
        graph.node(f"{name}_relu", Opaque(), 4, graph.affine(name, linear(64, 4), "same"))
    plan = graph.plan("a_relu", "b_relu", "c_relu")
    assert "same" in plan.removed
    assert plan.after.operators == 3


def test_convolutions_of_channels_that_fill_no_whole_blocks_take_longer_than_their_work() -> None:
    def cost(channels: int) -> Cost:
        return convolution_cost(linear(channels, 8, 3), channels * 1024, 1024, 4)

    narrow, wide = cost(24) + cost(24), cost(48)
    assert narrow.multiply_adds == wide.multiply_adds
    assert (narrow - wide).idle == 2 * 8 * 8 * 9 * 1024  # 8 of 32 channels, twice
    assert narrow.estimate > 1.25 * wide.estimate
    assert (cost(32) + cost(32)).idle == cost(64).idle == 0


def test_a_bottleneck_stays_apart_and_says_why() -> None:
    graph = Sketch(64)
    graph.affine("down", linear(64, 4), "x")
    graph.affine("up", linear(4, 64), "down")
    plan = graph.plan("up")
    assert plan.regions == ()
    assert [kept.reason for kept in plan.kept] == ["together they would take 4,096 multiply-adds instead of 512"]


def test_what_two_read_is_given_up_where_that_is_cheaper() -> None:
    """One step at a time this gets stuck: only when both readers of the middle leave it is anything saved."""
    graph = Sketch(3)
    graph.affine("a", linear(3, 2), "x")
    graph.affine("n", norm(2), "a")
    graph.affine("b", linear(2, 2), "n")
    graph.affine("c", linear(2, 2), "n")
    plan = graph.plan("b", "c")
    assert plan.after.operators == 2
    assert plan.after.multiply_adds == 12


def test_a_tapped_middle_stays_available() -> None:
    graph = Sketch(4, SPACE)
    graph.affine("a", linear(4, 4, 3), "x")
    graph.affine("n", norm(4, 2), "a")
    graph.node("relu", Opaque(), 4, "n")
    graph.affine("b", linear(4, 4, 1), "n")
    plan = graph.plan("relu", "b")
    assert {region.value for region in plan.regions} >= {"n"}
    assert "n" not in plan.removed


def test_what_follows_a_concatenation_goes_into_its_branches() -> None:
    """One joint operator would read both leaves in a kernel that is half zeros."""
    graph = Sketch(4, SPACE)
    graph.node("relu", Opaque(), 4, "x")
    graph.affine("a", linear(4, 4, 3), "relu")
    graph.affine("b", linear(4, 2, 1), "x")
    graph.node("both", Concat(3), 6, "a", "b")
    graph.affine("n", norm(6, 2), "both")
    graph.node("twice", Gain(2.0, 1.0), 6, "n")
    (region,) = graph.plan("twice").regions
    assert [set(part.form.terms) for part in region.parts] == [{"relu"}, {"x"}]
    assert [part.nodes for part in region.parts] == [("a", "both", "n", "twice"), ("b", "both", "n", "twice")]
    assert "distribute" in region.laws
    assert region.after.operators == 3
    assert region.operator == "one behind the other: 3x3 convolution, 4 to 4; 1x1 convolution, 4 to 2"


def test_a_mixture_behind_a_concatenation_does_not() -> None:
    graph = Sketch(4, SPACE)
    graph.node("relu", Opaque(), 4, "x")
    graph.affine("a", linear(4, 4, 3), "relu")
    graph.node("both", Concat(3), 8, "a", "x")
    graph.affine("mixed", linear(8, 4, 1), "both")
    assert graph.plan("mixed").regions == ()


def test_branches_become_one_convolution_of_the_widest_window() -> None:
    graph = Sketch(4, SPACE)
    for taps in (1, 3, 5):
        graph.affine(f"k{taps}", linear(4, 4, taps), "x")
    graph.node("sum", Sum((1.0, -1.0, 0.5)), 4, "k1", "k3", "k5")
    (region,) = graph.plan("sum").regions
    assert region.parts[0].form.terms["x"].windows == (Window(5, before=2, after=2),) * 2


def test_a_framework_that_cannot_say_a_convolution_keeps_it_apart() -> None:
    graph = Sketch(4, SPACE)
    graph.affine("a", linear(4, 4, 3), "x")
    graph.affine("n", norm(4, 2), "a")
    plan = graph.plan("n", helpers=lambda conv, space: Refusal("no such convolution here"))
    assert plan.regions == ()
    assert [kept.reason for kept in plan.kept] == ["no such convolution here"]


def test_a_weight_that_cannot_be_stored_keeps_its_region_apart() -> None:
    graph = Sketch(2)
    graph.affine("a", dense(np.eye(2) * 1e30), "x")
    graph.affine("b", dense(np.eye(2) * 1e30), "a")
    plan = graph.plan("b")
    assert plan.regions == ()
    assert [kept.reason for kept in plan.kept] == ["a weight would not be finite"]


def test_a_padding_of_channels_is_refused() -> None:
    graph = Sketch(4, SPACE)
    graph.affine("a", linear(4, 4, 1), "x")
    graph.node("pad", Pad(((0, 0), (0, 0), (0, 0), (0, 2))), 6, "a")
    graph.affine("b", linear(6, 4, 1), "pad")
    assert graph.plan("b").regions == ()
