"""One HTML page, with nothing from outside in it: the verdict, the gains, the network, the evidence.

Everything is in the page before it is opened: the charts (pygal) and the layout of the networks (fast-sugiyama)
are made here. So it reads without JavaScript, from a file, in mail, and in print; the script only zooms and points.
Where the two libraries are missing (``pip install 'refold[report]'``) the page has the same tables without the
pictures.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from importlib.util import find_spec
from math import hypot
from typing import Any, final

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from refold import __version__
from refold.graph.anatomy import Anatomy, step
from refold.graph.region import Region
from refold.proof.certificate import TONES, LocalResult, RegionResult, Verdict
from refold.report.summary import Page, answers, duration, gains, tone, verdict
from refold.shown import brief, printable

# The colors that regions take in turn; the style sheet has as many.
COLORS = 8
# A table with more rows than this opens with a click.
MOST_OPEN_ROWS = 12


@final
@dataclass(frozen=True)
class Card:
    """One folded region for the page: its number, from 1, what is in it, and what was proved of it."""

    number: int
    region: Region
    inside: Anatomy
    norm: float
    proof: RegionResult | None

    @property
    def biased(self) -> bool:
        """Whether what the region becomes has a bias."""
        return any(part.biased for part in self.region.parts)


@final
@dataclass(frozen=True)
class Evidence:
    """One line of the proof: a place, and what its run on real data came to."""

    result: RegionResult
    local: LocalResult | None


def render(page: Page) -> str:
    """The page as HTML text."""
    environment = Environment(
        loader=PackageLoader("refold", "report/templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["clean"] = printable
    environment.filters["brief"] = brief
    environment.filters["duration"] = duration
    environment.filters["upper_first"] = lambda text: text[:1].upper() + text[1:]
    environment.filters["color"] = lambda number: f"c{(number - 1) % COLORS}"
    environment.filters["number"] = _number
    environment.filters["joined"] = lambda text: text.replace(" %", "\u00a0%")
    environment.filters["verdict_tone"] = TONES.__getitem__
    script, style = (_part(name) for name in ("page.js", "page.css"))
    cards = _cards(page)
    return environment.get_template("page.html").render(
        page=page,
        plan=page.plan,
        certificate=page.certificate,
        timing=page.timing,
        training=page.training,
        proved=Verdict.PROVED,
        tone=tone(page),
        verdict=verdict(page),
        answers=answers(page),
        gains=gains(page),
        cards=cards,
        unchanged=_unchanged(page),
        evidence=_evidence(page),
        pictures=_pictures(page, cards),
        most_open_rows=MOST_OPEN_ROWS,
        style=Markup(style),
        script=Markup(script),
        script_digest=b64encode(sha256(script.encode()).digest()).decode(),
        version=__version__,
    )


def can_draw() -> bool:
    """Whether what pictures are drawn with is installed."""
    return all(find_spec(module) is not None for module in ("fast_sugiyama", "pygal"))


def _part(name: str) -> str:
    return files("refold.report").joinpath("templates", name).read_text(encoding="utf-8").strip()


def _number(number: float | None, digits: int = 3) -> str:
    return "" if number is None else f"{number:.{digits}g}"


def _cards(page: Page) -> list[Card]:
    if page.plan is None:
        return []
    proofs = {result.where: result for result in page.certificate.regions} if page.certificate else {}
    return [
        Card(
            index + 1, region, inside, hypot(*(kernel.norm for kernel in inside.kernels)), proofs.get(region.value)
        )
        for index, (region, inside) in enumerate(zip(page.plan.regions, page.plan.anatomy, strict=True))
    ]


def _unchanged(page: Page) -> list[tuple[str, str]]:
    """The steps that are no part of a region, with what they do where the engine knows it."""
    if page.plan is None:
        return []
    folded = {name for region in page.plan.regions for name in region.nodes}
    return [(node.name, step(node).does) for node in page.plan.graph.nodes if node.name not in folded]


def _evidence(page: Page) -> list[Evidence]:
    if page.certificate is None:
        return []
    local = {result.where: result for result in page.certificate.local}
    return [Evidence(result, local.get(result.where)) for result in page.certificate.regions]


def _pictures(page: Page, cards: list[Card]) -> Mapping[str, Any]:
    """The charts and the two networks, by name; those that there is nothing for are None."""
    if not can_draw():
        return {}
    from refold.report import charts, network

    found = gains(page)
    plan, certificate = page.plan, page.certificate
    pictures: dict[str, Any] = {
        "gains": charts.gains(
            found, "Bar chart of what is left of each quantity; the table beside it has the numbers"
        )
        if found
        else None,
        "cut": any(100 * gain.share > charts.LONGEST_BAR for gain in found),
    }
    if plan is not None:
        pictures["before"], pictures["after"] = network.before(plan), network.after(plan)
        pictures["box"] = (network.WIDTH, network.HEIGHT)
        names = [brief(card.region.value, 40) for card in cards]
        pictures["norms"] = charts.norms(
            names, [card.inside for card in cards], "Chart of the norm of each folded kernel and of its branches"
        )
    if certificate is not None:
        pictures["rounding"] = charts.rounding(
            certificate, "Chart of the deviation of each region as a share of what rounding allows"
        )
        pictures["end_to_end"] = charts.end_to_end(
            certificate, "Chart of the largest error of both networks on each kind of input"
        )
    if page.training is not None:
        pictures["training"] = charts.training(page.training, "Chart of loss and accuracy over the epochs")
    return pictures
