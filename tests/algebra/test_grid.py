"""Every law on every small geometry, against literal loops, without a tolerance.

Each case says whether it must fold or must be refused, and the expectation comes from trying: a combination
must be refused exactly where the one convolution that it could be is wrong at a border of some size.
"""

from __future__ import annotations

from itertools import product
from math import gcd
from typing import Any

import checks
import numpy as np
import pytest
from cases import PADDINGS, conv, spread_windows, weights, windows, x

from oracle import assert_same, average_pool, batch_norm, output_size, run, tensorflow_same, total
from refold import algebra
from refold.algebra import (
    AffineConv,
    Refusal,
    Window,
    add,
    compose,
    dense,
    geometry,
    identity,
    same,
    scale_shift,
    select,
    stack,
)
from refold.algebra.evaluate import evaluate
from refold.algebra.laws import refine_groups

GRID = list(windows())
TRANSPOSED = [
    (1, 1, 1, (0, 0), 1),
    (2, 2, 1, (0, 0), 1),
    (3, 2, 1, (1, 0), 2),
    (4, 2, 1, (1, 1), 1),
    (3, 3, 2, (2, 1), 2),
    (2, 4, 1, (0, -2), 1),
]
UNIT = Window()
LINES = [(n,) for n in (1, 4, 6, 7)]
PLANES = [(5, 6), (6, 9), (8, 7)]

# ---- compose -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outer", GRID)
def test_a_composition_folds_exactly_where_it_is_a_convolution(outer: Window, bias: bool) -> None:
    """A window that steps over part of what it pads may by luck miss all that is wrong there; the law does not
    look for such luck, so only soundness is asked of it."""
    tight = checks.reads_all_that_it_pads(outer)
    for inner in GRID:
        folds = checks.compose_along_an_axis(algebra, outer, inner, bias)
        if tight:
            exact = checks.a_composition_is_a_convolution(outer, inner, bias, range(1, 22))
            assert folds == exact, (outer, inner)


def test_the_grid_holds_both_answers() -> None:
    folds = [
        isinstance(compose(conv(1, 1, (outer,)), conv(1, 1, (inner,), bias=False)), AffineConv)
        for outer, inner in product(GRID, GRID)
    ]
    assert 0.3 < np.mean(folds) < 0.7


@pytest.mark.parametrize("outer", [w for w in windows((1, 2, 3)) if w.before <= 0 and w.after <= 0])
def test_after_anything_a_map_that_pads_nothing_must_fold(outer: Window) -> None:
    for inner in windows((1, 2, 3)):
        assert checks.compose_along_an_axis(algebra, outer, inner, bias=True, sizes=(3, 7, 8, 12))


@pytest.mark.parametrize("outer", GRID)
def test_after_an_unbiased_pointwise_map_anything_must_fold(outer: Window) -> None:
    assert checks.compose_along_an_axis(algebra, outer, UNIT, bias=False)


@pytest.mark.parametrize("outer", GRID)
def test_a_pointwise_map_must_fold_after_anything(outer: Window) -> None:
    assert checks.compose_along_an_axis(algebra, UNIT, outer, bias=True)


@pytest.mark.parametrize("outer", [w for w in GRID if max(w.before, w.after) > 0])
def test_padding_after_a_bias_must_be_refused(outer: Window) -> None:
    assert not checks.compose_along_an_axis(algebra, outer, UNIT, bias=True)


@pytest.mark.parametrize("inner", [w for w in GRID if w.taps > 1 and w.slack <= 0 and w.stride == 1])
def test_padding_after_a_kernel_that_does_not_grow_the_tensor_must_be_refused(inner: Window) -> None:
    assert not checks.compose_along_an_axis(algebra, Window(3, 1, 1, 1, 1), inner, bias=False)


def test_padding_after_a_kernel_that_pads_in_full_must_fold() -> None:
    for taps, dilation in product((2, 3), (1, 2)):
        reach = dilation * (taps - 1)
        full = Window(taps, 1, dilation, reach, reach)
        assert checks.compose_along_an_axis(algebra, Window(3, 1, 1, 1, 1), full, bias=False)
        assert not checks.compose_along_an_axis(algebra, Window(3, 1, 1, 1, 1), full, bias=True)


