"""The table of all methods in the documentation: its formulas are computed as they are written there."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from documents import ROOT
from refold.weights import METHODS, NUMPY, LowRank, Orthogonal, Spectral, SpectralState, method

PAGE = ROOT / "docs" / "weight-normalization.md"
EPSILON = 0.3  # as large as the weights, so that it shows where it sits


def rows() -> dict[str, list[str]]:
    """The cells behind the name of each method."""
    table = PAGE.read_text(encoding="utf-8").partition("| method | the weight |")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]
    return {line[0].strip('`"| '): line[1:] for line in cells}


ROWS = rows()
RNG = np.random.default_rng(0)
V = RNG.normal(0.2, 0.7, size=(3, 5))
G, OFFSET = RNG.normal(size=(3, 1)), RNG.normal(size=(3, 1))


def size(x: Any) -> Any:
    return np.sqrt(np.sum(x**2, axis=-1, keepdims=True))


def exponential(matrix: Any) -> Any:
    values, vectors = np.linalg.eig(matrix)
    return (vectors @ np.diag(np.exp(values)) @ np.linalg.inv(vectors)).real


def written(name: str, **values: Any) -> Any:
    """What the formula in the table gives."""
    formula = re.fullmatch(r"`(.*)`", ROWS[name][0])
    assert formula
    functions = {
        "norm": size,
        "rms": lambda x: np.sqrt(np.mean(x**2, axis=-1, keepdims=True)),
        "std": lambda x: np.std(x, axis=-1, keepdims=True),
        "var": lambda x: np.var(x, axis=-1, keepdims=True),
        "sigma": lambda x: np.linalg.norm(x, 2),
        "max": np.maximum,
        "sqrt": np.sqrt,
        "inv": np.linalg.inv,
        "expm": exponential,
    }
    given = {"v": V, "c": V - V.mean(axis=1, keepdims=True), "n": 5, "g": G, "a": 1.0, "offset": OFFSET}
    return eval(formula[1], {"__builtins__": {}}, {**functions, **given, "epsilon": EPSILON, **values})


def test_every_method_has_a_row() -> None:
    matrices = ["spectral", "sigma-Reparam", "Cayley", "exponential", "LoRA", "DoRA"]
    assert set(ROWS) == {*METHODS, *matrices}


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_rows_are_their_formulas(name: str) -> None:
    chosen = method(name, EPSILON)
    found = chosen.compose(NUMPY, V, G, OFFSET if chosen.centered else None)
    np.testing.assert_allclose(found, written(name), rtol=1e-12, atol=1e-13)
    assert float(ROWS[name][1]) == method(name).epsilon
    own = method(name)
    assert ROWS[name][3] == "nothing"
    np.testing.assert_allclose(own.compose(NUMPY, *own.decompose(NUMPY, V)), V, rtol=1e-12)


@pytest.mark.parametrize(("name", "gain"), [("spectral", None), ("sigma-Reparam", np.full((1, 1), 1.7))])
def test_spectral_normalization_is_its_formula(name: str, gain: Any) -> None:
    state, attached = Spectral().attach(V)
    found = Spectral(EPSILON).compose(NUMPY, V, SpectralState(*state), gain)
    np.testing.assert_allclose(found, written(name, g=gain), rtol=1e-12)
    assert float(ROWS[name][1]) == Spectral().epsilon
    kept = np.allclose(Spectral().compose(NUMPY, V, state, attached if gain is not None else None), V)
    assert ROWS[name][3] == ("nothing" if kept else "divides by sigma")


@pytest.mark.parametrize(("name", "kind"), [("Cayley", "cayley"), ("exponential", "exponential")])
def test_orthogonal_weights_are_their_formula(name: str, kind: str) -> None:
    orthogonal = Orthogonal(kind)
    _, base, gain = orthogonal.attach(V)
    turned = base + 0.3 * RNG.normal(size=V.shape)
    skew = base.T @ turned - turned.T @ base
    found = orthogonal.compose(NUMPY, turned, base, gain)
    np.testing.assert_allclose(found, written(name, g=gain, b=base, A=skew, I=np.eye(5)), rtol=1e-9, atol=1e-12)
    assert ROWS[name][3] == "takes the nearest orthogonal matrix"
    np.testing.assert_allclose(base @ base.T, np.eye(3), atol=1e-12)
    # Of all matrices with orthonormal rows, the nearest: no other of many is nearer.
    for _ in range(50):
        other = np.linalg.qr(RNG.normal(size=(5, 3)))[0].T
        assert np.linalg.norm(base - V) < np.linalg.norm(other - V)


@pytest.mark.parametrize(("name", "magnitude"), [("LoRA", False), ("DoRA", True)])
def test_low_rank_sums_are_their_formula(name: str, magnitude: bool) -> None:
    low_rank = LowRank(0.4, magnitude)
    up, down = RNG.normal(size=(3, 2)), RNG.normal(size=(2, 5))
    found = low_rank.compose(NUMPY, V, up, down, G if magnitude else None)
    np.testing.assert_allclose(found, written(name, w0=V, scale=0.4, up=up, down=down), rtol=1e-12)
    assert ROWS[name][3] == "nothing"
    np.testing.assert_array_equal(low_rank.compose(NUMPY, *low_rank.attach(NUMPY, V, down)), V)


def test_the_gain_of_an_activation_is_where_the_table_has_it() -> None:
    from refold.weights import Centered, TimmStandardization, activation_gain

    a = activation_gain("silu")
    assert not math.isclose(a, 1.0)
    for name, chosen in {
        "centered": Centered(EPSILON, "silu"),
        "timm-scaled-standardization": TimmStandardization(EPSILON, True, "silu"),
    }.items():
        np.testing.assert_allclose(chosen.compose(NUMPY, V, G, OFFSET), written(name, a=a), rtol=1e-12)
