"""Charts as SVG, drawn by pygal when the page is made: they show without JavaScript, in print, and in mail.

pygal brings a style sheet, a script and a random name for each chart; the page has one style sheet for all, needs
no script, and is the same for the same data, so those are taken off, and what pygal shows on hover through its
script becomes a plain ``<title>``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import pygal
from markupsafe import Markup
from pygal.style import Style

from refold.graph.anatomy import Anatomy
from refold.proof.certificate import Certificate, Verdict
from refold.report.summary import Gain, Training
from refold.shown import brief, printable

# The style sheet of the page colors the series by these classes; pygal only needs to know how many there are.
_STYLE = Style(colors=("currentColor",) * 8)

_COMMON: dict[str, Any] = {
    "style": _STYLE,
    "css": (),
    "js": (),
    "show_legend": False,
    "margin": 6,
    "margin_right": 30,
    "pretty_print": False,
    "disable_xml_declaration": True,
    "truncate_label": -1,
    "no_prefix": True,
}

# In per cent of what it was: a bar that is longer ends here, so that one quantity does not flatten all others.
LONGEST_BAR = 200.0

# Beyond this many places a chart has no names below it, only numbers.
_MOST_NAMES = 12


def gains(found: Sequence[Gain], label: str) -> Markup:
    """What is left of each quantity, in per cent of what it was, with the quartiles of what was measured."""
    top = min(LONGEST_BAR, max(100.0, *(100 * (gain.high or gain.share) for gain in found)))
    chart = pygal.HorizontalBar(
        **_COMMON,
        width=640,
        height=36 * len(found) + 46,
        margin_left=20,
        range=(0, top),
        y_labels=list(range(0, int(top) + 1, 20)),
        x_labels=[gain.name for gain in reversed(found)],
        value_formatter=lambda percent: f"{percent:.0f} %",
        spacing=14,
        rounded_bars=3,
    )
    chart.add("before", [{"value": 100.0, "formatter": _said(f"before: {g.before}")} for g in reversed(found)])
    chart.add("after", [_after(gain) for gain in reversed(found)])
    return _finished(chart, "gains", label)


def _after(gain: Gain) -> dict[str, Any]:
    percent = min(100 * gain.share, LONGEST_BAR)
    value: dict[str, Any] = {"value": percent, "formatter": _said(f"after: {gain.after} ({gain.change})")}
    if gain.low is not None and gain.high is not None:
        value["ci"] = {"low": min(100 * gain.low, LONGEST_BAR), "high": min(100 * gain.high, LONGEST_BAR)}
    return value


def rounding(certificate: Certificate, label: str) -> Markup | None:
    """Per region, the worst deviation of a weight, and the error on real activations, both as a share of what
    rounding allows; the limit is 1."""
    regions = [region for region in certificate.regions if region.ratio is not None and region.impulses]
    if not regions:
        return None
    local = {result.where: result.ratio for result in certificate.local}
    numbers = [region.ratio or 0.0 for region in regions]
    shown = [*numbers, *(local.get(region.where, 0.0) for region in regions)]
    logarithmic = max(shown) > 10
    good = [r.ratio if r.verdict is Verdict.PROVED else None for r in regions]
    bad = [None if r.verdict is Verdict.PROVED else r.ratio for r in regions]
    names = [brief(region.where, 40) for region in regions]
    chart = _dots(names, shown, logarithmic, floor=0.01)
    place = _decades if logarithmic else _plain
    count = max(len(regions), 2)
    chart.add("limit", [place(1.0, 0.01)] * count, stroke=True, show_dots=False)
    chart.add("on real data", _points(names, [local.get(r.where) for r in regions], "on real data", place))
    chart.add("proved", _points(names, good, "worst weight", place))
    chart.add("refuted", _points(names, bad, "worst weight", place))
    return _finished(chart, "rounding", label)


def end_to_end(certificate: Certificate, label: str) -> Markup | None:
    """The largest error of the original and of the folded network, on each kind of input."""
    results = [r for r in certificate.end_to_end if r.original_max_error is not None]
    if not results:
        return None
    several = len({result.output for result in results}) > 1
    names = [f"{r.inputs}, {brief(r.output, 40)}" if several else r.inputs for r in results]
    original = [result.original_max_error or 0.0 for result in results]
    folded = [result.max_error for result in results]
    known = [number for number in (*original, *folded) if 0 < number < math.inf]
    if not known:
        return None
    floor = min(known)
    chart = _dots(names, [*known, max(known)], True, floor)
    chart.add("folded", _points(names, folded, "folded", _decades, floor))
    chart.add("original", _points(names, original, "original", _decades, floor))
    return _finished(chart, "end-to-end", label)


def norms(names: Sequence[str], insides: Sequence[Anatomy], label: str) -> Markup | None:
    """Per region, the norm of its folded kernel and that of each branch that was added up."""
    folded = [math.hypot(*(kernel.norm for kernel in inside.kernels)) for inside in insides]
    most = max((len(inside.branches) for inside in insides), default=0)
    if not most:
        return None
    shown = [*folded, *(branch.norm for inside in insides for branch in inside.branches)]
    known = [number for number in shown if number > 0]
    logarithmic = bool(known) and max(known) > 100 * min(known)
    floor = max(min(known), max(known) * 1e-6) if known else 1.0
    place = _decades if logarithmic else _plain
    chart = _dots(names, shown, logarithmic, floor)
    for index in range(min(most, 6)):
        branches = [inside.branches[index] if index < len(inside.branches) else None for inside in insides]
        said = [f"branch {index + 1}" if branch else "" for branch in branches]
        numbers = [branch.norm if branch else None for branch in branches]
        chart.add(f"branch {index + 1}", _points(names, numbers, said, place, floor))
    chart.add("folded", _points(names, folded, "folded", place, floor))
    return _finished(chart, "norms", label)


def training(told: Training, label: str) -> Markup:
    """Loss and accuracy over the epochs."""
    chart = pygal.Line(
        **_COMMON,
        width=640,
        height=220,
        show_dots=len(told.accuracy) < 40,
        dots_size=2.5,
        range=(0, 1),
        secondary_range=(0, max([*told.loss, 1e-9])),
        x_labels=[str(epoch + 1) for epoch in range(len(told.accuracy))],
        x_labels_major_every=-(-len(told.accuracy) // 15),
        show_minor_x_labels=False,
        value_formatter=lambda number: f"{number:.2g}",
        y_labels_major_every=2,
        show_minor_y_labels=False,
    )
    said = [f"accuracy {accuracy:.2%}" for accuracy in told.accuracy]
    chart.add("accuracy", [{"value": a, "formatter": _said(s)} for a, s in zip(told.accuracy, said, strict=True)])
    chart.add("loss", [{"value": x, "formatter": _said(f"loss {x:.3g}")} for x in told.loss], secondary=True)
    return _finished(chart, "training", label)


# ---- shared ------------------------------------------------------------------------------------------------


def _dots(names: Sequence[str], shown: Sequence[float], logarithmic: bool, floor: float) -> Any:
    """An empty chart with one place per name, for dots; logarithmic ones are given the logarithms."""
    finite = [number for number in shown if math.isfinite(number)] or [1.0]
    if logarithmic:
        low, high = math.floor(math.log10(floor) - 0.2), math.ceil(math.log10(max(*finite, floor)) + 0.1)
        step = max(1, -(-(high - low) // 6))
        labels = [{"label": f"1e{power}", "value": power} for power in range(low, high + step, step)]
        axis = {"range": (low, labels[-1]["value"]), "y_labels": labels}
    else:
        top = _round_up(max(*finite, 1e-12) * 1.05)
        axis = {
            "range": (0, top),
            "y_labels": [{"label": f"{top * i / 4:.3g}", "value": top * i / 4} for i in range(5)],
        }
    many = len(names) > _MOST_NAMES
    every = -(-len(names) // 10)
    below = [str(i + 1) for i in range(len(names))] if many else [brief(name, 18) for name in names]
    level = many or max(map(len, below), default=0) * len(below) < 84
    # Half of a name stands to the left of its place and half to the right; all of it, where it is turned.
    left = len(below[0]) * 4 - 30 if below and level else 0
    right = len(below[-1]) * (4 if level else 6) if below else 0
    return pygal.Line(
        **{**_COMMON, "margin_left": max(_COMMON["margin"], left), "margin_right": max(30, right)},
        **axis,
        width=640,
        height=240 if level else 300,
        stroke=False,
        dots_size=5 if len(names) <= 30 else 2.5,
        x_labels=below,
        x_labels_major_every=every if many else 1,
        show_minor_x_labels=not many,
        x_label_rotation=0 if level else 30,
    )


def _round_up(number: float) -> float:
    """The next of 1, 2, 4, 5, 8 times a power of ten: ends an axis that has four steps."""
    power = 10.0 ** math.floor(math.log10(number))
    return next(step * power for step in (1, 1.2, 1.6, 2, 4, 5, 8, 10) if step * power >= number * (1 - 1e-9))


def _points(
    names: Sequence[str],
    numbers: Sequence[float | None],
    said: str | Sequence[str],
    place: Any,
    floor: float = 0.01,
) -> list[Any]:
    words = [said] * len(names) if isinstance(said, str) else said
    return [
        None
        if number is None
        else {"value": place(number, floor), "formatter": _said(f"{name}: {word} {number:.3g}")}
        for name, number, word in zip(names, numbers, words, strict=True)
    ]


def _plain(number: float, floor: float) -> float:
    return number if math.isfinite(number) else 0.0


def _decades(number: float, floor: float) -> float:
    """Where a number stands on a logarithmic axis that starts at ``floor``; what is not finite, at its top."""
    if not math.isfinite(number):
        number = 1e30
    return math.log10(max(number, floor))


def _said(text: str) -> Any:
    """A pygal formatter that says one thing."""
    return lambda _: text


# What the style sheet of the page speaks of, and what says where things are.
_CLASSES = {"axis", "x", "y", "y2", "line", "guide", "background", "series", "bar", "ci", "dot"}
_PLACES = {"d", "x", "y", "x1", "x2", "y1", "y2", "r", "cx", "cy", "rx", "ry", "width", "height", "transform"}
_DECIMALS = re.compile(r"(\d+\.\d)\d+")


def _finished(chart: Any, kind: str, label: str) -> Markup:
    root = chart.render_tree()
    _strip(root)
    root.attrib = {"class": f"chart {kind}", "viewBox": root.get("viewBox"), "role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _strip(element: Any) -> None:
    """Take off what the page has itself or must not have, from all that is below ``element``."""
    for child in list(element):
        kind = child.tag if isinstance(child.tag, str) else ""  # a comment's tag is a function
        words = child.get("class", "").split()
        # The title is pygal's own name, which a browser would show on hover.
        hover = {"tooltip", "tooltip-overlay", "text-overlay"} & set(words)
        if hover or kind in ("", "defs", "script", "style", "title"):
            element.remove(child)
        elif kind == "desc":
            element.remove(child)
            if child.get("class") == "value" and child.text:
                ElementTree.SubElement(element, "title").text = printable(child.text, 200)
        else:
            kept = [word for word in words if word in _CLASSES or word.startswith("serie-")]
            places = {name: _DECIMALS.sub(r"\1", value) for name, value in child.attrib.items() if name in _PLACES}
            child.attrib = {**({"class": " ".join(kept)} if kept else {}), **places}
            if child.text:
                child.text = printable(child.text, 80)
            _strip(child)
