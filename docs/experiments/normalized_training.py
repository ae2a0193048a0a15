"""The small experiments of the tutorial on weight normalization: run, written down, drawn.

``make experiments`` runs them (a minute or two), writes ``normalized_training.json`` beside this file and draws
``docs/images/training-*.svg`` from it. The tests run a part of them again and hold the pictures to the numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pygal
import torch
from pygal.style import Style
from sklearn.datasets import load_digits
from torch import nn

from refold.torch import initialize_from_data, weight_normalization
from refold.weights import NUMPY, Centered

HERE = Path(__file__).parent
RESULTS = HERE / "normalized_training.json"
IMAGES = HERE.parent / "images"

RATES = tuple(2.0**power for power in range(-8, 2))
STEPS, GOAL = 80, 0.5
FORMS = ("plain", "unit", "unit, from data", "scaled standardization")
SCALES = (1.0, 0.3)
WIDTH, DEPTH = 256, 50


# ---- training at several rates -----------------------------------------------------------------------


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """512 images of handwritten digits and their labels."""
    found = load_digits()
    return torch.tensor(found.data[:512] / 16, dtype=torch.float32), torch.tensor(found.target[:512])


def network(form: str, scale: float, images: torch.Tensor) -> nn.Module:
    """Six layers of ReLU whose weights begin as He's, times ``scale``."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for outputs in (64, 64, 64, 64, 64, 10):
        linear = nn.Linear(64, outputs)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        linear.weight.data *= scale
        if form.startswith("unit"):
            weight_normalization(linear)
        elif form != "plain":
            # Not attached to keep what there is, but as the paper starts: every gain 1, no mean.
            weight_normalization(linear, normalizer=Centered(activation="relu"), offset=False)
            linear.parametrizations.weight.original1.data.fill_(1.0)
        layers += [linear, nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    if form == "unit, from data":
        initialize_from_data(model, images)
    return model


def losses(form: str, rate: float, scale: float, steps: int = STEPS) -> list[float]:
    """The loss before each step of plain gradient descent on all images, and after the last; inf once lost."""
    images, labels = digits()
    model = network(form, scale, images)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    found: list[float] = []
    for _ in range(steps + 1):
        loss = nn.functional.cross_entropy(model(images), labels)
        found.append(float(loss.detach()))
        if not math.isfinite(found[-1]):
            return found[:-1] + [math.inf] * (steps + 2 - len(found))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


# ---- a signal through fifty layers -------------------------------------------------------------------


def variances(depth: int = DEPTH, seed: int = 0) -> dict[str, list[float]]:
    """The variance of a channel over the examples, averaged over channels, behind each layer."""
    generator = np.random.default_rng(seed)
    start = generator.normal(size=(512, WIDTH))
    signals = {"He's initialization": start, "scaled standardization": start}
    found: dict[str, list[float]] = {name: [] for name in signals}
    for _ in range(depth):
        weight = generator.normal(size=(WIDTH, WIDTH))
        weights = {
            "He's initialization": weight * np.sqrt(2 / WIDTH),
            "scaled standardization": Centered(activation="relu").compose(NUMPY, weight),
        }
        for name, matrix in weights.items():
            signals[name] = np.maximum(signals[name], 0) @ matrix.T
            found[name].append(float(signals[name].var(axis=0).mean()))
    return found


# ---- written down and drawn --------------------------------------------------------------------------


def measured() -> dict[str, Any]:
    """All experiments."""
    trained: dict[str, Any] = {}
    for scale in SCALES:
        for form in FORMS:
            curves = {str(rate): losses(form, rate, scale) for rate in RATES}
            best = min(curves, key=lambda rate: curves[rate][-1])
            trained.setdefault(str(scale), {})[form] = {
                "final": {rate: rounded(curve[-1]) for rate, curve in curves.items()},
                "best rate": best,
                "best curve": [rounded(loss) for loss in curves[best]],
            }
            print(scale, form, trained[str(scale)][form]["final"], flush=True)
    depth = {name: [rounded(value) for value in values] for name, values in variances().items()}
    return {"versions": {"torch": torch.__version__, "numpy": np.__version__}, "trained": trained, "depth": depth}


def rounded(value: float) -> float | None:
    """Four digits are what is drawn; None for what is lost."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def good_rates(final: Mapping[str, float | None], goal: float = GOAL) -> int:
    """At how many of the rates the loss ends below the goal."""
    return sum(loss is not None and loss < goal for loss in final.values())


def steps_to_goal(curve: Sequence[float], goal: float = GOAL) -> int | None:
    """The first step whose loss is below the goal."""
    return next((step for step, loss in enumerate(curve) if loss < goal), None)


STYLE = Style(
    background="#ffffff",
    plot_background="#ffffff",
    foreground="#333333",
    foreground_strong="#111111",
    foreground_subtle="#777777",
    colors=("#777777", "#1b6ca8", "#c0392b", "#2e8b57"),
    font_family="sans-serif",
    label_font_size=13,
    major_label_font_size=13,
    legend_font_size=14,
    title_font_size=16,
    stroke_width="2",
)
COMMON: dict[str, Any] = {
    "style": STYLE,
    "js": (),
    "width": 760,
    "height": 420,
    "explicit_size": True,
    "legend_at_bottom": True,
    "legend_at_bottom_columns": 2,
    "dots_size": 3,
    "truncate_legend": -1,
    "truncate_label": -1,
    "disable_xml_declaration": True,
    "pretty_print": False,
}
MOST_LOSS = 3.0  # a loss above that of guessing (2.3) is drawn as this


def pictures(results: Mapping[str, Any]) -> dict[str, str]:
    """The SVG of each picture by its name."""
    found = {}
    for scale, word in (("1.0", "good"), ("0.3", "small")):
        chart = pygal.Line(
            **COMMON,
            title=f"Loss after {STEPS} steps, He's weights times {scale}",
            x_title="learning rate",
            y_labels=[0, 0.5, 1, 1.5, 2, 2.5, MOST_LOSS],
            x_labels=[_fraction(rate) for rate in RATES],
        )
        for form, entry in results["trained"][scale].items():
            chart.add(form, [_shown(loss) for loss in entry["final"].values()])
        found[f"training-rates-{word}"] = _svg(chart)
    chart = pygal.Line(
        **{**COMMON, **_along(range(STEPS + 1))},
        title="Loss at the best rate of each form",
        x_title="step",
        y_labels=[0, 0.5, 1, 1.5, 2, 2.5, MOST_LOSS],
    )
    for form, entry in results["trained"]["1.0"].items():
        rate = _fraction(float(entry["best rate"]))
        chart.add(f"{form} (rate {rate})", [_shown(loss) for loss in entry["best curve"]])
    found["training-steps"] = _svg(chart)
    chart = pygal.Line(
        **{**COMMON, **_along(range(1, DEPTH + 1))},
        title="Variance of a channel behind each layer of ReLU",
        x_title="layer",
        logarithmic=True,
        y_labels=[0.01, 0.1, 1, 2],
    )
    for name, values in results["depth"].items():
        chart.add(name, values)
    found["training-depth"] = _svg(chart)
    return found


def _shown(loss: float | None) -> float:
    return MOST_LOSS if loss is None else min(loss, MOST_LOSS)


def _along(places: range) -> dict[str, Any]:
    """The options of a line with a label at each tenth place."""
    return {
        "show_dots": False,
        "x_labels": [str(place) for place in places],
        "x_labels_major": [str(place) for place in places if place % 10 == 0],
        "show_minor_x_labels": False,
    }


def _fraction(rate: float) -> str:
    return f"{rate:g}" if rate >= 1 else f"1/{1 / rate:g}"


def _svg(chart: Any) -> str:
    chart.uuid = "chart"  # pygal's own is another at each run, and its comment has the date
    return re.sub(r"<!--.*?-->|<script.*?</script>", "", chart.render(is_unicode=True), flags=re.DOTALL) + "\n"


def main() -> None:
    """Run everything."""
    results = measured()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, svg in pictures(results).items():
        (IMAGES / f"{name}.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
