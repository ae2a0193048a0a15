"""The fold of every block is the block, at every size, border included."""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import pytest

from blocks.literal import draw, evaluate, run_affine
from refold.algebra import AffineConv, Refusal
from refold.blocks import (
    BLOCKS,
    BatchNorm,
    Conv,
    Expression,
    Identity,
    Scale,
    Sum,
    acnet,
    average_pool,
    channels_out,
    convolution,
    diverse_branch,
    equivalent,
    fold,
    mobileone,
    parameters,
    repvgg,
)

NORM = BatchNorm(epsilon=0.07)  # large enough that forgetting it shows


def check(expression: Expression, channels_in: int, axes: int, sizes: list[tuple[int, ...]], seed: int = 0) -> None:
    drawn = draw(parameters(expression, channels_in, axes), seed)
    folded = fold(expression, drawn, channels_in, axes)
    assert isinstance(folded, AffineConv), folded
    rng = np.random.default_rng(seed + 1)
    for size in sizes:
        x = rng.normal(size=(channels_in, *size))
        expected = evaluate(expression, drawn, x)
        np.testing.assert_allclose(run_affine(folded, x), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 5])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (3, 1), (1, 2), (1, 3), (2, 2)])
def test_a_block_on_a_line_folds_at_every_size(block, kernel_size, stride, dilation):
    for groups, (channels, filters) in product([1, 2], [(4, 4), (2, 6)]):
        options = {"average": False} if block is diverse_branch and dilation > 1 else {}
        expression = block(channels, filters, kernel_size, stride, dilation, groups, norm=NORM, axes=1, **options)
        check(expression, channels, 1, [(n,) for n in range(1, 10)])


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
def test_a_block_on_a_plane_folds_at_every_size(block, groups, stride):
    expression = block(4, 4, (3, 5), stride, 1, groups, norm=NORM)
    check(expression, 4, 2, [(n, 10 - n) for n in range(1, 10)])


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_in_space_folds(block, stride):
    check(block(2, 2, 3, stride, norm=NORM, axes=3), 2, 3, [(1, 2, 3), (4, 3, 5)])


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, (3, 2))])
def test_a_block_ships_the_convolution_that_was_asked_for(block, stride, dilation):
    """No more taps than that, and centered: ``ceil(size / stride)`` outputs."""
    options = {"average": False} if block is diverse_branch and dilation != 1 else {}
    form = equivalent(block(4, 8, (3, 5), stride, dilation, groups=2, **options), 4)
    assert form == convolution(8, (3, 5), stride, dilation, groups=2, bias=True)


def test_the_branches_of_repvgg():
    def count(**options):
        return len(repvgg(4, 4, **options).terms)

    assert count() == 3
    assert count(identity=False) == 2
    assert count(stride=2) == 2
    assert count(stride=(1, 2)) == 2
    assert len(repvgg(4, 8).terms) == 2
    assert repvgg(4, 4, alpha=True).terms[1] == Scale() * (convolution(4, 1) | BatchNorm())


@pytest.mark.parametrize("alpha", [-0.7, 0.0, 1.0, 3.0])
def test_the_alpha_of_repvgg_is_a_number_like_any_other(alpha):
    expression = repvgg(3, 3, alpha=True, norm=NORM)
    drawn = draw(parameters(expression, 3))
    drawn["branch1/scale/factor"] = np.asarray(alpha)
    without = Sum(expression.terms[0], expression.terms[2])
    renamed = {name.replace("branch2", "branch1"): v for name, v in drawn.items() if "branch1" not in name}
    x = np.random.default_rng(0).normal(size=(3, 5, 4))
    whole, rest = fold(expression, drawn, 3), fold(without, renamed, 3)
    assert isinstance(whole, AffineConv)
    assert isinstance(rest, AffineConv)
    if alpha == 0.0:
        np.testing.assert_array_equal(whole.kernel, rest.kernel)
        np.testing.assert_array_equal(whole.bias, rest.bias)
    np.testing.assert_allclose(run_affine(whole, x), evaluate(expression, drawn, x), atol=1e-12)


def test_the_branches_of_mobileone():
    assert len(mobileone(4, 4, branches=3).terms) == 5
    assert len(mobileone(4, 4, 1, branches=3).terms) == 4
    assert len(mobileone(4, 6, stride=2, branches=1).terms) == 2
    with pytest.raises(ValueError, match="at least one branch"):
        mobileone(4, 4, branches=0)


def test_acnet_has_one_strip_per_axis():
    taps = [tuple(w.taps for w in term.parts[0].windows) for term in acnet(2, 2, (3, 5)).terms]
    assert taps == [(3, 5), (3, 1), (1, 5)]


def test_a_diverse_branch_block_cannot_average_dilated():
    with pytest.raises(ValueError, match="average=False"):
        diverse_branch(4, 4, dilation=2)
    check(diverse_branch(4, 4, dilation=(2, 1), average=False, hidden=6, norm=NORM), 4, 2, [(3, 4), (7, 6)])


# ---- blocks nobody has written before ----------------------------------------------------------------

conv = partial(convolution, 4)

