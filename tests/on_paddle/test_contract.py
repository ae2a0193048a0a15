"""The same parameters give the same affine convolution as in every other front end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn
from zoo import Body

import contract
from contract import EPSILON, SIZE


def norm(p: Mapping[str, Any], name: str, kind: Any = nn.BatchNorm2D) -> Any:
    made = kind(p[f"{name}.gamma"].size, epsilon=EPSILON)
    words = {"weight": "gamma", "bias": "beta", "_mean": "mean", "_variance": "variance"}
    for own, word in words.items():
        getattr(made, own).set_value(p[f"{name}.{word}"])
    return made


def weighted(layer: Any, weight: Any, bias: Any = None) -> Any:
    layer.weight.set_value(np.ascontiguousarray(weight))
    if bias is not None:
        layer.bias.set_value(bias)
    return layer


def repvgg(p: Mapping[str, Any]) -> Any:
    model = Body(
        lambda s, x: s.n3(s.three(x)) + s.alpha * s.n1(s.one(x)) + s.ni(x),
        three=weighted(nn.Conv2D(4, 4, 3, padding=1, groups=2, bias_attr=False), p["three"]),
        one=weighted(nn.Conv2D(4, 4, 1, groups=2, bias_attr=False), p["one"]),
        n3=norm(p, "three"),
        n1=norm(p, "one"),
        ni=norm(p, "identity"),
    )
    model.alpha = model.create_parameter([1])
    model.alpha.set_value(np.reshape(p["alpha"], (1,)))
    return model


def norm_before_and_behind(p: Mapping[str, Any]) -> Any:
    conv = weighted(nn.Conv2D(4, 5, (3, 2), stride=2), p["weight"], p["bias"])
    return nn.Sequential(norm(p, "before"), conv, norm(p, "behind"))


def dense(p: Mapping[str, Any]) -> Any:
    wide = weighted(nn.Linear(4, 9), p["wide"].T, p["wide_bias"])
    narrow = weighted(nn.Linear(9, 2), p["narrow"].T, p["narrow_bias"])
    return nn.Sequential(wide, narrow, norm(p, "norm", nn.BatchNorm1D))


def transposed(p: Mapping[str, Any]) -> Any:
    turned = nn.Conv2DTranspose(4, 3, 4, 2, 1, bias_attr=False)
    return nn.Sequential(weighted(turned, p["weight"]), norm(p, "norm"))


MODELS = {made.__name__: made for made in (repvgg, norm_before_and_behind, dense, transposed)}


@pytest.mark.parametrize("name", contract.CASES)
def test_the_same_parameters_are_the_same_convolution_everywhere(name: str) -> None:
    model = MODELS[name](contract.CASES[name].parameters)
    model.eval()
    shape = (2, 4) if name == "dense" else (2, 4, SIZE, SIZE)
    contract.assert_lifts_to(contract.CASES[name], model, paddle.zeros(shape))
