"""Maps per channel on the other side of operators through which they pass: only where they vanish there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refold.algebra import AffineConv, convolution, dense, scale_shift
from refold.algebra.cost import Cost
from refold.algebra.geometry import Window
from refold.graph import Graph, Node, Plan, Value, make_plan
from refold.graph.graph import Affine, Gain, Opaque, Passage
from refold.graph.passing import means, reduction

SCALE = scale_shift([2.0, 3.0, 5.0], [1.0, -1.0, 2.0], 2)


def value(name: str, *shape: int) -> Value:
    return Value(name, (None, *shape), "float32", (1, *shape))


def node(name: str, op: Any, *inputs: str) -> Node:
    return Node(name, op, inputs, (name,), Cost(10**6, 10**6, 1), {name: 7} if isinstance(op, Affine) else {})


def headed(*between: Node, features: int = 3, **settings: Any) -> Plan:
    """x, an opaque step, a norm, ``between``, a dense layer."""
    values = {name: value(name, 3, 4, 4) for name in ("x", "act", "norm")}
    values |= {step.output: value(step.output, *SHAPES[step.name]) for step in between}
    matrix = np.random.default_rng(0).normal(size=(2, features))
    nodes = [node("act", Opaque(), "x"), node("norm", Affine(SCALE, 1), "act"), *between]
    nodes.append(node("head", Affine(dense(matrix, [4.0, 5.0]), 1), between[-1].output))
    values["head"] = value("head", 2)
    return make_plan(Graph(values, tuple(nodes), ("x",), settings.get("outputs", ("head",))))


SHAPES = {"mean": (3,), "drop": (3,), "flat": (48,), "pool": (3, 2, 2), "both": (3,), "casted": (3,)}
MEAN = node("mean", Opaque("", passages=reduction(4, (2, 3), keep=False)), "norm")


def test_a_norm_goes_behind_a_mean_and_into_the_dense_layer_behind_it() -> None:
    plan = headed(MEAN)
    assert plan.after.operators == plan.before.operators - 1 == 3
    norm, head = plan.regions
    assert (norm.value, norm.moved, norm.operator) == ("norm", "behind mean", "nothing: it goes behind mean")
    assert norm.leaves == ("act",)
    assert (head.value, head.nodes, head.leaves) == ("head", ("norm", "head"), ("mean",))
    matrix = np.random.default_rng(0).normal(size=(2, 3))
    (term,) = head.parts[0].form.terms.values()
    np.testing.assert_allclose(term.kernel, matrix * SCALE.scale, rtol=1e-15)
    np.testing.assert_allclose(head.parts[0].form.bias, matrix @ SCALE.bias + [4.0, 5.0], rtol=1e-15)
    assert "norm: 1 step -> nothing: it goes behind mean" in str(plan)
    assert plan.to_json()["regions"][0]["becomes"] == "nothing: it goes behind mean"


def test_it_stays_where_somebody_else_reads_it_or_what_the_mean_gives() -> None:
    assert not headed(MEAN, outputs=("head", "norm")).regions
    assert not headed(MEAN, outputs=("head", "mean")).regions


def test_it_stays_where_nothing_behind_takes_it_in() -> None:
    plan = headed(MEAN, node("drop", Opaque(), "mean"))
    assert not plan.regions
    assert not plan.kept


def test_it_goes_through_several_operators_and_what_changes_nothing_on_the_way() -> None:
    pool = node("pool", Opaque("", passages=means(1)), "norm")
    pairs = tuple(np.repeat(np.arange(3), 4).tolist()), tuple(range(12))
    flat = node("flat", Opaque("", passages=lambda: (Passage(1, 1, *pairs),)), "pool")
    SHAPES["flat"] = (12,)
    plan = headed(pool, flat, node("drop12", Gain(), "flat"), features=12)
    assert [region.value for region in plan.regions] == ["norm", "head"]
    (term,) = plan.regions[-1].parts[0].form.terms.values()
    matrix = np.random.default_rng(0).normal(size=(2, 12))
    np.testing.assert_allclose(term.kernel, matrix * np.repeat(SCALE.scale, 4), rtol=1e-15)


SHAPES["drop12"] = (12,)


def test_another_precision_is_in_the_way() -> None:
    graph = headed(MEAN).graph  # what was planned, with the norm where it went
    assert any(value.name == "mean and norm" for value in graph.values.values())
    values = {"x": value("x", 3, 4, 4), "act": value("act", 3, 4, 4), "norm": value("norm", 3, 4, 4)}
    values |= {"mean": Value("mean", (None, 3), "float16", (1, 3)), "head": value("head", 2)}
    matrix = np.ones((2, 3))
    nodes = (
        node("act", Opaque(), "x"),
        node("norm", Affine(SCALE, 1), "act"),
        MEAN,
        node("head", Affine(dense(matrix), 1), "mean"),
    )
    assert not make_plan(Graph(values, nodes, ("x",), ("head",))).regions


def ahead(scale: AffineConv, *, rising: bool) -> Plan:
    values = {name: value(name, 3, 4, 4) for name in ("x", "conv", "pool", "norm", "act")}
    kernel = np.random.default_rng(1).normal(size=(3, 3, 3, 3))
    around = (Window(3, before=1, after=1),) * 2
    nodes = (
        node("conv", Affine(convolution(kernel, [1.0, 2.0, 3.0], around), 1), "x"),
        node("pool", Opaque("", passages=means(1, rising=rising)), "conv"),
        node("norm", Affine(scale, 1), "pool"),
        node("act", Opaque(), "norm"),
    )
    return make_plan(Graph(values, nodes, ("x",), ("act",)))


@pytest.mark.parametrize("rising", [False, True])
def test_a_norm_goes_ahead_of_a_pool_and_into_the_convolution(rising: bool) -> None:
    plan = ahead(SCALE, rising=rising)
    conv, norm = plan.regions
    assert (conv.value, conv.nodes, norm.moved) == ("conv", ("conv", "norm"), "ahead of pool")
    kernel = np.random.default_rng(1).normal(size=(3, 3, 3, 3))
    (term,) = conv.parts[0].form.terms.values()
    np.testing.assert_allclose(term.kernel, kernel * SCALE.scale[:, None, None, None], rtol=1e-15)
    np.testing.assert_allclose(conv.parts[0].form.bias, SCALE.scale * [1.0, 2.0, 3.0] + SCALE.bias, rtol=1e-15)


def test_factors_that_are_not_positive_stay_behind_a_maximum_with_the_reason() -> None:
    plan = ahead(scale_shift([2.0, -3.0, 5.0], [1.0, 1.0, 1.0], 2), rising=True)
    assert not plan.regions
    assert [str(kept) for kept in plan.kept] == [
        "kept apart: a factor that is not positive does not pass through a maximum (norm)"
    ]
    assert ahead(scale_shift([2.0, -3.0, 5.0], [1.0, 1.0, 1.0], 2), rising=False).regions


def test_means_over_the_batch_let_nothing_pass() -> None:
    assert reduction(4, (0, 2), keep=True)() == ()
    assert reduction(4, (1,), keep=False)() == (Passage(2, 1), Passage(3, 2))
    assert reduction(4, (-1,), keep=True)() == (Passage(1, 1), Passage(2, 2))
