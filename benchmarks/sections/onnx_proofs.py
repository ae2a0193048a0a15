"""Proofs of what the tools for ONNX files make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sections.markdown import table, versions

TOOLS = ("refold", "onnxsim", "onnxslim", "ONNX Runtime, basic", "ONNX Runtime, extended")


def section(result: Mapping[str, Any]) -> list[str]:
    """The lines of the page."""
    return [
        "## Proofs of ONNX files that others made",
        "",
        "What `refold prove` says of an original and of what a tool makes of it, and (behind the stroke) of the",
        "same with one weight off by a thousandth. *Measured* is what was folded in float32: some roundings of",
        "each weight, in brackets the worst as a multiple of what one rounding allows (of operators without a",
        f"float64 reference it says nothing). {versions(result)}.",
        "",
        *table(
            ["network", *TOOLS],
            [],
            [[row["network"], *(_cell(row["tools"][tool]) for tool in TOOLS)] for row in result["rows"]],
        ),
    ]


def _cell(told: Mapping[str, Any]) -> str:
    if "failed" in told:
        return "fails"
    worst = f" ({told['worst']:.2g})" if told["worst"] > 1.0 else ""
    return f"{told['right']}{worst} / {told['wrong']}"
