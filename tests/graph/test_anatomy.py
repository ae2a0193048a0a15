"""Regions taken apart: steps with their laws, branches with their factors, norms against numpy's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from test_planner import Sketch, linear, norm

from refold.graph import Plan
from refold.graph.graph import Gain, Sum


def three_branches() -> Plan:
    """3x3 with a batch norm, minus 0.25 times a 1x1, plus the identity; a 1x1 behind the sum."""
    graph = Sketch(4, (8, 8))
    graph.affine("wide", linear(4, 4, 3), "x")
    graph.affine("norm", norm(4, axes=2), "wide")
    graph.affine("narrow", linear(4, 4, 1), "x")
    graph.node("alpha", Gain(0.25), 4, "narrow")
    graph.node("inner", Sum((1.0, -1.0)), 4, "norm", "alpha")
    graph.node("outer", Sum((1.0, 1.0)), 4, "inner", "x")
    graph.affine("behind", linear(4, 4, 1), "outer")
    return graph.plan("behind")


def test_steps_name_their_laws_in_order() -> None:
    (inside,) = three_branches().anatomy
    assert [(step.name, step.law) for step in inside.steps] == [
        ("wide", "compose"),
        ("norm", "scale and shift"),
        ("narrow", "compose"),
        ("alpha", "scale and shift"),
        ("inner", "add"),
        ("outer", "add"),
        ("behind", "compose"),
    ]
    assert [step.kernel for step in inside.steps if step.law == "compose"] == [
        (4, 4, 3, 3),
        (4, 4, 1, 1),
        (4, 4, 1, 1),
    ]


def test_branches_of_nested_sums_are_seen_at_the_last_sum_with_their_factors() -> None:
    (inside,) = three_branches().anatomy
    assert inside.sum_at == "outer"
    assert [(branch.value, branch.factor) for branch in inside.branches] == [
        ("norm", 1.0),
        ("narrow", -0.25),
        ("x", 1.0),
    ]
    wide = linear(4, 4, 3).kernel / np.sqrt(1 + 1e-3)
    narrow = linear(4, 4, 1).kernel
    expected = [np.linalg.norm(wide), 0.25 * np.linalg.norm(narrow), np.sqrt(4)]
    np.testing.assert_allclose([branch.norm for branch in inside.branches], expected, rtol=1e-12)


def test_the_folded_kernel_has_the_norm_of_what_was_added_up() -> None:
    (inside,) = three_branches().anatomy
    total = linear(4, 4, 3).kernel / np.sqrt(1 + 1e-3)
    total[:, :, 1, 1] += np.eye(4) - 0.25 * linear(4, 4, 1).kernel[:, :, 0, 0]
    kernel = np.einsum("om,mcuv->ocuv", linear(4, 4, 1).kernel[:, :, 0, 0], total)
    (folded,) = inside.kernels
    assert (folded.reads, folded.shape) == ("x", (4, 4, 3, 3))
    np.testing.assert_allclose(folded.norm, np.linalg.norm(kernel), rtol=1e-12)


def test_a_chain_has_no_branches() -> None:
    graph = Sketch(8)
    graph.affine("a", linear(8, 8), "x")
    graph.affine("b", norm(8), "a")
    (inside,) = graph.plan("b").anatomy
    assert inside.branches == ()
    assert inside.sum_at == ""


def test_the_plan_as_data_holds_it() -> None:
    (region,) = json.loads(json.dumps(three_branches().to_json()))["regions"]
    assert [step["law"] for step in region["steps"]].count("add") == 2
    assert [branch["factor"] for branch in region["branches"]] == [1.0, -0.25, 1.0]
    assert region["kernels"][0]["shape"] == [4, 4, 3, 3]
