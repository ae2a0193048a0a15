"""Weights by torch's own kernels, against the steps in float64, to second order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from refold.torch import fused, rows
from refold.torch.namespace import TORCH
from refold.weights import METHODS, Rows, TimmStandardization, method

SHAPE = (5, 3, 2, 2)
LAYOUT = Rows(SHAPE, (0,))
CHOSEN = {name: method(name) for name in METHODS} | {
    "relu in front": TimmStandardization(scaled=True, activation="relu"),
    "a large epsilon": TimmStandardization(epsilon=0.5),
}


def parts(row: float = 1.0, dtype: torch.dtype = torch.float64) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    direction[1] *= row
    gain, offset = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    return [p.to(dtype).requires_grad_() for p in (direction, gain, offset)]


def steps(chosen: Any, direction: Any, gain: Any = None, offset: Any = None) -> Any:
    """Differentiated by torch, step by step."""
    columns = (None if part is None else part.reshape(-1, 1) for part in (gain, offset))
    return rows.as_weight(LAYOUT, chosen.compose(TORCH, rows.as_matrix(LAYOUT, direction), *columns), direction)


@pytest.mark.parametrize("given", [1, 2, 3], ids=["nothing", "gain", "both"])
@pytest.mark.parametrize("name", CHOSEN)
def test_value_and_gradient_are_those_of_the_steps(name: str, given: int) -> None:
    chosen, single, double = CHOSEN[name], parts(dtype=torch.float32)[:given], parts()[:given]
    with torch.no_grad():
        for wide, narrow in zip(double, single, strict=True):
            wide.copy_(narrow)
    cotangent = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    made, expected = rows.compose(chosen, LAYOUT, *[*single, None, None][:3]), steps(chosen, *double)
    assert torch.allclose(made.double(), expected, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(made, single, cotangent.float())
    for grad, reference in zip(found, torch.autograd.grad(expected, double, cotangent), strict=True):
        assert torch.allclose(grad.double(), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CHOSEN)
def test_derivatives_in_both_modes_and_to_second_order(name: str) -> None:
    def run(*given: Any) -> Any:
        return rows.compose(CHOSEN[name], LAYOUT, *given)

    assert torch.autograd.gradcheck(run, parts(), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, parts(), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda v, g: run(v, g, None), parts()[:2], fast_mode=True)


@pytest.mark.parametrize("name", ["unit", "rms", "centered", "layer", "timm-standardization"])
def test_ordinary_rows_take_the_kernels_and_others_do_not(name: str) -> None:
    chosen = method(name)
    for row, taken in ((1.0, True), (1e-30, False), (1e30, False), (0.0, False), (float("nan"), False)):
        direction, gain, _ = parts(row, torch.float32)
        assert (fused.compose(chosen, LAYOUT, direction, gain, None) is not None) is taken
    if chosen.centered:
        direction, gain, _ = parts(dtype=torch.float32)
        assert fused.compose(chosen, LAYOUT, direction + 100, gain, None) is None
        assert fused.compose(chosen, LAYOUT, torch.full_like(direction, 1e-3), gain, None) is None


def test_an_epsilon_that_counts_is_not_left_out() -> None:
    direction, gain, _ = parts(dtype=torch.float32)
    assert fused.compose(method("layer"), LAYOUT, direction * 1e-4, gain, None) is None
    assert fused.compose(method("official-standardization"), LAYOUT, direction, gain, None) is None
    assert fused.compose(method("unit", 1e-3), LAYOUT, direction, gain, None) is None


def test_other_layouts_types_and_transforms_take_another_way() -> None:
    direction, gain, offset = parts(dtype=torch.float32)
    unit = method("unit")
    assert fused.compose(unit, LAYOUT, direction, gain, offset) is None
    assert fused.compose(unit, Rows(SHAPE, (1,)), direction, direction.new_ones(3), None) is None
    assert fused.compose(unit, LAYOUT, direction.bfloat16(), gain, None) is None
    assert fused.compose(unit, LAYOUT, direction.to(memory_format=torch.channels_last), gain, None) is None
    with torch.autograd.forward_ad.dual_level():
        assert fused.compose(unit, LAYOUT, direction, gain, None) is None
    seen = []

    def inside(v: Any) -> Any:
        seen.append(fused.compose(unit, LAYOUT, v, gain, None))
        return v.sum()

    torch.func.grad(inside)(direction.detach())
    assert seen == [None]
