"""The same parameters give the same affine convolution as in every other front end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from zoo import Lambda

import contract
from contract import EPSILON, SIZE


def tensor(array: Any) -> Any:
    return nn.Parameter(torch.from_numpy(np.array(array)))


def norm(p: Mapping[str, Any], name: str, kind: Any = nn.BatchNorm2d) -> Any:
    made = kind(p[f"{name}.gamma"].size, eps=EPSILON)
    made.weight, made.bias = tensor(p[f"{name}.gamma"]), tensor(p[f"{name}.beta"])
    made.running_mean, made.running_var = (tensor(p[f"{name}.{word}"]).data for word in ("mean", "variance"))
    return made


def weighted(module: Any, weight: Any, bias: Any = None) -> Any:
    module.weight = tensor(weight)
    if bias is not None:
        module.bias = tensor(bias)
    return module


def repvgg(p: Mapping[str, Any]) -> Any:
    return Lambda(
        lambda s, x: s.n3(s.three(x)) + s.alpha * s.n1(s.one(x)) + s.ni(x),
        three=weighted(nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), p["three"]),
        one=weighted(nn.Conv2d(4, 4, 1, groups=2, bias=False), p["one"]),
        n3=norm(p, "three"),
        n1=norm(p, "one"),
        ni=norm(p, "identity"),
        alpha=tensor(p["alpha"]),
    )


def norm_before_and_behind(p: Mapping[str, Any]) -> Any:
    conv = weighted(nn.Conv2d(4, 5, (3, 2), stride=2), p["weight"], p["bias"])
    return nn.Sequential(norm(p, "before"), conv, norm(p, "behind"))


def dense(p: Mapping[str, Any]) -> Any:
    wide = weighted(nn.Linear(4, 9), p["wide"], p["wide_bias"])
    return nn.Sequential(
        wide, weighted(nn.Linear(9, 2), p["narrow"], p["narrow_bias"]), norm(p, "norm", nn.BatchNorm1d)
    )


def transposed(p: Mapping[str, Any]) -> Any:
    return nn.Sequential(weighted(nn.ConvTranspose2d(4, 3, 4, 2, 1, bias=False), p["weight"]), norm(p, "norm"))


MODELS = {made.__name__: made for made in (repvgg, norm_before_and_behind, dense, transposed)}


@pytest.mark.parametrize("name", contract.CASES)
def test_the_same_parameters_are_the_same_convolution_everywhere(name: str) -> None:
    model = MODELS[name](contract.CASES[name].parameters).eval()
    shape = (2, 4) if name == "dense" else (2, 4, SIZE, SIZE)
    contract.assert_lifts_to(contract.CASES[name], model, torch.zeros(shape))
