"""What weight normalization costs in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sections.markdown import table, versions


def section(result: Mapping[str, Any]) -> list[str]:
    """The lines of the page."""
    rows = result["rows"]
    heads = [f"{row['layer']}, {mode}" for row in rows for mode in ("eager", "compiled")]
    return [
        "## Weight normalization (PyTorch)",
        "",
        "Seconds of a step, forward and backward to the parameters and the input, over those of the plain layer:",
        f"less is better. All forms in turn, the median over {result['rounds']} rounds, quartiles in brackets.",
        f"timm's `StdConv2d` is written from its formula. {versions(result)}, {result['threads']} thread.",
        "",
        *table(
            ["form"],
            heads,
            [
                [form, *(_cell(row[mode][form]) for row in rows for mode in ("eager", "compiled"))]
                for form in rows[0]["eager"]
            ],
        ),
    ]


def _cell(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
