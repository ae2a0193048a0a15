"""Networks and curves as pictures: numbers in, positions out. The page's template draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from refold.graph import Plan
from refold.graph.graph import Affine, Concat, Gain, Opaque, Sum

WIDTH, HEIGHT, GAP_X, GAP_Y = 132, 30, 14, 24
COLORS = 6


@final
@dataclass(frozen=True)
class Box:
    """One operator of a picture; ``region`` is the index of its color, or None."""

    x: float
    y: float
    label: str
    title: str
    region: int | None


@final
@dataclass(frozen=True)
class Picture:
    """A drawn network: its boxes, and the paths between them."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    paths: tuple[str, ...]


@final
@dataclass(frozen=True)
class Item:
    """One operator before it is placed: what it reads is named by the values of others."""

    value: str
    inputs: tuple[str, ...]
    label: str
    title: str
    region: int | None


def before(plan: Plan) -> Picture:
    """The network as it was trained; the steps of each folded region in its color."""
    colors = {name: index for index, region in enumerate(plan.regions) for name in region.nodes}
    items = [Item(name, (), _short(name), f"input {name}", None) for name in plan.graph.inputs]
    for node in plan.graph.nodes:
        for output in node.outputs[:1]:
            items.append(
                Item(output, node.inputs, _kind(node.op, node.name), f"{node.name}", colors.get(node.name))
            )
    return _placed(items)


def after(plan: Plan) -> Picture:
    """The network as it ships."""
    items = [Item(name, (), _short(name), f"input {name}", None) for name in plan.graph.inputs]
    numbers = {region.value: index for index, region in enumerate(plan.regions)}
    for node in plan.graph.nodes:
        if not node.outputs or node.name in plan.removed:
            continue
        region = plan.chosen.get(node.outputs[0])
        if region is None:
            items.append(Item(node.outputs[0], node.inputs, _kind(node.op, node.name), node.name, None))
            continue
        laws = ", ".join(region.laws) or "identity"
        title = f"{region.value}: {len(region.nodes)} steps by {laws} became: {region.operator}"
        items.append(Item(region.value, region.leaves, region.operator.split(",")[0], title, numbers[region.value]))
    return _placed(items)


def _kind(op: object, name: str) -> str:
    match op:
        case Affine(conv) if conv.is_scale:
            return "scale, shift"
        case Affine(conv) if not conv.windows:
            return "dense"
        case Affine(conv):
            kind = "transposed" if conv.is_transposed else "conv"
            return f"{kind} " + "x".join(str(window.taps) for window in conv.windows)
        case Sum():
            return "sum"
        case Concat():
            return "concat"
        case Gain():
            return "identity" if op == Gain() else "scale"
        case Opaque():
            return _short(name)
        case _:
            return type(op).__name__.lower()


def _short(name: str) -> str:
    last = name.rsplit("/", 1)[-1].split("#")[0]
    return last if len(last) <= 16 else f"{last[:7]}…{last[-8:]}"


def _placed(items: Sequence[Item]) -> Picture:
    """A layered drawing: each box one layer below the deepest that it reads, ordered by the mean place of
    those (Sugiyama, Tagawa and Toda 1981, one sweep down)."""
    layer: dict[str, int] = {}
    rows: list[list[Item]] = []
    for item in items:
        depth = 1 + max((layer[name] for name in item.inputs if name in layer), default=-1)
        layer[item.value] = depth
        while len(rows) <= depth:
            rows.append([])
        rows[depth].append(item)
    place: dict[str, float] = {}
    for row in rows:
        row.sort(key=lambda item: _mean([place[name] for name in item.inputs if name in place]))
        for index, item in enumerate(row):
            place[item.value] = (index + 0.5) / len(row)
    widest = max((len(row) for row in rows), default=1)
    width = widest * (WIDTH + GAP_X) + GAP_X
    boxes, centers = [], {}
    for depth, row in enumerate(rows):
        for item in row:
            x = place[item.value] * width - WIDTH / 2
            y = depth * (HEIGHT + GAP_Y) + GAP_Y / 2
            centers[item.value] = (x + WIDTH / 2, y)
            region = None if item.region is None else item.region % COLORS
            boxes.append(Box(x, y, item.label, item.title, region))
    paths = []
    for item in items:
        x, y = centers[item.value]
        for name in dict.fromkeys(item.inputs):
            if name in centers:
                x0, y0 = centers[name][0], centers[name][1] + HEIGHT
                bend = (y + y0) / 2
                paths.append(f"M{x0:.0f} {y0:.0f}C{x0:.0f} {bend:.0f} {x:.0f} {bend:.0f} {x:.0f} {y:.0f}")
    return Picture(width, len(rows) * (HEIGHT + GAP_Y), tuple(boxes), tuple(paths))


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.5


def curve(numbers: Sequence[float], width: float, height: float, low: float, high: float) -> str:
    """The points of a line through ``numbers``, for a polyline."""
    span = (high - low) or 1.0
    step = width / max(len(numbers) - 1, 1)
    points = [(i * step, height * (1 - (number - low) / span)) for i, number in enumerate(numbers)]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
