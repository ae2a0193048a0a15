"""What checks of equality find."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sections.markdown import table, versions


def section(result: Mapping[str, Any]) -> list[str]:
    """The lines of the page."""
    kinds = result["catalogue"]
    checkers = next(iter(kinds.values()))["checkers"]
    return [
        "## Certificates",
        "",
        "What each check, at its own defaults, says of right and wrong folds (`benchmarks/catalogue`): how often",
        "it is mistaken, that is, calls a right fold wrong or a wrong one right; in brackets, how often it gives",
        f"no answer. onnxsim's `certify` gets {result['certify seconds']} s for each pair, at most twice that.",
        f"{versions(result)}.",
        "",
        *table(
            ["check"],
            [f"{kind} ({found['cases']})" for kind, found in kinds.items()],
            [[f"`{name}`", *(_cell(found["checkers"][name]) for found in kinds.values())] for name in checkers],
        ),
    ]


def _cell(found: Mapping[str, Any]) -> str:
    unanswered = f" ({len(found['open'])})" if found["open"] else ""
    return f"{len(found['mistaken'])}{unanswered}"
