"""A block starts at any convolution that it can stand in for, and says in words where it can't."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocks.literal import evaluate, run_affine
from refold.algebra import AffineConv, Refusal, Window, convolution, dense
from refold.blocks import (
    BLOCKS,
    AveragePool,
    BatchNorm,
    Conv,
    Expression,
    Identity,
    Scale,
    Sum,
    diverse_branch,
    mobileone,
    repvgg,
)
from refold.blocks.unfold import Moments, Unfolded, at_statistics, leaves_of, stand_in, unfold

NORM = BatchNorm(epsilon=0.07)


def in_float32(array):
    return np.asarray(array, dtype=np.float32).astype(np.float64)


def target(channels, filters, taps, stride, dilation, groups, bias, seed):
    rng = np.random.default_rng(seed)
    spread = dilation if taps > 1 else 1
    before = spread * (taps - 1) // 2
    window = Window(taps, stride, spread, before, spread * (taps - 1) - before)
    kernel = in_float32(rng.normal(size=(filters, channels // groups, taps, taps)) * 0.1)
    return convolution(kernel, in_float32(rng.normal(size=filters)) if bias else None, (window,) * 2, groups)


def assert_is(unfolded: Unfolded, conv: AffineConv, rounding: float) -> None:
    """The expression with its numbers is the convolution, by literal loops."""
    x = np.random.default_rng(0).normal(size=(conv.channels_in, 5, 6))
    found, expected = evaluate(unfolded.expression, dict(unfolded.numbers), x), run_affine(conv, x)
    largest = max(float(np.max(np.abs(numbers))) for numbers in unfolded.numbers.values())
    np.testing.assert_allclose(found, expected, rtol=0, atol=rounding * max(largest, np.abs(expected).max()))


def offset(unfolded: Unfolded, path: str) -> np.ndarray:
    """What a batch norm gives for 0."""
    gamma, beta, mean, variance = (
        unfolded.numbers[f"{path}/{word}"] for word in ("gamma", "beta", "mean", "variance")
    )
    return beta - gamma * mean / np.sqrt(variance + NORM.epsilon)


@given(
    block=st.sampled_from(BLOCKS),
    groups=st.sampled_from([1, 2, 4]),
    filters=st.sampled_from([4, 8]),
    taps=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_every_block_starts_at_every_convolution(block, groups, filters, taps, stride, dilation, bias, seed):
    dilation = 1 if taps == 2 else dilation  # two taps apart from each other, and one in between, are three
    conv = target(4, filters, taps, stride, dilation, groups, bias, seed)
    if block is diverse_branch:
        block = partial(diverse_branch, average=dilation == 1)
    expression = stand_in(block, conv, NORM)
    assert not isinstance(expression, Refusal), expression.reason
    exact = unfold(expression, conv, seed=seed)
    assert isinstance(exact, Unfolded)
    assert_is(exact, conv, 1e-13)
    rounded = unfold(expression, conv, seed=seed, rounding=in_float32)
    assert isinstance(rounded, Unfolded)
    assert all(np.array_equal(in_float32(numbers), numbers) for numbers in rounded.numbers.values())
    assert_is(rounded, conv, 2e-6)
    rng = np.random.default_rng(seed)
    statistics = {
        path: (rng.normal(size=4 if len(numbers) == 4 else filters), rng.uniform(0, 9, size=len(numbers)))
        for path, leaf in leaves_of(expression).items()
        if isinstance(leaf, BatchNorm) and (numbers := exact.numbers[f"{path}/mean"]) is not None
    }
    moved = at_statistics(exact, statistics)
    assert isinstance(moved, Unfolded)
    for path, (mean, variance) in statistics.items():
        assert np.array_equal(moved.numbers[f"{path}/mean"], mean)
        assert np.array_equal(moved.numbers[f"{path}/variance"], variance)
        if not path.startswith("branch0"):  # that one gets what is missing
            np.testing.assert_allclose(offset(moved, path), offset(exact, path), rtol=0, atol=1e-13)
    assert_is(moved, conv, 1e-12)


def test_no_branch_starts_dead_and_equal_branches_start_apart():
    conv = target(4, 4, 3, 1, 1, 1, True, seed=1)
    expression = stand_in(mobileone, conv, NORM)
    assert not isinstance(expression, Refusal)
    started = unfold(expression, conv)
    assert isinstance(started, Unfolded)
    assert all(
        np.all(numbers != 0) for name, numbers in started.numbers.items() if name.endswith(("kernel", "gamma"))
    )
    kernels = [numbers for name, numbers in started.numbers.items() if name.endswith("conv/kernel")]
    assert len({kernel.tobytes() for kernel in kernels}) == len(kernels)
    other = unfold(expression, conv, seed=1)
    assert isinstance(other, Unfolded)
    assert not np.array_equal(other.numbers["branch1/conv/kernel"], started.numbers["branch1/conv/kernel"])


WIDE, POINT = (Window(3, 1, 1, 1, 1),) * 2, (Window(),) * 2


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (lambda *sizes, **settings: None, "the block leaves it"),
        (lambda c, f, k, s, d, g, **_: Sum(Conv(f, POINT) | NORM, Identity()), "it reads 3 positions"),
        (lambda c, f, k, s, d, g, **_: Conv(f, WIDE, groups=2), "other channels or groups"),
        (lambda c, f, k, s, d, g, **_: Conv(f + 4, WIDE), "other channels or groups"),
        (lambda c, f, k, s, d, g, **_: Conv(3, WIDE, groups=2), "the block does not fit it: 3 filters"),
        (lambda c, f, k, s, d, g, **_: Conv(f, POINT, bias=True) | Conv(f, WIDE), "zero padding after a bias"),
    ],
)
def test_a_block_that_cannot_stand_in_is_refused_in_words(block, words):
    found = stand_in(block, target(4, 4, 3, 1, 1, 1, True, seed=0), NORM)
    assert isinstance(found, Refusal)
    assert words in found.reason


def test_other_positions_are_refused_in_words():
    kernel = np.ones((2, 2, 3))
    for conv, words in (
        (dense(np.ones((2, 2)), None, 0), "no spatial axes"),
        (convolution(kernel, None, (Window(3),)), "it reads 3 positions with a padding of (0, 0), and the block"),
        (convolution(kernel, None, (Window(3, 1, 1, 2, 2, spread=2),)), "transposed, or padded by its size"),
        (convolution(kernel, None, (Window(3, floating=True),)), "transposed, or padded by its size"),
    ):
        found = stand_in(repvgg, conv, NORM)
        assert isinstance(found, Refusal)
        assert words in found.reason


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        (Conv(4, WIDE), "has a bias, and the main branch of the block has no place"),
        (Sum(Conv(4, WIDE) | AveragePool(POINT) | NORM), "no branch of the block has the kernel"),
        (Sum(0.0 * Conv(4, WIDE), Conv(4, POINT) | NORM), "no branch of the block has the kernel"),
    ],
)
def test_a_block_without_room_for_the_convolution_is_refused(expression: Expression, words: str):
    found = unfold(expression, target(4, 4, 3, 1, 1, 1, True, seed=0))
    assert isinstance(found, Refusal)
    assert words in found.reason


def test_a_convolution_without_numbers_still_gets_live_branches():
    conv = convolution(np.zeros((4, 4, 3, 3)), None, WIDE)
    started = unfold(Sum(Conv(4, WIDE) | NORM, Scale() * (Conv(4, POINT) | NORM)), conv)
    assert isinstance(started, Unfolded)
    assert_is(started, conv, 1e-13)
    assert float(started.numbers["branch1/scale/factor"]) != 0.0


def test_moments_are_those_of_all_numbers_together():
    rng = np.random.default_rng(0)
    chunks = [rng.normal(loc=1e6, size=(3, n, 2)) for n in (1, 4, 2)]
    moments = Moments()
    for chunk in [*chunks, np.zeros((3, 0, 2))]:
        moments.add(chunk)
    together = np.concatenate([chunk.reshape(3, -1) for chunk in chunks], axis=1)
    np.testing.assert_allclose(moments.statistics[0], together.mean(axis=1), rtol=1e-15)
    np.testing.assert_allclose(moments.statistics[1], together.var(axis=1), rtol=1e-9)
