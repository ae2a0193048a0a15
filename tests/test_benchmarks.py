"""The figures in the documents are those of the committed results."""

from __future__ import annotations

import re
from pathlib import Path

import tables

ROOT = Path(__file__).parents[1]


def test_the_page_is_what_the_results_say() -> None:
    assert list(tables.RESULTS.glob("*.json"))
    assert tables.PAGE.read_text(encoding="utf-8") == tables.page()


def test_no_other_document_claims_a_speed() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        if document not in (tables.PAGE, ROOT / "docs" / "design.md"):
            text = document.read_text(encoding="utf-8")
            assert not re.search(r"\d(\.\d+)?( ?x| times) (as fast|faster)", text), document.name