SPREAD = list(spread_windows())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("window", SPREAD)
def test_transposed_convolutions_fold_only_where_they_are_one(window: Window, bias: bool) -> None:
    """Between the zeros much may go well by luck, for which the law does not look; where nothing is read beyond
    the ends it must fold."""
    sizes = (1, 2, 3, 5, 8)
    for other in [*GRID[::5], *SPREAD[::7]]:
        for outer, inner in ((window, other), (other, window)):
            folds = checks.compose_along_an_axis(algebra, outer, inner, bias, sizes)
            exact = checks.a_composition_is_a_convolution(outer, inner, bias, range(1, 14))
            assert exact or not folds, (outer, inner)
            if max(outer.before, outer.after) < outer.spread and (outer.spread == 1 or inner.stride == 1):
                assert folds == (outer.spread == 1 or not bias), (outer, inner)


@pytest.mark.parametrize("window", SPREAD)
def test_a_factor_must_fold_on_both_sides_of_a_transposed_convolution(window: Window) -> None:
    assert checks.compose_along_an_axis(algebra, UNIT, window, bias=True)
    assert checks.compose_along_an_axis(algebra, window, UNIT, bias=False)
    assert not checks.compose_along_an_axis(algebra, window, UNIT, bias=True)


@pytest.mark.parametrize("one", SPREAD[::3])
def test_sums_of_transposed_convolutions_fold_where_steps_and_sizes_agree(one: Window) -> None:
    for other in [*SPREAD[::2], *GRID[::9]]:
        folds = checks.add_along_an_axis(algebra, one, other)
        same_steps = (one.stride, one.spread) == (other.stride, other.spread)
        assert folds == (same_steps and one.slack == other.slack)


