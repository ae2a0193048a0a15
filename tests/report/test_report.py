"""Reports in the terminal, as Markdown and in notebooks: complete, and safe with hostile names."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from made_up import HOSTILE, certificate, plan, proved, timing
from test_page import Outline

from refold.algebra.cost import Cost
from refold.bench import summarize
from refold.report import markdown, terminal
from refold.report.summary import Page


def test_terminal_tables_show_markup_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show([*terminal.plan(plan(name=HOSTILE)), *terminal.certificate(certificate(HOSTILE))])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[bold]" in out
    assert "note: a note on <script>" in out
    assert "REFUTED" in out


def test_timing_is_a_median_of_pairs() -> None:
    result = summarize([4.0, 2.0, 9.0], [2.0, 2.0, 3.0], batch=1, costs=(Cost(), Cost()), parameters=(1, 1))
    assert result.ratio == 2.0
    assert result.before.median == 4.0
    assert result.to_json()["schema"] == "refold.timing/1"
    assert str(result).startswith("2.00 times as fast")


def test_markdown_says_the_same_and_lets_no_name_act() -> None:
    text = markdown.render(Page(HOSTILE, plan(name=HOSTILE), certificate(HOSTILE), timing()))
    assert text.startswith("### Refuted: not the same function")
    assert "\x1b" not in text
    for line in text.split("\n"):
        outside_code = "".join(line.split("`")[::2])
        assert "<script" not in outside_code
        if line.startswith("|"):
            assert line.endswith("|")
    assert "- note: a note on" in text
    assert text.count("<details>") == text.count("</details>") == 4


def test_markdown_of_a_large_model_fits_into_a_comment() -> None:
    name = "n" * 1_000
    text = markdown.render(Page("large", plan(300, name), proved(300, name), timing()))
    assert len(text) < 65_536
    assert "and 260 more" in text


def test_markdown_tells_what_is_wrong_before_what_is_right() -> None:
    text = markdown.render(Page("two", certificate=certificate()))
    assert text.index("a weight is off") < text.index("<details>")
    assert "original's error" in text


def test_markdown_of_a_timing_has_its_spread() -> None:
    text = markdown.render(Page("two", timing=timing()))
    assert text.startswith("### 2.00 times as fast")
    assert "uartiles 2.00 to 2.00" in text
    assert "| latency | 2.1 s | 1.05 s | −50 % |" in text


def test_tables_of_markdown_have_as_many_cells_as_heads() -> None:
    text = markdown.render(Page("plan", plan()))
    tables = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    assert tables
    for table in tables:
        assert len({len(re.findall(r"\|", row)) for row in table.strip().split("\n")}) == 1


def test_notebooks_show_tables_without_running_what_they_name() -> None:
    long = "n" * 1_000_000
    for name in (HOSTILE, "\u202eevil", long):
        for shown, word in ((plan(name=name), "plan"), (certificate(name), "REFUTED"), (timing(), "timing")):
            html = shown._repr_html_()  # type: ignore[attr-defined]
            assert word in html
            assert "<table" in html
            assert not re.search(r"<script|<style|\x1b|\u202e|src=|url\(", html)
            assert len(html) < 30_000
            Outline(html)


def test_printing_a_plan_or_a_certificate_sends_nothing_to_the_terminal() -> None:
    for name in (HOSTILE, "\u202eevil", "n" * 1_000_000):
        for shown in (plan(name=name), certificate(name)):
            text = str(shown)
            assert all(line.isprintable() for line in text.split("\n"))
            assert len(text) < 20_000
