"""Networks of seven train-time blocks in Keras."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sections.markdown import change, table, versions


def section(result: Mapping[str, Any]) -> list[str]:
    """The lines of the page."""
    one, every = (result["processors"][label] for label in ("one", "all"))
    size = "x".join(map(str, one[0]["input"][1:]))
    return [
        f"## Keras blocks ({result['backend']})",
        "",
        f"Seven blocks, a pooling and a classifier on {size} images, compiled as in `predict`, in a process",
        f"with one processor and in one with all. {versions(result)}.",
        "",
        *table(
            ["network"],
            [
                "operators",
                "multiply-adds",
                "parameters",
                "times as fast (one processor)",
                "quartiles",
                "times as fast (all)",
                "quartiles",
            ],
            [
                [
                    first["network"],
                    _operators(first),
                    change(first["cost_before"]["multiply_adds"], first["cost_after"]["multiply_adds"]),
                    change(first["parameters_before"], first["parameters_after"]),
                    *(
                        cell
                        for row in (first, second)
                        for cell in (
                            f"{row['ratio']:.2f}",
                            f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}",
                        )
                    ),
                ]
                for first, second in zip(one, every, strict=True)
            ],
        ),
    ]


def highlights(result: Mapping[str, Any]) -> list[list[str]]:
    """Rows for the README: network, where, operators, multiply-adds, times as fast."""
    return [
        [
            f"seven {row['network']} blocks",
            f"Keras ({result['backend']})",
            _operators(row),
            change(row["cost_before"]["multiply_adds"], row["cost_after"]["multiply_adds"]),
            f"{row['ratio']:.2f}",
        ]
        for row in result["processors"]["one"]
        if row["network"] in ("RepVGG", "DBB")
    ]


def _operators(row: Mapping[str, Any]) -> str:
    return f"{row['cost_before']['operators']} to {row['cost_after']['operators']}"
