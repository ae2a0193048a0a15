"""A thousand random right folds are proved. Every third again with one fault: all are refuted, at their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from proof.models import Built, check, stack
from proof.numpy_frontend import Model, Step
from refold.proof import Verdict

Array = Any
CHUNK = 50


def drawn(seed: int) -> Built:
    rng = np.random.default_rng(seed)
    groups = int(rng.choice([1, 1, 2]))
    return stack(
        rng,
        blocks=int(rng.integers(1, 3)),
        channels=int(rng.integers(1, 3)) * groups,
        size=int(rng.choice([4, 5, 7])) if rng.integers(2) else None,
        groups=groups,
        stride=int(rng.integers(1, 3)),
    )


def off_by(relative: float) -> Callable[[Array, np.random.Generator], Array]:
    def edit(array: Array, rng: np.random.Generator) -> Array:
        changed = array.copy()
        changed.flat[rng.integers(array.size)] *= np.float32(1 + relative)
        return changed

    return edit


def transposed(array: Array, rng: np.random.Generator) -> Array:
    return array.swapaxes(2, 3) if array.ndim == 4 else array[::-1].copy() + np.float32(0.5)


def replaced(value: float) -> Callable[[Array, np.random.Generator], Array]:
    def edit(array: Array, rng: np.random.Generator) -> Array:
        changed = array.copy()
        changed.flat[rng.integers(array.size)] = value
        return changed

    return edit


EDITS: Mapping[str, Callable[[Array, np.random.Generator], Array]] = {
    "one off by 1e-5": off_by(1e-5),
    "one off by -1e-6": off_by(-1e-6),
    "doubled": lambda array, rng: 2 * array,
    "transposed": transposed,
    "not a number": replaced(np.nan),
    "infinite": replaced(np.inf),
    "gone": lambda array, rng: 0 * array,
}


def edited(model: Model, folded: Step, word: str, edit: str, rng: np.random.Generator) -> Model:
    return model.edited(folded.name, **{word: EDITS[edit](folded.weights[word], rng)})


@pytest.mark.parametrize("start", range(0, 1000, CHUNK))
def test_right_folds_are_proved_and_wrong_ones_refuted(start: int) -> None:
    for seed in range(start, start + CHUNK):
        model = drawn(seed)
        certificate = check(model.before, model.after, seed=seed)
        assert certificate.verdict is Verdict.PROVED, (seed, certificate)
        if seed % 3 == 0:
            assert_refuted_with_one_fault(model, seed)


def assert_refuted_with_one_fault(model: Built, seed: int) -> None:
    rng = np.random.default_rng(seed)
    edit = list(EDITS)[seed // 3 % len(EDITS)]
    folded = [step for step in model.after.steps if step.name.endswith("/folded")]
    step = folded[int(rng.integers(len(folded)))]
    word = "w" if rng.integers(2) else "b"
    wrong = edited(model.after, step, word, edit, rng)
    assert any(not np.array_equal(a, b) for a, b in zip(weights(wrong), weights(model.after), strict=True))
    certificate = check(model.before, wrong, seed=seed)
    assert certificate.verdict is Verdict.REFUTED, (seed, edit, word, certificate)
    if edit.startswith("one off"):
        places = [r.where for r in (*certificate.structure, *certificate.regions) if r.verdict is Verdict.REFUTED]
        assert places == [step.name.replace("/folded", "/add")], (seed, edit, word, certificate)


def weights(model: Model) -> list[Array]:
    return [array for step in model.steps for array in step.weights.values()]
