"""Golden vectors of the weight methods, for every framework: see make_golden.py for where they come from.

A test on a framework turns ``case.arrays`` into tensors, calls :func:`compose` on its namespace of array functions
(or its layer), takes the gradients of ``sum(case.target * weight)``, and hands both to :func:`check`::

    @pytest.mark.parametrize("case", golden.CASES, ids=str)
    def test_golden_vectors(case):
        tensors = {name: tensor(array) for name, array in case.arrays.items()}
        weight = golden.compose(case, NAMESPACE, tensors)
        ...
        golden.check(case, weight, {name: gradient for name in case.gradients}, "float32")
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import refold.weights
from refold.weights import LowRank, Orthogonal, Spectral, SpectralState

# Relative to the largest entry of a row: some roundings, of sums of six terms.
TOLERANCES = {"float32": 4e-6, "float64": 1e-13}


@dataclass(frozen=True, eq=False)
class Case:
    """``method`` and its ``arrays`` by name, all float64 and (but for singular vectors) exact in every type.

    ``weight`` is what ``compose`` gives, ``gradients`` are those of ``sum(target * weight)`` for the arrays that
    train; all other arrays are constants.
    """

    name: str
    method: Any
    arrays: dict[str, Any]
    target: Any
    weight: Any
    gradients: dict[str, Any]

    def __str__(self) -> str:
        return self.name


def _case(entry: Mapping[str, Any]) -> Case:
    array = np.asarray
    return Case(
        entry["name"],
        getattr(refold.weights, entry["method"])(**entry["options"]),
        {name: array(value, "float64") for name, value in entry["arrays"].items()},
        array(entry["target"], "float64"),
        array(entry["weight"], "float64"),
        {name: array(value, "float64") for name, value in entry["gradients"].items()},
    )


CASES = [_case(entry) for entry in json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))]
# The cases of methods of rows: a direction, a gain and an offset per unit.
ROW_CASES = [case for case in CASES if "offset" in case.arrays]


def compose(case: Case, xp: Any, arrays: Mapping[str, Any]) -> Any:
    """The weight by the case's method, on a namespace of array functions and arrays of its framework."""
    match case.method:
        case Spectral():
            state = SpectralState(arrays["left"], arrays["right"])
            return case.method.compose(xp, arrays["direction"], state, arrays["gain"])
        case LowRank():
            return case.method.compose(xp, arrays["base"], arrays["up"], arrays["down"], arrays.get("gain"))
        case Orthogonal():
            return case.method.compose(xp, arrays["direction"], arrays["base"], arrays["gain"])
        case _:
            return case.method.compose(xp, arrays["direction"], arrays["gain"], arrays["offset"])


def check(case: Case, weight: Any, gradients: Mapping[str, Any] | None = None, dtype: str = "float32") -> None:
    """Compare a weight, and gradients where there are any, computed in ``dtype``, with the golden ones.

    Raises:
        AssertionError: something is further off than some roundings, not finite, or missing.
    """
    _near(weight, case.weight, TOLERANCES[dtype], 0.0, f"{case.name}: the weight")
    if gradients is None:
        return
    assert set(gradients) == set(case.gradients), f"{case.name}: gradients of {sorted(gradients)}"
    for name, expected in case.gradients.items():
        # A number per row or matrix is the sum of products with the target, which may cancel.
        least = np.max(np.abs(case.target)) if expected.shape[-1] == 1 else 0.0
        _near(gradients[name], expected, 5 * TOLERANCES[dtype], least, f"{case.name}: the gradient of {name}")


def _near(made: Any, expected: Any, tolerance: float, least: float, what: str) -> None:
    made = np.asarray(made, "float64")
    assert made.shape == expected.shape, f"{what} has shape {made.shape}, not {expected.shape}"
    sizes = np.maximum(np.max(np.abs(expected), axis=-1, keepdims=True), least)  # rows differ in size
    assert np.all(np.isfinite(made)), f"{what} is not finite"
    error = np.max(np.abs(made - expected) / np.where(sizes > 0, sizes, 1.0))
    assert error <= tolerance, f"{what} is off by {error:.1e} of its largest entry: {made} instead of {expected}"
