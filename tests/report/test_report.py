"""Reports: readable, safe with hostile names, with nothing from outside."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from made_up import HOSTILE, certificate, plan

from refold.algebra.cost import Cost
from refold.bench import summarize
from refold.report import markdown, terminal
from refold.report.page import Page, Training, render


def timing() -> object:
    return summarize([2.0, 2.2], [1.0, 1.1], batch=1, costs=(Cost(10, 10, 2), Cost(5, 5, 1)), parameters=(9, 4))


def page() -> str:
    training = Training((1.0, 0.5), (0.5, 0.9), 0.9, 0.9, {HOSTILE: 0.5})
    return render(Page(HOSTILE, plan(name=HOSTILE), certificate(HOSTILE), timing(), training))  # type: ignore[arg-type]


class Outline(HTMLParser):
    """The tags of a page, and whether they close in order."""

    VOID = ("meta", "br", "path", "rect", "polyline", "circle", "line", "i")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_whole_and_has_nothing_from_outside() -> None:
    html = page()
    outline = Outline()
    outline.feed(html)
    assert not outline.open
    assert not re.search(r"(src|href)=|url\(|@import", html)
    assert "default-src 'none'" in html
    assert {"title", "h1", "h2", "svg"} <= set(outline.tags)
    assert 'lang="en"' in html
    assert html.count('aria-label="') >= 4
    assert "<li>a note on &lt;script&gt;" in html


def test_hostile_names_stay_text() -> None:
    html = page()
    assert "<script" not in html
    assert "\x1b" not in html
    assert "&lt;script&gt;" in html


def test_verdict_comes_first() -> None:
    html = page()
    assert html.index("Refuted: not the same function") < html.index("What was gained") < html.index("The network")


def test_page_of_two_hundred_layers_stays_small() -> None:
    assert len(render(Page("large", plan(blocks=200)))) < 1_000_000


def test_parts_that_are_not_there_are_left_out() -> None:
    html = render(Page("only a certificate", certificate=certificate()))
    assert "The network" not in html
    assert "Training" not in html


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
    text = markdown.render(Page(HOSTILE, plan(name=HOSTILE), certificate(HOSTILE), timing()))  # type: ignore[arg-type]
    assert text.startswith("### Refuted: not the same function")
    assert "\x1b" not in text
    for line in text.split("\n"):
        outside_code = "".join(line.split("`")[::2])
        assert "<script" not in outside_code
        if line.startswith("|"):
            assert line.endswith("|")
    assert "- note: a note on" in text
    assert text.count("<details>") == text.count("</details>") == 3


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
            outline = Outline()
            outline.feed(html)
            assert not outline.open


def test_printing_a_plan_or_a_certificate_sends_nothing_to_the_terminal() -> None:
    for name in (HOSTILE, "\u202eevil", "n" * 1_000_000):
        for shown in (plan(name=name), certificate(name)):
            text = str(shown)
            assert all(line.isprintable() for line in text.split("\n"))
            assert len(text) < 20_000
