"""What every front end must make of the same parameters: one affine convolution, written out here by the formulas
of the papers in float64, with nothing of the engine.

Each front end builds the models with its own layers (its ``test_contract.py``) and is held to the same numbers, so
all are held to each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import refold

Array = npt.NDArray[Any]

EPSILON = 2.0**-10  # some formats store it in float32
SIZE = 7


@dataclass(frozen=True)
class Case:
    """``parameters`` in float32, channels first; ``kernel`` ``(out, in/groups, *taps)`` and ``bias`` are what they
    amount to. A transposed convolution's kernel is that of a convolution which reads zeros between its inputs."""

    name: str
    parameters: Mapping[str, Array]
    kernel: Array
    bias: Array


def _numbers(rng: np.random.Generator, **shapes: tuple[int, ...]) -> dict[str, Array]:
    return {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}


def _norm(rng: np.random.Generator, name: str, channels: int) -> dict[str, Array]:
    drawn = _numbers(rng, **{f"{name}.{word}": (channels,) for word in ("gamma", "beta", "mean")})
    return {**drawn, f"{name}.variance": rng.uniform(0.3, 2.0, channels).astype("float32")}


def _scale_and_shift(parameters: Mapping[str, Array], name: str) -> tuple[Array, Array]:
    words = ("gamma", "beta", "mean", "variance")
    gamma, beta, mean, variance = (parameters[f"{name}.{word}"].astype("float64") for word in words)
    scale = gamma / np.sqrt(variance + EPSILON)
    return scale, beta - mean * scale


def _repvgg() -> Case:
    """RepVGG (arXiv:2101.03697, section 3.3) in two groups, with a factor on the second branch."""
    rng = np.random.default_rng(1)
    p = _numbers(rng, three=(4, 2, 3, 3), one=(4, 2, 1, 1))
    p |= {"alpha": np.float32(-0.7), **_norm(rng, "three", 4), **_norm(rng, "one", 4), **_norm(rng, "identity", 4)}
    kernel, bias = np.zeros((4, 2, 3, 3)), np.zeros(4)
    for name, weight, factor in (
        ("three", p["three"], 1.0),
        ("one", np.pad(p["one"], ((0, 0), (0, 0), (1, 1), (1, 1))), float(p["alpha"])),
        ("identity", np.zeros((4, 2, 3, 3)), 1.0),
    ):
        weight = weight.astype("float64")
        if name == "identity":
            weight[np.arange(4), np.arange(4) % 2, 1, 1] = 1.0
        scale, shift = _scale_and_shift(p, name)
        kernel += factor * weight * scale[:, None, None, None]
        bias += factor * shift
    return Case("repvgg", p, kernel, bias)


def _norm_before_and_behind() -> Case:
    """A batch norm, a strided convolution without padding, a batch norm."""
    rng = np.random.default_rng(2)
    p = _numbers(rng, weight=(5, 4, 3, 2), bias=(5,)) | _norm(rng, "before", 4) | _norm(rng, "behind", 5)
    (first, moved), (last, end) = (_scale_and_shift(p, name) for name in ("before", "behind"))
    weight = p["weight"].astype("float64")
    bias = p["bias"] + np.einsum("ocij,c->o", weight, moved)
    kernel = weight * first[:, None, None] * last[:, None, None, None]
    return Case("norm_before_and_behind", p, kernel, bias * last + end)


def _dense() -> Case:
    """Two dense layers, the second narrower, and a batch norm."""
    rng = np.random.default_rng(3)
    p = _numbers(rng, wide=(9, 4), wide_bias=(9,), narrow=(2, 9), narrow_bias=(2,)) | _norm(rng, "norm", 2)
    scale, shift = _scale_and_shift(p, "norm")
    matrix = p["narrow"].astype("float64") @ p["wide"]
    bias = p["narrow"].astype("float64") @ p["wide_bias"] + p["narrow_bias"]
    return Case("dense", p, matrix * scale[:, None], bias * scale + shift)


def _transposed() -> Case:
    """A transposed convolution and a batch norm; ``weight`` is ``(in, out, *taps)``."""
    rng = np.random.default_rng(4)
    p = _numbers(rng, weight=(4, 3, 4, 4)) | _norm(rng, "norm", 3)
    scale, shift = _scale_and_shift(p, "norm")
    kernel = p["weight"].astype("float64").transpose(1, 0, 2, 3)[:, :, ::-1, ::-1] * scale[:, None, None, None]
    return Case("transposed", p, kernel, shift)


CASES = {case.name: case for case in (_repvgg(), _norm_before_and_behind(), _dense(), _transposed())}


def assert_lifts_to(case: Case, model: Any, example: Any) -> None:
    """All of ``model`` is one region, and that is the convolution of ``case``: to float64, before any rounding."""
    (region,) = refold.inspect(model, example).regions
    (part,) = region.parts
    (conv,) = part.form.terms.values()
    for found, expected in ((conv.kernel, case.kernel), (part.form.bias, case.bias)):
        found = found.reshape(expected.shape)
        assert np.max(np.abs(found - expected)) <= 1e-14 * np.max(np.abs(expected)) * expected[0].size
