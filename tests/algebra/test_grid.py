"""Every law on every small geometry, against literal loops, without a tolerance.

A law may refuse; then the combination must really be none: the kernel that the interior gives fails at some
border of some size. What must fold is stated apart, or a law that always refuses would pass.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from cases import SIZES, conv, windows, x

from oracle import assert_same, padded, run, tensorflow_same
from refold.algebra import (
    AffineConv,
    Refusal,
    Window,
    add,
    average_pool,
    batch_norm,
    compose,
    dense,
    identity,
    pad,
    regroup,
    same,
    scale_shift,
    select,
    stack,
)
from refold.algebra.laws import refine_groups

GRID = list(windows())


def check_compose(outer: AffineConv, inner: AffineConv) -> bool:
    """Check one composition at all sizes; returns whether it folded."""
    for_all = compose(outer, inner)
    for size in SIZES:
        data = x(inner.channels_in, size)
        middle = run(inner, data)
        expected = run(outer, middle)
        at_size = compose(outer, inner, (size,))
        for folded in (for_all, at_size):
            if isinstance(folded, AffineConv) and middle.size and expected.size:
                assert_same(run(folded, data), expected)
    return isinstance(for_all, AffineConv)


@pytest.mark.parametrize("bias", [False, True])
def test_compose_is_exact_wherever_it_folds(bias: bool) -> None:
    folded = 0
    for outer, inner in product(GRID[::2], GRID[::3]):
        folded += check_compose(conv(2, 2, (outer,), seed=1), conv(2, 2, (inner,), bias=bias, seed=2))
    assert folded > 100


@pytest.mark.parametrize("inner", GRID)
def test_compose_must_fold_where_nothing_is_padded(inner: Window) -> None:
    for taps, stride, dilation in product((1, 2, 3), (1, 2), (1, 2)):
        assert check_compose(conv(2, 3, (Window(taps, stride, dilation),), seed=1), conv(2, 2, (inner,), seed=2))


@pytest.mark.parametrize("outer", GRID)
def test_compose_must_fold_after_an_unbiased_pointwise_map(outer: Window) -> None:
    assert check_compose(conv(3, 2, (outer,), seed=1), conv(2, 3, (Window(),), bias=False, seed=2))


@pytest.mark.parametrize("outer", [w for w in GRID if w.before > 0 or w.after > 0])
def test_compose_must_refuse_padding_after_a_bias(outer: Window) -> None:
    refusal = compose(conv(2, 2, (outer,), seed=1), conv(2, 2, (Window(),), bias=True, seed=2))
    assert isinstance(refusal, Refusal)
    assert "zero padding after a bias" in refusal.reason


def test_refused_compositions_are_no_convolutions() -> None:
    """Where a law refuses, the interior's kernel is wrong at a border: the refusal is not too strict.

    (With strides or crops in between, the second map may by luck step over all that is wrong; the law does
    not look for such luck.)
    """
    refused = 0
    plain = [w for w in GRID if w.stride == 1 and w.before >= 0]
    for outer, inner in product(plain, plain):
        b, a = conv(1, 1, (outer,), seed=1), conv(1, 1, (inner,), bias=False, seed=2)
        if isinstance(compose(b, a), AffineConv):
            continue
        refused += 1
        open_b = AffineConv(b.kernel, b.bias, (Window(outer.taps, outer.stride, outer.dilation),))
        merged = compose(open_b, a)
        assert isinstance(merged, AffineConv)
        (w,) = merged.windows
        forced = AffineConv(
            merged.kernel,
            merged.bias,
            (
                Window(
                    w.taps,
                    w.stride,
                    w.dilation,
                    inner.before + inner.stride * outer.before,
                    inner.after + inner.stride * outer.after,
                ),
            ),
        )
        wrong = False
        for size, seed in product(range(1, 14), range(3)):
            data = x(1, size, seed=seed)
            middle = run(a, data)
            if middle.size:
                one, other = run(b, middle), run(forced, data)
                wrong = wrong or one.shape != other.shape or not np.array_equal(one, other)
        assert wrong, (outer, inner)
    assert refused > 50


@pytest.mark.parametrize(("outer_groups", "inner_groups"), list(product((1, 2, 4), (1, 2, 4))))
def test_compose_keeps_groups(outer_groups: int, inner_groups: int) -> None:
    w = Window(3)
    outer, inner = conv(4, 8, (w,), outer_groups, seed=3), conv(4, 4, (w,), inner_groups, seed=4)
    folded = compose(outer, inner)
    assert isinstance(folded, AffineConv)
    assert folded.groups == min(outer_groups, inner_groups)
    assert check_compose(outer, inner)


def test_compose_over_several_axes() -> None:
    outer = conv(2, 3, (Window(2, 2, 1), Window(3, 1, 2)), seed=1)
    inner = conv(4, 2, (Window(3, 1, 2, 2, 1), Window(1, 2, 1)), 2, seed=2)
    folded = compose(outer, inner)
    assert isinstance(folded, AffineConv)
    for h, w in product((5, 6, 9), (9, 12)):
        data = x(4, h, w)
        assert_same(run(folded, data), run(outer, run(inner, data)))
    three = conv(2, 2, (Window(2), Window(1), Window(2, 2)), seed=5)
    twice = compose(three, three)
    assert isinstance(twice, AffineConv)
    data = x(2, 4, 3, 7)
    assert_same(run(twice, data), run(three, run(three, data)))


def test_dense_layers_compose() -> None:
    a, b = conv(5, 4, (), seed=1), conv(4, 3, (), seed=2)
    folded = compose(b, a)
    assert isinstance(folded, AffineConv)
    assert_same(run(folded, x(5)), run(b, run(a, x(5))))


def check_add(one: AffineConv, other: AffineConv) -> bool:
    for_all = add([one, other])
    for size in SIZES:
        data = x(one.channels_in, size)
        first, second = run(one, data), run(other, data)
        if not (first.size and second.size):
            continue
        at_size = add([one, other], (size,))
        if isinstance(for_all, AffineConv):
            assert_same(run(for_all, data), first + second)
        if isinstance(at_size, AffineConv):
            assert_same(run(at_size, data), first + second)
        else:
            assert first.shape != second.shape or one.windows[0].stride != other.windows[0].stride
    return isinstance(for_all, AffineConv)


def test_add_folds_exactly_where_stride_and_size_agree() -> None:
    folded = 0
    for a, b in product(GRID[::2], GRID[1::3]):
        must = a.stride == b.stride and a.slack == b.slack
        assert check_add(conv(2, 2, (a,), seed=1), conv(2, 2, (b,), seed=2)) == must
        folded += must
    assert folded > 60


@pytest.mark.parametrize(("one", "other"), list(product((1, 2, 4, 8), (1, 2, 4, 8))))
def test_add_keeps_the_groups_that_both_have(one: int, other: int) -> None:
    a, b = conv(8, 8, (Window(3, 1, 1, 1, 1),), one, seed=1), conv(8, 8, (Window(),), other, seed=2)
    total = add([a, b, identity(8, 1)])
    assert isinstance(total, AffineConv)
    assert total.groups == np.gcd(one, other)
    data = x(8, 5)
    assert_same(run(total, data), run(a, data) + run(b, data) + data)


def test_dilated_and_asymmetric_taps_keep_their_places() -> None:
    parts = [
        conv(2, 2, (Window(3, 1, 2, 2, 2), Window(1)), seed=1),
        conv(2, 2, (Window(1), Window(3, 1, 1, 1, 1)), seed=2),
        conv(2, 2, (Window(5, 1, 1, 2, 2), Window(2, 1, 1, 0, 1)), seed=3),
    ]
    total = add(parts)
    assert isinstance(total, AffineConv)
    data = x(2, 6, 5)
    assert_same(run(total, data), sum(run(part, data) for part in parts))


@pytest.mark.parametrize("inner", GRID[::3])
@pytest.mark.parametrize("widths", list(product((-1, 0, 1, 2), (-1, 0, 2))))
@pytest.mark.parametrize("kind", ["zero", "bias", "other"])
def test_pad_is_exact_or_refused(inner: Window, widths: tuple[int, int], kind: str) -> None:
    a = conv(2, 2, (inner,), bias=kind != "zero", seed=2)
    value = {"zero": 0.0, "bias": a.bias, "other": a.bias + 1}[kind]
    crops_only = max(widths) <= 0
    for size in SIZES:
        data = x(2, size)
        middle = run(a, data)
        if middle.shape[1] + sum(widths) < 1 or middle.shape[1] < 1 or middle.shape[1] + min(widths) < 1:
            continue
        for folded in (pad(a, [widths], value), pad(a, [widths], value, (size,))):
            if isinstance(folded, AffineConv):
                assert_same(run(folded, data), padded(middle, [widths], value))
                assert crops_only or kind != "other"
            else:
                assert not crops_only
    if kind != "other" and inner.taps == 1 and inner.before == inner.after == 0:
        assert isinstance(pad(a, [widths], value), AffineConv)


def test_stack_and_select() -> None:
    a = conv(4, 4, (Window(3, 1, 1, 1, 1),), 2, seed=1)
    b = conv(4, 2, (Window(),), seed=2)
    both = stack([a, 3, b], 4)
    assert isinstance(both, AffineConv)
    data = x(4, 6)
    expected = np.concatenate([run(a, data), np.zeros((3, 6)), run(b, data)])
    assert_same(run(both, data), expected)
    for channels in ([8, 0, 3], [0, 1, 2, 3], [2, 2], list(range(9))):
        assert_same(run(select(both, channels), data), expected[channels])
    for channels in ([0, 1], [2, 3], [0, 2], [1, 3], [3, 0], [0, 1, 2, 3], [0, 0, 2, 2]):
        assert_same(run(select(a, channels), data), run(a, data)[channels])
    assert isinstance(stack([a, conv(4, 2, (Window(stride=2),))], 4), Refusal)


def test_groups_are_found_again() -> None:
    for groups in (1, 2, 4, 8):
        a = conv(8, 16, (Window(2),), groups, seed=groups)
        wide = regroup(a, 1)
        assert_same(run(wide, x(8, 4)), run(a, x(8, 4)))
        again = refine_groups(wide)
        assert again.groups == groups
        assert_same(again.kernel, a.kernel)


def test_scale_and_batch_norm_on_both_sides() -> None:
    a = conv(4, 6, (Window(3),), 2, seed=1)
    after, before = (scale_shift(np.arange(1.0, n + 1), np.arange(n) - 2.0, 1) for n in (6, 4))
    data = x(4, 7)
    for outer, inner in ((after, a), (a, before)):
        folded = compose(outer, inner)
        assert isinstance(folded, AffineConv)
        assert folded.groups == 2
        assert_same(run(folded, data), run(outer, run(inner, data)))
    norm = batch_norm([1.0, 2.0], [3.0, 8.0], 1.0, [4.0, 6.0], [5.0, 7.0], 1)
    image = np.array([[1.0, 3.0], [2.0, 5.0]])
    assert_same(run(norm, image), np.array([[5.0, 9.0], [7.0, 13.0]]))
    assert not batch_norm([0.0], [-1.0], 0.5).is_finite


def test_pool_dense_and_identity() -> None:
    data = x(3, 4, 6)
    pool = average_pool(3, (Window(2, 2), Window(2, 1)))
    assert_same(run(pool, 4 * data)[:, 1, 2], data[:, 2:4, 2:4].sum(axis=(1, 2)))
    assert_same(run(identity(3, 2), data), data)
    assert_same(run(dense([[1.0, 2.0, 3.0]], [4.0], 2), data)[0], data[0] + 2 * data[1] + 3 * data[2] + 4)


SAME_CASES = list(product((1, 2, 3, 5), (1, 2, 3), (1, 2), range(1, 11)))


@pytest.mark.parametrize(("taps", "stride", "dilation", "size"), SAME_CASES)
def test_same_is_tensorflows(taps: int, stride: int, dilation: int, size: int) -> None:
    window = same(taps, stride, dilation, size)
    assert (window.before, window.after) == tensorflow_same(size, taps, stride, dilation)
    assert window.output_size(size) == -(-size // stride)
    unknown = same(taps, stride, dilation, None)
    a = conv(1, 1, (unknown,))
    assert_same(run(a, x(1, size)), run(AffineConv(a.kernel, a.bias, (window,)), x(1, size)))


def test_floating_windows_fold_with_their_like_and_with_pointwise_maps() -> None:
    floating = same(3, 2, 1, None)
    assert floating.floating
    a, b = (conv(2, 2, (floating,), seed=s) for s in (1, 2))
    p = conv(2, 2, (Window(),), bias=False, seed=3)
    biased = conv(2, 2, (Window(),), seed=3)
    for folded, expected in (
        (add([a, b]), lambda d: run(a, d) + run(b, d)),
        (compose(a, p), lambda d: run(a, run(p, d))),
        (compose(biased, a), lambda d: run(biased, run(a, d))),
    ):
        assert isinstance(folded, AffineConv)
        for size in SIZES:
            assert_same(run(folded, x(2, size)), expected(x(2, size)))
    assert isinstance(add([a, conv(2, 2, (Window(1, 2),))]), Refusal)
    assert isinstance(compose(a, biased), Refusal)
    assert isinstance(compose(conv(2, 2, (Window(3),)), a), Refusal)
