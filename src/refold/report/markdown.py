"""The report as Markdown, for a pull request: the verdict, the gains, what folds, what does not, the proof."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from refold.proof.certificate import Certificate, Verdict
from refold.report.summary import Page, answers, gains, verdict
from refold.shown import printable

# A comment on GitHub holds 65,536 characters; so many rows of each table fit whatever the names.
MOST_ROWS = 40


def render(page: Page) -> str:
    """The report as Markdown text (GitHub's flavor). Names from files are shown as code, never as markup."""
    return "\n".join(_lines(page))


def _lines(page: Page) -> Iterator[str]:
    yield f"### {verdict(page)}"
    yield ""
    for answer in answers(page):
        long = f": {_plain(answer.long[:1].lower() + answer.long[1:])}" if answer.long else ""
        yield f"- {answer.question} **{_plain(answer.short)}**{long}"
    rows = [(gain.name, gain.before, gain.after, gain.change) for gain in gains(page)]
    yield from _table(("", "before", "after", "change"), rows, numbers=(1, 2, 3))
    plan, certificate = page.plan, page.certificate
    if plan is not None and plan.changes_something:
        folded = [(_code(r.value), str(len(r.nodes)), r.operator, ", ".join(r.laws)) for r in plan.regions]
        folded += [(_code(name), "", "the same layer with plain weights", "evaluation") for name in plan.evaluated]
        title = "What was folded" if page.done else "What folds"
        yield from _folding(f"{title} ({len(folded)})", ("tensor", "steps", "becomes", "by"), folded, (1,))
    if plan is not None and plan.kept:
        kept = [(_code(entry.where), _plain(entry.reason)) for entry in plan.kept]
        yield from _folding(f"What stays apart ({len(kept)})", ("where", "because"), kept)
    if certificate is not None:
        yield from _evidence(certificate)
    notes = [*(plan.notes if plan is not None else ()), *(certificate.notes if certificate is not None else ())]
    if notes:
        yield from ("", *(f"- note: {_plain(note)}" for note in dict.fromkeys(notes)))


def _evidence(certificate: Certificate) -> Iterator[str]:
    off = [(s.where, s.verdict, s.sentence) for s in certificate.structure if s.verdict is not Verdict.PROVED]
    off += [(r.where, r.verdict, r.sentence) for r in certificate.regions if r.verdict is not Verdict.PROVED]
    shown = [(_code(where), verdict, _plain(sentence)) for where, verdict, sentence in off[:MOST_ROWS]]
    yield from _table(("what is off, or could not be shown", "verdict", "why"), shown)
    proofs = [
        (_code(r.where), r.verdict, _number(r.ratio), f"{r.impulses:,}", r.method) for r in certificate.regions
    ]
    if proofs:
        head = ("region", "verdict", "worst/allowed", "impulses", "method")
        yield from _folding(f"The proof ({len(proofs)} regions)", head, proofs, (2, 3))
    ends = [
        (r.inputs, _code(r.output), r.verdict, _number(r.original_max_error), _number(r.max_error))
        for r in certificate.end_to_end
    ]
    if ends:
        columns = ("inputs", "output", "verdict", "original's error", "error")
        yield from _folding("End to end, against the original in float64", columns, ends, (3, 4))


def _folding(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()
) -> Iterator[str]:
    """A table that opens with a click."""
    yield ""
    yield f"<details><summary>{title}</summary>"
    yield from _table(head, rows[:MOST_ROWS], numbers)
    if len(rows) > MOST_ROWS:
        yield from ("", f"and {len(rows) - MOST_ROWS:,} more")
    yield ""
    yield "</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> Iterator[str]:
    rows = list(rows)
    if not rows:
        return
    yield ""
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---:' if column in numbers else '---' for column in range(len(head)))} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _code(name: str) -> str:
    return f"`{printable(name, 120).replace('`', '?').replace('|', '?')}`"


def _plain(text: str) -> str:
    """A sentence that may hold names from a file, with nothing in it that Markdown or HTML would act on."""
    shown = printable(text, 400)
    return "".join(f"&#{ord(c)};" if c in "<>&|`*_[]\\#!@" else c for c in shown)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
