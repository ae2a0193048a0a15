"""Networks as pictures: which boxes there are, where fast-sugiyama places them, and the lines between them.

The layout is made here and not by a script in the page: so a page shows its networks without JavaScript, and two
thousand steps take a fraction of a second. Of the layered layouts that Python has, this one is kept up, installs as
a wheel of 0.3 MB and is not under a license that would reach the page's readers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import fast_sugiyama

from refold.graph import Plan
from refold.graph.graph import Affine, Concat, Gain, Opaque, Pad, Relayout, Select, Slice, Sum

WIDTH, HEIGHT, GAP_X, GAP_Y = 150, 28, 14, 22

# Larger networks are not drawn: nobody could read the picture, and the tables have it all.
MOST_BOXES = 4_000
# Lines are led around boxes through this many helping points in all; beyond, each goes straight to its end.
MOST_BENDS = 8_000
# Beyond, even ordering the boxes takes too long.
MOST_CROSSED = 200_000


@final
@dataclass(frozen=True)
class Item:
    """One operator before it is placed. ``inputs`` are the indices of earlier items; ``region`` is the number of
    the region that it belongs to, from 1, or None."""

    inputs: tuple[int, ...]
    label: str
    title: str
    region: int | None


@final
@dataclass(frozen=True)
class Box:
    """One operator of a picture, its upper left corner at ``x``, ``y``."""

    x: int
    y: int
    label: str
    title: str
    region: int | None


@final
@dataclass(frozen=True)
class Picture:
    """A drawn network: its boxes in the order of computation, and the lines between them as one path."""

    width: int
    height: int
    boxes: tuple[Box, ...]
    lines: str


def before(plan: Plan) -> Picture | None:
    """The network as it was trained; the steps of each folded region bear its number. None if too large."""
    return _picture(before_items(plan))


def after(plan: Plan) -> Picture | None:
    """The network as it ships. None if too large."""
    return _picture(after_items(plan))


def before_items(plan: Plan) -> list[Item]:
    """The steps of the network as it was trained."""
    numbers = {name: index + 1 for index, region in enumerate(plan.regions) for name in region.nodes}
    items, places = _inputs(plan)
    for node in plan.graph.nodes:
        _append(
            items, places, node.inputs, node.outputs, kind(node.op, node.name), node.name, numbers.get(node.name)
        )
    return items


def after_items(plan: Plan) -> list[Item]:
    """The steps of the network as it ships."""
    numbers = {region.value: index + 1 for index, region in enumerate(plan.regions)}
    items, places = _inputs(plan)
    for node in plan.graph.nodes:
        if not node.outputs or not (isinstance(node.op, Opaque) or node.output in plan.computed):
            continue
        region = plan.chosen.get(node.outputs[0])
        if region is not None and region.moved:
            (read,) = region.leaves
            places.update({region.value: places[read]} if read in places else {})
            continue
        if region is None:
            _append(items, places, node.inputs, node.outputs, kind(node.op, node.name), node.name, None)
            continue
        terms = [term for _, term in region.terms if not term.is_identity]
        label = kind(Affine(terms[0], 1), "") if len(terms) == 1 else region.operator.split(",")[0]
        title = f"{region.value}: {region.operator}"
        _append(items, places, region.leaves, node.outputs, label, title, numbers[region.value])
    return items


def _inputs(plan: Plan) -> tuple[list[Item], dict[str, int]]:
    items = [Item((), short(name), f"input {name}", None) for name in plan.graph.inputs]
    return items, {name: index for index, name in enumerate(plan.graph.inputs)}


def _append(
    items: list[Item],
    places: dict[str, int],
    inputs: Sequence[str],
    outputs: Sequence[str],
    label: str,
    title: str,
    region: int | None,
) -> None:
    read = tuple(dict.fromkeys(places[name] for name in inputs if name in places))
    items.append(Item(read, label, title, region))
    places.update(dict.fromkeys(outputs, len(items) - 1))


def kind(op: object, name: str) -> str:
    """What a step is, in as many words as fit into a box."""
    match op:
        case Affine(conv) if conv.is_scale:
            return "scale, shift"
        case Affine(conv) if not conv.windows:
            return f"dense {conv.channels_in} to {conv.channels_out}"
        case Affine(conv):
            word = "transposed" if conv.is_transposed else "conv"
            return f"{word} {'x'.join(str(window.taps) for window in conv.windows)}"
        case Gain():
            return "identity" if op == Gain() else "factor"
        case Sum():
            return "sum"
        case Concat():
            return "concat"
        case Select() | Slice():
            return "slice"
        case Pad():
            return "padding"
        case Relayout():
            return "move axis"
        case Opaque():
            return short(name)
        case _:
            return type(op).__name__.lower()


def short(name: str) -> str:
    """The telling end of a path, cut to fit into a box."""
    last = name.rsplit("/", 1)[-1].split("#")[0]
    last = last if len(last) <= 20 else last.rsplit(".", 1)[-1] or last
    return last if len(last) <= 20 else f"{last[:9]}…{last[-10:]}"


# ---- layout ------------------------------------------------------------------------------------------------


def _picture(items: Sequence[Item]) -> Picture | None:
    # Items read earlier ones only, so there is no cycle, which the layout library would not survive.
    edges = [(source, index) for index, item in enumerate(items) for source in item.inputs if source < index]
    bends = _bends(items)
    if not items or len(items) > MOST_BOXES or bends > MOST_CROSSED:
        return None
    # The library calls its helping points by the numbers that follow those of the vertices.
    joined = sorted({end for edge in edges for end in edge})
    vertex_of = {index: vertex for vertex, index in enumerate(joined)}
    spots: dict[int, tuple[float, float]] = {}
    lines: list[list[tuple[float, float]]] = []
    right = 0.0
    numbered = [(vertex_of[source], vertex_of[target]) for source, target in edges]
    layouts = fast_sugiyama.from_edges(
        numbered,
        vertex_spacing=1,
        dummy_vertices=bends <= MOST_BENDS,
        check_layout=False,
        transpose=bends <= 1_000,
    )
    for positions, _, _, drawn in layouts:
        left = min(x for _, (x, _) in positions)
        top = max(y for _, (_, y) in positions)
        here = {int(vertex): (x - left + right, top - y) for vertex, (x, y) in positions}
        spots.update((joined[vertex], spot) for vertex, spot in here.items() if vertex < len(joined))
        led = numbered if drawn is None else [(int(source), int(target)) for source, target in drawn]
        lines += _lines(led, here, len(joined))
        right = max(x for x, _ in here.values()) + 1
    for index in range(len(items)):  # what nothing is joined to
        if index not in spots:
            spots[index] = (right, 0.0)
            right += 1
    boxes = tuple(
        Box(_left(spots[index][0]), _top(spots[index][1]), item.label, item.title, item.region)
        for index, item in enumerate(items)
    )
    width = max(box.x for box in boxes) + WIDTH + GAP_X
    height = max(box.y for box in boxes) + HEIGHT + GAP_Y // 2
    return Picture(width, height, boxes, "".join(_path(line) for line in lines))


def _bends(items: Sequence[Item]) -> int:
    """How many layers all lines together pass, about: what the work of a layered layout grows with."""
    depth: list[int] = []
    total = 0
    for item in items:
        depth.append(1 + max((depth[source] for source in item.inputs), default=-1))
        total += sum(depth[-1] - depth[source] - 1 for source in item.inputs)
    return total


def _lines(
    edges: Sequence[tuple[int, int]], spots: dict[int, tuple[float, float]], count: int
) -> Iterator[list[tuple[float, float]]]:
    """The spots that each line passes; vertices from ``count`` on are helping points with one line through."""
    following = {source: target for source, target in edges if source >= count}
    for source, target in edges:
        if source >= count or source not in spots:
            continue
        line = [spots[source], spots[target]]
        while target >= count:
            target = following[target]
            line.append(spots[target])
        yield line


def _left(x: float) -> int:
    return round(x * (WIDTH + GAP_X)) + GAP_X


def _top(y: float) -> int:
    return round(y * (HEIGHT + GAP_Y)) + GAP_Y // 2


def _path(spots: Sequence[tuple[float, float]]) -> str:
    """An SVG path from below the first spot to above the last one: straight down, and in a curve to another column
    in the gaps between the layers. Relative, because that is shorter."""
    half = WIDTH // 2
    x, y = _left(spots[0][0]) + half, _top(spots[0][1]) + HEIGHT
    words = [f"M{x} {y}"]
    straight = 0
    for column, row in spots[1:]:
        next_x, next_y = _left(column) + half, _top(row)
        if next_x != x:
            if straight:
                words.append(f"v{straight}")
            dx, dy = next_x - x, next_y - y - straight
            words.append(f"c0 {dy // 2} {dx} {dy // 2} {dx} {dy}")
            x, y, straight = next_x, next_y, 0
        straight = next_y - y + HEIGHT
    return "".join([*words, f"v{straight - HEIGHT}"] if straight > HEIGHT else words)