@pytest.mark.parametrize(("taps", "stride", "dilation", "crop", "groups"), TRANSPOSED)
def test_a_transposed_convolution_is_written_by_its_definition(
    taps: int, stride: int, dilation: int, crop: tuple[int, int], groups: int
) -> None:
    kernel = np.random.default_rng(taps).integers(1, 9, (4, 6 // groups, taps)).astype(float)
    conv = checks.transposed(algebra, kernel, stride, crop, groups, dilation)
    assert geometry.crop(conv.windows[0]) == crop
    assert_same(algebra.turned_around(conv.kernel, groups), kernel)
    data = x(4, 5)
    assert_same(evaluate(conv, data[None])[0], run(conv, data))


GROUPED = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2), (2, 4), (4, 4), (4, 1), (1, 4)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outer_groups", "inner_groups"), GROUPED)
@pytest.mark.parametrize(("first", "middle", "last"), [(4, 4, 4), (4, 8, 4), (8, 4, 8), (4, 4, 12)])
def test_compositions_keep_the_groups_that_both_have(
    first: int, middle: int, last: int, outer_groups: int, inner_groups: int, bias: bool
) -> None:
    inner = conv(first, middle, (Window(3, 1, 2),), inner_groups, bias, seed=4)
    outer = conv(middle, last, (Window(2, 2),), outer_groups, bias, seed=3)
    folded = compose(outer, inner)
    assert isinstance(folded, AffineConv)
    if outer.is_channelwise or inner.is_channelwise:
        assert folded.groups == (inner if outer.is_channelwise else outer).groups
    else:
        assert folded.groups == gcd(outer_groups, inner_groups)
    assert refine_groups(folded).groups == folded.groups
    assert checks.compose(algebra, outer, inner, [(6,), (9,)])


PLANE_WINDOWS = [
    (Window(2, 2), Window(3, 1, 2)),
    (Window(1, 2, 1, 0, 1), Window(2, 1, 1, 1, 0)),
    (Window(3, 1, 1, 1, 1), UNIT),
    (UNIT, UNIT),
    (Window(2, 1, 3, -1, 0), Window(1, 3, 1, 0, -1)),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outer", "inner"), list(product(PLANE_WINDOWS, PLANE_WINDOWS)))
def test_two_axes_fold_where_each_of_them_does(outer: Any, inner: Any, bias: bool) -> None:
    folds = checks.compose(algebra, conv(2, 3, outer, seed=1), conv(4, 2, inner, 2, bias, seed=2), PLANES)
    assert folds == all(
        checks.a_composition_is_a_convolution(o, i, bias, range(1, 22)) for o, i in zip(outer, inner, strict=True)
    )


def test_three_axes_compose() -> None:
    three = conv(2, 2, (Window(2), Window(1, 2), Window(2, 1, 2, 1, 0)), seed=5)
    first = conv(2, 2, (Window(3, 2), Window(2), Window(1)), 2, bias=False, seed=6)
    assert checks.compose(algebra, three, first, [(6, 4, 5)])


def test_dense_layers_compose() -> None:
    for outer_groups, inner_groups in ((1, 1), (2, 1), (2, 2)):
        a, b = conv(6, 4, (), inner_groups, seed=1), conv(4, 2, (), outer_groups, seed=2)
        assert checks.compose(algebra, b, a, [()])


def test_scales_and_norms_fold_on_both_sides() -> None:
    a = conv(4, 6, (Window(3),), 2, seed=1)
    norms = {n: algebra.batch_norm(np.arange(n), [3.0] * n, 1.0, np.arange(n) * 2, np.ones(n), 1) for n in (4, 6)}
    scales = {n: scale_shift(np.arange(1.0, n + 1), np.arange(n) - 2.0, 1) for n in (4, 6)}
    for outer, inner in ((norms[6], a), (a, norms[4]), (scales[6], a), (a, scales[4])):
        folded = compose(outer, inner)
        assert isinstance(folded, AffineConv)
        assert folded.groups == 2
        assert checks.compose(algebra, outer, inner, LINES[1:])


def test_a_scale_without_a_shift_folds_before_a_convolution_that_pads() -> None:
    padding = conv(4, 6, (Window(3, 1, 1, 1, 1),), 2, seed=1)
    assert checks.compose(algebra, padding, scale_shift([1, 2, 3, 4], axes=1), LINES)
    assert not checks.compose(algebra, padding, scale_shift([1, 2, 3, 4], [0, 0, 0, 1], 1), LINES)


# ---- add ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", GRID)
def test_a_sum_folds_exactly_where_strides_and_sizes_agree(one: Window) -> None:
    for other in GRID:
        agree = all(max(output_size(one, n), 0) == max(output_size(other, n), 0) for n in range(1, 30))
        assert checks.add_along_an_axis(algebra, one, other) == (agree and one.stride == other.stride)


@pytest.mark.parametrize(("one", "other"), list(product((1, 2, 4, 8), (1, 2, 4, 8))))
def test_sums_keep_the_groups_that_both_have(one: int, other: int) -> None:
    a, b = conv(8, 16, (Window(3, 1, 1, 1, 1),), one, seed=1), conv(8, 16, (UNIT,), other, seed=2)
    folded = add([a, b])
    assert isinstance(folded, AffineConv)
    assert folded.groups == gcd(one, other)
    assert checks.add(algebra, [a, b, a], [(5,)])


def test_dilated_and_asymmetric_taps_keep_their_places() -> None:
    parts = [
        conv(2, 2, (Window(3, 1, 2, 2, 2), Window(1)), seed=1),
        conv(2, 2, (Window(1), Window(3, 1, 1, 1, 1)), seed=2),
        conv(2, 2, (Window(5, 1, 1, 2, 2), Window(2, 1, 1, 0, 1)), seed=3),
        identity(2, 2),
    ]
    assert checks.add(algebra, parts, [(6, 5), (1, 1)])


def test_a_sum_has_no_more_taps_than_it_needs() -> None:
    folded = add([conv(1, 1, (Window(3, 1, 2, 2, 2),)), conv(1, 1, (Window(3, 1, 4, 4, 4),)), identity(1, 1)])
    assert isinstance(folded, AffineConv)
    assert folded.windows == (Window(5, 1, 2, 4, 4),)


def test_sums_of_dense_layers_fold() -> None:
    assert checks.add(algebra, [conv(4, 4, (), 2, seed=1), identity(4), conv(4, 4, (), seed=2)], [()])


def test_one_map_is_its_own_sum() -> None:
    assert checks.add(algebra, [conv(2, 2, (Window(3, 2, 1, 1, 0),))], LINES)


# ---- pad ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zero", "bias", "other"])
@pytest.mark.parametrize("widths", [(0, 0), (1, 1), (2, 0), (0, 1), (-1, 0), (-1, 2), (1, -1)])
def test_padding_folds_exactly_where_the_outside_is_the_constant(widths: tuple[int, int], kind: str) -> None:
    for inner in GRID:
        folds = checks.pad(algebra, inner, widths, kind)
        if max(widths) <= 0 or (inner == UNIT and kind != "other"):
            assert folds
        if max(widths) > 0 and kind == "other":
            assert not folds


def test_a_padding_may_differ_from_channel_to_channel_and_axis_to_axis() -> None:
    a = conv(2, 3, (UNIT, Window(2)), seed=1)
    assert isinstance(algebra.pad(a, [(1, 2), (-1, 0)], a.bias), AffineConv)
    assert isinstance(algebra.pad(a, [(1, 2), (0, 1)], a.bias), Refusal)
    assert isinstance(algebra.pad(a, [(1, 2), (-1, 0)], a.bias[::-1]), Refusal)


# ---- stack, select, groups -----------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("one", "other"), list(product(PADDINGS, PADDINGS)))
def test_stacks_fold_where_there_are_sizes_at_which_they_exist(
    one: tuple[int, int], other: tuple[int, int], stride: int
) -> None:
    windows = [Window(3, stride, 1, *widths) for widths in (one, other)]
    a, b = (conv(4, 4, (window,), 2, seed=seed) for seed, window in enumerate(windows))
    sizes = [size for size in range(2, 14) if output_size(windows[0], size) == output_size(windows[1], size) > 0]
    folds = checks.stack(algebra, [a, 3, b], 4, [(size,) for size in sizes])
    assert folds == bool(sizes)


@pytest.mark.parametrize("outer", [Window(), Window(3, 1, 1, 1, 1), Window(3, 2, 1, 1, 0), Window(5, 1, 2, 2, 4)])
def test_every_second_position_beside_the_others_goes_into_what_reads_them(outer: Window) -> None:
    """Space to depth: at even sizes only, where the outside of what stands side by side is 0 on both ends."""
    parts = [conv(2, 2, (Window(1, 2, 1, -start, 0),), bias=False, seed=start) for start in (0, 1)]
    whole = stack(parts, 2)
    assert isinstance(whole, AffineConv)
    after = conv(4, 3, (outer,), seed=5)
    composed = compose(after, whole)
    assert isinstance(composed, AffineConv)
    for size in (4, 8, 10):
        data = x(2, size)
        beside = np.concatenate([run(part, data) for part in parts])
        assert_same(run(composed, data), run(after, beside))


def test_convolutions_on_the_two_halves_of_the_channels_stack_to_groups() -> None:
    halves = [select(identity(8, 1), range(4)), select(identity(8, 1), range(4, 8))]
    parts = [compose(conv(4, 2, (Window(3),), seed=s), half) for s, half in enumerate(halves)]
    both = stack(parts, 8)  # type: ignore[arg-type]
    assert isinstance(both, AffineConv)
    assert both.groups == 2
    assert checks.stack(algebra, parts, 8, [(5,)])
    assert checks.stack(algebra, [conv(4, 2, ()), 1, conv(4, 3, (), 1)], 4, [()])


def test_what_combinations_read_is_known_without_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    checks.reaches(algebra)

    def computed(*_: Any) -> Any:
        raise AssertionError("a kernel was computed to plan with")

    parts = [compose(conv(8, 4, (Window(3),), 2, seed=s), conv(8, 8, (UNIT,), 2, seed=2)) for s in range(2)]
    monkeypatch.setattr(algebra.laws, "_composed_kernel", computed)
    both = stack(parts, 8)  # type: ignore[arg-type]
    assert isinstance(both, AffineConv)
    assert both.groups == 1
    wide = compose(conv(8, 5, (Window(3),), seed=3), both)
    assert isinstance(wide, AffineConv)
    assert isinstance(stack([wide, add([wide, wide.scaled(2.0)])], 8), AffineConv)  # type: ignore[list-item]


SOME = [[0, 1], [2, 3], [0, 2], [1, 3], [3, 0], [2]]
ALL = [[2, 2, 2], [0, 1, 2, 3], [3, 2, 1, 0], [0, 0, 2, 2], [1, 0, 2, 3]]
PICKS = SOME + ALL


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("channels", PICKS)
def test_any_choice_of_channels_folds(groups: int, channels: list[int]) -> None:
    checks.select(algebra, conv(4, 4, (Window(3, 1, 1, 1, 0),), groups, seed=1), channels, (5,))
    checks.select(algebra, conv(8, 8, (), groups, seed=1), channels, ())


def test_a_channel_shuffle_between_grouped_convolutions_folds() -> None:
    shuffle = select(identity(4, 1), [0, 2, 1, 3])
    a, b = (conv(4, 4, (Window(2),), 2, seed=s) for s in (1, 2))
    mixed = compose(shuffle, a)
    assert isinstance(mixed, AffineConv)
    assert checks.compose(algebra, b, mixed, [(6,)])


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("axes", [0, 1, 2])
def test_groups_are_found_again(groups: int, axes: int) -> None:
    a = conv(12, 24, (Window(2), UNIT)[:axes], groups, seed=groups)
    for fewer in (n for n in range(1, groups + 1) if groups % n == 0):
        checks.regroup(algebra, a, fewer, (4, 3)[:axes])


def test_groups_are_as_many_as_every_block_allows() -> None:
    wide = algebra.regroup(conv(8, 8, (Window(2),), 4, seed=1), 1).kernel.copy()
    wide[7, 4, 1] = 1.0  # joins the last two groups
    found = refine_groups(algebra.convolution(wide, None, (Window(2),)))
    assert found.groups == 2
    assert_same(run(found, x(8, 4)), run(algebra.convolution(wide, None, (Window(2),)), x(8, 4)))


# ---- what layers are -----------------------------------------------------------------------------


def test_an_average_pool_is_the_mean_of_its_window() -> None:
    for window in windows():
        pool = algebra.average_pool(3, (window,))
        checks.everywhere(lambda d, w=window: average_pool(12 * d, [w]), pool.scaled(12.0), [(6,), (7,)])
    pair = (Window(2, 2, 1, 1, 0), Window(2))
    checks.everywhere(lambda d: average_pool(d, pair), algebra.average_pool(2, pair), [(4, 5)])


def test_a_batch_norm_is_its_formula() -> None:
    mean, variance, gamma, beta = [1.0, 2.0], [3.0, 8.0], [4.0, 6.0], [5.0, 7.0]
    for axes in range(4):
        data = x(2, *(3, 2, 2)[:axes])
        ones = [1.0, 1.0]
        for g, b in product((gamma, None), (beta, None)):
            norm = algebra.batch_norm(mean, variance, 1.0, g, b, axes)
            expected = batch_norm(data, mean, variance, 1.0, g or ones, b or [0.0, 0.0])
            np.testing.assert_allclose(run(norm, data), expected, rtol=1e-14, atol=1e-14)


def test_a_batch_norm_without_a_finite_answer_says_so() -> None:
    assert not algebra.batch_norm([0.0], [-1.0], 0.5).is_finite
    assert not algebra.batch_norm([0.0], [0.0], 0.0).is_finite
    assert not algebra.batch_norm([np.inf], [1.0], 0.0).is_finite
    assert not algebra.batch_norm([0.0], [np.inf], 0.0).is_finite  # a factor of 0 would hide that it is broken
    assert algebra.batch_norm([0.0], [0.0], 1e-3).is_finite


@pytest.mark.parametrize("axes", [0, 1, 2, 3])
def test_identity_and_dense_are_what_their_names_say(axes: int) -> None:
    data = x(3, *(4, 3, 2)[:axes])
    assert_same(run(identity(3, axes), data), data)
    assert_same(run(dense([[1, 2, 3]], [4], axes), data)[0], data[0] + 2 * data[1] + 3 * data[2] + 4)


# ---- padding 'same' ------------------------------------------------------------------------------

GEOMETRIES = [(t, s, d) for t, s, d in product((1, 2, 3, 4, 5, 7), (1, 2, 3, 4), (1, 2, 3)) if t > 1 or d == 1]


@pytest.mark.parametrize(("taps", "stride", "dilation"), GEOMETRIES)
def test_same_is_tensorflows(taps: int, stride: int, dilation: int) -> None:
    unknown = same(taps, stride, dilation, None)
    kernel = weights(taps, 3)
    for size in range(1, 25):
        window = same(taps, stride, dilation, size)
        assert (window.before, window.after) == tensorflow_same(size, taps, stride, dilation)
        assert window.output_size(size) == unknown.output_size(size) == -(-size // stride)
        data = x(1, size)
        one, other = (algebra.convolution([[kernel]], None, (w,)) for w in (unknown, window))
        assert_same(run(one, data), run(other, data))


@pytest.mark.parametrize(("taps", "stride", "dilation"), GEOMETRIES)
def test_same_floats_exactly_where_its_start_depends_on_the_size(taps: int, stride: int, dilation: int) -> None:
    starts = {tensorflow_same(size, taps, stride, dilation)[0] for size in range(1, 25)}
    assert same(taps, stride, dilation, None).floating == (len(starts) > 1)


FLOATING = [same(t, s, d, None) for t, s, d in GEOMETRIES if s in (2, 3)]


@pytest.mark.parametrize("one", [w for w in FLOATING if w.floating])
def test_floating_windows_add_exactly_where_their_distance_is_one(one: Window) -> None:
    def starts(window: Window) -> list[int]:
        return [tensorflow_same(n, window.taps, window.stride, window.dilation)[0] for n in range(1, 25)]

    for other in FLOATING:
        distances = {a - b for a, b in zip(starts(one), starts(other), strict=True)}
        folds = checks.add_along_an_axis(algebra, one, other, range(1, 13))
        assert folds == (one.stride == other.stride and len(distances) == 1)


def test_floating_windows_compose_with_pointwise_maps_only() -> None:
    floating = same(3, 2, 1, None)
    a = conv(2, 2, (floating,), seed=1)
    mix, biased = conv(2, 2, (UNIT,), bias=False, seed=3), conv(2, 2, (UNIT,), seed=3)
    assert checks.compose(algebra, a, mix, LINES)
    assert checks.compose(algebra, biased, a, LINES)
    assert not checks.compose(algebra, a, biased, LINES)
    for window in GRID:
        if window != UNIT:
            other = conv(2, 2, (window,), bias=False, seed=4)
            assert isinstance(compose(other, a), Refusal)
            assert isinstance(compose(a, other), Refusal)
    assert isinstance(algebra.pad(a, [(0, 0)]), AffineConv)
    for widths in ((1, 0), (0, 1), (-1, 0)):
        assert isinstance(algebra.pad(a, [widths]), Refusal)


def test_floating_branches_of_many_channels_add() -> None:
    a, b, c = (conv(4, 4, (same(t, 2, 1, None), same(t, 2, 1, 9)), g, seed=t) for t, g in ((3, 2), (5, 4), (7, 1)))
    folded = add([a, b, c], (None, 9))
    assert isinstance(folded, AffineConv)
    for rows in range(3, 9):
        data = x(4, rows, 9)
        assert_same(run(folded, data), total([run(part, data) for part in (a, b, c)]))
