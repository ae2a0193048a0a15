"""Plans, certificates and timings as tables in the terminal, and how far long work has come."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from refold.bench import Timing
from refold.checkpoints import Conversion
from refold.frontend import Rich
from refold.graph import Plan
from refold.proof.certificate import Certificate, Verdict
from refold.proof.recheck import Recheck
from refold.shown import printable

COLORS = {
    Verdict.PROVED: "green",
    Verdict.MEASURED: "yellow",
    Verdict.REFUTED: "red",
    Verdict.SKIPPED: "yellow",
}


def show(parts: Iterable[Any]) -> None:
    """Print tables and lines to standard output; a pipe gets them uncut and without colors."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    for part in parts:
        console.print(part)


def progress() -> Progress:
    """A progress bar on standard error, silent where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def plan(plan: Plan) -> list[Any]:
    """What folds, what it saves, and what is kept apart."""
    gains = _table("", "before", "after")
    for saving in plan.savings:
        gains.add_row(saving.name, f"{saving.before:,}", f"{saving.after:,}")
    parts: list[Any] = [_line(headline(plan), "bold"), gains]
    if plan.regions or plan.evaluated:
        regions = _table("folded", "steps", "becomes", "by")
        for region in plan.regions:
            regions.add_row(
                _text(region.value), str(len(region.nodes)), _text(region.operator), ", ".join(region.laws)
            )
        for name in plan.evaluated:
            regions.add_row(_text(name), "", "the same layer with plain weights", "evaluation")
        parts.append(regions)
    if plan.kept:
        kept = _table("kept apart", "because")
        for entry in plan.kept:
            kept.add_row(_text(entry.where), _text(entry.reason))
        parts.append(kept)
    return [*parts, *(_line(f"note: {note}", "dim") for note in plan.notes)]


def headline(plan: Plan) -> str:
    """What a plan comes to, as a sentence."""
    return f"{plan.headline[:1].upper()}{plan.headline[1:]}."


def certificate(certificate: Certificate) -> list[Any]:
    """The verdict, region by region and end to end."""
    text = str(certificate)
    first, _, rest = text.partition("\n")
    return [_line(first, f"bold {COLORS[certificate.verdict]}"), _text(rest)] if rest else [_line(first, "bold")]


def recheck(recheck: Recheck) -> list[Any]:
    """Whether a stored certificate holds."""
    first, _, rest = str(recheck).partition("\n")
    head = _line(
        f"{first[:1].upper()}{first[1:]}", f"bold {COLORS[Verdict.PROVED if recheck.ok else Verdict.REFUTED]}"
    )
    return [head, _text(rest)] if rest else [head]


def conversion(conversion: Conversion) -> list[Any]:
    """Which weights of a checkpoint were converted, and what it has no more."""
    parts: list[Any] = [_line(str(conversion), "bold")]
    if conversion.converted:
        weights = _table("weight", "from", "to", "units")
        for entry in conversion.converted:
            units = "" if entry["units"] is None else f"{entry['units']:,}"
            weights.add_row(_text(entry["name"]), entry["from"], entry["to"], units)
        parts.append(weights)
    return parts


def unfolding(rich: Rich) -> list[Any]:
    """What became of each convolution."""
    parts: list[Any] = [_line(f"{rich}.", "bold")]
    if rich.unfolded:
        made = _table("unfolded")
        for path in rich.unfolded:
            made.add_row(_text(path))
        parts.append(made)
    if rich.kept:
        kept = _table("kept", "because")
        for path, reason in rich.kept:
            kept.add_row(_text(path), _text(reason))
        parts.append(kept)
    return parts


def timing(timing: Timing) -> list[Any]:
    """How much faster."""
    first, _, rest = str(timing).partition("\n")
    return [_line(first, "bold"), _text(rest)]


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, head in enumerate(heads):
        numbers = head in ("before", "after", "steps", "units")
        table.add_column(head, justify="right" if numbers else "left", overflow="fold", no_wrap=index == 0)
    return table


def _text(text: str) -> Text:
    """Names come from files: shown as they are, never as markup or as commands to the terminal."""
    return Text("\n".join(printable(line, 400) for line in text.split("\n")))


def _line(text: str, style: str) -> Text:
    return Text(printable(text, 400), style=style)
