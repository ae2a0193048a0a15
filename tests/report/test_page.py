"""The page: whole, safe with hostile names, nothing from outside, usable without a pointer and without a script."""

from __future__ import annotations

import base64
import hashlib
import re
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from made_up import HOSTILE, certificate, plan, proved, timing

from refold.proof.certificate import Digests, LocalResult, Verdict
from refold.report import page as page_module
from refold.report.page import render
from refold.report.summary import Page, Training
from refold.shown import printable

NAMES = (
    HOSTILE,
    '"><img src=x onerror=alert(1)>',
    "\u202eevil",
    "../../evil",
    "a\0b",
    "n" * 1_000_000,
    "]]>--><!--",
)
TRAINING = Training((1.0, 0.5), (0.5, 0.9), 0.9, 0.9, {HOSTILE: 0.5})


def everything(name: str = "block") -> Page:
    return Page(name, plan(name=name), certificate(name), timing(), TRAINING)


PAGES = {
    "everything": everything(),
    "inspect": Page("model.pt2", plan()),
    "fold": Page("model.pt2", plan(), proved()),
    "prove": Page("two models", certificate=certificate()),
    "bench": Page("two models", timing=timing()),
    "nothing to fold": Page("model.pt2", plan(blocks=0)),
    "nothing": Page("nothing"),
    "hostile": everything(HOSTILE),
}


class Outline(HTMLParser):
    """The tags of a page, and whether they close in order."""

    VOID = frozenset(("meta", "br", "path", "rect", "circle", "line", "use"))

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"an attribute twice in {tag}"
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def count(self, attribute: str) -> Counter[str]:
        return Counter(str(attrs[attribute]) for _, attrs in self.tags if attribute in attrs)


@pytest.fixture(params=PAGES)
def html(request: pytest.FixtureRequest) -> str:
    return render(PAGES[request.param])


def test_nothing_comes_from_outside(html: str) -> None:
    outline = Outline(html)
    assert not outline.count("src")
    assert all(target.startswith("#") for target in outline.count("href"))
    assert not re.search(r"url\(|@import|://|<link|<iframe|<object|<form", html)


