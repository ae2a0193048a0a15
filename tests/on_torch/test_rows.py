"""The gradient by the formula and the kernels for ordinary rows, against the steps in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from refold.torch import rows, weight_normalization
from refold.torch.namespace import TORCH
from refold.weights import METHODS, Rows, method

LAYOUT = Rows((4, 3, 5), (0, 2))


def parts(name: str, row: float = 1.0, dtype: torch.dtype = torch.float64) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    direction[1, :, 2] *= row
    gain, offset = (torch.randn(20, generator=generator, dtype=torch.float64) for _ in range(2))
    return [p.to(dtype).requires_grad_() for p in (direction, gain, offset)]


def steps(name: str, direction: Any, gain: Any, offset: Any) -> Any:
    """Differentiated by torch, step by step."""
    matrix = rows.as_matrix(LAYOUT, direction)
    made = method(name).compose(TORCH, matrix, gain.reshape(-1, 1), offset.reshape(-1, 1))
    return rows.as_weight(LAYOUT, made, direction)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("row", [1.0, 1e-3, 1e-30, 1e30, 0.0])
def test_value_and_gradient_are_those_of_the_steps(name: str, row: float) -> None:
    given, wanted = parts(name, row, torch.float32), parts(name, row)
    with torch.no_grad():
        wanted[0].copy_(given[0])
    cotangent = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    made, expected = rows.compose(method(name), LAYOUT, *given), steps(name, *wanted)
    assert torch.allclose(made.double(), expected, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(made, given, cotangent.float())
    references = torch.autograd.grad(expected, wanted, cotangent)
    for grad, reference in zip(grads, references, strict=True):
        assert grad.isfinite().all()
        scale = reference.abs().amax(dim=1, keepdim=True) if reference.ndim > 1 else reference.abs().max()
        if row != 0 or grad.ndim == 1:
            assert ((grad.double() - reference).abs() <= 3e-5 * scale + 1e-6).all()


@pytest.mark.parametrize("name", METHODS)
def test_finite_differences_in_both_modes_and_to_second_order(name: str) -> None:
    def run(*given: Any) -> Any:
        return rows.compose(method(name), LAYOUT, *given)

    given = parts(name)
    assert torch.autograd.gradcheck(run, given, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, given, fast_mode=True)


@pytest.mark.parametrize("name", ["unit", "layer", "timm-standardization"])
def test_under_torch_func(name: str) -> None:
    given = [p.detach() for p in parts(name)]

    def run(direction: Any) -> Any:
        return rows.compose(method(name), LAYOUT, direction, *given[1:])

    reverse, forward = torch.func.jacrev(run)(given[0]), torch.func.jacfwd(run)(given[0])
    assert torch.allclose(reverse, forward, atol=1e-12)
    many = torch.stack([given[0], 2 * given[0]])
    assert torch.allclose(torch.func.vmap(run)(many)[1], run(many[1]), atol=1e-12)


@pytest.mark.parametrize("name", ["unit", "layer", "timm-standardization"])
def test_ordinary_rows_take_the_kernels_and_extreme_ones_do_not(name: str) -> None:
    for row, ordinary in ((1.0, True), (1e-30, False), (1e30, False), (0.0, False), (float("nan"), False)):
        matrix = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
        matrix[1] *= row
        assert (rows._ordinary(method(name), matrix, None, None) is not None) is ordinary
    nearly_constant = torch.full((1, 8), 3.0)
    nearly_constant[0, 0] += 1e-3
    assert (rows._ordinary(method(name), nearly_constant, None, None) is None) is method(name).centered


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_attaching_changes_no_bit(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    module = nn.Linear(300, 40).to(kind)
    before = module.weight.detach().clone()
    weight_normalization(module)
    assert torch.equal(module.weight, before)


def test_exports_and_copies() -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(weight_normalization(nn.Linear(6, 4), normalizer="layer")).eval(), torch.randn(2, 6)
    wanted = module(x)
    assert torch.allclose(torch.export.export(module, (x,)).module()(x), wanted, atol=1e-6)
    assert torch.equal(copy.deepcopy(module)(x), wanted)
    with torch.no_grad():
        assert torch.equal(module(x), wanted)
