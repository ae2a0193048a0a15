"""Random expressions: folding them is exact, or refused; and the laws agree with each other."""

from __future__ import annotations

from typing import Any

import checks
import numpy as np
from cases import conv, x
from hypothesis import given
from hypothesis import strategies as st

from oracle import assert_same, run
from refold import algebra
from refold.algebra import AffineConv, Refusal, Window, add, compose, identity, scale_shift, select, stack

small = st.builds(
    Window,
    taps=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.just(1),
    before=st.integers(0, 1),
    after=st.integers(0, 1),
    spread=st.sampled_from([1, 1, 1, 1, 2]),
)
seeds = st.integers(0, 10_000)


@st.composite
def maps(draw: Any, channels: int = 4) -> AffineConv:
    groups = draw(st.sampled_from([1, 2, 4]))
    return conv(channels, channels, (draw(small),), groups, draw(st.booleans()), draw(seeds))


Step = tuple[str, Any]


@st.composite
def programs(draw: Any) -> list[Step]:
    """Steps on one tensor: a map after it, a branch beside it, a choice of its channels."""
    steps: list[Step] = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["after", "after", "beside", "select", "stack"]))
        if kind == "select":
            steps.append((kind, draw(st.permutations(range(4)))))
        else:
            steps.append((kind, draw(maps())))
    return steps


def folded(steps: list[Step]) -> AffineConv | Refusal:
    total: AffineConv | Refusal = identity(4, 1)
    for kind, part in steps:
        assert isinstance(total, AffineConv)
        match kind:
            case "after":
                total = compose(part, total)
            case "beside":
                total = add([total, part])
            case "stack":
                both = stack([total, part], 4)
                total = both if isinstance(both, Refusal) else select(both, [0, 5, 2, 7])
            case _:
                total = select(total, part)
        if isinstance(total, Refusal):
            return total
    return total


def executed(steps: list[Step], data: np.ndarray) -> np.ndarray | None:
    value = data
    for kind, part in steps:
        match kind:
            case "after":
                value = run(part, value)
            case "select":
                value = value[list(part)]
            case _:
                other = run(part, data)
                if other.shape != value.shape:
                    return None
                value = value + other if kind == "beside" else np.concatenate([value, other])[[0, 5, 2, 7]]
        if value.size == 0:
            return None
    return value


FOLDED = {"yes": 0, "no": 0}


@given(programs(), seeds)
def test_random_programs_fold_exactly_or_are_refused(steps: list[Step], seed: int) -> None:
    total = folded(steps)
    FOLDED["yes" if isinstance(total, AffineConv) else "no"] += 1
    if isinstance(total, Refusal):
        assert total.reason
        return
    for size in (5, 8):
        data = x(4, size, seed=seed)
        expected = executed(steps, data)
        if expected is not None:
            assert_same(run(total, data), expected)


def test_a_sizeable_share_of_them_folded() -> None:
    assert FOLDED["yes"] >= 0.2 * (FOLDED["yes"] + FOLDED["no"])


@given(maps(), maps(), maps())
def test_composition_is_associative(a: AffineConv, b: AffineConv, c: AffineConv) -> None:
    bc, ab = compose(b, c), compose(a, b)
    if isinstance(bc, Refusal) or isinstance(ab, Refusal):
        return
    left, right = compose(ab, c), compose(a, bc)
    if isinstance(left, AffineConv) and isinstance(right, AffineConv):
        data = x(4, 9)
        assert_same(run(left, data), run(right, data))


@given(maps(), maps(), maps())
def test_composition_distributes_over_sums(a: AffineConv, b: AffineConv, c: AffineConv) -> None:
    total = add([b, c])
    if isinstance(total, Refusal):
        return
    whole = compose(a, total)
    parts = [compose(a.linear(), b), compose(a, c)]
    solid = [part for part in parts if isinstance(part, AffineConv)]
    if isinstance(whole, AffineConv) and len(solid) == 2:
        split = add(solid)
        assert isinstance(split, AffineConv)
        assert_same(run(whole, x(4, 9)), run(split, x(4, 9)))


@given(maps())
def test_identity_is_the_unit(a: AffineConv) -> None:
    one = identity(4, 1)
    left, right = compose(one, a), compose(a, one)
    assert isinstance(left, AffineConv)
    assert isinstance(right, AffineConv)
    for same in (left, right):
        assert same.groups == a.groups
        assert same.windows == a.windows
        assert_same(same.kernel, a.kernel)


@given(maps(), maps(), maps(), st.floats(-3.0, 3.0))
def test_no_weight_exceeds_what_its_parts_say(a: AffineConv, b: AffineConv, c: AffineConv, factor: float) -> None:
    chain = compose(b, a)
    for made in (a, a.scaled(factor), select(a, [3, 0]), chain, add([a, c.scaled(factor)])):
        if not isinstance(made, Refusal):
            assert np.abs(made.kernel).max(initial=0.0) <= made.most * (1 + 1e-12)


def test_what_is_not_a_number_is_not_within_any_bound() -> None:
    broken = scale_shift(np.array([1.0, np.nan, 1.0, 1.0]), axes=1)
    sound = scale_shift(np.ones(4), axes=1)
    for made in (
        broken,
        compose(sound, broken),
        compose(broken, sound),
        add([sound, broken]),
        add([broken, sound]),
    ):
        assert isinstance(made, AffineConv)
        assert not made.most <= 1e30


@given(
    st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=3, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=6),
    st.booleans(),
)
def test_maps_per_channel_pass_through_means_or_are_refused(
    maps: list[tuple[int, int]], pairs: list[tuple[int, int]], rising: bool
) -> None:
    factors, shifts = zip(*maps, strict=True)
    here, there = zip(*pairs, strict=True)
    rows = {row: place for place, row in enumerate(dict.fromkeys(there))}
    checks.pass_through(algebra, factors, shifts, here, [rows[row] for row in there], rising=rising)
