"""One HTML page, with nothing from outside in it: the verdict, the gains, the network, the evidence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from jinja2 import Environment, PackageLoader

from refold.bench import Timing
from refold.graph import Plan
from refold.proof.certificate import Certificate, Verdict
from refold.report import drawing
from refold.report.terminal import headline
from refold.shown import printable


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
    """What a page shows; parts that are None are left out."""

    title: str
    plan: Plan | None = None
    certificate: Certificate | None = None
    timing: Timing | None = None
    training: Training | None = None


@final
@dataclass(frozen=True)
class Gain:
    """One pair of bars: ``share`` is after over before."""

    name: str
    before: str
    after: str
    share: float


def render(page: Page) -> str:
    """The page as HTML text."""
    environment = Environment(loader=PackageLoader("refold", "report/templates"), autoescape=True, trim_blocks=True)
    environment.filters["clean"] = lambda text: printable(text, 300)
    environment.filters["capitalized"] = lambda text: text[:1].upper() + text[1:]
    plan = page.plan
    return environment.get_template("page.html").render(
        page=page,
        tone=_tone(page),
        verdict=verdict(page),
        headline=headline(plan) if plan else "",
        gains=gains(page),
        before=drawing.before(plan) if plan else None,
        after=drawing.after(plan) if plan else None,
        box_width=drawing.WIDTH,
        box_height=drawing.HEIGHT,
        curves=_curves(page.training),
        errors=_errors(page.certificate),
    )


def _tone(page: Page) -> str:
    if page.certificate is None:
        return "plain"
    return "good" if page.certificate.ok else "bad"


def verdict(page: Page) -> str:
    """What was shown, in a few words."""
    certificate = page.certificate
    if certificate is None:
        return "Not proved yet: this page shows what would fold"
    return {
        Verdict.PROVED: "Proved: the same function",
        Verdict.MEASURED: "Measured: the same to rounding",
        Verdict.REFUTED: "Refuted: not the same function",
        Verdict.SKIPPED: "Nothing could be shown",
    }[certificate.verdict]


def gains(page: Page) -> list[Gain]:
    """What folding saves, the most tangible first."""
    found = []
    if page.plan is not None:
        for saving in page.plan.savings:
            found.append(Gain(saving.name, f"{saving.before:,}", f"{saving.after:,}", min(saving.share, 1.0)))
    if page.timing is not None:
        first, second = page.timing.before.median, page.timing.after.median
        found.insert(
            0, Gain("latency", f"{1e3 * first:.2f} ms", f"{1e3 * second:.2f} ms", min(second / first, 1.0))
        )
    return found


def _curves(training: Training | None) -> dict[str, str]:
    if training is None:
        return {}
    top = max(training.loss, default=1.0)
    return {
        "loss": drawing.curve(training.loss, 600, 160, 0.0, top),
        "accuracy": drawing.curve(training.accuracy, 600, 160, 0.0, 1.0),
    }


@final
@dataclass(frozen=True)
class ErrorRow:
    """The errors of both models on one kind of input, as numbers and as lengths of bars (at most 1)."""

    inputs: str
    original: float
    folded: float
    original_bar: float
    folded_bar: float


def _errors(certificate: Certificate | None) -> list[ErrorRow]:
    rows = []
    for entry in certificate.end_to_end if certificate else ():
        if entry.original_max_error is None:
            continue
        top = max(entry.max_error, entry.original_max_error) or 1.0
        bars = entry.original_max_error / top, entry.max_error / top
        rows.append(ErrorRow(entry.inputs, entry.original_max_error, entry.max_error, *bars))
    return rows