def test_only_the_one_script_may_run(html: str) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [meta["content"] for meta in Outline(html).all("meta") if "http-equiv" in meta]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}';" in policy
    assert html.count("<script") == 1
    assert not any(name.startswith("on") for _, attrs in Outline(html).tags for name in attrs)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(|import\(", script)


def test_links_and_labels_point_at_what_is_there(html: str) -> None:
    outline = Outline(html)
    ids = outline.count("id")
    assert max(ids.values()) == 1
    named = [name for value in outline.count("aria-labelledby") for name in value.split()]
    assert {target[1:] for target in outline.count("href")} | set(named) <= set(ids)


def test_headings_landmarks_tables_and_pictures_can_be_heard(html: str) -> None:
    outline = Outline(html)
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    tags = [tag for tag, _ in outline.tags]
    assert [tags.count(tag) for tag in ("header", "main", "nav", "footer")] == [1, 1, 1, 1]
    assert all("aria-labelledby" in section for section in outline.all("section"))
    for svg in outline.all("svg"):
        assert svg.get("aria-hidden") == "true" or (svg.get("aria-label") and svg.get("role"))
    for table in re.findall(r"<table.*?</table>", html, re.DOTALL):
        assert "<th" in table
    assert 'lang="en"' in html


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_hostile_names_stay_text(name: str) -> None:
    html = render(everything(name))
    Outline(html)
    assert html.count("<script") == 1
    assert not re.search("<img|<!--(?!$)", html)
    assert not set(html) & {"\x1b", "\0", "\u202e"}
    assert len(html) < 200_000
    assert name.startswith("n") or "evil" in html or "a\\x00b" in html or "&lt;" in html or "--&gt;" in html


def named(name: str) -> Page:
    """``name`` in every place where a file may have one of its own, those of a kept certificate included."""
    proof = certificate(name)
    proof = replace(
        proof,
        regions=tuple(replace(r, counterpart=name, method=name, sentence=name) for r in proof.regions),
        local=tuple(LocalResult(r.where, Verdict.REFUTED, 1.0, 2.0) for r in proof.regions),
        end_to_end=tuple(replace(e, inputs=name, sentence=name) for e in proof.end_to_end),
        before=Digests(name, name),
        versions={name: name},
        notes=(name,),
        assumptions=(name,),
    )
    return Page(name, plan(name=name), proof, timing(), replace(TRAINING, scales={name: 0.5}))


@pytest.mark.parametrize(
    "name",
    [
        HOSTILE,
        "</script><script>alert(1)</script>",
        "</title></style></svg></textarea><svg onload=alert(1)>",
        '"><img src=x onerror=alert(1)>',
        "' onmouseover='alert(1)' autofocus='",
        "<a href=javascript:alert(1)><base href=//example.org/>",
        "]]>--><!--<!DOCTYPE x>",
        "&lt;img src=x&gt;&#60;",
        "{{ 7 * 7 }}{% raw %}",
        "\x00\x07\x1b]0;x\x9b\n\r\u202e\u2028\ufeff",
    ],
)
def test_names_change_the_text_of_a_page_and_nothing_else(name: str) -> None:
    found, harmless = Outline(render(named(name))), Outline(render(named("name")))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in harmless.tags]
    for (tag, attributes), (_, same) in zip(found.tags, harmless.tags, strict=True):
        assert list(attributes) == list(same), tag
        moved = {"viewbox", "transform", "d", "x", "y", "width", "height", "cx", "cy", "x1", "x2", "y1", "y2"}
        for attribute in set(attributes) - moved:
            assert attributes[attribute] == same[attribute], (tag, attribute)
    assert printable(name) in found.text
    assert re.sub("[\n\xa0]", "", found.text).isprintable()


def test_the_same_data_gives_the_same_page() -> None:
    assert render(everything()) == render(everything())


@pytest.mark.parametrize("length", [64, 200])
def test_two_hundred_blocks_with_long_names_stay_below_a_megabyte(length: int) -> None:
    # 1,200 steps before, 400 after, and the whole proof.
    name = "representative_model/backbone/stage_3/".ljust(length, "b")
    html = render(Page("large", plan(200, name), proved(200, name), timing()))
    assert html.count('<details class="card') == 200
    assert 'id="net-before"' in html
    assert len(html.encode()) < 1_000_000


def test_every_region_has_its_number_its_color_and_its_algebra() -> None:
    outline = Outline(render(Page("model", plan(10))))
    boxes = [attrs for attrs in outline.all("a") if str(attrs["href"])[1:].startswith("r")]
    before_and_after = Counter(str(attrs["href"]) for attrs in boxes)
    assert before_and_after == {f"#r{number}": 6 for number in range(1, 11)}  # five steps become one
    cards = {attrs["id"]: attrs["class"] for attrs in outline.all("details") if "id" in attrs}
    assert all(f"card {attrs['class']}" == cards[str(attrs["href"])[1:]] for attrs in boxes)
    html = render(Page("model", plan(1)))
    card = html[html.index('id="r1"') : html.index("</details>", html.index('id="r1"'))]
    words = re.findall(r"<td>(.*?)</td>", card)
    assert words[:4] == ["block0/conv3", "3x3 convolution, 4 to 4", "4x4x3x3", "compose"]
    assert [words[4 * i + 3] for i in range(5)] == [
        "compose",
        "scale and shift",
        "compose",
        "scale and shift",
        "add",
    ]
    assert "norm" in words[-1]


def test_branches_show_their_scales_and_norms() -> None:
    html = render(Page("model", plan(1)))
    table = html[html.index('<table class="norms"') :]
    assert re.search(r"<td>3x3 convolution, 4 to 4</td><td>1</td><td>\d", table)
    assert '<svg class="chart norms"' in html


def test_steps_and_reasons_are_listed() -> None:
    html = render(Page("model", plan()))
    assert "The 2 steps that stay as they are" in html
    assert "a reason &lt;b&gt;" in html


def test_without_the_libraries_the_tables_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "can_draw", lambda: False)
    html = render(everything())
    Outline(html)
    assert "<svg" not in html
    assert "pip install &#39;refold[report]&#39;" in html or "pip install 'refold[report]'" in html
    assert '<details class="card' in html


def test_a_large_network_is_listed_and_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    from refold.report import network

    monkeypatch.setattr(network, "MOST_BOXES", 5)
    html = render(Page("large", plan()))
    assert "too large to be drawn" in html
    assert '<details class="card' in html


def test_numbers_that_are_not_finite_are_shown() -> None:
    broken = certificate()
    regions = tuple(replace(region, ratio=float("inf")) for region in broken.regions)
    ends = tuple(replace(end, max_error=float("nan"), ratio=float("nan")) for end in broken.end_to_end)
    html = render(Page("broken", certificate=replace(broken, regions=regions, end_to_end=ends)))
    assert '<td class="n">inf</td>' in html
    assert '<td class="n">nan</td>' in html
