"""What the documents say about speed and size, written from the committed results; no figure is typed by hand.

``python benchmarks/tables.py`` writes ``docs/benchmarks.md`` and the block between the two markers in the README.
It needs no package. A new benchmark is one line in ``SECTIONS``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sections import certificates, keras_blocks, onnx_files, onnx_proofs, torch_models, weight_normalization
from sections.markdown import table

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"

# In the order of the page, each by the name of its file of results.
SECTIONS: Mapping[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "certificates": certificates.section,
    "keras_blocks": keras_blocks.section,
    "torch_models": torch_models.section,
    "onnx_files": onnx_files.section,
    "onnx_proofs": onnx_proofs.section,
    "weight_normalization": weight_normalization.section,
}

# The benchmarks that the README quotes, and the rows that it takes.
HIGHLIGHTS: Mapping[str, Callable[[Mapping[str, Any]], list[list[str]]]] = {
    "torch_models": torch_models.highlights,
    "keras_blocks": keras_blocks.highlights,
    "onnx_files": onnx_files.highlights,
}

BEGIN = "<!-- written by benchmarks/tables.py -->"
END = "<!-- end -->"

HEAD = """# Benchmarks

`make bench` measures again and writes this page. The forms of a network run in turn (A B A B ...) in one
process, batch 1; a ratio is the median over the pairs, with its quartiles: it says how many times as fast the
folded model is. Machines differ; the ratios are of the one named, and what folds is the same everywhere.
"""


def page() -> str:
    """The whole page."""
    sections = ["\n".join([*section(load(name)), ""]) for name, section in SECTIONS.items()]
    return "\n".join([HEAD, *sections])


def readme(text: str) -> str:
    """The README with its block written anew."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"README.md has lost its markers: {BEGIN} and {END}")
    rows = [row for name, highlights in HIGHLIGHTS.items() for row in highlights(load(name))]
    lines = table(["network", "run by"], ["operators", "multiply-adds", "times as fast"], rows)
    return "\n".join([f"{before}{BEGIN}", "", *lines, "", f"{END}{after}"])


def load(name: str) -> dict[str, Any]:
    """The results of one benchmark."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
