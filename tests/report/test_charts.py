"""Charts show the numbers that they are given: bars as long, points as high."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from made_up import certificate, plan, proved

from refold.report import charts
from refold.report.summary import Gain, Training


def series(svg: str | None, number: int, what: str) -> list[ElementTree.Element]:
    assert svg is not None
    root = ElementTree.fromstring(svg)
    return [
        found
        for group in root.iter("g")
        if f"serie-{number}" in group.get("class", "").split() and "series" in group.get("class", "").split()
        for found in group.iter(what)
    ]


def heights(svg: str | None, number: int) -> list[float]:
    return [float(circle.get("cy", "nan")) for circle in series(svg, number, "circle")]


def test_bars_are_as_long_as_the_shares() -> None:
    found = [Gain("operators", "10", "5", 0.5), Gain("parameters", "8", "2", 0.25), Gain("latency", "1", "2", 2.0)]
    svg = charts.gains(found, "label")
    before = [float(bar.get("width", 0)) for bar in series(svg, 0, "rect")]
    after = [float(bar.get("width", 0)) for bar in series(svg, 1, "rect")]
    # pygal draws from below.
    np.testing.assert_allclose(np.divide(after, before), [2.0, 0.25, 0.5], rtol=0.01)
    titles = [title.text for title in series(svg, 1, "title")]
    assert titles == ["after: 2 (+100 %)", "after: 2 (−75 %)", "after: 5 (−50 %)"]


def test_one_quantity_that_grew_much_does_not_flatten_the_others() -> None:
    svg = charts.gains([Gain("operators", "10", "5", 0.5), Gain("parameters", "1", "60", 60.0)], "label")
    after = [float(bar.get("width", 0)) for bar in series(svg, 1, "rect")]
    np.testing.assert_allclose(after[1] / after[0], 0.25, rtol=0.01)
    assert next(title.text for title in series(svg, 1, "title")) == "after: 60 (+5900 %)"


def test_what_was_measured_has_its_quartiles() -> None:
    svg = charts.gains([Gain("latency", "2 ms", "1 ms", 0.5, 0.4, 0.6), Gain("operators", "2", "1", 0.5)], "label")
    whiskers = [g for g in ElementTree.fromstring(svg).iter("g") if g.get("class") == "ci"]
    assert len(whiskers) == 1


def test_a_point_beyond_the_limit_stands_above_the_line() -> None:
    svg = charts.rounding(certificate(), "label")  # 0.9 is proved, 99 refuted
    (good,), (bad,) = heights(svg, 2), heights(svg, 3)
    (line,) = series(svg, 0, "path")
    limit = float(re.findall(r"[\d.]+", line.get("d", ""))[1])
    assert bad < limit < good  # SVG counts from the top
    titles = [title.text for title in series(svg, 3, "title")]
    assert titles == ["block1/sum: worst weight 99"]


def test_regions_on_real_data_are_shown_where_they_ran() -> None:
    local = proved(3).local[1:]
    svg = charts.rounding(replace(proved(3), local=local), "label")
    assert len(heights(svg, 1)) == 2
    assert len(heights(svg, 2)) == 3


def test_errors_of_both_networks_stand_side_by_side() -> None:
    svg = charts.end_to_end(certificate(), "label")
    (folded,), (original,) = heights(svg, 0), heights(svg, 1)
    assert folded < original  # 1e-3 is above 1e-7
    decades = (original - folded) / 4
    assert decades > 10


@pytest.mark.parametrize("ratio", [float("inf"), float("nan"), 0.0, 1e300])
def test_no_number_is_too_much(ratio: float) -> None:
    odd = replace(certificate(), regions=tuple(replace(r, ratio=ratio) for r in certificate().regions))
    for svg in (charts.rounding(odd, "label"), charts.end_to_end(odd, "label")):
        assert svg is not None
        assert "nan" not in re.sub(r"<title>.*?</title>", "", svg)


def test_where_there_is_nothing_there_is_no_chart() -> None:
    empty = replace(certificate(), regions=(), end_to_end=())
    assert charts.rounding(empty, "label") is None
    assert charts.end_to_end(empty, "label") is None
    assert charts.norms([], [], "label") is None


def test_norms_of_branches_and_of_the_fold() -> None:
    svg = charts.norms(["one", "two"], plan(2).anatomy, "label")
    assert [len(heights(svg, number)) for number in range(4)] == [2, 2, 2, 0]
    folded, branch = series(svg, 2, "title")[0].text, series(svg, 1, "title")[0].text
    assert folded is not None
    assert folded.startswith("one: folded ")
    assert branch is not None
    assert branch.startswith("one: branch 2 ")


@pytest.mark.parametrize("epochs", [1, 2, 100])
def test_training_of_any_length(epochs: int) -> None:
    told = Training((1.0,) * epochs, (0.5,) * epochs, 0.5, 0.5)
    assert 'role="img" aria-label="label"' in charts.training(told, "label")


def test_the_names_below_the_first_and_the_last_place_are_not_cut_off() -> None:
    for names in (["a" * 18, "b" * 18], ["one", "in the middle"] * 4, ["c"]):
        proof = certificate()
        regions = tuple(replace(proof.regions[0], where=name) for name in names)
        svg = charts.rounding(replace(proof, regions=regions), "label")
        assert svg is not None
        root = ElementTree.fromstring(svg)
        (plot,) = {
            float(re.findall(r"[\d.]+", outer.get("transform", ""))[0])
            for outer in root.iter("g")
            for axis in outer.findall("g")
            if axis.get("class") == "axis x"
        }
        for text in root.iterfind(".//g[@class='axis x']//text"):
            assert text.text is not None
            half = 3.6 * len(text.text)  # of letters of 13 px, which are 7 px wide
            place = plot + float(text.get("x", "nan"))
            if text.get("transform") is None:
                assert half <= place <= 640 - half
            else:
                assert place <= 640 - 2 * half * np.cos(np.radians(30))
