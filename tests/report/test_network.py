"""Pictures of networks: every step has its place, no two share one, and lines lead down."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from made_up import plan

from refold.report import network
from refold.report.network import HEIGHT, WIDTH, Item, Picture


def drawn(*inputs: tuple[int, ...]) -> Picture:
    picture = network._picture([Item(read, str(index), "", None) for index, read in enumerate(inputs)])
    assert picture is not None
    return picture


def ends(picture: Picture) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where each line begins and ends, read from the path."""
    found = []
    for line in picture.lines.split("M")[1:]:
        x, y = start = tuple(map(int, re.findall(r"-?\d+", line)[:2]))
        for kind, numbers in re.findall(r"([cv])([-\d ]+)", line):
            steps = [int(number) for number in numbers.split()]
            x, y = (x + steps[4], y + steps[5]) if kind == "c" else (x, y + steps[0])
        found.append(((start[0], start[1]), (x, y)))
    return found


def check(picture: Picture, inputs: tuple[tuple[int, ...], ...]) -> None:
    boxes = picture.boxes
    assert len(boxes) == len(inputs)
    for i, a in enumerate(boxes):
        assert 0 <= a.x <= picture.width - WIDTH
        assert 0 <= a.y <= picture.height - HEIGHT
        for b in boxes[i + 1 :]:
            assert abs(a.x - b.x) >= WIDTH or abs(a.y - b.y) >= HEIGHT, (a, b)
    expected = sorted(
        ((boxes[s].x + WIDTH // 2, boxes[s].y + HEIGHT), (boxes[t].x + WIDTH // 2, boxes[t].y))
        for t, read in enumerate(inputs)
        for s in read
    )
    assert sorted(ends(picture)) == expected
    assert all(start[1] < end[1] for start, end in expected)


@pytest.mark.parametrize(
    "inputs",
    [
        ((),),
        ((), ()),
        ((), (0,), (1,)),
        ((), (0,), (0,), (1, 2), (0, 3)),
        ((), (0,), (), (2,), (), (4, 2)),
        ((), (), (), (1,)),
        ((), *((index,) for index in range(300))),
    ],
)
def test_boxes_do_not_overlap_and_lines_join_them(inputs: tuple[tuple[int, ...], ...]) -> None:
    check(drawn(*inputs), inputs)


def test_random_networks() -> None:
    draw = random.Random(0)
    for _ in range(60):
        size = draw.randrange(2, 40)
        inputs = tuple(
            tuple(sorted({max(0, i - 1 - int(draw.expovariate(0.4))) for _ in range(draw.randrange(3))}))
            if i
            else ()
            for i in range(size)
        )
        check(drawn(*inputs), inputs)


def test_lines_of_a_dense_network_go_straight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "MOST_BENDS", 3)
    inputs = tuple(tuple(range(index)) for index in range(6))
    check(drawn(*inputs), inputs)


def test_a_picture_too_large_or_too_tangled_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert network.before(plan(1)) is not None
    monkeypatch.setattr(network, "MOST_CROSSED", -1)
    assert network.before(plan(1)) is None


def test_regions_and_what_is_left_of_them_bear_one_number() -> None:
    before, after = network.before_items(plan(3)), network.after_items(plan(3))
    assert [item.region for item in before] == [None, *[1] * 5, None, *[2] * 5, None, *[3] * 5, None]
    assert [item.region for item in after] == [None, 1, None, 2, None, 3, None]
    assert [item.inputs for item in after] == [(), (0,), (1,), (2,), (3,), (4,), (5,)]
    assert [item.label for item in before][:3] == ["input", "conv 3x3", "scale, shift"]
