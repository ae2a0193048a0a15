"""What weight normalization costs in each framework."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sections.markdown import table, versions

AIM = 1.15  # times the plain layer, for a dense layer at batch 64 and more
NOISE = 0.02  # of a ratio: what is nearer is as fast
MODES = ("eager", "compiled")
TITLES = {
    "torch": "PyTorch",
    "keras-jax": "Keras on JAX, beside flax and equinox",
    "keras-tensorflow": "Keras on TensorFlow",
    "keras-torch": "Keras on torch",
    "paddle": "PaddlePaddle",
}

INTRODUCTION = """\
Seconds of a step of one layer, forward and backward to the parameters and the input, over those of the plain layer
of the same library: less is better. All forms of a layer run in turn in one process on one processor, each
framework in a process of its own; the median over the rounds, quartiles in brackets. timm has convolutions only:
for the dense layer its formula is written out. In bold: the fastest form of its method, or one that is as fast
(within {noise}), where there are several. `"rms"` and `"layer"` have no form of somebody else beside them.
PyTorch's rounds are with its environment of `make bench-torch`, where timm is."""


def section(result: Mapping[str, Any]) -> list[str]:
    """The lines of the page."""
    lines = ["## Weight normalization", "", *INTRODUCTION.format(noise=NOISE).splitlines(), ""]
    for name, found in result["sections"].items():
        lines += [f"### {TITLES[name]}", "", f"{found['rounds']} rounds; {versions(found)}.", ""]
        lines += [*_table(found["rows"]), "", *_verdicts(found["rows"]), ""]
    return lines[:-1]


def _cells(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each measured layer and mode, and its forms."""
    for row in rows:
        for mode in (mode for mode in MODES if mode in row):
            yield f"{row['layer']}, {mode}", row[mode]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = dict(_cells(rows))
    forms = dict.fromkeys(form for found in cells.values() for form in found)
    return table(
        ["form"], list(cells), [[form, *(_cell(found, form) for found in cells.values())] for form in forms]
    )


def _cell(found: Mapping[str, Any], form: str) -> str:
    if form not in found:
        return ""
    over, method = found[form]["over"], found[form]["method"]
    if method == "plain":
        return f"{1000 * found[form]['seconds']:.1f} ms"
    rivals = [one["over"]["median"] for one in found.values() if one["method"] == method]
    shown = f"{over['median']:.2f}"
    if len(rivals) > 1 and over["median"] <= min(rivals) + NOISE:
        shown = f"**{shown}**"
    return f"{shown} ({over['low']:.2f} to {over['high']:.2f})"


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where somebody else is faster, and where weight normalization takes more than is aimed at."""
    slower, beyond = [], []
    for where, found in _cells(rows):
        for form, own in found.items():
            if not form.startswith("refold"):
                continue
            median = own["over"]["median"]
            rivals = {
                name: one["over"]["median"]
                for name, one in found.items()
                if one["method"] == own["method"] and not name.startswith("refold")
            }
            best = min(rivals, key=lambda name: rivals[name], default=None)
            if best is not None and rivals[best] < median - NOISE:
                slower.append(f"{where}, {form} ({median:.2f}; {best} {rivals[best]:.2f})")
            if own["method"] == "unit" and median > AIM:
                beyond.append(f"{where} ({median:.2f})")
    return [
        f"Somebody else is faster: {'; '.join(slower) or 'nowhere'}.",
        "",
        f'The aim for `"unit"` is {AIM} times the plain layer. Beyond it: {"; ".join(beyond) or "none"}.',
    ]
