"""Tables and words that the sections share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(words: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the heads of the columns of words, which come first, and of those of numbers."""
    lines = [[*words, *numbers], ["---"] * len(words) + ["---:"] * len(numbers), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def versions(result: Mapping[str, Any], *names: str) -> str:
    """What was measured, and on what."""
    found = result["versions"]
    return f"{', '.join(f'{name} {found[name]}' for name in names or found)}; {result['machine']}"


def change(before: float, after: float) -> str:
    """How much more or less."""
    return f"{after / before - 1:+.0%}"
