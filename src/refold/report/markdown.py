"""The report as Markdown, for a pull request: the verdict, the gains, what was folded and what was not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from refold.report.page import Page, gains, verdict
from refold.report.terminal import headline
from refold.shown import printable


def render(page: Page) -> str:
    """The report as Markdown text (GitHub's flavor). Names from files are shown as code, never as markup."""
    return "\n".join(_lines(page))


def _lines(page: Page) -> Iterator[str]:
    yield f"### {verdict(page)}"
    yield ""
    if page.certificate is not None:
        yield _plain(page.certificate.sentence)
    elif page.plan is not None:
        yield headline(page.plan)
    rows = [(gain.name, gain.before, gain.after) for gain in gains(page)]
    yield from _table(("", "before", "after"), rows, numbers=(1, 2))
    plan, certificate = page.plan, page.certificate
    if plan is not None and plan.changes_something:
        folded = [(_code(r.value), str(len(r.nodes)), r.operator, ", ".join(r.laws)) for r in plan.regions]
        folded += [(_code(name), "", "the same layer with plain weights", "evaluation") for name in plan.evaluated]
        yield from _folding(f"What was folded ({len(folded)})", ("tensor", "steps", "becomes", "by"), folded)
    if plan is not None and plan.kept:
        kept = [(_code(entry.where), _plain(entry.reason)) for entry in plan.kept]
        yield from _folding(f"What was kept apart ({len(kept)})", ("where", "because"), kept)
    if plan is not None and plan.notes:
        yield from ("", *(f"- note: {_plain(note)}" for note in plan.notes))
    if certificate is not None and certificate.regions:
        proofs = [
            (_code(r.where), r.verdict, "" if r.ratio is None else f"{r.ratio:.3g}", f"{r.impulses:,}", r.method)
            for r in certificate.regions
        ]
        head = ("region", "verdict", "worst/allowed", "impulses", "method")
        yield from _folding(f"The evidence ({len(proofs)} regions)", head, proofs)


def _folding(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table that opens with a click."""
    yield ""
    yield f"<details><summary>{title}</summary>"
    yield from _table(head, rows)
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
    return "".join(f"&#{ord(c)};" if c in "<>&|`*_[]\\#!" else c for c in shown)
