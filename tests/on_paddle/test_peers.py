"""What others' suites hold of their weights, held of ours: Paddle (``test_dygraph_weight_norm``,
``test_dygraph_spectral_norm``), torch (``test_parametrization``), TensorFlow Addons (``wrappers_test``), Keras
(``spectral_normalization_test``), flax (``linen_test``) and equinox (``test_nn``)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn

import refold
from refold.paddle import initialize_from_data, orthogonal_weights, spectral_normalization, weight_normalization


def data(*shape: int, seed: int = 0) -> Any:
    return paddle.to_tensor(np.random.default_rng(seed).normal(size=shape).astype("float32"))


def close(a: Any, b: Any, tolerance: float = 2e-6) -> None:
    a, b = (x.numpy() if isinstance(x, paddle.Tensor) else x for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def literal_norm(weight: Any, axes: tuple[int, ...]) -> Any:
    """Norms over all axes but ``axes``, in the shape of the weight, by nothing but numpy."""
    others = tuple(axis for axis in range(weight.ndim) if axis not in {a % weight.ndim for a in axes})
    return np.sqrt(np.square(weight.astype("float64")).sum(axis=others, keepdims=True))


def fixed(layer: Any, weight: Any) -> Any:
    layer.weight.set_value(np.asarray(weight, "float32"))
    return layer


def folded(layer: Any, x: Any) -> Any:
    """The plain layer that a fold makes of it."""
    model = nn.Sequential(layer)
    model.eval()
    return getattr(refold.fold(model, x), "0")


# ---- Paddle ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [(), 0, 1, 3, -3], ids=str)
def test_gain_and_direction_along_any_axis_and_the_way_back(axis: Any) -> None:
    """Theirs takes None and -1 for the whole weight; here -1 is the last axis."""
    layer, x = nn.Conv2D(2, 3, 3), data(3, 2, 3, 3)
    before = layer.weight.numpy().copy()
    out = layer(x)
    weight_normalization(layer, axis=axis)
    gains = literal_norm(before, axis if isinstance(axis, tuple) else (axis,)).reshape(-1)
    close(layer.weight_g, gains)
    np.testing.assert_array_equal(layer.weight_v.numpy(), before)
    close(layer(x), out)
    plain = folded(layer, x)
    close(plain.weight, before)
    assert set(plain.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize(("axis", "steps", "epsilon"), [(0, 1, 1e-12), (0, 2, 1e-12), (1, 1, 1e-12), (0, 1, 1e-3)])
def test_steps_of_power_iteration_by_hand(axis: int, steps: int, epsilon: float) -> None:
    layer = nn.Conv2D(2, 3, 3)
    spectral_normalization(layer, power_iterations=steps, epsilon=epsilon, axis=axis)
    layer.weight_v.set_value(data(3, 2, 3, 3))
    weight = layer.weight_v.numpy().astype("float64")
    matrix = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    u = layer.weight_left.numpy().reshape(-1).astype("float64")
    for _ in range(steps):
        v = matrix.T @ u
        v /= np.linalg.norm(v)
        u = matrix @ v
        u /= np.linalg.norm(u)
    layer(data(3, 2, 4, 4))
    close(layer.weight, weight / (u @ matrix @ v + epsilon), 2e-5)


# ---- torch: weight normalization ---------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "units"), [(None, 5), (1, 5), (0, 4), (-1, 5), ((), 1)])
def test_wrapped_and_folded_the_output_is_the_same(axis: Any, units: int) -> None:
    layer, x = nn.Linear(4, 5), data(3, 4)
    before = layer(x)
    weight_normalization(layer, axis=axis)
    close(layer(x), before)
    assert layer.weight_v.shape == [4, 5]
    assert layer.weight_g.shape == [units]
    close(folded(layer, x)(x), before)


def test_states_of_theirs_are_taken() -> None:
    x = data(3, 4)
    theirs = nn.utils.weight_norm(nn.Linear(4, 5), dim=1)
    theirs.weight_g.set_value(theirs.weight_g * 1.5)
    ours = weight_normalization(nn.Linear(4, 5))
    ours.set_state_dict(theirs.state_dict())
    close(ours(x), theirs(x))
    close(copy.deepcopy(ours)(x), theirs(x))


# ---- torch: spectral normalization -------------------------------------------------------------------


def test_vectors_are_buffers_and_the_weight_is_none_of_the_layers() -> None:
    layer = spectral_normalization(nn.Linear(5, 7))
    assert (layer.weight_left.size, layer.weight_right.size) == (7, 5)
    assert set(layer._buffers) == {"weight_left", "weight_right"}
    assert set(layer._parameters) == {"weight_v", "bias"}
    assert set(layer.state_dict()) == {"weight_v", "weight_left", "weight_right", "bias"}
    with pytest.raises(ValueError, match="is normalized already"):
        spectral_normalization(layer)
    assert spectral_normalization(nn.Conv2DTranspose(3, 4, (5, 6))).weight_left.size == 4


@pytest.mark.parametrize("trains", [True, False])
def test_in_training_and_inference(trains: bool) -> None:
    layer, x = nn.Linear(3, 4), data(2, 3)
    layer.weight.stop_gradient = not trains
    spectral_normalization(layer).train()
    before = layer.weight_left.numpy().copy()
    optimizer = paddle.optimizer.SGD(0.1, parameters=layer.parameters())
    layer(x).sum().backward()
    optimizer.step()
    last = layer(x)
    assert np.array_equal(layer.weight_left.numpy(), before) is not trains
    vectors = [layer.weight_left.numpy().copy(), layer.weight_right.numpy().copy()]
    layer.eval()
    for _ in range(2):
        close(layer(x), last)
    np.testing.assert_array_equal(layer.weight_left.numpy(), vectors[0])
    np.testing.assert_array_equal(layer.weight_right.numpy(), vectors[1])
    close(folded(layer, x)(x), layer(x))


def test_gradients_of_calls_in_both_modes_are_those_of_differences() -> None:
    layer, x = nn.Linear(3, 4, bias_attr=False), data(2, 3).astype("float64")
    layer.to(dtype="float64")
    spectral_normalization(layer)
    layer.weight_v.set_value(data(3, 4).astype("float64"))
    left, right = layer.weight_left.clone(), layer.weight_right.clone()

    def several(x: Any) -> Any:
        layer.weight_left.set_value(left)
        layer.weight_right.set_value(right)
        out = paddle.zeros([], "float64")
        for mode in (True, False, True, False):
            layer.train() if mode else layer.eval()
            out = out + (layer(x) * data(2, 4, seed=1).astype("float64")).sum()
        return out

    x.stop_gradient = False
    several(x).backward()
    for place in np.ndindex(2, 3):
        step = np.zeros((2, 3))
        step[place] = 1e-6
        with paddle.no_grad():
            high, low = (float(several(x + paddle.to_tensor(sign * step))) for sign in (1, -1))
        assert abs(x.grad.numpy()[place] - (high - low) / 2e-6) < 1e-6


@pytest.mark.parametrize("calls", [0, 3])
def test_loading_goes_on_where_it_was(calls: int) -> None:
    layer, x = spectral_normalization(nn.Linear(3, 5)), data(2, 3)
    for _ in range(calls):
        layer(x)
    state = {name: value.numpy().copy() for name, value in layer.state_dict().items()}
    outs = []
    for _ in range(2):
        layer = spectral_normalization(nn.Linear(3, 5))
        missing, unexpected = layer.set_state_dict(state)
        assert not [*missing, *unexpected]
        own = []
        for mode in (False, True, True, False):
            layer.train() if mode else layer.eval()
            own.append(layer(x).numpy())
        outs.append(own)
    for a, b in zip(*outs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_diagonal_is_divided_by_its_largest() -> None:
    layer = spectral_normalization(fixed(nn.Linear(2, 2), np.diag([0.5, -2.0])))
    close(layer.weight, np.diag([0.25, -1.0]))
    close(spectral_normalization(fixed(nn.Linear(4, 4), 4 * np.eye(4))).weight, np.eye(4))  # flax


# ---- torch: orthogonal weights -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5)])
@pytest.mark.parametrize("map", ["cayley", "exponential"])
def test_orthogonal_from_the_first_and_after_what_is_assigned(map: str, shape: tuple[int, int]) -> None:
    def is_orthogonal(layer: Any) -> None:
        weight = layer.weight.numpy()
        tall = weight if shape[0] >= shape[1] else weight.T
        np.testing.assert_allclose(tall.T @ tall, np.eye(min(shape)), atol=5e-6)

    def turned(weight: Any) -> Any:
        u, _, v = np.linalg.svd(weight, full_matrices=False)
        return u @ v

    layer, x = nn.Linear(*shape), data(3, shape[0])
    first = layer.weight.numpy().copy()
    orthogonal_weights(layer, map=map)
    is_orthogonal(layer)
    close(layer.weight, turned(first), 1e-5)
    for new in (turned(data(*shape).numpy()), data(*shape, seed=1).numpy()):
        layer.weight.set_value(new)
        layer.eval()
        layer(x)
        close(layer.weight, turned(new), 1e-5)
    layer.train()
    optimizer = paddle.optimizer.SGD(0.1, parameters=layer.parameters())
    for _ in range(2):
        layer(x).norm().backward()
        optimizer.step()
        optimizer.clear_grad()
        layer(x)
        is_orthogonal(layer)
    with pytest.raises(ValueError, match="no map 'foo'"):
        orthogonal_weights(nn.Linear(3, 4), map="foo")
    with pytest.raises(ValueError, match="nothing tells which axes of 'bias'"):
        orthogonal_weights(nn.Linear(3, 4), "bias")


# ---- TensorFlow Addons and Keras ---------------------------------------------------------------------


def test_with_data_inputs_of_plus_and_minus_four_come_out_as_one() -> None:
    layer = weight_normalization(fixed(nn.Linear(2, 2), np.eye(2)))
    x = paddle.to_tensor([[4.0, 4.0], [-4.0, -4.0]])
    close(layer(x), x)
    initialize_from_data(layer, x)
    close(layer(x), x / 4)


@pytest.mark.parametrize("attach", [weight_normalization, spectral_normalization])
def test_layers_without_a_weight_are_refused(attach: Callable[..., Any]) -> None:
    for layer in (nn.MaxPool2D(2), nn.ReLU()):
        with pytest.raises(ValueError, match="has no parameter 'weight' of its own"):
            attach(layer)
    with pytest.raises(ValueError, match="must be at least 1, not 0"):
        spectral_normalization(nn.Linear(2, 2), power_iterations=0)


def test_a_kernel_of_ones_in_inference_and_in_training() -> None:
    layer = fixed(nn.Conv2D(1, 1, 2, bias_attr=False), np.ones((1, 1, 2, 2)))
    spectral_normalization(layer, power_iterations=8)
    for mode in (False, True, False):
        layer.train() if mode else layer.eval()
        close(layer(paddle.ones([1, 1, 2, 2])), np.full((1, 1, 1, 1), 2.0))


def test_counts_of_what_trains_and_what_does_not() -> None:
    for layer in (nn.Linear(4, 2), nn.Embedding(10, 4), nn.Conv3D(2, 3, 2)):
        before = len(layer.parameters())
        spectral_normalization(layer)
        assert (len(layer.parameters()), len(layer.buffers())) == (before, 2)


# ---- flax and equinox --------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [(-1,), (0,), (0, 1), ()], ids=str)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_any_axes_by_hand(name: str, axes: tuple[int, ...]) -> None:
    layer = nn.Linear(3, 2)
    layer.bias.set_value(data(2))
    axes = axes if name == "weight" else axes[:1]
    weight_normalization(layer, name, axis=axes)
    for parameter in layer.parameters():
        parameter.set_value(parameter + 0.5)
    layer(data(1, 3))
    direction, gain = getattr(layer, f"{name}_v").numpy(), getattr(layer, f"{name}_g").numpy()
    norm = literal_norm(direction, axes)
    close(getattr(layer, name), gain.reshape(norm.shape) * direction / norm)


class Attention(nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiHeadAttention(4, 2)

    def forward(self, x: Any) -> Any:
        return self.inner(x, x, x)


TRAINED = {
    "dense": (lambda: nn.Linear(4, 4), lambda m: [m]),
    "convolution": (lambda: nn.Conv1D(5, 5, 3, padding=1), lambda m: [m]),
    "attention": (
        Attention,
        lambda m: [m.inner.q_proj, m.inner.k_proj, m.inner.v_proj, m.inner.out_proj],
    ),
}


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("attach", [weight_normalization, spectral_normalization])
def test_the_loss_falls_at_each_step(attach: Callable[..., Any], kind: str) -> None:
    paddle.seed(0)
    build, parts = TRAINED[kind]
    model = build()
    for layer in parts(model):
        attach(layer)
    x, y = data(8, 5, 4), data(8, 5, 4, seed=1)
    optimizer = paddle.optimizer.Adam(5e-3, parameters=model.parameters())
    losses = []
    for _ in range(10):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)


def test_the_largest_singular_value_comes_to_one() -> None:
    layer = spectral_normalization(nn.Linear(4, 4))
    layer.weight_v.set_value(data(4, 4))
    for _ in range(200):
        layer(data(1, 4))
    assert abs(np.linalg.norm(layer.weight.numpy(), 2) - 1) < 1e-4


@pytest.mark.parametrize("kind", ["linear", "whole", "conv3d"])
def test_equinoxs_layers_stay_what_they_are_and_pass_gradients(kind: str) -> None:
    layer: Any = nn.Conv3D(2, 3, 2) if kind == "conv3d" else nn.Linear(4, 6)
    x = data(1, 2, 4, 4, 4) if kind == "conv3d" else data(3, 4)
    before = layer(x)
    weight_normalization(layer, axis=() if kind == "whole" else None)
    close(layer(x), before)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in layer.parameters())
