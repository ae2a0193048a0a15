"""What checks of equality find, and what a proof takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sections.markdown import table, versions

# The parts of the benchmark that time proofs.
TIMED = ("time", "time of wide layers", "time of deep networks")


def section(result: Mapping[str, Any]) -> list[str]:
    """The lines of the page."""
    kinds, most = result["catalogue"], f"{result['certify range']:g}"
    checkers = next(iter(kinds.values()))["checkers"]
    return [
        "## Certificates",
        "",
        "What each check, at its own defaults, says of right and wrong folds (`benchmarks/catalogue`): how often",
        "it is mistaken, that is, calls a right fold wrong or a wrong one right; in brackets, how often it gives",
        f"no answer. onnxsim's `certify` gets {result['certify seconds']} s for each pair, at most twice that, and",
        f"answers for inputs from -{most} to {most}: for all inputs it refutes right folds, too, as roundings of",
        "the weights show where inputs are large enough.",
        f"{versions(result)}.",
        "",
        *table(
            ["check"],
            [f"{kind} ({found['cases']})" for kind, found in kinds.items()],
            [[f"`{name}`", *(_cell(found["checkers"][name]) for found in kinds.values())] for name in checkers],
        ),
        *_proofs([row for part in TIMED for row in result.get(part, [])]),
        *_certify(result),
    ]


def _proofs(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    return [
        "",
        "What a proof takes, on one thread: networks of RepVGG blocks (three branches each), folded. A forward",
        "pass is that of the trained form on one image, in float32. Reading both models runs each of them about",
        "three times, at other sizes and on several images. The proof runs both in float64, region by region, and",
        "looks at every weight; the last column is with the measurement of whole models on a dozen kinds of",
        "inputs. In brackets: in forward passes.",
        "",
        *table(
            ["network"],
            ["forward", "reading", "proof", "proof and measurement"],
            [
                [
                    f"{row['blocks']} blocks of {row['channels']} channels, {row['side']} x {row['side']}",
                    _seconds(row["forward"]["median"]),
                    *(_in_passes(row, name) for name in ("reading", "proof", "with measurement")),
                ]
                for row in rows
            ],
        ),
    ]


def _certify(result: Mapping[str, Any]) -> list[str]:
    rows, most = result.get("certify", []), f"{result['certify range']:g}"
    if not rows:
        return []
    answers = {True: "equal", False: "not equal", None: "no answer"}
    return [
        "",
        "One convolution with a batch norm and a ReLU, folded rightly, in the time that each check takes for it;",
        f"`certify` answers for inputs from -{most} to {most}, within {result['certify alone seconds']} s. The",
        "first proof of a process also loads what proofs need:",
        "",
        *table(
            ["channels", "`certify` of onnxsim says"],
            ["after", "`refold.prove` takes"],
            [
                [
                    str(row["channels"]),
                    answers[row["certified"]],
                    _seconds(row["certify"]),
                    _seconds(row["refold"]),
                ]
                for row in rows
            ],
        ),
    ]


def _in_passes(row: Mapping[str, Any], name: str) -> str:
    seconds = row[name]["median"]
    return f"{_seconds(seconds)} ({seconds / row['forward']['median']:.0f})"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _cell(found: Mapping[str, Any]) -> str:
    unanswered = f" ({len(found['open'])})" if found["open"] else ""
    return f"{len(found['mistaken'])}{unanswered}"
