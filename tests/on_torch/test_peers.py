"""What others' suites hold of their weights, held of ours: torch (``test_parametrization``), TensorFlow Addons
(``wrappers_test``), Keras (``spectral_normalization_test``), flax (``linen_test``), equinox (``test_nn``) and
Paddle (``test_dygraph_weight_norm``, ``test_dygraph_spectral_norm``)."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import refold
from refold.torch import initialize_from_data, orthogonal_weights, spectral_normalization, weight_normalization

close = torch.testing.assert_close


def stored(module: Any) -> Any:
    return module.parametrizations.weight


def literal_norm(weight: Any, axes: tuple[int, ...]) -> Any:
    """Norms over all axes but ``axes``, in the shape of the weight, by loops over nothing but numpy."""
    others = tuple(axis for axis in range(weight.ndim) if axis not in {a % weight.ndim for a in axes})
    return np.sqrt(np.square(weight.astype("float64")).sum(axis=others, keepdims=True))


# ---- torch: weight normalization ---------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "units"), [(None, 5), (0, 5), (1, 4), (-1, 4), ((), 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrapped_and_taken_off_the_output_is_the_same(dtype: torch.dtype, axis: Any, units: int) -> None:
    """Theirs takes -1 for the whole weight without a word."""
    module, x = nn.Linear(4, 5, dtype=dtype), torch.randn(3, 4, dtype=dtype)
    before = module(x)
    weight_normalization(module, axis=axis)
    close(module(x), before)
    assert stored(module).original0.shape == (5, 4)
    assert stored(module).original1.shape == (units,)
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is nn.Linear
    assert not hasattr(module, "parametrizations")
    close(module(x), before)


def test_states_of_both_of_theirs_are_taken() -> None:
    x = torch.randn(3, 4)
    new = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
    with torch.no_grad():
        stored(new).original0.mul_(1.5)
    state = new.state_dict()
    legacy = {
        "bias": state["bias"],
        "weight_g": state["parametrizations.weight.original0"],
        "weight_v": state["parametrizations.weight.original1"],
    }
    for given in (state, legacy):
        ours = weight_normalization(nn.Linear(4, 5))
        ours.load_state_dict(refold.torch.convert_state(given, "refold"))
        close(ours(x), new(x))


def test_a_copy_and_a_pickle_compute_the_same() -> None:
    """Theirs holds that pickling raises."""
    module, x = weight_normalization(nn.Linear(4, 5)), torch.randn(3, 4)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        close(again(x), module(x), rtol=0, atol=0)


# ---- torch: spectral normalization -------------------------------------------------------------------


def test_vectors_are_buffers_and_the_weight_is_none_of_the_modules() -> None:
    module = spectral_normalization(nn.Linear(5, 7))
    own = stored(module)[0]
    assert (own.left.numel(), own.right.numel()) == (7, 5)
    assert {"left", "right"} <= set(own._buffers)
    assert "weight" not in (*module._buffers, *module._parameters)
    assert stored(module).original.shape == module.weight.shape
    assert set(module.state_dict()) == {
        "bias",
        "parametrizations.weight.original",
        "parametrizations.weight.0.left",
        "parametrizations.weight.0.right",
    }
    with pytest.raises(ValueError, match="is parametrized already"):  # theirs divides twice
        spectral_normalization(module)
    parametrize.remove_parametrizations(module, "weight")
    assert set(module._parameters) == {"weight", "bias"}


@pytest.mark.parametrize("trains", [True, False])
def test_in_training_and_inference(trains: bool) -> None:
    module, x = nn.Linear(3, 4).double(), torch.randn(2, 3, dtype=torch.float64)
    module.weight.requires_grad_(trains)
    spectral_normalization(module).train()
    own = stored(module)[0]
    before = own.left.clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(x).sum().backward()
    optimizer.step()
    last = module(x)
    assert torch.equal(own.left, before) is not trains
    left, right = own.left.clone(), own.right.clone()
    module.eval()
    close(module(x), last)
    close(module(x), last)
    assert torch.equal(own.left, left)
    assert torch.equal(own.right, right)

    def several(*given: Any) -> Any:
        own.left.copy_(left)
        own.right.copy_(right)
        return sum(module.train(mode)(x) for mode in (True, False, True, False))

    assert torch.autograd.gradcheck(lambda x: several() + module.eval()(x), (x.clone().requires_grad_(),))
    if trains:
        assert torch.autograd.gradcheck(lambda w: module.eval()(x), (stored(module).original,))
    out = module.eval()(x)
    parametrize.remove_parametrizations(module, "weight")
    close(module(x), out)


@pytest.mark.parametrize("calls", [0, 3])
def test_loading_goes_on_where_it_was(calls: int) -> None:
    x = torch.randn(2, 3)
    module = spectral_normalization(nn.Linear(3, 5))
    for _ in range(calls):
        module(x)
    state = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"nonsense\""):
        module.load_state_dict({**state, "nonsense": torch.zeros(1)})
    for left_out in state:
        module.load_state_dict({k: v for k, v in state.items() if k != left_out}, strict=False)
    outs = []
    for _ in range(2):
        parametrize.remove_parametrizations(module, "weight")
        spectral_normalization(module).load_state_dict(state)
        outs.append([module.train(mode)(x).detach() for mode in (False, True, True, False)])
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_the_vector_of_units_is_that_of_outputs() -> None:
    module = spectral_normalization(nn.ConvTranspose2d(3, 4, (5, 6)))
    module(torch.randn(2, 3, 10, 12))
    assert stored(module)[0].left.numel() == 4


def test_a_diagonal_is_divided_by_its_largest() -> None:
    module = nn.Linear(2, 2)
    with torch.no_grad():
        diagonal = module.weight.diagonal().clone()
        module.weight.copy_(torch.diag(diagonal))
    spectral_normalization(module)
    close(module.weight, torch.diag(diagonal / diagonal.abs().max()))


# ---- torch: orthogonal weights -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5)])
@pytest.mark.parametrize("map", ["cayley", "exponential"])
def test_orthogonal_from_the_first_and_after_what_is_assigned(map: str, shape: tuple[int, int]) -> None:
    def is_orthogonal(weight: Any) -> None:
        tall = weight if shape[0] >= shape[1] else weight.T
        close(tall.T @ tall, torch.eye(min(shape)), atol=5e-6, rtol=0)

    def turned(weight: Any) -> Any:
        u, _, v = torch.linalg.svd(weight, full_matrices=False)
        return u @ v

    module, x = nn.Linear(shape[1], shape[0]), torch.randn(3, shape[1])
    first = module.weight.detach().clone()
    orthogonal_weights(module, map=map)
    is_orthogonal(module.weight.detach())
    close(module.weight, turned(first), atol=1e-5, rtol=0)
    for new in (turned(torch.randn(shape)), torch.randn(shape)):
        module.weight = new
        close(module.weight, turned(new), atol=1e-5, rtol=0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        module(x).norm().backward()
        optimizer.step()
        is_orthogonal(module.weight.detach())


def test_what_is_no_matrix_has_no_orthogonal_form() -> None:
    with pytest.raises(ValueError, match="no map 'foo'"):
        orthogonal_weights(nn.Linear(3, 4), map="foo")
    with pytest.raises(ValueError, match="nothing tells which axes of 'bias'"):
        orthogonal_weights(nn.Linear(3, 4), "bias")


# ---- torch: what parametrize itself promises ---------------------------------------------------------

ATTACH: dict[str, Callable[..., Any]] = {
    "weight normalization": weight_normalization,
    "spectral": spectral_normalization,
    "orthogonal": orthogonal_weights,
}


@pytest.mark.parametrize("attach", ATTACH.values(), ids=ATTACH)
def test_parametrize_keeps_its_promises(attach: Callable[..., Any]) -> None:
    module = nn.Linear(5, 5)
    parameter = module.weight
    attach(module.eval())
    assert not stored(module)[0].training
    assert stored(module).train()[0].training
    stored(module).eval()
    assert parametrize.is_parametrized(module, "weight")
    assert not parametrize.is_parametrized(module, "bias")
    assert parametrize.type_before_parametrizations(module) is nn.Linear
    assert any(p is parameter for p in module.parameters())
    with parametrize.cached():
        assert module.weight is module.weight
    assert module.weight is not module.weight
    other = nn.Linear(5, 5).eval()
    parametrize.transfer_parametrizations_and_params(module, other)
    close(other.weight, module.weight)
    parametrize.remove_parametrizations(other, "weight")
    assert parametrize.is_parametrized(module, "weight")
    # A parametrization of what is stored, as theirs nests them.
    inner, name = stored(module), "original" if stored(module).is_tensor else "original0"
    parametrize.register_parametrization(inner, name, nn.Tanh(), unsafe=False)
    close(getattr(inner, name), torch.tanh(inner.parametrizations[name].original))
    module(torch.randn(2, 5)).sum().backward()
    parametrize.remove_parametrizations(inner, name)
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is nn.Linear


def test_one_original_comes_back_as_the_very_parameter() -> None:
    module = nn.Linear(8, 8)
    parameter, value = module.weight, module.weight.detach().clone()
    spectral_normalization(module)
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    assert module.weight is parameter
    assert torch.equal(module.weight, value)
    spectral_normalization(module)
    parametrize.remove_parametrizations(module, "weight")
    assert module.weight is parameter


def test_without_gradients_none_is_asked_for() -> None:
    module = nn.Linear(8, 8)
    module.weight.requires_grad_(False)
    weight_normalization(module)
    assert not module.weight.requires_grad
    assert not any(p.requires_grad for p in stored(module).parameters())


# ---- TensorFlow Addons and Keras ---------------------------------------------------------------------


def test_with_data_inputs_of_plus_and_minus_four_come_out_as_one() -> None:
    module, x = nn.Linear(2, 2), torch.tensor([[4.0, 4.0], [-4.0, -4.0]])
    nn.init.eye_(module.weight)
    nn.init.zeros_(module.bias)
    weight_normalization(module)
    close(module(x), x)
    initialize_from_data(module, x)
    close(module(x), x / 4)


@pytest.mark.parametrize("attach", [weight_normalization, spectral_normalization])
def test_layers_without_a_weight_are_refused(attach: Callable[..., Any]) -> None:
    for module in (nn.MaxPool2d(2), nn.ReLU()):
        with pytest.raises(ValueError, match="has no parameter 'weight' of its own"):
            attach(module)
    with pytest.raises(ValueError, match="must be at least 1, not 0"):
        spectral_normalization(nn.Linear(2, 2), power_iterations=0)


def test_a_kernel_of_ones_in_inference_and_in_training() -> None:
    module = nn.Conv2d(1, 1, 2, bias=False)
    nn.init.ones_(module.weight)
    spectral_normalization(module, power_iterations=8)
    for mode in (False, True, False):
        close(module.train(mode)(torch.ones(1, 1, 2, 2)), torch.full((1, 1, 1, 1), 2.0))


def test_counts_of_what_trains_and_what_does_not() -> None:
    for module in (nn.Linear(4, 2), nn.Embedding(10, 4), nn.Conv3d(2, 3, 2)):
        before = len(list(module.parameters()))
        spectral_normalization(module)
        assert (len(list(module.parameters())), len(list(module.buffers()))) == (before, 2)


# ---- flax and equinox --------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [(-1,), (0,), (0, 1), ()], ids=str)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_any_axes_by_hand(name: str, axes: tuple[int, ...]) -> None:
    module = nn.Linear(3, 2)
    axes = axes if name == "weight" else axes[:1]
    weight_normalization(module, name, axis=axes)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5)
    found = module.parametrizations[name]
    direction, gain = found.original0.detach().numpy(), found.original1.detach().numpy()
    norm = literal_norm(direction, axes)
    close(getattr(module, name).detach(), torch.from_numpy(gain.reshape(norm.shape) * direction / norm).float())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Any) -> Any:
        return self.inner(x, x, x)[0]


TRAINED = {
    "dense": (lambda: nn.Linear(4, 4), lambda m: [(m, "weight")]),
    "convolution": (
        lambda: nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Conv2d(5, 5, (1, 3), padding=(0, 1)), nn.Flatten(1, 2)),
        lambda m: [(m[1], "weight")],
    ),
    "attention": (Attention, lambda m: [(m.inner, "in_proj_weight"), (m.inner.out_proj, "weight")]),
}


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("attach", [weight_normalization, spectral_normalization])
def test_the_loss_falls_at_each_step(attach: Callable[..., Any], kind: str) -> None:
    torch.manual_seed(0)
    build, weights = TRAINED[kind]
    model = build()
    for owner, name in weights(model):
        attach(owner, name)
    x, y = torch.randn(8, 5, 4), torch.randn(8, 5, 4)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_sigma_of_four_times_the_identity_is_four() -> None:
    module = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        module.weight.copy_(4 * torch.eye(4))
    spectral_normalization(module)
    close(module.weight, torch.eye(4))
    with torch.no_grad():
        stored(module).original.normal_()
    for _ in range(200):  # equinox: the largest singular value comes to 1
        module(torch.randn(1, 4))
    assert abs(np.linalg.norm(module.eval().weight.detach().numpy(), 2) - 1) < 1e-4


@pytest.mark.parametrize("kind", ["linear", "whole", "conv3d"])
def test_equinoxs_layers_stay_what_they_are_and_pass_gradients(kind: str) -> None:
    module: Any = nn.Conv3d(2, 3, 2) if kind == "conv3d" else nn.Linear(4, 6)
    x = torch.randn(1, 2, 4, 4, 4) if kind == "conv3d" else torch.randn(3, 4)
    before = module(x)
    weight_normalization(module, axis=() if kind == "whole" else None)
    close(module(x), before)
    module(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in stored(module).parameters())


# ---- Paddle ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [(), 0, 1, 3, -3], ids=str)
def test_gains_of_a_convolution_along_any_axis(axis: Any) -> None:
    module = nn.Conv2d(2, 3, 3)
    before = module.weight.detach().numpy().copy()
    weight_normalization(module, axis=axis)
    gains = literal_norm(before, axis if isinstance(axis, tuple) else (axis,)).reshape(-1)
    np.testing.assert_allclose(stored(module).original1.detach().numpy(), gains, rtol=1e-6)
    np.testing.assert_array_equal(stored(module).original0.detach().numpy(), before)
    np.testing.assert_allclose(module.weight.detach().numpy(), before, rtol=1e-6)


@pytest.mark.parametrize(("axis", "steps", "epsilon"), [(0, 1, 1e-12), (0, 2, 1e-12), (1, 1, 1e-12), (0, 1, 1e-3)])
def test_steps_of_power_iteration_by_hand(axis: int, steps: int, epsilon: float) -> None:
    module = spectral_normalization(nn.Conv2d(2, 3, 3), power_iterations=steps, epsilon=epsilon, axis=axis)
    with torch.no_grad():
        stored(module).original.normal_()
    weight = stored(module).original.detach().numpy().astype("float64")
    matrix = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    u = stored(module)[0].left.numpy().reshape(-1).astype("float64")
    for _ in range(steps):
        v = matrix.T @ u
        v /= np.linalg.norm(v)
        u = matrix @ v
        u /= np.linalg.norm(u)
    module.train()(torch.randn(3, 2, 4, 4))
    expected = weight / (u @ matrix @ v + epsilon)
    np.testing.assert_allclose(module.eval().weight.detach().numpy(), expected, rtol=2e-5, atol=1e-6)
