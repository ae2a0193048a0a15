"""Published networks in PyTorch, against the folds written by hand for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sections.markdown import change, table, versions

COLUMNS = (
    "trained",
    "fx fuse",
    "timm",
    "refold",
    "multiply-adds",
    "error before",
    "after",
    "fold (s)",
    "in copies",
    "ratio",
    "quartiles",
    "ONNX Runtime",
    "compiled",
)


def section(result: Mapping[str, Any]) -> list[str]:
    """The lines of the page."""
    return [
        "## Published PyTorch networks",
        "",
        "What torch runs for one image (kernels, without views), as the network is trained, after",
        "`torch.fx.experimental.optimization.fuse`, after timm's `reparameterize_model`, which calls the fold that",
        "each block brings along, and after `refold.fold`; in brackets the batch norms among them. The error is",
        "the largest difference from the original in float64, relative to the largest output. Weights are random.",
        "What folding takes stands in seconds, and in how often the network is copied (`copy.deepcopy`) meanwhile.",
        "Ratios are eager, in ONNX Runtime (all its optimizations, exported by torch), and under `torch.compile`.",
        f"{versions(result)}, {result['threads']} thread{'' if result['threads'] == 1 else 's'}.",
        "",
        *table(["network"], COLUMNS, [_cells(row) for row in result["rows"]]),
    ]


def highlights(result: Mapping[str, Any]) -> list[list[str]]:
    """Rows for the README: network, where, operators, multiply-adds, times as fast."""
    return [
        [
            row["network"],
            "PyTorch, eager",
            f"{row['original']['kernels']} to {row['refold']['kernels']}",
            change(*row["multiply_adds"]),
            f"{row['faster_than_original']['median']:.2f}",
        ]
        for row in result["rows"]
        if row["network"] in ("mobileone_s0", "fastvit_t8", "repvit_m0_9")
    ]


def _cells(row: Mapping[str, Any]) -> list[str]:
    faster = row["faster_than_original"]
    return [
        row["network"],
        *(_kernels(row[form]) for form in ("original", "fx", "timm", "refold")),
        change(*row["multiply_adds"]),
        *(f"{row[form]['error']:.1e}" for form in ("original", "refold")),
        f"{row['refold']['seconds']:.2f}",
        f"{row['refold']['seconds'] / row['copy_seconds']:.0f}",
        f"{faster['median']:.2f}",
        f"{faster['low']:.2f} to {faster['high']:.2f}",
        *(_ratio(row[where]) for where in ("faster_in_onnxruntime", "faster_compiled")),
    ]


def _ratio(found: Mapping[str, float] | None) -> str:
    return "" if found is None else f"{found['median']:.2f}"


def _kernels(form: Mapping[str, Any] | None) -> str:
    if form is None:
        return "cannot trace"
    return f"{form['kernels']} ({form['batch_norms']})" if form["batch_norms"] else str(form["kernels"])
