"""What a report has to say: the verdict, three answers, the gains. Page and Markdown share it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from refold.bench import Timing
from refold.graph import Plan
from refold.proof.certificate import TONES, Certificate, EndToEndResult, Verdict


@final
@dataclass(frozen=True)
class Training:
    """How a network was trained, epoch by epoch, for the page's curve."""

    loss: tuple[float, ...]
    accuracy: tuple[float, ...]
    accuracy_before: float
    accuracy_after: float
    scales: dict[str, float] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Page:
    """What a report shows; parts that are None are left out. ``done`` says that the plan was carried out."""

    title: str
    plan: Plan | None = None
    certificate: Certificate | None = None
    timing: Timing | None = None
    training: Training | None = None

    @property
    def done(self) -> bool:
        """Whether the plan was carried out: then there is a certificate for what came of it."""
        return self.certificate is not None


@final
@dataclass(frozen=True)
class Gain:
    """One thing that became less: in words, and ``share``, after by before, with its quartiles where it was
    measured and not counted."""

    name: str
    before: str
    after: str
    share: float
    low: float | None = None
    high: float | None = None

    @property
    def change(self) -> str:
        """The change in per cent."""
        percent = 100 * (self.share - 1)
        if abs(percent) < 0.05:
            return "0 %"
        return (f"{percent:+.1f} %" if abs(percent) < 1 else f"{percent:+.0f} %").replace("-", "−")


@final
@dataclass(frozen=True)
class Answer:
    """One question that everybody asks, and the answer: a few words, and a sentence or two."""

    question: str
    short: str
    long: str


def tone(page: Page) -> str:
    """``good``, ``warn``, ``bad`` or ``plain``."""
    if page.certificate is None:
        return "plain"
    return TONES[page.certificate.verdict]


def verdict(page: Page) -> str:
    """What was shown, in a few words."""
    if page.certificate is not None:
        return {
            Verdict.PROVED: "Proved: the same function",
            Verdict.MEASURED: "Measured, not proved: the same to rounding",
            Verdict.REFUTED: "Refuted: not the same function",
            Verdict.SKIPPED: "Nothing could be shown",
        }[page.certificate.verdict]
    if page.plan is not None:
        if not page.plan.changes_something:
            return "Nothing to fold"
        return f"{_count(_places(page.plan), 'place')} can be folded"
    if page.timing is not None:
        return f"{page.timing.ratio:.2f} times as fast"
    return "Nothing was looked at"


def answers(page: Page) -> tuple[Answer, ...]:
    """What was done, whether it is safe, what was gained: what someone who knows nothing of this wants to know."""
    past = page.done or page.plan is None or not page.plan.changes_something
    return (
        Answer("What was done?" if past else "What would be done?", *_what_was_done(page)),
        Answer("Is it safe?", *_is_it_safe(page)),
        Answer("What was gained?" if past else "What would be gained?", *_gained(page)),
    )


def _what_was_done(page: Page) -> tuple[str, str]:
    plan = page.plan
    if plan is None:
        if page.certificate is not None:
            return "Two networks were compared", "Do both compute the same, for every input?"
        if page.timing is not None:
            return "Two networks were timed", f"Each ran {page.timing.repeats} times, in turn, on the same input."
        return "Nothing", ""
    if not plan.changes_something:
        return "Nothing", "No layers of this network can be merged exactly and cheaper."
    became, was = ("became", "was") if page.done else ("would become", "would be")
    parts = []
    if plan.regions:
        verb = was if len(plan.regions) == 1 or not page.done else "were"
        parts.append(f"{_count(len(plan.regions), 'group')} of layers {verb} merged by algebra")
    if plan.evaluated:
        verb = was if len(plan.evaluated) == 1 or not page.done else "were"
        parts.append(f"{_count(len(plan.evaluated), 'computed weight')} {verb} stored as plain numbers")
    apart = len(plan.kept)
    rest = f" {_count(apart, 'place')} stayed apart, each with its reason below." if apart else ""
    return (
        f"{plan.before.operators:,} operators {became} {plan.after.operators:,}",
        f"{' and '.join(parts)}; everything else {'is' if page.done else 'stays'} as it was.{rest}",
    )


def _is_it_safe(page: Page) -> tuple[str, str]:
    certificate = page.certificate
    if certificate is None:
        if page.plan is not None:
            return "Not proved yet", "Nothing was changed. refold fold proves its result before it writes it."
        return "Not looked at here", "This report is about speed; refold prove says whether both compute the same."
    sentence = f"{certificate.sentence[:1].upper()}{certificate.sentence[1:]}."
    worst = worst_error(certificate)
    if worst is not None and worst.original_max_error is not None and certificate.ok:
        sentence += (
            f" On test inputs the outputs are off by at most {worst.max_error:.1e}, which is rounding: "
            f"the original's own is {worst.original_max_error:.1e}."
        )
    return {
        Verdict.PROVED: "Yes: proved for every input",
        Verdict.MEASURED: "Very likely: measured, not proved",
        Verdict.REFUTED: "No: do not ship it",
        Verdict.SKIPPED: "Not known",
    }[certificate.verdict], sentence


def worst_error(certificate: Certificate) -> EndToEndResult | None:
    """The whole-network comparison with the largest error among those that have a reference."""
    known = [result for result in certificate.end_to_end if result.original_max_error is not None]
    return max(known, key=lambda result: result.max_error, default=None)


def _gained(page: Page) -> tuple[str, str]:
    found = gains(page)
    less = [f"{gain.name} {gain.change}" for gain in found if gain.name != "latency" and gain.share < 0.9995]
    if page.timing is not None:
        spread = f"quartiles {page.timing.ratio_low:.2f} to {page.timing.ratio_high:.2f}"
        return f"{page.timing.ratio:.2f} times as fast", f"{_sentence(spread)} {_sentence(', '.join(less))}".strip()
    if page.plan is None:
        return "Not looked at here", "refold fold and refold bench count and time what folding saves."
    if not less:
        return "Nothing", "No operator, multiply-add or parameter less."
    multiply_adds = next(gain for gain in found if gain.name == "multiply-adds")
    operators = next(gain for gain in found if gain.name == "operators")
    first = multiply_adds if multiply_adds.share < 0.95 else operators
    rest = [words for words in less if not words.startswith(first.name)]
    return f"{first.change.strip('+−')} fewer {first.name}", _sentence(", ".join(rest))


def gains(page: Page) -> list[Gain]:
    """What folding saves, the most tangible first."""
    found = []
    timing = page.timing
    if timing is not None:
        found.append(
            Gain(
                "latency",
                duration(timing.before.median),
                duration(timing.after.median),
                1 / timing.ratio,
                1 / timing.ratio_high,
                1 / timing.ratio_low,
            )
        )
    savings = page.plan.savings if page.plan is not None else timing.savings if timing is not None else ()
    found += [Gain(s.name, f"{s.before:,}", f"{s.after:,}", s.share) for s in savings]
    return found


def duration(seconds: float) -> str:
    """A time for people."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _places(plan: Plan) -> int:
    return len(plan.regions) + len(plan.evaluated)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""
