"""What a stranger reads first: the verdict and the three answers."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from made_up import certificate, plan, proved, timing

from refold.proof.certificate import Verdict
from refold.report.summary import Page, answers, gains, tone, verdict


def shorts(page: Page) -> list[str]:
    return [answer.short for answer in answers(page)]


def test_a_proved_fold() -> None:
    page = Page("model", plan(), proved())
    assert verdict(page) == "Proved: the same function"
    assert tone(page) == "good"
    assert shorts(page) == ["12 operators became 4", "Yes: proved for every input", "17 % fewer multiply-adds"]
    done, safe, _ = answers(page)
    assert (
        done.long
        == "2 groups of layers were merged by algebra; everything else is as it was. 1 place stayed "
        + ("apart, each with its reason below.")
    )
    assert "off by at most 2.0e-07, which is rounding: the original's own is 3.0e-07." in safe.long


def test_a_refuted_pair_does_not_call_errors_rounding() -> None:
    page = Page("two", certificate=certificate())
    assert tone(page) == "bad"
    assert shorts(page)[:2] == ["Two networks were compared", "No: do not ship it"]
    assert "rounding" not in answers(page)[1].long


@pytest.mark.parametrize(
    ("found", "words", "color"),
    [(Verdict.MEASURED, "Very likely", "warn"), (Verdict.SKIPPED, "Not known", "warn")],
)
def test_less_than_a_proof_does_not_look_like_one(found: Verdict, words: str, color: str) -> None:
    page = Page("two", certificate=replace(proved(), verdict=found))
    assert tone(page) == color
    assert shorts(page)[1].startswith(words)
    assert "Proved" not in verdict(page)


def test_a_plan_is_told_as_what_would_be() -> None:
    page = Page("model", plan())
    assert verdict(page) == "2 places can be folded"
    assert [answer.question for answer in answers(page)] == [
        "What would be done?",
        "Is it safe?",
        "What would be gained?",
    ]
    assert shorts(page)[:2] == ["12 operators would become 4", "Not proved yet"]
    assert verdict(Page("model", plan(blocks=0))) == "Nothing to fold"


def test_a_timing_alone() -> None:
    page = Page("two", timing=timing())
    assert verdict(page) == "2.00 times as fast"
    assert [gain.name for gain in gains(page)] == [
        "latency",
        "operators",
        "multiply-adds",
        "bytes moved",
        "parameters",
    ]
    assert gains(page)[0].change == "−50 %"
    assert shorts(page)[1] == "Not looked at here"
