"""Folds in which a batch norm stands on the other side of a mean or a maximum: right ones are proved at every size,
wrong ones refuted, and an operator is not believed that it lets a map pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from proof.models import check, fused, normal, scale_of
from proof.numpy_frontend import Model, Step, batch_norm, conv, step
from refold.proof import Verdict

Array = Any
FREE = {"x": (None, 4, None, None)}


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def positive(bn: Step) -> Step:
    return replace(bn, weights={**bn.weights, "gamma": np.abs(bn.weights["gamma"])})


def headed(kind: str, norms: int = 1) -> tuple[Model, Model]:
    """Norms, a mean over all positions, a dense layer; and the dense layer alone that has the norms in it."""
    draw = rng()
    steps, source = [step("act", "relu", "x")], "act"
    for number in range(norms):
        steps.append(batch_norm(f"norm{number}", source, draw, 4))
        source = f"norm{number}"
    matrix, bias = normal(draw, 3, 4), normal(draw, 3)
    last = [step("mean", kind, source), step("head", "dense", "mean", w=matrix, b=bias)]
    scale, shift = np.ones(4), np.zeros(4)
    for norm in steps[1:]:
        own = scale_of(norm)
        scale, shift = own[0] * scale, own[0] * shift + own[1]
    w, b = matrix * scale, matrix.astype("float64") @ shift + bias
    plain = step("head", "dense", "mean", w=w.astype("float32"), b=b.astype("float32"))
    after = (steps[0], step("mean", kind, "act"), plain)
    return Model(FREE, (*steps, *last), ("head",)), Model(FREE, after, ("head",))


def pooled(kind: str, *, made_positive: bool = True) -> tuple[Model, Model]:
    """A convolution, an operator on all positions, a norm, a nonlinearity; and the convolution with all in it."""
    draw = rng()
    kernel, bias, norm = normal(draw, 3, 4, 3, 3), normal(draw, 3), batch_norm("norm", "pool", draw, 3)
    norm = positive(norm) if made_positive else norm
    around = {"pad": ((1, 1), (1, 1))}
    first = conv("conv", "x", kernel, bias, **around)
    before = (first, step("pool", kind, "conv"), norm, step("act", "relu", "norm"))
    w, b = fused(kernel, bias, norm)
    plain = conv("conv", "x", w.astype("float32"), b.astype("float32"), **around)
    after = (plain, step("pool", kind, "conv"), step("act", "relu", "pool"))
    return Model(FREE, before, ("act",)), Model(FREE, after, ("act",))


PAIRS: dict[str, Callable[[], tuple[Model, Model]]] = {
    "a norm behind a mean": lambda: headed("mean"),
    "two norms behind a mean": lambda: headed("mean", 2),
    "a norm ahead of a mean": lambda: pooled("mean"),
    "a norm with factors of both signs ahead of a mean": lambda: pooled("mean", made_positive=False),
    "a norm ahead of a maximum": lambda: pooled("largest"),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_right_folds_are_proved_both_ways(pair: str) -> None:
    before, after = PAIRS[pair]()
    for certificate in (check(before, after), check(after, before)):
        if certificate.verdict is Verdict.PROVED:
            assert any("passes through it" in result.sentence for result in certificate.structure), certificate
        else:  # the other way round the roundings are those of the rich model
            assert certificate.verdict is Verdict.MEASURED
    assert check(before, after).verdict is Verdict.PROVED


FAULTS: dict[str, Callable[[Array], Array]] = {
    "one number off by 1e-5": lambda w: np.concatenate([w[:1] * np.float32(1 + 1e-5), w[1:]]),
    "rows swapped": lambda w: w[::-1].copy(),
    "a number gone": lambda w: np.concatenate([w[:1] * 0, w[1:]]),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("what", ["w", "b"])
@pytest.mark.parametrize("pair", PAIRS)
def test_wrong_ones_are_refuted(pair: str, what: str, fault: str) -> None:
    before, after = PAIRS[pair]()
    name = "head" if "behind" in pair else "conv"
    weights = next(own for own in after.steps if own.name == name).weights
    certificate = check(before, after.edited(name, **{what: FAULTS[fault](weights[what])}))
    assert certificate.verdict is Verdict.REFUTED, certificate


def test_a_norm_that_was_lost_is_refuted() -> None:
    before, after = headed("mean")
    head = next(own for own in before.steps if own.name == "head")
    certificate = check(before, after.edited("head", **head.weights))
    assert certificate.verdict is Verdict.REFUTED, certificate


def test_factors_of_both_signs_do_not_go_ahead_of_a_maximum() -> None:
    assert check(*pooled("largest", made_positive=False)).verdict is Verdict.REFUTED


@pytest.mark.parametrize("make", [headed, pooled])
def test_an_operator_that_only_says_that_maps_pass_is_not_believed(make: Any) -> None:
    certificate = check(*make("leaking"))
    assert certificate.verdict is Verdict.REFUTED, certificate
    assert not any("passes through it" in result.sentence for result in certificate.structure)
