"""The figures in the documents are those of the committed results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tables

ROOT = Path(__file__).parents[1]


def test_the_page_is_what_the_results_say() -> None:
    assert tables.PAGE.read_text(encoding="utf-8") == tables.page()


def test_the_block_in_the_readme_is_what_the_results_say() -> None:
    text = tables.README.read_text(encoding="utf-8")
    assert text == tables.readme(text)
    assert "| repvit_m0_9 |" in text


def test_a_readme_without_markers_is_noticed() -> None:
    with pytest.raises(ValueError, match="markers"):
        tables.readme("# refold\n")


def test_every_benchmark_has_its_script_its_results_and_its_target() -> None:
    """And nothing lies about that no document shows."""
    names = set(tables.SECTIONS)
    assert {path.stem for path in tables.RESULTS.glob("*.json")} == names
    sections = {path.stem for path in (ROOT / "benchmarks" / "sections").glob("*.py")} - {"__init__", "markdown"}
    assert sections == names
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {name for name in names if f" benchmarks/{name}.py" in makefile} == names
    assert all((ROOT / "benchmarks" / f"{name}.py").is_file() for name in names)


def test_no_other_document_claims_a_speed() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        if document not in (tables.PAGE, ROOT / "docs" / "design.md"):
            text = document.read_text(encoding="utf-8")
            generated = re.compile(f"{re.escape(tables.BEGIN)}.*?{re.escape(tables.END)}", re.DOTALL)
            assert not re.search(r"\d(\.\d+)?( ?x| times) (as fast|faster)", generated.sub("", text)), document.name
