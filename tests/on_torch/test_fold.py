"""Folding torch modules: few operators, the same function, the original untouched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from zoo import ZOO, Entry

import refold
from refold.torch.frontend import FRONTEND


def assert_same_function(model: Any, plain: Any, example: Any) -> None:
    """The folded module is as near to the original's functions in float64 as the original itself is."""
    before, after = FRONTEND.lift(model, example), FRONTEND.lift(plain, example)
    given = example if isinstance(example, tuple) else (example,)
    feeds = dict(zip(before.graph.inputs, [tensor.double().numpy() for tensor in given], strict=True))
    reference = FRONTEND.evaluate(before, feeds, before.graph.outputs)
    exact = [reference[name] for name in before.graph.outputs]
    inputs = [tensor.numpy() for tensor in given]
    for a, b, wanted in zip(FRONTEND.run(before, inputs), FRONTEND.run(after, inputs), exact, strict=True):
        scale = float(np.abs(wanted).max()) or 1.0
        own, folded = (float(np.abs(array - wanted).max()) / scale for array in (a, b))
        assert folded <= max(4 * own, 3e-6)


def operators(plain: Any) -> int:
    """The calls of a folded module, but for those that take results apart or ask for sizes; of one in which
    nothing was folded, its own."""
    if not isinstance(plain, torch.fx.GraphModule):
        plain = torch.fx.symbolic_trace(plain)
    taking = ("getitem", "size", "floordiv")
    return sum(
        node.op.startswith("call_") and getattr(node.target, "__name__", node.target) not in taking
        for node in plain.graph.nodes
    )


def example_of(entry: Entry) -> Any:
    return torch.randn(entry.shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_zoo_folds_to_its_minimum_and_stays_the_same_function(entry: Entry) -> None:
    model, example = entry.build(), example_of(entry)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = refold.inspect(model, example)
    plain = refold.fold(model, example)
    assert operators(plain) == entry.operators, plain.code
    assert_same_function(model, plain, example)
    kept = [str(kept) for kept in plan.kept]
    for sentence in entry.says:
        assert any(sentence in reason for reason in kept), kept
    assert not refold.inspect(plain, example).changes_something, "folding a folded model changes nothing"
    assert sum(p.numel() for p in plain.parameters()) <= plan.parameters_after
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in state.items())


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_zoo_is_proved(entry: Entry) -> None:
    model, example = entry.build(), example_of(entry)
    certificate = refold.prove(model, refold.fold(model, example), example)
    assert certificate.ok, str(certificate)