NEW_BLOCKS = {
    "design example": Sum(conv(3) | NORM, Scale() * (conv(1) | NORM), Identity() | NORM),
    "dilated and asymmetric": Sum(conv((3, 5), dilation=(2, 1)), conv((1, 3)) | NORM) | NORM,
    "difference (RepMixer)": Identity()
    + Scale(per_channel=True) * ((conv(3, groups=4) | NORM) - (Identity() | NORM)),
    "average pools": Sum(average_pool(3), average_pool((1, 5)) | NORM, 0.5 * Identity()),
    "sums in sums": Sum(Sum(conv(3), Identity()) | NORM, Sum(Identity() | Scale(-2.0))) | conv(1, bias=True),
    "linear expansion": conv(1) | convolution(9, 3) | NORM | conv(1, bias=True) | NORM,
    "a lone norm": NORM,
    "a lone identity": Identity(),
    "an even kernel": Sum(conv(2) | NORM, conv(4, bias=True), conv(3)),
    "strided pool beside strided convolutions": Sum(
        conv(3, 2), average_pool(2, 2, ((0, 1), (0, 1))) | conv(1), conv(1, 2)
    ),
}


@pytest.mark.parametrize("name", NEW_BLOCKS)
def test_a_new_block_folds_from_its_expression(name):
    check(NEW_BLOCKS[name], 4, 2, [(n, m) for n in (1, 2, 5) for m in (1, 4, 7)])


@pytest.mark.parametrize("name", NEW_BLOCKS)
def test_the_form_of_the_fold_needs_no_parameters(name):
    expression = NEW_BLOCKS[name]
    form = equivalent(expression, 4)
    folded = fold(expression, draw(parameters(expression, 4)), 4)
    assert isinstance(folded, AffineConv)
    assert form == convolution_like(folded)
    assert channels_out(expression, 4) == folded.channels_out


def convolution_like(folded: AffineConv) -> Conv:
    return Conv(folded.channels_out, folded.windows, folded.groups, bias=True)


REFUSED = {
    "norm before zero padding": (conv(1) | NORM | conv(3), "zero padding after a bias"),
    "bias before zero padding": (conv(1, bias=True) | conv(3), "zero padding after a bias"),
    "norm before a padded pool": (NORM | average_pool(3), "zero padding after a bias"),
    "different strides": (Sum(conv(3, 2), conv(3, 1)), "different strides"),
    "different sizes": (Sum(conv(3), conv(3, padding=((0, 0), (0, 0)))), "different sizes"),
    "padding after a kernel": (conv(3) | conv(3), "not a convolution at the border"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused(name):
    expression, reason = REFUSED[name]
    for answer in (fold(expression, draw(parameters(expression, 4)), 4), equivalent(expression, 4)):
        assert isinstance(answer, Refusal)
        assert reason in answer.reason


def test_the_form_is_refused_where_only_a_zero_shift_would_fold():
    expression = conv(1) | NORM | conv(3)
    drawn = draw(parameters(expression, 4))
    drawn["batch_norm/mean"], drawn["batch_norm/beta"] = np.zeros(4), np.zeros(4)
    assert isinstance(fold(expression, drawn, 4), AffineConv)
    assert isinstance(equivalent(expression, 4), Refusal)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_fold_that_is_not_finite_is_refused(bad):
    expression = repvgg(3, 3, alpha=True)
    drawn = draw(parameters(expression, 3))
    drawn["branch1/scale/factor"] = np.asarray(bad)
    answer = fold(expression, drawn, 3)
    assert isinstance(answer, Refusal)
    assert "finite" in answer.reason


def test_a_negative_variance_is_refused():
    expression = conv(3) | NORM
    drawn = draw(parameters(expression, 3))
    drawn["batch_norm/variance"] = np.full(4, -1.0)
    assert isinstance(fold(expression, drawn, 3), Refusal)


def test_narrow_parameters_are_taken_as_they_are():
    expression = repvgg(3, 3, norm=NORM)
    narrow = {name: v.astype(np.float16) for name, v in draw(parameters(expression, 3)).items()}
    wide = {name: v.astype(np.float64) for name, v in narrow.items()}
    first, second = fold(expression, narrow, 3), fold(expression, wide, 3)
    assert isinstance(first, AffineConv)
    assert isinstance(second, AffineConv)
    np.testing.assert_array_equal(first.kernel, second.kernel)
    assert first.kernel.dtype == np.float64


def test_parameters_that_do_not_fit_are_named():
    expression = conv(3) | NORM
    drawn = draw(parameters(expression, 3))
    mean = drawn.pop("batch_norm/mean")
    with pytest.raises(ValueError, match="batch_norm/mean is missing"):
        fold(expression, drawn, 3)
    with pytest.raises(ValueError, match="extra is not a parameter"):
        fold(expression, drawn | {"batch_norm/mean": mean, "extra": mean}, 3)
    with pytest.raises(ValueError, match=r"batch_norm/mean has the shape \(2,\), not \(4,\)"):
        fold(expression, drawn | {"batch_norm/mean": mean[:2]}, 3)
