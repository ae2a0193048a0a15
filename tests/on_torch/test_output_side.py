"""Linear layers that normalize what comes out, against the product with the weight that they stand for."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

import refold
from refold.torch import attach, output_side, weight_normalization
from refold.weights import METHODS

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "nothing": {"gain": False, "offset": False},
    "all": {"gain": True, "offset": True},
}


def layer(name: str = "unit", bias: bool = True, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    torch.manual_seed(0)
    module = weight_normalization(nn.Linear(12, 10, bias=bias).to(dtype), normalizer=name, **settings)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def batch(dtype: torch.dtype = torch.float64) -> Any:
    return torch.randn(2, 2, 12, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()


def by_the_weight(module: Any, x: Any) -> Any:
    return functional.linear(x, module.weight, module.bias)


@pytest.fixture
def made_outputs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of a layer normalized its output."""
    made: list[bool] = []
    linear = output_side.linear

    def spy(*args: Any) -> Any:
        found = linear(*args)
        made.append(found is not None)
        return found

    monkeypatch.setattr(output_side, "linear", spy)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", METHODS)
def test_output_and_gradients_are_those_of_the_weight(
    name: str, settings: str, bias: bool, made_outputs: list[bool]
) -> None:
    module, x = layer(name, bias, **SETTINGS[settings]), batch()
    out, wanted = module(x), by_the_weight(module, x)
    assert made_outputs == [True]
    assert torch.allclose(out, wanted, rtol=1e-13, atol=1e-13)
    tensors = [x, *module.parameters()]
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, tensors, cotangent)
    for one, other in zip(found, torch.autograd.grad(wanted, tensors, cotangent), strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(module(x), out)


@pytest.mark.parametrize("name", ["unit", "layer", "timm-standardization"])
def test_to_second_order_and_for_some_inputs_only(name: str) -> None:
    module, x = layer(name), batch()
    names = [name for name, _ in module.named_parameters()]
    values = [value.detach().clone().requires_grad_() for value in module.parameters()]

    def run(given: Any, *values: Any) -> Any:
        return torch.nn.utils.stateless.functional_call(module, dict(zip(names, values, strict=True)), (given,))

    assert torch.autograd.gradcheck(run, [x, *values], fast_mode=True)
    assert torch.autograd.gradgradcheck(run, [x, *values], fast_mode=True)
    for alone in range(len(values) + 1):
        fixed = [value.detach().requires_grad_(index == alone) for index, value in enumerate([x, *values])]
        assert torch.autograd.gradcheck(run, fixed, fast_mode=True)


@pytest.mark.parametrize("name", METHODS)
def test_compiled(name: str) -> None:
    for settings in SETTINGS.values():
        module, x = layer(name, **settings), batch()
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        out, wanted = compiled(x), by_the_weight(module, x)
        assert torch.allclose(out, wanted, rtol=1e-13, atol=1e-13)
        tensors = [x, *module.parameters()]
        cotangent = torch.randn_like(out)
        found = torch.autograd.grad(out, tensors, cotangent)
        for one, other in zip(found, torch.autograd.grad(wanted, tensors, cotangent), strict=True):
            assert torch.allclose(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("row", [1e-30, 1e30, 0.0, "constant"])
@pytest.mark.parametrize("name", ["unit", "layer", "deepmind-scaled-standardization"])
def test_extreme_rows(name: str, row: Any, compiled: bool) -> None:
    module, x = layer(name, dtype=torch.float32), batch(torch.float32)
    with torch.no_grad():
        stored = module.parametrizations.weight.original0
        stored[3] = 2.0 if row == "constant" else stored[3] * row
    wide = copy.deepcopy(module).double()
    called = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    out = called(x)
    assert torch.allclose(out.double(), by_the_weight(wide, x.double()), rtol=1e-4, atol=1e-5)
    out.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    if name == "deepmind-scaled-standardization" or row in (0.0, "constant"):
        return  # its floor makes tiny rows of 1e-30 what they are
    assert torch.allclose(out[..., 3].std(), by_the_weight(wide, x.double())[..., 3].std().float(), rtol=1e-4)


def test_where_the_weight_is_made(made_outputs: list[bool]) -> None:
    module, x = layer(dtype=torch.float32), batch(torch.float32)
    wanted = by_the_weight(module, x)
    module(x)
    pickle.loads(pickle.dumps(module))(x)
    copy.deepcopy(module)(x)
    assert made_outputs == [True] * 3
    made_outputs.clear()

    with parametrize.cached():  # nobody asks for an output: the weight is made once
        module(x)
    torch.func.vmap(module)(x)
    torch.func.jvp(module, (x,), (x,))
    torch.func.functional_call(module, dict(module.named_parameters()), (x,))
    assert made_outputs == [True]
    made_outputs.clear()

    many = torch.cat([x] * 4)
    assert torch.allclose(module(many), by_the_weight(module, many), atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.allclose(torch.autograd.forward_ad.unpack_dual(module(dual)).primal, wanted, atol=1e-6)
    half = copy.deepcopy(module).to(torch.bfloat16)
    half_x = x.to(torch.bfloat16)
    assert torch.equal(half(half_x), by_the_weight(half, half_x))
    with torch.no_grad():
        module.parametrizations.weight.original0[0] = 0.0
        module.parametrizations.weight.original0[1] *= 1e30
    assert torch.allclose(module(x), by_the_weight(module, x), atol=1e-6)
    columns = weight_normalization(nn.Linear(12, 10), axis=1)
    assert torch.allclose(columns(x), by_the_weight(columns, x), atol=1e-6)
    assert made_outputs == [False] * 5  # and not asked of rows along another axis


def test_a_parametrization_on_top_is_heard() -> None:
    class Double(nn.Module):
        def forward(self, weight: Any) -> Any:
            return 2 * weight

    module, x = layer(bias=False), batch()
    once = module(x)
    parametrize.register_parametrization(module, "weight", Double())
    assert torch.allclose(module(x), 2 * once)


def test_folds_and_exports_the_weight() -> None:
    model, x = nn.Sequential(layer(dtype=torch.float32), nn.ReLU()).eval(), batch(torch.float32).detach()[0]
    plain = refold.fold(model, x)
    assert torch.allclose(plain.get_submodule("0").weight, model[0].weight, atol=1e-6)
    assert torch.allclose(plain(x), model(x), atol=1e-5)
    program = torch.export.export(model, (x,))
    assert [node.name for node in program.graph.nodes].count("linear") == 1
    assert torch.allclose(program.module()(x), model(x), atol=1e-5)
    assert attach._is_alone(x)
