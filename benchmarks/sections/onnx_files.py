"""ONNX files, against the tools that simplify them and the runtimes that optimize them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sections.markdown import table, versions

TOOLS = ("onnxsim", "onnxslim", "ONNX Runtime", "refold")
TIMED = ("onnxsim", "onnxslim", "refold")
# Rows that the README quotes, and what it calls them.
QUOTED = {"MobileOne, k=4": "seven MobileOne blocks, exported", "PP-OCRv4, detector": "PP-OCRv4's text detector"}
RUNTIMES = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}


def section(result: Mapping[str, Any]) -> list[str]:
    """The lines of the page."""
    rows = result["rows"]
    return [
        "## ONNX files",
        "",
        "Nets of seven train-time blocks on 224x224 images, exported by torch, and the models of PP-OCR that",
        "people ship (in the wheel rapidocr-onnxruntime). *DBB, border in place* is the block as its paper's code",
        "writes it, with a border of the batch norm's bias that is written into a slice. Each file goes through",
        "each tool as it comes; ONNX Runtime's column is what its own optimizer saves at its highest level,",
        f"OpenVINO's what it compiles the file to. {versions(result)}, {result['threads']} thread.",
        "",
        "Operators left, constants not counted; in brackets the convolutions among them, transposed ones included:",
        "",
        *table(
            ["network"],
            ["file", "onnxsim", "onnxslim", "ONNX Runtime", "OpenVINO", "refold", "refold (s)"],
            [_left(row) for row in rows],
        ),
        "",
        "How many times as fast the file that a tool made is as the original, in each runtime with all of its",
        "own optimizations (so 1.00 is what the runtime makes of the file by itself), the quartiles over the",
        "pairs, and the largest difference from the original in float64, relative to the largest output:",
        "",
        *table(
            ["network", "in"],
            ["original (ms)", "onnxsim", "onnxslim", "refold", "quartiles", "error before", "after"],
            [_times(row, name, key) for row in rows for name, key in RUNTIMES.items()],
        ),
        "",
        *(_large(result["large"]) if result["large"] else []),
    ]


def highlights(result: Mapping[str, Any]) -> list[list[str]]:
    """Rows for the README: network, where, operators, multiply-adds, times as fast."""
    return [
        [
            QUOTED[row["network"]],
            "ONNX Runtime",
            f"{row['forms']['original']['operators']} to {row['forms']['refold']['operators']}",
            f"{row['multiply_adds'][1] / row['multiply_adds'][0] - 1:+.0%}",
            f"{row['onnxruntime']['refold']['times_as_fast']['median']:.2f}",
        ]
        for row in result["rows"]
        if row["network"] in QUOTED
    ]


def _left(row: Mapping[str, Any]) -> list[str]:
    forms = row["forms"]
    return [
        row["network"],
        *(_count(forms[tool]) for tool in ("original", "onnxsim", "onnxslim", "ONNX Runtime")),
        _count(forms["original"]["in_openvino"]),
        _count(forms["refold"]),
        f"{forms['refold']['seconds']:.1f}",
    ]


def _count(form: Mapping[str, Any]) -> str:
    return "fails" if "failed" in form else f"{form['operators']} ({form['convolutions']})"


def _times(row: Mapping[str, Any], name: str, key: str) -> list[str]:
    found = row[key]
    ours = found["refold"]["times_as_fast"]
    return [
        row["network"],
        name,
        f"{found['original']['milliseconds']['median']:.1f}",
        *(f"{found[form]['times_as_fast']['median']:.2f}" if form in found else "fails" for form in TIMED),
        f"{ours['low']:.2f} to {ours['high']:.2f}",
        *(f"{row['forms'][form]['error']:.1e}" for form in ("original", "refold")),
    ]


def _large(large: Mapping[str, Any]) -> list[str]:
    tools = large["tools"]
    rows = [[tool, *_taken(tools[tool])] for tool in TOOLS]
    if large.get("proof"):
        rows.append(["refold, its proof", "", *_taken(large["proof"])[1:]])
    return [
        f"A model of {large['bytes'] / 1e9:.1f} GB, 40 dense layers of 64 MiB with a factor behind each, its",
        "weights beside it, from file to file; the memory is what a process takes beyond what it had after a tiny",
        "model of the same kind:",
        "",
        *table(["tool"], ["operators left", "seconds", "memory (MiB)"], rows),
    ]


def _taken(told: Mapping[str, Any]) -> list[str]:
    if "failed" in told:
        return ["fails", "", ""]
    return [str(told.get("operators", "")), f"{told['seconds']:.0f}", f"{told['mebibytes']:.0f}"]
