"""The pictures of the tutorial are drawn from the committed numbers, and the experiments give these numbers."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from documents import ROOT

PATH = ROOT / "docs" / "experiments" / "normalized_training.py"


def loaded() -> Any:
    spec = importlib.util.spec_from_file_location("normalized_training", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


experiments = loaded()
RESULTS = json.loads(experiments.RESULTS.read_text(encoding="utf-8"))
GOOD, SMALL = RESULTS["trained"]["1.0"], RESULTS["trained"]["0.3"]


def test_pictures_are_drawn_from_the_numbers() -> None:
    drawn = experiments.pictures(RESULTS)
    assert {path.stem for path in experiments.IMAGES.glob("training-*.svg")} == set(drawn)
    tutorial = (ROOT / "docs" / "weight-normalization-tutorial.md").read_text(encoding="utf-8")
    for name, svg in drawn.items():
        assert (experiments.IMAGES / f"{name}.svg").read_text(encoding="utf-8") == svg, name
        assert f"images/{name}.svg" in tutorial
        assert "<script" not in svg


@pytest.mark.parametrize(
    ("form", "scale"), [("plain", 1.0), ("unit, from data", 0.3), ("scaled standardization", 0.3)]
)
def test_a_part_of_the_training_done_again(form: str, scale: float) -> None:
    """At rates at which rounding does not decide."""
    rate = 2.0**-5
    final = experiments.losses(form, rate, scale)[-1]
    assert final == pytest.approx(RESULTS["trained"][str(scale)][form]["final"][str(rate)], rel=0.02)


def test_the_signal_done_again() -> None:
    for name, values in experiments.variances().items():
        assert values == pytest.approx(RESULTS["depth"][name], rel=1e-3), name


def test_what_the_tutorial_says_of_the_pictures() -> None:
    good = {form: experiments.good_rates(entry["final"]) for form, entry in GOOD.items()}
    small = {form: experiments.good_rates(entry["final"]) for form, entry in SMALL.items()}
    assert good["unit"] <= good["plain"] + 1
    assert min(good["unit, from data"], good["scaled standardization"]) > good["plain"]
    assert small["plain"] == small["unit"] == 0
    for form in ("unit, from data", "scaled standardization"):
        assert small[form] > 0
        assert float(SMALL[form]["best rate"]) < float(GOOD[form]["best rate"])
    steps = {form: experiments.steps_to_goal(entry["best curve"]) for form, entry in GOOD.items()}
    assert all(1.5 * steps[form] < steps["plain"] for form in ("unit, from data", "scaled standardization"))
