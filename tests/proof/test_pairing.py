"""Which value of one model is which of the other."""

from __future__ import annotations

import numpy as np
import pytest

from proof.numpy_frontend import FRONTEND, Model, step
from refold.proof.digest import Keys
from refold.proof.pairing import pair

SHAPE = (None, 2, 4, 4)
ROUNDED = 1 + 3e-8


def scaled(factors: dict[str, float]) -> Model:
    """The input times each factor, one beside the other."""
    steps = [step(name, "add", "x", settings={"factors": (factor,)}) for name, factor in factors.items()]
    return Model({"x": SHAPE}, (*steps, step("all", "concat", *sorted(factors))), ("all",))


@pytest.mark.parametrize("first", [0.7, -0.7, 0.0])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_each_of_many_values_of_one_shape_finds_its_own(first: float) -> None:
    numbers = np.random.default_rng(5).uniform(-4, 4, 40)
    factors = {f"v{place:02}": float(n) for place, n in enumerate([*numbers, np.inf, -np.inf, np.nan, 1e-300])}
    before = FRONTEND.lift(scaled(factors))
    after = FRONTEND.lift(scaled({name: factor * ROUNDED for name, factor in reversed(factors.items())}))
    x = np.random.default_rng(6).standard_normal((1, 2, 4, 4))
    x[0, 0, 0, 0] = first
    found = pair(FRONTEND, before, after, [x], (Keys(FRONTEND, before), Keys(FRONTEND, after))).counterparts
    assert {name: found[name][:1] for name in factors} == {name: (name,) for name in factors}
