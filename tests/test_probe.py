"""A black box's kernel from its impulse response."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refold
from oracle import run
from refold.algebra import AffineConv, Refusal, Window
from refold.algebra.evaluate import evaluate


def random_map(seed: int, axes: int) -> AffineConv:
    draw = np.random.default_rng(seed)
    windows = tuple(
        Window(
            int(draw.integers(1, 4)), int(draw.integers(1, 3)), int(draw.integers(1, 3)), *draw.integers(0, 2, 2)
        )
        for _ in range(axes)
    )
    windows = tuple(w if w.taps > 1 else Window(1, w.stride, 1, w.before, w.after) for w in windows)
    groups = int(draw.choice([1, 2]))
    kernel = draw.integers(1, 5, (4, 2 // groups, *(w.taps for w in windows))).astype(float)
    return AffineConv(kernel, draw.integers(-3, 4, 4).astype(float), windows, groups)


@given(st.integers(0, 10_000), st.integers(0, 3))
def test_evaluate_is_the_definition(seed: int, axes: int) -> None:
    conv = random_map(seed, axes)
    data = np.random.default_rng(seed).integers(-5, 6, (2, 2, *(9, 7, 6)[:axes])).astype(float)
    expected = np.stack([run(conv, example) for example in data])
    np.testing.assert_array_equal(evaluate(conv, data), expected)


@given(st.integers(0, 10_000), st.integers(0, 2))
def test_probe_finds_the_map_again(seed: int, axes: int) -> None:
    conv = random_map(seed, axes)
    shape = (2, *(11, 12)[:axes])
    found = refold.probe(lambda data: evaluate(conv, data), shape)
    assert isinstance(found, AffineConv), found
    data = np.random.default_rng(1).normal(size=(3, *shape))
    np.testing.assert_allclose(evaluate(found, data), evaluate(conv, data), atol=1e-12)
    assert found.groups == conv.groups
    assert [w.stride for w in found.windows] == [w.stride for w in conv.windows]


def reflect(x: Any) -> Any:
    wide = np.pad(x, ((0, 0), (0, 0), (1, 1)), mode="reflect")
    return wide[..., :-2] + wide[..., 1:-1] + wide[..., 2:]


def uncounted_average(x: Any) -> Any:
    wide = np.pad(x, ((0, 0), (0, 0), (1, 1)))
    counts = np.convolve(np.ones(x.shape[-1]), np.ones(3), "same")
    return (wide[..., :-2] + wide[..., 1:-1] + wide[..., 2:]) / counts


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (np.abs, "not affine"),
        (lambda x: np.maximum(x, 0), "not affine"),
        (lambda x: x * np.arange(7), "not the same at every position"),
        (lambda x: x + np.arange(7), "not the same at every position"),
        (reflect, "not the same at every position"),
        (uncounted_average, "not the same at every position"),
        (lambda x: x[..., ::-1], "no convolution"),
        (lambda x: x / 0.0, "not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_no_convolution_is_refused_in_words(function: Any, sentence: str) -> None:
    found = refold.probe(function, (2, 7))
    assert isinstance(found, Refusal)
    assert any(part in found.reason for part in sentence.split("|")), found


def test_a_running_sum_is_a_convolution_at_its_size() -> None:
    found = refold.probe(lambda x: np.cumsum(x, axis=-1), (2, 7))
    assert isinstance(found, AffineConv)
    assert found.windows == (Window(7, before=6),)
    assert found.groups == 2


def test_a_function_that_drops_axes_is_an_error() -> None:
    with pytest.raises(ValueError, match="must keep the axes"):
        refold.probe(lambda x: x.sum(axis=-1), (2, 7))
