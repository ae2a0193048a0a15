"""The methods of refold.weights as computed weights of Paddle's layers: they train, save, copy and fold away."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.nn import functional as F
from zoo import Body, randomize

import refold
from refold.paddle import (
    force_magnitudes,
    initialize_from_data,
    low_rank_adaptation,
    orthogonal_weights,
    settle,
    spectral_errors,
    spectral_normalization,
    weight_normalization,
)
from refold.paddle.namespace import PADDLE
from refold.paddle.rows import compose
from refold.paddle.units import rows_of
from refold.weights import METHODS, Centered, Rows, method
from weights import golden

LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "grouped": (lambda: nn.Conv2D(4, 6, 3, groups=2), (2, 4, 6, 6)),
    "grouped transposed": (lambda: nn.Conv2DTranspose(4, 6, 3, groups=2), (2, 4, 5, 5)),
}


def fan_in(layer: Any) -> int:
    return rows_of(layer, "weight", tuple(layer.weight.shape), None).fan_in


def by_layer_norm(layer: Any) -> Any:
    return weight_normalization(layer, normalizer=nn.LayerNorm(fan_in(layer)))


# Whether attaching keeps the function, and what does not train.
Way = tuple[Callable[[Any], Any], bool, set[str]]
WAYS: dict[str, Way] = {
    "layer norm": (by_layer_norm, True, set()),
    "centered": (lambda layer: weight_normalization(layer, normalizer=Centered(activation="relu")), True, set()),
    "magnitude": (partial(weight_normalization, normalizer="magnitude"), True, set()),
    "spectral": (spectral_normalization, False, set()),
    "sigma": (partial(spectral_normalization, gain=True), True, set()),
    "cayley": (partial(orthogonal_weights, gain=True), False, set()),
    "exponential": (partial(orthogonal_weights, map="exponential"), False, set()),
    "lora": (partial(low_rank_adaptation, rank=2, alpha=3.0), True, {"weight_v", "bias"}),
    "dora": (partial(low_rank_adaptation, rank=2, magnitude=True), True, {"weight_v", "bias"}),
}


def data(*shape: int, seed: int = 0) -> Any:
    return paddle.to_tensor(np.random.default_rng(seed).normal(size=shape).astype("float32"))


def train(layer: Any, x: Any, steps: int = 2) -> set[str]:
    """Some steps; the names of the parameters that moved."""
    layer.train()
    before = {name: parameter.numpy().copy() for name, parameter in layer.named_parameters()}
    optimizer = paddle.optimizer.SGD(0.05, parameters=layer.parameters())
    for _ in range(steps):
        out = layer(x)
        (out[0] if isinstance(out, tuple) else out).square().mean().backward()
        optimizer.step()
        optimizer.clear_grad()
    layer.eval()
    return {name for name, p in layer.named_parameters() if not np.array_equal(p.numpy(), before[name])}


@pytest.mark.parametrize("case", golden.CASES, ids=str)
def test_the_methods_give_the_golden_vectors(case: Any) -> None:
    tensors = {name: paddle.to_tensor(array.astype("float32")) for name, array in case.arrays.items()}
    for name in case.gradients:
        tensors[name].stop_gradient = False
    weight = golden.compose(case, PADDLE, tensors)
    (weight * paddle.to_tensor(case.target.astype("float32"))).sum().backward()
    golden.check(case, weight.numpy(), {name: tensors[name].grad.numpy() for name in case.gradients})


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("way", WAYS)
def test_the_life_of_a_computed_weight(way: str, kind: str, tmp_path: Path) -> None:
    (wrap, keeps, frozen), (build, shape) = WAYS[way], LAYERS[kind]
    layer, x = randomize(build()), data(*shape)
    before = layer(x).numpy()
    assert wrap(layer) is layer
    assert "weight" not in layer.state_dict()
    if keeps:
        np.testing.assert_allclose(layer(x).numpy(), before, rtol=0, atol=3e-6 * np.abs(before).max())
    else:
        assert not np.allclose(layer(x).numpy(), before, rtol=1e-2)

    names = {name for name, _ in layer.named_parameters()}
    assert train(layer, x) == names - frozen
    after = layer(x).numpy()
    assert not np.allclose(after, before, rtol=1e-3)
    state = {name: tensor.numpy().copy() for name, tensor in layer.state_dict().items()}
    layer(x)
    for name, tensor in layer.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), state[name])  # a call in eval mode writes nothing

    other = wrap(build())
    other.eval()
    assert other.set_state_dict(layer.state_dict()) == ([], [])
    np.testing.assert_array_equal(other(x).numpy(), after)
    copied = copy.deepcopy(layer)
    np.testing.assert_array_equal(copied(x).numpy(), after)
    train(copied, x)
    np.testing.assert_array_equal(layer(x).numpy(), after)

    model = nn.Sequential(layer)
    model.eval()
    plain = refold.fold(model, x)
    assert sorted(plain.state_dict()) == ["0.bias", "0.weight"]
    np.testing.assert_allclose(plain(x).numpy(), after, rtol=1e-5, atol=1e-6)
    assert refold.prove(model, plain, x).verdict.value == "proved"
    if kind == "linear":
        spec = [paddle.static.InputSpec([None, *shape[1:]], "float32")]
        paddle.jit.save(model, str(tmp_path / "rich"), input_spec=spec)
        np.testing.assert_allclose(paddle.jit.load(str(tmp_path / "rich"))(x).numpy(), after, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(copy.deepcopy(layer)(x).numpy(), after)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_types_are_computed_wide_and_kept(way: str, dtype: str) -> None:
    layer = randomize(nn.Linear(5, 3))
    layer.to(dtype=dtype)
    if way == "layer norm":  # which has its own type
        return
    WAYS[way][0](layer)
    assert str(layer.weight.dtype) == f"paddle.{dtype}"
    parts = [p for name, p in layer.state_dict().items() if name not in ("weight_v", "bias")]
    assert {str(part.dtype) for part in parts} == {"paddle.float64" if dtype == "float64" else "paddle.float32"}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_into_a_weight_is_not_lost(way: str) -> None:
    layer, x = WAYS[way][0](randomize(nn.Linear(5, 3))), data(4, 5)
    wanted = np.eye(5, 3, dtype="float32") * 2.0
    layer.weight.set_value(wanted)
    given = layer(x)
    expected = x.numpy() @ layer.weight.numpy() + layer.bias.numpy()
    np.testing.assert_allclose(given.numpy(), expected, rtol=1e-5, atol=1e-5)
    size = 1.0 if way in ("spectral", "exponential") else 2.0  # these have no gain
    np.testing.assert_allclose(layer.weight.numpy(), wanted / 2.0 * size, atol=1e-5)


def test_tied_weights_stay_tied_or_are_refused() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    x = data(3, 4)
    model = nn.Sequential(weight_normalization(first), nn.ReLU(), weight_normalization(second))
    assert first.weight_g is second.weight_g
    assert "2.weight_g" in dict(model.named_parameters()) or len(model.parameters()) == 4
    train(model, x)
    np.testing.assert_array_equal(first.weight.numpy(), second.weight.numpy())
    third = nn.Linear(4, 4)
    third.weight = first.weight_v
    with pytest.raises(ValueError, match="is shared with a layer where it is computed in another way"):
        spectral_normalization(third)


def test_frozen_weights_stay_frozen() -> None:
    for way in ("sigma", "cayley", "magnitude"):
        layer = randomize(nn.Linear(5, 3))
        layer.weight.stop_gradient = True
        WAYS[way][0](layer)
        assert train(layer, data(4, 5)) == {"bias"}, way


# ---- recurrent layers and attention ------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.SimpleRNN])
@pytest.mark.parametrize("direction", ["forward", "bidirect"])
def test_every_gate_of_recurrent_layers(kind: Any, direction: str, tmp_path: Path) -> None:
    layer, x = kind(3, 4, 2, direction=direction), data(2, 5, 3)
    layer.eval()
    before = layer(x)[0].numpy()
    names = [name for name in layer._parameters if name.startswith("weight")]
    for name in names:
        units = layer._parameters[name].shape[0]
        norms = np.linalg.norm(layer._parameters[name].numpy(), axis=1)
        weight_normalization(layer, name)
        assert layer._parameters[f"{name}_g"].shape == [units]  # one for each gate of each unit
        np.testing.assert_allclose(layer._parameters[f"{name}_g"].numpy(), norms, rtol=1e-6)
    np.testing.assert_allclose(layer(x)[0].numpy(), before, rtol=1e-5, atol=1e-6)
    assert train(layer, x) == {name for name, _ in layer.named_parameters()}
    for name in names:  # none of them is a silent no-op
        changed = copy.deepcopy(layer)
        changed._parameters[f"{name}_g"].set_value(changed._parameters[f"{name}_g"] * 2)
        assert not np.allclose(changed(x)[0].numpy(), layer(x)[0].numpy(), rtol=1e-3), name

    model = Body(lambda m, x: m.rnn(x)[0], rnn=layer)
    model.eval()
    plain = refold.fold(model, x)
    assert type(plain.rnn) is kind
    assert list(plain.rnn.state_dict()) == list(kind(3, 4, 2, direction=direction).state_dict())
    np.testing.assert_allclose(plain(x).numpy(), model(x).numpy(), rtol=1e-5, atol=1e-6)
    assert refold.prove(model, plain, x).verdict.value == "proved"
    fresh = kind(3, 4, 2, direction=direction)
    fresh.set_state_dict(plain.rnn.state_dict())
    fresh.eval()
    np.testing.assert_allclose(fresh(x)[0].numpy(), model(x).numpy(), rtol=1e-5, atol=1e-6)
    plain.train()
    plain(x).sum().backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())


def test_cells_and_layers_that_run_by_steps() -> None:
    cell = weight_normalization(nn.LSTMCell(3, 4), "weight_hh")
    assert cell.weight_hh_g.shape == [16]
    model, x = Body(lambda m, x: m.rnn(x)[0], rnn=nn.RNN(cell)), data(2, 5, 3)
    model.eval()
    plain = refold.fold(model, x)
    np.testing.assert_allclose(plain(x).numpy(), model(x).numpy(), rtol=1e-5, atol=1e-6)
    assert not any(name.endswith("_g") for name in plain.state_dict())
    for settings in ({"proj_size": 2}, {"bias_hh_attr": False}):
        layer = nn.LSTM(3, 4, **settings)
        names = list(layer.state_dict())
        if hasattr(layer, "weight_hh_l0") and not layer.could_use_cudnn:
            with pytest.raises(ValueError, match=r"runs step by step.*normalize the weights of its cells"):
                weight_normalization(layer, "weight_hh_l0")
        assert list(layer.state_dict()) == names


@pytest.mark.parametrize(
    "way", [weight_normalization, spectral_normalization, orthogonal_weights, partial(low_rank_adaptation, rank=2)]
)
def test_a_cell_that_is_not_called_is_refused(way: Any) -> None:
    """A hook in front of it would do nothing, and say nothing."""
    layer = nn.LSTM(3, 4, 2, direction="bidirect")
    before, names = layer(data(2, 5, 3))[0].numpy(), list(layer.state_dict())
    cell = layer[1].cell_bw
    with pytest.raises(ValueError, match=r"\(LSTM\) that does not call its cells: .* 'weight_hh_l1_reverse'"):
        way(cell, name="weight_hh")
    assert list(layer.state_dict()) == names
    np.testing.assert_array_equal(layer(data(2, 5, 3))[0].numpy(), before)


def test_projections_of_attention() -> None:
    layer, x = nn.MultiHeadAttention(8, 2), data(2, 5, 8)
    layer.eval()
    before = layer(x).numpy()
    with pytest.raises(
        ValueError, match=r"its parameters are those of its layers: q_proj, k_proj, v_proj, out_proj"
    ):
        weight_normalization(layer)
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
        norms = np.linalg.norm(projection.weight.numpy(), axis=0)  # stored (in, out)
        np.testing.assert_allclose(weight_normalization(projection).weight_g.numpy(), norms, rtol=1e-6)
    np.testing.assert_allclose(layer(x).numpy(), before, rtol=1e-5, atol=1e-6)
    assert len(train(layer, x)) >= 10  # the bias of the keys changes nothing
    model = nn.Sequential(layer)
    model.eval()
    plain = refold.fold(model, x)
    assert not any(name.endswith(("_g", "_v")) for name in plain.state_dict())
    np.testing.assert_allclose(plain(x).numpy(), model(x).numpy(), rtol=1e-5, atol=1e-6)


def test_sparse_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match="makes sparse gradients"):
        weight_normalization(nn.Embedding(7, 4, sparse=True))


# ---- single methods ------------------------------------------------------------------------------------


def test_the_largest_singular_value_is_one_and_inference_writes_nothing() -> None:
    layer, x = spectral_normalization(randomize(nn.Conv2D(4, 6, 3))), data(2, 4, 6, 6)
    assert abs(np.linalg.norm(layer.weight.numpy().reshape(6, -1), 2) - 1) < 1e-5  # before any training
    layer.weight_v.set_value(data(6, 4, 3, 3, seed=3))
    assert spectral_errors(nn.Sequential(layer))["0.weight"] > 1e-2
    left, stored = layer.weight_left.numpy().copy(), layer.weight_v.numpy().copy()
    layer.eval()
    layer(x)
    np.testing.assert_array_equal(layer.weight_left.numpy(), left)
    layer.train()
    for _ in range(60):
        layer(x)
    np.testing.assert_array_equal(layer.weight_v.numpy(), stored)  # nor does training write into the weight
    assert spectral_errors(layer)["weight"] < 1e-3
    settle(layer)
    assert abs(spectral_errors(layer)["weight"]) < 1e-6
    sigma = np.linalg.norm(stored.reshape(6, -1).astype("float64"), 2)
    layer.eval()
    layer(x)
    np.testing.assert_allclose(layer.weight.numpy(), stored / sigma, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="power_iterations must be at least 1"):
        spectral_normalization(nn.Linear(3, 2), power_iterations=0)


@pytest.mark.parametrize("map", ["cayley", "exponential"])
@pytest.mark.parametrize("sizes", [(8, 3), (3, 8), (4, 4)])
def test_orthogonal_weights_stay_orthogonal(map: str, sizes: tuple[int, int]) -> None:
    layer = orthogonal_weights(randomize(nn.Linear(*sizes)), map=map)
    train(layer, data(4, sizes[0]), steps=20)
    weight = layer.weight.numpy()
    gram = weight.T @ weight if sizes[0] >= sizes[1] else weight @ weight.T
    np.testing.assert_allclose(gram, np.eye(min(sizes)), atol=1e-5)


def test_forced_magnitudes_keep_the_function() -> None:
    layer, x = weight_normalization(randomize(nn.Conv2D(4, 6, 3)), normalizer="magnitude"), data(2, 4, 6, 6)
    train(layer, x, steps=5)
    before = layer(x).numpy()
    force_magnitudes(nn.Sequential(layer))
    np.testing.assert_allclose(np.linalg.norm(layer.weight_v.numpy().reshape(6, -1), axis=1), 6.0, rtol=2e-3)
    np.testing.assert_allclose(layer(x).numpy(), before, rtol=2e-3, atol=1e-3)


# ---- data-dependent initialization -------------------------------------------------------------------


def deep() -> Any:
    return randomize(
        nn.Sequential(
            weight_normalization(nn.Conv2D(3, 6, 3)),
            nn.Tanh(),
            weight_normalization(nn.Conv2D(6, 4, 3, data_format="NCHW"), normalizer="layer"),
            nn.Tanh(),
            nn.Flatten(),
            weight_normalization(nn.Linear(4 * 25, 5)),
        )
    )


def test_each_layer_gives_mean_0_and_variance_1_in_order() -> None:
    model, x = deep(), data(32, 3, 9, 9)
    assert initialize_from_data(model, x) == ["0", "2", "5"]
    first = model[0](x)
    second = model[2](F.tanh(first))
    third = model[5](F.tanh(second).flatten(1))
    for outputs in (first, second, third):
        rows = np.moveaxis(outputs.numpy(), 1, 0).reshape(outputs.shape[1], -1)
        np.testing.assert_allclose(rows.mean(axis=1), 0.0, atol=1e-5)
        np.testing.assert_allclose(rows.std(axis=1), 1.0, rtol=1e-5)
    before = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    initialize_from_data(model, x)
    for name, tensor in model.state_dict().items():
        np.testing.assert_allclose(tensor.numpy(), before[name], rtol=1e-4, atol=1e-5)
    directions = [name for name in before if name.endswith("_v")]
    fresh = deep().state_dict()
    assert all(np.array_equal(fresh[name].numpy(), before[name]) for name in directions)


def test_units_without_variance_and_channels_last() -> None:
    layer = randomize(nn.Conv2D(3, 4, 3, data_format="NHWC", bias_attr=False))
    layer.weight.set_value(layer.weight * paddle.to_tensor([1.0, 0.0, 1.0, 1.0]).reshape([4, 1, 1, 1]))
    weight_normalization(layer)
    x = data(8, 6, 6, 3)
    initialize_from_data(layer, x)
    deviations = layer(x).numpy().reshape(-1, 4).std(axis=0)
    np.testing.assert_allclose(deviations, [1.0, 0.0, 1.0, 1.0], rtol=1e-5)


def test_what_data_cannot_initialize_is_refused_and_nothing_changes() -> None:
    for layer, sentence in (
        (weight_normalization(nn.Linear(3, 2), gain=False), "without a gain"),
        (weight_normalization(nn.Embedding(5, 4)), "does not know which output"),
        (weight_normalization(nn.Linear(3, 3), axis=0), "does not know which output"),
        (weight_normalization(nn.LSTM(3, 4), "weight_hh_l0"), "does not know which output"),
    ):
        model = nn.Sequential(weight_normalization(nn.Linear(4, 3)), layer)
        before = model[0].weight_g.numpy().copy()
        with pytest.raises(ValueError, match=sentence):
            initialize_from_data(model, data(2, 4))
        np.testing.assert_array_equal(model[0].weight_g.numpy(), before)


# ---- gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("kind", ["columns", "rows"])
def test_gradients_to_second_order_are_those_of_the_steps(name: str, kind: str) -> None:
    rows, chosen = Rows((6, 4), (1,) if kind == "columns" else (0,)), method(name)

    def parts() -> list[Any]:
        paddle.seed(3)
        made = [paddle.randn(shape, "float64") for shape in ((6, 4), (rows.units,), (rows.units,))]
        for part in made:
            part.stop_gradient = False
        return made

    def by_steps(direction: Any, gain: Any, offset: Any) -> Any:
        columns = (paddle.reshape(part, [-1, 1]) for part in (gain, offset))
        made = chosen.compose(PADDLE, rows.to_matrix(PADDLE, direction), *columns)
        return rows.from_matrix(PADDLE, made)

    weights = paddle.randn((6, 4), "float64")
    found = []
    for run in (lambda *given: compose(chosen, rows, *given), by_steps):
        given = parts()
        made = run(*given)
        first = paddle.grad((made * made * weights).sum(), given, create_graph=True)
        second = paddle.grad((first[0] * first[0]).sum(), given)
        found.append([made, *first, *second])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("largest", [1.0, 1e30, 1e37])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_rows_of_every_size_at_once_are_finite_forward_and_backward(name: str, largest: float) -> None:
    sizes = np.array([0.0, 1e-45, 1e-40, 1e-30, 1.0, largest])
    pattern = np.array([1.0, -2.0, 3.0, -4.0, 5.0, 0.5])[:, None]
    layer = nn.Linear(6, 6)
    layer.weight.set_value((pattern * sizes).astype("float32"))
    weight_normalization(layer, normalizer=method(name, 0.0))
    made = layer.weight.numpy()
    np.testing.assert_allclose(made[:, 3:] / sizes[3:], np.broadcast_to(pattern, (6, 3)), rtol=3e-6)
    assert np.all(made[:, :3] == 0)
    (layer.weight * paddle.to_tensor(np.minimum(1, 1 / np.maximum(sizes, 1)).astype("float32"))).sum().backward()
    for part in (layer.weight_v, layer.weight_g):
        assert np.all(np.isfinite(part.grad.numpy()))
