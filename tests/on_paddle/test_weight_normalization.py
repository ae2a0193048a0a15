"""Weight normalization in Paddle: it changes nothing, both parts train, and it folds away."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn
from test_fold import operators
from zoo import Body, randomize

import refold
from refold.paddle import weight_normalization

LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(5, 3), (4, 5), 3),
    "conv1d": (lambda: nn.Conv1D(3, 4, 3), (2, 3, 7), 4),
    "conv2d": (lambda: nn.Conv2D(4, 6, 3, groups=2), (2, 4, 6, 6), 6),
    "conv3d": (lambda: nn.Conv3D(2, 3, 2), (2, 2, 4, 4, 4), 3),
    "transposed": (lambda: nn.Conv2DTranspose(3, 4, 3), (2, 3, 5, 5), 4),
}


def data(*shape: int) -> Any:
    return paddle.to_tensor(np.random.default_rng(0).normal(size=shape).astype("float32"))


@pytest.mark.parametrize("normalizer", ["unit", "layer", "rms"])
@pytest.mark.parametrize("name", LAYERS)
def test_wrapping_changes_nothing_and_folding_bakes(name: str, normalizer: str) -> None:
    build, shape, units = LAYERS[name]
    layer, x = randomize(build()), data(*shape)
    before = layer(x).numpy()
    assert weight_normalization(layer, normalizer=normalizer) is layer
    np.testing.assert_allclose(layer(x).numpy(), before, rtol=2e-6, atol=2e-6)
    assert layer.weight_g.shape == [units]
    assert "weight" not in layer.state_dict()
    layer(x).square().sum().backward()
    trained = {key: float(p.grad.abs().max()) for key, p in layer.named_parameters()}
    assert set(trained) >= {"weight_v", "weight_g", "bias"}
    assert all(size > 0 for size in trained.values())

    layer.weight_g.set_value(layer.weight_g * 1.5 - 0.1)
    model = nn.Sequential(layer, nn.ReLU())
    model.eval()
    plan, plain = refold.inspect(model, x), refold.fold(model, x)
    assert plan.evaluated == ("0",)
    assert sorted(plain.state_dict()) == ["0.bias", "0.weight"]
    assert type(getattr(plain, "0")) is type(layer)
    assert operators(plain, x) == 2
    np.testing.assert_allclose(plain(x).numpy(), model(x).numpy(), rtol=1e-5, atol=1e-6)
    assert refold.prove(model, plain, x).verdict.value == "proved"
    assert not refold.inspect(plain, x).changes_something


@pytest.mark.parametrize("size", [1e-20, 1e-6, 1e20])
@pytest.mark.parametrize("normalizer", ["unit", "layer", "rms"])
def test_weights_of_any_size_stay_what_they_are(size: float, normalizer: str) -> None:
    layer = randomize(nn.Linear(5, 3))
    layer.weight.set_value(layer.weight * size)
    before = layer.weight.numpy()
    # The epsilon of weight standardization counts in the units of the weight.
    weight_normalization(layer, normalizer=normalizer, epsilon=0.0)
    np.testing.assert_allclose(layer.weight.numpy(), before, rtol=2e-6, atol=2e-6 * float(np.abs(before).max()))


def test_a_row_of_zeros_stays_zero_and_passes_no_nan() -> None:
    layer = randomize(nn.Linear(5, 3))
    layer.weight.set_value(layer.weight * paddle.to_tensor([1.0, 0.0, 1.0]))
    weight_normalization(layer)
    layer(data(4, 5)).sum().backward()
    assert np.isfinite(layer.weight_v.grad.numpy()).all()
    assert not layer.weight.numpy()[:, 1].any()


def test_norms_are_per_output_unit() -> None:
    layer = weight_normalization(randomize(nn.Linear(5, 3)))
    np.testing.assert_allclose(layer.weight_g.numpy(), np.linalg.norm(layer.weight_v.numpy(), axis=0), rtol=1e-6)
    grouped = randomize(nn.Conv2DTranspose(4, 4, 3, groups=2))
    stored = grouped.weight.numpy().reshape(2, 2, 2, 3, 3)
    assert weight_normalization(grouped).weight_g.shape == [4]
    norms = np.sqrt((stored**2).sum(axis=(1, 3, 4))).reshape(-1)
    np.testing.assert_allclose(grouped.weight_g.numpy(), norms, rtol=1e-6)
    assert weight_normalization(randomize(nn.Conv2DTranspose(4, 4, 3)), axis=(0, 1)).weight_g.shape == [16]
    table = weight_normalization(randomize(nn.Embedding(7, 4)))
    assert table.weight_g.shape == [7]


def test_frozen_stays_frozen_and_training_moves_both() -> None:
    layer = randomize(nn.Linear(5, 3))
    layer.weight.stop_gradient = True
    weight_normalization(layer)
    assert layer.weight_v.stop_gradient
    assert layer.weight_g.stop_gradient

    layer, x = weight_normalization(randomize(nn.Linear(5, 3))), data(8, 5)
    optimizer = paddle.optimizer.SGD(0.1, parameters=layer.parameters())
    start = {name: p.numpy().copy() for name, p in layer.named_parameters()}
    for _ in range(3):
        layer(x).square().mean().backward()
        optimizer.step()
        optimizer.clear_grad()
    for name, parameter in layer.named_parameters():
        assert not np.allclose(parameter.numpy(), start[name]), name


def test_state_dicts_copies_and_other_types() -> None:
    layer, x = weight_normalization(randomize(nn.Linear(5, 3)), normalizer="layer"), data(4, 5)
    other = weight_normalization(randomize(nn.Linear(5, 3), 3), normalizer="layer")
    other.set_state_dict(layer.state_dict())
    np.testing.assert_array_equal(other(x).numpy(), layer(x).numpy())
    np.testing.assert_array_equal(copy.deepcopy(layer)(x).numpy(), layer(x).numpy())
    double = randomize(nn.Linear(5, 3))
    double.to(dtype="float64")
    assert weight_normalization(double).weight_g.dtype == paddle.float64
    assert double(x.astype("float64")).dtype == paddle.float64


def test_other_misuse_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"has no parameter 'kernel' of its own \(it has: weight, bias\)"):
        weight_normalization(nn.Linear(5, 3), "kernel")
    with pytest.raises(ValueError, match="is normalized already"):
        weight_normalization(weight_normalization(nn.Linear(5, 3)))
    with pytest.raises(ValueError, match="is normalized already"):
        weight_normalization(nn.utils.weight_norm(nn.Linear(5, 3)))
    with pytest.raises(ValueError, match="nothing tells which axes"):
        weight_normalization(nn.LayerNorm(4))
    with pytest.raises(ValueError, match="there is no weight normalization named"):
        weight_normalization(nn.Linear(5, 3), normalizer="batch")


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("name", LAYERS)
def test_paddles_own_norms_bake(name: str, wrap: Callable[[Any], Any]) -> None:
    build, shape, _ = LAYERS[name]
    layer, x = wrap(build()), data(*shape)
    model = nn.Sequential(layer, nn.ReLU())
    model(x)
    model.eval()
    assert refold.inspect(model, x).evaluated == ("0",)
    plain = refold.fold(model, x)
    assert sorted(plain.state_dict()) == ["0.bias", "0.weight"]
    assert type(getattr(plain, "0")) is type(layer)
    np.testing.assert_allclose(plain(x).numpy(), model(x).numpy(), rtol=1e-5, atol=1e-6)
    assert refold.prove(model, plain, x).verdict.value == "proved"


def test_sixteen_bits_bake_to_the_numbers_that_they_are() -> None:
    table = randomize(nn.Embedding(7, 4))
    table.to(dtype="bfloat16")
    weight_normalization(table)
    model = Body(lambda m, x: m.table(x).astype("float32"), table=table)
    model.eval()
    tokens = paddle.to_tensor([[1, 2, 6]])
    plain = refold.fold(model, tokens)
    assert plain.state_dict()["table.weight"].dtype == paddle.bfloat16
    np.testing.assert_array_equal(plain(tokens).numpy(), model(tokens).numpy())
