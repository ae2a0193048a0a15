"""The same parameters give the same affine convolution as in every other front end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from graphs import Builder

import contract
from contract import EPSILON, SIZE


def norm(b: Builder, p: Mapping[str, Any], name: str, x: str) -> str:
    given = [b.constant(p[f"{name}.{word}"]) for word in ("gamma", "beta", "mean", "variance")]
    return str(b.op("BatchNormalization", x, *given, epsilon=EPSILON))


def repvgg(b: Builder, p: Mapping[str, Any], x: str) -> str:
    three = norm(b, p, "three", b.op("Conv", x, b.constant(p["three"]), pads=[1, 1, 1, 1], group=2))
    one = norm(b, p, "one", b.op("Conv", x, b.constant(p["one"]), group=2))
    return str(b.op("Sum", three, b.op("Mul", b.constant(p["alpha"]), one), norm(b, p, "identity", x)))


def norm_before_and_behind(b: Builder, p: Mapping[str, Any], x: str) -> str:
    y = norm(b, p, "before", x)
    return norm(b, p, "behind", b.op("Conv", y, b.constant(p["weight"]), b.constant(p["bias"]), strides=[2, 2]))


def dense(b: Builder, p: Mapping[str, Any], x: str) -> str:
    y = b.op("Gemm", x, b.constant(p["wide"]), b.constant(p["wide_bias"]), transB=1)
    y = b.op("Add", b.op("MatMul", y, b.constant(p["narrow"].T)), b.constant(p["narrow_bias"]))
    return norm(b, p, "norm", y)


def transposed(b: Builder, p: Mapping[str, Any], x: str) -> str:
    y = b.op("ConvTranspose", x, b.constant(p["weight"]), strides=[2, 2], pads=[1, 1, 1, 1])
    return norm(b, p, "norm", y)


MODELS = {made.__name__: made for made in (repvgg, norm_before_and_behind, dense, transposed)}


@pytest.mark.parametrize("name", contract.CASES)
def test_the_same_parameters_are_the_same_convolution_everywhere(name: str) -> None:
    b = Builder()
    x = b.input("N", 4) if name == "dense" else b.input("N", 4, SIZE, SIZE)
    model = b.model(MODELS[name](b, contract.CASES[name].parameters, x))
    contract.assert_lifts_to(contract.CASES[name], model, None)
