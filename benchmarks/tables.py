"""The tables of ``docs/benchmarks.md``, written from the committed results; no figure is typed by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "benchmarks.md"

HEAD = """# Benchmarks

`make bench` measures again and writes this page. Train form and folded form run in turn (A B A B ...) in one
process, compiled as in `predict`, batch 1; the ratio is the median over the pairs, with its quartiles: it says how
many times as fast the folded model is. Machines differ; the ratios are of the one named, and what folds is the same
everywhere.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(keras_blocks(load(path)) for path in sorted(RESULTS.glob("keras_blocks*.json")))])


def load(path: Path) -> dict[str, Any]:
    """One file of results."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def keras_blocks(result: dict[str, Any]) -> str:
    """Networks of seven train-time blocks in Keras."""
    size = "x".join(map(str, result["input"][1:]))
    lines = [
        f"## Keras blocks ({result['backend']})",
        "",
        f"Seven blocks, a pooling and a classifier on {size} images;",
        f"Keras {result['keras']} on {result['machine']}.",
        "",
        "| network | operators | multiply-adds | parameters | times as fast | quartiles |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        before, after = row["cost_before"], row["cost_after"]
        cells = [
            row["network"],
            f"{before['operators']} to {after['operators']}",
            f"{after['multiply_adds'] / before['multiply_adds'] - 1:+.0%}",
            f"{row['parameters_after'] / row['parameters_before'] - 1:+.0%}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.exit(0)
