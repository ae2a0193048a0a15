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

`make bench` measures again and writes this page. The forms of a network run in turn (A B A B ...) in one
process, batch 1; a ratio is the median over the pairs, with its quartiles: it says how many times as fast the
folded model is. Machines differ; the ratios are of the one named, and what folds is the same everywhere.
"""


def page() -> str:
    """The whole page."""
    sections = [keras_blocks(load(path)) for path in sorted(RESULTS.glob("keras_blocks*.json"))]
    sections += [torch_models(load(path)) for path in sorted(RESULTS.glob("torch_models*.json"))]
    return "\n".join([HEAD, *sections])


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
        f"Seven blocks, a pooling and a classifier on {size} images, compiled as in `predict`;",
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


def torch_models(result: dict[str, Any]) -> str:
    """Published networks in PyTorch, against the folds written by hand for them."""
    lines = [
        "## Published PyTorch networks",
        "",
        "What torch runs for one image (kernels, without views), as the network is trained, after",
        "`torch.fx.experimental.optimization.fuse`, after timm's `reparameterize_model`, which calls the fold that",
        "each block brings along, and after `refold.fold`; in brackets the batch norms among them. The error is",
        "the largest difference from the original in float64, relative to the largest output. Weights are random.",
        "Ratios are eager, in ONNX Runtime (all its optimizations, exported by torch), and under `torch.compile`.",
        f"timm {result['timm']}, torch {result['torch']}, on {result['machine']}.",
        "",
        "| network | trained | fx fuse | timm | refold | multiply-adds | error before | after | fold (s) | ratio | "
        "quartiles | ONNX Runtime | compiled |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        faster = row["faster_than_original"]
        cells = [
            row["network"],
            *(_kernels(row[form]) for form in ("original", "fx", "timm", "refold")),
            f"{row['multiply_adds'][1] / row['multiply_adds'][0] - 1:+.0%}",
            *(f"{row[form]['error']:.1e}" for form in ("original", "refold")),
            f"{row['refold']['seconds']:.1f}",
            f"{faster['median']:.2f}",
            f"{faster['low']:.2f} to {faster['high']:.2f}",
            *(_ratio(row[where]) for where in ("faster_in_onnxruntime", "faster_compiled")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _ratio(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['median']:.2f}"


def _kernels(form: dict[str, Any] | None) -> str:
    if form is None:
        return "cannot trace"
    return f"{form['kernels']} ({form['batch_norms']})" if form["batch_norms"] else str(form["kernels"])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.exit(0)
