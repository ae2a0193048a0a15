"""What people do to layers with computed weights, and what becomes of them without a word elsewhere."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn

import refold
from refold.paddle import low_rank_adaptation, orthogonal_weights, spectral_normalization, weight_normalization
from refold.weights import METHODS

WAYS: dict[str, Callable[[Any], Any]] = {
    "unit": weight_normalization,
    "layer": partial(weight_normalization, normalizer="layer"),
    "spectral": spectral_normalization,
    "sigma": partial(spectral_normalization, gain=True),
    "cayley": orthogonal_weights,
    "exponential": partial(orthogonal_weights, map="exponential"),
    "lora": partial(low_rank_adaptation, rank=2),
    "dora": partial(low_rank_adaptation, rank=2, magnitude=True),
}


def data(*shape: int, seed: int = 0) -> Any:
    return paddle.to_tensor(np.random.default_rng(seed).normal(size=shape).astype("float32"))


def train(layer: Any, x: Any, steps: int = 2) -> None:
    layer.train()
    optimizer = paddle.optimizer.SGD(0.05, parameters=layer.parameters())
    for _ in range(steps):
        layer(x).square().mean().backward()
        optimizer.step()
        optimizer.clear_grad()
    layer.eval()


@pytest.mark.parametrize("way", WAYS)
def test_copies_and_pickles_are_apart_and_still_computed(way: str) -> None:
    model, x = nn.Sequential(WAYS[way](nn.Linear(5, 3)), nn.Tanh()), data(4, 5)
    train(model, x)
    wanted = model(x).numpy()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(again(x).numpy(), wanted)
        train(again, x)
        assert not np.array_equal(again(x).numpy(), wanted)
        assert set(again.state_dict()) == set(model.state_dict())
        plain = refold.fold(again, x)
        np.testing.assert_allclose(plain(x).numpy(), again(x).numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(plain))(x).numpy(), plain(x).numpy())
    np.testing.assert_array_equal(model(x).numpy(), wanted)


@pytest.mark.parametrize("way", WAYS)
def test_averages_of_what_is_stored_fold(way: str) -> None:
    model, x = nn.Sequential(WAYS[way](nn.Linear(5, 3)), nn.Tanh()), data(4, 5)
    average, states = copy.deepcopy(model), []
    for _ in range(2):
        train(model, x)
        states.append({name: value.numpy().copy() for name, value in model.state_dict().items()})
    average.set_state_dict({name: (states[0][name] + states[1][name]) / 2 for name in states[0]})
    average.eval()
    plain = refold.fold(average, x)
    np.testing.assert_allclose(plain(x).numpy(), average(x).numpy(), rtol=1e-5, atol=1e-6)
    assert not np.array_equal(average(x).numpy(), model(x).numpy())


@pytest.mark.parametrize("way", ["unit", "sigma", "lora"])
def test_what_was_folded_is_quantized(way: str) -> None:
    from paddle.quantization import PTQ, QuantConfig
    from paddle.quantization.observers import AbsmaxObserver

    model, x = nn.Sequential(WAYS[way](nn.Linear(16, 8)), nn.ReLU()), data(4, 16)
    train(model, x)
    plain = refold.fold(model, x)
    quantizer = PTQ(QuantConfig(activation=AbsmaxObserver(), weight=AbsmaxObserver()))
    observed = quantizer.quantize(plain)
    observed(x)
    given, wanted = quantizer.convert(observed)(x).numpy(), model(x).numpy()
    assert not np.array_equal(given, wanted)
    np.testing.assert_allclose(given, wanted, atol=0.05 * np.abs(wanted).max())


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_zeros_and_huge_ones_are_finite(way: str) -> None:
    for size in (0.0, 1e-30, 1e30):
        layer = nn.Linear(5, 3, bias_attr=False)
        layer.weight.set_value(layer.weight * paddle.to_tensor([1.0, size, 1.0]))
        layer = WAYS[way](layer)
        layer(data(4, 5)).sum().backward()
        assert np.isfinite(layer.weight.numpy()).all()
        found = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
        assert found
        assert all(np.isfinite(gradient.numpy()).all() for gradient in found)


@pytest.mark.parametrize("name", METHODS)
def test_one_weight_per_unit(name: str) -> None:
    """A depthwise convolution of one tap: timm's raises there, and an unbiased deviation divides by zero."""
    layer, x = nn.Conv2D(3, 3, 1, groups=3), data(2, 3, 4, 4)
    before = layer(x).numpy()
    weight_normalization(layer, normalizer=name)
    np.testing.assert_allclose(layer(x).numpy(), before, rtol=1e-5, atol=1e-6)
    layer(x).sum().backward()
    assert all(np.isfinite(parameter.grad.numpy()).all() for parameter in layer.parameters())
