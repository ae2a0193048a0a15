"""What weight normalization costs in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sections.markdown import table, versions

AIM = 1.15  # times the plain layer, for weight normalization


def section(result: Mapping[str, Any]) -> list[str]:
    """The lines of the page."""
    rows = result["rows"]
    heads = [f"{row['layer']}, {mode}" for row in rows for mode in ("eager", "compiled")]
    return [
        "## Weight normalization (PyTorch)",
        "",
        "Processor seconds of a step, forward and backward to the parameters and the input, over those of the",
        "plain layer: less is better. All forms in turn, the median over",
        f"{result['rounds']} rounds, quartiles in brackets.",
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
        "",
        _beyond_the_aim(rows),
    ]


def _beyond_the_aim(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where refold's weight normalization takes more than is aimed at."""
    found = [
        f"{row['layer']}, {mode} ({median:.2f})"
        for row in rows
        for mode in ("eager", "compiled")
        if (median := row[mode]['refold "unit"']["median"]) > AIM
    ]
    return f"The aim is {AIM} times the plain layer. Beyond it: {'; '.join(found) or 'none'}."


def _cell(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
