"""Spectral normalization, sigma-Reparam, orthogonal weights, LoRA and DoRA in torch: what each computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_weight_layers import train
from torch import nn

import refold
from refold.torch import (
    low_rank_adaptation,
    orthogonal_weights,
    settle,
    spectral_errors,
    spectral_normalization,
    weight_normalization,
)
from refold.torch.namespace import TORCH
from refold.weights import Orthogonal, SpectralState, spectral_error
from weights import golden

# ---- spectral normalization --------------------------------------------------------------------------


def parts_of(module: Any) -> Any:
    return module.parametrizations.weight[0]


def test_only_uses_in_training_mode_advance_and_nothing_writes_into_the_weight() -> None:
    torch.manual_seed(0)
    module, x = spectral_normalization(nn.Linear(8, 6)), torch.randn(3, 8)
    assert np.isclose(np.linalg.norm(module.eval().weight.detach().numpy(), 2), 1.0, atol=1e-6)
    stored = module.parametrizations.weight.original
    with torch.no_grad():
        stored.normal_()
    own = parts_of(module)
    before, value = own.left.clone(), stored.detach().clone()
    module(x), module.weight
    assert torch.equal(own.left, before)
    state = SpectralState(own.left.numpy().copy(), own.right.numpy().copy())
    expected = own.method.advance(refold.weights.NUMPY, stored.detach().numpy(), state, 1)
    module.train()(x).sum().backward()
    assert np.allclose(own.left.numpy(), expected.left, atol=1e-6)
    assert np.allclose(own.right.numpy(), expected.right, atol=1e-6)
    for _ in range(200):
        module(x)
    assert abs(spectral_errors(nn.Sequential(module))["0.weight"]) < 1e-5
    assert torch.equal(stored, value)


def test_two_uses_before_one_gradient() -> None:
    """The second use advances the vectors; the gradient of the first is still its own."""
    module, x = spectral_normalization(nn.Linear(8, 6, bias=False).double()), torch.randn(3, 8, dtype=torch.float64)
    stored, own = module.parametrizations.weight.original, parts_of(module)
    with torch.no_grad():
        stored.normal_()
    state, states = SpectralState(own.left.clone(), own.right.clone()), []
    for _ in range(2):
        state = own.method.advance(TORCH, stored, state)
        states.append(state)
    (module(x) * module(2 * x)).sum().backward()
    again = stored.detach().clone().requires_grad_()
    first, second = (x @ own.method.compose(TORCH, again, state).T for state in states)
    (first * 2 * second).sum().backward()
    assert torch.allclose(stored.grad, again.grad, rtol=1e-10)


def test_the_fold_ships_the_vectors_as_they_are_and_settling_makes_them_exact() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(spectral_normalization(nn.Linear(8, 6))).eval(), torch.randn(3, 8)
    with torch.no_grad():
        model[0].parametrizations.weight.original.normal_()
    assert spectral_errors(model)["0.weight"] > 1e-3
    plain = refold.fold(model, x)
    assert torch.allclose(plain(x), model(x), atol=1e-6)
    assert np.linalg.norm(plain.state_dict()["0.weight"].numpy(), 2) > 1.001
    settle(model)
    assert abs(spectral_errors(model)["0.weight"]) < 1e-6
    assert np.isclose(np.linalg.norm(model[0].weight.detach().numpy(), 2), 1.0, atol=1e-6)


def test_sigma_is_the_largest_singular_value_of_the_rows_of_units() -> None:
    module = spectral_normalization(nn.ConvTranspose2d(4, 6, 3, groups=2))
    weight = module.weight.detach().numpy().reshape(2, 2, 3, 3, 3).transpose(0, 2, 1, 3, 4).reshape(6, -1)
    assert np.isclose(np.linalg.norm(weight, 2), 1.0, atol=1e-6)
    zero = nn.Linear(3, 2)
    with torch.no_grad():
        zero.weight.zero_()
    spectral_normalization(zero)(torch.randn(4, 3)).sum().backward()
    assert torch.equal(zero.weight, torch.zeros(2, 3))
    assert zero.parametrizations.weight.original.grad.isfinite().all()


# ---- the methods themselves --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3)])
@pytest.mark.parametrize("map", ["cayley", "exponential"])
def test_orthogonal_stays_so(shape: tuple[int, int], map: str) -> None:
    torch.manual_seed(0)
    module = nn.Linear(shape[1], shape[0])
    nn.init.orthogonal_(module.weight)
    before = module.weight.detach().clone()
    orthogonal_weights(module, map=map)
    assert torch.allclose(module.weight, before, atol=1e-6)
    train(module, torch.randn(9, shape[1]), 30)
    assert not torch.allclose(module.weight, before, atol=1e-2)
    weight = module.weight.detach()
    product = weight @ weight.T if shape[0] <= shape[1] else weight.T @ weight
    assert torch.allclose(product, torch.eye(min(shape)), atol=1e-5)


def test_low_rank_changes_have_that_rank() -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(8, 6), torch.randn(9, 8)
    before = module.weight.detach().clone()
    low_rank_adaptation(module, 2, alpha=4.0)
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == 2 * (8 + 6)
    train(module, x)
    own = parts_of(module)
    assert torch.allclose(module.weight, before + 2.0 * own.up @ own.down, atol=1e-6)
    assert torch.linalg.matrix_rank(module.weight.detach() - before, atol=1e-5) == 2
    assert torch.equal(module.parametrizations.weight.original, before)


@pytest.mark.parametrize("case", golden.CASES, ids=str)
def test_golden_vectors(case: golden.Case) -> None:
    given = {
        name: torch.from_numpy(value).requires_grad_(name in case.gradients) for name, value in case.arrays.items()
    }
    made = golden.compose(case, TORCH, given)
    (torch.from_numpy(case.target) * made).sum().backward()
    gradients = {name: given[name].grad.numpy() for name in case.gradients}
    golden.check(case, made.detach().numpy(), gradients, "float64")


@pytest.mark.parametrize("case", golden.CASES, ids=str)
def test_golden_vectors_through_the_layers(case: golden.Case) -> None:
    """The parts are put into a layer, whose weight and gradients are then the golden ones."""
    stored = case.arrays["base" if "up" in case.arrays else "direction"]
    layer = nn.Linear(stored.shape[1], stored.shape[0], bias=False)
    match case.method:
        case golden.Spectral():
            spectral_normalization(layer, epsilon=case.method.epsilon, gain=True)
        case Orthogonal():
            orthogonal_weights(layer, map=case.method.map, gain=True)
        case golden.LowRank():
            rank = case.arrays["up"].shape[1]
            low_rank_adaptation(layer, rank, alpha=case.method.scale * rank, magnitude=case.method.magnitude)
        case _:
            weight_normalization(layer, normalizer=case.method, offset=True)
    layer = layer.eval()
    found = layer.parametrizations.weight
    places = dict(found[0].named_parameters()) | dict(found[0].named_buffers())
    if hasattr(found, "original"):
        places["base" if "up" in case.arrays else "direction"] = found.original
    else:
        places |= {"direction": found.original0, "gain": found.original1, "offset": found.original2}
    with torch.no_grad():
        for name, value in case.arrays.items():
            places[name].copy_(torch.from_numpy(value).reshape(places[name].shape))
    (torch.from_numpy(case.target).float() * layer.weight).sum().backward()
    gradients = {name: places[name].grad.reshape(case.arrays[name].shape).numpy() for name in case.gradients}
    golden.check(case, layer.weight.detach().numpy(), gradients, "float32")


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: spectral_normalization(nn.Linear(3, 3), power_iterations=0), "must be at least 1, not 0"),
        (lambda: spectral_normalization(nn.Linear(3, 3), epsilon=-1.0), "a finite number that is not negative"),
        (lambda: orthogonal_weights(nn.Linear(3, 3), map="householder"), "no map 'householder'"),
        (lambda: low_rank_adaptation(nn.Linear(3, 3), 0), "the rank must be at least 1, not 0"),
        (lambda: weight_normalization(nn.Embedding(3, 4, sparse=True)), "makes sparse gradients"),
        (
            lambda: spectral_normalization(nn.EmbeddingBag(3, 4, max_norm=1.0)),
            "writes into its weight at each call",
        ),
        (lambda: spectral_normalization(nn.LayerNorm(3)), "nothing tells which axes"),
        (lambda: orthogonal_weights(weight_normalization(nn.Linear(3, 3))), "is parametrized already"),
    ],
)
def test_refusals(build: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build()


def test_spectral_error_is_that_of_the_stored_weight() -> None:
    model = nn.Sequential(nn.ReLU(), spectral_normalization(nn.Conv2d(2, 3, 3)))
    own, stored = parts_of(model[1]), model[1].parametrizations.weight.original
    with torch.no_grad():
        stored.normal_()
    state = SpectralState(own.left.numpy(), own.right.numpy())
    expected = spectral_error(stored.detach().numpy().reshape(3, -1), state)
    assert spectral_errors(model) == {"1.weight": pytest.approx(expected, rel=1e-4)}
