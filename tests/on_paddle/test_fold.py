"""Folding Paddle models: few operators, the same function, the original untouched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from zoo import ZOO, Entry

import refold
from refold.paddle.frontend import FRONTEND


def inputs_of(lifted: Any, seed: int = 1, size: int = 9, batch: int = 2) -> list[Any]:
    rng = np.random.default_rng(seed)
    shapes = [lifted.graph.values[name].shape for name in lifted.graph.inputs]
    return [rng.normal(size=(batch, *(n or size for n in shape[1:]))).astype("float32") for shape in shapes]


def errors(model: Any, plain: Any, example: Any, size: int = 9) -> tuple[float, float]:
    """The largest errors of the folded and of the original model against the original's layers in float64,
    relative to the largest output."""
    before, after = FRONTEND.lift(model, example), FRONTEND.lift(plain, example)
    inputs = inputs_of(before, size=size)
    reference = FRONTEND.evaluate(before, dict(zip(before.graph.inputs, inputs, strict=True)), before.graph.outputs)
    exact = [reference[name] for name in before.graph.outputs]
    scale = max(float(np.abs(array).max()) for array in exact)
    folded, original = (
        max(float(np.abs(a - b).max()) for a, b in zip(FRONTEND.run(lifted, inputs), exact, strict=True))
        for lifted in (after, before)
    )
    return folded / scale, original / scale


def assert_same_function(model: Any, plain: Any, example: Any, size: int = 9) -> None:
    folded, original = errors(model, plain, example, size)
    assert folded <= max(4 * original, 3e-6)


def operators(model: Any, example: Any) -> int:
    return len(FRONTEND.lift(model, example).graph.nodes)


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_zoo_folds_to_its_minimum_and_stays_the_same_function(entry: Entry) -> None:
    model = entry.build()
    before = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    plan, plain = refold.inspect(model, entry.shape), refold.fold(model, entry.shape)
    assert operators(plain, entry.shape) == entry.operators
    assert_same_function(model, plain, entry.shape)
    assert plan.after.operators <= plan.before.operators
    assert plan.after.multiply_adds <= plan.before.multiply_adds
    kept = [str(kept) for kept in plan.kept]
    for sentence in entry.says:
        assert any(sentence in reason for reason in kept), kept
    assert not refold.inspect(plain, entry.shape).changes_something, "folding a folded model changes nothing"
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name].numpy())


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_every_fold_of_the_zoo_is_proved(entry: Entry) -> None:
    model = entry.build()
    certificate = refold.prove(model, refold.fold(model, entry.shape), entry.shape)
    assert certificate.ok, certificate
    assert certificate.verdict.value == "proved", certificate
