"""Every wrong fold of the catalogue is refuted, every right one is proved (``benchmarks/catalogue``)."""

from __future__ import annotations

import pytest
from catalogue import Case, faults, published, random_right, right

import refold
from refold.proof import Verdict

WRONG = [*faults(), *published()]
# No model with such weights is read.
NOT_FINITE = ("one weight not a number", "one weight infinite")


@pytest.mark.parametrize("case", WRONG, ids=[case.name for case in WRONG])
def test_a_wrong_fold_is_refuted(case: Case) -> None:
    if case.name in NOT_FINITE:
        with pytest.raises(refold.InputError, match="not finite"):
            refold.prove(case.before, case.after, case.example)
        return
    certificate = refold.prove(case.before, case.after, case.example)
    assert certificate.verdict is Verdict.REFUTED, certificate
    assert not certificate.ok


@pytest.mark.parametrize("case", right(), ids=[case.name for case in right()])
def test_a_right_fold_is_proved(case: Case) -> None:
    certificate = refold.prove(case.before, case.after, case.example)
    assert certificate.verdict is Verdict.PROVED, certificate


@pytest.mark.parametrize("start", range(0, 100, 20))
def test_no_random_right_fold_is_refuted(start: int) -> None:
    for seed in range(start, start + 20):
        case = random_right(seed)
        certificate = refold.prove(case.before, case.after, case.example, seed=seed)
        assert certificate.verdict is Verdict.PROVED, (seed, certificate)


def test_names_are_unique_and_the_published_ones_have_a_source() -> None:
    names = [case.name for case in (*WRONG, *right())]
    assert len(names) == len(set(names))
    assert all(case.source for case in published())
