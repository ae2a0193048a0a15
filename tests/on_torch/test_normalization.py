"""Weight normalization in torch: attaching changes nothing, everything trains, and it folds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import refold
from refold.torch import force_magnitudes, initialize_from_data, weight_normalization
from refold.torch.rows import as_matrix
from refold.weights import METHODS, MagnitudePreserving

KINDS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 9, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)),
    "grouped transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
}


def made(kind: str, seed: int = 0) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    build, shape = KINDS[kind]
    return build().eval(), torch.randn(shape)


def output_axis(module: Any) -> int:
    return 1 if module.weight.ndim > 2 else -1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_attaching_changes_nothing_and_folds_away(kind: str, name: str) -> None:
    module, x = made(kind)
    before, names = module(x), set(module.state_dict())
    weight_normalization(module, normalizer=name)
    assert torch.allclose(module(x), before, atol=1e-5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.25)
    plain = refold.fold(module if "transposed" not in kind else nn.Sequential(module).eval(), x)
    assert {key.removeprefix("0.") for key in plain.state_dict()} - {"linear.weight", "conv.weight"} <= {
        *names, "linear.bias", "conv.bias",
    }  # fmt: skip
    assert torch.allclose(plain(x), module(x), atol=1e-5)
    assert refold.prove(nn.Sequential(module).eval(), refold.fold(nn.Sequential(module).eval(), x), x).ok


@pytest.mark.parametrize("kind", KINDS)
def test_a_gain_scales_its_own_output(kind: str) -> None:
    """The axis is right exactly if each gain acts on one output channel."""
    module, x = made(kind)
    module.bias = None
    weight_normalization(module)
    before = module(x)
    gain = module.parametrizations.weight.original1
    factors = torch.arange(1.0, gain.numel() + 1)
    with torch.no_grad():
        gain.mul_(factors)
    shape = [-1 if axis == output_axis(module) % before.ndim else 1 for axis in range(before.ndim)]
    assert torch.allclose(module(x), before * factors.reshape(shape), atol=1e-4)


def test_is_the_formula_of_the_paper() -> None:
    module, _ = made("linear")
    weight_normalization(module)
    parts = module.parametrizations.weight
    with torch.no_grad():
        parts.original0.normal_()
        parts.original1.normal_()
    v, g = parts.original0.detach().double(), parts.original1.detach().double()
    wanted = g[:, None] * v / v.norm(dim=1, keepdim=True)
    assert torch.allclose(module.weight.double(), wanted, atol=1e-6)


@pytest.mark.parametrize("row", [1e-30, 1e30, 1e-38, 0.0])
@pytest.mark.parametrize("name", ["unit", "layer", "rms"])
def test_extreme_rows_stay_and_pass_finite_gradients(row: float, name: str) -> None:
    module, x = made("linear")
    with torch.no_grad():
        module.weight[0] = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0]) * row
    before = module.weight.detach().clone()
    weight_normalization(module, normalizer=name)
    assert torch.allclose(module.weight, before, rtol=1e-5, atol=1e-37)
    module(x)[:, 1:].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_gradients_are_those_of_finite_differences() -> None:
    module, x = made("grouped transposed")
    module, x = weight_normalization(module.double(), normalizer="layer"), x.double()
    names = [name for name, _ in module.named_parameters()]

    def run(*values: Any) -> Any:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    values = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]
    assert torch.autograd.gradcheck(run, values)


def test_the_direction_does_not_grow_along_its_gradient() -> None:
    module, x = made("conv2d")
    weight_normalization(module)
    module(x).square().sum().backward()
    direction = module.parametrizations.weight.original0
    product = (direction.grad * direction).flatten(1).sum(1)
    assert (product.abs() <= 1e-4 * direction.grad.flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("normalizer", [nn.LayerNorm(36), nn.RMSNorm(36)], ids=["LayerNorm", "RMSNorm"])
def test_through_a_norm_of_torch(normalizer: Any) -> None:
    torch.manual_seed(0)
    module, x = nn.Conv2d(4, 6, 3).eval(), torch.randn(2, 4, 9, 9)
    before = module(x)
    weight_normalization(module, normalizer=copy.deepcopy(normalizer))
    assert torch.allclose(module(x), before, atol=1e-5)
    plain = refold.fold(nn.Sequential(module).eval(), x)
    assert set(plain.state_dict()) == {"0.weight", "0.bias"}
    assert torch.allclose(plain(x), module(x), atol=1e-5)


def test_tools_of_torch_keep_working() -> None:
    module, x = made("conv2d")
    weight_normalization(module)
    assert parametrize.is_parametrized(module, "weight")
    again = copy.deepcopy(module)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), module(x))
    weight = torch.randn_like(module.weight)
    module.weight = weight
    assert torch.allclose(module.weight, weight, atol=1e-6)
    before = module(x)
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is nn.Conv2d
    assert torch.equal(module(x), before)


def test_frozen_stays_frozen_and_half_types_are_normed_in_float32() -> None:
    module, _ = made("linear")
    module = module.to(torch.bfloat16)
    module.weight.requires_grad_(False)
    before = module.weight.detach().clone()
    weight_normalization(module, normalizer="layer")
    parts = module.parametrizations.weight
    assert [p.requires_grad for p in (parts.original0, parts.original1, parts.original2)] == [False] * 3
    assert parts.original1.dtype == torch.float32
    assert module.weight.dtype == torch.bfloat16
    assert torch.equal(module.weight, before)


def test_without_a_gain_rows_have_the_size_of_the_method() -> None:
    module, _ = made("linear")
    weight_normalization(module, gain=False)
    assert torch.allclose(module.weight.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize(
    ("build", "arguments", "sentence"),
    [
        (lambda: nn.LSTM(3, 3), {"name": "bias_ih_l0"}, "nothing tells which axes of 'bias_ih_l0'"),
        (lambda: nn.Linear(3, 3), {"name": "kernel"}, "has no parameter 'kernel' of its own"),
        (lambda: nn.LazyLinear(3), {}, "has no shape yet"),
        (lambda: weight_normalization(nn.Linear(3, 3)), {}, "is parametrized already"),
        (lambda: nn.PReLU(3), {}, "nothing tells which axes of 'weight' number the output units"),
        (lambda: nn.Linear(3, 3), {"normalizer": "unknown"}, "there is no weight normalization named"),
        (lambda: nn.Linear(3, 3), {"normalizer": nn.BatchNorm1d(3)}, "not over the weights of each"),
        (lambda: nn.Linear(3, 3), {"normalizer": nn.LayerNorm(5)}, "an output unit has 3"),
    ],
)
def test_refusals(build: Any, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        weight_normalization(build(), **arguments)


@pytest.mark.parametrize("kind", ["linear", "grouped transposed"])
def test_forced_magnitudes_change_the_stored_rows_only(kind: str) -> None:
    module, x = made(kind)
    model = nn.Sequential(weight_normalization(module, normalizer=MagnitudePreserving(epsilon=0.0)), nn.ReLU())
    stored = module.parametrizations.weight.original0
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.register_step_post_hook(lambda *_: force_magnitudes(model))
    model(x).square().sum().backward()
    before = stored.detach().clone()
    optimizer.step()
    matrix = as_matrix(module.parametrizations.weight[0].rows, stored)
    assert torch.allclose(matrix.norm(dim=1), torch.full((matrix.shape[0],), matrix.shape[1] ** 0.5))
    assert not torch.allclose(stored, before, atol=1e-3)
    values, weight = stored.detach().clone(), module.weight.detach().clone()
    with torch.no_grad():
        stored.mul_(7.0)
    force_magnitudes(model)
    assert torch.allclose(stored, values, atol=1e-6)
    assert torch.allclose(module.weight, weight, atol=1e-6)


def test_cells_and_attention() -> None:
    cell = nn.LSTMCell(3, 4)
    attention = nn.MultiheadAttention(4, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 4)
    before = attention(x, x, x)[0]
    for name in ("weight_ih", "weight_hh"):
        weight_normalization(cell, name)
    assert cell.parametrizations.weight_ih.original1.shape == (16,)
    weight_normalization(attention, "in_proj_weight")
    weight_normalization(attention.out_proj)
    assert torch.allclose(attention(x, x, x)[0], before, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed", "grouped transposed"])
def test_initialization_from_data(kind: str) -> None:
    module, x = made(kind)
    weight_normalization(module, normalizer="layer")
    x = 3 * torch.cat([x] * 8) + 2 * torch.randn(8 * len(x), *x.shape[1:])
    model = nn.Sequential(module).eval()
    assert initialize_from_data(model, x) == ["0"]
    y = np.moveaxis(model(x).detach().double().numpy(), output_axis(module), 0)
    y = y.reshape(len(y), -1)
    np.testing.assert_allclose(y.mean(1), 0.0, atol=1e-5)
    np.testing.assert_allclose(y.std(1), 1.0, atol=1e-5)
    other = weight_normalization(made(kind)[0], axis=(0, 1))
    with pytest.raises(ValueError, match="does not know which output"):
        initialize_from_data(other, x)
    state = copy.deepcopy(model.state_dict())
    initialize_from_data(model, x)
    assert all(torch.allclose(value, state[name], atol=1e-5) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_one_weight_per_unit(name: str) -> None:
    """A depthwise convolution of one tap: timm's raises there, and an unbiased deviation divides by zero."""
    module, x = nn.Conv2d(3, 3, 1, groups=3), torch.randn(2, 3, 4, 4)
    before = module(x)
    weight_normalization(module, normalizer=name)
    assert torch.allclose(module(x), before, atol=1e-6)
    module(x).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
